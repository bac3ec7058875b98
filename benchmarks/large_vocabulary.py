"""Head and loss of vocabularies of 50,257 and 128,256 tokens at 2,048 positions: in chunks, and whole.

Forward and backward. The chunks are ours; beside them torch's cross-entropy of the whole logits, and with torch's own
chunks. A peak is that of the tensors that a step makes, the gradients among them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Measure, interleaved, ratios
from benchmarks.peak import peak_bytes
from stackwise_core.objectives.chunked_loss import chunked_cross_entropy

N_POSITIONS, D_MODEL = 2048, 576
VOCABULARIES = {50_257: 1.05, 128_256: 1.1}
"""And the most that the time of ours may be, divided by that of another."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _whole(hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_PD, weight_VD), targets_P, reduction="sum")


def _torch_chunks(hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_PD, weight_VD, targets_P, reduction="sum", options=options)


def _ours(hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden_PD, weight_VD, targets_P, None)


LOSSES: dict[str, Loss] = {"ours, in chunks": _ours, "torch, whole": _whole}
if hasattr(nn, "LinearCrossEntropyOptions"):  # from torch 2.13 on
    LOSSES["torch, in chunks"] = _torch_chunks


def measure(quick: bool) -> list[Measure]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vocabularies = [50_257] if quick else list(VOCABULARIES)
    return [each for vocabulary in vocabularies for each in _measure(vocabulary, quick)]


def _measure(vocabulary: int, quick: bool) -> list[Measure]:
    case = f"{N_POSITIONS:,} positions, vocabulary {vocabulary:,}, width {D_MODEL}"
    names = list(LOSSES)[:2] if quick else list(LOSSES)
    steps = {name: _step(LOSSES[name], vocabulary) for name in names}
    seconds = interleaved(steps, rounds=1 if quick else 3)
    peaks = {name: [_peak_of(step) / 1e9] for name, step in steps.items()}
    ours, whole, *_ = names
    times = [
        Measure(
            case, f"time, ours / {name}", "", ratios(seconds[ours], seconds[name]), at_most=VOCABULARIES[vocabulary]
        )
        for name in names[1:]
    ]
    less = Measure(case, "peak memory, ours / torch, whole", "", ratios(peaks[ours], peaks[whole]), at_most=0.4)
    given = 4 * (N_POSITIONS + vocabulary) * D_MODEL / 1e9
    needed = [(given + peak) / (2 * given) for peak in peaks[ours]]
    bytes_ = Measure(case, "bytes, ours / (inputs + weights + gradients)", "", needed, at_most=1.1)
    return [*times, less, bytes_, *(Measure(case, f"peak memory, {name}", "GB", peaks[name]) for name in names)]


def _step(loss: Loss, vocabulary: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    hidden_PD = torch.randn(N_POSITIONS, D_MODEL, generator=generator).requires_grad_()
    weight_VD = (0.02 * torch.randn(vocabulary, D_MODEL, generator=generator)).requires_grad_()
    targets_P = torch.randint(vocabulary, (N_POSITIONS,), generator=generator)

    def step() -> None:
        (loss(hidden_PD, weight_VD, targets_P) / N_POSITIONS).backward()
        hidden_PD.grad = weight_VD.grad = None

    return step


def _peak_of(step: Callable[[], None]) -> float:
    """Return the peak of the tensors that one step makes [bytes]."""
    with peak_bytes(torch.device("cpu")) as peak:
        step()
    return float(peak[0])
