"""A user's loader, wrapped: its token batches become what a stage trains on, with masks, targets and boundary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any, get_args

import numpy as np
from torch import Tensor

from stackwise_core.config.arguments import check_choice, check_integer, check_type, describe
from stackwise_core.data.masks import MaskSpec
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch, input_time_step
from stackwise_core.objectives.make_batch import Objective, make_batch, raw_fields
from stackwise_core.objectives.time_step_masking import TimeStepMasking
from stackwise_core.objectives.trunk_activations import (
    Boundary,
    RowCache,
    RowSource,
    checked_boundary,
    computed_rows,
)


class ProgressiveDataLoader:
    """Wraps any iterable of token batches and yields what a stage trains on.

    A batch may be a tensor [B, T], a tuple whose first item is one, or a dict with `input_ids` and, optionally, the
    fields that `make_batch` reads. Sequence ids default to a content hash of the row, never its index; the view
    defaults to the number of passes made so far, modulo `views`, and `batch` to its place in the pass.

    A `ProgressiveDataLoader` as base, which a trainer may be given, stands for the loader it wraps: the stage that
    reads it has its own index, trunk and time step.

    Yields what `make_batch` returns and time_step, stack_idx, trunk_activations and training_objective. `time_step`
    is a tensor [B] where time is an input, the stack's step where it is the depth, else None.
    """

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        masking_strategy: MaskSpec | TimeStepMasking | None = None,
        stack_idx: int = 0,
        trunk_activations: Boundary | None = None,
        cache_activations: bool = False,
        *,
        views: int = 1,
        objective: Objective | None = None,
        time_step: int | None = None,
        max_cache_bytes: int | None = None,
    ) -> None:
        """Wrap a loader.

        Args:
            base_dataloader: yields token batches; iterated once per pass over this loader.
            masking_strategy: how inputs are corrupted (mlm); None corrupts nothing.
            stack_idx: the creation index of the stack that trains.
            trunk_activations: the boundary below the new stack; None where there is no trunk.
            cache_activations: with a function as boundary, keep each computed row in RAM for later passes.
            views: mask draws per sequence.
            objective: None is mlm with a masking strategy, else clm.
            time_step: the stack's step with time-as-depth; a `TimeStepMasking` knows it.
            max_cache_bytes: where `cache_activations` keeps rows, those beyond this limit are computed again in every
                pass, after one warning of the logger `stackwise`; None sets no limit.
        """
        check_loader("base_dataloader", base_dataloader)
        strategies = "a MaskSpec, a TimeStepMasking or None is expected"
        check_type("masking_strategy", masking_strategy, (MaskSpec, TimeStepMasking, NoneType), strategies)
        check_integer("stack_idx", stack_idx, 0)
        check_type("cache_activations", cache_activations, bool, "True or False is expected")
        check_integer("views", views, 1)
        if time_step is not None:
            check_integer("time_step", time_step, 0)
        if max_cache_bytes is not None:
            check_integer("max_cache_bytes", max_cache_bytes, 0)
        _check_boundary_source(trunk_activations, views)
        is_masked = masking_strategy is not None
        if objective is not None:
            check_choice("objective", objective, get_args(Objective))
            if (objective == "mlm") != is_masked:
                allowed = "a masking_strategy goes with mlm, and only with mlm"
                raise ConfigError([Fault("objective", repr(objective), allowed)])
        self.objective: Objective = objective or ("mlm" if is_masked else "clm")
        self.stack_idx = stack_idx
        self.masking_strategy = masking_strategy
        self.mask_spec, self.time_step = _corruption(masking_strategy, stack_idx, time_step)
        self.base_dataloader = unwrapped(base_dataloader, {stack_idx: self.mask_spec})
        self.trunk_activations = trunk_activations
        self.cache_activations = cache_activations
        self.views = views
        self.passes = 0
        self._cache = RowCache(max_cache_bytes)

    @property
    def cached_rows(self) -> int:
        """Rows that `cache_activations` keeps in RAM."""
        return len(self._cache)

    @property
    def cache_bytes(self) -> int:
        """Bytes of these rows."""
        return self._cache.n_bytes

    @property
    def cache_full(self) -> bool:
        """Whether `max_cache_bytes` left out a row."""
        return self._cache.full

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        view = self.passes % self.views
        self.passes += 1
        first_row = 0
        for number, raw in enumerate(one_pass(self.base_dataloader)):
            fields = {"view": view, "batch": number, **raw_fields(raw)}
            batch = make_batch(fields, self.mask_spec, self.objective)
            batch.setdefault("time_step", self.time_step)
            batch["stack_idx"] = self.stack_idx
            batch["training_objective"] = self.objective
            batch["trunk_activations"] = self._boundary(batch, fields["view"], first_row)
            first_row += len(batch["sequence_ids"])
            yield batch

    def _boundary(self, batch: Batch, view: int, first_row: int) -> Tensor | None:
        source, tokens, ids = self.trunk_activations, batch["input_ids"], batch["sequence_ids"].numpy()
        if source is None:
            return None
        if isinstance(source, Tensor):
            if first_row + len(ids) > len(source):
                received = f"{len(source)} rows"
                raise ConfigError([Fault("trunk_activations", received, "one row for every row of the loader")])
            return checked_boundary(source[first_row : first_row + len(ids)], tokens)
        if isinstance(source, RowSource):
            return checked_boundary(source.rows(ids, view), tokens)
        steps = input_time_step(batch)
        if self.cache_activations:
            return self._cache.rows(source, tokens, steps, ids, view)
        return computed_rows(source, tokens, steps)


def unwrapped(loader: Iterable[Any], masks: dict[int, MaskSpec | None]) -> Iterable[Any]:
    """Return the loader inside a `ProgressiveDataLoader`, which must corrupt inputs as the stage does.

    `masks` says how the stage corrupts its inputs, by the stack that a step trains.
    """
    while isinstance(loader, ProgressiveDataLoader):
        for stack_idx, mask_spec in masks.items():
            given, _ = _corruption(loader.masking_strategy, stack_idx, None)
            if given is not None and given != mask_spec:
                allowed = f"stack {stack_idx} is to train on {mask_spec or 'inputs as they are'}; make the two equal"
                raise ConfigError([Fault("masking_strategy", repr(given), allowed)])
        if loader.trunk_activations is not None:
            allowed = "every stage has its own trunk: leave them out, or give the trainer a cache"
            raise ConfigError([Fault("trunk_activations", "those of one stage", allowed)])
        loader = loader.base_dataloader
    return loader


def _corruption(
    strategy: MaskSpec | TimeStepMasking | None, stack_idx: int, time_step: int | None
) -> tuple[MaskSpec | None, int | None]:
    """Return the corruption of the stack that trains, and its time step where depth is time."""
    known_step = None
    if isinstance(strategy, TimeStepMasking):
        spec = strategy.spec_for_stack(stack_idx)
        known_step = None if spec.time else strategy.get_time_step_for_stack(stack_idx)
    else:
        spec = strategy
    if time_step is not None and spec is not None and spec.time is not None:
        allowed = "with time as an input each sequence has its own step; leave it out"
        raise ConfigError([Fault("time_step", str(time_step), allowed)])
    if known_step is not None and time_step not in (None, known_step):
        allowed = f"the masking strategy gives stack {stack_idx} the step {known_step}; leave it out"
        raise ConfigError([Fault("time_step", str(time_step), allowed)])
    return spec, time_step if known_step is None else known_step


def check_loader(name: str, loader: Any) -> None:
    """Reject an argument that cannot yield batches before the first batch is requested."""
    allowed = "anything that yields batches is expected: a DataLoader, or a list of tensors [B, T]"
    if isinstance(loader, (str, bytes, dict)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise ConfigError([Fault(name, describe(loader), allowed)])
    if isinstance(loader, (Tensor, np.ndarray)) and loader.ndim != 3:
        allowed = "rows are not batches: wrap it in DataLoader(..., batch_size=...), or cut it into tensors [B, T]"
        raise ConfigError([Fault(name, describe(loader), allowed)])


def _check_boundary_source(source: Any, views: int) -> None:
    is_tensor = isinstance(source, Tensor)
    if is_tensor:
        known = source.ndim == 3 and source.is_floating_point()
    else:
        known = source is None or isinstance(source, RowSource) or callable(source)
    if not known:
        allowed = "a tensor [N, T, D] of floats, an object with rows(), a callable or None is expected"
        raise ConfigError([Fault("trunk_activations", describe(source), allowed)])
    if is_tensor and views > 1:
        allowed = "a tensor holds the activations of one view; give an object with rows() or a callable"
        raise ConfigError([Fault("views", str(views), allowed)])


def one_pass(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one pass over a loader; a pass without a batch is an error."""
    empty = True
    for raw in loader:
        empty = False
        yield raw
    if empty:
        exhausted = isinstance(loader, Iterator)
        received = "an exhausted iterator" if exhausted else f"no batch from {describe(loader)}"
        allowed = (
            "every epoch of every stage iterates over it anew: give a list of batches, a DataLoader, "
            "or an object whose __iter__ starts from the beginning"
        )
        raise ConfigError([Fault("base_dataloader", received, allowed)])
