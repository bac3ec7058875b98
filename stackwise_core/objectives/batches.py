"""Batches: tokens in, the dictionary a stage trains on out.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NoneType
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stackwise_core.config.arguments import check_choice, check_integer, check_type, describe
from stackwise_core.data.masks import SALT_DEPTH, VALIDATION_VIEW, IntArray, MaskSpec, content_ids, hash_bits
from stackwise_core.data.order import RowOrder
from stackwise_core.data.packing import PackedSequences
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch, batch_fields, custom_fields, input_time_step
from stackwise_core.objectives.raw_batches import (
    Objective,
    check_loader,
    one_pass,
    raw_fields,
    refuse_own_targets,
    targets_and_masks,
    tokens_and_ids,
)
from stackwise_core.objectives.time_step_masking import TimeStepMasking


@runtime_checkable
class RowSource(Protocol):
    """Anything that has the boundary of a sequence under a view: a store, for one."""

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        """Return the boundary activations of some sequences: [B, T, D]."""
        ...


_BOUNDARIES = "a tensor [N, T, D] of floats, an object with rows(), a callable or None is expected"


def check_trunk(trunk_activations: Any) -> None:
    """Refuse what can be no source of boundaries.

    Raises:
        ConfigError: names what it is, and what is allowed.
    """
    is_tensor = isinstance(trunk_activations, Tensor)
    if is_tensor and (trunk_activations.ndim != 3 or not trunk_activations.is_floating_point()):
        raise ConfigError([Fault("trunk_activations", describe(trunk_activations), _BOUNDARIES)])
    known = is_tensor or isinstance(trunk_activations, RowSource) or callable(trunk_activations)
    if not known and trunk_activations is not None:
        raise ConfigError([Fault("trunk_activations", describe(trunk_activations), _BOUNDARIES)])


def checked_boundary(boundary: Any, tokens: Tensor) -> Tensor:
    """Return the boundary of some tokens [B, T], if it is one: a stack would say less clearly what is wrong with it.

    Raises:
        ConfigError: it is no tensor [B, T, D].
    """
    if not (isinstance(boundary, Tensor) and boundary.ndim == 3 and boundary.shape[:2] == tokens.shape):
        allowed = f"a tensor [B, T, D] is expected for each batch, here ({len(tokens)}, {tokens.shape[1]}, D)"
        raise ConfigError([Fault("trunk_activations", describe(boundary), allowed)])
    return boundary


TrunkActivations = Tensor | RowSource | Callable[..., Tensor]
"""A callable gets the corrupted input_ids [B, T] and, where time is an input, the steps [B]."""


class PackedBatches:
    """The batches of packed sequences from one step to another, in the order all stages share."""

    def __init__(
        self, sequences: PackedSequences, order: RowOrder, start: int, stop: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Remember which steps to yield, start .. stop - 1, and whose share: rank 0 .. ranks - 1 of every batch."""
        self.sequences, self.order, self.start, self.stop = sequences, order, start, stop
        size = order.batch_size
        self.slots = slice(rank * size // ranks, (rank + 1) * size // ranks)

    def __iter__(self) -> Iterator[Batch]:
        """Yield input_ids [B, T], sequence_ids [B], the view and, if batches are fixed, where the rows stand in them.

        That is the batch's number in the view as `batch`, the places in it as `slots` [B] and its size as `batch_rows`.
        """
        slots = np.arange(self.order.batch_size, dtype=np.int64)[self.slots]
        for rows, view, number in self.order.numbered_batches(self.start, self.stop):
            batch: Batch = {**self.sequences.fields(rows[self.slots]), "view": view}
            if self.order.fixed_batches:
                batch |= {"batch": number, "slots": slots, "batch_rows": len(rows)}
            yield batch


class ProgressiveDataLoader:
    """Wraps any iterable of token batches and yields what a stage trains on.

    A batch may be a tensor [B, T], a tuple whose first item is one, or a dict with `input_ids` and, if
    it has them, `sequence_ids`, `view` and `batch`, its number within its view. Sequence ids default to
    a content hash of the row, never its index; the view defaults to the number of passes made so far,
    modulo `views`, and the number of the batch to those of the pass before it.

    The custom objective takes `targets` (or `labels`) [B, T] from the batch and, if it has them, `masks`
    [B, T], the loss positions. The other objectives make both themselves: a batch that brings `targets`
    or `masks` to them is refused, while `labels`, which many loaders add, are left alone.

    A `ProgressiveDataLoader` as base, which is what a trainer may be given, stands for the loader it wraps:
    the stage that reads it has an index, a trunk and a time step of its own.

    Yields a dict with input_ids, targets, masks, time_step, stack_idx, trunk_activations,
    training_objective, sequence_ids and, for clm, clm_mask and combined_masks. `time_step` is a tensor
    [B] where time is an input, the stack's step where it is the depth, else None; for the diffusion
    bound there are `loss_weights` [B].
    """

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        masking_strategy: MaskSpec | TimeStepMasking | None = None,
        stack_idx: int = 0,
        trunk_activations: TrunkActivations | None = None,
        cache_activations: bool = False,
        *,
        views: int = 1,
        objective: Objective | None = None,
        time_step: int | None = None,
    ) -> None:
        """Wrap a loader.

        Args:
            base_dataloader: yields token batches; iterated once per pass over this loader.
            masking_strategy: how inputs are corrupted (mlm); None corrupts nothing.
            stack_idx: the creation index of the stack that trains.
            trunk_activations: the boundary below the new stack: a tensor [N, T, D] in loader order, an
                object with `rows(sequence_ids, view)`, or a callable from input_ids and, where time is an
                input, time_step; None has no trunk.
            cache_activations: with a callable, keep each computed row in RAM for later passes.
            views: mask draws per sequence.
            objective: None is mlm with a masking strategy, else clm.
            time_step: the stack's step with time-as-depth; a `TimeStepMasking` knows it.

        Raises:
            ConfigError: arguments of a wrong type, or that contradict each other.
        """
        check_loader("base_dataloader", base_dataloader)
        check_type("masking_strategy", masking_strategy, (MaskSpec, TimeStepMasking, NoneType), _STRATEGIES)
        check_integer("stack_idx", stack_idx, 0)
        check_type("cache_activations", cache_activations, bool, "True or False is expected")
        check_integer("views", views, 1)
        if time_step is not None:
            check_integer("time_step", time_step, 0)
        if objective is not None:
            check_choice("objective", objective, get_args(Objective))
        check_trunk(trunk_activations)
        if isinstance(trunk_activations, Tensor) and views > 1:
            allowed = "a tensor holds the activations of one view; give an object with rows() or a callable"
            raise ConfigError([Fault("views", str(views), allowed)])
        is_masked = masking_strategy is not None
        if objective is not None and (objective == "mlm") != is_masked:
            allowed = "a masking_strategy goes with mlm, and only with mlm"
            raise ConfigError([Fault("objective", repr(objective), allowed)])
        self.objective: Objective = objective or ("mlm" if is_masked else "clm")
        self.stack_idx = stack_idx
        self.masking_strategy = masking_strategy
        self.mask_spec, self.time_step = _corruption(masking_strategy, stack_idx, time_step)
        self.base_dataloader = _unwrapped(base_dataloader, self.mask_spec, stack_idx)
        self.trunk_activations = trunk_activations
        self.cache_activations = cache_activations
        self.views = views
        self.passes = 0
        self._recorded: dict[tuple[int, int, int | None], tuple[int, Tensor]] = {}

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        view = self.passes % self.views
        self.passes += 1
        first_row = 0
        for number, raw in enumerate(one_pass(self.base_dataloader)):
            fields = raw_fields(raw)
            batch = self._batch(fields, fields.get("view", view), number, first_row)
            first_row += len(batch["sequence_ids"])
            yield batch

    def _batch(self, fields: Batch, view: int, number: int, first_row: int) -> Batch:
        tokens, ids = tokens_and_ids(fields)
        if self.objective == "custom":
            batch = custom_fields(tokens, *targets_and_masks(fields))
        else:
            refuse_own_targets(fields, self.objective)
            batch = batch_fields(tokens, ids, view, self.mask_spec, self._steps(ids, view, {"batch": number, **fields}))
        batch.setdefault("time_step", self.time_step)
        batch["stack_idx"] = self.stack_idx
        batch["training_objective"] = self.objective
        batch["sequence_ids"] = torch.from_numpy(ids)
        batch["trunk_activations"] = self._boundary(batch, ids, view, first_row)
        return batch

    def _steps(self, ids: IntArray, view: int, fields: Batch) -> IntArray | None:
        if self.mask_spec is None or self.mask_spec.time is None:
            return None
        slots, n_rows = fields.get("slots", np.arange(len(ids), dtype=np.int64)), fields.get("batch_rows", len(ids))
        batches = np.full_like(slots, fields["batch"])
        return self.mask_spec.time.steps(self.mask_spec.seed, ids, view, batches, slots, n_rows)

    def _boundary(self, batch: Batch, ids: IntArray, view: int, first_row: int) -> Tensor | None:
        source = self.trunk_activations
        if source is None:
            return None
        if isinstance(source, Tensor):
            if first_row + len(ids) > len(source):
                received = f"{len(source)} rows"
                raise ConfigError([Fault("trunk_activations", received, "one row for every row of the loader")])
            return checked_boundary(source[first_row : first_row + len(ids)], batch["input_ids"])
        if isinstance(source, RowSource):
            return checked_boundary(source.rows(ids, view), batch["input_ids"])
        steps = input_time_step(batch)
        if self.cache_activations:
            return self._recording(source, batch["input_ids"], steps, ids, view)
        return _run(source, batch["input_ids"], steps)

    def _recording(
        self, live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None, ids: IntArray, view: int
    ) -> Tensor:
        """Return the boundary of some sequences, computing those that were not asked for before."""
        step_of: list[int | None] = [None] * len(ids) if steps is None else steps.tolist()
        keys = [(int(sequence_id), view, step) for sequence_id, step in zip(ids, step_of, strict=True)]
        contents: list[int] = content_ids(tokens.numpy()).tolist()
        new = [n for n, key in enumerate(keys) if key not in self._recorded]
        if new:
            rows = _run(live, tokens[new], None if steps is None else steps[new])
            for n, row in zip(new, rows, strict=True):
                self._recorded[keys[n]] = contents[n], row
        for key, content in zip(keys, contents, strict=True):
            if self._recorded[key][0] != content:
                allowed = "an id of its own for every sequence; two different ones came under this id"
                raise ConfigError([Fault("sequence_ids", str(key[0]), allowed)])
        return torch.stack([self._recorded[key][1] for key in keys])


