"""Growing: what a copy is, what leaves the function alone, and counts against numel and closed forms."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import LoraOverride, Precision
from stackwise_core.errors import ConfigError
from stackwise_core.model.adapters import adapter_names, adapter_spec, merged_dense
from stackwise_core.model.blocks import Stack
from stackwise_core.model.growth_operators import freeze, grow_stack
from stackwise_core.model.precision import base_linears, convert_storage, count_parameters, storage_of
from stackwise_core.model.rack_builder import ProgressiveRackBuilder, create_stack_from_config
from stackwise_core.stages import costs
from stackwise_core.stages.resolve import ModelShape, resolve_shape
from stackwise_core.stages.stages import GrowthOperator, StageSpec, resolve_stage, resolve_stages
from support.growth import model_of
from support.runs import stage_model

SHAPE = ModelShape(vocab_size=264, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24, causal=False)


def tiny(**training: Any) -> StackWiseConfig:
    model = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "blocks_per_stack": 2}
    return StackWiseConfig.from_dict({"model": model, "training": training})


def perturbed(module: Any) -> Any:
    """Make every parameter, norms too, differ from how it was created."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def source_stack(n_blocks: int) -> Stack:
    return perturbed(grow_stack(SHAPE, n_blocks, 0, "random", 0))


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(weights(first), weights(second), strict=True))


def zeroed(stack: Stack) -> set[str]:
    return {name.split(".", 2)[2] for name, parameter in stack.named_parameters() if not parameter.count_nonzero()}


TOKENS = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- growth operators


@pytest.mark.parametrize(("n_source", "n_new"), [(2, 2), (3, 1), (3, 2), (2, 5), (1, 3)])
def test_copy_takes_the_first_blocks_or_repeats_them(n_source: int, n_new: int) -> None:
    source = source_stack(n_source)
    stack = grow_stack(SHAPE, n_new, 1, "copy", 0, [source])
    assert (len(stack.blocks), stack.creation_index) == (n_new, 1)
    for n, block in enumerate(stack.blocks):
        assert equal(block, source.blocks[n % n_source])
    x = torch.randn(2, 5, 16)
    if n_new == n_source:
        assert stack(x).equal(source(x))


def test_copies_share_no_storage_and_train() -> None:
    source = source_stack(2)
    freeze(source)
    before = [weight.clone() for weight in weights(source)]
    stack = grow_stack(SHAPE, 5, 1, "copy", 0, [source])
    storages = {weight.untyped_storage().data_ptr() for weight in (*weights(stack), *weights(source))}
    assert len(storages) == len(weights(stack)) + len(weights(source))
    assert all(parameter.requires_grad for parameter in stack.parameters())
    assert not any(parameter.requires_grad for parameter in source.parameters())
    perturbed(stack)
    assert all(a.equal(b) for a, b in zip(weights(source), before, strict=True))


@pytest.mark.parametrize("operator", ["zero", "copy_zero"])
@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_zero_forms_leave_the_logits_exactly_as_before(operator: GrowthOperator, n_blocks: int) -> None:
    builder = ProgressiveRackBuilder(tiny(new_stack_init=operator))
    builder.append_stack()
    rack = perturbed(builder.build_rack())
    before = rack(TOKENS)
    stack = builder.append_stack(n_blocks=n_blocks)
    assert rack(TOKENS).equal(before)
    assert zeroed(stack) == {"attention.o_proj.weight", "ffn.down_proj.weight"}
    assert all(parameter.requires_grad for parameter in stack.parameters())
    if operator == "copy_zero":  # all but the output projections are the source's
        for name, parameter in stack.blocks[0].named_parameters():
            same = parameter.equal(dict(builder.stacks[0].blocks[0].named_parameters())[name])
            assert same == (not name.endswith(("o_proj.weight", "down_proj.weight")))
    perturbed(stack)
    assert not rack(TOKENS).equal(before)


def test_random_depends_on_seed_and_index() -> None:
    def grown(operator: GrowthOperator, index: int, seed: int) -> Stack:
        torch.rand(1)  # the global generator plays no part
        return grow_stack(SHAPE, 2, index, operator, seed)

    assert equal(grown("random", 1, 0), grown("random", 1, 0))
    assert not equal(grown("random", 1, 0), grown("random", 2, 0))
    assert not equal(grown("random", 1, 0), grown("random", 1, 1))
    first, zero = grown("random", 1, 0), grown("zero", 1, 0)
    for name, parameter in first.named_parameters():
        expected = 0 * parameter if name.endswith(("o_proj.weight", "down_proj.weight")) else parameter
        assert dict(zero.named_parameters())[name].equal(expected)
    x = torch.randn(1, 4, 16)
    assert zero(x).equal(x)


