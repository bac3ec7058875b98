"""Resolved recipes and their ids: the same recipe has the same id on every machine.

Ids chain: data -> stack 0 -> boundary 1 -> stack 1 -> ... Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from stackwise_core.config.schema import Precision, StreamDtype
from stackwise_core.data.masks import MaskSpec
from stackwise_core.stages.resolve import ModelShape, Value
from stackwise_core.stages.stages import AdapterSpec, GrowthOperator, OptimSpec, StackSpec, Trains

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
    shuffle_block: int = 0
    """Of the order; 0 is the uniform one."""
    statistics_rows: int = 0
    """Over so many of its first rows it takes the statistics of its stacks' outputs; 0 where no stream needs them."""


class ActivationRecipe(Recipe, frozen=True):
    """The stream after the first `boundary` stacks, for the rows that the next stage visits."""

    kind = "activations"
    boundary: int
    stacks: tuple[str, ...]
    data: str
    mask: MaskSpec | None = None
    dtype: StreamDtype
    order_seed: int
    views: int
    batch_size: int
    steps: int
    validation_sequences: int
    shuffle_block: int = 0
    """Of the order, which says which rows are visited."""


class ValidationRecipe(Recipe, frozen=True):
    """The judgement on a stage: its losses, and whether its cache equals the live trunk."""

    kind = "validation"
    stack: str
    activations: str | None = None
    sequences: int
    sampled_rows: int
    grid: tuple[float, ...] = ()
    """Mask ratios at which all stages are compared, where their own differ."""
