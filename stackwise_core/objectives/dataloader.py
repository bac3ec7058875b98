"""A user's loader, wrapped: its token batches become what a stage trains on, with masks, targets and boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from types import NoneType
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from torch import Tensor

from stackwise_core.config.arguments import check_choice, check_integer, check_type, describe
from stackwise_core.config.schema import Objective
from stackwise_core.data.masks import MaskSpec
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch, input_time_step
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.objectives.raw_batch import check_padding, raw_fields
from stackwise_core.objectives.time_step_masking import TimeStepMasking
from stackwise_core.objectives.trunk_activations import (
    Boundary,
    RowCache,
    RowSource,
    TensorRows,
    checked_boundary,
    computed_rows,
    never_has_ids,
)


class ProgressiveDataLoader:
    """Wraps any iterable of token batches and yields what a stage trains on.

    A batch may be a tensor [B, T], a tuple whose first item is one, or a mapping with `input_ids` and, optionally, the
    fields that `make_batch` reads. Sequence ids default to a content hash of the row, never its index; the view
    defaults to the number of passes made so far, modulo `views`, and `batch` to its place in the pass.

    A `ProgressiveDataLoader` as base, which a trainer may be given, stands for the loader it wraps: the stage that
    reads it has its own index, trunk and time step.

    Yields what `make_batch` returns and view, time_step, stack_idx, trunk_activations and training_objective.
    `time_step` is a tensor [B] where time is an input, the stack's step where it is the depth, else None. Edits of a
    `TimeStepMasking`'s configuration take effect at the next pass. `len()` is that of the base.
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
        """The loader that it wraps is iterated once in every pass.

        Args:
            base_dataloader: yields token batches.
            masking_strategy: how inputs are corrupted (mlm), or a `TimeStepMasking`, whose configuration names the
                objective; None corrupts nothing.
            stack_idx: the creation index of the stack that trains.
            trunk_activations: the boundary below the new stack; None where there is no trunk. Row i of a tensor belongs
                to sequence id i where the batches have `sequence_ids`, else to row i of the loader, which must then
                yield the same rows in every pass.
            cache_activations: with a function as boundary, keep each computed row in RAM for later passes.
            views: mask draws per sequence.
            objective: None is the strategy's: mlm with a `MaskSpec`, clm without a strategy.
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
        if objective is not None:
            check_choice("objective", objective, get_args(Objective))
        self.stack_idx, self.masking_strategy = stack_idx, masking_strategy
        self.given_objective: Objective | None = objective
        self._time_step = time_step
        now = self._corruption()
        self.base_dataloader = unwrapped(base_dataloader, {stack_idx: now.mask_spec}, now.objective)
        self.trunk_activations = trunk_activations
        self._tensor = TensorRows(trunk_activations) if isinstance(trunk_activations, Tensor) else None
        if self._tensor is not None and never_has_ids(self.base_dataloader):
            self._tensor.check_order(self.base_dataloader)
        self.cache_activations = cache_activations
        self.views = views
        self.passes = 0
        self._cache, self._cached_for = RowCache(max_cache_bytes), now

    @property
    def objective(self) -> Objective:
        """The training objective."""
        return self._corruption().objective

    @property
    def mask_spec(self) -> MaskSpec | None:
        """How inputs are corrupted; None with clm and custom."""
        return self._corruption().mask_spec

    @property
    def time_step(self) -> int | None:
        """The step of the stack, where time is the depth."""
        return self._corruption().time_step

    def __len__(self) -> int:
        """Return the number of batches of one pass; TypeError where the base has no length."""
        return len(cast("Sized", self.base_dataloader))

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
        first_row, now = 0, self._corruption()
        if now != self._cached_for:
            self._cache.clear()
            self._cached_for = now
        for number, raw in enumerate(one_pass(self.base_dataloader)):
            fields = {"view": view, "batch": number, **raw_fields(raw)}
            batch = make_batch(fields, now.mask_spec, now.objective)
            if now.causal is not None and "attention_mask" in batch:
                check_padding(batch["attention_mask"], causal=now.causal)
            batch.setdefault("time_step", now.time_step)
            batch |= {"view": fields["view"], "stack_idx": self.stack_idx, "training_objective": now.objective}
            first = None if fields.get("sequence_ids") is not None else first_row
            batch["trunk_activations"] = self._boundary(batch, first)
            first_row += len(batch["sequence_ids"])
            yield batch

    def _boundary(self, batch: Batch, first_row: int | None) -> Tensor | None:
        """Return the boundary of a batch; `first_row` is its place in the pass if its loader gives no ids."""
        source, tokens, ids = self.trunk_activations, batch["input_ids"], batch["sequence_ids"].numpy()
        if source is None:
            return None
        if self._tensor is not None:
            if first_row is not None:
                self._tensor.check_order(self.base_dataloader)
            return checked_boundary(self._tensor.rows(ids, first_row), tokens)
        if isinstance(source, RowSource):
            return checked_boundary(source.rows(ids, batch["view"]), tokens)
        live, steps = cast("Callable[..., Tensor]", source), input_time_step(batch)
        if self.cache_activations:
            return self._cache.rows(live, tokens, steps, ids, batch["view"], batch.get("documents"))
        return computed_rows(live, tokens, steps, batch.get("documents"))

    def _corruption(self) -> _Corruption:
        """Return how inputs are corrupted, as the strategy's configuration says now."""
        found, step = _corruption(self.masking_strategy, self.given_objective, self.stack_idx), self._time_step
        if step is not None and found.mask_spec and found.mask_spec.time:
            allowed = "with time as an input each sequence has its own step; leave it out"
            raise ConfigError([Fault("time_step", str(step), allowed)])
        if found.time_step is not None and step not in (None, found.time_step):
            allowed = f"the masking strategy gives stack {self.stack_idx} the step {found.time_step}; leave it out"
            raise ConfigError([Fault("time_step", str(step), allowed)])
        return found if step is None else found._replace(time_step=step)