def test_a_copy_needs_a_source() -> None:
    with pytest.raises(ConfigError, match=r"training\.new_stack_init: got 'copy'"):
        grow_stack(SHAPE, 2, 0, "copy", 0)


@pytest.mark.parametrize("operator", ["auto", "copy", "copy_zero", "random", "zero"])
def test_the_first_stack_is_random_and_auto_is_copy(operator: Any) -> None:
    builder = ProgressiveRackBuilder(tiny(new_stack_init=operator))
    first = builder.append_stack()
    assert equal(first, grow_stack(SHAPE, 2, 0, "random", 0))
    perturbed(first)
    second = builder.append_stack()
    assert equal(second, first) == (operator in ("auto", "copy"))
    assert bool(zeroed(second)) == operator.endswith("zero")


def test_embedding_and_head_depend_on_the_seed_alone() -> None:
    def embedding(seed: int, **dimensions: Any) -> Tensor:
        config = StackWiseConfig.from_dict({"run": {"seed": seed}})
        return ProgressiveRackBuilder(config, d_model=16, n_heads=2, **dimensions).build_rack().embedding.weight

    assert embedding(3).equal(embedding(3, blocks_per_stack=5))
    assert not embedding(3).equal(embedding(4))


# ---------------------------------------------------------------- the builder


def test_append_returns_the_stack_it_added() -> None:
    builder = ProgressiveRackBuilder(tiny())
    stacks = [builder.append_stack(), builder.append_stack(n_blocks=3)]
    assert [a is b for a, b in zip(builder.stacks, stacks, strict=True)] == [True, True]
    assert [stack.creation_index for stack in stacks] == [0, 1]
    assert [len(stack.blocks) for stack in stacks] == [2, 3]
    assert (builder.n_stacks, builder.n_trained) == (2, 0)
    assert builder.build_rack() is builder.build_rack()


def test_overrides_of_stacks_are_built() -> None:
    builder = ProgressiveRackBuilder(tiny(progressive={"stacks": [{}, {"n_blocks": 4}]}))
    assert [len(builder.append_stack().blocks) for _ in range(3)] == [2, 4, 2]


def test_more_than_max_stacks_is_an_error() -> None:
    builder = ProgressiveRackBuilder(tiny(progressive={"max_stacks": 2, "target_stacks": 2}))
    builder.append_stack()
    builder.append_stack()
    with pytest.raises(ConfigError, match=r"training\.progressive\.max_stacks: got 3; at most 2 stacks"):
        builder.append_stack()
    assert builder.n_stacks == 2


@pytest.mark.parametrize("precision", ["full", "half", "bfloat16", "nvfp4", "qlora"])
def test_a_stack_has_the_precision_it_was_added_with(precision: Precision) -> None:
    """What a stack of NF4 trains are its adapters, so it has one; the first stack is quantised after its stage."""
    builder = ProgressiveRackBuilder(tiny(), n_kv_heads=2, d_ff=32)
    builder.append_stack(precision="full")
    stack = builder.append_stack(precision=precision)
    assert [entry["precision"] for entry in builder.get_rack_info()["stacks"]] == ["full", precision]
    assert adapter_names(stack) == (["stack"] if precision == "qlora" else [])
    stored = {storage_of(linear) for linear in base_linears(stack).values()}
    assert stored == {"nf4" if precision == "qlora" else "float32"}


@pytest.mark.parametrize(
    ("precision", "refused"),
    [
        ("nvfp4", r"model\.d_ff: got 24; stack 0 is NVFP4: 16 must divide it"),
        ("int4", "precision: got 'int4'; 'full' or 'half' or 'bfloat16' or 'nvfp4' or 'qlora' is expected"),
    ],
)
def test_precisions_that_do_not_fit_are_refused(precision: Any, refused: str) -> None:
    builder = ProgressiveRackBuilder(tiny())
    with pytest.raises(ConfigError, match=refused):
        builder.append_stack(precision=precision)
    assert builder.n_stacks == 0
    builder.append_stack(precision="full")


