"""How a stack is stored and what it computes in: fp32, fp16, bf16, NVFP4, NF4.

One module of ours, `StoredLinear`, holds every low storage type; the libraries give only functions from a dense
matrix to packed tensors and back. Their modules and tensor subclasses are not used: loading, copying and casting
those goes wrong silently, each in its own way, while plain buffers do all three as torch does.

Importing this module imports neither bitsandbytes nor torchao, which take seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise_core.config.schema import Precision
from stackwise_core.model.storage_types import dequantise, quantise

STORAGE: dict[Precision, str] = {
    "full": "float32",
    "half": "float16",
    "bfloat16": "bfloat16",
    "nvfp4": "nvfp4",
    "qlora": "nf4",
}
"""What a stack of each precision is stored as once it is frozen."""


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type that matrix products of a stack run in.

    Float32 on every CPU: without native support low products are 10 to 60 times slower, and with it their bits
    depend on the machine, which would break the equality of cached and live rows (docs/decisions/0001).
    """
    if device.type == "cpu" or precision == "full":
        return torch.float32
    return torch.float16 if precision == "half" else torch.bfloat16


def stored_bytes(stack: nn.Module) -> int:
    """Return the bytes of a stack's tensors, adapters included."""
    return sum(tensor.nbytes for tensors in (stack.parameters(), stack.buffers()) for tensor in tensors)


# ---------------------------------------------------------------- dense to stored and back


# ---------------------------------------------------------------- the linear layer


class StoredLinear(nn.Linear):
    """A linear layer without bias whose weight is kept in a low storage type and never trains.

    The stored tensors are plain buffers: `state_dict`, `deepcopy` and `.to(device)` treat them as any other; a
    change of dtype passes them by. `weight` is the packed one: for numbers ask `dense()`. It is a `nn.Linear`
    because peft puts its layers around those.
    """

    def __init__(self, weight: Tensor, storage: str) -> None:
        """Store a float32 matrix [out, in].

        Raises:
            ConfigError: see `quantise`.
        """
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a trainable weight
        self.register_parameter("bias", None)
        self.out_features, self.in_features = weight.shape
        self.storage = storage
        self.held: Tensor | None = None
        """The dense weight, while `held_dense` lasts."""
        for name, tensor in quantise(weight.detach().float(), storage).items():
            self.register_buffer(name, tensor)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight as float32: [out, in]."""
        return dequantise(dict(self.named_buffers()), self.storage, (self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], in the autocast type if there is one, else in that of the input."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if self.held is not None:
            return F.linear(input.to(dtype), self.held.to(dtype))
        stored = dict(self.named_buffers())
        shape = (self.out_features, self.in_features)
        product: Callable[..., Tensor] = _StoredProduct.apply
        return product(input, self.storage, shape, dtype, tuple(stored), *stored.values())

    def extra_repr(self) -> str:
        """Say shape and storage type."""
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        """Follow a move to a device, but never a change of type, which would corrupt packed weights and scales."""
        for name, tensor in self.named_buffers():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self


class _StoredProduct(torch.autograd.Function):
    """x @ weight.T that keeps the stored tensors for its backward pass, never the dense matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        storage: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        names: tuple[str, ...],
        *stored: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.storage, ctx.shape, ctx.names, ctx.dtype, ctx.x_dtype = storage, shape, names, dtype, x.dtype
        weight = dequantise(dict(zip(names, stored, strict=True)), storage, shape)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        stored = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weight = dequantise(stored, ctx.storage, ctx.shape).to(ctx.dtype)
        return (grad.to(ctx.dtype) @ weight).to(ctx.x_dtype), *(None for _ in range(4 + len(stored)))


# ---------------------------------------------------------------- a whole stack


def base_linears(stack: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer that is not an adapter's, by its path; under an adapter it ends in `.base_layer`."""
    linears = {path: module for path, module in stack.named_modules() if isinstance(module, nn.Linear)}
    return {path: linear for path, linear in linears.items() if ".lora_" not in path}


def storage_of(linear: nn.Linear) -> str:
    """Return the storage type of a base linear layer."""
    return linear.storage if isinstance(linear, StoredLinear) else "float32"


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return the weight of a base linear layer as float32, without gradient: [out, in]."""
    return linear.dense() if isinstance(linear, StoredLinear) else linear.weight.detach()


def convert_storage(stack: nn.Module, precision: Precision) -> None:
    """Store the matrices of a stack as its precision says, in place; norms and adapters stay float32.

    A matrix that has the type already keeps its bits. Matrices that become float32 are new parameters with
    `requires_grad`, as in any new layer: what trains is decided after this.

    Raises:
        ConfigError: nvfp4 of a matrix whose dimensions do not divide by 16; the stack is then unchanged.
    """
    storage = STORAGE[precision]
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be saved for a backward
        converted = {
            path: _converted(linear, storage)
            for path, linear in base_linears(stack).items()
            if storage_of(linear) != storage
        }
    for path, linear in converted.items():
        stack.set_submodule(path, linear)


@contextlib.contextmanager
def held_dense(stack: nn.Module) -> Generator[None]:
    """Dequantise the stored matrices of a stack once for all forward passes inside; without gradient only."""
    stored = [linear for linear in base_linears(stack).values() if isinstance(linear, StoredLinear)]
    for linear in stored:
        linear.held = linear.dense()
    try:
        yield
    finally:
        for linear in stored:
            linear.held = None


def _converted(linear: nn.Linear, storage: str) -> nn.Module:
    weight = dense_weight(linear)
    if storage != "float32":
        return StoredLinear(weight, storage).train(linear.training)
    with torch.device("meta"):  # no random numbers are drawn for a weight that is replaced
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
    dense.weight = nn.Parameter(weight)
    return dense.train(linear.training)