class JointDataLoader:
    """Batches of joint training where depth is time: each step trains the rack of one stack, at its ratio.

    Which one is hash(seed, step); the stacks that were created after it are left out of that step.
    """

    def __init__(
        self,
        base_dataloader: Iterable[Any],
        mask_specs: Sequence[MaskSpec],
        time_steps: Sequence[int],
        seed: int,
        views: int,
        first_step: int = 0,
    ) -> None:
        """Wrap a loader.

        Args:
            base_dataloader: as of `ProgressiveDataLoader`.
            mask_specs: how the stage of each stack corrupts its inputs, by creation index.
            time_steps: of each stack.
            seed: of the run.
            views: mask draws per sequence.
            first_step: of the first batch; passes go on counting.
        """
        self.base_dataloader, *_ = [_unwrapped(base_dataloader, spec, stack) for stack, spec in enumerate(mask_specs)]
        self.mask_specs, self.time_steps = mask_specs, time_steps
        self.seed, self.views, self.step, self.passes = seed, views, first_step, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        view = self.passes % self.views
        self.passes += 1
        for raw in one_pass(self.base_dataloader):
            stack = int(hash_bits(self.seed, SALT_DEPTH, self.step)[0] % np.uint64(len(self.mask_specs)))
            self.step += 1
            fields = {"view": view, **raw_fields(raw)}
            yield from ProgressiveDataLoader([fields], self.mask_specs[stack], stack, time_step=self.time_steps[stack])


