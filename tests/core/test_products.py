"""What a matrix product or attention is given: cast once, decoded in parts, with a kernel that does not hold scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise_core.generation import kv_cache
from stackwise_core.generation.kv_cache import KVCache
from stackwise_core.model import precision
from stackwise_core.model.blocks import Attention, FeedForward, Stack, initialise
from stackwise_core.model.precision import StoredLinear, base_linears, convert_storage, held_dense
from stackwise_core.model.rotary import rotary_table
from stackwise_core.stages.resolve import ModelShape

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

SHAPE = ModelShape(vocab_size=40, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, causal=True)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- heads that share keys and values


def stack_of() -> Stack:
    stack = Stack(SHAPE, 2)
    initialise(stack, 0)
    return stack


def of_training(documents: Tensor | None) -> list[Tensor]:
    stack, x = stack_of(), normal(2, 6, 32).requires_grad_()
    out = stack(x, documents_BT=documents)
    out.square().sum().backward()
    return [out.detach(), *(each.grad for each in (x, *stack.parameters()) if each.grad is not None)]


def of_generation() -> list[Tensor]:
    stack, cache = stack_of(), KVCache([6, 6], 1, [2], torch.device("cpu"))
    cache.begin([0, 1])
    with torch.no_grad():
        return [stack(normal(2, 6, 32), cache.stacks[0])]


WAYS: dict[str, Any] = {
    "training": lambda: of_training(None),
    "documents": lambda: of_training(torch.tensor([[0, 0, 1, 1, 1, 2], [0] * 6])),
    "generation": of_generation,
}


@pytest.mark.parametrize("way", WAYS)
def test_heads_that_must_not_share_get_copies(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in float32, where the kernel for shared heads holds all scores."""
    expected = WAYS[way]()
    given: list[tuple[int, bool]] = []
    attention = kv_cache.F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **how: Any) -> Tensor:
        given.append((k.shape[1], enable_gqa))
        return attention(q, k, v, enable_gqa=enable_gqa, **how)

    monkeypatch.setattr(kv_cache.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(kv_cache, "_must_not_share", lambda q: True)
    found = WAYS[way]()
    assert given == [(4, False)] * 2
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


def test_only_float32_on_a_gpu_must_not_share() -> None:
    def must_not(device: str, dtype: torch.dtype) -> bool:
        query: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
        return kv_cache._must_not_share(query)

    assert must_not("cuda:1", torch.float32)
    assert not must_not("cuda:1", torch.bfloat16)
    assert not must_not("cpu", torch.float32)
    torch.set_autocast_enabled("cuda", True)  # which makes bfloat16 of it
    try:
        assert not must_not("cuda:1", torch.float32)
    finally:
        torch.set_autocast_enabled("cuda", False)


# ---------------------------------------------------------------- casts


def kept_of(x: Tensor, run: Any) -> list[Tensor]:
    """Return each tensor kept for the backward pass that is `x` in bfloat16."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.numel() == x.numel():
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        run()
    return [each for each in kept.values() if each.reshape(x.shape).equal(x.bfloat16())]


def test_an_input_of_several_products_is_cast_and_kept_once() -> None:
    x = normal(2, 6, 32).requires_grad_() * 1.0  # of a leaf autocast itself keeps the cast
    attention, feed_forward = Attention(SHAPE), FeedForward(SHAPE)
    rotary = rotary_table(SHAPE, 6, torch.device("cpu"))
    out: list[Tensor] = []
    assert len(kept_of(x, lambda: out.append(attention(x, rotary)))) == 1
    assert len(kept_of(x, lambda: out.append(feed_forward(x)))) == 1


# ---------------------------------------------------------------- decoding


def test_nvfp4_is_decoded_in_parts_and_straight_to_the_type_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = StoredLinear(normal(48, 64) * 0.02, "nvfp4")
    whole = linear.dense()
    sizes: list[int] = []
    embedding = precision.F.embedding

    def spy(indices: Tensor, table: Tensor) -> Tensor:
        sizes.append(indices.numel())
        return embedding(indices, table)

    monkeypatch.setattr(precision.F, "embedding", spy)
    monkeypatch.setattr(precision, "_NVFP4_AT_ONCE", 7 * 64)
    assert linear.dense().equal(whole)
    assert linear.dense(torch.bfloat16).equal(whole.bfloat16())
    assert sizes == [*[7 * 32] * 6, 6 * 32] * 2  # 48 rows of 64 weights, two of them a byte


@pytest.mark.parametrize("stored", ["half", "nvfp4"])
def test_a_frozen_stack_is_held_in_the_type_of_its_products(stored: Any) -> None:
    stack = stack_of()
    convert_storage(stack, stored)
    linears = [each for each in base_linears(stack).values() if isinstance(each, StoredLinear)]
    with held_dense(stack, torch.bfloat16):
        for linear in linears:
            assert linear.held is not None
            assert linear.held.equal(linear.dense().bfloat16())
            assert linear.held.dtype == torch.bfloat16
    assert [linear.held for linear in linears] == [None] * 14
