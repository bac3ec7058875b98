"""How a stack is stored and what it computes in: fp32, fp16, bf16, NVFP4, NF4.

`StoredLinear` holds every low storage type; the libraries provide only functions from a dense matrix to packed
tensors and back. Their own modules and tensor subclasses are not used: loading, copying and casting those fails
silently, each in its own way, while plain buffers do all three as torch does.

Importing this module imports neither bitsandbytes nor torchao, which take seconds.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise_core.config.schema import Precision
from stackwise_core.errors import ConfigError, Fault

STORAGE: dict[Precision, str] = {
    "full": "float32",
    "half": "float16",
    "bfloat16": "bfloat16",
    "nvfp4": "nvfp4",
    "qlora": "nf4",
}
"""What a stack of each precision is stored as once it is frozen."""
_LOW_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_NVFP4_BLOCK = 16
_NVFP4_LARGEST = 448.0 * 6.0
"""The largest E4M3 block scale times the largest E2M1 value."""
_NVFP4_AT_ONCE = 2**22
"""Weights that are decoded at once."""
_NF4_BLOCK = 64
_NF4_NESTED_BLOCK = 256


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type that matrix products of a stack run in.

    Float32 on every CPU: without native support low products are 10 to 60 times slower, and with it their bits
    depend on the machine, which would break the equality of cached and live rows (docs/decisions/0001).
    """
    if device.type == "cpu" or precision == "full":
        return torch.float32
    return torch.float16 if precision == "half" else torch.bfloat16


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type that a product with `x` runs in here: that of autocast if it is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def stored_bytes(stack: nn.Module) -> int:
    """Return the bytes of a stack's tensors, adapters included."""
    return sum(tensor.nbytes for tensors in (stack.parameters(), stack.buffers()) for tensor in tensors)


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters, of those in adapters, and of those that have `requires_grad`.

    A weight is one parameter however it is stored, and one that is shared counts once: `stages.costs` counts the same.
    """
    weights = dict(module.named_parameters())
    stored = (each for each in module.modules() if isinstance(each, StoredLinear))
    return {
        "parameters": sum(p.numel() for p in weights.values()) + sum(each.n_parameters for each in stored),
        "adapter_parameters": sum(p.numel() for name, p in weights.items() if ".lora_" in name),
        "trainable_parameters": sum(p.numel() for p in weights.values() if p.requires_grad),
    }


# ---------------------------------------------------------------- from a dense matrix to stored tensors and back


@contextlib.contextmanager
def silent_import() -> Generator[None]:
    """Hide what libraries log when imported: kernels of other devices, their deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@cache
def _bitsandbytes() -> Any:
    with silent_import():
        from bitsandbytes import functional
    return functional


def quantise(weight: Tensor, storage: str) -> dict[str, Tensor]:
    """Return the tensors that store a float32 matrix [out, in].

    fp16, bf16: `weight`. NVFP4: `weight` (two E2M1 values a byte), `scale` (E4M3 bits, one per 16), `per_tensor_scale`.
    NF4: `weight` (two codes a byte), `absmax` (8-bit codes, one per 64), `absmax_scale`, `absmax_offset`. Of a matrix
    on the device `meta` they lie there too, without content.
    """
    if storage == "nvfp4":
        _check_nvfp4(weight)
    if weight.is_meta:
        return _unfilled(weight.shape, storage)
    if storage == "nvfp4":
        return _quantise_nvfp4(weight)
    if storage == "nf4":
        return _quantise_nf4(weight)
    return {"weight": weight.to(_LOW_DTYPES[storage])}


