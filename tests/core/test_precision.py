"""Storage types against packers written here, bitsandbytes and dense products; what a change of type must not touch."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise_core.config.schema import Precision
from stackwise_core.errors import ConfigError
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.precision import (
    STORAGE,
    StoredLinear,
    base_linears,
    compute_dtype,
    convert_storage,
    dequantise,
    quantise,
    storage_of,
    stored_bytes,
)
from stackwise_core.stages.resolve import ModelShape

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LOW = ["float16", "bfloat16", "nvfp4", "nf4"]
BYTES_PER_WEIGHT = {"float16": 2, "bfloat16": 2, "nvfp4": 0.5 + 1 / 16, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]
SHAPE = ModelShape(vocab_size=40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, causal=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(*size: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def new_stack(seed: int = 0, n_blocks: int = 2) -> Stack:
    """A stack whose norms are not ones."""
    stack = Stack(SHAPE, n_blocks)
    initialise(stack, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return stack


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------- sizes and errors


@pytest.mark.parametrize(
    ("storage", "low", "high"),
    [
        ("float16", 0.5e-4, 3e-4),  # 11 bits: at most 2^-12 a weight, and uniform errors
        ("bfloat16", 1e-3, 2e-3),
        ("nvfp4", 0.093, 0.097),  # the error of E2M1 on Gaussian weights in blocks of 16, measured 0.095
        ("nf4", 0.090, 0.094),  # measured 0.092
    ],
)
def test_bytes_and_error_on_a_million_gaussian_weights(storage: str, low: float, high: float) -> None:
    weight = gaussian(1024, 1024)
    linear = StoredLinear(weight, storage)
    assert not list(linear.parameters())
    # Two scalars, at most, come on top of the closed form.
    assert stored_bytes(linear) / weight.numel() == pytest.approx(BYTES_PER_WEIGHT[storage], abs=1e-5)
    assert low < relative_error(linear.dense(), weight) < high


def test_bytes_of_a_stack_are_those_of_its_tensors() -> None:
    stack = new_stack(n_blocks=1)
    matrices, norms = 2 * 32 * (32 + 16) + 3 * 32 * 48, 2 * 32
    assert stored_bytes(stack) == 4 * (matrices + norms)
    convert_storage(stack, "half")
    assert stored_bytes(stack) == 2 * matrices + 4 * norms
    convert_storage(stack, "nvfp4")
    assert stored_bytes(stack) == matrices * 9 // 16 + 7 * 4 + 4 * norms


# ---------------------------------------------------------------- oracles


def nvfp4_oracle(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack by search over the eight magnitudes of E2M1; returns packed bytes, scales, tensor scale, dense."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    tensor_scale = weight.abs().max() / (448.0 * 6.0)
    blocks = weight.reshape(-1, 16)
    scale = (blocks.abs().amax(1) / 6.0 / tensor_scale).clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn)
    scaled = (blocks * ((1.0 / tensor_scale) / scale.float())[:, None]).clamp(-6.0, 6.0)
    distance = (scaled.abs().double()[..., None] - magnitudes).abs()
    distance += torch.tensor([0.0, 1e-9] * 4) * (distance == distance.amin(-1, keepdim=True))  # ties to the even code
    codes = distance.argmin(-1)
    values = magnitudes[codes] * torch.where(scaled < 0, -1.0, 1.0)
    nibbles = (codes + 8 * torch.signbit(scaled)).reshape(-1, 2)
    packed = (nibbles[:, 0] + 16 * nibbles[:, 1]).to(torch.uint8).reshape(weight.shape[0], -1)
    dense = (values * (tensor_scale * scale.float())[:, None]).reshape(weight.shape)
    return packed, scale.view(torch.uint8).reshape(weight.shape[0], -1), tensor_scale, dense


@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_nvfp4_is_packed_as_the_oracle_packs(scale: float) -> None:
    weight = gaussian(256, 192, scale=scale)
    weight[3, 16:32] *= 1e-6  # a block below the smallest block scale
    weight[5, :16] = 0.0
    weight[7, :8] = weight.abs().max() * torch.tensor([1, 0.5, 0.75 / 3, 2.5 / 6, 1.25 / 6, 3.5 / 6, 5 / 6, -5 / 6])
    packed, scales, tensor_scale, dense = nvfp4_oracle(weight)
    linear = StoredLinear(weight, "nvfp4")
    assert torch.equal(linear.weight, packed)
    assert torch.equal(linear.get_buffer("scale"), scales)
    assert torch.equal(linear.get_buffer("per_tensor_scale"), tensor_scale)
    assert torch.equal(linear.dense(), dense)


def test_nvfp4_has_the_bits_of_torchaos_own_tensor() -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = gaussian(256, 192)
    peer = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    linear = StoredLinear(weight, "nvfp4")
    assert torch.equal(linear.weight, peer.qdata)
    assert torch.equal(linear.dense(), peer.dequantize())


def nf4_values() -> Tensor:
    """The 16 values of NormalFloat: quantiles of a normal, normalised, with a zero (Dettmers et al. 2023)."""
    end = 0.9677083
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return values / values.max()


@pytest.mark.parametrize("size", [(128, 128), (64, 48), (128, 352), (24, 34), (16, 8)])
def test_nf4_is_what_the_quantiles_of_a_normal_say(size: tuple[int, int]) -> None:
    """Blocks of 64 run on over rows: a width that 64 does not divide is as exact as one that it does."""
    weight = gaussian(*size)
    flat = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).double()
    absmax = flat.abs().amax(1, keepdim=True)
    nearest = nf4_values()[((flat / absmax)[..., None] - nf4_values()).abs().argmin(-1)]
    wanted = (nearest * absmax).flatten()[: weight.numel()].view(size)
    got = StoredLinear(weight, "nf4").dense().double()
    # An absmax is kept in 8 bits, at most 1 % of the largest deviation from their mean away.
    spread = float((absmax - absmax.mean()).abs().max())
    assert float((got - wanted).abs().max()) < 0.02 * spread + 1e-7


def test_nf4_has_the_bits_of_bitsandbytes_own_layer() -> None:
    from bitsandbytes.nn import Linear4bit

    weight = gaussian(96, 128)  # a width divisible by 64, where its layer is right
    peer = Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    peer.load_state_dict({"weight": weight})
    peer.to("cpu")
    x = gaussian(2, 5, 128, scale=1.0)
    assert torch.equal(StoredLinear(weight, "nf4")(x), peer(x))


@pytest.mark.parametrize("storage", LOW)
def test_zeros_stay_zeros(storage: str) -> None:
    assert torch.equal(StoredLinear(torch.zeros(32, 48), storage).dense(), torch.zeros(32, 48))


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", LOW)
def test_product_and_gradient_have_the_bits_of_the_dense_layer(storage: str, device: str) -> None:
    linear = StoredLinear(gaussian(64, 48), storage).to(device)
    x = gaussian(3, 7, 48, scale=1.0).to(device)
    grad = gaussian(3, 7, 64, seed=1, scale=1.0).to(device)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    out, wanted = linear(ours), F.linear(theirs, linear.dense())
    out.backward(grad)
    wanted.backward(grad)
    assert torch.equal(out, wanted)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert linear.dense().dtype == torch.float32


@pytest.mark.parametrize("storage", LOW)
def test_second_derivatives_are_those_of_the_dense_layer(storage: str) -> None:
    linear, x = StoredLinear(gaussian(64, 48), storage), gaussian(3, 48, scale=1.0).requires_grad_()
    seconds: list[Tensor] = []
    for out in (linear(x), F.linear(x, linear.dense())):
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        seconds += torch.autograd.grad(first.square().sum(), x)
    assert seconds[0].any()
    torch.testing.assert_close(seconds[0], seconds[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", LOW)
def test_autocast_is_followed_forward_and_backward(storage: str, device: str) -> None:
    linear = StoredLinear(gaussian(64, 48), storage).to(device)
    x = gaussian(3, 48, scale=1.0).to(device)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        out, wanted = linear(ours), F.linear(theirs, linear.dense())
    out.sum().backward()
    wanted.sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("storage", LOW)
def test_backward_keeps_the_stored_tensors_and_no_dense_one(storage: str) -> None:
    linear = StoredLinear(gaussian(64, 48), storage)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(gaussian(5, 48).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in linear.buffers()}


@pytest.mark.parametrize("storage", LOW)
def test_a_saved_layer_loads_bit_for_bit_into_another(storage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, target = StoredLinear(gaussian(64, 48), storage), StoredLinear(gaussian(64, 48, seed=1), storage)
    assert not torch.equal(source.dense(), target.dense())
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    target.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    assert torch.equal(source.dense(), target.dense())


@pytest.mark.parametrize("storage", LOW)
def test_a_deep_copy_is_equal_and_its_own(storage: str) -> None:
    source = StoredLinear(gaussian(64, 48), storage)
    wanted = source.dense()
    copied = copy.deepcopy(source)
    for tensor in source.buffers():
        tensor.zero_()
    assert torch.equal(copied.dense(), wanted)
    assert not torch.equal(source.dense(), wanted)


@pytest.mark.parametrize("storage", LOW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_dtype_passes_stored_tensors_by(storage: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(48, 48), StoredLinear(gaussian(64, 48), storage))
    linear = model[1]
    assert isinstance(linear, StoredLinear)
    before = {name: tensor.clone() for name, tensor in linear.named_buffers()}
    wanted = linear.dense()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert all(torch.equal(before[name], tensor) for name, tensor in linear.named_buffers())
    assert torch.equal(linear.dense(), wanted)
    assert model(gaussian(2, 48).to(dtype)).dtype == dtype


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("storage", LOW)
def test_a_layer_moves_to_the_device_and_back(storage: str) -> None:
    linear = StoredLinear(gaussian(64, 48), storage)
    wanted = linear.dense()
    assert torch.equal(linear.to("cuda").dense().cpu(), wanted)
    assert {tensor.device.type for tensor in linear.buffers()} == {"cuda"}
    assert torch.equal(linear.to("cpu").dense(), wanted)


# ---------------------------------------------------------------- a whole stack


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_converted_stack_computes_with_its_dequantised_matrices(precision: Precision) -> None:
    stack, dense = new_stack(), new_stack()
    convert_storage(stack, precision)
    assert {storage_of(linear) for linear in base_linears(stack).values()} == {STORAGE[precision]}
    assert len(base_linears(stack)) == 14
    for path, linear in base_linears(dense).items():
        stored = quantise(linear.weight.detach(), STORAGE[precision]) if precision != "full" else {}
        if stored:
            linear.weight.data = dequantise(stored, STORAGE[precision], (linear.out_features, linear.in_features))
        assert path in base_linears(stack)
    x = gaussian(2, 5, 32, scale=1.0)
    assert torch.equal(stack(x), dense(x))
    norms = {name: parameter for name, parameter in stack.named_parameters() if "norm" in name}
    assert len(norms) == 4
    assert all(parameter.dtype == torch.float32 for parameter in norms.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_converting_again_keeps_the_bits_and_draws_nothing(precision: Precision) -> None:
    stack = new_stack()
    randomness = torch.random.get_rng_state()
    convert_storage(stack, precision)
    before = {path: (linear, linear.weight.clone()) for path, linear in base_linears(stack).items()}
    convert_storage(stack, precision)
    for path, linear in base_linears(stack).items():
        assert linear is before[path][0]
        assert torch.equal(linear.weight, before[path][1])
    assert torch.equal(torch.random.get_rng_state(), randomness)


@pytest.mark.parametrize("precision", ["half", "bfloat16", "nvfp4", "qlora"])
def test_full_makes_trainable_float32_matrices_of_the_stored_ones(precision: Precision) -> None:
    stack = new_stack()
    stack.requires_grad_(False).eval()
    convert_storage(stack, precision)
    x = gaussian(2, 5, 32, scale=1.0)
    wanted = stack(x)
    randomness = torch.random.get_rng_state()
    convert_storage(stack, "full")
    assert torch.equal(stack(x), wanted)
    linears = list(base_linears(stack).values())
    assert all(type(linear) is nn.Linear and linear.weight.requires_grad for linear in linears)
    assert all(parameter.dtype == torch.float32 for parameter in stack.parameters())
    assert not any(module.training for module in stack.modules())
    assert torch.equal(torch.random.get_rng_state(), randomness)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_stack_loads_bit_for_bit_into_one_of_another_seed(precision: Precision) -> None:
    source, target = new_stack(), new_stack(seed=1)
    convert_storage(source, precision)
    convert_storage(target, precision)
    x = gaussian(2, 5, 32, scale=1.0)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("precision", ["half", "nvfp4", "qlora"])
def test_a_stack_converted_under_inference_mode_can_carry_gradients(precision: Precision) -> None:
    stack = new_stack()
    with torch.inference_mode():
        convert_storage(stack, precision)
    x = gaussian(2, 5, 32, scale=1.0).requires_grad_()
    stack(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_nvfp4_refuses_what_sixteen_does_not_divide_and_leaves_the_stack_alone() -> None:
    stack = Stack(SHAPE.model_copy(update={"d_ff": 40}), 1)
    with pytest.raises(ConfigError, match=r"a matrix of 40 x 32; nvfp4 needs both dimensions .* to divide by 16"):
        convert_storage(stack, "nvfp4")
    assert {storage_of(linear) for linear in base_linears(stack).values()} == {"float32"}
    with pytest.raises(ConfigError, match="a matrix of 8 x 16"):
        StoredLinear(torch.zeros(8, 16), "nvfp4")


def test_compute_types() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert {precision: compute_dtype(precision, cpu) for precision in PRECISIONS} == dict.fromkeys(
        PRECISIONS, torch.float32
    )
    assert {precision: compute_dtype(precision, cuda) for precision in PRECISIONS} == {
        "full": torch.float32,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
        "nvfp4": torch.bfloat16,
        "qlora": torch.bfloat16,
    }


def test_importing_is_light() -> None:
    """The command line and dense runs never pay for the quantisation libraries."""
    program = (
        "import sys, stackwise_core.model.precision, stackwise_core.model.adapters as adapters\n"
        "from stackwise_core.model.blocks import Stack\n"
        "from stackwise_core.stages.resolve import ModelShape\n"
        "shape = ModelShape(vocab_size=8, d_model=16, n_heads=1, n_kv_heads=1, d_ff=16, causal=True)\n"
        "stack = Stack(shape, 1)\n"
        "stackwise_core.model.precision.convert_storage(stack, 'half')\n"
        "assert adapters.adapter_names(stack) == []\n"
        "print({'bitsandbytes', 'torchao', 'peft', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
