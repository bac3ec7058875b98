"""Masks by stack or by time step, for custom training loops; the ratio of a step is decided in config/stacks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_integer, check_type
from stackwise_core.config.rules import time_faults
from stackwise_core.config.stacks import mask_ratio_of, n_time_steps, resolve_time_input, stack_time_step
from stackwise_core.data.masks import VALIDATION_VIEW, IntArray, MaskSpec
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.make_batch import tokens_and_ids
from stackwise_core.stages.resolve import resolve_mask


class TimeStepMasking:
    """The masks of a configuration with diffusion time, by stack or by step."""

    def __init__(self, config: StackWiseConfig) -> None:
        """Take a configuration whose time is an input or the depth."""
        check_type("config", config, StackWiseConfig, "a StackWiseConfig is expected")
        growth = config.training.progressive
        faults = list(time_faults(config))
        if growth.time_interpretation == "none":
            faults.append(Fault("training.progressive.time_interpretation", "'none'", "use depth or input"))
        if growth.training_objective != "mlm":
            objective = repr(growth.training_objective)
            faults.append(Fault("training.progressive.training_objective", objective, "only mlm has masks"))
        if faults:
            raise ConfigError(faults)
        self.config = config

    def get_time_step_for_stack(self, stack_idx: int) -> int:
        """Return the time step of the stack with this creation index, where time is the depth."""
        if self.config.training.progressive.time_interpretation != "depth":
            allowed = "a stack has a time step only with depth"
            raise ConfigError([Fault("training.progressive.time_interpretation", "'input'", allowed)])
        check_integer("stack_idx", stack_idx, 0, self.config.training.progressive.max_stacks - 1)
        return stack_time_step(self.config, int(stack_idx))

    def spec_for_stack(self, stack_idx: int) -> MaskSpec:
        """Return how the stage of a stack corrupts its inputs: at its step's ratio, or by each sequence's step."""
        time = resolve_time_input(self.config)
        ratio = 0.0 if time else mask_ratio_of(self.config, self.get_time_step_for_stack(stack_idx))
        return self._spec(ratio).model_copy(update={"time": time})

    def generate_masks_for_stack(
        self, input_ids: Tensor, stack_idx: int, sequence_ids: Tensor | IntArray | None = None, view: int = 0
    ) -> Tensor:
        """Return the masks that a stack trains on; see `generate_masks_for_time_step`."""
        step = self.get_time_step_for_stack(stack_idx)
        return self.generate_masks_for_time_step(input_ids, step, sequence_ids, view)

    def generate_masks_for_time_step(
        self, input_ids: Tensor, time_step: int, sequence_ids: Tensor | IntArray | None = None, view: int = 0
    ) -> Tensor:
        """Return which positions of input_ids [B, T] are masked at a time step: booleans [B, T].

        Masks of a step with a lower ratio are contained in those of a higher one. Sequence ids [B] default to content
        hashes of the rows, as in `ProgressiveDataLoader`.
        """
        check_integer("time_step", time_step, 0, n_time_steps(self.config) - 1)
        check_integer("view", view, VALIDATION_VIEW)
        fields = {"input_ids": input_ids, "sequence_ids": sequence_ids}
        tokens, ids = tokens_and_ids(fields, source="input_ids")
        masks = self._spec(mask_ratio_of(self.config, time_step)).masks(ids, view, tokens.shape[1])
        return torch.from_numpy(masks)

    def _spec(self, ratio: float) -> MaskSpec:
        spec = resolve_mask(self.config, 0)
        assert spec is not None
        return spec.model_copy(update={"ratio": ratio, "time": None})