def dequantise(
    stored: dict[str, Tensor], storage: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the matrix [out, in] that is stored, computed in float32 and rounded to `dtype`."""
    if storage == "nvfp4":
        return _dequantise_nvfp4(stored, dtype)
    if storage == "nf4":
        return _dequantise_nf4(stored, shape).to(dtype)
    return stored["weight"].to(dtype)


def _unfilled(shape: torch.Size, storage: str) -> dict[str, Tensor]:
    """Return, on the device `meta`, what `quantise` gives for a matrix of this shape."""

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, columns = shape
    if storage == "nvfp4":
        scale = of(torch.uint8, rows, columns // _NVFP4_BLOCK)
        return {"weight": of(torch.uint8, rows, columns // 2), "scale": scale, "per_tensor_scale": of(torch.float32)}
    if storage == "nf4":
        blocks = math.ceil(rows * columns / _NF4_BLOCK)
        return {
            "weight": of(torch.uint8, blocks * _NF4_BLOCK // 2, 1),
            "absmax": of(torch.uint8, blocks),
            "absmax_scale": of(torch.float32, math.ceil(blocks / _NF4_NESTED_BLOCK)),
            "absmax_offset": of(torch.float32),
        }
    return {"weight": of(_LOW_DTYPES[storage], rows, columns)}


def _check_nvfp4(weight: Tensor) -> None:
    if any(size % _NVFP4_BLOCK for size in weight.shape):
        received = " x ".join(str(size) for size in weight.shape)
        allowed = f"nvfp4 needs both dimensions of every matrix to divide by {_NVFP4_BLOCK}"
        raise ConfigError([Fault("precision", f"a matrix of {received}", allowed)])


def _quantise_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    with silent_import():
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    # A matrix of zeros (a fresh copy_zero) would divide by zero; no trained weight is as small as the clamp.
    per_tensor_scale = weight.abs().amax().clamp(min=1e-12) / _NVFP4_LARGEST
    scale, packed = nvfp4_quantize(weight.contiguous(), _NVFP4_BLOCK, per_tensor_scale)
    # The scales' bits, since collectives between processes do not know float8.
    return {"weight": packed, "scale": scale.view(torch.uint8), "per_tensor_scale": per_tensor_scale}


def _dequantise_nvfp4(stored: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    # torchao's own takes 10 times as long on a CPU: it decodes by arithmetic, this by a table [measured, 0.18.0].
    # Some rows at a time: the indices, and the products in float32, take 10 bytes a weight, the result often only two.
    packed, scale = stored["weight"], stored["scale"].view(torch.float8_e4m3fn)
    dense = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype, device=packed.device)
    n_rows = max(1, _NVFP4_AT_ONCE // dense.shape[1])
    for each in zip(packed.split(n_rows), scale.split(n_rows), dense.split(n_rows), strict=True):
        bytes_, scales, out = each
        values = F.embedding(bytes_.int(), _e2m1_pairs(packed.device)).view(len(out), -1, _NVFP4_BLOCK)
        out.copy_((values * (stored["per_tensor_scale"] * scales.float())[..., None]).flatten(1))
    return dense


def _quantise_nf4(weight: Tensor) -> dict[str, Tensor]:
    # One block a row: bitsandbytes cuts blocks from the flat matrix but on a CPU reads them back row by row, so
    # that a width which 64 does not divide came back with errors of 12 to 40 % instead of 9 [measured, 0.50.2].
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    state: Any
    packed, state = _bitsandbytes().quantize_4bit(
        blocks, blocksize=_NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    absmax_scale, offset = state.state2.absmax, state.offset
    return {"weight": packed, "absmax": state.absmax, "absmax_scale": absmax_scale, "absmax_offset": offset}


def _dequantise_nf4(stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    bnb = _bitsandbytes()
    nested = bnb.dequantize_blockwise(stored["absmax"], absmax=stored["absmax_scale"], blocksize=_NF4_NESTED_BLOCK)
    absmax = nested + stored["absmax_offset"]
    blocks = torch.Size((absmax.numel(), _NF4_BLOCK))
    state = bnb.QuantState(absmax, shape=blocks, dtype=torch.float32, blocksize=_NF4_BLOCK, quant_type="nf4")
    return bnb.dequantize_4bit(stored["weight"], state).flatten()[: shape[0] * shape[1]].view(shape)


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """Return the two E2M1 values in each of the 256 bytes, the low half first: [256, 2]."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256)
    return torch.stack([values[byte % 16], values[byte // 16]], dim=1).to(device)


# ---------------------------------------------------------------- the linear layer


class StoredLinear(nn.Linear):
    """A linear layer whose weight is kept in a low storage type, and its bias in float32; neither trains.

    The stored tensors are plain buffers: `state_dict`, `deepcopy` and `.to(device)` treat them like any other, but a
    change of dtype leaves them as they are. `weight` is packed; `dense()` returns the numbers. It is an `nn.Linear`
    because peft wraps its layers around those.
    """

    def __init__(self, weight: Tensor, storage: str, bias: Tensor | None = None) -> None:
        """Store a float32 matrix [out, in] and, as it is, a bias [out]."""
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a trainable weight
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.out_features, self.in_features = weight.shape
        self.storage = storage
        self.held: Tensor | None = None
        """The dense weight, while `held_dense` lasts."""
        for name, tensor in quantise(weight.detach().float(), storage).items():
            self.register_buffer(name, tensor)

    @property
    def n_parameters(self) -> int:
        """The number of weights and biases, however they are stored."""
        return self.out_features * (self.in_features + (bias_of(self) is not None))

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors that the weight is stored as."""
        return {name: tensor for name, tensor in self.named_buffers() if name != "bias"}

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight: [out, in]."""
        return dequantise(self._stored(), self.storage, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], in the autocast type if autocast is on, else in the input's."""
        dtype = product_dtype(input)
        bias = bias_of(self)
        bias = None if bias is None else bias.to(dtype)
        if self.held is not None:
            return F.linear(input.to(dtype), self.held.to(dtype), bias)
        stored, shape = self._stored(), [self.out_features, self.in_features]
        return _stored_product(input, list(stored.values()), list(stored), self.storage, shape, dtype, bias, False)

    def extra_repr(self) -> str:
        """Return shape and storage type for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        """Refuse tensors of another type, which torch would cast: of packed bits nonsense, of others a rounding."""
        *_, errors = others
        for name, tensor in self.named_buffers():
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.dtype != tensor.dtype:
                is_here = f"it is stored as {tensor.dtype} here ({self.storage}); build the stack in that precision"
                errors.append(f"{prefix}{name} is {saved.dtype} in the state, but {is_here}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        """Move to a device but never change the type, which would corrupt packed weights and scales."""
        for name, tensor in self.named_buffers():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self


# An operator, not a torch.autograd.Function: a compiler that sees inside takes decoding for the forward and for the
# backward pass as the same work done twice, and would keep the dense matrix in between.
@torch.library.custom_op(
    "stackwise::stored_product",
    mutates_args=(),
    schema="(Tensor x, Tensor[] stored, str[] names, str storage, int[] shape, ScalarType dtype, "
    "Tensor? bias, bool transposed) -> Tensor",
)
def _stored_product(
    x: Tensor,
    stored: list[Tensor],
    names: list[str],
    storage: str,
    shape: list[int],
    dtype: torch.dtype,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Return x @ weight.T + bias, or x @ weight; for the backward pass only what is stored is kept."""
    weight = dequantise(dict(zip(names, stored, strict=True)), storage, (shape[0], shape[1]), dtype)
    return x.to(dtype) @ weight if transposed else F.linear(x.to(dtype), weight, bias)


@_stored_product.register_fake
def _(x: Tensor, stored: Any, names: Any, storage: Any, shape: list[int], dtype: torch.dtype, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[others[-1]]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, *ctx.how, _, ctx.transposed = inputs
    ctx.save_for_backward(*stored)
    ctx.x_dtype = x.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    stored = list(ctx.saved_tensors)  # once: under activation checkpointing a second look is an error
    of_x = _stored_product(grad, stored, *ctx.how, None, not ctx.transposed).to(ctx.x_dtype)
    return (of_x, [None] * len(stored), *[None] * 6)


_stored_product.register_autograd(_gradients, setup_context=_keep)


# ---------------------------------------------------------------- a whole stack


def base_linears(stack: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer that is not an adapter's, by path; a path inside an adapter ends in `.base_layer`."""
    linears = {path: module for path, module in stack.named_modules() if isinstance(module, nn.Linear)}
    return {path: linear for path, linear in linears.items() if ".lora_" not in path}


def storage_of(linear: nn.Linear) -> str:
    """Return the storage type of a base linear layer."""
    return linear.storage if isinstance(linear, StoredLinear) else "float32"


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return the weight of a base linear layer as float32, without gradient: [out, in]."""
    return linear.dense() if isinstance(linear, StoredLinear) else linear.weight.detach()


def bias_of(linear: nn.Linear) -> Tensor | None:
    """Return the bias of a linear layer [out], which torch declares to be always there."""
    return linear.bias


def convert_storage(stack: nn.Module, precision: Precision) -> None:
    """Convert the matrices of a stack to the storage type of a precision, in place; all else stays float32.

    A matrix that has the type already keeps its bits. Layers that become float32 have new parameters with
    `requires_grad`, as in any new layer: what trains must be set after this. After an error the stack is unchanged.
    """
    storage = STORAGE[precision]
    others = {path: linear for path, linear in base_linears(stack).items() if storage_of(linear) != storage}
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be saved for a backward
        converted = {path: _converted(linear, storage) for path, linear in others.items()}
    for path, linear in converted.items():
        stack.set_submodule(path, linear)


@contextlib.contextmanager
def held_dense(stack: nn.Module, dtype: torch.dtype) -> Generator[None]:
    """Dequantise the stored matrices of a stack once for all forward passes inside the block; not for training.

    `dtype` is what the products run in.
    """
    stored = [linear for linear in base_linears(stack).values() if isinstance(linear, StoredLinear)]
    for linear in stored:
        linear.held = linear.dense(dtype)
    try:
        yield
    finally:
        for linear in stored:
            linear.held = None


def _converted(linear: nn.Linear, storage: str) -> nn.Module:
    weight, bias = dense_weight(linear), bias_of(linear)
    if storage != "float32":
        return StoredLinear(weight, storage, bias).train(linear.training)
    with torch.device("meta"):  # no random numbers are drawn for a weight that is replaced
        dense = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach())
    return dense.train(linear.training)
