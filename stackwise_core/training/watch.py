"""What the validations inside a stage decide: when the stage ends, and which of its weights are kept.

All of it follows from the records of the steps and the checkpoint, so that a stage that is resumed decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from stackwise_core.stages.stages import OptimSpec, WatchSpec

Record = dict[str, float]
"""What one step measured: step, loss, learning_rate, gradient_norm; validation_loss, if the model was validated; time
[s since 1970, UTC], tokens_per_second, without the time of validations and checkpoints, and memory_bytes, the most so
far of the device, or of the process on a CPU."""
CLOCKED = ("time", "tokens_per_second", "memory_bytes")
"""What of a record differs from one machine or attempt to the next."""
_BEST = "best."


class Watch:
    """Follows the validation losses of a stage, and holds a copy of the best weights on the CPU if they are kept."""

    def __init__(self, optim: OptimSpec, records: Sequence[Record] = (), state: Mapping[str, Tensor] | None = None):
        """Go on from the records of the steps so far, and the tensors of the checkpoint after them."""
        self._steps, self._spec = optim.steps, optim.watch or WatchSpec(every=0)
        self.lowest, self.best = math.inf, 0
        """The lowest loss, and the number of steps after which it was measured; 0 if there is none."""
        self._taken = self._since = 0
        for record in records:
            self.see(record)
        state = state or {}
        self.tensors = {name.removeprefix(_BEST): state[name] for name in state if name.startswith(_BEST)}
        """The best weights, and what of the optimizer was kept with them, as `capture` names them."""

    def see(self, record: Record) -> bool:
        """Take in the record of a step, and return whether its weights are the best so far and are to be kept."""
        self._taken += 1
        if "validation_loss" not in record:
            return False
        if not record["validation_loss"] < self.lowest:
            self._since += 1
            return False
        self.lowest, self.best, self._since = record["validation_loss"], self._taken, 0
        return self._spec.keep == "best"

    @property
    def is_over(self) -> bool:
        """Whether the stage has taken its last step, or its validation loss has not improved for too long."""
        return self._taken >= self._steps or self.is_out_of_patience

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the last validations, as many as the patience, have not improved on the best before them."""
        return 0 < self._spec.patience <= self._since

    def measures(self, step: int, every: int) -> bool:
        """Return whether to validate after a step; after the last one only if its weights may have to be the best."""
        if step + 1 == self._steps:
            return self._spec.keep == "best"
        return every > 0 and (step + 1) % every == 0

    @property
    def kept(self) -> int | None:
        """The number of steps after which the kept weights were trained, if there were more."""
        return self.best if self._spec.keep == "best" and 0 < self.best < self._taken else None

    def keep(self, tensors: Mapping[str, Tensor], *, with_optimizer: bool) -> None:
        """Copy the weights among the tensors of a state, and the optimizer's if something goes on from them."""
        wanted = {name: tensor for name, tensor in tensors.items() if with_optimizer or name.startswith("model.")}
        self.tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in wanted.items()}

    @property
    def lacks_moments(self) -> bool:
        """Whether the best weights are without the state of their optimizer, since nothing went on from it then."""
        return bool(self.tensors) and not any(name.startswith("optimizer.") for name in self.tensors)

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {f"{_BEST}{name}": tensor for name, tensor in self.tensors.items()}

    def left(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors that a stage which is over leaves, of those of its last checkpoint."""
        if self.kept:
            return self.tensors
        if not self.tensors:
            return tensors
        return {name: tensors[name] for name in tensors if not name.startswith(_BEST)}

    def told(self) -> list[str]:
        """Return what is worth saying of a stage that is over, in a line each."""
        lines: list[str] = []
        if self._taken < self._steps:
            lowest = f"{self.lowest:.4f} after step {self.best}" if self.best else "a number"
            why = f"its validation loss has not fallen below {lowest} (validation.patience: {self._spec.patience})"
            lines.append(f"ended early, after step {self._taken} of {self._steps}: {why}")
        if self.kept:
            lines.append(f"keeps its weights after step {self.kept}, of validation loss {self.lowest:.4f}")
        return lines