def test_plain_dimensions_are_a_configuration() -> None:
    dimensions: dict[str, Any] = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24, "blocks_per_stack": 2}
    builder, other = ProgressiveRackBuilder(**dimensions), ProgressiveRackBuilder(tiny())
    for grown in (builder, other):
        grown.append_stack()
        grown.append_stack()
    assert builder.build_rack().shape == other.build_rack().shape
    assert equal(builder.build_rack(), other.build_rack())
    given = StackWiseConfig()
    assert ProgressiveRackBuilder(given, d_model=32).config.model.d_model == 32
    assert given.model.d_model == 128  # the caller's own is left alone
    with pytest.raises(ConfigError, match=r"width: got 16; there is no such dimension; known: vocab_size, d_model"):
        ProgressiveRackBuilder(width=16)
    with pytest.raises(ConfigError, match=r"model\.n_heads"):
        ProgressiveRackBuilder(d_model=16, n_heads=3)


def test_a_dimension_out_of_range_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="d_model"):
        ProgressiveRackBuilder(d_model=-1)


def test_a_stack_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_blocks"):
        ProgressiveRackBuilder(tiny()).append_stack(n_blocks=-1)


def test_builder_validates_on_entry() -> None:
    config = tiny()
    config.training.loss_weighting = "elbo"
    with pytest.raises(ConfigError, match="loss_weighting: got 'elbo'; needs"):
        ProgressiveRackBuilder(config)
    with pytest.raises(ConfigError, match="loss_weighting"):
        create_stack_from_config(config)
    config.training.loss_weighting = "mean"
    assert ProgressiveRackBuilder(config).n_stacks == 0


def test_create_stack_from_config_is_the_random_stack() -> None:
    config = tiny(progressive={"stacks": [{}, {"n_blocks": 3}]})
    assert equal(create_stack_from_config(config, 1), grow_stack(SHAPE, 3, 1, "random", 0))
    stack = create_stack_from_config(stack_id=2, n_blocks=4, config=config, precision="half")
    assert equal(stack, grow_stack(SHAPE, 4, 2, "random", 0))
    assert (stack.creation_index, stack.precision) == (2, "half")
    assert len(config.training.progressive.stacks) == 2  # the caller's own is left alone


def test_the_builders_own_mode_and_precision_hold_for_whatever_is_added() -> None:
    builder = ProgressiveRackBuilder(config=tiny(), building_mode="prepend", default_precision="bfloat16")
    builder.add_stack()
    builder.append_stack()
    builder.prepend_stack(precision="half")
    builder.add_stack()
    assert [stack.creation_index for stack in builder.stacks] == [3, 2, 0, 1]
    assert [builder.stack(index).precision for index in range(4)] == ["bfloat16", "bfloat16", "half", "bfloat16"]
    entry = tiny(progressive={"stacks": [{}, {"precision": "half", "mode": "append"}]})  # says more than a default
    builder = ProgressiveRackBuilder(entry, building_mode="prepend", default_precision="bfloat16")
    assert [builder.add_stack().precision for _ in range(2)] == ["bfloat16", "half"]
    assert [stack.creation_index for stack in builder.stacks] == [0, 1]


def test_a_configuration_that_says_another_mode_or_precision_is_refused() -> None:
    said = tiny(progressive={"building_mode": "append", "new_stack_precision": "full"})
    builder = ProgressiveRackBuilder(said, building_mode="prepend", default_precision="half")
    mode, precision = "building_mode: got 'append'; .*'prepend'", "new_stack_precision: got 'full'; .*'half'"
    with pytest.raises(ConfigError, match=f"{mode}.*make the two equal.*\n.*{precision}"):
        builder.add_stack()
    with pytest.raises(ConfigError, match=precision) as refused:
        builder.append_stack()  # says where, but not of which precision
    assert len(refused.value.faults) == 1
    assert builder.append_stack(precision="bfloat16").precision == "bfloat16"
    said.training.progressive.building_mode, said.training.progressive.new_stack_precision = "prepend", "half"
    assert builder.add_stack().precision == "half"


