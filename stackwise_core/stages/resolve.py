"""Resolved values: what a configuration means, with every default filled in.

Ids are made of these values, never of raw configuration keys, so that two spellings of the same stage share its
artifacts. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.functions import load_function, source_digest
from stackwise_core.config.schema import GROWTH, QUANTISED_STREAMS, RopeScaling
from stackwise_core.config.sizes import batch_size_of, feed_forward_width, head_width, residual_blocks_of, vocab_size_of
from stackwise_core.config.stacks import (
    mask_ratio_of,
    n_time_steps,
    ratio_span,
    resolve_time_input,
    stack_time_step,
)
from stackwise_core.config.unused import is_used
from stackwise_core.data.masks import MaskSpec
from stackwise_core.data.order import RowOrder
from stackwise_core.errors import ConfigError, Fault

T = TypeVar("T")


class Value(BaseModel, frozen=True, extra="forbid"):
    """A frozen value that enters ids unchanged."""


def _is_empty(value: object) -> bool:
    return not value


WhereAdopted = Annotated[T, Field(exclude_if=_is_empty)]
"""A value that only a run with an adopted rack has; elsewhere its record does not mention it."""


WhereSaid = Annotated[T, Field(exclude_if=_is_empty)]
"""A value that is newer than the first records; where it is not given, they do not mention it."""


class TimeShape(Value, frozen=True):
    """The time embedding of a rack whose time is an input."""

    n_steps: int
    """Steps are 0 .. n_steps - 1."""
    dim: int
    """Width of the embedding; projected if it differs from d_model."""
    encoding: Literal["sinusoidal", "learned"]


class ModelShape(Value, frozen=True):
    """The sizes and options that all blocks of a rack share, and its vocabulary and time embedding."""

    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    causal: bool
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    time: TimeShape | None = None
    """None: there is no time embedding."""
    head_dim: int = Field(default_factory=lambda given: given["d_model"] // given["n_heads"])
    """Channels of one head; records and ids leave out what d_model / n_heads gives."""
    qkv_bias: WhereSaid[bool] = False
    qk_norm: WhereSaid[bool] = False
    norm_outputs: WhereSaid[bool] = False
    no_rope_interval: WhereSaid[int] = 0
    rope_scaling: WhereSaid[RopeScaling | None] = None
    residual_blocks: WhereSaid[int] = 0
    """L, where residual branches are multiplied by 1 / sqrt(2 L); 0: they are added as they are."""

    @model_serializer(mode="wrap")
    def _without_the_usual(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = content(self)
        if self.has_usual_heads:
            values.pop("head_dim", None)
        return values

    @property
    def has_usual_heads(self) -> bool:
        """Whether the heads are as wide as the stream divided by their number."""
        return self.head_dim == self.d_model // self.n_heads

    @property
    def residual_scale(self) -> float:
        """What each residual branch, attention and feed-forward, is multiplied by."""
        return 1.0 / math.sqrt(2 * self.residual_blocks) if self.residual_blocks else 1.0

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Channels over which queries and keys are normalised: those of a head, or of all with `norm_outputs`."""
        return (self.q_width, self.kv_width) if self.norm_outputs else (self.head_dim, self.head_dim)

    @property
    def q_width(self) -> int:
        """Channels of all queries."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all keys, and of all values."""
        return self.n_kv_heads * self.head_dim


def resolve_shape(config: StackWiseConfig) -> ModelShape:
    """Return the model shape, with 0 and 'auto' replaced by what they stand for."""
    model, growth = config.model, config.training.progressive
    time = TimeShape(n_steps=n_time_steps(config), dim=growth.time_embedding_dim, encoding=growth.time_encoding_type)
    return ModelShape(
        vocab_size=vocab_size_of(config),
        d_model=model.d_model,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        d_ff=feed_forward_width(config),
        causal=model.attention == "causal" or (model.attention == "auto" and growth.training_objective != "mlm"),
        tie_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        time=time if growth.time_interpretation == "input" else None,
        head_dim=head_width(config),
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        norm_outputs=model.norm_outputs,
        no_rope_interval=model.no_rope_interval,
        rope_scaling=_resolve_rope_scaling(config),
        residual_blocks=residual_blocks_of(config),
    )


