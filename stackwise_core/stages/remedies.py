"""What to do about a stage that needs more memory than there is: what other settings save, warnings, one message."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from stackwise_core.errors import ConfigError, Fault, OutOfMemoryError, StackWiseError, size, why_no_memory
from stackwise_core.stages.memory import Memory, Setting, memory

_REMEDIES = 3
"""How many the message of a stage without memory names."""
_LITTLE = 0.05
"""A saving below this share of the peak is named only if there is no larger one."""


class Saving(NamedTuple):
    """What a setting would save."""

    key: str
    value: Any
    n_bytes: int
    same_stage: bool
    """Whether the stage stays the same, so that it goes on from its checkpoint."""

    @property
    def shown(self) -> str:
        """The value as a configuration has it."""
        return str(self.value).lower()

    def __str__(self) -> str:
        return f"{self.key}={self.shown} saves {size(self.n_bytes)}"


def savings(setting: Setting) -> list[Saving]:
    """Return what other settings would save of the peak, those first that change the least."""
    spec, peak = setting.spec, memory(setting).peak
    optim, anatomy = spec.optim, spec.anatomy

    def with_optim(**changes: Any) -> Setting:
        return replace(setting, spec=spec.model_copy(update={"optim": optim.model_copy(update=changes)}))

    ways: list[tuple[str, Any, Setting, bool]] = []
    if not setting.checkpointing:
        ways.append(("training.activation_checkpointing", True, replace(setting, checkpointing=True), True))
    if setting.part > 1:
        parts = min(2 * optim.accumulation_steps, optim.batch_size)
        ways.append(("training.accumulation_steps", parts, with_optim(accumulation_steps=parts), False))
    if not optim.eight_bit and setting.shards == 1:
        rounded = with_optim(eight_bit=True, muon_learning_rate=0.0)
        ways.append(("training.optimizer", "adamw8bit", rounded, False))
    if anatomy.head_trains and not anatomy.embedding_trains and spec.mode in ("append", "insert"):
        frozen = spec.model_copy(update={"anatomy": anatomy.model_copy(update={"head_trains": False})})
        ways.append(("training.progressive.train_head", False, replace(setting, spec=frozen), False))
    if setting.shards < setting.processes and not optim.eight_bit and optim.watch is None:
        ways.append(("hardware.shard", "always", replace(setting, shards=setting.processes), True))
    if optim.batch_size > 1:
        half = optim.batch_size // 2
        ways.append(("training.batch_size", half, with_optim(batch_size=half), False))
    found = [Saving(key, value, peak - memory(other).peak, same) for key, value, other, same in ways]
    return [saving for saving in found if saving.n_bytes > 0]


def table(forecast: Memory) -> str:
    """Return a forecast as a line for people."""
    rows = [f"{name} {size(n)}" for name, n in forecast._asdict().items() if n and name != "peak"]
    return f"about {size(forecast.peak)} at its peak: {', '.join(rows)}"


def does_not_fit(setting: Setting, there: int) -> str:
    """Return in a few words why a stage is too large for a device, with remedies; '' if it is not.

    Raises ConfigError where weights, gradients and moments alone are too large for a CUDA device.
    """
    forecast = memory(setting)
    if not there or forecast.peak <= there:
        return ""
    least = forecast.weights + forecast.gradients + forecast.moments
    saved = "; ".join(map(str, savings(setting)))
    remedy = f"{saved}; or make the model smaller" if saved else "make the model smaller"
    if setting.cuda and least > there:
        received = f"stage {setting.spec.index} with {size(least)} of weights, gradients and moments"
        raise ConfigError([Fault("model", received, f"the device has {size(there)}: {remedy}")])
    return f"stage {setting.spec.index} may not fit: {table(forecast)}; the device has {size(there)}: {remedy}"


@contextmanager
def explained(
    setting: Callable[[], Setting], step: Callable[[], int | None], kept: str = "Sealed artifacts are kept"
) -> Generator[None]:
    """Turn an error for want of memory into one message: the forecast, the cheapest remedies, and what is kept.

    Args:
        setting: what the memory of the stage depends on.
        step: that of its last checkpoint, if there is one.
        kept: what is kept without a checkpoint.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StackWiseError) or not (why := why_no_memory(error)):
            raise
        raise OutOfMemoryError(_message(setting(), why, step(), kept)) from error


def _message(setting: Setting, why: str, step: int | None, kept: str) -> str:
    forecast, ways = memory(setting), savings(setting)
    ways = [way for way in ways if way.n_bytes > _LITTLE * forecast.peak][:_REMEDIES] or ways[:_REMEDIES]
    remedies = "; ".join(map(str, ways)) or "make the model smaller"
    stands = kept if step is None else f"The checkpoint at step {step} stands"
    if step is not None and (same := [way.key for way in ways if way.same_stage]):
        stands += f": the stage goes on from it with {same[0]}, the others make it another stage"
    return f"stage {setting.spec.index}: {why}. It takes {table(forecast)}. Remedies: {remedies}. {stands}"
