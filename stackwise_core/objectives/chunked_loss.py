"""Cross-entropy of a large vocabulary in chunks of positions, so that the logits never exist at once.

At 4,096 positions and 128,256 tokens the logits are 2.1 GB, of which a dense backward pass holds three copies.
Letters: V vocabulary, P loss positions, D channels, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stackwise_core.stages.memory import chunk_positions


def chunked_cross_entropy(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    targets_P: Tensor,
    scale_P: Tensor | None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Return the cross-entropy [nats] of `hidden @ weight.T`, times a scale for each position, summed: a scalar.

    Its gradients are computed in the same pass over the chunks, each into its own rows or by one product, so that
    equal inputs give equal bits on every device. They become the gradients of its inputs without a copy: there is one
    backward pass, and none of the gradients. With `compute` bfloat16 or float16 the factors of the products are
    rounded to it; logits, softmax and all sums stay float32.
    """
    with_grad = torch.is_grad_enabled()  # which autograd hides from a function's forward pass
    return _Chunked.apply(hidden_PD, weight_VD, targets_P, scale_P, compute, with_grad)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        targets_P: Tensor,
        scale_P: Tensor | None,
        compute: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        of_hidden, of_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        losses_P = hidden_PD.new_empty(len(targets_P))
        grad_PD = torch.empty_like(hidden_PD) if of_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if of_weight else None
        if compute is not torch.float32:
            hidden_PD, weight_VD = hidden_PD.to(compute), weight_VD.to(compute)
        size = min(chunk_positions(weight_VD.shape[1], cuda=weight_VD.device.type == "cuda"), len(targets_P))
        chunk_CV = losses_P.new_empty(size, len(weight_VD))  # one for all, or two would exist at once
        for first in range(0, len(targets_P), size):
            rows = slice(first, min(first + size, len(targets_P)))
            targets_C1 = targets_P[rows, None]
            logits_CV = _product(hidden_PD[rows], weight_VD.T, out=chunk_CV[: len(targets_C1)])
            of_target_C1 = logits_CV.gather(1, targets_C1)
            most_C1 = logits_CV.amax(1, keepdim=True)
            exp_CV = logits_CV.sub_(most_C1).exp_()
            sum_C1 = exp_CV.sum(1, keepdim=True)
            losses_P[rows] = (sum_C1.log() + most_C1 - of_target_C1).squeeze(1)
            if not (of_hidden or of_weight):
                continue
            # The gradient of a position is its probabilities less one at its target, in the place of the logits.
            scale_C1 = torch.ones_like(sum_C1) if scale_P is None else scale_P[rows, None].to(sum_C1.dtype)
            grad_CV = exp_CV.mul_(scale_C1 / sum_C1).scatter_add_(1, targets_C1, -scale_C1)
            if compute is not torch.float32:
                grad_CV = grad_CV.to(compute)
            if grad_PD is not None:
                _product(grad_CV, weight_VD, out=grad_PD[rows])
            if grad_VD is not None:
                _add_product(grad_VD, grad_CV.T, hidden_PD[rows])
            del grad_CV
        ctx.save_for_backward(grad_PD, grad_VD)
        return (losses_P if scale_P is None else losses_P * scale_P).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*(None if of is None else of.mul_(grad) for of in ctx.saved_tensors), None, None, None, None)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write `a @ b` into `out`, which is float32 where the factors are of a lower type, and return it."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # torch has no such product on a CPU; only tests come here


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to a total in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
