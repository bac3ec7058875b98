"""Low-rank adapters on a stack (LoRA, Hu et al. 2021; over a quantised base: QLoRA, Dettmers et al. 2023).

A stack may carry two: `stack`, from its creation, and `progressive`, from when it became trunk. Both act on every
linear layer of every block, in float32. peft makes the layers; which are active and what trains is set here, because
peft deactivates the first adapter when a second is added, and freezes everything that is not an adapter.

Letters: R rank, I inputs and O outputs of a layer. Importing this module does not import peft, which takes seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from stackwise_core.config.stacks import AdapterSpec
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.blocks import Stack
from stackwise_core.model.precision import base_linears, dense_weight, silent_import
from stackwise_core.stages.stages import AdapterName

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTERS: tuple[AdapterName, ...] = ("stack", "progressive")
"""In the order in which their outputs are added, whichever came first."""


def add_adapter(stack: Stack, name: AdapterName, rank: int, alpha: float, seed: int) -> None:
    """Add an adapter to every linear layer of a stack, in place; the stack's output keeps its bits.

    A is drawn uniformly within +-1 / sqrt(I) from a generator with the given seed; B is zero. The adapter's output is
    multiplied by alpha / R; R is `rank`, or the narrowest side of a layer that is narrower. Afterwards every adapter is
    active, and the new parameters have `requires_grad`.
    """
    if name in adapter_names(stack):
        raise ConfigError([Fault("adapter", repr(name), f"stack {stack.creation_index} has one of this name already")])
    trainable = {id(parameter): parameter.requires_grad for parameter in stack.parameters()}
    with silent_import():
        from peft import LoraConfig, inject_adapter_in_model

    sides: dict[str, int] = {}
    for path, linear in sorted(base_linears(stack).items()):
        sides[path.removesuffix(".base_layer").rpartition(".")[2]] = min(linear.in_features, linear.out_features)
    narrow = {name: side for name, side in sides.items() if side < rank}
    config = LoraConfig(r=rank, lora_alpha=cast("int", alpha), target_modules=sorted(sides), rank_pattern=narrow)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, stack, name)
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted_layers(stack).values():
        layer.set_adapter([known for known in ADAPTERS if known in layer.lora_A])
        a_RI, b_OR = _matrices(layer, name)
        bound = 1 / math.sqrt(a_RI.shape[1])
        # peft follows the type of the base weight; A is drawn on the CPU so that it is the same on every device.
        a_RI.data = torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator).to(a_RI.device)
        b_OR.data = torch.zeros(b_OR.shape, device=b_OR.device)
    for parameter in stack.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), True))
    stack.train(stack.training)


def adapter_names(stack: Stack) -> list[AdapterName]:
    """Return the adapters a stack has, in the order in which they act."""
    layers = list(_adapted_layers(stack).values())
    return [name for name in ADAPTERS if layers and name in layers[0].lora_A]


def adapter_spec(stack: Stack, name: AdapterName) -> AdapterSpec:
    """Return rank and alpha of an adapter, as it was added."""
    layers = [layer for layer in _adapted_layers(stack).values() if name in layer.lora_A]
    return AdapterSpec(rank=max(layer.r[name] for layer in layers), alpha=layers[0].lora_alpha[name])


def adapter_parameters(stack: Stack, name: AdapterName | None = None) -> list[nn.Parameter]:
    """Return the parameters of one adapter, or of all."""
    layers = _adapted_layers(stack).values()
    names = adapter_names(stack) if name is None else (name,)
    return [matrix for layer in layers for each in names for matrix in _matrices(layer, each)]


def _adapted_layers(stack: Stack) -> dict[str, LoraLayer]:
    return {path: cast("LoraLayer", module) for path, module in stack.named_modules() if hasattr(module, "lora_A")}


def _matrices(layer: LoraLayer, name: AdapterName) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [R, I] and B [O, R] of an adapter in one layer."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    return cast("nn.Parameter", a.weight), cast("nn.Parameter", b.weight)


def adapter_state(stack: Stack, name: AdapterName) -> dict[str, Tensor]:
    """Return the live tensors of one adapter, as `blocks.0.attention.q_proj.lora_A.weight`, without its name."""
    state: dict[str, Tensor] = {}
    for path, layer in _adapted_layers(stack).items():
        a_RI, b_OR = _matrices(layer, name)
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = a_RI.detach(), b_OR.detach()
    return state


@torch.no_grad()
def load_adapter_state(stack: Stack, name: AdapterName, state: Mapping[str, Tensor]) -> None:
    """Copy a saved adapter into one of the same rank that was added before: all of it, or nothing if it differs."""
    targets = adapter_state(stack, name)
    check_same_kind(targets, state)
    for key, target in targets.items():
        target.copy_(state[key])


def base_state(stack: Stack) -> dict[str, Tensor]:
    """Return the live tensors of a stack without its adapters, under the keys it has without them."""
    state = stack.state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def check_same_kind(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a key, shape or dtype differs.

    `load_state_dict` would cast instead, and a cast of packed bits is nonsense.
    """
    wrong = sorted(targets.keys() ^ state.keys())
    if wrong:
        missing = ", ".join(key for key in wrong if key in targets) or "none"
        unknown = ", ".join(key for key in wrong if key in state) or "none"
        raise ValueError(f"the saved tensors are others; missing: {missing}; unknown: {unknown}")
    for key, target in targets.items():
        if (state[key].shape, state[key].dtype) != (target.shape, target.dtype):
            saved, here = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (state[key], target))
            raise ValueError(f"{key} was saved as {saved} but is {here} here")


@torch.no_grad()
def merged_dense(stack: Stack) -> Stack:
    """Return a new float32 stack of the same function: base dequantised, (alpha / R) B A of every adapter added.

    Merging into a quantised base instead would lose more than the adapters add.
    """
    kept = ("_norm.weight", ".bias", ".has_rope")
    state = {key: tensor.clone() for key, tensor in base_state(stack).items() if key.endswith(kept)}
    layers, names = _adapted_layers(stack), adapter_names(stack)
    for path, linear in base_linears(stack).items():
        plain = path.removesuffix(".base_layer")
        weight_OI = dense_weight(linear).clone()
        for name in names:
            a_RI, b_OR = _matrices(layers[plain], name)
            weight_OI += layers[plain].scaling[name] * (b_OR @ a_RI)
        state[f"{plain}.weight"] = weight_OI
    with torch.device("meta"):  # draws no random numbers for weights that are replaced
        merged = Stack(stack.shape, len(stack.blocks), stack.creation_index)
    merged.load_state_dict(state, assign=True)
    return merged.train(stack.training)
