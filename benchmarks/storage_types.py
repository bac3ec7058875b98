"""Storage types of a stack: bytes per weight, rounding error, and the time of a product compared with float32.

Bytes are measured on the matrices of a real stack. The error is |stored - weight| / |weight| over all matrices, for
Gaussian weights as at initialisation, and for Student's t with 4 degrees of freedom, whose heavier tails resemble
trained matrices. Products dequantise and multiply in float32, as everywhere on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Measure, interleaved, ratios
from stackwise_core.config import StackWiseConfig
from stackwise_core.model.blocks import INIT_STD, Stack
from stackwise_core.model.precision import STORAGE, StoredLinear, base_linears, convert_storage, dense_weight
from stackwise_core.stages.resolve import resolve_shape

D_MODEL = 512
N_POSITIONS = 1024
DEGREES_OF_FREEDOM = 4.0
# NVFP4: 4 bits, and an 8-bit scale per 16 weights. NF4 with double quantisation (Dettmers et al. 2023): 4 bits, an
# 8-bit absmax for 64 weights, and an fp32 scale for 256 of those.
BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "nvfp4": 0.5 + 1 / 16,
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
}


def measure(quick: bool) -> list[Measure]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measures = [m for precision in STORAGE for m in _sizes_and_errors(precision)]
    return measures + _product_times(rounds=5 if quick else 30)


def _sizes_and_errors(precision: str) -> list[Measure]:
    storage = STORAGE[precision]
    gaussian, heavy = _stack(_gaussian), _stack(_student)
    errors = {name: _convert(stack, precision) for name, stack in {"Gaussian": gaussian, "Student's t": heavy}.items()}
    linears = base_linears(gaussian).values()
    n_bytes = sum(t.nbytes for linear in linears for t in (*linear.parameters(), *linear.buffers()))
    n_weights = sum(linear.in_features * linear.out_features for linear in linears)
    assert n_weights >= 1_000_000, f"{n_weights} weights are too few: what a matrix has once would count"
    return [
        Measure(storage, "bytes per weight, measured", "bytes", [n_bytes / n_weights]),
        Measure(storage, "bytes per weight, closed form", "bytes", [BYTES_PER_WEIGHT[storage]]),
        *(Measure(storage, f"relative error, {name}", "%", [100.0 * error]) for name, error in errors.items()),
    ]


def _convert(stack: Stack, precision: str) -> float:
    """Convert a stack in place; return the relative error of its weights."""
    before = [dense_weight(linear).clone() for linear in base_linears(stack).values()]
    convert_storage(stack, precision)
    after = [dense_weight(linear) for linear in base_linears(stack).values()]
    squared = sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True))
    return (squared / sum(b.square().sum().item() for b in before)) ** 0.5


def _stack(draw: Callable[[torch.Size, torch.Generator], Tensor]) -> Stack:
    config = StackWiseConfig()
    config.model.d_model = D_MODEL
    stack, generator = Stack(resolve_shape(config), 1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in base_linears(stack).values():
            linear.weight.copy_(INIT_STD * draw(linear.weight.shape, generator))
    return stack


def _gaussian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _student(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw from Student's t: a Gaussian divided by the root mean square of DEGREES_OF_FREEDOM others."""
    squares = torch.randn((int(DEGREES_OF_FREEDOM), *shape), generator=generator).square()
    return torch.randn(shape, generator=generator) / squares.mean(0).sqrt()


def _product_times(rounds: int) -> list[Measure]:
    """Time x @ weight.T without and with the gradient of x, as in frozen layers."""
    weight = INIT_STD * _gaussian(torch.Size((D_MODEL, D_MODEL)), torch.Generator().manual_seed(0))
    dense = nn.Linear(D_MODEL, D_MODEL, bias=False).requires_grad_(False)
    dense.weight.copy_(weight)
    layers = {name: dense if name == "float32" else StoredLinear(weight, name) for name in STORAGE.values()}
    measures: list[Measure] = []
    for what, product in {"forward": _forward, "forward and gradient of its input": _both}.items():
        x = torch.randn(N_POSITIONS, D_MODEL)
        candidates = {name: _caller(product, layer, x) for name, layer in layers.items()}
        seconds = interleaved(candidates, rounds, warmup=3)
        measures += [
            Measure(
                name, f"time of a {D_MODEL} x {D_MODEL} product, {what} / float32", "x", ratios(s, seconds["float32"])
            )
            for name, s in seconds.items()
            if name != "float32"
        ]
    return measures


def _caller(product: Callable[[nn.Module, Tensor], None], layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        for _ in range(10):
            product(layer, x)

    return call


def _forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _both(layer: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    layer(x).sum().backward()
