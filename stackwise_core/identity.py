"""Resolved recipes and their ids: the same recipe has the same id on every machine.

Ids chain: data -> stack 0 -> boundary 1 -> stack 1 -> ... Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from stackwise_core.anatomy import Trains, last_trained
from stackwise_core.cache_plan import CacheDecision, decide_cache
from stackwise_core.config import Precision, StackWiseConfig
from stackwise_core.masking import MaskSpec
from stackwise_core.resolve import (
    AdapterSpec,
    GrowthOperator,
    ModelShape,
    OptimSpec,
    StackSpec,
    StageSpec,
    Value,
    resolve_grid,
    resolve_joint_times,
    resolve_mask,
    resolve_objective,
    resolve_shape,
    resolve_stages,
    resolve_stream_dtype,
    resolve_views,
    tokenizer_of,
)

Kind = Literal["data", "build", "trunk", "stack", "activations", "validation"]

NUMERICS: dict[Kind, int] = {"data": 1, "build": 1, "trunk": 1, "stack": 1, "activations": 1, "validation": 1}
"""Bumped whenever the numbers of a kind change for an unchanged recipe: tests/test_golden.py says when."""


class Ref(BaseModel, frozen=True):
    """The name of an artifact: what tasks exchange. It says what, never where."""

    kind: Kind
    stage: int
    """Creation index of the stage that makes it; -1 for data."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the recipe, in full."""

    @property
    def name(self) -> str:
        """Readable and unique: kind, stage and the first 12 hex digits."""
        prefix = self.kind if self.stage < 0 else f"{self.kind}-{self.stage}"
        return f"{prefix}-{self.sha256[:12]}"


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces, the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class Recipe(Value, frozen=True):
    """What a core function receives to make an artifact, parents named by their hashes.

    A field that is at its default is not part of the hash, so that a later version can add fields
    without renaming what exists.
    """

    kind: ClassVar[Kind]

    def dump(self) -> dict[str, Any]:
        """Return the hashed form: plain JSON values, defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def ref(self, stage: int) -> Ref:
        """Return the reference of the artifact this recipe makes."""
        text = canonical_json({"kind": self.kind, "numerics": NUMERICS[self.kind], "recipe": self.dump()})
        return Ref(kind=self.kind, stage=stage, sha256=hashlib.sha256(text.encode()).hexdigest())


class DataRecipe(Recipe, frozen=True):
    """Packed sequences of a corpus."""

    kind = "data"
    corpus: str
    tokenizer: str
    """'byte', or 'sha256:' and the hash of a tokenizer.json: never its path."""
    seq_len: int
    max_sequences: int
    validation_fraction: float
    examples: bool = False
    """Whether the corpus holds examples with targets, one a line, and not text."""


class BuildRecipe(Recipe, frozen=True):
    """A new stack before training."""

    kind = "build"
    shape: ModelShape
    index: int
    n_blocks: int
    operator: GrowthOperator
    seed: int
    source: str | None = None
    """State of the stack that is copied."""
    adapter: AdapterSpec | None = None
    quantised: bool = False
    """Whether it is NF4 from the start."""
    parts: tuple[StackSpec, ...] = ()
    """Joint training from scratch: all its stacks, in data-flow order."""


class TrunkRecipe(Recipe, frozen=True):
    """The rack as a stage finds it."""

    kind = "trunk"
    strategy: Literal["frozen", "qlora", "full"]
    stacks: tuple[str, ...]
    """States in data-flow order."""
    trains: tuple[Trains, ...] = ()
    """What of each trains; empty where nothing does."""
    progressive: AdapterSpec | None = None
    """What every stack of it carries besides its own adapter, if that trains; before that it is zero."""


class StackRecipe(Recipe, frozen=True):
    """A trained stack, with the head it was trained with."""

    kind = "stack"
    build: str
    trunk: str
    data: str
    mask: MaskSpec | None = None
    """None is the causal objective, or a custom one."""
    order_seed: int
    views: int
    optim: OptimSpec
    stream_dtype: str | None = None
    """Type of the frozen trunk's stream; None where all that there is trains, or gradients flow through it."""
    mode: Literal["append", "prepend", "joint"] = "append"
    precision: Precision = "full"
    """What the stack is stored as from the end of its stage on."""
    objective: str = ""
    """Only of a custom objective: its loss."""
    time_step: int | None = None
    """Of time-as-depth."""
    joint_times: tuple[tuple[int, float], ...] = ()
    """Joint training where depth is time: step and mask ratio of every stack, by creation index."""
    weighting: Literal["mean", "elbo"] = "mean"


