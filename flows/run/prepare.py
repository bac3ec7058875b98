"""Before the first stage: packs the corpus into sequences, and checks validation sequences and disk space."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flows.run.events import DataReady, TaskStarted, emit, emit_waiting, stop_requested, stopping_on_signals
from flows.run.numbers import size
from flows.run.reading import Reading
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.sizes import batch_size_of, vocab_size_of
from stackwise_core.data.examples import ExampleFormat, pack_examples
from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.data.mixture import mixed_rows, mixture_counts, sources_of
from stackwise_core.data.packing import Corpus, Watch, pack, read_corpus, spread_sample
from stackwise_core.data.sequences import SPLITS, ArrayWriter, PackedSequences, array_path, parts_of, write_ids
from stackwise_core.data.sources import check_tokens
from stackwise_core.errors import ConfigError, CorpusError, Fault
from stackwise_core.stages.costs import store_bytes
from stackwise_core.stages.identity import DataRecipe, Ref
from stackwise_core.stages.plan import RunPlan, StagePlan
from stackwise_core.stages.resolve import keeps_documents_apart, reads_examples, resolve_order
from storage.artifacts import SCRATCH, Artifacts, State
from storage.errors import StoreSpaceError
from storage.midstage import PackingNotes, bytes_written
from storage.sequences import load_sequences


def prepare_data(config: StackWiseConfig, artifacts: Artifacts, plan: RunPlan) -> Ref:
    """Pack the corpus into sequences, unless they are sealed already; raises if the run cannot train on them."""
    ref = plan.data_ref
    for source, planned in zip(sources_of(config.data.source), plan.sources, strict=False):
        pack = functools.partial(_pack_into, alone(config, source.name), artifacts, planned.data, planned.n_bytes)
        _make(artifacts, planned.data.ref(-1), pack)
    if plan.sources:
        _make(artifacts, ref, functools.partial(_mix_into, config, artifacts, plan))
    else:
        _make(artifacts, ref, functools.partial(_pack_into, config, artifacts, plan.data, plan.corpus_bytes))
    data, batch_size = artifacts.manifest(ref), batch_size_of(config)
    n_rows = data.count("train_sequences")
    emit(DataReady(n_rows, data.count("validation_sequences")))
    if n_rows < batch_size:
        allowed = f"the corpus gives only {n_rows} training sequences"
        raise ConfigError([Fault("training.batch_size", str(batch_size), allowed)])
    # An artifact that was packed for a larger model has the same id, so the vocabulary is checked again.
    if faults := list(_vocabulary_faults(config, data.facts)):
        raise ConfigError(faults)
    return ref


def _make(artifacts: Artifacts, ref: Ref, pack: Callable[[], object]) -> None:
    waiting = f"{ref.name}, which another process is making"
    with artifacts.lock(ref.name, on_wait=lambda _: emit_waiting(waiting), should_stop=stop_requested):
        if artifacts.state(ref) is State.CORRUPT:
            artifacts.manifest(ref)
        if artifacts.state(ref) is not State.SEALED:
            emit(TaskStarted(-1, "prepare data"))
            with stopping_on_signals():
                pack()


def alone(config: StackWiseConfig, source: str) -> StackWiseConfig:
    """Return the configuration of a run on one source, all of it."""
    copied = config.model_copy(deep=True)
    copied.data.source, copied.data.max_sequences = source, 0
    return copied


def _vocabulary_faults(config: StackWiseConfig, facts: dict[str, Any]) -> Iterator[Fault]:
    largest, vocab_size = {"token": facts.get("largest_token", 0)}, vocab_size_of(config)
    if not config.training.custom_loss:
        largest["target"] = facts.get("largest_target", 0)
    for what, value in largest.items():
        if value >= vocab_size:
            needed = f"the corpus holds the {what} {value}: at least {value + 1} is needed"
            yield Fault("model.vocab_size", str(vocab_size), needed)
    masked = "mask_tokens" in facts and config.training.progressive.training_objective == "mlm"
    n_tokens = tokenizer_of(config).vocab_size if masked else 0
    if masked and (facts["mask_tokens"] or facts.get("largest_token", 0) >= n_tokens):
        yield Fault("data.tokenizer", repr(config.data.tokenizer), f"the corpus was not made by it; {_MADE_BY}")


def pack_corpus(
    config: StackWiseConfig, corpus: Corpus, folder: Path | None = None, watch: Watch | None = None
) -> tuple[PackedSequences, PackedSequences]:
    """Return the train and validation sequences of a corpus; with objective custom they are its examples.

    They are written into `folder`, as far as `watch` says that they are not there; without one, into files that are
    gone with this process.
    """
    data, tokenizer = config.data, tokenizer_of(config)
    if corpus.is_tokens:
        _check_tokens(config, corpus)
    most = 0 if data.sample == "spread" else data.max_sequences
    if not reads_examples(config):
        begin = keeps_documents_apart(config)
        return pack(corpus, tokenizer, data.seq_len, most, data.validation_fraction, folder, watch, begin=begin)
    form = ExampleFormat(
        seq_len=data.seq_len,
        vocab_size=vocab_size_of(config),
        pad_token=tokenizer.pad_token,
        targets_are_tokens=not config.training.custom_loss,
    )
    return pack_examples(corpus, form, most, data.validation_fraction, folder)


def sampled(
    config: StackWiseConfig, train: PackedSequences, validation: PackedSequences, folder: Path | None = None
) -> tuple[PackedSequences, PackedSequences]:
    """Return the sequences that `data.max_sequences` leaves, written into `folder` if any are left out."""
    data = config.data
    if data.max_sequences and data.sample == "spread":
        return spread_sample(train, validation, data.max_sequences, folder)
    return train, validation


_MADE_BY = "mlm needs the tokenizer.json that made the tokens, with a [MASK] that is not among them"


def _check_tokens(config: StackWiseConfig, corpus: Corpus) -> None:
    """Reject tokens outside the model's vocabulary; with mlm also outside the tokenizer's, and its [MASK]."""
    tokenizer, n_rows = tokenizer_of(config), vocab_size_of(config)
    for document in corpus.documents:
        check_tokens(document, n_rows, "raise model.vocab_size, or give the file of this vocabulary")
        if config.training.progressive.training_objective == "mlm":
            remedy = f"data.tokenizer did not make it; {_MADE_BY}"
            check_tokens(document, tokenizer.vocab_size, remedy, tokenizer.mask_token)


def _pack_into(config: StackWiseConfig, artifacts: Artifacts, recipe: DataRecipe, n_bytes: int) -> None:
    data, tokenizer, ref = config.data, tokenizer_of(config), recipe.ref(-1)
    work = artifacts.work(ref)
    packed = work / SCRATCH / "packed"
    packed.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(
        data.source,
        examples=reads_examples(config),
        token_type=data.token_type,
        folder=work / SCRATCH,
        on_read=Reading("read", n_bytes, stop_requested),
    )
    if corpus.digest != recipe.corpus:
        raise CorpusError(f"data.source: got {data.source!r}; its text changed while the run was starting; start again")
    if tokenizer.name != recipe.tokenizer:
        raise CorpusError(f"data.tokenizer: got {data.tokenizer!r}; it changed while the run was starting; start again")
    notes = PackingNotes(work / SCRATCH / "packing.json", packed)
    reading = Reading("packed", corpus.n_bytes * (corpus.token_width or 1), stop_requested)
    every = pack_corpus(config, corpus, packed, Watch(notes.read(), notes.write, reading))
    end = recipe.separated_by
    if corpus.is_tokens and end is not None and not any((part == end).any() for part in parts_of(every[0].tokens)):
        what = f"the end token {end} of data.tokenizer is not in it, so documents cannot be told apart"
        raise CorpusError(f"data.source: got {data.source!r}; {what}; set data.documents: concat")
    train, validation = sampled(config, *every, work)
    if train is every[0]:
        for path in packed.iterdir():
            path.replace(work / path.name)
    facts = {
        "documents": len(corpus.documents),
        "train_sequences": len(train),
        "validation_sequences": len(validation),
        "seq_len": data.seq_len,
    }
    for split in (train, validation):
        for name, value in _largest(corpus, split, tokenizer.mask_token):
            facts[name] = facts.get(name, 0) + value if name == "mask_tokens" else max(facts.get(name, 0), value)
    artifacts.seal(ref, recipe, (), facts, {})


def _mix_into(config: StackWiseConfig, artifacts: Artifacts, plan: RunPlan) -> None:
    """Write which sequences of its sources a mixture has; they stay where they were packed."""
    data, work = config.data, artifacts.work(plan.data_ref)
    refs = [Ref(kind="data", stage=-1, sha256=part.data) for part in plan.data.mixture]
    sources = [artifacts.manifest(ref) for ref in refs]
    _check_alike(config, artifacts, plan)
    spread, shares = data.sample == "spread", [part.share for part in plan.data.mixture]
    sizes = [[source.count(f"{split}_sequences") for source in sources] for split in SPLITS]
    counts = mixture_counts(sizes[0], sizes[1], shares, data.max_sequences, spread=spread)
    for split, there, wanted in zip(SPLITS, sizes, counts, strict=True):
        writer = ArrayWriter(array_path(work, split, "rows"), np.int64)
        for rows in mixed_rows(there, wanted, spread=spread):
            writer.append(rows)
        writer.finish(sum(wanted))
        write_ids(work, split, sum(wanted))
    facts = {
        "documents": sum(source.count("documents") for source in sources),
        "train_sequences": sum(counts[0]),
        "validation_sequences": sum(counts[1]),
        "seq_len": data.seq_len,
        "sources": [dict(zip(SPLITS, each, strict=True)) for each in zip(*counts, strict=True)],
    }
    for name, together in (("largest_token", max), ("mask_tokens", sum), ("largest_target", max)):
        if found := [source.facts[name] for source in sources if name in source.facts]:
            facts[name] = together(found)
    inputs = tuple(artifacts.input_entry(ref) for ref in refs)
    artifacts.seal(plan.data_ref, plan.data, inputs, facts, {})


def _check_alike(config: StackWiseConfig, artifacts: Artifacts, plan: RunPlan) -> None:
    """Reject tokens that are of another tokenizer than the texts, or the other tokens, that they are mixed with."""
    names, n_tokens = [source.name for source in sources_of(config.data.source)], tokenizer_of(config).vocab_size
    facts = {name: artifacts.manifest(each.data.ref(-1)).facts for name, each in zip(names, plan.sources, strict=True)}
    tokens = [name for name in names if "mask_tokens" in facts[name]]
    text = next((name for name in names if name not in tokens), None)
    for name in tokens if text else ():
        if (largest := facts[name].get("largest_token", 0)) >= n_tokens:
            what = f"{name} holds the token {largest}, and {text} is text, whose tokens are below {n_tokens}"
            raise CorpusError(f"data.source: {what}; name the tokenizer that made {name} as data.tokenizer")
    bits = {
        name: 8 * load_sequences(artifacts, each.data.ref(-1))[0].tokens.dtype.itemsize
        for name, each in zip(names, plan.sources, strict=True)
    }
    for name in tokens if not text else ():
        if bits[name] != bits[tokens[0]]:
            found = f"{tokens[0]} holds tokens of {bits[tokens[0]]} bits, and {name} of {bits[name]}"
            raise CorpusError(f"data.source: {found}; mix tokens of one tokenizer, written in one type")


def _largest(corpus: Corpus, split: PackedSequences, mask_token: int | None) -> Iterator[tuple[str, int]]:
    """Yield the largest token of a split that no tokenizer made, how often it is [MASK], and the largest target."""
    if corpus.is_tokens or split.targets is not None:
        yield "largest_token", max(int(part.max()) for part in parts_of(split.tokens))
    if corpus.is_tokens:
        yield "mask_tokens", sum(int((part == mask_token).sum()) for part in parts_of(split.tokens))
    if split.targets is not None and split.masks is not None:
        at = 0
        for targets in parts_of(split.targets):
            masks = split.masks[at : at + len(targets)]
            yield "largest_target", int(targets.max(where=masks, initial=0))
            at += len(targets)


def check_validation(config: StackWiseConfig, artifacts: Artifacts, plan: RunPlan) -> None:
    """Raise a `ConfigError` if a stage would have no validation positions; it names the setting to change."""
    _, validation = load_sequences(artifacts, plan.data_ref)
    most = config.validation.max_sequences
    ids = validation.sequence_ids[:most]
    found = f"none of the {len(ids)} validation sequences has a loss position"
    if validation.masks is not None and not validation.masks[:most].any():
        raise ConfigError([Fault("validation.max_sequences", str(most), f"{found}; raise it")])
    for mask in {stage.mask: None for stage in plan.stages if stage.mask is not None}:
        own = mask.for_validation()
        steps = own.time.steps(own.seed, ids, VALIDATION_VIEW) if own.time else None
        if own.masks(ids, VALIDATION_VIEW, config.data.seq_len, steps).any():
            continue
        if config.training.progressive.time_interpretation == "none":
            raise ConfigError([Fault("training.mask_ratio", str(mask.ratio), f"{found}; raise it")])
        remedy = f"{found} at a mask ratio of {own.mean_ratio:.3g}; raise it or the ratio, or give more text"
        raise ConfigError([Fault("validation.max_sequences", str(most), remedy)])


def check_space(config: StackWiseConfig, artifacts: Artifacts, stages: list[StagePlan]) -> None:
    """Check that the stores that these stages will write fit into the budget and on the disk."""
    sizes = [forecast_store(config, artifacts, stage) for stage in stages]
    written = [bytes_written(artifacts, stage.ref("activations")) for stage in stages]
    remaining = [max(0, n_bytes - done) for n_bytes, done in zip(sizes, written, strict=True)]
    free = shutil.disk_usage(artifacts.root).free
    # With `keep: last`, at most a store and its successor exist at the same time.
    pairs = (sum(remaining[n : n + 2]) for n in range(len(remaining)))
    together = sum(remaining) if config.cache.keep == "all" else max(pairs, default=0)
    largest, max_gb = max(sizes, default=0), config.cache.max_gb
    needs = (
        f"the largest store of this run needs {size(largest)}, what is still to be written {size(together)}, and "
        f"{size(free)} are free in {artifacts.root}"
    )
    remedy = "lower training.steps_per_stack, or set training.progressive.cache_activations: false"
    if largest > max_gb * 2**30:
        raise ConfigError([Fault("cache.max_gb", str(max_gb), f"{needs}; raise cache.max_gb, {remedy}")])
    if together > free:
        raise StoreSpaceError(f"cache.max_gb is {max_gb}; {needs}; free some space, {remedy}")


def forecast_store(config: StackWiseConfig, artifacts: Artifacts, stage: StagePlan) -> int:
    """Return the size of a stage's store [bytes], from the rows that the next stage visits."""
    recipe = stage.activations
    assert recipe is not None
    data = artifacts.manifest(Ref(kind="data", stage=-1, sha256=recipe.data))
    order = resolve_order(config, data.count("train_sequences"))
    rows = order.count_visited(recipe.steps) + min(recipe.validation_sequences, data.count("validation_sequences"))
    return store_bytes(rows, data.count("seq_len"), stage.shape.d_model, recipe.dtype)
