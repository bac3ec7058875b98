"""The plan of a run: the recipe of every artifact that its stages make, before any of them exists. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field, field_validator

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.schema import ValidationConfig
from stackwise_core.config.stacks import corrupts_by_time
from stackwise_core.data.masks import MaskSpec
from stackwise_core.data.mixture import shares_of, sources_of
from stackwise_core.data.packing import corpus_facts
from stackwise_core.errors import CorpusError
from stackwise_core.notebook import table
from stackwise_core.stages.costs import fill_flops, rack_parameters, stage_flops, store_bytes, trainable_parameters
from stackwise_core.stages.identity import (
    ActivationRecipe,
    AdoptedRecipe,
    BuildRecipe,
    CooldownRecipe,
    DataRecipe,
    Kind,
    MixedIn,
    OptimizerRecipe,
    Recipe,
    Ref,
    StackRecipe,
    TrunkRecipe,
    ValidationRecipe,
)
from stackwise_core.stages.resolve import (
    ModelShape,
    Value,
    WhereSaid,
    keeps_documents_apart,
    reads_examples,
    resolve_mask,
    resolve_objective,
    resolve_order,
    resolve_shape,
    resolve_statistics_rows,
    resolve_views,
)
from stackwise_core.stages.stages import (
    StageSpec,
    cooled,
    ends_at_peak,
    leaves_state,
    resolve_joint_spans,
    resolve_joint_times,
    resolve_stages,
)

_GRID = (0.15, 0.3, 0.5, 0.7, 0.9)
"""Mask ratios at which stages of different ratios are compared."""


class SourceFacts(NamedTuple):
    """What is known of a source once it has been read."""

    digest: str
    """Hash of its content."""
    n_bytes: int


class StagePlan(Value, frozen=True):
    """The recipes of everything one stage makes."""

    spec: StageSpec
    shape: ModelShape
    build: BuildRecipe | None
    """None for the joint anneal, which adds no stack, and for an adopted stack."""
    trunk: TrunkRecipe | None
    """None for an adopted stack."""
    stack: StackRecipe | AdoptedRecipe
    optimizer: WhereSaid[OptimizerRecipe | None] = None
    """None where no stage may go on from the optimizer state of this one."""
    activations: ActivationRecipe | None
    no_cache_reason: str
    validation: ValidationRecipe | None
    """None for an adopted stack without a head, which is any but the last."""
    cooldown: CooldownRecipe | None = Field(default=None, exclude_if=lambda value: value is None)
    """None for a stage whose rate has decayed when it ends, and unless a cool-down is asked for."""

    @property
    def cooled(self) -> StagePlan:
        """The same stage with the steps of its cool-down, in which the rate decays from the peak."""
        assert self.cooldown
        recipe = self.cooldown
        spec = cooled(self.spec, recipe.steps, recipe.decay, recipe.min_learning_rate)
        return self.model_copy(update={"spec": spec})

    @property
    def mask(self) -> MaskSpec | None:
        """How the inputs are corrupted for training or validation; None if they are not."""
        if isinstance(self.stack, StackRecipe):
            return self.stack.mask
        return self.validation.mask if self.validation else None

    @property
    def has_head(self) -> bool:
        """Whether the stage leaves a whole rack: of adopted stages only the last does."""
        return self.trunk is not None or self.spec.anatomy.head_trains

    @property
    def index(self) -> int:
        """Number of the stage; for growth stages also the creation index of its stack."""
        return self.spec.index

    def ref(self, kind: Kind) -> Ref:
        """Return the reference of one of the stage's artifacts."""
        if kind not in self._refs:
            recipe = self.recipe(kind)
            assert recipe is not None
            self._refs[kind] = recipe.ref(self.index)
        return self._refs[kind]

    @functools.cached_property
    def _refs(self) -> dict[Kind, Ref]:
        return {}  # those that somebody asked for

    def recipe(self, kind: Kind) -> Recipe | None:
        """Return the recipe of a kind; None if the stage makes no such artifact."""
        return getattr(self, kind)


class PlannedSource(Value, frozen=True):
    """A source of a mixture, which is packed by itself."""

    data: DataRecipe
    n_bytes: int
    """Size of the text; enters no id."""


