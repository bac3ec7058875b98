"""Recipes and their ids: the same recipe has the same id on every machine.

Ids chain: data -> stack 0 -> boundary 1 -> stack 1 -> ... Needs no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, Field

from stackwise_core.config.schema import Decay, Mode, Precision, Strategy, StreamDtype
from stackwise_core.config.stacks import AdapterSpec
from stackwise_core.data.masks import MaskSpec, RatioSpan
from stackwise_core.stages.resolve import ModelShape, Value, WhereAdopted, WhereSaid
from stackwise_core.stages.stages import GrowthOperator, InitSpec, OptimSpec, StackSpec, Trains

Kind = Literal["data", "build", "trunk", "stack", "optimizer", "cooldown", "activations", "validation"]

NUMERICS: dict[Kind, int] = dict.fromkeys(get_args(Kind), 1)
"""Raise a version when the numbers of its kind change for an unchanged recipe; the golden tests show when."""


class Ref(BaseModel, frozen=True):
    """The name of an artifact, which tasks exchange. It is independent of where the artifact is."""

    kind: Kind
    stage: int = Field(ge=-1, lt=2**31)
    """Index of the stage that makes it; -1 for data."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Full hash of the recipe."""

    def __hash__(self) -> int:
        """Hash by the recipe's hash alone, which is unique."""
        return hash(self.sha256)

    @property
    def name(self) -> str:
        """Readable and unique: kind, stage and the first 12 hex digits."""
        prefix = self.kind if self.stage < 0 else f"{self.kind}-{self.stage}"
        return f"{prefix}-{self.sha256[:12]}"


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces, the form that is hashed."""
    return _CANONICAL.encode(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class Recipe(Value, frozen=True):
    """Everything that determines an artifact; parents are named by their hashes.

    Fields at their default are not hashed, so that later versions can add fields without renaming what exists.
    """

    kind: ClassVar[Kind]

    def dump(self) -> dict[str, Any]:
        """Return the hashed form: plain JSON values, defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the recipe, as it enters the ids of what is made from it."""
        text = canonical_json({"kind": self.kind, "numerics": NUMERICS[self.kind], "recipe": self.dump()})
        return hashlib.sha256(text.encode()).hexdigest()

    def ref(self, stage: int) -> Ref:
        """Return the reference of the artifact this recipe makes."""
        return Ref(kind=self.kind, stage=stage, sha256=self.sha256)


class MixedIn(Value, frozen=True):
    """A source of a mixture."""

    data: str
    """Its packed sequences, all of them."""
    share: float
    """Of the training sequences; 0 is that of its size."""


class DataRecipe(Recipe, frozen=True):
    """Packed sequences of a corpus."""

    kind = "data"
    corpus: str
    tokenizer: str
    """'byte', or 'sha256:' and the hash of a tokenizer.json, with an end token that it does not imply: never a path."""
    seq_len: int
    max_sequences: int
    validation_fraction: float
    sample: Literal["first", "spread"] = "first"
    """Which sequences `max_sequences` takes."""
    examples: bool = False
    """Whether the corpus holds examples with targets rather than text."""
    mixture: WhereSaid[tuple[MixedIn, ...]] = ()
    """The sources, if there are several, in the order of their hashes."""
    separated_by: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """Where documents are kept apart: the token that ends each."""


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
    """Whether the stack is NF4 from the start."""
    blend: WhereSaid[str] = ""
    """State of a second stack; the copy is the mean of both."""
    init: InitSpec = Field(default=InitSpec(), exclude_if=lambda value: value == InitSpec())
    parts: tuple[StackSpec, ...] = ()
    """For joint training from scratch: all stacks, in data-flow order."""


class TrunkRecipe(Recipe, frozen=True):
    """The rack at the start of a stage."""

    kind = "trunk"
    strategy: Strategy
    stacks: tuple[str, ...]
    """States in data-flow order."""
    trains: tuple[Trains, ...] = ()
    """What of each stack trains; empty if nothing does."""
    progressive: AdapterSpec | None = None
    """The progressive adapter of the stacks, if it trains; until then its output is zero."""


class StackRecipe(Recipe, frozen=True):
    """A trained stack, and the head trained with it."""

    kind = "stack"
    build: str
    trunk: str
    data: str
    mask: MaskSpec | None = None
    """None for the causal and custom objectives."""
    order_seed: int
    views: int
    optim: OptimSpec
    stream_dtype: str | None = None
    """Type of the frozen trunk's stream; None if the boundary is 0."""
    mode: Mode | Literal["joint"] = "append"
    tail: WhereSaid[int] = 0
    """The stacks above an inserted one."""
    frozen_head: bool = False
    """Whether the head stays as it is; below a prepended stack's trunk it always does."""
    precision: Precision = "full"
    """In which the stack is stored at the end of its stage."""
    objective: str = ""
    """The loss of a custom objective."""
    time_step: int | None = None
    """For time-as-depth."""
    joint_times: tuple[tuple[int, float], ...] = ()
    """For joint training with time-as-depth: step and mask ratio of every stack, by creation index."""
    joint_spans: WhereSaid[tuple[RatioSpan | None, ...]] = ()
    """For joint training with time-as-depth by intervals: the ratios of every stack, by creation index."""
    weighting: Literal["mean", "elbo"] = "mean"
    shuffle_block: int = 0
    statistics_rows: int = 0
    """Number of first rows over which channel statistics are taken; 0 if no stream needs them."""
    order_step: WhereSaid[int] = 0
    """The step of the order with which the stage begins."""
    optimizer: WhereSaid[str] = ""
    """The optimizer state of the stage before, if the stage goes on from it."""
    copied_state: WhereSaid[bool] = False
    """Whether a new stack begins with that of its source."""


