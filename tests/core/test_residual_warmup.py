"""A new stack that comes in step by step: against the formula, the trunk's own loss, and a stage that was stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, StageInterruptedError
from stackwise_core.model.blocks import Block, Stack
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.rotary import rotary_table
from stackwise_core.objectives.dataloader import ProgressiveDataLoader
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.stages import resolve_stages
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import Hooks
from support.configurations import CORPUS, configuration, ids
from support.growth import batch_of, built, dense_loss, model_of
from support.training import loader_of, tiny

G = "training.progressive."
WARMUP = 4


def config_of(**training: Any) -> StackWiseConfig:
    return tiny("clm", residual_warmup_steps=WARMUP, **training)


@pytest.mark.parametrize("outputs", [False, True], ids=["llama", "olmo2"])
def test_blocks_add_the_share_of_what_they_would(outputs: bool) -> None:
    config = configuration({"model.d_model": 16, "model.n_heads": 2, "model.norm_outputs": outputs})
    stack = built(config, 1).stack(0)
    x, share = torch.randn(2, 5, 16), torch.tensor(0.25)
    rotary = rotary_table(stack.shape, 5, x.device)
    with torch.no_grad():
        expected = x
        for block in stack.blocks:
            assert isinstance(block, Block)
            branch = (
                block.attention_norm(block.attention(expected, rotary))
                if outputs
                else block.attention(block.attention_norm(expected), rotary)
            )
            expected = expected + 0.25 * branch
            branch = block.ffn_norm(block.ffn(expected)) if outputs else block.ffn(block.ffn_norm(expected))
            expected = expected + 0.25 * branch
        assert stack(x, share=share).equal(expected)
        assert stack(x, share=torch.tensor(0.0)).equal(x)
        assert stack(x, share=torch.tensor(1.0)).equal(stack(x))


@pytest.mark.parametrize("changes", [{}, {"building_mode": "prepend"}, {"building_mode": "insert"}], ids=str)
def test_the_first_step_has_the_loss_of_the_trunk_alone(changes: dict[str, Any]) -> None:
    """Of a plain copy, through a stage as it trains: cached boundary, tail and all."""
    config = config_of(new_stack_init="copy", progressive=changes)
    config.cache.dtype = "float32"
    builder, trainer = ProgressiveRackBuilder(config), ProgressiveTrainer(config)
    trainer.train_progressively(builder, loader_of(), 1)
    first = next(iter(ProgressiveDataLoader([loader_of()[0]], None, 0)))
    before = dense_loss(builder.build_rack(), first).item()
    (result,) = trainer.train_progressively(builder, loader_of(), 2)
    assert result.losses[0] == pytest.approx(before, abs=2e-6)
    plain = tiny("clm", new_stack_init="copy", progressive=changes)
    *_, other = ProgressiveTrainer(plain).train_progressively(ProgressiveRackBuilder(plain), loader_of(), 2)
    assert abs(other.losses[0] - before) > 1e-3


def test_each_step_has_its_share_and_the_last_ones_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = list[float | None]()
    forward = Stack.forward

    def noting(self: Stack, x: Any, memory: Any = None, documents_BT: Any = None, share: Any = None) -> Any:
        if self.training and self.creation_index == 1:
            shares.append(None if share is None else share.item())
        assert share is None or self.creation_index == 1
        return forward(self, x, memory, documents_BT, share)

    monkeypatch.setattr(Stack, "forward", noting)
    config = config_of()
    ProgressiveTrainer(config).train_progressively(ProgressiveRackBuilder(config), loader_of(), 2)
    assert shares == [0.0, 0.25, 0.5, 0.75, None, None, None]


def test_a_stage_goes_on_within_its_warm_up() -> None:
    config = config_of(joint_steps=3)
    undisturbed, stopped = ProgressiveRackBuilder(config), ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(undisturbed, loader_of(), 3)
    steps = list[Any]()
    hooks = Hooks(
        on_step=steps.append, should_stop=lambda: len(steps) in (9, 15)
    )  # the second step, and the last but one
    for _ in range(2):
        with pytest.raises(StageInterruptedError):
            ProgressiveTrainer(config, hooks=hooks).train_progressively(stopped, loader_of(), 3)
    ProgressiveTrainer(config, hooks=hooks).train_progressively(stopped, loader_of(), 3)
    assert stopped.digests() == undisturbed.digests()


def test_it_is_in_the_ids_of_stages_that_add_a_stack_to_others() -> None:
    def planned(**more: Any) -> dict[str, str]:
        return ids(plan_run(configuration({"training.joint_steps": 5, **more}), CORPUS, 10**6))

    before, after = planned(), planned(**{"training.residual_warmup_steps": 9})
    assert {name for name in before if before[name] == after[name]} >= {
        "stack-0",
        "build-0",
        "activations-0",
        "build-1",
    }
    assert {f"stack-{n}" for n in (1, 2, 3)} <= {name for name in before if before[name] != after[name]}
    stages = resolve_stages(configuration({"training.joint_steps": 5, "training.residual_warmup_steps": 9}))
    assert [stage.optim.residual_warmup_steps for stage in stages] == [0, 9, 9, 0]


def test_a_warm_up_longer_than_a_stage_is_refused() -> None:
    own = {f"{G}stacks": [{"steps": 3}, {}, {"steps": 9}], "training.residual_warmup_steps": 10}
    with pytest.raises(ConfigError, match=r"residual_warmup_steps: got 10; the stage of stack 2 has 9 steps: at most"):
        configuration(own)
    configuration({**own, "training.residual_warmup_steps": 9})
    configuration({**own, f"{G}target_stacks": 2})


def test_nothing_of_it_stays_in_the_model() -> None:
    config = config_of()
    builder = built(config, 2)
    model = model_of(builder, config, 1)
    before = set(model.state_dict())
    model.let_in(0.5)
    assert set(model.state_dict()) == before
    batch = {**batch_of(config, 1), "stack_idx": 1, "trunk_activations": torch.randn(4, 16, 16)}
    half = model(batch)
    model.let_in(None)
    assert not model(batch).equal(half)
