"""The rack against Hugging Face's Llama, causality from gradients, and the trunk's stream bit for bit.

Letters: B sequences, T positions, D channels, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise_core.config.schema import QUANTISED_STREAMS, StreamDtype
from stackwise_core.data.masks import MaskSpec
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.model.blocks import INIT_STD, Stack, initialise
from stackwise_core.model.rack import Rack
from stackwise_core.model.stream import EXACT, ChannelStatistics, Stream
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.training.boundary import InputsFromTokens, LiveTrunk, RowsFromBoundary, RowsFromTokens, advance
from support.llamas import llama_names, llama_of

V = 40
DTYPES = get_args(StreamDtype)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, since such small matrices only wait for a second; two or more where a test is about bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before) if "same_bits" in request.node.name else 1)
    yield
    torch.set_num_threads(before)


def shape_of(**changes: Any) -> ModelShape:
    values = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_ff": 24, "causal": True}
    return ModelShape.model_validate({**values, **changes})


def new_rack(shape: ModelShape, blocks: tuple[int, ...] = (2, 1), scale: float = 5.0) -> Rack:
    """A rack with weights large enough that every part shows in the output; norms are not ones."""
    rack = Rack(shape)
    for index, n_blocks in enumerate(blocks):
        rack.stacks.append(Stack(shape, n_blocks, index))
    initialise(rack, 11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in rack.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return rack


def tokens_of(n: int, seq_len: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (n, seq_len), generator=torch.Generator().manual_seed(seed))


def stacks_of(rack: Rack) -> list[Stack]:
    return [stack for stack in rack.stacks if isinstance(stack, Stack)]


# ---------------------------------------------------------------- a rack is a Llama


@pytest.mark.parametrize(
    ("changes", "n_blocks"),
    [
        ({"n_heads": 6, "n_kv_heads": 2, "d_model": 48, "rope_theta": 77.0, "tie_embeddings": False}, (2, 1)),
        ({"n_heads": 2, "n_kv_heads": 1, "d_model": 20, "d_ff": 31, "norm_eps": 1e-2}, (1, 2)),
        ({"n_heads": 4, "n_kv_heads": 4, "d_model": 32, "tie_embeddings": True}, (2,)),
    ],
)
def test_logits_and_gradients_equal_llama(changes: dict[str, Any], n_blocks: tuple[int, ...]) -> None:
    """Float32 sums in another order: 1e-5 of the largest value."""
    rack = new_rack(shape_of(**changes), n_blocks)
    llama = llama_of(rack)
    tokens = tokens_of(3, 19)
    ours, theirs = rack(tokens), llama(tokens).logits
    assert ours.std() > 0.3  # not a rack that outputs nothing
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    names, gradients = llama_names(n_blocks), dict(llama.named_parameters())
    compared = 0
    for name, parameter in rack.named_parameters():
        expected = gradients[names[name]].grad
        assert parameter.grad is not None
        assert expected is not None
        assert expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        compared += 1
    assert compared == len(gradients)


# ---------------------------------------------------------------- who sees whom


def influence(rack: Rack, seq_len: int) -> Tensor:
    """|d logits[t] / d embedding[s]|, largest entry: [T, T]."""
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = rack.embedding.register_forward_hook(keep)
    logits = rack(tokens_of(1, seq_len))
    handle.remove()
    direction = torch.randn(V, generator=torch.Generator().manual_seed(1))
    rows = [torch.autograd.grad(logits[0, t] @ direction, embedded[0], retain_graph=True)[0] for t in range(seq_len)]
    return torch.stack([row[0].abs().amax(-1) for row in rows])


def test_a_causal_position_sees_itself_and_what_came_before() -> None:
    seen = influence(new_rack(shape_of(causal=True, n_kv_heads=1)), 9)
    assert seen.triu(1).count_nonzero() == 0
    assert seen.tril().count_nonzero() == 9 * 10 // 2


def test_a_bidirectional_position_sees_both_sides() -> None:
    assert influence(new_rack(shape_of(causal=False, n_kv_heads=1)), 9).count_nonzero() == 81


@pytest.mark.parametrize("causal", [True, False])
def test_the_order_of_earlier_tokens_matters(causal: bool) -> None:
    rack, tokens = new_rack(shape_of(causal=causal), (1,)), tokens_of(1, 6)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    assert (rack(tokens)[0, -1] - rack(swapped)[0, -1]).abs().max() > 1e-3


# ---------------------------------------------------------------- depth, ties, initialisation


def test_depth_is_the_first_stacks() -> None:
    rack, tokens = new_rack(shape_of(), (1, 2, 1)), tokens_of(2, 8)
    x = rack.embedding(tokens)
    for depth, stack in enumerate(stacks_of(rack)):
        assert rack.hidden(tokens, depth).equal(x)
        x = stack(x)
    assert rack.hidden(tokens).equal(x)
    assert rack(tokens).equal(rack.head(x))


def test_untie_keeps_outputs_and_gives_the_head_its_own_tensor() -> None:
    rack, tokens = new_rack(shape_of(tie_embeddings=True)), tokens_of(2, 8)
    assert rack.tied
    assert rack.head.projection.weight is rack.embedding.weight
    before = rack(tokens)
    rack.untie()
    assert rack(tokens).equal(before)
    embedding = rack.embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(rack.head.parameters(), lr=0.1)
    F.cross_entropy(rack(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert rack.embedding.weight.equal(embedding)
    assert not rack.head.projection.weight.equal(embedding)
    head = rack.head.projection.weight
    rack.untie()
    assert rack.head.projection.weight is head  # a second time changes nothing


def test_a_rack_without_ties_has_two_tensors() -> None:
    rack = Rack(shape_of(tie_embeddings=False))
    assert not rack.tied
    assert rack.head.projection.weight is not rack.embedding.weight


def test_initialise_is_reproducible_per_seed() -> None:
    shape = shape_of(d_model=64, d_ff=96)
    stacks = [Stack(shape, 2) for _ in range(3)]
    for stack, seed in zip(stacks, (1, 1, 2), strict=True):
        torch.rand(3)  # the global generator plays no part
        initialise(stack, seed)
    first, again, other = [dict(stack.named_parameters()) for stack in stacks]
    for name, parameter in first.items():
        assert parameter.equal(again[name])
        if parameter.dim() == 1:
            assert parameter.eq(1).all()
        else:
            assert not parameter.equal(other[name])
            assert abs(parameter.std().item() / INIT_STD - 1) < 0.1  # 1,000 draws and more: 4 sigma


def test_a_rack_trains_after_inference_mode() -> None:
    rack, tokens = new_rack(shape_of(rope_theta=123.0)), tokens_of(1, 5)
    with torch.inference_mode():
        rack(tokens)
    rack(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in rack.parameters())


def test_a_rack_that_is_to_be_filled_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device torch would import its compiler to draw."""
    monkeypatch.setattr(nn.Embedding, "reset_parameters", lambda self: pytest.fail("it drew"))
    with torch.device("meta"):
        assert Rack(shape_of()).embedding.weight.is_meta