@pytest.mark.parametrize("dimensions", [{}, {"d_model": 32}])
def test_later_edits_of_the_configuration_are_seen(dimensions: dict[str, Any]) -> None:
    config = tiny()
    builder = ProgressiveRackBuilder(config=config, **dimensions)
    config.training.progressive.new_stack_precision = "bfloat16"
    config.training.progressive.qlora_enabled, config.training.progressive.qlora_rank = True, 2
    stack = builder.append_stack()
    assert (stack.precision, adapter_names(stack)) == ("bfloat16", ["stack"])
    assert builder.config.training is config.training
    assert builder.build_rack().shape.d_model == dimensions.get("d_model", 16)
    assert config.model.d_model == 16  # the caller's own is left alone


# ---------------------------------------------------------------- freezing and counting


def trainable(module: nn.Module) -> set[bool]:
    return {parameter.requires_grad for parameter in module.parameters()}


def begin_stage(builder: ProgressiveRackBuilder, index: int) -> StageSpec:
    """Have a stage ready to train: the builder freezes all of the rack, the model lets its part train."""
    spec = resolve_stage(builder.as_built(builder.config), index)
    builder.prepare_stage(spec)
    assert trainable(builder.build_rack()) == {False}
    stage_model(builder.build_rack(), index)
    return spec


def test_freezing_the_trunk_leaves_the_newest() -> None:
    builder = ProgressiveRackBuilder(tiny())
    for _ in range(3):
        builder.append_stack()
    builder.freeze_trunk()
    assert [trainable(stack) for stack in builder.stacks] == [{False}, {False}, {True}]
    assert [stack.training for stack in builder.stacks] == [False, False, True]


def test_a_stage_freezes_what_it_does_not_train() -> None:
    builder = ProgressiveRackBuilder(tiny())
    for _ in range(3):
        builder.append_stack()
    rack = builder.build_rack()
    begin_stage(builder, 0)
    assert rack.tied
    assert trainable(rack.embedding) == trainable(rack.head) == {True}
    assert [trainable(stack) for stack in builder.stacks] == [{True}, {False}, {False}]
    begin_stage(builder, 1)
    assert not rack.tied
    assert trainable(rack.embedding) == {False}
    assert trainable(rack.head) == {True}
    assert [trainable(stack) for stack in builder.stacks] == [{False}, {True}, {False}]


def test_a_stage_thaws_what_it_trains() -> None:
    builder = ProgressiveRackBuilder(tiny())
    builder.append_stack()
    builder.append_stack()
    builder.freeze_trunk()
    begin_stage(builder, 0)
    assert trainable(builder.stacks[0]) == {True}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("blocks", [[2], [2, 1], [1, 3, 2]])
def test_counts_equal_numel_and_the_closed_forms(blocks: list[int], tie: bool) -> None:
    sizes = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_ff": 37, "vocab_size": 271}
    dimensions: dict[str, Any] = {**sizes, "tie_embeddings": tie}
    builder = ProgressiveRackBuilder(**dimensions)
    rack, shape = builder.build_rack(), resolve_shape(builder.config)
    for index, n_blocks in enumerate(blocks):
        builder.append_stack(n_blocks=n_blocks)
        spec = begin_stage(builder, index)
        trained = {p.data_ptr(): p.numel() for p in rack.parameters() if p.requires_grad}
        assert costs.trainable_parameters(shape, spec) == sum(trained.values())
    info = builder.get_rack_info()
    distinct = {parameter.data_ptr(): parameter.numel() for parameter in rack.parameters()}
    assert info["parameters"] == sum(distinct.values()) == costs.rack_parameters(shape, spec)
    assert info["trainable_parameters"] == costs.trainable_parameters(shape, spec)
    assert (info["n_stacks"], info["n_blocks"]) == (len(blocks), sum(blocks))
    for stack, entry in zip(builder.stacks, info["stacks"], strict=True):
        assert entry["parameters"] == sum(weight.numel() for weight in weights(stack))
        assert entry["parameters"] == costs.base_parameters(shape, entry["n_blocks"])
    newest = [entry["trainable_parameters"] for entry in info["stacks"]]
    assert newest == [0] * (len(blocks) - 1) + [info["stacks"][-1]["parameters"]]
    builder.finish_stage(resolve_stage(builder.as_built(builder.config), 0).anatomy)
    info = builder.get_rack_info()
    assert [entry["trained"] for entry in info["stacks"]] == [n == 0 for n in range(len(blocks))]
    assert info["trainable_parameters"] == 0


def independent_count(stack: Stack) -> tuple[int, int]:
    """Count the weights that a stack computes with, from its dense form, and those of its adapters."""
    dense = sum(weight.numel() for weight in weights(merged_dense(stack)))
    return dense, sum(weight.numel() for name, weight in stack.named_parameters() if "lora" in name)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("time", [None, "sinusoidal", "learned"])
