"""The batches of a stage: in which order, with which masks and targets, on which boundary.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from types import NoneType
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.arguments import check_choice, check_integer, check_type, describe
from stackwise_core.data.masks import SALT_DEPTH, IntArray, MaskSpec, content_ids, hash_bits
from stackwise_core.data.order import RowOrder
from stackwise_core.data.packing import PackedSequences
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.objectives.losses import Batch, input_time_step
from stackwise_core.objectives.make_batch import Objective, make_batch, raw_fields
from stackwise_core.objectives.time_step_masking import TimeStepMasking
from stackwise_core.stages.resolve import resolve_mask
from stackwise_core.stages.stages import StageSpec, resolve_joint_times


@runtime_checkable
class RowSource(Protocol):
    """Anything that returns the boundary activations of sequences under a view, such as a store."""

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        """Return the boundary activations of some sequences: [B, T, D]."""
        ...


Boundary = Tensor | RowSource | Callable[..., Tensor]
"""A tensor [N, T, D] in loader order, a source of rows, or a function of the corrupted input_ids [B, T] and, where
time is an input, the steps [B]."""


# ---------------------------------------------------------------- the batches of a stage


def stage_batches(
    config: StackWiseConfig,
    spec: StageSpec,
    base: Iterable[Any],
    boundary: Boundary | None = None,
    *,
    first_step: int = 0,
    record: bool = False,
    ahead: int = 0,
) -> Iterable[Batch]:
    """Return the batches that a stage trains on.

    Args:
        config: of the run.
        spec: of the stage.
        base: yields its raw batches from `first_step` on, as `PackedBatches` and `RepeatedLoader` do.
        boundary: what the live stacks read; None where they begin at the tokens.
        first_step: step of the first batch.
        record: with a function as boundary, keep each computed row in memory for later passes.
        ahead: how many batches are made ahead in a thread.
    """
    masks = stage_masks(config, spec)
    if spec.mode == "joint" and (times := resolve_joint_times(config)):
        return _joint_batches(base, masks, [step for step, _ in times], config.run.seed, first_step)
    loader = ProgressiveDataLoader(
        base,
        masks[spec.anatomy.newest],
        spec.anatomy.newest,
        boundary,
        cache_activations=record,
        objective=config.training.progressive.training_objective,
        time_step=spec.time_step,
    )
    return prefetched(loader, ahead) if ahead else loader


def stage_masks(config: StackWiseConfig, spec: StageSpec) -> dict[int, MaskSpec | None]:
    """Return how a stage corrupts its inputs, by the stack that a step trains.

    That is the newest stack, but in joint training over depth as time any of them.
    """
    mask = resolve_mask(config, spec.anatomy.newest)
    if mask and spec.mode == "joint" and (times := resolve_joint_times(config)):
        return {stack: mask.at_ratio(ratio) for stack, (_, ratio) in enumerate(times)}
    return {spec.anatomy.newest: mask}


def _joint_batches(
    base: Iterable[Batch], masks: dict[int, MaskSpec | None], time_steps: Sequence[int], seed: int, first_step: int
) -> Iterator[Batch]:
    """Yield batches of joint training where depth is time: each step draws one stack and trains at its ratio.

    The stack is hash(seed, step); stacks that were created after it are left out of that step.
    """
    for step, fields in enumerate(base, first_step):
        stack = int(hash_bits(seed, SALT_DEPTH, step)[0] % np.uint64(len(masks)))
        yield from ProgressiveDataLoader([fields], masks[stack], stack, time_step=time_steps[stack])


class PackedBatches:
    """The raw batches of packed sequences from one step to another, in the order all stages share."""

    def __init__(
        self, sequences: PackedSequences, order: RowOrder, start: int, stop: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Yield the steps start .. stop - 1; of every batch the share of one of several ranks."""
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


