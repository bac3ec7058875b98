"""A builder and a trainer of different configurations: what the trainer's says holds, or is refused at the call."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from stackwise_core.model.adapters import adapter_names, adapter_parameters
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.training.trainer import ProgressiveTrainer
from support.training import loader_of, same_bits, weights
from support.training import tiny as tiny_of

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

SIZES: dict[str, Any] = {"vocab_size": 264, "d_model": 16, "n_heads": 2, "d_ff": 24}
"""What the document gives a builder; `tiny` has one key and value head besides."""
LOADER = loader_of()
CUSTOM = [{"input_ids": tokens, "targets": tokens.roll(-1, 1)} for tokens in LOADER]


def tiny(objective: str = "mlm", **training: Any) -> StackWiseConfig:
    return tiny_of(objective, **{"steps_per_stack": 2, **training})


def sees_ahead(builder: ProgressiveRackBuilder) -> bool:
    """Whether the last token changes the logits before it."""
    rack, tokens = builder.build_rack(), LOADER[0][:1]
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    with torch.no_grad():
        return not rack(tokens)[:, :-1].equal(rack(changed)[:, :-1])


def trained(config: StackWiseConfig, target: int = 1) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, target)
    return builder


# ---------------------------------------------------------------- what the trainer says holds


MODES: dict[str, dict[str, Any]] = {
    "mlm": {},
    "clm, another seed and base": {"progressive": {"training_objective": "clm"}},
    "time as an input": {"progressive": {"time_interpretation": "input", "num_time_steps": 5}},
    "time as an input, untied, learned": {
        "tie": False,
        "progressive": {"time_interpretation": "input", "num_time_steps": 5, "time_encoding_type": "learned"},
    },
    "qlora": {"progressive": {"qlora_enabled": True, "qlora_rank": 2, "new_stack_precision": "bfloat16"}},
}


@pytest.mark.parametrize(("mode", "by_hand"), [*((mode, 2) for mode in MODES), ("clm, another seed and base", 0)])
def test_a_builder_of_sizes_grows_as_one_of_the_configuration(mode: str, by_hand: int) -> None:
    config = tiny(**MODES[mode])
    config.run.seed, config.model.rope_theta = 5, 500.0
    expected = trained(config, 2)
    builder = ProgressiveRackBuilder(**SIZES)
    rack, precision = builder.build_rack(), config.training.progressive.new_stack_precision
    stacks = [builder.append_stack(n_blocks=1, precision=precision) for _ in range(by_hand)]
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    assert builder.build_rack() is rack
    assert builder.stacks[:by_hand] == stacks
    assert rack.shape == expected.build_rack().shape
    assert same_bits(weights(rack), weights(expected.build_rack()))


def test_the_trainers_growth_settings_hold(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny(
        progressive={
            "new_stack_precision": "bfloat16",
            "building_mode": "prepend",
            "qlora_enabled": True,
            "qlora_rank": 3,
            "stacks": [{}, {"n_blocks": 3}],
            "progressive_qlora": True,
            "progressive_qlora_rank": 2,
            "trunk_strategy": "qlora",
        }
    )
    builder = ProgressiveRackBuilder(tiny(progressive={"new_stack_precision": "half"}))
    with caplog.at_level(logging.INFO, logger="stackwise"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    assert "the trainer's configuration rules" in caplog.text
    assert "new_stack_precision 'bfloat16', not 'half'" in caplog.text
    trunk = builder.stack(0)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    assert [stack.creation_index for stack in builder.stacks] == [1, 0]
    assert [(stack.precision, len(stack.blocks)) for stack in builder.stacks] == [("bfloat16", 3), ("bfloat16", 1)]
    assert adapter_names(trunk) == ["stack", "progressive"]
    ranks = {name: adapter_parameters(trunk, name)[0].shape[0] for name in adapter_names(trunk)}
    assert ranks == {"stack": 3, "progressive": 2}
    assert all(matrix.count_nonzero() for matrix in adapter_parameters(trunk))  # B is zero until it trains


@pytest.mark.parametrize("own", [{}, {"qlora_enabled": True, "qlora_rank": 2}])
def test_a_trunk_grown_without_adapters_gets_them_when_they_are_to_train(own: dict[str, Any]) -> None:
    """Also if the trainer gives every new stack one at its creation, which this trunk is past."""
    builder = trained(tiny())
    trunk = builder.stack(0)
    before = weights(trunk)
    growth = {"trunk_strategy": "qlora", "progressive_qlora_rank": 3, **own}
    ProgressiveTrainer(tiny(progressive=growth)).train_progressively(builder, LOADER, 2)
    assert adapter_names(trunk) == ["progressive"]
    matrices = adapter_parameters(trunk)
    assert matrices[0].shape[0] == 3
    assert all(matrix.count_nonzero() for matrix in matrices)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in weights(trunk).items()}
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_adapters_that_the_trainer_does_not_know_of_train_with_their_stack() -> None:
    own = tiny(progressive={"qlora_enabled": True, "qlora_rank": 2})
    builder = ProgressiveRackBuilder(own)
    stack = builder.append_stack()
    with torch.no_grad():
        dict(stack.named_parameters())["blocks.0.ffn_norm.weight"].mul_(1.5)  # edited: it is kept, with its adapter
    ProgressiveTrainer(tiny()).train_progressively(builder, LOADER, 1)
    assert all(matrix.count_nonzero() for matrix in adapter_parameters(stack, "stack"))


def test_what_the_builder_was_given_for_all_additions_holds_in_a_trainer() -> None:
    builder = ProgressiveRackBuilder(building_mode="prepend", default_precision="bfloat16", **SIZES)
    ProgressiveTrainer(tiny()).train_progressively(builder, LOADER, 2)
    assert [stack.creation_index for stack in builder.stacks] == [1, 0]
    assert {stack.precision for stack in builder.stacks} == {"bfloat16"}
    says = tiny(progressive={"building_mode": "append"})
    with pytest.raises(ConfigError, match="building_mode: got 'append'; the builder was given building_mode='prepend'"):
        ProgressiveTrainer(says).train_progressively(builder, LOADER, 3)
    assert ProgressiveTrainer(says).train_progressively(builder, LOADER, 2) == []  # nothing is added
    builder.append_stack()
    with pytest.raises(ConfigError, match="building_mode"):
        ProgressiveTrainer(says).train_progressively(builder, LOADER, 4)
    assert builder.n_trained == 2  # refused before the first step, though the third stack was there to train


def test_a_builder_of_sizes_follows_the_trainers_configuration_by_hand_too() -> None:
    config = tiny(progressive={"new_stack_precision": "bfloat16"})
    builder = ProgressiveRackBuilder(**SIZES)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    config.model.blocks_per_stack = 3  # of the object that the user holds
    stack = builder.append_stack()
    assert (len(stack.blocks), stack.precision) == (3, "bfloat16")


# ---------------------------------------------------------------- what cannot be is refused


@pytest.mark.parametrize(
    ("key", "value", "built"),
    [
        ("vocab_size", 300, 264),
        ("d_model", 32, 16),
        ("n_heads", 4, 2),
        ("n_kv_heads", 2, 1),
        ("d_ff", 48, 24),
        ("rope_theta", 500.0, 10000.0),
        ("norm_eps", 1e-4, 1e-05),
        ("tie_embeddings", False, True),
    ],
)
def test_another_size_is_refused_with_both_values(key: str, value: Any, built: Any) -> None:
    builder, other = ProgressiveRackBuilder(tiny()), tiny()
    setattr(other.model, key, value)
    for train in (ProgressiveTrainer(other).train_progressively, ProgressiveTrainer(other).train_rack):
        with pytest.raises(ConfigError, match=rf"model\.{key}: got {value}; the rack was built with {built}"):
            train(builder, LOADER, 1)
    assert builder.n_stacks == 0
    edited = tiny()
    builder = ProgressiveRackBuilder(edited)
    setattr(edited.model, key, value)
    with pytest.raises(ConfigError, match=rf"model\.{key}: got {value}; the rack was built with {built}"):
        builder.append_stack()


def test_a_size_that_a_builder_was_given_is_refused_too() -> None:
    builder = ProgressiveRackBuilder(**{**SIZES, "d_model": 32})
    with pytest.raises(ConfigError, match=r"model\.d_model: got 16; the rack was built with 32"):
        ProgressiveTrainer(tiny()).train_progressively(builder, LOADER, 1)


def test_a_vocabulary_of_0_is_what_the_tokenizer_has_and_gives_way_to_a_size(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[MASK]": 0, **{f"w{n}": n for n in range(1, 70)}}, unk_token="w1"))
    words.save(str(tmp_path / "words.json"))
    config = tiny("clm")
    config.data.tokenizer, config.model.vocab_size = str(tmp_path / "words.json"), 0
    loader = [tokens % 70 for tokens in LOADER]
    plain = {key: size for key, size in SIZES.items() if key != "vocab_size"}
    for sizes, n_rows in (
        (plain, 128),
        ({**SIZES, "vocab_size": 90}, 90),
        ({**SIZES, "vocab_size": config.model.vocab_size}, 128),
    ):
        builder = ProgressiveRackBuilder(**sizes)
        ProgressiveTrainer(config).train_progressively(builder, loader, 1)
        assert builder.build_rack().shape.vocab_size == n_rows
    assert ProgressiveRackBuilder(config).build_rack().shape.vocab_size == 128
    said = tiny("clm")
    said.model.vocab_size = 300
    with pytest.raises(ConfigError, match=r"model\.vocab_size: got 300; the rack was built with 128"):
        ProgressiveTrainer(said).train_progressively(ProgressiveRackBuilder(config), loader, 1)


def test_a_size_that_nobody_said_is_that_of_the_rack() -> None:
    config = StackWiseConfig()
    config.training.steps_per_stack, config.training.warmup_steps = 2, 0
    builder = ProgressiveRackBuilder(tiny())
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    assert builder.build_rack().shape.d_model == 16


def test_sizes_given_over_a_configuration_hold_with_its_trainer() -> None:
    config = tiny()
    builder = ProgressiveRackBuilder(config=config, d_model=32)
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    assert builder.build_rack().shape.d_model == 32
    config.model.d_model = 64
    with pytest.raises(ConfigError, match=r"model\.d_model: got 64; the rack was built with 32"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)


def test_a_size_that_follows_is_refused_once_the_rack_is_trained() -> None:
    builder, config = ProgressiveRackBuilder(**SIZES), tiny()
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    other = tiny()
    other.model.n_kv_heads = 2
    with pytest.raises(ConfigError, match=r"model\.n_kv_heads: got 2; the rack is trained or edited with 1"):
        ProgressiveTrainer(other).train_progressively(builder, LOADER, 2)


def test_more_stacks_than_the_trainer_allows_are_refused() -> None:
    builder = ProgressiveRackBuilder(**SIZES)
    for _ in range(5):
        builder.append_stack(n_blocks=1)
    with pytest.raises(ConfigError, match="max_stacks: got 4; the rack has 5 stacks already"):
        ProgressiveTrainer(tiny()).train_progressively(builder, LOADER, 4)


# ---------------------------------------------------------------- attention and time


@pytest.mark.parametrize("objective", ["clm", "custom"])
def test_an_untrained_rack_becomes_causal(objective: str) -> None:
    """By another configuration, and by an edit of its own; with custom, next tokens would leak otherwise."""
    loader: Any = LOADER if objective == "clm" else CUSTOM
    edited = tiny()
    for config, builder in (
        (tiny(objective), ProgressiveRackBuilder(tiny())),
        (edited, ProgressiveRackBuilder(edited)),
    ):
        builder.append_stack()
        assert sees_ahead(builder)
        config.training.progressive.training_objective = objective  # pyright: ignore[reportAttributeAccessIssue]
        ProgressiveTrainer(config).train_progressively(builder, loader, 2)
        assert not sees_ahead(builder)


def test_an_edit_that_asks_for_another_attention_takes_effect_by_hand() -> None:
    config = tiny()
    builder = ProgressiveRackBuilder(config)
    builder.append_stack()
    config.training.progressive.training_objective = "clm"
    builder.append_stack()
    assert not sees_ahead(builder)


def test_a_trained_rack_does_not_become_causal() -> None:
    builder = trained(tiny())
    after = weights(builder.build_rack())
    for objective, loader in (("clm", LOADER), ("custom", CUSTOM)):
        with pytest.raises(ConfigError, match=rf"model\.attention: got 'auto', causal for {objective}; .*new builder"):
            ProgressiveTrainer(tiny(objective)).train_progressively(builder, loader, 2)
    seen = tiny("custom")
    seen.model.attention = "bidirectional"
    ProgressiveTrainer(seen).train_progressively(builder, CUSTOM, 2)
    assert sees_ahead(builder)
    assert same_bits(weights(builder.stack(0)), {k[9:]: v for k, v in after.items() if k.startswith("stacks.0.")})


def test_a_causal_rack_goes_on_with_mlm_if_that_is_said() -> None:
    builder, config = trained(tiny("clm")), tiny()
    with pytest.raises(ConfigError, match=r"model\.attention: got 'auto', bidirectional for mlm; .*say causal"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    config.model.attention = "causal"
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    assert not sees_ahead(builder)


def edit(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(1.0)


@pytest.mark.parametrize("part", ["embedding", "head", "stack"])
def test_a_rack_that_was_edited_by_hand_is_not_made_anew(part: str) -> None:
    builder = ProgressiveRackBuilder(tiny())
    stack, rack = builder.append_stack(), builder.build_rack()
    edit({"embedding": rack.embedding, "head": rack.head, "stack": stack}[part])
    config = tiny(progressive={"time_interpretation": "input", "num_time_steps": 5})
    says = r"time_interpretation: got 'input' \(5 steps, width 64, sinusoidal\); .*without a time embedding"
    with pytest.raises(ConfigError, match=says):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 1)
    ProgressiveTrainer(tiny()).train_progressively(builder, LOADER, 1)


def test_time_is_added_to_an_untrained_rack_and_refused_by_a_trained_one() -> None:
    config = tiny()
    builder = ProgressiveRackBuilder(config)
    rack, stack = builder.build_rack(), builder.append_stack()
    config.training.progressive.time_interpretation = "input"
    config.training.progressive.num_time_steps = 5
    ProgressiveTrainer(config).train_progressively(builder, LOADER, 2)
    assert (builder.build_rack(), builder.stacks[0]) == (rack, stack)
    config.training.progressive.num_time_steps = 6
    with pytest.raises(ConfigError, match=r"got 'input' \(6 steps.*with time as an input \(5 steps"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 3)
    config.training.progressive.time_interpretation = "none"
    with pytest.raises(ConfigError, match=r"time_interpretation: got 'none'; .*with time as an input"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 3)


def test_a_refusal_leaves_the_rack_as_it_was() -> None:
    builder = ProgressiveRackBuilder(tiny())
    builder.append_stack()
    before, config = weights(builder.build_rack()), tiny(progressive={"time_interpretation": "input"})
    with pytest.raises(ConfigError, match="target_stacks"):
        ProgressiveTrainer(config).train_progressively(builder, LOADER, 9)
    assert same_bits(before, weights(builder.build_rack()))