class OptimizerRecipe(Recipe, frozen=True):
    """The state of a stage's optimizer after its last step, which the next stage goes on from."""

    kind = "optimizer"
    stack: str


class CooldownRecipe(Recipe, frozen=True):
    """The validation of a stage after further steps in which its rate decays; their weights are not kept."""

    kind = "cooldown"
    stack: str
    steps: int
    min_learning_rate: float
    decay: Decay
    sequences: int
    grid: tuple[float, ...] = ()
    """As in the validation of the stage."""


class AdoptedRecipe(Recipe, frozen=True):
    """A stack that was trained elsewhere and is adopted as it is; the last one with embedding and head."""

    kind = "stack"
    shape: ModelShape
    mode: Mode
    tail: WhereSaid[int] = 0
    """The stacks above an inserted one when it was created."""
    stack: StackSpec
    """With all adapters that it has."""
    files: dict[str, str]
    """Name in the artifact -> sha256 of the file's bytes."""
    rack: str
    """Hash of all files of the rack: a stack's stream depends on the embedding and the stacks below it."""
    family: WhereSaid[str] = ""
    """Of an imported model, such as Llama."""
    window: WhereSaid[int] = 0
    """Of an imported model whose attention has a window [tokens]: longer sequences would be another function."""
    order_seed: ClassVar[int] = 0  # its adapters are read, none is drawn
    joint_times: ClassVar[tuple[()]] = ()


class ActivationRecipe(Recipe, frozen=True):
    """A store: the stream after the first `boundary` stacks, for the rows that the next stage visits."""

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
    order_step: WhereSaid[int] = 0
    """The step of the order with which the next stage begins."""


class ValidationRecipe(Recipe, frozen=True):
    """The validation of a stage: its losses, and whether its store equals the live trunk."""

    kind = "validation"
    stack: str
    activations: str | None = None
    sequences: int
    sampled_rows: int
    grid: tuple[float, ...] = ()
    """Mask ratios at which all stages are compared, if their own differ."""
    data: WhereAdopted[str] = ""
    """This and the next two only if the stack is adopted, since its recipe does not name them."""
    mask: WhereAdopted[MaskSpec | None] = None
    objective: WhereAdopted[str] = ""
