"""The block is that of every family: against transformers, bit for bit, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core import ProgressiveRackBuilder
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from stackwise_core.interop.families import FAMILIES, Family
from stackwise_core.model.adapters import add_adapter, merged_dense
from stackwise_core.model.blocks import Stack
from stackwise_core.model.growth_operators import grow_stack, new_stack
from stackwise_core.model.precision import convert_storage, count_parameters, dense_weight, held_dense
from stackwise_core.model.rotary import rotary_table
from stackwise_core.stages.adopt import adopting
from stackwise_core.stages.costs import base_parameters, n_adapter_parameters, stack_flops
from stackwise_core.stages.identity import AdoptedRecipe, BuildRecipe
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.stages import StackSpec
from support.checkpoints import ROPES, as_rack, reference_model
from support.configurations import faults_of

FAMILY = {family.name: family for family in FAMILIES}
PACKED = ("bfloat16", "nvfp4", "qlora")
TOKENS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
QWEN = {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "causal": True}
BIASED, NORMED = ModelShape(**QWEN, qkv_bias=True), ModelShape(**QWEN, qk_norm=True, head_dim=16)
AFTER = ModelShape(**QWEN, qk_norm=True, norm_outputs=True)
MIXED = ModelShape(**QWEN, no_rope_interval=2)
SHAPES = {"biases": BIASED, "norms": NORMED, "norms of outputs": AFTER, "some without RoPE": MIXED}


def shape_of(family: Family, rope: dict[str, Any], **changes: Any) -> ModelShape:
    """The shape of `reference_model`, said by the keys of a configuration."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    model = {
        **{key: value for key, value in QWEN.items() if key != "causal"},
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "norm_outputs": family.norm_outputs,
        "no_rope_interval": 4 if family.no_rope else 0,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"kind": rope["rope_type"], **scaling} if scaling else {},
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "vocab_size": 96,
        **changes,
    }
    clm = {"progressive": {"training_objective": "clm"}}
    return resolve_shape(StackWiseConfig(model=model, training=clm))  # pyright: ignore[reportArgumentType]


QUICK = [(name, rope) for name in FAMILY for rope in ROPES if name == "Llama" or rope == "default"]
SLOW = [(name, rope) for name in FAMILY for rope in ROPES if (name, rope) not in QUICK]