def _resolve_rope_scaling(config: StackWiseConfig) -> RopeScaling | None:
    """Return how positions are stretched, with the numbers that this way uses."""
    said = config.model.rope_scaling
    if said.kind in ("none", "linear"):
        return None if said.kind == "none" else RopeScaling(kind=said.kind, factor=said.factor)
    scaling = RopeScaling(
        kind=said.kind,
        factor=said.factor,
        original_max_position_embeddings=said.original_max_position_embeddings,
    )
    if said.kind == "llama3":
        own: dict[str, Any] = {"low_freq_factor": said.low_freq_factor, "high_freq_factor": said.high_freq_factor}
    else:
        own = {"beta_fast": said.beta_fast, "beta_slow": said.beta_slow, "truncate": said.truncate}
        own["attention_factor"] = said.attention_factor
    return scaling.model_copy(update=own)


def resolve_mask(config: StackWiseConfig, stage: int) -> MaskSpec | None:
    """Return how a stage corrupts its inputs; None for clm and custom, which do not corrupt them."""
    if config.training.progressive.training_objective != "mlm":
        return None
    tokenizer = tokenizer_of(config)
    if tokenizer.mask_token is None:
        allowed = "it has neither [MASK] nor <mask>, which mlm needs"
        raise ConfigError([Fault("data.tokenizer", repr(config.data.tokenizer), allowed)])
    interpretation = config.training.progressive.time_interpretation
    ratio = config.training.mask_ratio if interpretation == "none" else 0.0
    by_depth = interpretation == "depth"
    if by_depth:
        ratio = mask_ratio_of(config, stack_time_step(config, stage))
    return MaskSpec(
        seed=config.run.seed,
        ratio=ratio,
        corruption=config.training.corruption,
        mask_token=tokenizer.mask_token,
        n_regular_tokens=tokenizer.n_regular_tokens,
        special_tokens=tokenizer.special_tokens,
        time=resolve_time_input(config),
        span=ratio_span(config, stage) if by_depth else None,
    )


def resolve_views(config: StackWiseConfig) -> int:
    """Return the number of mask draws per sequence: as configured, or 8; 1 where there are no masks."""
    return (config.cache.views or 8) if config.training.progressive.training_objective == "mlm" else 1


def resolve_order(config: StackWiseConfig, n_rows: int) -> RowOrder:
    """Return the order in which all stages visit the `n_rows` training sequences."""
    by_batch = config.training.time_sampling != "per_sequence"
    return RowOrder(
        seed=config.run.seed,
        n_rows=n_rows,
        batch_size=batch_size_of(config),
        views=resolve_views(config),
        block=config.training.shuffle_block,
        fixed_batches=by_batch and config.training.progressive.time_interpretation == "input",
    )


def reads_examples(config: StackWiseConfig) -> bool:
    """Return whether the corpus holds examples with targets, rather than text."""
    return config.training.progressive.training_objective == "custom"


def keeps_documents_apart(config: StackWiseConfig) -> bool:
    """Return whether documents in one sequence do not see each other; an example has its sequence to itself."""
    return config.data.documents == "separate" and is_used(config, "data.documents")


def resolve_objective(config: StackWiseConfig) -> str:
    """Return what enters ids for a custom objective: name and source hash of its loss; '' for other objectives."""
    if config.training.progressive.training_objective != "custom":
        return ""
    key, name = "training.custom_loss", config.training.custom_loss
    return f"{name}@{source_digest(load_function(name, key), key)}" if name else "cross-entropy"


def resolve_loss(config: StackWiseConfig) -> Callable[..., Any] | None:
    """Return the loss function of a custom objective; None means cross-entropy."""
    key, name = "training.custom_loss", config.training.custom_loss
    return load_function(name, key) if name and is_used(config, key) else None


def named_functions(config: StackWiseConfig) -> dict[str, str]:
    """Return the functions that the configuration names and uses, by key: making its run imports them."""
    given = {"training.custom_loss": config.training.custom_loss}
    given[f"{GROWTH}.time_mapping"] = config.training.progressive.time_mapping
    return {key: name for key, name in given.items() if isinstance(name, str) and name and is_used(config, key)}


def imports(config: StackWiseConfig) -> list[str]:
    """Return a line for each function that a run of the configuration imports."""
    return [f"{key}: {name} is imported and run" for key, name in named_functions(config).items()]


STATISTICS_ROWS = 1024
"""Rows over which channel statistics of a stack's output are taken."""


def resolve_statistics_rows(config: StackWiseConfig) -> int:
    """Return over how many of its first rows a stage takes channel statistics; 0 if the stream needs none."""
    quantised = config.cache.dtype in QUANTISED_STREAMS and is_used(config, "cache.dtype")
    return STATISTICS_ROWS if quantised else 0
