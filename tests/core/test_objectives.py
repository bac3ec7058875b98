"""Losses against a dense recomputation: logits everywhere, cross-entropy where the definition says.

Letters: B sequences, T positions, D channels, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import peak_bytes
from stackwise_core import ProgressiveRackBuilder
from stackwise_core.data.masks import MaskSpec, TimeInput
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import Head, initialise
from stackwise_core.objectives import chunked_loss, losses
from stackwise_core.objectives.losses import (
    Batch,
    input_time_step,
    loss_normaliser,
    loss_positions,
    summed_loss,
)
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.training import stage_model
from support.runs import stage_model as model_of_stage
from support.runs import tiny

B, T, D, V = 3, 7, 8, 23
SHAPE = ModelShape(vocab_size=V, d_model=D, n_heads=2, n_kv_heads=2, d_ff=16, causal=True)
MASKS = MaskSpec(seed=4, ratio=0.4, corruption="bert", mask_token=V - 1, n_regular_tokens=V - 1)


def new_head(dtype: torch.dtype = torch.float32) -> Head:
    head = Head(SHAPE)
    initialise(head, 3)
    with torch.no_grad():
        head.projection.weight.mul_(20)  # far from a uniform softmax
        head.norm.weight.copy_(torch.linspace(0.5, 1.5, D))
    return head.to(dtype)


def tokens_of(n: int = B) -> Any:
    return np.random.default_rng(0).integers(0, V - 1, (n, T))


def dense_loss(hidden_BTD: Tensor, head: Head, targets: Tensor, positions: Tensor) -> Tensor:
    """RMSNorm written out, logits at every position, cross-entropy with the rest ignored."""
    scale = (hidden_BTD.square().mean(-1, keepdim=True) + SHAPE.norm_eps).rsqrt()
    logits_BTV = (hidden_BTD * scale * head.norm.weight) @ head.projection.weight.T
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets.where(positions, -100).flatten(), reduction="sum")


def batch_of(objective: str) -> Batch:
    ids = np.arange(B, dtype=np.int64)
    return make_batch({"input_ids": tokens_of(), "sequence_ids": ids, "view": 0}, MASKS if objective == "mlm" else None)


# ---------------------------------------------------------------- fields


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99))
def test_clm_shifts_and_never_corrupts(n: int, seq_len: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, V, (n, seq_len))
    batch = make_batch({"input_ids": tokens}, None)
    for row in range(n):
        assert batch["input_ids"][row].tolist() == tokens[row].tolist()
        assert batch["targets"][row].tolist() == [*tokens[row, 1:], tokens[row, -1]]
        assert batch["clm_mask"][row].tolist() == [True] * (seq_len - 1) + [False]
    assert torch.equal(batch["combined_masks"], batch["masks"] & batch["clm_mask"])
    assert torch.equal(loss_positions(batch), batch["combined_masks"])
    assert batch["masks"].all()


def test_mlm_corrupts_inputs_and_keeps_clean_targets() -> None:
    tokens, ids = tokens_of(), np.array([5, 9, 2], dtype=np.int64)
    batch = make_batch({"input_ids": tokens, "sequence_ids": ids, "view": 3}, MASKS)
    masks = MASKS.masks(ids, 3, T)
    assert batch["masks"].numpy().tolist() == masks.tolist()
    assert batch["targets"].tolist() == tokens.tolist()
    assert batch["input_ids"].tolist() == MASKS.corrupt(tokens, masks, ids, 3).tolist()
    assert batch["input_ids"].tolist() != tokens.tolist()
    assert torch.equal(loss_positions(batch), batch["masks"])
    assert "clm_mask" not in batch


def test_a_mask_spec_decides_the_objective() -> None:
    assert set(batch_of("mlm")) == {"input_ids", "targets", "masks", "sequence_ids"}
    assert set(batch_of("clm")) == {"input_ids", "targets", "masks", "clm_mask", "combined_masks", "sequence_ids"}


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_loss_and_gradients_equal_the_dense_ones(objective: str, dtype: torch.dtype) -> None:
    """Float32 sums in another order: 1e-5 relative; float64 shows that the formula is the same."""
    batch = batch_of(objective)
    hidden = torch.randn(B, T, D, dtype=dtype, generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    for dense in (False, True):
        head, x = new_head(dtype), hidden.clone().requires_grad_()
        if dense:
            loss = dense_loss(x, head, batch["targets"], loss_positions(batch))
        else:
            loss, count = summed_loss(x, head, batch)
            assert count == int(loss_positions(batch).sum()) > 0
        loss.backward()
        assert x.grad is not None
        results.append([loss.detach(), x.grad, *(p.grad for p in head.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 4
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_only_loss_positions_carry_the_loss(objective: str) -> None:
    batch, head = batch_of(objective), new_head()
    hidden = torch.randn(B, T, D)
    positions = loss_positions(batch)
    loss, _ = summed_loss(hidden, head, batch)
    elsewhere = {**batch, "targets": batch["targets"].where(positions, (batch["targets"] + 1) % V)}
    assert summed_loss(hidden, head, elsewhere)[0].equal(loss)
    # The head does not even see other positions: NaN there changes nothing.
    poisoned = hidden.masked_fill(~positions[..., None], torch.nan).requires_grad_()
    poisoned_loss, _ = summed_loss(poisoned, head, batch)
    assert poisoned_loss.equal(loss)
    poisoned_loss.backward()
    assert poisoned.grad is not None
    assert (poisoned.grad.abs().sum(-1) > 0).equal(positions)
    # Each single target at a loss position does matter.
    for where in positions.nonzero().tolist():
        changed = batch["targets"].clone()
        changed[tuple(where)] = (changed[tuple(where)] + 1) % V
        assert not summed_loss(hidden, head, {**batch, "targets": changed})[0].equal(loss)


@pytest.mark.parametrize(("weighted", "trains"), [(False, "both"), (True, "both"), (True, "stream"), (False, "head")])
def test_in_chunks_the_loss_and_its_gradients_are_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, weighted: bool, trains: str
) -> None:
    """Two positions at a time, the last alone; in float64, so that only the formula counts."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 2 * V)
    monkeypatch.setattr(chunked_loss, "chunk_positions", lambda d_model, cuda: 2)
    batch, weights = batch_of("clm"), torch.rand(B, dtype=torch.float64) + 0.5
    positions = loss_positions(batch)
    positions[0, 0] = False
    assert positions.sum() % 2 == 1
    hidden = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    for dense in (False, True):
        head, x = new_head(torch.float64), hidden.clone().requires_grad_(trains != "head")
        head.requires_grad_(trains != "stream")
        if dense:
            rows = [dense_loss(x[[row]], head, batch["targets"][[row]], positions[[row]]) for row in range(B)]
            loss = (torch.stack(rows) * (weights if weighted else 1)).sum()
        else:
            extra = {"loss_weights": weights} if weighted else {}
            loss, _ = summed_loss(x, head, {**batch, "masks": positions, **extra})
        (loss * 0.3).backward()
        grads = [x.grad, *(parameter.grad for parameter in head.parameters())]
        results.append([loss.detach(), *(grad for grad in grads if grad is not None)])
    assert len(results[0]) == len(results[1]) == {"both": 4, "stream": 2, "head": 3}[trains]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class _Largest(TorchDispatchMode):
    """Notes the most numbers that any result has, and how many operations there were."""

    most = n_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.n_operations += 1
        if isinstance(result, Tensor):
            self.most = max(self.most, result.numel())
        return result