class RepeatedLoader:
    """The raw batches of a user's loader, pass after pass without end, from one step on."""

    def __init__(self, loader: Iterable[Any], views: int, first_step: int = 0, keep_rows: int = 0) -> None:
        """Number passes and batches; pass e has view e modulo `views`, unless the loader gives its own.

        Args:
            loader: iterated once per pass.
            views: mask draws per sequence.
            first_step: how many batches are skipped.
            keep_rows: the batches with the first so many rows, skipped or not, are kept in `kept`: the loader need
                not yield them a second time.
        """
        self.loader, self.views, self.first_step, self.keep_rows = loader, views, first_step, keep_rows
        self.kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches as dicts."""
        step = 0
        for number in count():
            for batch, raw in enumerate(_one_pass(self.loader)):
                fields = {"view": number % self.views, "batch": batch, **raw_fields(raw)}
                if sum(len(kept["input_ids"]) for kept in self.kept) < self.keep_rows:
                    self.kept.append(fields)
                if step >= self.first_step:
                    yield fields
                step += 1


def first_rows(batches: Iterable[Batch], n_rows: int) -> Iterator[Batch]:
    """Yield batches until there are `n_rows` rows; the last batch is cut."""
    for batch in batches if n_rows else ():
        n_batch = len(batch["input_ids"])
        yield {key: value[:n_rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
        n_rows -= n_batch
        if n_rows <= 0:
            return


def prefetched(batches: Iterable[Batch], depth: int) -> Iterator[Batch]:
    """Yield the same batches in the same order, up to `depth` of them made ahead in one thread.

    While a batch is in use, at most `depth` others exist: a source that reuses buffers needs `depth + 1` of them.
    An error of the source is raised after the batches before it. When the caller stops early, so does the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        iterator = iter(batches)
        ahead: deque[Future[Batch | None]] = deque(thread.submit(next, iterator, None) for _ in range(depth))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(next, iterator, None))
                yield batch
        finally:
            for future in ahead:
                future.cancel()


# ---------------------------------------------------------------- any loader, wrapped


class ProgressiveDataLoader:
    """Wraps any iterable of token batches and yields what a stage trains on.

    A batch may be a tensor [B, T], a tuple whose first item is one, or a dict with `input_ids` and, optionally,
    `sequence_ids`, `view` and `batch`, its number within its view. Sequence ids default to a content hash of the
    row, never its index; the view defaults to the number of passes made so far, modulo `views`, and the number of
    the batch to its place in the pass.

    The custom objective takes `targets` (or `labels`) [B, T] from the batch and, if present, `masks` [B, T], the
    loss positions. The other objectives make both themselves: a batch with `targets` or `masks` is rejected, while
    `labels`, which many loaders add, are ignored.

    A `ProgressiveDataLoader` as base, which a trainer may be given, stands for the loader it wraps: the stage that
    reads it has its own index, trunk and time step.

    Yields a dict with input_ids, targets, masks, time_step, stack_idx, trunk_activations, training_objective,
    sequence_ids and, for clm, clm_mask and combined_masks. `time_step` is a tensor [B] where time is an input, the
    stack's step where it is the depth, else None; for the diffusion bound there are `loss_weights` [B].
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
    ) -> None:
        """Wrap a loader.

        Args:
            base_dataloader: yields token batches; iterated once per pass over this loader.
            masking_strategy: how inputs are corrupted (mlm); None corrupts nothing.
            stack_idx: the creation index of the stack that trains.
            trunk_activations: the boundary below the new stack: a tensor [N, T, D] in loader order, an object with
                `rows(sequence_ids, view)`, or a callable from input_ids and, where time is an input, time_step;
                None where there is no trunk.
            cache_activations: with a callable, keep each computed row in RAM for later passes.
            views: mask draws per sequence.
            objective: None is mlm with a masking strategy, else clm.
            time_step: the stack's step with time-as-depth; a `TimeStepMasking` knows it.

        Raises:
            ConfigError: arguments of a wrong type, or that contradict each other.
        """
        _check_arguments(base_dataloader, masking_strategy, stack_idx, cache_activations, views, time_step)
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
        self._recorded: dict[tuple[int, int, int | None], tuple[int, Tensor]] = {}

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        view = self.passes % self.views
        self.passes += 1
        first_row = 0
        for number, raw in enumerate(_one_pass(self.base_dataloader)):
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
            return _checked_boundary(source[first_row : first_row + len(ids)], tokens)
        if isinstance(source, RowSource):
            return _checked_boundary(source.rows(ids, view), tokens)
        steps = input_time_step(batch)
        return (
            self._recording(source, tokens, steps, ids, view) if self.cache_activations else _run(source, tokens, steps)
        )

    def _recording(
        self, live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None, ids: IntArray, view: int
    ) -> Tensor:
        """Return the boundary of some sequences, computing only rows that were not computed before."""
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
                allowed = "a different id for every sequence; two sequences came under this id"
                raise ConfigError([Fault("sequence_ids", str(key[0]), allowed)])
        return torch.stack([self._recorded[key][1] for key in keys])


def unwrapped(loader: Iterable[Any], masks: dict[int, MaskSpec | None]) -> Iterable[Any]:
    """Return the loader inside a `ProgressiveDataLoader` that was given for a stage.

    Args:
        loader: wrapped or not.
        masks: how the stage corrupts its inputs, by the stack that a step trains.

    Raises:
        ConfigError: the wrapper corrupts inputs in another way than the stage, or has the activations of one trunk.
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
    spec, known_step = None, None
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