def test_the_model_draws_nothing_at_random() -> None:
    rack, tokens = new_rack(shape_of()).train(), tokens_of(2, 8)
    state = torch.get_rng_state()
    assert rack(tokens).equal(rack(tokens))
    assert torch.get_rng_state().equal(state)


# ---------------------------------------------------------------- the trunk's stream


def stream_of(dtype: StreamDtype, stacks: Sequence[Stack]) -> Stream:
    """A stream of a type; of a quantised one with any statistics at all, for each stack its own."""
    generator = torch.Generator().manual_seed(4)
    width = stacks[0].shape.d_model
    channels = {
        stack.creation_index: ChannelStatistics(
            torch.randn(width, generator=generator), torch.rand(width, generator=generator) + 0.1
        )
        for stack in stacks
    }
    return Stream(dtype, channels if dtype in QUANTISED_STREAMS else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d_model", "n_heads", "seq_len", "d_ff"), [(96, 3, 50, 259), (34, 1, 7, 37), (64, 4, 33, 176), (128, 4, 128, 352)]
)
def test_a_row_has_the_same_bits_in_every_batch(
    d_model: int, n_heads: int, seq_len: int, d_ff: int, dtype: StreamDtype
) -> None:
    shape = shape_of(d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads, d_ff=d_ff)
    stacks = stacks_of(new_rack(shape, (1, 1)).eval())
    stream = stream_of(dtype, stacks)
    entering = torch.randn(7, seq_len, d_model, generator=torch.Generator().manual_seed(2)).to(stream.given)
    rows = torch.cat([advance(stacks, entering[n : n + 1].clone(), stream) for n in range(7)])
    assert rows.dtype == stream.given
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [6, 2], [3, 3, 0], [5, 4, 3, 2, 1]):
        assert advance(stacks, entering[chosen], stream).equal(rows[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_live_trunk_is_the_stacks_one_by_one_rounded_after_each(dtype: StreamDtype) -> None:
    rack, tokens = new_rack(shape_of(), (1, 2, 1)).train(), tokens_of(3, 9)
    stream = stream_of(dtype, stacks_of(rack))
    with torch.no_grad():
        rows: list[Tensor] = []
        for row in tokens:
            x = rack.embedding(row[None])
            for stack in stacks_of(rack):
                x = stream.cast(stack(x.float()), stack.creation_index)
            rows.append(x)
    trunk = LiveTrunk(rack.embedding, stacks_of(rack), stream)
    assert trunk(tokens).equal(torch.cat(rows))
    assert not any(stack.training for stack in rack.stacks)
    assert stream.cast(trunk.output(tokens), 2).equal(trunk(tokens))
    if dtype != "float32":  # rounding in between is not rounding at the end
        assert not trunk(tokens).equal(stream.cast(rack.hidden(tokens), 2))


def splits_of(n: int, seq_len: int) -> tuple[PackedSequences, PackedSequences]:
    ids = np.arange(n, dtype=np.int64)
    tokens = [tokens_of(n, seq_len, seed).numpy().astype(np.uint16) for seed in (1, 2)]
    return PackedSequences(tokens[0], ids), PackedSequences(tokens[1], FIRST_VALIDATION_ID + ids)


MASKS = MaskSpec(seed=7, ratio=0.3, corruption="bert", mask_token=V - 1, n_regular_tokens=V - 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_spec", [None, MASKS])
def test_advancing_a_boundary_equals_refilling_it(mask_spec: MaskSpec | None, dtype: StreamDtype) -> None:
    rack, splits = new_rack(shape_of(d_model=34, n_heads=1, n_kv_heads=1, d_ff=37), (1, 1, 2)), splits_of(6, 11)
    stacks = stacks_of(rack)
    stream = stream_of(dtype, stacks)
    rows = [
        RowsFromTokens(InputsFromTokens(*splits, mask_spec), LiveTrunk(rack.embedding, stacks[:n], stream))
        for n in range(4)
    ]
    for below in (1, 2):
        advanced = RowsFromBoundary(rows[below], stacks[below], torch.device("cpu"))
        for split, views in zip(splits, ((0, 1, 5), (-1,)), strict=True):
            for view in views:
                ids = split.sequence_ids[[4, 0, 3]]
                refilled = rows[below + 1].rows(ids, view)
                assert refilled.dtype == stream.given
                assert stream.cast(advanced.rows(ids, view), below).equal(refilled)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(-1, 7))
def test_rows_from_tokens_are_the_trunk_of_the_corrupted_row(chosen: list[int], view: int) -> None:
    rack, splits = new_rack(shape_of(), (1,)), splits_of(6, 9)
    trunk = LiveTrunk(rack.embedding, stacks_of(rack), Stream("bfloat16"))
    split = splits[0] if view >= 0 else splits[1]
    mask_spec = MASKS if view >= 0 else MASKS.for_validation()
    tokens, ids = split.tokens[chosen].astype(np.int64), split.sequence_ids[chosen]
    corrupted = mask_spec.corrupt(tokens, mask_spec.masks(ids, view, 9), ids, view)
    assert (
        RowsFromTokens(InputsFromTokens(*splits, MASKS), trunk)
        .rows(ids, view)
        .equal(trunk(torch.from_numpy(corrupted)))
    )


def test_no_gradient_reaches_the_trunk() -> None:
    rack, tokens = new_rack(shape_of(tie_embeddings=False), (1, 1)), tokens_of(2, 8)
    trunk = LiveTrunk(rack.embedding, stacks_of(rack)[:1], EXACT)
    boundary = trunk(tokens)
    assert not boundary.requires_grad
    assert not advance(stacks_of(rack), rack.embedding(tokens), EXACT).requires_grad
    rack.head(rack.stacks[1](boundary)).sum().backward()
    frozen = [*rack.embedding.parameters(), *rack.stacks[0].parameters()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in frozen)
    assert all(parameter.grad is not None for parameter in rack.stacks[1].parameters())


def test_public_names_come_without_side_effects() -> None:
    code = (
        "import sys, stackwise_core as s; assert 'torch' not in sys.modules;"
        "[getattr(s, name) for name in s.__all__]; assert 'zarr' not in sys.modules and 'prefect' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