def test_a_weight_counts_once_however_it_is_stored(precision: Precision, tie: bool, time: str | None) -> None:
    """In every precision, with grouped queries, both adapters, tied matrices and a time embedding."""
    config = StackWiseConfig()
    for name, value in {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48, "vocab_size": 271}.items():
        setattr(config.model, name, value)
    config.model.tie_embeddings = tie
    growth = config.training.progressive
    growth.qlora_enabled, growth.qlora_rank, growth.progressive_qlora, growth.progressive_qlora_rank = True, 3, True, 2
    if time:
        growth.time_interpretation, growth.time_embedding_dim, growth.num_time_steps = "input", 8, 5
        growth.time_encoding_type = time
    builder = ProgressiveRackBuilder(config)
    shape = resolve_shape(config)
    times = {None: 0, "sinusoidal": 8 * 32, "learned": 8 * 32 + 5 * 8}[time]
    for index, n_blocks in enumerate([2, 1]):
        builder.append_stack(n_blocks=n_blocks, precision=precision)
        built = builder.as_built(config)
        spec, model = resolve_stages(built)[index], model_of(builder, built, index)
        counted = count_parameters(model)["trainable_parameters"]
        assert counted == costs.trainable_parameters(shape, spec) == builder.get_rack_info()["trainable_parameters"]
        for stack in builder.stacks:
            convert_storage(stack, precision)
        info, stacks = builder.get_rack_info(), [independent_count(stack) for stack in builder.stacks]
        assert info["parameters"] == costs.rack_parameters(shape, spec)
        matrices = 1 if tie and index == 0 else 2
        assert info["parameters"] == sum(map(sum, stacks)) + matrices * 271 * 32 + 32 + times
        assert info["adapter_parameters"] == sum(adapters for _, adapters in stacks)
        for entry, count, one in zip(info["stacks"], stacks, spec.stacks, strict=True):
            assert (entry["parameters"], entry["adapter_parameters"]) == (sum(count), count[1])
            assert entry["parameters"] == costs.stack_parameters(shape, one)
            assert entry["adapter_parameters"] == costs.adapter_parameters(shape, one)
    assert info["stacks"][0]["adapter_parameters"] == 2 * (3 + 2) * (7 * 32 + 2 * 32 + 2 * 16 + 3 * 48)


def test_a_stack_made_alone_is_checked_as_the_rack_would_check_it() -> None:
    """Also past the target: its rank grows with its creation index."""
    ranks = {"qlora_strategy": "progressive", "qlora_rank_pattern": "increasing", "qlora_rank": 4}
    config = StackWiseConfig.from_dict({"training": {"progressive": {"qlora_enabled": True, **ranks}}})
    ranks = [adapter_spec(create_stack_from_config(config, index), "stack").rank for index in (1, 5, 6, 10)]
    assert ranks == [8, 128, 128, 128]
    growth = config.training.progressive
    growth.qlora_strategy = "variable"
    growth.qlora_configs = {index: LoraOverride(rank=1, alpha=1.0) for index in range(3)}
    with pytest.raises(ConfigError, match="stacks 3, 4, 5, 6 and 4 more are without an entry"):
        create_stack_from_config(config, 10)


def test_what_the_rack_took_instead_is_in_its_description() -> None:
    """Of the stacks that it has: more were configured, and one of them was given an adapter by hand."""
    growth = {"qlora_rank": 24, "qlora_strategy": "progressive", "qlora_rank_pattern": "increasing", "max_stacks": 9}
    model = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48}
    builder = ProgressiveRackBuilder(StackWiseConfig.from_dict({"model": model, "training": {"progressive": growth}}))
    unused = "not used: qlora_strategy, qlora_rank, qlora_rank_pattern (qlora_enabled: false)"
    assert builder.get_rack_info()["notes"] == [unused]
    builder.append_stack()
    builder.append_stack(precision="qlora")
    kv = "taken: qlora_rank 16 instead of 48 for stack 1 in layers of width 16 (model.n_kv_heads: 1)"
    whole = "taken: qlora_rank 32 instead of 48 for stack 1 in layers of width 32 (model.d_model: 32)"
    assert builder.get_rack_info()["notes"] == [whole, kv]