@pytest.mark.parametrize(("name", "rope"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
@torch.no_grad()
def test_logits_and_boundaries_have_the_bits_of_transformers(name: str, rope: str) -> None:
    family = FAMILY[name]
    heads = {"head_dim": 16} if family.name == "Qwen3" else {}
    model = reference_model(family, rope_parameters=dict(ROPES[rope]), **heads)
    rack = as_rack(shape_of(family, ROPES[rope], **heads), model)
    theirs = model(TOKENS, output_hidden_states=True)
    assert torch.equal(rack(TOKENS), theirs.logits)
    for depth in range(3):
        assert torch.equal(rack.hidden(TOKENS, depth), theirs.hidden_states[depth])


# ---------------------------------------------------------------- biases and norms, wherever stacks are handled


def grown(shape: ModelShape, operator: Any, source: Stack | None = None) -> Stack:
    return grow_stack(shape, 2, 1, operator, 3, [source])


def randomised(shape: ModelShape) -> Stack:
    stack = grown(shape, "random")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return stack


def stream() -> torch.Tensor:
    return torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_growth_operators_begin_with_zero_biases_or_with_a_copy_and_an_identity_is_one(shape: ModelShape) -> None:
    random, source = grown(shape, "random"), randomised(shape)
    again = grown(shape, "random")
    assert all(torch.equal(a, b) for a, b in zip(random.parameters(), again.parameters(), strict=True))
    starts = {name: p for name, p in random.named_parameters() if p.dim() == 1}
    assert all((p == (1.0 if "norm" in name else 0.0)).all() for name, p in starts.items())
    copied = grown(shape, "copy", source)
    assert torch.equal(copied(stream()), source(stream()))
    for operator in ("zero", "copy_zero"):
        assert torch.equal(grown(shape, operator, source)(stream()), stream())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("precision", ["half", *(pytest.param(p, marks=pytest.mark.slow) for p in PACKED)])
@torch.no_grad()
def test_only_matrices_are_quantised(shape: ModelShape, precision: Any) -> None:
    whole, stack = randomised(shape), randomised(shape)
    convert_storage(stack, precision)
    count = count_parameters(stack)["parameters"]
    assert count == base_parameters(shape, 2) == sum(p.numel() for p in whole.parameters())
    state = stack.state_dict()
    for name, tensor in whole.state_dict().items():
        assert name.endswith("_proj.weight") or torch.equal(state[name], tensor)
    dense = randomised(shape)
    for path, module in stack.named_modules():
        if path.endswith("_proj"):
            dense.get_submodule(path).weight.copy_(dense_weight(module))  # pyright: ignore
    assert torch.equal(stack(stream()), dense(stream()))
    with held_dense(stack, torch.float32):
        assert torch.equal(stack(stream()), dense(stream()))
    assert torch.equal(merged_dense(stack)(stream()), dense(stream()))
    convert_storage(stack, "full")
    assert {name for name, _ in stack.named_parameters()} == {name for name, _ in whole.named_parameters()}


@torch.no_grad()
def test_adapters_act_beside_biases_and_merge() -> None:
    stack = randomised(BIASED)
    before = stack(stream())
    add_adapter(stack, "stack", 4, 8.0, seed=1)
    assert torch.equal(stack(stream()), before)
    for name, parameter in stack.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(6))
    assert not torch.allclose(stack(stream()), before)
    torch.testing.assert_close(merged_dense(stack)(stream()), stack(stream()), rtol=1e-4, atol=1e-5)
    assert count_parameters(stack)["adapter_parameters"] == n_adapter_parameters(BIASED, 2, 4)


def test_a_trained_stack_trains_its_biases_and_norms() -> None:
    for shape in SHAPES.values():
        stack = randomised(shape)
        stack(stream()).square().sum().backward()
        grads = {name: p.grad for name, p in stack.named_parameters() if p.dim() == 1}
        # A bias on keys adds the same to all scores of a query before its rotation turns it: small, but not nothing.
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_a_copied_block_has_rope_where_its_source_has_it_and_of_random_ones_each_nth_has_none() -> None:
    def of(stack: Stack) -> list[bool]:
        return [bool(block.attention.has_rope) for block in stack.blocks]  # pyright: ignore

    source = grow_stack(MIXED, 4, 0, "random", 3)
    assert of(source) == [True, False, True, False]
    source.blocks = source.blocks[1:]
    assert of(grow_stack(MIXED, 5, 1, "copy_zero", 3, [source])) == [False, True, False, False, True]
    turned, plain = stream(), randomised(MIXED).blocks[1].attention  # pyright: ignore
    order = torch.cat([turned.flip(1)[:, 1:], turned[:, -1:]], dim=1)
    table = rotary_table(MIXED, 8, turned.device)  # without RoPE, the last position asks who is there, not where
    torch.testing.assert_close(plain(turned, table)[:, -1], plain(order, table)[:, -1], rtol=0, atol=1e-5)


def test_wide_heads_are_counted() -> None:
    spec = StackSpec(index=0, n_blocks=2, precision="full", adapters={})
    stack = new_stack(NORMED, spec, "random", 0)
    assert base_parameters(NORMED, 2) == sum(p.numel() for p in stack.parameters())
    matrices = sum(p.numel() for p in stack.parameters() if p.dim() > 1)
    assert stack_flops(NORMED, 2, 8) == 2 * 8 * matrices + 2 * (8 * 2.0 * 8 * 64)  # half the scores of 4 heads of 16


# ---------------------------------------------------------------- keys, ids and records


def test_a_default_is_neither_in_an_id_nor_in_a_record() -> None:
    plain = ModelShape(**QWEN)
    for shape in (plain, ModelShape(**QWEN, head_dim=8), ModelShape(**QWEN, qk_norm=False, rope_scaling=None)):
        assert shape == plain
        newer = {"head_dim", "qkv_bias", "qk_norm", "rope_scaling", "norm_outputs", "no_rope_interval"}
        newer |= {"residual_blocks"}
        assert not newer & shape.model_dump().keys()
        assert ModelShape.model_validate_json(shape.model_dump_json()) == shape
    build = BuildRecipe(shape=plain, index=0, n_blocks=1, operator="random", seed=0)
    assert build.dump()["shape"] == QWEN
    assert build.model_copy(update={"shape": NORMED}).dump()["shape"] == {**QWEN, "qk_norm": True, "head_dim": 16}


SCALED = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}