def unwrapped(loader: Iterable[Any], masks: dict[int, MaskSpec | None], objective: Objective) -> Iterable[Any]:
    """Return the loader inside a `ProgressiveDataLoader`, which must train as the stage does.

    `masks` says how the stage corrupts its inputs, by the stack that a step trains. A loader that names neither a
    strategy nor an objective fits every stage.
    """
    while isinstance(loader, ProgressiveDataLoader):
        says = loader.masking_strategy is not None or loader.given_objective is not None
        for stack_idx, mask_spec in masks.items() if says else ():
            given = _corruption(loader.masking_strategy, loader.given_objective, stack_idx)
            if given.mask_spec is not None and given.mask_spec != mask_spec:
                allowed = f"stack {stack_idx} is to train on {mask_spec or 'inputs as they are'}; make the two equal"
                raise ConfigError([Fault("masking_strategy", repr(given.mask_spec), allowed)])
            if given.objective != objective:
                allowed = f"the stage trains {objective}: make the two equal"
                raise ConfigError([Fault("objective", repr(given.objective), allowed)])
        if loader.trunk_activations is not None:
            allowed = "every stage has its own trunk: leave them out, or give the trainer a cache"
            raise ConfigError([Fault("trunk_activations", "those of one stage", allowed)])
        loader = loader.base_dataloader
    return loader


class _Corruption(NamedTuple):
    """How the inputs of a stack are corrupted."""

    objective: Objective
    mask_spec: MaskSpec | None
    time_step: int | None
    causal: bool | None
    """Whether positions attend to earlier ones only; None where the loader cannot know."""


def _corruption(
    strategy: MaskSpec | TimeStepMasking | None, objective: Objective | None, stack_idx: int
) -> _Corruption:
    if isinstance(strategy, TimeStepMasking):
        if objective not in (None, strategy.objective):
            allowed = f"the masking strategy's configuration says {strategy.objective}; leave it out"
            raise ConfigError([Fault("objective", repr(objective), allowed)])
        mask_spec, step = strategy.spec_for_stack(stack_idx), strategy.time_step_of(stack_idx)
        return _Corruption(strategy.objective, mask_spec, step, strategy.causal)
    objective = objective or ("clm" if strategy is None else "mlm")
    if (objective == "mlm") != (strategy is not None):
        allowed = "a masking_strategy goes with mlm, and only with mlm"
        raise ConfigError([Fault("objective", repr(objective), allowed)])
    return _Corruption(objective, strategy, None, True if objective == "clm" else None)


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
