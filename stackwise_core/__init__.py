"""The torch core of StackWise: grow a rack of transformer stacks, one at a time.

The public names are imported on first use, so that reading a configuration costs no torch. The last letters of a
tensor's name are its dimensions: B sequences, T positions, D channels; modules that use others list them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stackwise_core.config import StackWiseConfig as StackWiseConfig
    from stackwise_core.data.masks import MaskSpec as MaskSpec
    from stackwise_core.model.rack_builder import ProgressiveRackBuilder as ProgressiveRackBuilder
    from stackwise_core.model.rack_builder import create_stack_from_config as create_stack_from_config
    from stackwise_core.objectives.dataloader import ProgressiveDataLoader as ProgressiveDataLoader
    from stackwise_core.objectives.time_step_masking import TimeStepMasking as TimeStepMasking
    from stackwise_core.training.trainer import ProgressiveTrainer as ProgressiveTrainer

_HOMES = {
    "StackWiseConfig": "config",
    "ProgressiveDataLoader": "objectives.dataloader",
    "MaskSpec": "data.masks",
    "ProgressiveRackBuilder": "model.rack_builder",
    "create_stack_from_config": "model.rack_builder",
    "ProgressiveTrainer": "training.trainer",
    "TimeStepMasking": "objectives.time_step_masking",
}

__all__ = [
    "MaskSpec",
    "ProgressiveDataLoader",
    "ProgressiveRackBuilder",
    "ProgressiveTrainer",
    "StackWiseConfig",
    "TimeStepMasking",
    "create_stack_from_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"stackwise_core has no public name {name!r}")
    return getattr(importlib.import_module(f"stackwise_core.{_HOMES[name]}"), name)