def test_the_logits_of_a_large_vocabulary_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, head, hidden = batch_of("clm"), new_head(), torch.randn(B, T, D, requires_grad=True)
    n = int(loss_positions(batch).sum())
    largest: list[int] = []
    for limit in (n * V, n * V - 1):
        monkeypatch.setattr(losses, "MOST_LOGITS", limit)
        monkeypatch.setattr(chunked_loss, "chunk_positions", lambda d_model, cuda: 3)
        with _Largest() as mode:
            summed_loss(hidden, head, batch)[0].backward()
        largest.append(mode.most)
    assert largest == [n * V, max(V * D, n * D, 3 * V)]


def test_judging_in_chunks_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MOST_LOGITS", V)
    monkeypatch.setattr(chunked_loss, "chunk_positions", lambda d_model, cuda: 3)
    batch, found = batch_of("clm"), list[tuple[int, float]]()
    for trains in (True, False):
        head, hidden = new_head().requires_grad_(trains), torch.ones(B, T, D)
        with torch.no_grad(), _Largest() as mode:
            loss, _ = summed_loss(hidden, head, batch)
        found.append((mode.n_operations, loss.item()))
    assert found[0] == found[1]


def loss_and_gradients(compute: torch.dtype, device: str = "cpu", n: int = 64) -> list[Tensor]:
    """Of 4,096 tokens, whose matrix is large beside the logits of 64 positions, which are a chunk on a CPU."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, 384, generator=generator).to(device).requires_grad_()
    weight = (0.2 * torch.randn(4096, 384, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(4096, (n,), generator=generator).to(device)
    loss = chunked_loss.chunked_cross_entropy(hidden, weight, targets, None, compute)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [each.detach().cpu() for each in (loss, hidden.grad, weight.grad)]


def test_in_chunks_little_memory_is_needed_beside_the_matrix_and_the_gradients() -> None:
    given = 4 * (512 + 4096) * 384
    with peak_bytes(torch.device("cpu")) as peak:
        loss_and_gradients(torch.float32, n=512)
    assert 2 * given < peak[0] <= 1.1 * 2 * given


def test_products_in_bfloat16_leave_the_softmax_and_the_sums_exact() -> None:
    """Factors are rounded to 2^-9 of their size, so that a sum of many is off by about as much."""
    exact, low = loss_and_gradients(torch.float32), loss_and_gradients(torch.bfloat16)
    for one, other in zip(exact, low, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert 0 < (one - other).norm() <= 4e-3 * one.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_products_in_bfloat16_are_those_of_a_cpu_and_equal_twice() -> None:
    expected = loss_and_gradients(torch.bfloat16)
    once, again = (loss_and_gradients(torch.bfloat16, "cuda") for _ in range(2))
    for here, there, repeated in zip(once, expected, again, strict=True):
        assert here.equal(repeated)
        assert (here - there).norm() <= 1e-3 * there.norm()


def test_nothing_waits_for_the_device_of_the_head() -> None:
    """On `meta` there are no values: whatever asks for one, as a boolean mask does for their number, fails."""
    batch, head = batch_of("mlm"), new_head().to("meta")
    hidden = torch.zeros(B, T, D, device="meta", requires_grad=True)
    loss, _ = summed_loss(hidden, head, {**batch, "loss_weights": torch.ones(B)})
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize(
    ("of_stack", "of_head"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_the_head_computes_in_bfloat16_with_the_newest_stack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of_stack: torch.dtype, of_head: torch.dtype
) -> None:
    builder, seen = ProgressiveRackBuilder(tiny(tmp_path)), list[torch.dtype]()
    builder.append_stack()
    monkeypatch.setattr(stage_model, "compute_dtype", lambda precision, device: of_stack)
    monkeypatch.setattr(stage_model, "summed_loss", lambda *arguments: seen.append(arguments[4]))
    model = model_of_stage(builder.build_rack(), 0)
    model.summed_loss({**batch_of("clm"), "stack_idx": 0})
    assert seen == [of_head]


def test_no_loss_position_gives_zero_loss_and_zero_gradients() -> None:
    batch, head = batch_of("mlm"), new_head()
    batch["masks"] = torch.zeros_like(batch["masks"])
    hidden = torch.randn(B, T, D, requires_grad=True)
    loss, count = summed_loss(hidden, head, batch)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0
    for parameter in head.parameters():
        assert parameter.grad is None or parameter.grad.count_nonzero() == 0


def test_combined_masks_narrow_the_loss() -> None:
    batch, head = batch_of("clm"), new_head()
    hidden = torch.randn(B, T, D)
    keep = torch.zeros(B, T, dtype=torch.bool)
    keep[1, 2] = True
    loss, count = summed_loss(hidden, head, {**batch, "combined_masks": keep & batch["clm_mask"]})
    assert count == 1
    torch.testing.assert_close(loss, dense_loss(hidden, head, batch["targets"], keep), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- time as an input, and its bound


def timed(elbo: bool = False, n_steps: int = 8) -> MaskSpec:
    time = TimeInput(n_steps=n_steps, sampling="per_sequence", ratio_min=0.3, ratio_max=0.9, elbo=elbo)
    return MASKS.model_copy(update={"time": time, "corruption": "mask"})


def bound_batch() -> Batch:
    return make_batch({"input_ids": tokens_of(), "sequence_ids": np.arange(B), "view": 1}, timed(elbo=True))


def test_steps_travel_with_the_batch() -> None:
    tokens, ids = tokens_of(), np.arange(B, dtype=np.int64)
    batch = make_batch({"input_ids": tokens, "sequence_ids": ids, "view": 0}, timed())
    time = timed().time
    assert time is not None
    steps = time.steps(4, ids, 0)
    assert batch["time_step"].tolist() == steps.tolist()
    assert "loss_weights" not in batch
    assert batch["masks"].tolist() == timed().masks(ids, 0, T, steps).tolist()
    assert input_time_step(batch) is batch["time_step"]
    assert input_time_step({"time_step": 3}) is None
    assert input_time_step(batch_of("mlm")) is None


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_bound_equals_its_definition(own_loss: bool) -> None:
    """Sum over masked positions of CE / r, with gradients; float64, so only the formula counts."""
    batch = bound_batch()
    ratios = [0.999 * (step + 0.5) / 8 + 0.001 for step in batch["time_step"].tolist()]
    assert len(set(ratios)) > 1
    assert batch["loss_weights"].tolist() == pytest.approx([1 / r for r in ratios], rel=1e-6)
    hidden = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results: list[list[Tensor]] = []
    for dense in (False, True):
        head, x = new_head(torch.float64), hidden.clone().requires_grad_()
        if dense:
            loss = torch.zeros((), dtype=torch.float64)
            for row in range(B):
                only_row = batch["masks"] & (torch.arange(B) == row)[:, None]
                loss = loss + dense_loss(x, head, batch["targets"], only_row) * batch["loss_weights"][row].double()
        else:
            loss_fn = (lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")) if own_loss else None
            loss, normaliser = summed_loss(x, head, batch, loss_fn)
            assert normaliser == loss_normaliser(batch) == B * T
        loss.backward()
        assert x.grad is not None
        results.append([loss.detach(), x.grad, *(p.grad for p in head.parameters() if p.grad is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_bound_of_a_uniform_model_is_log_v() -> None:
    """E[1 / r over masked positions] = 1: 4,000 sequences leave it within 5 standard errors of log V."""
    n, n_steps = 4000, 100
    ids = np.arange(n, dtype=np.int64)
    batch = make_batch(
        {"input_ids": np.zeros((n, 64), dtype=np.int64), "sequence_ids": ids, "view": 0},
        timed(elbo=True, n_steps=n_steps),
    )
    head = new_head()
    torch.nn.init.zeros_(head.projection.weight)
    with torch.no_grad():
        total, normaliser = summed_loss(torch.ones(n, 64, D), head, batch)
    ratios = (0.999 * (np.arange(n_steps) + 0.5) / n_steps + 0.001).tolist()
    variance = sum((1 - r) / r for r in ratios) / n_steps / normaliser
    bound = total.item() / normaliser
    assert abs(bound / np.log(V) - 1) < 5 * variance**0.5 < 0.05


def test_the_bound_without_a_masked_position_is_zero() -> None:
    batch = bound_batch()
    batch["masks"] = torch.zeros_like(batch["masks"])
    hidden = torch.randn(B, T, D, requires_grad=True)
    loss, normaliser = summed_loss(hidden, new_head(), batch)
    loss.backward()
    assert (loss.item(), normaliser) == (0.0, B * T)
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_other_losses_are_divided_by_their_positions(objective: str) -> None:
    batch = batch_of(objective)
    assert loss_normaliser(batch) == int(loss_positions(batch).sum()) > 0


# ---------------------------------------------------------------- custom targets and losses


def custom(tokens: Any, targets: Any, masks: Any = None) -> Batch:
    return make_batch({"input_ids": tokens, "targets": targets, "masks": masks}, None, "custom")


def test_custom_fields_are_as_given() -> None:
    tokens, targets = tokens_of(), tokens_of()[:, ::-1].copy()
    masks = tokens % 2 == 0
    batch = custom(tokens, targets, masks)
    assert batch["input_ids"].tolist() == tokens.tolist()
    assert batch["targets"].tolist() == targets.tolist()
    assert loss_positions(batch).tolist() == masks.tolist()
    assert custom(tokens, targets)["masks"].all()


def test_custom_fields_of_wrong_shapes_and_ignored_targets() -> None:
    tokens = tokens_of()
    with pytest.raises(ConfigError, match=r"targets: got \(3, 6\); the shape of input_ids, \(3, 7\)"):
        custom(tokens, tokens[:, 1:])
    with pytest.raises(ConfigError, match=r"masks: got \(2, 7\)"):
        custom(tokens, tokens, np.ones((2, T), dtype=bool))
    ignored = tokens.copy()
    ignored[1, 2] = -100
    with pytest.raises(ConfigError, match="targets: got -100; masks says that there is a loss where"):
        custom(tokens, ignored, np.ones((B, T), dtype=bool))
    for masks in (None, ignored >= 0):
        loss, count = summed_loss(torch.randn(B, T, D), new_head(), custom(tokens, ignored, masks))
        assert count == B * T - 1
        assert loss.isfinite()


def test_a_custom_loss_sees_logits_and_targets_of_the_loss_positions() -> None:
    batch, head, hidden = batch_of("clm"), new_head(), torch.randn(B, T, D, requires_grad=True)
    seen: list[tuple[Tensor, Tensor]] = []

    def margin(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append((logits, targets))
        return logits.logsumexp(-1) * 2 - logits.gather(-1, targets[:, None])[:, 0]

    loss, count = summed_loss(hidden, head, batch, margin)
    ((logits, targets),) = seen
    positions = batch["combined_masks"]
    torch.testing.assert_close(logits, head(hidden)[positions])
    assert targets.equal(batch["targets"][positions])
    assert count == len(targets)
    torch.testing.assert_close(loss, margin(head(hidden)[positions], targets).sum())


@pytest.mark.parametrize(
    ("loss_fn", "received"),
    [
        (F.cross_entropy, r"shape \(\)"),
        (lambda logits, targets: logits, r"shape \(18, 23\)"),
        (lambda logits, targets: 1.0, "float"),
    ],
)
def test_a_custom_loss_of_a_wrong_shape_is_explained(loss_fn: Any, received: str) -> None:
    with pytest.raises(ConfigError, match=f"training.custom_loss: got {received}; .* each of the 18 positions"):
        summed_loss(torch.randn(B, T, D), new_head(), batch_of("clm"), loss_fn)
