"""Cross-entropy of a large vocabulary in chunks of positions, so that the logits never exist at once.

At 4,096 positions and 128,256 tokens the logits are 2.1 GB, of which a dense backward pass holds three copies.
Letters: V vocabulary, P loss positions, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_LOGITS = 2**26
"""Logits that exist at once, 256 MiB of them in float32; with no more, the loss is computed whole."""


def chunked_cross_entropy(hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, scale_P: Tensor | None) -> Tensor:
    """Return the cross-entropy [nats] of `hidden @ weight.T`, times a scale for each position, summed: a scalar.

    Its gradients are computed in the same pass over the chunks, each into its own rows or by one product, so that
    equal inputs give equal bits on every device.
    """
    with_grad = torch.is_grad_enabled()  # which autograd hides from a function's forward pass
    return _Chunked.apply(hidden_PD, weight_VD, targets_P, scale_P, with_grad)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, scale_P: Tensor | None, with_grad: bool
    ) -> Tensor:
        of_hidden, of_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        losses_P = hidden_PD.new_empty(len(targets_P))
        grad_PD = torch.empty_like(hidden_PD) if of_hidden else None
        grad_VD = torch.zeros_like(weight_VD) if of_weight else None
        size = max(1, MOST_LOGITS // len(weight_VD))
        for first in range(0, len(targets_P), size):
            rows = slice(first, first + size)
            logits_CV, targets_C1 = hidden_PD[rows] @ weight_VD.T, targets_P[rows, None]
            norm_C1 = logits_CV.logsumexp(1, keepdim=True)
            losses_P[rows] = (norm_C1 - logits_CV.gather(1, targets_C1)).squeeze(1)
            if not (of_hidden or of_weight):
                continue
            # The gradient of a position is its probabilities less one at its target, in the place of the logits.
            grad_CV = logits_CV.sub_(norm_C1).exp_()
            grad_CV.scatter_add_(1, targets_C1, torch.full_like(norm_C1, -1.0))
            if scale_P is not None:
                grad_CV *= scale_P[rows, None]
            if grad_PD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_PD[rows])
            if grad_VD is not None:
                grad_VD.addmm_(grad_CV.T, hidden_PD[rows])
        ctx.save_for_backward(grad_PD, grad_VD)
        return (losses_P if scale_P is None else losses_P * scale_P).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*(None if of is None else of * grad for of in ctx.saved_tensors), None, None, None)
