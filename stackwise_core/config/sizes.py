"""Sizes that other keys settle: what 0 stands for, and what is taken where one key leaves another no room."""

from __future__ import annotations

from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.schema import ConfigSchema


def vocab_size_of(config: ConfigSchema) -> int:
    """Return the rows of the embedding; 0 stands for the tokenizer's size, rounded up to a multiple of 64.

    The 259 ids of the byte tokenizer are rounded to a multiple of 8. Raises ConfigError if the tokenizer is needed and
    cannot be read.
    """
    if config.model.vocab_size:
        return config.model.vocab_size
    tokenizer = tokenizer_of(config)
    multiple = 8 if tokenizer.name == "byte" else 64
    return -(-tokenizer.vocab_size // multiple) * multiple


def feed_forward_width(config: ConfigSchema) -> int:
    """Return the inner width of the feed-forward: d_ff, or 8/3 of d_model rounded up to a multiple of 32."""
    return config.model.d_ff or -(-config.model.d_model * 8 // 3 // 32) * 32


def head_width(config: ConfigSchema) -> int:
    """Return the channels of a head: head_dim, or d_model / n_heads."""
    return config.model.head_dim or config.model.d_model // config.model.n_heads


def layer_widths(config: ConfigSchema) -> dict[str, int]:
    """Return the widths of a block's linear layers, by the key that sets each."""
    model, head = config.model, head_width(config)
    widths = {"model.d_model": model.d_model, "model.d_ff": feed_forward_width(config)}
    if model.head_dim and head * model.n_heads != model.d_model:
        widths["model.head_dim"] = head * model.n_heads
    if model.n_kv_heads not in (0, model.n_heads) and (model.head_dim or model.d_model % model.n_heads == 0):
        widths["model.n_kv_heads"] = head * model.n_kv_heads
    return widths


def residual_blocks_of(config: ConfigSchema) -> int:
    """Return the L of a residual scale of 1 / sqrt(2 L): the blocks of as many stacks as there may ever be; 0 for one.

    So raising the target changes no scale.
    """
    model, growth = config.model, config.training.progressive
    if model.residual_scale == "one":
        return 0
    own = [stack.n_blocks or model.blocks_per_stack for stack in growth.stacks[: growth.max_stacks]]
    return model.residual_blocks or sum(own) + (growth.max_stacks - len(own)) * model.blocks_per_stack


def batch_size_of(config: ConfigSchema) -> int:
    """Return the sequences of a batch: no more than there are."""
    most = config.data.max_sequences
    return min(config.training.batch_size, most) if most else config.training.batch_size


def accumulation_steps_of(config: ConfigSchema) -> int:
    """Return the parts of a batch: no more than it has sequences. They may differ in size by one."""
    return min(config.training.accumulation_steps, batch_size_of(config))