class ActivationRecipe(Recipe, frozen=True):
    """The stream after the first `boundary` stacks, for the rows that the next stage visits."""

    kind = "activations"
    boundary: int
    stacks: tuple[str, ...]
    data: str
    mask: MaskSpec | None = None
    dtype: str
    order_seed: int
    views: int
    batch_size: int
    steps: int
    validation_sequences: int


class ValidationRecipe(Recipe, frozen=True):
    """The judgement on a stage: its losses, and whether its cache equals the live trunk."""

    kind = "validation"
    stack: str
    activations: str | None = None
    sequences: int
    sampled_rows: int
    grid: tuple[float, ...] = ()
    """Mask ratios at which all stages are compared, where their own differ."""


class StagePlan(Value, frozen=True):
    """Everything one stage makes, by recipe."""

    spec: StageSpec
    shape: ModelShape
    build: BuildRecipe | None
    """None where no stack is added: the joint anneal."""
    trunk: TrunkRecipe
    stack: StackRecipe
    activations: ActivationRecipe | None
    no_cache_reason: str
    validation: ValidationRecipe

    @property
    def index(self) -> int:
        """Number of the stage; of a growth stage also the creation index of its stack."""
        return self.spec.index

    def ref(self, kind: Kind) -> Ref:
        """Return the reference of one of the stage's artifacts."""
        recipe = self.recipe(kind)
        assert recipe is not None
        return recipe.ref(self.index)

    def recipe(self, kind: Kind) -> Recipe | None:
        """Return the recipe of a kind; None where the stage makes none (a cache nobody reads)."""
        recipes: dict[Kind, Recipe | None] = {
            "build": self.build,
            "trunk": self.trunk,
            "stack": self.stack,
            "activations": self.activations,
            "validation": self.validation,
        }
        return recipes[kind]


class RunPlan(Value, frozen=True):
    """A whole run, by recipe: what it will be, whether or not any of it exists."""

    data: DataRecipe
    corpus_bytes: int
    """Of the text; part of no id."""
    stages: tuple[StagePlan, ...]

    @property
    def data_ref(self) -> Ref:
        """Reference of the packed corpus."""
        return self.data.ref(-1)


def plan_run(config: StackWiseConfig, corpus_digest: str, corpus_bytes: int = 0) -> RunPlan:
    """Resolve a configuration into the recipes of every artifact it needs.

    Args:
        config: valid.
        corpus_digest: content hash of the corpus; see `data.read_corpus`.
        corpus_bytes: of its text; only `cache.mode: auto` asks, to estimate rows.
    """
    data = DataRecipe(
        corpus=corpus_digest,
        tokenizer=tokenizer_of(config).name,
        seq_len=config.data.seq_len,
        max_sequences=config.data.max_sequences,
        validation_fraction=config.data.validation_fraction,
        examples=config.training.progressive.training_objective == "custom",
    )
    specs, stages = resolve_stages(config), list[StagePlan]()
    for spec, reader in zip(specs, [*specs[1:], None], strict=True):
        decision = decide_cache(config, spec, reader, corpus_bytes)
        stages.append(_plan_stage(config, spec, reader, decision, data.ref(-1).sha256, tuple(stages)))
    return RunPlan(data=data, corpus_bytes=corpus_bytes, stages=tuple(stages))


def stack_state(stages: Sequence[StagePlan], stack: int) -> str:
    """Return what a stack is after some stages: the hash of the last that trained any of it."""
    anatomies = [stage.spec.anatomy for stage in stages]
    stage = last_trained(anatomies, stack, "adapters")
    sha256 = stages[stage].ref("stack").sha256
    return sha256 if stages[stage].spec.anatomy.newest == stack else f"{sha256}#{stack}"


