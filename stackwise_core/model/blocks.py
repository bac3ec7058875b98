"""Blocks and stacks in the shape of Llama (Touvron et al. 2023): RMSNorm, RoPE, GQA, SwiGLU, no biases.

What its relatives have beside it is a matter of `ModelShape`: biases on queries, keys and values (Qwen2), norms on
queries and keys (Qwen3), norms on outputs instead of inputs (OLMo2), or blocks without RoPE (SmolLM3).

Letters: H heads, K key/value heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stackwise_core.config.schema import Precision
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.generation.kv_cache import BlockMemory, StackMemory, grouped_attention
from stackwise_core.model.precision import compute_dtype, product_dtype
from stackwise_core.model.rotary import rotary_table, rotate
from stackwise_core.model.shown import parts_table
from stackwise_core.stages.resolve import ModelShape, TimeShape

INIT_STD = 0.02
"""Standard deviation of fresh matrices."""


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (Ainslie et al. 2023; Su et al. 2021)."""

    has_rope: Tensor | None

    def __init__(self, shape: ModelShape, *, has_rope: bool = True) -> None:
        """Create the four projections, and the norms of queries and keys if the shape has them."""
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.d_model, shape.q_width, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.d_model, shape.kv_width, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.d_model, shape.kv_width, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.q_width, shape.d_model, bias=False)
        of_q, of_k = shape.qk_norm_widths
        self.q_norm = nn.RMSNorm(of_q, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = nn.RMSNorm(of_k, eps=shape.norm_eps) if shape.qk_norm else None
        # Where blocks differ in it, it is a tensor among those of the block, so that it goes wherever they go.
        self.register_buffer("has_rope", torch.tensor(has_rope) if shape.no_rope_interval else None)

    def forward(
        self, x_BTD: Tensor, rotary: Tensor, memory: BlockMemory | None = None, sees: Tensor | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; with a memory, of new positions that see the earlier ones too.

        `sees` [B, 1, T, T] says which positions see which; None is all, or all before.
        """
        B, T, _ = x_BTD.shape
        x_BTD = x_BTD.to(product_dtype(x_BTD))  # once, not for each of the three, which would keep a copy each
        q_BHTC = self._rotated(self._heads(self.q_proj(x_BTD), self.q_norm), rotary)
        k_BKTC = self._rotated(self._heads(self.k_proj(x_BTD), self.k_norm), rotary)
        v_BKTC = self._heads(self.v_proj(x_BTD), None)
        if memory is None:
            causal = self.shape.causal and sees is None
            out_BHTC = grouped_attention(q_BHTC, k_BKTC, v_BKTC, causal=causal, sees=sees)
        else:
            out_BHTC = memory.attend(q_BHTC, k_BKTC, v_BKTC)
        return self.o_proj(out_BHTC.transpose(1, 2).reshape(B, T, -1))

    def _heads(self, x_BTD: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Return what a projection gave, normalised over as many channels as the norm has, by head: [B, H, T, C]."""
        B, T, _ = x_BTD.shape
        if norm is not None:
            x_BTD = norm(x_BTD.view(B, T, -1, *norm.normalized_shape))
        return x_BTD.view(B, T, -1, self.shape.head_dim).transpose(1, 2)

    def _rotated(self, x_BHTC: Tensor, rotary: Tensor) -> Tensor:
        rotated_BHTC = rotate(x_BHTC, rotary)
        return rotated_BHTC if self.has_rope is None else torch.where(self.has_rope, rotated_BHTC, x_BHTC)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: ModelShape) -> None:
        """Create the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up_proj = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each position; [B, T, D] to [B, T, D]."""
        x_BTD = x_BTD.to(product_dtype(x_BTD))  # as in `Attention`
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm, or before it, and added to the stream, scaled or as it is."""

    def __init__(self, shape: ModelShape, *, has_rope: bool = True) -> None:
        """Create both halves."""
        super().__init__()
        self.norm_outputs = shape.norm_outputs
        self.residual_scale = shape.residual_scale
        self.attention_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.attention = Attention(shape, has_rope=has_rope)
        self.ffn_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tensor,
        memory: BlockMemory | None = None,
        sees: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; see `Attention.forward`, and `Stack.forward` for `share`."""
        if self.norm_outputs:
            x_BTD = x_BTD + self._scaled(self.attention_norm(self.attention(x_BTD, rotary, memory, sees)), share)
            return x_BTD + self._scaled(self.ffn_norm(self.ffn(x_BTD)), share)
        x_BTD = x_BTD + self._scaled(self.attention(self.attention_norm(x_BTD), rotary, memory, sees), share)
        return x_BTD + self._scaled(self.ffn(self.ffn_norm(x_BTD)), share)

    def _scaled(self, branch_BTD: Tensor, share: Tensor | None) -> Tensor:
        # Not torch.add(alpha=...), which may fuse: the bits of a row would depend on where in a batch it is.
        branch_BTD = branch_BTD if self.residual_scale == 1.0 else branch_BTD * self.residual_scale
        return branch_BTD if share is None else branch_BTD * share


class Stack(nn.Module):
    """The blocks that are added to a rack, and trained, together."""

    def __init__(
        self, shape: ModelShape, n_blocks: int, creation_index: int = 0, precision: Precision = "full"
    ) -> None:
        """Create `n_blocks` blocks; `creation_index` is the stack's number in its rack."""
        super().__init__()
        self.shape = shape
        self.creation_index = creation_index
        self.precision: Precision = precision
        every = shape.no_rope_interval or n_blocks + 1
        self.blocks = nn.ModuleList(Block(shape, has_rope=n % every != 0) for n in range(1, n_blocks + 1))

    def _repr_html_(self) -> str:
        return parts_table("Stack", [(f"stack {self.creation_index}", self)])

    def last_weights(self) -> list[nn.Parameter]:
        """Return what each half of a block ends with: its output projection or, if it has one, the norm of its output.

        Both scale the residual branch; the stack must have no adapters and be dense.
        """
        last = ("attention_norm", "ffn_norm") if self.shape.norm_outputs else ("o_proj", "down_proj")
        return [weight for name, weight in self.named_parameters() if name.removesuffix(".weight").endswith(last)]

    def forward(
        self,
        x_BTD: Tensor,
        memory: StackMemory | None = None,
        documents_BT: Tensor | None = None,
        share: Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; matrix products run in the stack's compute type, the stream stays float32.

        With a memory, which generation keeps, x are new positions, and those before them are in it. With `documents_BT`
        positions see only those of the same number, and each document begins at position 0. While a new stack comes in,
        `share` is how much of what its blocks would add is added. With `recompute` only the stream between blocks is
        kept for the backward pass, which computes the rest of one block after the other again.
        """
        sees = None
        if memory is None:
            rotary = rotary_table(self.shape, x_BTD.shape[1], x_BTD.device)
            if documents_BT is not None:
                documents_BT = documents_BT.to(x_BTD.device)
                sees = _seen(documents_BT, causal=self.shape.causal)
                rotary = rotary[:, _positions(documents_BT)][:, :, None]
        else:
            rotary = memory.cache.angles(rotary_table(self.shape, memory.cache.positions, x_BTD.device))
        compute = compute_dtype(self.precision, x_BTD.device)
        with torch.autocast(x_BTD.device.type, dtype=compute, enabled=compute != torch.float32):
            for number, block in enumerate(self.blocks):
                inputs = (x_BTD, rotary, memory and memory.blocks[number], sees, share)
                if recompute:  # nothing in a block draws random numbers
                    x_BTD = cast("Tensor", checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False))
                else:
                    x_BTD = block(*inputs)
        return x_BTD


def _seen(documents_BT: Tensor, *, causal: bool) -> Tensor:
    """Return which positions see which, if documents are kept apart: [B, 1, T, T]."""
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    return same.tril() if causal else same


def _positions(documents_BT: Tensor) -> Tensor:
    """Return the position of each token in its document [B, T]."""
    places = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    begins = torch.ones_like(documents_BT, dtype=torch.bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


class Head(nn.Module):
    """Final norm and projection to the vocabulary, kept from stage to stage."""

    def __init__(self, shape: ModelShape) -> None:
        """Create norm and projection."""
        super().__init__()
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.projection = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[..., D] to logits [..., V]."""
        return self.projection(self.norm(x_BTD))


class TimeEmbedding(nn.Module):
    """A vector for each time step: sinusoidal (Vaswani et al. 2017, section 3.5) or learned."""

    def __init__(self, time: TimeShape, d_model: int) -> None:
        """Create the table of a learned encoding, and the projection if the width differs from `d_model`."""
        super().__init__()
        self.time = time
        projected = time.dim != d_model
        self.table = nn.Embedding(time.n_steps, time.dim) if time.encoding == "learned" else None
        self.projection = nn.Linear(time.dim, d_model, bias=False) if projected else None
        # Token embeddings start with INIT_STD per channel; an unscaled sinusoid, with 0.7, would drown them in the
        # residual stream. A projection of N(0, INIT_STD) maps a vector of length 1 to INIT_STD per channel.
        wanted = 1.0 / math.sqrt(time.dim) if projected else INIT_STD
        self.scale = wanted / (INIT_STD if time.encoding == "learned" else math.sqrt(0.5))

    def forward(self, time_step_B: Tensor) -> Tensor:
        """Return the vector of each step: [B] to [B, D]."""
        n_steps = self.time.n_steps
        outside = time_step_B[(time_step_B < 0) | (time_step_B >= n_steps)]
        if len(outside):
            allowed = f"there are {n_steps} time steps: 0 to {n_steps - 1}"
            raise ConfigError([Fault("time_step", str(outside[0].item()), allowed)])
        # All steps are embedded, then selected: the bits of a matrix product can depend on its number of rows, and
        # a sequence must have the same bytes in a batch and alone.
        device = time_step_B.device
        steps_SC = self.table.weight if self.table is not None else sinusoids(n_steps, self.time.dim, device)
        steps_SC = steps_SC * self.scale
        steps_SD = steps_SC if self.projection is None else self.projection(steps_SC)
        return F.embedding(time_step_B, steps_SD)


class TokenEmbedding(nn.Embedding):
    """A vector for each token, plus the vector of the sequence's time step where time is an input."""

    def __init__(self, shape: ModelShape) -> None:
        """Create the table of tokens and, if the shape has time, the time embedding."""
        super().__init__(shape.vocab_size, shape.d_model)
        self.time = TimeEmbedding(shape.time, shape.d_model) if shape.time else None

    def reset_parameters(self) -> None:
        """Draw nothing on the meta device: torch would import its compiler for that, which takes seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor, time_step: Tensor | None = None) -> Tensor:
        """Return the stream below the first stack [B, T, D]; where time is an input it needs the steps [B]."""
        x_BTD = super().forward(input)
        if self.time is None and time_step is None:
            return x_BTD
        if self.time is None:
            raise ConfigError([Fault("time_step", "steps", "this rack has no time embedding; give none")])
        if time_step is None:
            raise ConfigError([Fault("time_step", "None", "this rack has time as an input; give a step per sequence")])
        return x_BTD + self.time(time_step.to(x_BTD.device))[:, None, :]


def sinusoids(n_steps: int, dim: int, device: torch.device) -> Tensor:
    """Return sines and cosines of every step at wavelengths from 2 pi to 10000 * 2 pi: [n_steps, dim]."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.outer(torch.arange(n_steps, device=device).float(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def initialise(module: nn.Module, seed: int) -> None:
    """Fill every matrix with N(0, INIT_STD) from a separate generator, every bias with 0; norms are ones already."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, INIT_STD, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()
