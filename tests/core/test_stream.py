"""Types of the stream: the arithmetic against NumPy, what outliers cost, and what is refused.

Letters: B sequences, T positions, D channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flows.run.prepare import forecast_store
from stackwise_core.config.schema import QUANTISED_STREAMS, StreamDtype
from stackwise_core.data.masks import IntArray
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.stream import STREAM_DTYPES, ChannelStatistics, Stream, dequantise, quantise
from stackwise_core.objectives.batches import first_rows
from stackwise_core.stages.plan import plan_config, plan_run
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.training.evaluate import output_statistics, stored_error
from stackwise_core.training.trainer import ProgressiveTrainer
from storage.artifacts import Artifacts
from support.runs import folder_of, grown, manifests, tiny

T, D = 64, 256
LARGEST = {"int8": 127.0, "fp8": 448.0}
quantised_types = pytest.mark.parametrize("dtype", QUANTISED_STREAMS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(hidden_BTD: Tensor) -> ChannelStatistics:
    """By torch, of the values themselves."""
    flat = hidden_BTD.flatten(0, 1)
    return ChannelStatistics(flat.mean(0), flat.std(0, correction=0))


def identity(d_model: int) -> ChannelStatistics:
    """With these nothing is standardised."""
    return ChannelStatistics(torch.zeros(d_model), torch.ones(d_model))


# ---------------------------------------------------------------- the arithmetic


def by_numpy(hidden: np.ndarray, dtype: StreamDtype, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, ...]:
    """Values, scales and what they stand for, one float32 operation after another."""
    standard = (hidden - mean) / std
    scale = np.abs(standard).max(-1, keepdims=True) / np.float32(LARGEST[dtype])
    scaled = standard / scale
    values = np.rint(scaled).astype(np.int8) if dtype == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
    return values, scale, values.astype(np.float32) * scale * std + mean


@quantised_types
def test_values_and_scales_are_those_of_numpy(dtype: StreamDtype) -> None:
    hidden, channels = draw(3, T, D) * 4, ChannelStatistics(draw(D, seed=1), draw(D, seed=2).abs() + 0.1)
    values, scale, given = by_numpy(hidden.numpy(), dtype, channels.mean.numpy(), channels.std.numpy())
    stored = quantise(hidden, dtype, channels)
    assert (stored.values.dtype, stored.scale.dtype) == (STREAM_DTYPES[dtype], torch.float32)
    assert stored.values.view(torch.uint8).numpy().tobytes() == values.tobytes()
    assert stored.scale.numpy().tobytes() == scale.tobytes()
    assert dequantise(stored, channels).numpy().tobytes() == given.tobytes()
    assert Stream(dtype, {5: channels}).cast(hidden, 5).numpy().tobytes() == given.tobytes()
    assert int(stored.values.float().abs().max()) == LARGEST[dtype]


@settings(max_examples=20)
@given(st.data())
def test_a_row_has_the_same_bits_alone_and_in_any_batch(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(QUANTISED_STREAMS))
    t, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    hidden, stream = draw(5, t, d), Stream(dtype, {0: ChannelStatistics(draw(d, seed=1), draw(d, seed=2).abs() + 0.1)})
    together = stream.cast(hidden, 0)
    chosen = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    assert stream.cast(hidden[chosen], 0).equal(together[chosen])
    assert stream.cast(hidden[chosen[0]][None].clone(), 0)[0].equal(together[chosen[0]])


@quantised_types
def test_a_dead_token_is_its_channels_means_and_a_broken_one_stays_broken(dtype: StreamDtype) -> None:
    channels = ChannelStatistics(draw(D, seed=1), torch.full((D,), 0.5))
    hidden = torch.stack([channels.mean, draw(D), draw(D)])[None]
    hidden[0, 1, 3], hidden[0, 2, 3] = math.nan, math.inf
    given = Stream(dtype, {0: channels}).cast(hidden, 0)[0]
    assert given[0].equal(channels.mean)
    assert not given[1:].isfinite().any()
    assert quantise(hidden, dtype, channels).values.float().eq(0.0).all()  # no library's idea of NaN as a byte
    nearly_nothing = torch.full((1, 1, D), 2e-42)  # a 127th of it has few bits left, and would divide to 130
    assert quantise(nearly_nothing, dtype, identity(D)).values.float().eq(0.0).all()


def test_dense_types_are_rounded_as_torch_rounds() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        assert Stream(dtype).cast(draw(2, 3, 4), 0).equal(draw(2, 3, 4).to(getattr(torch, dtype)))


# ---------------------------------------------------------------- statistics


def tiny_stack(index: int) -> Stack:
    from stackwise_core.config import StackWiseConfig

    config = StackWiseConfig()
    config.model.d_model, config.model.n_heads = 32, 2
    stack = Stack(resolve_shape(config), 1, index)
    initialise(stack, index)
    return stack


@torch.no_grad()
def test_statistics_are_mean_and_deviation_of_each_stacks_output_in_any_split() -> None:
    stacks, entering = [tiny_stack(3), tiny_stack(1)], 3 * draw(7, 5, 32)
    first = torch.cat([stacks[0](row[None]) for row in entering])
    outputs = {3: first, 1: torch.cat([stacks[1](row[None]) for row in first])}
    whole = output_statistics(stacks, [(entering, None)])
    parts = output_statistics(stacks, [(part, None) for part in entering.split(3)])
    assert set(whole) == {1, 3}
    for index, expected in outputs.items():
        mean, std = whole[index]
        flat = expected.flatten(0, 1).double()
        torch.testing.assert_close(mean.double(), flat.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(std.double(), flat.std(0, correction=0), rtol=1e-6, atol=1e-6)
        assert parts[index].mean.equal(mean)
        assert parts[index].std.equal(std)


class _Given(torch.nn.Module):
    """In the place of a stack: its output is what comes in."""

    creation_index, precision = 0, "full"

    def __init__(self) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(()))  # a stack computes where its weights lie

    def forward(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        return x_BTD


@quantised_types
def test_a_dead_channel_divides_nothing_by_zero_and_silences_none_when_it_comes_alive(dtype: StreamDtype) -> None:
    entering = draw(8, T, D)
    entering[..., 7] = 3.0
    (channels,) = output_statistics([_Given()], [(entering, None)]).values()  # pyright: ignore[reportArgumentType]
    assert channels.mean[7] == 3.0
    assert channels.std[7].item() == pytest.approx(1e-3 * channels.std.mean().item(), rel=2e-2)
    assert Stream(dtype, {0: channels}).cast(entering, 0)[..., 7].eq(3.0).all()
    later = entering.clone()
    later[..., 7] += 1e-3  # of a channel that did not vary
    others = torch.arange(D) != 7
    error = (Stream(dtype, {0: channels}).cast(later, 0) - later)[..., others]
    assert error.square().mean().sqrt() < 0.03
    (dead,) = output_statistics([_Given()], [(torch.ones(2, 3, D), None)]).values()  # pyright: ignore[reportArgumentType]
    assert Stream(dtype, {0: dead}).cast(torch.ones(2, 3, D), 0).eq(1.0).all()


def test_the_first_rows_end_within_a_batch() -> None:
    batches = [
        {"input_ids": torch.arange(4)[:, None] + 4 * n, "view": 0, "sequence_ids": torch.arange(4)} for n in range(9)
    ]
    taken = list(first_rows(iter(batches), 10))
    assert torch.cat([batch["input_ids"] for batch in taken])[:, 0].tolist() == list(range(10))
    assert [len(batch["sequence_ids"]) for batch in taken] == [4, 4, 2]
    assert len(list(first_rows(batches[:2], 100))) == 2
    assert len(list(first_rows(batches, 8))) == 2


# ---------------------------------------------------------------- what it costs


class Rows:
    """Row n is the n-th of a tensor."""

    def __init__(self, values_BTD: Tensor) -> None:
        self.values = values_BTD

    def rows(self, sequence_ids: IntArray, view: int) -> Tensor:
        return self.values[torch.from_numpy(sequence_ids)]


def error_of(hidden: Tensor, stream: Stream) -> Any:
    return stored_error(Rows(stream.cast(hidden, 0)), Rows(hidden), [(n, 0) for n in range(len(hidden))])


def with_outliers() -> Tensor:
    """Gaussian channels, four of them a hundred times as large, two of these far from zero."""
    hidden = draw(16, T, D)
    hidden[..., 10:14] *= 100.0
    hidden[..., 12:14] += 500.0
    return hidden


def test_the_error_is_that_of_numpy() -> None:
    hidden, stream = with_outliers(), Stream("int8", {0: identity(D)})
    was, now = (values.double().numpy().reshape(-1, D) for values in (hidden, stream.cast(hidden, 0)))
    by_channel = np.sqrt(((now - was) ** 2).mean(0)) / was.std(0)
    error = error_of(hidden, stream)
    assert error["rows"] == 16
    assert error["overall"] == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=6e-3)
    for name, share in {"channel_median": 0.5, "channel_p99": 0.99, "channel_max": 1.0}.items():
        assert error[name] == pytest.approx(np.quantile(by_channel, share), rel=6e-3)
    worst = np.argsort(-by_channel)[:5]
    assert error["worst_channels"] == {str(c): pytest.approx(by_channel[c], rel=6e-3) for c in worst}


def test_outliers_hide_what_they_cost_the_others() -> None:
    """Without standardising the overall error of int8 looks small, and most channels are lost entirely."""
    hidden = with_outliers()
    without = error_of(hidden, Stream("int8", {0: identity(D)}))
    with_them = error_of(hidden, Stream("int8", {0: statistics_of(hidden)}))
    assert without["overall"] < 0.03
    assert without["channel_median"] > 0.9
    assert with_them["channel_max"] < 0.01
    assert with_them["overall"] < 0.3 * without["overall"]
    clean = error_of(draw(16, T, D), Stream("int8", {0: identity(D)}))
    assert with_them["channel_median"] == pytest.approx(clean["channel_median"], rel=0.05)


def test_a_channel_that_does_not_vary_has_no_error() -> None:
    hidden = draw(4, T, 8)
    hidden[..., 2] = 7.0
    error = error_of(hidden, Stream("bfloat16"))
    assert error["worst_channels"].keys() == {"0", "1", "3", "4", "5", "6", "7"} & error["worst_channels"].keys()
    assert 1e-3 < error["channel_max"] < 2e-3  # a step of bfloat16 is 2^-8 of a value at most
    assert error_of(torch.zeros(2, 3, 4), Stream("float32"))["overall"] == 0.0


# ---------------------------------------------------------------- together with the rest


def test_a_stack_without_statistics_cannot_be_quantised(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    tokens = [torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, tokens, 1)
    config.cache.dtype = "int8"
    with pytest.raises(ConfigError, match=r"cache\.dtype.*'int8'.*stack 0 was trained with a cache\.dtype that"):
        ProgressiveTrainer(config).train_progressively(builder, tokens, 2)


def test_only_quantised_streams_change_ids_and_share_what_does_not_depend_on_the_type(tmp_path: Path) -> None:
    of: dict[str, list[str]] = {}
    for dtype in STREAM_DTYPES:
        plan = plan_run(tiny(tmp_path, {"cache.dtype": dtype}), "0" * 64)
        of[dtype] = [stage.ref("stack").sha256 for stage in plan.stages]
    assert of["bfloat16"][0] == of["float32"][0]
    assert of["int8"][0] == of["fp8"][0] != of["float32"][0]
    assert len({of[dtype][1] for dtype in of}) == 5


@pytest.mark.parametrize("dtype", STREAM_DTYPES)
def test_the_bytes_of_a_store_were_forecast_and_its_error_is_told(
    tmp_path: Path, dtype: StreamDtype, quick_disk: None
) -> None:
    changes = {"cache.dtype": dtype, "cache.keep": "all", "training.progressive.target_stacks": 2}
    config, root = tiny(tmp_path, changes), tmp_path / "a"
    grown(config, root)
    folder = folder_of(root, "activations", 0)
    facts = manifests(root)[folder.name]["facts"]
    store: Any = zarr.open_group(folder / "store.zarr", mode="r")
    arrays = [array for group in (store, store["validation"]) for name, array in group.arrays()]
    written = sum(array.nbytes for array in arrays if array.basename not in ("sequence_id", "view"))
    plan = plan_config(config)
    assert forecast_store(config, Artifacts(str(root)), plan.stages[0]) == facts["store_bytes"] == written
    low, high = {"bfloat16": (1e-3, 1e-2), "float16": (1e-4, 1e-3), "float32": (0.0, 0.0)}.get(dtype, (1e-3, 0.05))
    assert low <= facts["error"]["channel_median"] <= facts["error"]["channel_max"] <= high
    assert facts["error"]["rows"] == facts["train_rows"] + facts["validation_rows"]
