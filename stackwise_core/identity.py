"""Resolved recipes and their ids: the same recipe has the same id on every machine.

Ids chain: data -> stack 0 -> boundary 1 -> stack 1 -> ... Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from stackwise_core.cache_plan import decide_cache
from stackwise_core.config import StackWiseConfig
from stackwise_core.masking import MaskSpec
from stackwise_core.resolve import (
    GrowthOperator,
    ModelShape,
    OptimSpec,
    StageSpec,
    Value,
    resolve_mask,
    resolve_shape,
    resolve_stage,
    resolve_stream_dtype,
    resolve_views,
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
    seq_len: int
    max_sequences: int
    validation_fraction: float


class BuildRecipe(Recipe, frozen=True):
    """A new stack before training."""

    kind = "build"
    shape: ModelShape
    index: int
    n_blocks: int
    operator: GrowthOperator
    seed: int
    source: str | None = None
    """Hash of the stack that is copied."""


class TrunkRecipe(Recipe, frozen=True):
    """The rack as a stage finds it."""

    kind = "trunk"
    strategy: Literal["frozen"]
    stacks: tuple[str, ...]
    """Hashes in data-flow order; the embedding is the first stack's, the head the last one's."""


class StackRecipe(Recipe, frozen=True):
    """A trained stack, with the head it was trained with."""

    kind = "stack"
    build: str
    trunk: str
    data: str
    mask: MaskSpec | None = None
    """None is the causal objective."""
    order_seed: int
    views: int
    optim: OptimSpec
    stream_dtype: str | None = None
    """Type of the trunk's stream; None where there is no trunk."""


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


class StagePlan(Value, frozen=True):
    """Everything one stage makes, by recipe."""

    spec: StageSpec
    build: BuildRecipe
    trunk: TrunkRecipe
    stack: StackRecipe
    activations: ActivationRecipe | None
    no_cache_reason: str
    validation: ValidationRecipe

    @property
    def index(self) -> int:
        """Creation index."""
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
    stages: tuple[StagePlan, ...]

    @property
    def data_ref(self) -> Ref:
        """Reference of the packed corpus."""
        return self.data.ref(-1)


def plan_run(config: StackWiseConfig, corpus_digest: str) -> RunPlan:
    """Resolve a configuration into the recipes of every artifact it needs.

    Args:
        config: valid.
        corpus_digest: content hash of the corpus; see `data.read_corpus`.
    """
    data = DataRecipe(
        corpus=corpus_digest,
        tokenizer=config.data.tokenizer,
        seq_len=config.data.seq_len,
        max_sequences=config.data.max_sequences,
        validation_fraction=config.data.validation_fraction,
    )
    stages: list[StagePlan] = []
    for index in range(config.training.progressive.target_stacks):
        stages.append(_plan_stage(config, index, data.ref(-1).sha256, tuple(stages)))
    return RunPlan(data=data, stages=tuple(stages))


def _plan_stage(config: StackWiseConfig, index: int, data: str, below: tuple[StagePlan, ...]) -> StagePlan:
    spec = resolve_stage(config, index)
    trunk_stacks = tuple(stage.ref("stack").sha256 for stage in below)
    copies = spec.operator in ("copy", "copy_zero")
    build = BuildRecipe(
        shape=resolve_shape(config),
        index=index,
        n_blocks=spec.n_blocks,
        operator=spec.operator,
        seed=config.run.seed,
        source=trunk_stacks[-1] if copies else None,
    )
    trunk = TrunkRecipe(strategy=spec.strategy, stacks=trunk_stacks)
    stack = StackRecipe(
        build=build.ref(index).sha256,
        trunk=trunk.ref(index).sha256,
        data=data,
        mask=resolve_mask(config, index),
        order_seed=config.run.seed,
        views=resolve_views(config),
        optim=spec.optim,
        stream_dtype=resolve_stream_dtype(config) if below else None,
    )
    decision = decide_cache(config, index)
    stacks = (*trunk_stacks, stack.ref(index).sha256)
    activations = _plan_activations(config, index + 1, data, stacks) if decision.cached else None
    validation = ValidationRecipe(
        stack=stack.ref(index).sha256,
        activations=activations.ref(index).sha256 if activations else None,
        sequences=config.validation.max_sequences,
        sampled_rows=config.validation.sampled_rows,
    )
    return StagePlan(
        spec=spec,
        build=build,
        trunk=trunk,
        stack=stack,
        activations=activations,
        no_cache_reason="" if decision.cached else decision.reason,
        validation=validation,
    )


def _plan_activations(config: StackWiseConfig, boundary: int, data: str, stacks: tuple[str, ...]) -> ActivationRecipe:
    """Plan the store that stage `boundary` reads: its corruption, its rows."""
    reader = resolve_stage(config, boundary)
    return ActivationRecipe(
        boundary=boundary,
        stacks=stacks,
        data=data,
        mask=resolve_mask(config, boundary),
        dtype=resolve_stream_dtype(config),
        order_seed=config.run.seed,
        views=resolve_views(config),
        batch_size=reader.optim.batch_size,
        steps=reader.optim.steps,
        validation_sequences=config.validation.max_sequences,
    )