def validation_batch(
    sequences: PackedSequences, rows: IntArray, mask_spec: MaskSpec | None, objective: Objective
) -> Batch:
    """Return some validation sequences as one batch, under the corruption that every run validates with."""
    base = [{**sequences.fields(rows), "view": VALIDATION_VIEW}]
    (batch,) = ProgressiveDataLoader(base, mask_spec and mask_spec.for_validation(), objective=objective)
    return batch


_STRATEGIES = "a MaskSpec, a TimeStepMasking or None is expected"


def _run(live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None) -> Tensor:
    return checked_boundary(live(tokens) if steps is None else live(tokens, steps), tokens)


def _corruption(
    strategy: MaskSpec | TimeStepMasking | None, stack_idx: int, time_step: int | None
) -> tuple[MaskSpec | None, int | None]:
    """Return the corruption of the stack that trains, and its own time step if it has one."""
    spec, own_step = None, None
    if isinstance(strategy, TimeStepMasking):
        spec = strategy.spec_for_stack(stack_idx)
        own_step = None if spec.time else strategy.get_time_step_for_stack(stack_idx)
    else:
        spec = strategy
    if time_step is not None and spec is not None and spec.time is not None:
        allowed = "with time as an input each sequence has its own step; leave it out"
        raise ConfigError([Fault("time_step", str(time_step), allowed)])
    if own_step is not None and time_step not in (None, own_step):
        allowed = f"the masking strategy gives stack {stack_idx} the step {own_step}; leave it out"
        raise ConfigError([Fault("time_step", str(time_step), allowed)])
    return spec, time_step if own_step is None else own_step


def _unwrapped(base_dataloader: Iterable[Any], mask_spec: MaskSpec | None, stack_idx: int) -> Iterable[Any]:
    """Return the loader below a `ProgressiveDataLoader` that a stage was given, if it asks for nothing else.

    Raises:
        ConfigError: it corrupts otherwise than the stage does, or brings the activations of one trunk.
    """
    while isinstance(base_dataloader, ProgressiveDataLoader):
        own, _ = _corruption(base_dataloader.masking_strategy, stack_idx, None)
        if own is not None and own != mask_spec:
            allowed = f"stack {stack_idx} is to train on {mask_spec or 'inputs as they are'}; make the two equal"
            raise ConfigError([Fault("masking_strategy", repr(own), allowed)])
        if base_dataloader.trunk_activations is not None:
            allowed = "every stage has a trunk of its own: leave them out, or give the trainer a cache"
            raise ConfigError([Fault("trunk_activations", "those of one stage", allowed)])
        base_dataloader = base_dataloader.base_dataloader
    return base_dataloader


# ---------------------------------------------------------------- reading a batch
