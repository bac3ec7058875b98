"""What a stage of the library's trainer gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import Mode, Precision
from stackwise_core.notebook import plot_losses, table
from stackwise_core.objectives.batches import stage_masks
from stackwise_core.stages.stages import StageSpec
from stackwise_core.training.training import Record, Trained


@dataclass
class StageResult:
    """The result of one stage."""

    index: int
    """The number of the stage, from 0."""
    mode: Mode | Literal["joint"] = "append"
    """Where the stage put its stack, or that it trained all of them."""
    precision: Precision | None = None
    """Of the stack that the stage added; None for joint training."""
    time_step: int | None = None
    """Of that stack, where depth is time."""
    mask_ratio: float | None = None
    """None where inputs are not masked, or not all at one ratio."""
    records: list[Record] = field(default_factory=list, repr=False)
    """What every step measured: step, loss, learning_rate, gradient_norm, time, tokens_per_second, memory_bytes."""
    validation_loss: float | None = None
    """Mean over the loss positions of the validation batches [nats]; None without such batches."""
    cooled_loss: float | None = None
    """The same after a cool-down; None unless `validation.cooldown_steps` asks for one and the stage ends at the peak.
    """
    seconds: float = 0.0
    """Of the training steps of this call."""
    parameters: dict[str, int] = field(default_factory=dict)
    """`trained` by the stage, and the `total` of the rack."""
    cache_bytes: int = 0
    """Of the activations that the stage kept in RAM."""
    kept: int | None = None
    """The number of steps after which its weights are kept (`validation.keep: best`), if it took more."""

    @property
    def loss(self) -> float:
        """Training loss of the last step, or of that whose weights are kept [nats]."""
        return self.records[(self.kept or 0) - 1]["loss"]

    @property
    def losses(self) -> list[float]:
        """Training loss of every step [nats]."""
        return [record["loss"] for record in self.records]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.records)

    def _repr_html_(self) -> str:
        return _stages_table([self])

    def summary(self) -> str:
        """Return losses, parameters and time in a line."""
        held_out = "" if self.validation_loss is None else f", validation loss {self.validation_loss:.4f}"
        held_out += "" if self.cooled_loss is None else f", cooled {self.cooled_loss:.4f}"
        trained, total = self.parameters["trained"], self.parameters["total"]
        return f"loss {self.loss:.4f}{held_out}, {trained:,} of {total:,} parameters trained, {self.seconds:.1f} s"


class Results(list[StageResult]):
    """The results of stages, in the order in which they trained; in a notebook a table."""

    def plot(self, axes: Any = None) -> Any:
        """Draw training loss [nats] by step, stage after stage, and the validation losses, with matplotlib.

        `axes` are those to draw on; by default they are made. Returns them. Raises StackWiseError without matplotlib.
        """
        curves, points, before = dict[str, tuple[range, list[float]]](), list[tuple[int, float]](), 0
        for result in self:
            steps = range(before + 1, before + result.steps + 1)
            curves[f"stage {result.index} ({result.mode})"] = (steps, result.losses)
            inside = zip(steps, result.records, strict=True)
            points += [(step, record["validation_loss"]) for step, record in inside if "validation_loss" in record]
            before += result.steps
            if result.validation_loss is not None:
                points.append((before, result.validation_loss))
        return plot_losses(curves, points, axes)

    def _repr_html_(self) -> str:
        return _stages_table(self)


def _stages_table(results: list[StageResult]) -> str:
    columns = ("stage", "how", "steps", "params", "trained", "loss", "val. loss", "seconds")
    rows = [
        (
            result.index,
            result.mode,
            result.steps,
            result.parameters.get("total"),
            result.parameters.get("trained"),
            result.loss,
            result.validation_loss,
            f"{result.seconds:.1f}",
        )
        for result in results
    ]
    return table("Stages", columns, rows)


def result_of(config: StackWiseConfig, spec: StageSpec, trained: Trained, parameters: dict[str, int]) -> StageResult:
    """Return the result of a stage that was just trained; its `validation_loss` and `cache_bytes` are still open."""
    masks = set(stage_masks(config, spec).values())
    mask = masks.pop() if len(masks) == 1 else None
    return StageResult(
        index=spec.index,
        mode=spec.mode,
        precision=None if spec.mode == "joint" else spec.new.precision,
        time_step=spec.time_step,
        mask_ratio=None if mask is None or mask.time else mask.ratio,
        records=trained.records,
        seconds=trained.seconds,
        parameters=parameters,
        kept=trained.kept,
    )