def test_the_keys_of_a_block_survive_yaml_and_are_taken_from_an_adopted_rack() -> None:
    said = {"head_dim": 64, "qkv_bias": True, "qk_norm": True, "norm_outputs": True, "no_rope_interval": 2}
    said |= {"rope_scaling": SCALED, "residual_scale": "depth", "residual_blocks": 8}
    config = StackWiseConfig.from_dict({"model": said})
    assert resolve_shape(config).head_dim == 64
    again = StackWiseConfig.read_unchecked(Path(__file__), config.to_yaml().encode())
    assert again == config
    shape = resolve_shape(config)
    recipe = AdoptedRecipe(
        shape=shape,
        mode="append",
        stack=StackSpec(index=0, n_blocks=1, precision="full", adapters={}),
        files={},
        rack="",
    )
    assert resolve_shape(adopting(StackWiseConfig(), [recipe])) == shape


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"head_dim": 7}, "model.head_dim: got 7; RoPE turns pairs of channels and needs an even number"),
        ({"norm_outputs": True}, "stack 1 is NF4 and train adapters only: norms of outputs, which copy_zero zeroes"),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "'linear', 'llama3' or 'yarn'"),
        ({"rope_scaling": {**SCALED, "low_freq_factor": 4.0}}, "must be below high_freq_factor = 4.0"),
        ({"rope_scaling": {**SCALED, "kind": "yarn", "beta_fast": 1.0}}, "must be below beta_fast = 1.0"),
    ],
)
def test_what_no_block_can_do_is_refused_with_its_key(values: dict[str, Any], told: str) -> None:
    growth = {"target_stacks": 2, "new_stack_precision": "qlora"} if "norm_outputs" in values else {}
    said = {"new_stack_init": "copy_zero", "progressive": growth}
    (fault,) = faults_of({"model": values, "training": said})
    assert told in str(fault)


@pytest.mark.parametrize("kind", ["none", "linear", "yarn"])
def test_numbers_of_another_kind_of_stretching_are_notes(kind: str) -> None:
    of_llama3 = {"kind": kind, "factor": 1.0 if kind == "none" else 2.0, "low_freq_factor": 9.0}
    config = StackWiseConfig.from_dict({"model": {"rope_scaling": of_llama3}})
    shape = resolve_shape(config).rope_scaling
    assert shape is None or shape.low_freq_factor == 1.0  # it does not enter what is trained


def test_wide_heads_may_have_any_number_and_nvfp4_names_their_width() -> None:
    StackWiseConfig.from_dict({"model": {"d_model": 64, "n_heads": 3, "head_dim": 32}})
    with pytest.raises(ConfigError, match=r"model\.head_dim: .*16 must divide the layers of width 120"):
        StackWiseConfig.from_dict(
            {
                "model": {"d_model": 64, "n_heads": 3, "head_dim": 40},
                "training": {"progressive": {"new_stack_precision": "nvfp4"}},
            }
        )


def test_a_builder_that_was_saved_goes_on_with_its_block(tmp_path: Path) -> None:
    config = StackWiseConfig.from_dict({"model": {"d_model": 32, "qkv_bias": True, "rope_scaling": SCALED}})
    for builder in (ProgressiveRackBuilder(config), ProgressiveRackBuilder(d_model=32, rope_scaling=SCALED)):
        builder.append_stack()
        builder.save(tmp_path / "rack")
        again = ProgressiveRackBuilder.load(tmp_path / "rack")
        again.append_stack()
        assert again.build_rack().shape == builder.build_rack().shape
        assert again.build_rack().shape.rope_scaling == config.model.rope_scaling
