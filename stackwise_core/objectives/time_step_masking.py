"""Masks by batch, stack or time step, for custom training loops; config/stacks.py decides the ratio of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_integer, check_type
from stackwise_core.config.rules import time_faults
from stackwise_core.config.schema import Objective
from stackwise_core.config.stacks import n_time_steps, stack_time_step, time_schedule
from stackwise_core.data.masks import VALIDATION_VIEW, IntArray, MaskSpec, content_ids
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.make_batch import drawn_steps
from stackwise_core.objectives.raw_batch import maskable_positions, tokens_and_ids
from stackwise_core.stages.resolve import resolve_mask, resolve_shape

_INTERPRETATION = "training.progressive.time_interpretation"


class TimeStepMasking:
    """The masks of a configuration: at one ratio (`none`), by stack (`depth`) or by drawn time steps (`input`).

    With `depth` by intervals each sequence draws one of its stack's ratios. Only mlm masks inputs; with clm and custom
    every mask is empty, and `depth` is a step that batches record. Edits of the configuration take effect at the next
    call.

    A `batch` below is a tensor [B, T] of clean tokens, or a mapping with `input_ids` and, optionally, the fields that
    `make_batch` reads; a batch that a `ProgressiveDataLoader` made has the masks that it was made with. Masks are
    booleans [B, T], True where the input is corrupted, on the device of the tokens. `sequence_ids` [B] default to
    those of the batch, else to content hashes of its rows, and `view` to that of the batch, else 0.
    """

    def __init__(self, config: StackWiseConfig) -> None:
        """The configuration's settings of time must be valid."""
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected")
        self.config = config
        self._checked()

    @property
    def objective(self) -> Objective:
        """The training objective of the configuration."""
        return self.config.training.progressive.training_objective

    @property
    def causal(self) -> bool:
        """Whether the configuration's racks attend to earlier positions only."""
        return resolve_shape(self.config).causal

    def get_time_step_for_stack(self, stack_idx: int) -> int:
        """Return the time step of the stack with this creation index, where time is the depth."""
        growth = self._checked().training.progressive
        if growth.time_interpretation != "depth":
            allowed = "a stack has a time step only with depth"
            raise ConfigError([Fault(_INTERPRETATION, repr(growth.time_interpretation), allowed)])
        check_integer("stack_idx", stack_idx, 0, growth.max_stacks - 1)
        return stack_time_step(self.config, int(stack_idx))

    def time_step_of(self, stack_idx: int) -> int | None:
        """Return the time step that batches of a stack record; None unless time is the depth."""
        is_depth = self.config.training.progressive.time_interpretation == "depth"
        return self.get_time_step_for_stack(stack_idx) if is_depth else None

    def spec_for_stack(self, stack_idx: int) -> MaskSpec | None:
        """Return how the stage of a stack corrupts its inputs; None with clm and custom."""
        growth = self._checked().training.progressive
        check_integer(
            "stack_idx", stack_idx, 0, growth.max_stacks - 1 if growth.time_interpretation == "depth" else None
        )
        return resolve_mask(self.config, int(stack_idx))

    def time_steps(self, batch: Any, sequence_ids: Any = None, view: int | None = None) -> Tensor:
        """Return the time step of each sequence [B].

        With `input` they are drawn as in training: s = floor(u T), u = hash(seed, view, ...) uniform in [0, 1). Drawn
        per batch, u depends on the `batch` number, else on the sequence ids: the same batch has the same steps. With
        `depth` it is the step of the batch's `stack_idx`.
        """
        fields = self._fields(batch, sequence_ids, view)
        stack_idx = self._stack_of(fields)
        if (step := self.time_step_of(stack_idx)) is not None:
            return torch.full((len(fields["sequence_ids"]),), step, device=_device(batch))
        spec = self.spec_for_stack(stack_idx)
        if spec is None or spec.time is None:
            raise ConfigError([Fault(_INTERPRETATION, "'none'", "there are time steps only with depth and input")])
        return torch.from_numpy(self._steps(spec, fields)).to(_device(batch))

    def generate_masks(self, batch: Any, sequence_ids: Any = None, view: int | None = None) -> Tensor:
        """Return the masks of a batch: with `depth`, of its `stack_idx`; with `input`, of its `time_steps`."""
        fields = self._fields(batch, sequence_ids, view)
        spec = self.spec_for_stack(self._stack_of(fields)) if self.objective == "mlm" else None
        return self._masks(fields, spec).to(_device(batch))

    def generate_masks_for_stack(
        self, batch: Any, stack_idx: int, sequence_ids: Any = None, view: int | None = None
    ) -> Tensor:
        """Return the masks that a stack trains on; without depth as time they are the same for every stack."""
        spec = self.spec_for_stack(stack_idx)
        return self._masks(self._fields(batch, sequence_ids, view), spec).to(_device(batch))

    def generate_masks_for_time_step(
        self, batch: Any, time_step: int | Tensor, sequence_ids: Any = None, view: int | None = None
    ) -> Tensor:
        """Return the masks of a time step, one for all sequences or one for each [B].

        Masks of a step with a lower ratio are contained in those of a higher one.
        """
        if self._checked().training.progressive.time_interpretation == "none":
            allowed = "there are time steps only with depth and input; generate_masks masks at training.mask_ratio"
            raise ConfigError([Fault(_INTERPRETATION, "'none'", allowed)])
        fields, spec = self._fields(batch, sequence_ids, view), resolve_mask(self.config, 0)
        n_rows = len(fields["sequence_ids"])
        each = isinstance(time_step, Tensor) and time_step.ndim > 0
        steps = self._valid_steps(time_step if each else [time_step] * n_rows, n_rows)
        timed = spec and spec.model_copy(update={"time": time_schedule(self.config), "span": None})
        return self._masks(fields, timed, steps).to(_device(batch))

    def _valid_steps(self, given: Any, n_rows: int) -> IntArray:
        """Return the steps that a caller gives, one for each row [B]."""
        for step in (steps := given.tolist() if isinstance(given, Tensor) else given):
            number = step.item() if isinstance(step, Tensor) and not step.ndim else step
            check_integer("time_step", number, 0, n_time_steps(self.config) - 1)
        if len(steps) != n_rows:
            raise ConfigError([Fault("time_step", f"{len(steps)} steps", f"one, or one for each of {n_rows} rows")])
        return np.asarray([int(step) for step in steps], dtype=np.int64)

    def _masks(self, fields: Batch, spec: MaskSpec | None, steps: IntArray | None = None) -> Tensor:
        tokens = fields["input_ids"]
        if spec is None:
            return torch.zeros(tokens.shape, dtype=torch.bool)
        steps = self._steps(spec, fields) if steps is None and spec.time else steps
        masks = spec.masks(fields["sequence_ids"], fields["view"], tokens.shape[1], steps)
        maskable = maskable_positions(fields, tokens)
        return torch.from_numpy(masks if maskable is None else masks & maskable)

    def _steps(self, spec: MaskSpec, fields: Batch) -> IntArray:
        """Return the steps [B] that a batch carries, else those that are drawn for it."""
        ids = fields["sequence_ids"]
        if isinstance(given := fields.get("time_step"), Tensor):
            return self._valid_steps(given, len(ids))
        steps = drawn_steps(spec, ids, {"batch": content_ids(np.sort(ids)[None])[0], **fields})
        assert steps is not None
        return steps

    def _fields(self, batch: Any, sequence_ids: Any, view: int | None) -> Batch:
        """Return the fields of a batch with tokens, sequence ids and view as training reads them."""
        self._checked()
        fields = dict(cast("Mapping[str, Any]", batch)) if isinstance(batch, Mapping) else {"input_ids": batch}
        fields |= {} if sequence_ids is None else {"sequence_ids": sequence_ids}
        fields["view"] = fields.get("view", 0) if view is None else view
        check_integer("view", fields["view"], VALIDATION_VIEW)
        tokens, ids = tokens_and_ids(fields, source="batch")
        return {**fields, "input_ids": tokens, "sequence_ids": ids}

    def _stack_of(self, fields: Batch) -> int:
        """Return the stack that a batch trains; any will do where time is not the depth."""
        if self.config.training.progressive.time_interpretation != "depth":
            return 0
        if "stack_idx" not in fields:
            allowed = "with depth as time each stack has its own masks: call generate_masks_for_stack(batch, stack_idx)"
            raise ConfigError([Fault("batch", "no stack_idx", allowed)])
        return fields["stack_idx"]

    def _checked(self) -> StackWiseConfig:
        """Return the configuration, which may have been edited."""
        if faults := list(time_faults(self.config)):
            raise ConfigError(faults)
        return self.config


def _device(batch: Any) -> torch.device:
    tokens: Any = cast("Mapping[str, Any]", batch)["input_ids"] if isinstance(batch, Mapping) else batch
    return tokens.device if isinstance(tokens, Tensor) else torch.device("cpu")