def _plan_stage(
    config: StackWiseConfig,
    spec: StageSpec,
    reader: StageSpec | None,
    decision: CacheDecision,
    data: str,
    below: tuple[StagePlan, ...],
) -> StagePlan:
    index, anatomy, shape = spec.index, spec.anatomy, resolve_shape(config)
    states = {stack: stack_state(below, stack) for stack in spec.trunk}
    build = _plan_build(config, shape, spec, states)
    trained = [stack for stack in spec.trunk if anatomy.trains_of(stack) != "nothing"]
    trunk = TrunkRecipe(
        strategy=spec.strategy if trained else "frozen",  # where nothing trains, strategies share their stages
        stacks=tuple(states.values()),
        trains=tuple(anatomy.trains_of(stack) for stack in spec.trunk) if trained else (),
        progressive=spec.stacks[trained[0]].adapters.get("progressive") if trained else None,
    )
    joint = spec.mode == "joint"
    stack = StackRecipe(
        build=build.ref(index).sha256 if build else "",
        trunk=trunk.ref(index).sha256,
        data=data,
        mask=resolve_mask(config, anatomy.newest),
        order_seed=config.run.seed,
        views=resolve_views(config),
        optim=spec.optim,
        stream_dtype=resolve_stream_dtype(config) if anatomy.boundary else None,
        mode=spec.mode,
        precision="full" if joint else spec.new.precision,
        objective=resolve_objective(config),
        time_step=spec.time_step,
        joint_times=resolve_joint_times(config) if joint else (),
        weighting=config.training.loss_weighting,
    )
    sha256 = stack.ref(index).sha256
    states |= {c: sha256 if c == anatomy.newest else f"{sha256}#{c}" for c in anatomy.trained}
    activations = _plan_activations(config, reader, states, data) if reader and decision.cached else None
    validation = ValidationRecipe(
        stack=sha256,
        activations=activations.ref(index).sha256 if activations else None,
        sequences=config.validation.max_sequences,
        sampled_rows=config.validation.sampled_rows,
        grid=resolve_grid(config),
    )
    return StagePlan(
        spec=spec,
        shape=shape,
        build=build,
        trunk=trunk,
        stack=stack,
        activations=activations,
        no_cache_reason=decision.reason,
        validation=validation,
    )


def _plan_build(
    config: StackWiseConfig, shape: ModelShape, spec: StageSpec, states: dict[int, str]
) -> BuildRecipe | None:
    """Plan the new stack, or the new stacks of joint training from scratch; the anneal adds none."""
    if spec.mode == "joint" and states:
        return None
    source = spec.source
    return BuildRecipe(
        shape=shape,
        index=spec.index,
        n_blocks=spec.n_blocks,
        operator=spec.operator,
        seed=config.run.seed,
        source=None if source is None else states[source],
        adapter=spec.new.adapters.get("stack") if spec.mode != "joint" else None,
        quantised=spec.new.precision == "qlora" and spec.index > 0,
        parts=tuple(spec.stacks[stack] for stack in spec.anatomy.order) if spec.mode == "joint" else (),
    )


def _plan_activations(
    config: StackWiseConfig, reader: StageSpec, states: dict[int, str], data: str
) -> ActivationRecipe:
    """Plan the store that the next stage reads: its boundary, its corruption, its rows.

    Args:
        config: of the run.
        reader: the next stage.
        states: of the stacks it finds, by creation index.
        data: hash of the sequences.
    """
    return ActivationRecipe(
        boundary=reader.anatomy.boundary,
        stacks=tuple(states[below] for below in reader.anatomy.below),
        data=data,
        mask=resolve_mask(config, reader.index),
        dtype=resolve_stream_dtype(config),
        order_seed=config.run.seed,
        views=resolve_views(config),
        batch_size=reader.optim.batch_size,
        steps=reader.optim.steps,
        validation_sequences=config.validation.max_sequences,
    )
