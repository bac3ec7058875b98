"""The card itself: what it can do at most, and what low storage types cost on it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import torch

from benchmarks.gpu.record import Run
from benchmarks.gpu.stages import SHAPE_8B, later
from benchmarks.harness import Measure, ratios
from stackwise_core.model.blocks import INIT_STD
from stackwise_core.model.precision import dequantise, quantise

BF16 = ("product", "bfloat16")
"""The case and name of the measure that D is a share of."""
_ERRORS = {"nf4": 0.095, "nvfp4": 0.1}


def ceilings(run: Run) -> Iterator[Measure]:
    """Copies on the device, products in three types, and copies to the device."""
    n_bytes = run.size(2**32, 2**12)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    seconds = run.seconds(lambda: target.copy_(source))
    yield Measure("copy", "on the device", "GB/s", [2 * n_bytes / s / 1e9 for s in seconds], at_least=4000)
    del source, target

    n = run.size(8192, 16)
    goals: dict[str, tuple[float | None, float | None]] = {
        "bfloat16": (750, None), "TF32": (350, None), "float32": (None, 67)
    }  # fmt: skip
    for name, (at_least, at_most) in goals.items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        a, b = torch.randn(2, n, n, device=run.device, dtype=dtype)
        with _tf32(enabled=name == "TF32"):
            seconds = run.seconds(lambda a=a, b=b: a @ b, calls=run.size(5, 1))
        values = [2 * n**3 / s / 1e12 for s in seconds]
        yield Measure("product", name, "TFLOP/s", values, at_least=at_least, at_most=at_most)

    n_bytes = run.size(2**30, 2**12)
    target = torch.empty(n_bytes, dtype=torch.uint8, device=run.device)
    for name, at_least in (("pinned", 45.0), ("pageable", 5.0)):
        pin = name == "pinned" and run.device.type == "cuda"
        source = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=pin)
        seconds = run.seconds(lambda source=source: target.copy_(source, non_blocking=True))
        yield Measure("copy", f"to the device, {name}", "GB/s", [n_bytes / s / 1e9 for s in seconds], at_least=at_least)


@contextlib.contextmanager
def _tf32(*, enabled: bool) -> Generator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def low_storage(run: Run) -> Iterator[Measure]:
    """The error and the decoding of a large matrix, and a step of QLoRA beside one in bf16."""
    rows, columns = run.size((8192, 28672), (32, 64))
    weight = torch.randn(rows, columns, device=run.device) * INIT_STD
    for storage, at_most in _ERRORS.items():
        stored = quantise(weight, storage)
        error = float((dequantise(stored, storage, (rows, columns)) - weight).norm() / weight.norm())
        yield Measure(f"{rows} x {columns}", f"{storage}: relative error", "", [error], at_most=at_most)
        n_bytes = 2 * weight.numel() + sum(tensor.nbytes for tensor in stored.values())
        seconds = run.seconds(lambda s=storage, t=stored: dequantise(t, s, (rows, columns), torch.bfloat16))
        rates = [n_bytes / s / 1e9 for s in seconds]
        yield Measure(f"{rows} x {columns}", f"{storage}: decoding to bfloat16, read and written", "GB/s", rates)
    del weight, stored

    seconds_of: dict[str, list[float]] = {}
    for precision in ("bfloat16", "qlora"):
        stage = later(run, SHAPE_8B, {"training.progressive.new_stack_precision": precision})
        seconds_of[precision] = run.seconds(stage.step)
        yield Measure("8B shape", f"step, {precision}", "ms", [s * 1e3 for s in seconds_of[precision]])
        del stage
    yield Measure("8B shape", "QLoRA / bf16", "x", ratios(seconds_of["qlora"], seconds_of["bfloat16"]))
