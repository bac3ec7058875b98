"""What decides the numbers of a stage in the library, apart from the batches that its loader yields."""

from __future__ import annotations

import hashlib
from typing import Any

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.functions import source_digest
from stackwise_core.errors import ConfigError
from stackwise_core.objectives.batches import stage_masks
from stackwise_core.stages.identity import canonical_json
from stackwise_core.stages.resolve import resolve_views
from stackwise_core.stages.stages import StageSpec


def stage_settings(config: StackWiseConfig, spec: StageSpec) -> dict[str, Any]:
    """Return the settings of a stage as JSON values; a function object stands there by its name and source."""
    masks = stage_masks(config, spec).items()
    return {
        "stage": spec.model_dump(mode="json", exclude={"optim": {"batch_size"}}),  # the loader decides the batches
        "masks": {str(stack): mask and mask.model_dump(mode="json") for stack, mask in masks},
        "objective": config.training.progressive.training_objective,
        "custom_loss": _named(config.training.custom_loss),
        "loss_weighting": config.training.loss_weighting,
        "seed": config.run.seed,
        "views": resolve_views(config),
        "cache_dtype": config.cache.dtype,
    }


def digest_of(settings: dict[str, Any], function: object = "") -> str:
    """Return the hash of a stage's settings; with a function object, of that very one, whatever its source."""
    text = canonical_json({**settings, "object": id(function) if callable(function) else 0})
    return hashlib.sha256(text.encode()).hexdigest()


def _named(function: Any) -> str:
    if not callable(function):
        return function
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        return f"{name}, sha256 {source_digest(function, 'custom_loss')[:12]}"
    except ConfigError:  # its source cannot be read
        return name
