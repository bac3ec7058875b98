"""A row of the trunk's stream is the same in every batch, also in groups as on a GPU, or is found to differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise_core.data.masks import IntArray
from stackwise_core.data.sequences import documents_in
from stackwise_core.model.blocks import Stack
from stackwise_core.model.growth_operators import new_rack
from stackwise_core.model.stream import EXACT, STREAM_DTYPES, Stream
from stackwise_core.objectives.losses import Batch
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.training import boundary, evaluate
from stackwise_core.training.boundary import advance, rows_at_once
from stackwise_core.training.evaluate import (
    ChannelMoments,
    differing_rows,
    judge_rack,
    judged_at_once,
    output_statistics,
)
from support.racks import SHAPE

T, END = 12, 9


def stacks_of_two() -> list[Stack]:
    rack = new_rack(SHAPE, seed=1)
    rack.stacks.extend(Stack(SHAPE, 1, n) for n in range(2))
    for parameter in rack.stacks.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return [stack.eval() for stack in rack.stacks if isinstance(stack, Stack)]


def entering(rows: int) -> Tensor:
    return torch.randn(rows, T, SHAPE.d_model, generator=torch.Generator().manual_seed(2))


def documents(rows: int) -> Tensor:
    """Of which only the first row holds more than one."""
    tokens = np.zeros((rows, T), np.int64)
    tokens[0, 3] = END
    return torch.from_numpy(documents_in(tokens, END))


# ---------------------------------------------------------------- in groups


def test_on_a_gpu_a_group_has_about_2048_positions() -> None:
    assert [rows_at_once(torch.device("cpu"), T) for T in (16, 4096)] == [1, 1]
    assert [rows_at_once(torch.device("cuda"), T) for T in (128, 1000, 2048, 4096)] == [16, 2, 1, 1]
    assert [judged_at_once(torch.device(name), 4096) for name in ("cpu", "cuda")] == [32, 1]


@torch.no_grad()
@pytest.mark.parametrize("kept_apart", [False, True])
def test_groups_are_always_of_one_size_and_of_one_kernel(kept_apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks, stream_BTD = stacks_of_two(), entering(5)
    documents_BT = documents(5) if kept_apart else None
    alone = advance(stacks, stream_BTD, EXACT, documents_BT)
    seen: list[tuple[int, int | None]] = []

    def hook(_: object, given: tuple[Tensor], named: dict[str, Tensor | None]) -> None:
        apart = named["documents_BT"]
        seen.append((len(given[0]), None if apart is None else len(apart)))

    for stack in stacks:
        stack.register_forward_pre_hook(hook, with_kwargs=True)
    monkeypatch.setattr(boundary, "rows_at_once", lambda *_: 3)
    together = advance(stacks, stream_BTD, EXACT, documents_BT)
    assert seen == [(3, 3 if kept_apart else None)] * 4  # rows 3 and 4 are one document each
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kept_apart", [False, True])
def test_a_row_has_the_same_bits_in_every_batch_on_a_gpu(kept_apart: bool) -> None:
    stacks, stream_BTD = [stack.cuda() for stack in stacks_of_two()], entering(300)
    documents_BT = documents(300) if kept_apart else None
    rows = advance(stacks, stream_BTD, Stream("bfloat16"), documents_BT)
    assert rows.device.type == "cpu"  # where the stream was
    for chosen in ([0], [299, 0, 7], list(range(299, -1, -1))):
        of_chosen = None if documents_BT is None else documents_BT[chosen]
        assert advance(stacks, stream_BTD[chosen].cuda(), Stream("bfloat16"), of_chosen).cpu().equal(rows[chosen])


def test_validation_gives_the_same_losses_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rack, stacks = new_rack(SHAPE, seed=1).eval(), stacks_of_two()
    tokens = torch.randint(SHAPE.vocab_size, (5, T), generator=torch.Generator().manual_seed(0))
    batches: list[Batch] = [make_batch({"input_ids": tokens, "documents": documents(5)}, None)]

    def losses() -> dict[str, float]:
        return judge_rack(rack.embedding, stacks, rack.head, batches, stream=Stream("bfloat16"), boundary=1)[0]

    expected = losses()
    monkeypatch.setattr(boundary, "rows_at_once", lambda *_: 3)
    monkeypatch.setattr(evaluate, "_SEQUENCES_AT_ONCE", 2)
    assert losses() == pytest.approx(expected, rel=1e-5)


def test_statistics_are_summed_where_the_rows_lie_and_kept_on_the_cpu() -> None:
    moments = ChannelMoments()
    moments.add(torch.empty(2, T, SHAPE.d_model, dtype=torch.bfloat16, device="meta"))
    assert (moments.sum.device.type, moments.squares.dtype) == ("meta", torch.float64)
    (found,) = output_statistics(stacks_of_two()[:1], [(entering(3), None)]).values()
    rows = advance(stacks_of_two()[:1], entering(3), EXACT).double().flatten(0, 1)
    torch.testing.assert_close(found.mean, rows.mean(0).float())
    torch.testing.assert_close(found.std, rows.std(0, correction=0).float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_statistics_of_rows_on_a_gpu() -> None:
    stacks, expected = stacks_of_two()[:1], output_statistics(stacks_of_two()[:1], [(entering(3), None)])
    found = output_statistics([stacks[0].cuda()], [(entering(3).cuda(), None)])
    for there, here in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)  # both on the CPU


# ---------------------------------------------------------------- compared within a tolerance


class Given:
    """One row, whatever is asked for."""

    def __init__(self, row_TD: Tensor) -> None:
        self.row_TD = row_TD

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        return self.row_TD[None].expand(len(sequence_ids), -1, -1)


def differs(stored_TD: Tensor, derived_TD: Tensor, dtype: str = "bfloat16", *, exact: bool = False) -> bool:
    sample: Sequence[tuple[int, int]] = [(3, 0)]
    found = differing_rows(Given(stored_TD), Given(derived_TD), list(sample), dtype, exact=exact)  # pyright: ignore
    assert found in ([], sample)
    return bool(found)


def massive() -> Tensor:
    """A row of ordinary channels and one with massive activations."""
    row_TD = torch.randn(64, 48, generator=torch.Generator().manual_seed(5))
    row_TD[:, 7] += 1e4
    row_TD[0, 8] += 1e4  # or in the first token alone
    return row_TD


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_in_another_order_is_no_difference(dtype: str) -> None:
    row_TD, noise_TD = massive(), torch.randn(64, 48, generator=torch.Generator().manual_seed(6))
    row_TD[:, 9] = 0.0  # idle: nothing but rounding
    other_TD = row_TD * (1 + 1e-6 * noise_TD)
    other_TD[:, 9] = 1e-7 * noise_TD[:, 9]
    stored_TD, derived_TD = (each.to(STREAM_DTYPES[dtype]) for each in (row_TD, other_TD))  # pyright: ignore
    assert not differs(stored_TD, derived_TD, dtype)
    assert differs(stored_TD, derived_TD, dtype, exact=True)


@pytest.mark.parametrize("wrong", ["channel", "token", "values", "nan"])
def test_a_massive_activation_hides_no_other_difference(wrong: str) -> None:
    derived_TD = massive()
    stored_TD = derived_TD.clone()
    if wrong == "channel":
        stored_TD[:, 3] = 0.0
    elif wrong == "token":
        stored_TD[5] = stored_TD[6]
    elif wrong == "values":
        stored_TD[:, 8] *= 1.1  # of the channel with the massive token
    else:
        stored_TD[5, 5] = torch.nan
    assert differs(stored_TD.bfloat16(), derived_TD.bfloat16())
