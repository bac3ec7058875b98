"""Dual LoRA over every storage type: outputs that keep their bits, gradients only where they belong, exact merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from stackwise_core.config.schema import Precision
from stackwise_core.config.stacks import AdapterSpec
from stackwise_core.errors import ConfigError
from stackwise_core.model.adapters import (
    ADAPTERS,
    AdapterName,
    adapter_names,
    adapter_parameters,
    adapter_spec,
    adapter_state,
    add_adapter,
    base_state,
    load_adapter_state,
    merged_dense,
)
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.precision import STORAGE, StoredLinear, base_linears, convert_storage, dense_weight
from stackwise_core.model.saving import empty_stack, hold
from stackwise_core.stages.costs import n_adapter_parameters
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import StackSpec

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SHAPE = ModelShape(vocab_size=40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=48, causal=True)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]
SPEC = StackSpec(index=3, n_blocks=2, precision="full", adapters={})
COMBINATIONS: list[tuple[AdapterName, ...]] = [(), ("stack",), ("progressive",), ("stack", "progressive")]
LAYERS = [
    *(f"attention.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"ffn.{name}_proj" for name in ("gate", "up", "down")),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def new_stack(precision: Precision = "full", seed: int = 0, device: str = "cpu") -> Stack:
    """Two blocks, weights large enough that every part shows, norms that are not ones."""
    stack = Stack(SHAPE, 2, creation_index=3)
    initialise(stack, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    convert_storage(stack, precision)
    return stack.to(device)


def as_if_trained(stack: Stack, name: AdapterName, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(stack, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(precision: Precision, names: tuple[AdapterName, ...] = ADAPTERS, seed: int = 0) -> Stack:
    """A stack with trained adapters of different ranks and scales."""
    return with_adapters(new_stack(precision, seed), names, seed)


def with_adapters(stack: Stack, names: tuple[AdapterName, ...], seed: int) -> Stack:
    for name in names:
        add_adapter(stack, name, rank=4 if name == "stack" else 2, alpha=8.0 if name == "stack" else 3.0, seed=seed)
        as_if_trained(stack, name, seed + 5)
    return stack


def stream(seed: int = 9) -> Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed))


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---------------------------------------------------------------- adding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [ADAPTERS, ADAPTERS[::-1]])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_addition_leaves_the_output_bit_equal(
    precision: Precision, order: tuple[AdapterName, ...], device: str
) -> None:
    stack, x_BTD = new_stack(precision, device=device), stream().to(device)
    for name in order:
        before_BTD = stack(x_BTD)
        add_adapter(stack, name, rank=4, alpha=8.0, seed=1)
        assert torch.equal(stack(x_BTD), before_BTD)
        as_if_trained(stack, name)
        assert not torch.equal(stack(x_BTD), before_BTD)
    assert adapter_names(stack) == list(ADAPTERS)
    assert {parameter.device.type for parameter in stack.parameters()} == {device}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layer_adds_both_adapters_to_its_stored_weight(precision: Precision) -> None:
    stack = adapted(precision)
    state = {name: adapter_state(stack, name) for name in ADAPTERS}
    seen: list[str] = []
    for path, module in stack.named_modules():
        if not path.endswith("_proj"):
            continue
        seen.append(path)
        base = base_linears(stack)[f"{path}.base_layer"]
        assert module.get_base_layer() is base
        assert isinstance(base, StoredLinear) == (precision != "full")
        weight_OI = dense_weight(base).double()
        for name, scale in (("stack", 8.0 / 4), ("progressive", 3.0 / 2)):
            a_RI, b_OR = (state[name][f"{path}.lora_{letter}.weight"].double() for letter in "AB")
            weight_OI = weight_OI + scale * b_OR @ a_RI
        x_NI = torch.randn(5, base.in_features, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(module(x_NI).double(), x_NI.double() @ weight_OI.T, rtol=1e-5, atol=1e-5)
    assert seen == [f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS]


def test_the_order_of_addition_changes_no_bit() -> None:
    one, other = adapted("qlora"), adapted("qlora", ADAPTERS[::-1])
    assert torch.equal(one(stream()), other(stream()))


def test_a_is_drawn_from_the_seed_alone_and_global_randomness_is_left_alone() -> None:
    states: list[dict[str, Tensor]] = []
    for global_seed, seed, precision in ((1, 7, "full"), (2, 7, "half"), (2, 8, "full")):
        stack = new_stack(precision)
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        add_adapter(stack, "stack", rank=4, alpha=8.0, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(adapter_state(stack, "stack"))
    assert equal(states[0], states[1])
    assert not torch.equal(*(state["blocks.1.ffn.up_proj.lora_A.weight"] for state in states[1:]))
    for key, tensor in states[0].items():
        bound = 1 / tensor.shape[1] ** 0.5
        assert tensor.dtype == torch.float32
        if "lora_B" in key:
            assert not tensor.any()
        else:
            assert 0.9 * bound < tensor.abs().max() < bound


def test_new_parameters_train_and_all_others_keep_what_they_had() -> None:
    stack = new_stack()
    frozen = stack.blocks[0]
    frozen.requires_grad_(False)
    stack.eval()
    wanted = {id(parameter): parameter.requires_grad for parameter in stack.parameters()}
    for name in ADAPTERS:
        add_adapter(stack, name, rank=4, alpha=8.0, seed=1)
        for parameter in stack.parameters():
            assert parameter.requires_grad == wanted.get(id(parameter), True)
        for parameter in adapter_parameters(stack, name):
            parameter.requires_grad_(False)
            wanted[id(parameter)] = False
    assert {id(parameter) for parameter in stack.parameters()} == wanted.keys()
    assert not any(module.training for module in stack.modules())


def base_parameters(stack: Stack) -> list[nn.Parameter]:
    adapters = {id(parameter) for parameter in adapter_parameters(stack)}
    return [parameter for parameter in stack.parameters() if id(parameter) not in adapters]


def test_the_count_is_rank_times_in_plus_out() -> None:
    stack = adapted("full")
    for name, rank in (("stack", 4), ("progressive", 2)):
        sizes = [linear.in_features + linear.out_features for linear in base_linears(stack).values()]
        count = sum(parameter.numel() for parameter in adapter_parameters(stack, name))
        assert count == rank * sum(sizes) == n_adapter_parameters(SHAPE, 2, rank)
    assert len(adapter_parameters(stack)) == 2 * 2 * 14
    assert len(base_parameters(stack)) == 2 * (7 + 2)


SIDES = dict(zip(LAYERS, [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)], strict=True))


@pytest.mark.parametrize("rank", [16, 24, 32, 512])
def test_a_layer_narrower_than_the_rank_has_the_rank_of_its_narrowest_side(rank: int) -> None:
    """Keys and values are 16 wide; alpha is divided by the rank that a layer has. Against dense weights."""
    stack = new_stack("nvfp4")
    for name in ADAPTERS:
        before_BTD = stack(stream())
        add_adapter(stack, name, rank=rank, alpha=8.0, seed=3)
        assert torch.equal(stack(stream()), before_BTD)
        as_if_trained(stack, name)
    merged, state = merged_dense(stack), adapter_state(stack, "progressive")
    for path, linear in base_linears(merged).items():
        n_inputs, n_outputs = SIDES[path.split(".", 2)[2]]
        own = min(rank, n_inputs, n_outputs)
        a_RI, b_OR = (state[f"{path}.lora_{letter}.weight"] for letter in "AB")
        assert (a_RI.shape, b_OR.shape) == ((own, n_inputs), (n_outputs, own))
        stored_OI = dense_weight(stack.get_submodule(f"{path}.base_layer"))  # pyright: ignore[reportArgumentType]
        added_OI = sum(b @ a for a, b in pairs_of(stack, path))
        torch.testing.assert_close(linear.weight, stored_OI + 8.0 / own * added_OI)
        x_NI = torch.randn(5, n_inputs, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(stack.get_submodule(path)(x_NI), linear(x_NI), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged(stream()), stack(stream()), rtol=1e-3, atol=1e-3)
    count = sum(parameter.numel() for parameter in adapter_parameters(stack, "stack"))
    assert count == n_adapter_parameters(SHAPE, 2, rank)
    assert count == 2 * sum(min(rank, *sides) * sum(sides) for sides in SIDES.values())
    other = new_stack("nvfp4")
    add_adapter(other, "progressive", rank=min(rank, 32), alpha=8.0, seed=0)  # as recipes name it
    load_adapter_state(other, "progressive", state)
    assert equal(adapter_state(other, "progressive"), state)
    assert adapter_spec(stack, "stack") == AdapterSpec(rank=min(rank, 32), alpha=8.0)


def pairs_of(stack: Stack, path: str) -> list[tuple[Tensor, Tensor]]:
    """A and B of every adapter of a layer."""
    states = [adapter_state(stack, name) for name in ADAPTERS]
    return [(state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]) for state in states]


def test_a_second_adapter_of_the_same_name_is_refused_and_the_first_kept() -> None:
    stack = adapted("half")
    before = clones(adapter_state(stack, "stack"))
    with pytest.raises(ConfigError, match="adapter: got 'stack'; stack 3 has one of this name already"):
        add_adapter(stack, "stack", rank=4, alpha=8.0, seed=1)
    assert equal(adapter_state(stack, "stack"), before)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_over_a_frozen_base_exactly_the_adapters_learn(precision: Precision, device: str) -> None:
    stack = adapted(precision).to(device)
    for parameter in base_parameters(stack):
        parameter.requires_grad_(False)
    before = clones(base_state(stack))
    trainable = [parameter for parameter in stack.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in adapter_parameters(stack)}
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = stack(stream().to(device)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for name in ADAPTERS:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(stack, name))
    assert all(parameter.grad is None for parameter in base_parameters(stack))
    assert losses[2] < losses[0]
    assert equal(base_state(stack), before)


def test_the_gradient_of_an_adapter_is_that_of_the_dense_product() -> None:
    """d/dA and d/dB of sum(G * x (W + s B A)^T), written out."""
    stack = adapted("nvfp4", ("stack",))
    layer = stack.get_submodule("blocks.1.ffn.down_proj")
    generator = torch.Generator().manual_seed(3)
    x_NI, grad_NO = (torch.randn(9, size, generator=generator) for size in (48, 32))
    x_NI.requires_grad_()
    layer(x_NI).backward(grad_NO)
    a, b = (layer.get_submodule(f"lora_{letter}.stack").weight for letter in "AB")
    x_NI, grad_NI = x_NI.detach(), x_NI.grad
    weight_OI = dense_weight(layer.get_base_layer()) + 2.0 * b.detach() @ a.detach()
    torch.testing.assert_close(grad_NI, grad_NO @ weight_OI)
    torch.testing.assert_close(b.grad, 2.0 * grad_NO.T @ (x_NI @ a.detach().T))
    torch.testing.assert_close(a.grad, 2.0 * (grad_NO @ b.detach()).T @ x_NI)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_adapters_go_on_contributing(precision: Precision) -> None:
    stack = adapted(precision)
    stack.requires_grad_(False).eval()
    with torch.no_grad():
        wanted = stack(stream())
        with torch.inference_mode():
            assert torch.equal(stack(stream()), wanted)
        for name in ADAPTERS:
            without = copy.deepcopy(stack)
            for parameter in adapter_parameters(without, name):
                parameter.zero_()
            assert (without(stream()) - wanted).abs().max() > 0.1


def test_a_deep_copy_has_adapters_of_its_own() -> None:
    stack = adapted("qlora")
    copied, wanted = copy.deepcopy(stack), stack(stream())
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert adapter_names(copied) == list(ADAPTERS)
    assert torch.equal(copied(stream()), wanted)


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("names", COMBINATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_saved_tensors_load_bit_for_bit_into_an_empty_stack(
    precision: Precision, names: tuple[AdapterName, ...], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source, target = adapted(precision, names), empty_stack(SHAPE, SPEC, precision)
    save_file(base_state(source), tmp_path / "base.safetensors")
    hold(target, load_file(tmp_path / "base.safetensors"))
    for name in names:
        with_adapters(target, (name,), seed=1)
        save_file(adapter_state(source, name), tmp_path / f"{name}.safetensors")
        load_adapter_state(target, name, load_file(tmp_path / f"{name}.safetensors"))
    assert torch.equal(source(stream()), target(stream()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_of_an_adapted_stack_is_saved_as_that_of_a_plain_one(precision: Precision) -> None:
    plain = new_stack(precision)
    assert list(base_state(adapted(precision))) == list(plain.state_dict())
    assert equal(base_state(adapted(precision)), plain.state_dict())


def test_adapters_are_saved_under_the_keys_of_peft() -> None:
    from peft import get_peft_model_state_dict

    stack = adapted("half")
    for name in ADAPTERS:
        peers = get_peft_model_state_dict(stack, adapter_name=name)  # pyright: ignore[reportArgumentType]
        assert equal(adapter_state(stack, name), peers)
    assert next(iter(adapter_state(stack, "stack"))) == "blocks.0.attention.q_proj.lora_A.weight"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_drawn_or_quantised_for_a_stack_that_is_loaded(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every storage type, also where 64 and 256 do not divide what they cut into blocks."""
    shape = SHAPE.model_copy(update={"d_model": 48, "d_ff": 80})
    source = Stack(shape, 2)
    convert_storage(source, precision)
    for library in ("_quantise_nf4", "_quantise_nvfp4"):
        monkeypatch.setattr(f"stackwise_core.model.precision.{library}", lambda weight: pytest.fail("quantised"))
    randomness = torch.get_rng_state()
    empty = empty_stack(shape, SPEC, precision)
    state = {name: (tensor.shape, tensor.dtype) for name, tensor in source.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == state
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    hold(empty, dict(source.state_dict()))
    assert torch.equal(torch.get_rng_state(), randomness)
    assert equal(empty.state_dict(), source.state_dict())
    assert not {t.data_ptr() for t in empty.state_dict().values()} & {
        t.data_ptr() for t in source.state_dict().values()
    }
    names = [name for name, parameter in source.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in empty.named_parameters() if parameter.requires_grad] == names
    x = torch.randn(2, 6, 48)
    assert torch.equal(empty(x), source(x))


def test_loading_refuses_other_keys_shapes_and_types_and_takes_nothing() -> None:
    stack, empty = adapted("nvfp4"), empty_stack(SHAPE, SPEC, "nvfp4")
    before = clones(stack.state_dict())
    key = "blocks.0.attention.q_proj.weight"
    other = base_state(adapted("nvfp4", seed=1))
    with pytest.raises(ValueError, match=f"missing: {key}; unknown: none"):
        hold(empty, {name: tensor for name, tensor in other.items() if name != key})
    with pytest.raises(ValueError, match="missing: none; unknown: more"):
        hold(empty, {**other, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{key} was saved as torch.float32 \[32, 16\] but is torch.uint8"):
        hold(empty, {**other, key: other[key].float()})
    with pytest.raises(ValueError, match=r"saved as torch.float32 \[2, 32\] but is .* \[4, 32\] here"):
        load_adapter_state(stack, "stack", adapter_state(stack, "progressive"))
    assert equal(stack.state_dict(), before)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_storage_changes_below_adapters_as_it_does_without(precision: Precision) -> None:
    """Freeze, convert: the adapters stay as they were trained, the base is what a plain stack becomes."""
    stack = adapted("full")
    adapters = {name: clones(adapter_state(stack, name)) for name in ADAPTERS}
    convert_storage(stack, precision)
    assert equal(base_state(stack), new_stack(precision).state_dict())
    assert all(equal(adapter_state(stack, name), adapters[name]) for name in ADAPTERS)
    assert {type(linear) for linear in base_linears(stack).values()} == {
        nn.Linear if STORAGE[precision] == "float32" else StoredLinear
    }
    assert torch.equal(stack(stream()), adapted(precision)(stream()))


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("names", COMBINATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_merged_stack_is_plain_and_computes_the_same(precision: Precision, names: tuple[AdapterName, ...]) -> None:
    stack = adapted(precision, names).eval()
    randomness = torch.random.get_rng_state()
    merged = merged_dense(stack)
    assert torch.equal(torch.random.get_rng_state(), randomness)
    wanted = stack(stream())
    assert (merged(stream()) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert merged.creation_index == 3
    assert not merged.training
    assert {name: (p.shape, p.dtype) for name, p in merged.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in new_stack().named_parameters()
    }
    assert not list(merged.buffers())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert adapter_names(merged) == []
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(stack(stream()), wanted)
    add_adapter(merged, "stack", rank=4, alpha=8.0, seed=1)
