"""Residual branches times 1 / sqrt(2 L): against blocks written out, transformers, and racks that grow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from stackwise_core.interop.hf_export import export_rack
from stackwise_core.model.adapters import add_adapter
from stackwise_core.model.blocks import Block, Stack, initialise
from stackwise_core.model.growth_operators import new_rack
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.rack import Rack
from stackwise_core.model.rack_builder import ProgressiveRackBuilder, create_stack_from_config
from stackwise_core.model.rotary import rotary_table
from stackwise_core.stages.adopt import check_adopting
from stackwise_core.stages.identity import AdoptedRecipe
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.stages import StackSpec
from stackwise_core.training.trainer import ProgressiveTrainer
from support.configurations import CORPUS, configuration, ids
from support.exports import greedy, opened
from support.racks import SHAPE, TOKENS
from support.training import loader_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")

G = "training.progressive."
DEEP = {"model.residual_scale": "depth", f"{G}max_stacks": 5}
OLMO2 = {"qk_norm": True, "norm_outputs": True}


def rack_of(**changes: Any) -> Rack:
    """Return a random rack of stacks of one and two blocks whose norms differ from one."""
    shape = ModelShape.model_validate({**SHAPE.model_dump(), "residual_blocks": 6, **changes})
    rack = new_rack(shape, seed=1)
    for index, count in enumerate((1, 2)):
        stack = Stack(shape, count, index)
        initialise(stack, index)
        rack.stacks.append(stack)
    generator = torch.Generator().manual_seed(2)
    for parameter in rack.parameters():
        parameter.requires_grad_(False)
        parameter.normal_(1.0, 0.2, generator=generator) if parameter.dim() == 1 else parameter.mul_(8.0)
    return rack.eval()


@pytest.mark.parametrize("changes", [{}, OLMO2], ids=["llama", "olmo2"])
def test_each_branch_is_scaled_before_it_is_added(changes: dict[str, Any]) -> None:
    block = rack_of(**changes).stacks[1].blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 5, SHAPE.d_model, generator=torch.Generator().manual_seed(1))
    rotary, scale = rotary_table(block.attention.shape, 5, x.device), 1 / math.sqrt(12)

    def norm(weight: Tensor, y: Tensor) -> Tensor:
        return F.rms_norm(y, (SHAPE.d_model,), weight, SHAPE.norm_eps)

    of_attention, of_ffn = block.attention_norm.weight, block.ffn_norm.weight
    if changes:
        middle = x + scale * norm(of_attention, block.attention(x, rotary))
        expected = middle + scale * norm(of_ffn, block.ffn(middle))
    else:
        middle = x + scale * block.attention(norm(of_attention, x), rotary)
        expected = middle + scale * block.ffn(norm(of_ffn, middle))
    torch.testing.assert_close(block(x, rotary), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("architecture", "changes"), [("Llama", {}), ("Olmo2", OLMO2)])
def test_an_export_needs_no_scale(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    """It is folded into the weights: what rounding changes is 1e-6 of the largest logit, a scale left out 1e-1."""
    rack = rack_of(**changes)
    stack = rack.stacks[0]
    assert isinstance(stack, Stack)
    convert_storage(stack, "qlora")
    add_adapter(stack, "stack", 2, 4.0, seed=1)
    for name, parameter in rack.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    rack.requires_grad_(False)
    exported = export_rack(rack, tmp_path / "out")
    model = opened(exported.folder)
    assert exported.architecture == f"{architecture}ForCausalLM"
    with torch.no_grad():
        wanted, logits = rack(TOKENS), model(TOKENS).logits
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    expected = greedy(rack, TOKENS, 6)
    assert model.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None).equal(expected)
    found = rack.generate(TOKENS, 6, temperature=0.0)  # by a cache of keys and values
    assert torch.tensor(found).equal(expected[:, TOKENS.shape[1] :])
    if architecture == "Llama":
        export_rack(rack, tmp_path / "gguf", format="gguf")
        with torch.no_grad():
            logits = opened(tmp_path / "gguf", gguf_file="model.gguf")(TOKENS).logits
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 10),
        ({f"{G}stacks": [{}, {"n_blocks": 4}]}, 12),
        ({f"{G}max_stacks": 3, f"{G}stacks": [{"n_blocks": 1}] * 4}, 3),
        ({"model.residual_blocks": 7}, 7),
    ],
)
def test_the_depth_is_that_of_the_deepest_rack(changes: dict[str, Any], blocks: int) -> None:
    shape = resolve_shape(configuration({**DEEP, **changes}))
    assert (shape.residual_blocks, shape.residual_scale) == (blocks, pytest.approx((2 * blocks) ** -0.5))


def test_raising_the_target_changes_no_id() -> None:
    def planned(**changes: Any) -> dict[str, str]:
        given = {f"{G}{key}": value for key, value in changes.items()}
        return ids(plan_run(configuration({**DEEP, **given}), CORPUS, 10**6))

    two, four = planned(target_stacks=2), planned(target_stacks=4)
    assert {name for name in two if two[name] != four[name]} == {"validation-1"}  # which compares the store
    assert planned(target_stacks=2, max_stacks=6)["build-0"] != two["build-0"]
    kept = configuration({**DEEP, f"{G}target_stacks": 2, f"{G}max_stacks": 6, "model.residual_blocks": 10})
    assert ids(plan_run(kept, CORPUS, 10**6)) == two


def deep(**model: Any) -> StackWiseConfig:
    config = tiny("clm")
    config.model.residual_scale = "depth"
    for key, value in model.items():
        setattr(config.model, key, value)
    return config


def test_a_builder_keeps_the_scale_that_it_began_with() -> None:
    config = deep()
    builder = ProgressiveRackBuilder(config)
    builder.append_stack(n_blocks=5)
    assert builder.append_stack().shape.residual_blocks == 4  # as configured, whatever was added by hand
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), 3)
    config.training.progressive.max_stacks = 9
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), 4)
    assert {stack.shape.residual_blocks for stack in builder.stacks} == {4}
    assert create_stack_from_config(deep(), 1, n_blocks=6).shape.residual_blocks == 4
    by_sizes = ProgressiveRackBuilder(**config.model.model_dump(include={"d_model", "n_heads"}), residual_scale="depth")
    assert by_sizes.build_rack().shape.residual_blocks == 24
    ProgressiveTrainer(deep()).train_progressively(
        follower := ProgressiveRackBuilder(**deep().model.model_dump(include={"d_model", "n_heads"})), loader_of(), 1
    )
    assert follower.build_rack().shape.residual_blocks == 4


def test_a_saved_rack_carries_its_scale(tmp_path: Path) -> None:
    config = deep()
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), 2)
    builder.save(tmp_path / "builder")
    rack = builder.build_rack()
    rack.save(tmp_path / "rack")
    tokens = loader_of()[0]
    for loaded in (Rack.load(tmp_path / "rack"), ProgressiveRackBuilder.load(tmp_path / "builder").build_rack()):
        assert loaded.shape.residual_blocks == 4
        assert loaded(tokens).equal(rack(tokens))
    again = ProgressiveRackBuilder.load(tmp_path / "builder")
    for each in (builder, again):
        ProgressiveTrainer(config).train_progressively(each, loader_of(), 3)
    assert again.digests() == builder.digests()
    with pytest.raises(ConfigError, match=r"model\.residual_scale: got one; the rack is trained .* depth for 4 blocks"):
        ProgressiveRackBuilder.load(tmp_path / "rack", tiny("clm"))


def test_a_trained_and_an_imported_rack_keep_their_scale() -> None:
    config = tiny("clm")
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, loader_of(), 1)
    with pytest.raises(ConfigError, match=r"model\.residual_scale: got 'depth'; the rack was built with one"):
        ProgressiveTrainer(deep()).train_progressively(builder, loader_of(), 2)
    stack = StackSpec(index=0, n_blocks=1, precision="full", adapters={})
    imported = AdoptedRecipe(shape=SHAPE, mode="append", stack=stack, files={}, rack="", family="Llama")
    config = configuration({"model.from": "smol", "model.residual_scale": "depth", f"{G}training_objective": "clm"})
    with pytest.raises(ConfigError, match=r"model\.residual_scale: got 'depth'; the model of run smol has 'one'"):
        check_adopting(config, [imported])