class RunPlan(Value, frozen=True):
    """The recipes of everything a run makes."""

    data: DataRecipe
    corpus_bytes: int
    """Size of the text; enters no id."""
    sources: WhereSaid[tuple[PlannedSource, ...]] = ()
    """Of a mixture, in the order of the configuration."""
    stages: tuple[StagePlan, ...] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _numbered(cls, stages: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
        """A plan may be read from a file: see that each stage stands in its place."""
        if [stage.index for stage in stages] != list(range(len(stages))):
            raise ValueError("the stages are not numbered from 0 on")
        return stages

    def _repr_html_(self) -> str:
        columns = ("stage", "how", "blocks", "steps", "params", "trained", "GFLOP", "reads the cache of")
        rows = list[tuple[object, ...]]()
        for before, stage in zip([None, *self.stages], self.stages, strict=False):
            spec, shape = stage.spec, stage.shape
            ratio = stage.mask.mean_ratio if stage.mask else 1.0
            live, below = stage_flops(shape, spec, self.data.seq_len, ratio)
            cached = before is not None and before.activations is not None
            flops = 0.0 if spec.adopted else live + (0.0 if cached else below)
            sizes = rack_parameters(shape, spec), trainable_parameters(shape, spec)
            read = f"boundary {before.activations.boundary}" if before and before.activations else None
            steps = 0 if spec.adopted else spec.optim.steps
            rows.append((spec.index, spec.name, spec.n_blocks, steps, *sizes, round(flops / 1e9), read))
        return table("Plan", columns, rows)

    @property
    def data_ref(self) -> Ref:
        """Reference of the packed corpus."""
        return self.data.ref(-1)

    @property
    def source_facts(self) -> tuple[SourceFacts, ...]:
        """What is known of the sources of a mixture, for another process that plans the run again."""
        return tuple(SourceFacts(source.data.corpus, source.n_bytes) for source in self.sources)

    @property
    def is_import(self) -> bool:
        """Whether it is a model that was imported, with nothing grown on it."""
        return bool(self.adopted and self.adopted[-1].family) and len(self.adopted) == len(self.stages)

    @property
    def adopted(self) -> tuple[AdoptedRecipe, ...]:
        """The recipes of the adopted stacks, which are the first."""
        return tuple(stage.stack for stage in self.stages if isinstance(stage.stack, AdoptedRecipe))

    def store_below(self, stage: StagePlan) -> StagePlan | None:
        """Return the stage before if its store is one stack below that of a stage, which can be advanced from it."""
        before = self.stages[stage.index - 1] if stage.index else None
        above, below = stage.activations, before.activations if before else None
        same = above and below and below.mask == above.mask and below.stacks == above.stacks[:-1]
        return before if same else None

    @property
    def recipes(self) -> dict[Ref, Recipe]:
        """The recipe of every artifact of the run, each after those of the artifacts that it is made from."""
        found: dict[Ref, Recipe] = {source.data.ref(-1): source.data for source in self.sources}
        found[self.data_ref] = self.data
        for stage in self.stages:
            trained = (stage.stack, stage.optimizer, stage.cooldown)
            recipes = (stage.build, stage.trunk, *trained, stage.activations, stage.validation)
            found |= {recipe.ref(stage.index): recipe for recipe in recipes if recipe is not None}
        return found


def plan_config(config: StackWiseConfig, adopted: Sequence[AdoptedRecipe] = ()) -> RunPlan:
    """Read the corpus of a valid configuration and plan its run; raises CorpusError if it cannot be read."""
    data, examples = config.data, reads_examples(config)
    facts = [
        SourceFacts(*corpus_facts(source.name, examples=examples, token_type=data.token_type))
        for source in sources_of(data.source)
    ]
    return plan_run(config, *facts_together(config, facts), adopted, facts)


def facts_together(config: StackWiseConfig, facts: Sequence[SourceFacts]) -> SourceFacts:
    """Return the hash and the size of what all sources hold, in whatever order they stand.

    Raises CorpusError if two hold the same.
    """
    if len(facts) == 1:
        return facts[0]
    names, digests = [source.name for source in sources_of(config.data.source)], [each.digest for each in facts]
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            same = f"{names[digests.index(digest)]} and {names[number]} hold the same texts"
            raise CorpusError(f"data.source: {same}; name one of them, with a weight")
    text = "\n".join(["mixture", *sorted(digests)])
    return SourceFacts(hashlib.sha256(text.encode()).hexdigest(), sum(each.n_bytes for each in facts))


def plan_run(
    config: StackWiseConfig,
    corpus_digest: str,
    corpus_bytes: int = 0,
    adopted: Sequence[AdoptedRecipe] = (),
    sources: Sequence[SourceFacts] = (),
) -> RunPlan:
    """Plan the run of a valid configuration whose corpus is known by its content hash.

    From the size of its text, `cache.mode: auto` estimates how many rows there are; 0 means that it is unknown. With
    `model.from`, the configuration is what `adopting` returns for the recipes of the adopted stacks. Of a mixture the
    facts of all its sources are needed, in the order of the configuration.
    """
    data = DataRecipe(
        corpus=corpus_digest,
        tokenizer=tokenizer_of(config).name,
        seq_len=config.data.seq_len,
        max_sequences=config.data.max_sequences,
        validation_fraction=config.data.validation_fraction,
        sample=config.data.sample if config.data.max_sequences else "first",
        examples=reads_examples(config),
        separated_by=tokenizer_of(config).end_token if keeps_documents_apart(config) else None,
    )
    planned = _plan_sources(data, sources) if len(sources) > 1 else ()
    if planned:
        shares = shares_of(sources_of(config.data.source))
        parts = [MixedIn(data=each.data.sha256, share=share) for each, share in zip(planned, shares, strict=True)]
        data = data.model_copy(update={"mixture": tuple(sorted(parts, key=lambda part: part.data))})
    specs, stages = resolve_stages(config), list[StagePlan]()
    states: dict[int, str] = {}
    for spec, reader in zip(specs, [*specs[1:], None], strict=True):
        no_cache = _why_not_cached(config, spec, reader, corpus_bytes)
        taken = adopted[spec.index] if spec.adopted else None
        stages.append(_plan_stage(config, spec, reader, no_cache, data.sha256, states, stages, taken))
    return RunPlan(data=data, corpus_bytes=corpus_bytes, sources=planned, stages=tuple(stages))


def _plan_sources(data: DataRecipe, sources: Sequence[SourceFacts]) -> tuple[PlannedSource, ...]:
    """Plan the sources of a mixture as a run of each alone would, so that other weights pack nothing again."""
    alone = data.model_copy(update={"max_sequences": 0, "sample": "first"})
    return tuple(
        PlannedSource(data=alone.model_copy(update={"corpus": each.digest}), n_bytes=each.n_bytes) for each in sources
    )


def _plan_stage(
    config: StackWiseConfig,
    spec: StageSpec,
    reader: StageSpec | None,
    no_cache: str,
    data: str,
    states: dict[int, str],
    below: Sequence[StagePlan],
    adopted: AdoptedRecipe | None,
) -> StagePlan:
    """Plan a stage over those `below`; `states` has the state of every stack, and is brought up to date.

    The state of a stack is the hash of the last stage that trained any of it.
    """
    index, anatomy = spec.index, spec.anatomy
    build = None if adopted else _plan_build(config, resolve_shape(config), spec, states)
    trunk = None if adopted else _plan_trunk(spec, states, below)
    stack = adopted or _plan_stack(config, spec, build, trunk, data, below[-1].stack.sha256 if below else "")
    sha256 = stack.sha256
    states |= {c: sha256 if c == anatomy.newest else f"{sha256}#{c}" for c in (anatomy.trained or (index,))}
    activations = _plan_activations(config, reader, states, data) if reader and not no_cache else None
    return StagePlan(
        spec=spec,
        shape=resolve_shape(config),
        build=build,
        trunk=trunk,
        stack=stack,
        optimizer=OptimizerRecipe(stack=sha256) if leaves_state(config, spec, reader) else None,
        activations=activations,
        no_cache_reason=no_cache,
        validation=_plan_validation(config, spec, stack, activations, data) if anatomy.head_trains or trunk else None,
        cooldown=_plan_cooldown(config, spec, stack),
    )


def _plan_trunk(spec: StageSpec, states: dict[int, str], below: Sequence[StagePlan]) -> TrunkRecipe:
    anatomy = spec.anatomy
    trained = [stack for stack in anatomy.trained if spec.trunk and (spec.mode == "joint" or stack != spec.index)]
    # An adapter with which a stack was adopted belongs to its state; all others are the same.
    given = [stack for stack in trained if "progressive" not in below[stack].spec.new.adapters]
    progressive = (spec.stacks[stack].adapters.get("progressive") for stack in given)
    return TrunkRecipe(
        strategy=spec.strategy if trained else "frozen",  # if nothing trains, all strategies share their stages
        stacks=tuple(states[stack] for stack in spec.trunk),
        trains=tuple(anatomy.trains_of(stack) for stack in spec.trunk) if trained else (),
        progressive=next(filter(None, progressive), None),
    )


def _plan_stack(
    config: StackWiseConfig,
    spec: StageSpec,
    build: BuildRecipe | None,
    trunk: TrunkRecipe | None,
    data: str,
    before: str,
) -> StackRecipe:
    assert trunk is not None
    anatomy, joint = spec.anatomy, spec.mode == "joint"
    return StackRecipe(
        build=build.sha256 if build else "",
        trunk=trunk.sha256,
        data=data,
        mask=resolve_mask(config, anatomy.newest),
        order_seed=config.run.seed,
        shuffle_block=config.training.shuffle_block,
        views=resolve_views(config),
        optim=spec.optim,
        stream_dtype=config.cache.dtype if anatomy.boundary else None,
        mode="append" if spec.index == 0 and not joint else spec.mode,  # prepended to nothing
        tail=spec.tail,
        frozen_head=spec.mode in ("append", "insert") and not anatomy.head_trains,
        precision="full" if joint else spec.new.precision,
        objective=resolve_objective(config),
        time_step=spec.time_step if corrupts_by_time(config) else None,  # otherwise it is only recorded
        joint_times=resolve_joint_times(config) if joint else (),
        joint_spans=resolve_joint_spans(config) if joint else (),
        weighting=config.training.loss_weighting,
        statistics_rows=0 if joint else resolve_statistics_rows(config),  # no stage reads the output of a joint one
        order_step=spec.order_step,
        optimizer=OptimizerRecipe(stack=before).sha256 if spec.state != "nothing" else "",
        copied_state=spec.state == "kept and copied",
    )


def _plan_validation(
    config: StackWiseConfig,
    spec: StageSpec,
    stack: StackRecipe | AdoptedRecipe,
    activations: ActivationRecipe | None,
    data: str,
) -> ValidationRecipe:
    return ValidationRecipe(
        stack=stack.sha256,
        activations=activations.sha256 if activations else None,
        sequences=config.validation.max_sequences,
        # Without a store this key is not used, so its default enters the id.
        sampled_rows=config.validation.sampled_rows if activations else ValidationConfig().sampled_rows,
        grid=_grid(config),
        data=data if spec.adopted else "",
        mask=resolve_mask(config, spec.index) if spec.adopted else None,
        objective=resolve_objective(config) if spec.adopted else "",
    )


def cooldown_flops(stage: StagePlan, seq_len: int) -> float:
    """FLOPs of the steps of a stage's cool-down, whose trunk runs live; 0 if it has none."""
    if stage.cooldown is None:
        return 0.0
    optim = stage.spec.optim.model_copy(update={"steps": stage.cooldown.steps})
    spec, ratio = stage.spec.model_copy(update={"optim": optim}), stage.mask.mean_ratio if stage.mask else 1.0
    return sum(stage_flops(stage.shape, spec, seq_len, ratio))


def _plan_cooldown(
    config: StackWiseConfig, spec: StageSpec, stack: StackRecipe | AdoptedRecipe
) -> CooldownRecipe | None:
    """Plan the cool-down of a stage that ends at the peak rate, if one is asked for."""
    if not ends_at_peak(config, spec):
        return None
    return CooldownRecipe(
        stack=stack.sha256,
        steps=config.validation.cooldown_steps,
        min_learning_rate=min(config.training.min_learning_rate, spec.optim.learning_rate),
        decay=config.training.decay,
        sequences=config.validation.max_sequences,
        grid=_grid(config),
    )


def _grid(config: StackWiseConfig) -> tuple[float, ...]:
    return _GRID if corrupts_by_time(config) else ()  # otherwise all stages share one ratio


def _plan_build(
    config: StackWiseConfig, shape: ModelShape, spec: StageSpec, states: dict[int, str]
) -> BuildRecipe | None:
    """Plan the new stack, or all stacks of joint training from scratch; None for the joint anneal."""
    if spec.mode == "joint" and states:
        return None
    sources = [states[source] for source in spec.sources]
    return BuildRecipe(
        shape=shape,
        index=spec.index,
        n_blocks=spec.n_blocks,
        operator=spec.operator,
        seed=config.run.seed,
        source=sources[0] if sources else None,
        blend=sources[1] if len(sources) > 1 else "",
        init=spec.init,
        adapter=spec.new.adapters.get("stack") if spec.mode != "joint" else None,
        quantised=spec.new.precision == "qlora" and spec.index > 0,
        parts=tuple(spec.stacks[stack] for stack in spec.anatomy.order) if spec.mode == "joint" else (),
    )


def _plan_activations(
    config: StackWiseConfig, reader: StageSpec, states: dict[int, str], data: str
) -> ActivationRecipe:
    """Plan the store that the next stage reads, from the states of all stacks by creation index."""
    return ActivationRecipe(
        boundary=reader.anatomy.boundary,
        stacks=tuple(states[below] for below in reader.anatomy.below),
        data=data,
        mask=resolve_mask(config, reader.index),
        dtype=config.cache.dtype,
        order_seed=config.run.seed,
        shuffle_block=config.training.shuffle_block,
        views=resolve_views(config),
        batch_size=reader.optim.batch_size,
        steps=reader.optim.steps,
        validation_sequences=config.validation.max_sequences,
        order_step=reader.order_step,
    )


def _why_not_cached(config: StackWiseConfig, writer: StageSpec, reader: StageSpec | None, corpus_bytes: int) -> str:
    """Return why a stage writes no store for the next one, its reader; '' if it writes one.

    Only the output of the frozen stacks below the first one that trains is the same in every epoch. Where gradients
    flow through the trunk, or all of it trains, nothing can be cached.
    """
    if reader is None:
        return "last stage: no stage reads it" + ("" if writer.mode == "joint" else "; raising target_stacks fills it")
    if reader.adopted:
        return f"stage {reader.index} is adopted: it reads none"
    if reader.anatomy.boundary == 0:
        return f"stage {reader.index} streams from tokens: {_why_live(reader)}"
    if not config.training.progressive.cache_activations:
        return "training.progressive.cache_activations is false: the trunk runs live"
    if config.cache.mode == "auto" and (reason := _why_it_does_not_pay(config, writer, reader, corpus_bytes)):
        return f"cache.mode is auto: {reason}"
    return ""


def _why_live(reader: StageSpec) -> str:
    if reader.mode == "joint":
        return "it trains everything together"
    if reader.mode == "prepend":
        return "gradients flow through the trunk to the prepended stack"
    if reader.mode == "insert" and reader.anatomy.order[0] == reader.index:
        return "no stack lies below the inserted one"
    return "the whole trunk trains" if reader.strategy == "full" else "adapters of every trunk stack train"


def _why_it_does_not_pay(config: StackWiseConfig, writer: StageSpec, reader: StageSpec, corpus_bytes: int) -> str:
    """Compare the work of the frozen trunk with and without a store, by counts, since ids cannot depend on timing."""
    reads = reader.optim.steps * reader.optim.batch_size
    rows = min(reads, resolve_views(config) * _training_rows(config, corpus_bytes)) if corpus_bytes else reads
    shape, seq_len, below = resolve_shape(config), config.data.seq_len, [reader.stacks[n] for n in reader.anatomy.below]
    advanced = rows if _advances(config, writer, reader) else 0
    if advanced and config.data.rows == "fresh":
        n_rows = max(_training_rows(config, corpus_bytes), reader.optim.batch_size)
        advanced = min(rows, rows_read_again(config, writer, reader, n_rows)) if corpus_bytes else 0
    live = fill_flops(shape, below, seq_len, reads, 0)
    if fill_flops(shape, below, seq_len, rows - advanced, advanced) >= live:
        return f"filling {rows:,} rows costs as much as running the trunk for {reads:,} reads"
    n_bytes = store_bytes(rows, seq_len, shape.d_model, config.cache.dtype)
    if n_bytes > config.cache.max_gb * 2**30:
        return f"{n_bytes / 2**30:.1f} GiB exceed cache.max_gb = {config.cache.max_gb}"
    return ""


def rows_read_again(config: StackWiseConfig, writer: StageSpec, reader: StageSpec, n_rows: int) -> int:
    """Return about how many of the rows that a stage reads the one before has read, where each reads on."""
    before = 0 if writer.adopted else writer.optim.steps
    return resolve_order(config, n_rows).count_again(reader.optim.steps, reader.order_step, before)


def _training_rows(config: StackWiseConfig, corpus_bytes: int) -> int:
    """Estimate the number of training sequences: a byte is at most one token."""
    rows = max(1, int(corpus_bytes * (1 - config.data.validation_fraction)) // config.data.seq_len)
    return min(rows, config.data.max_sequences) if config.data.max_sequences else rows


def _advances(config: StackWiseConfig, writer: StageSpec, reader: StageSpec) -> bool:
    """Return whether the reader's boundary is one stack above the writer's, under the same corruption."""
    below = writer.anatomy.below
    same = resolve_mask(config, writer.anatomy.newest) == resolve_mask(config, reader.anatomy.newest)
    return bool(below) and same and reader.anatomy.below[:-1] == below