def _run(live: Callable[..., Tensor], tokens: Tensor, steps: Tensor | None) -> Tensor:
    return _checked_boundary(live(tokens) if steps is None else live(tokens, steps), tokens)


# ---------------------------------------------------------------- checks


def check_loader(name: str, loader: Any) -> None:
    """Reject what cannot yield batches before the first one is asked for.

    Raises:
        ConfigError: names the argument, what it is, and what to do.
    """
    allowed = "anything that yields batches is expected: a DataLoader, or a list of tensors [B, T]"
    if isinstance(loader, (str, bytes, dict)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise ConfigError([Fault(name, describe(loader), allowed)])
    if isinstance(loader, (Tensor, np.ndarray)) and loader.ndim != 3:
        allowed = "rows are not batches: wrap it in DataLoader(..., batch_size=...), or cut it into tensors [B, T]"
        raise ConfigError([Fault(name, describe(loader), allowed)])


def _check_arguments(
    loader: Any, strategy: Any, stack_idx: Any, cache_activations: Any, views: Any, time_step: Any
) -> None:
    check_loader("base_dataloader", loader)
    strategies = "a MaskSpec, a TimeStepMasking or None is expected"
    check_type("masking_strategy", strategy, (MaskSpec, TimeStepMasking, NoneType), strategies)
    check_integer("stack_idx", stack_idx, 0)
    check_type("cache_activations", cache_activations, bool, "True or False is expected")
    check_integer("views", views, 1)
    if time_step is not None:
        check_integer("time_step", time_step, 0)


def _check_boundary_source(source: Any, views: int) -> None:
    is_tensor = isinstance(source, Tensor)
    known = source is None or isinstance(source, RowSource) or callable(source)
    if is_tensor:
        known = source.ndim == 3 and source.is_floating_point()
    if not known:
        allowed = "a tensor [N, T, D] of floats, an object with rows(), a callable or None is expected"
        raise ConfigError([Fault("trunk_activations", describe(source), allowed)])
    if is_tensor and views > 1:
        allowed = "a tensor holds the activations of one view; give an object with rows() or a callable"
        raise ConfigError([Fault("views", str(views), allowed)])


def _checked_boundary(boundary: Any, tokens: Tensor) -> Tensor:
    """Return the boundary of tokens [B, T] after checking its shape: a stack's own error would be less clear."""
    if not (isinstance(boundary, Tensor) and boundary.ndim == 3 and boundary.shape[:2] == tokens.shape):
        allowed = f"a tensor [B, T, D] is expected for each batch, here ({len(tokens)}, {tokens.shape[1]}, D)"
        raise ConfigError([Fault("trunk_activations", describe(boundary), allowed)])
    return boundary


def _one_pass(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one pass over a loader.

    Raises:
        ConfigError: it yields none, as a generator that an earlier pass has exhausted.
    """
    empty = True
    for raw in loader:
        empty = False
        yield raw
    if empty:
        exhausted = "an exhausted iterator"
        received = exhausted if isinstance(loader, Iterator) else f"no batch from {describe(loader)}"
        allowed = (
            "every epoch of every stage iterates over it anew: give a list of batches, a DataLoader, "
            "or an object whose __iter__ starts from the beginning"
        )
        raise ConfigError([Fault("base_dataloader", received, allowed)])
