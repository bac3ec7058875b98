"""From configuration to what the core functions receive: small frozen values, defaults filled in.

Ids are made of these values, never of raw configuration keys, so that two spellings of the same
stage share its artifacts. Needs no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from stackwise_core.config import StackWiseConfig, StreamDtype
from stackwise_core.config_rules import stage_blocks, stage_steps
from stackwise_core.data import ByteTokenizer
from stackwise_core.masking import MaskSpec
from stackwise_core.order import RowOrder

GrowthOperator = Literal["copy", "copy_zero", "random", "zero"]


class Value(BaseModel, frozen=True, extra="forbid"):
    """A frozen value that enters ids as it stands."""


class TimeShape(Value, frozen=True):
    """The time embedding of a rack whose time is an input."""

    n_steps: int
    """Steps are 0 .. n_steps - 1."""
    dim: int
    """Width of the embedding; projected if it differs from d_model."""
    encoding: Literal["sinusoidal", "learned"]


class ModelShape(Value, frozen=True):
    """What every block of a rack has in common."""

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
    """None has no time embedding."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_model // self.n_heads


class OptimSpec(Value, frozen=True):
    """The optimisation of one stage: AdamW, warm-up and cosine, clipping."""

    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    gradient_clip: float
    accumulation_steps: int = 1


class StageSpec(Value, frozen=True):
    """One addition, resolved: which stack, how it starts, how it trains."""

    index: int
    n_blocks: int
    operator: GrowthOperator
    mode: Literal["append"]
    precision: Literal["full"]
    strategy: Literal["frozen"]
    optim: OptimSpec


def tokenizer_of(config: StackWiseConfig) -> ByteTokenizer:
    """Return the tokenizer the configuration names; `validate()` admits only 'byte' so far."""
    return ByteTokenizer()


def resolve_shape(config: StackWiseConfig) -> ModelShape:
    """Return the model shape with every 0 and 'auto' replaced by what it stands for."""
    model = config.model
    objective = config.training.progressive.training_objective
    return ModelShape(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        d_ff=model.d_ff or -(-model.d_model * 8 // 3 // 32) * 32,
        causal=model.attention == "causal" or (model.attention == "auto" and objective != "mlm"),
        tie_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
    )


def resolve_mask(config: StackWiseConfig, stage: int) -> MaskSpec | None:
    """Return how a stage corrupts its inputs; None with clm, which corrupts nothing."""
    if config.training.progressive.training_objective == "clm":
        return None
    tokenizer = tokenizer_of(config)
    return MaskSpec(
        seed=config.run.seed,
        ratio=config.training.mask_ratio,
        corruption=config.training.corruption,
        mask_token=tokenizer.mask_token,
        n_regular_tokens=tokenizer.n_regular_tokens,
    )


def resolve_views(config: StackWiseConfig) -> int:
    """Return the mask draws per sequence: as configured, else 1 for clm and 8 otherwise."""
    return config.cache.views or (1 if config.training.progressive.training_objective == "clm" else 8)


def resolve_order(config: StackWiseConfig, n_rows: int) -> RowOrder:
    """Return the order in which every stage visits the `n_rows` training sequences."""
    return RowOrder(
        seed=config.run.seed, n_rows=n_rows, batch_size=config.training.batch_size, views=resolve_views(config)
    )


def resolve_stage(config: StackWiseConfig, stage: int) -> StageSpec:
    """Return stage `stage` (0-based, in creation order)."""
    training = config.training
    operator: GrowthOperator = "copy" if training.new_stack_init == "auto" else training.new_stack_init
    return StageSpec(
        index=stage,
        n_blocks=stage_blocks(config, stage),
        operator="random" if stage == 0 else operator,
        mode="append",
        precision="full",
        strategy="frozen",
        optim=OptimSpec(
            steps=stage_steps(config, stage),
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            min_learning_rate=training.min_learning_rate,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            beta1=training.beta1,
            beta2=training.beta2,
            gradient_clip=training.gradient_clip,
            accumulation_steps=training.accumulation_steps,
        ),
    )


def resolve_stream_dtype(config: StackWiseConfig) -> StreamDtype:
    """Return the type of the frozen trunk's stream, cached or live."""
    return config.cache.dtype
