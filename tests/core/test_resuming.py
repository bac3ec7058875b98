"""A call that was stopped or killed goes on with the same bits: on the same builder, and from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, SavedRackError, StageInterruptedError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.training.results import StageResult
from stackwise_core.training.trainer import ProgressiveTrainer
from stackwise_core.training.training import Hooks, Record
from support.metrics import unclocked
from support.training import loader_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread_per_module")

LOADER = loader_of()
STEPS = 3


class Killed(BaseException):
    """As if the process had ended: nothing of the builder is used afterwards."""


def small(**growth: Any) -> StackWiseConfig:
    training = {name: growth.pop(name) for name in ("joint_steps", "accumulation_steps") if name in growth}
    config = tiny(growth.pop("objective", "clm"), steps_per_stack=STEPS, **training, progressive=growth)
    config.model.n_kv_heads, config.model.d_ff = 0, 32
    return config


def by_hand(config: StackWiseConfig) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config)
    builder.append_stack(precision="half")
    builder.prepend_stack(precision="qlora")
    return builder


Build = Callable[[StackWiseConfig], ProgressiveRackBuilder]
CASES: dict[str, tuple[dict[str, Any], Build, int | None]] = {
    "frozen": ({}, ProgressiveRackBuilder, 2),
    "full, half": ({"trunk_strategy": "full", "new_stack_precision": "half"}, ProgressiveRackBuilder, 2),
    "adapters": ({"trunk_strategy": "qlora", "objective": "mlm"}, ProgressiveRackBuilder, 2),
    "by hand": ({}, by_hand, 2),
    "anneal": ({"joint_steps": STEPS}, ProgressiveRackBuilder, 2),
    "from scratch": ({"enabled": False}, ProgressiveRackBuilder, 2),
    "jointly": ({"qlora_rank": 2}, by_hand, None),
}


def call(
    config: StackWiseConfig, builder: ProgressiveRackBuilder, target: int | None, hooks: Hooks | None = None
) -> list[StageResult]:
    return ProgressiveTrainer(config).train_rack(builder, LOADER, target, hooks=hooks, validation=LOADER[:1])


def told(results: list[StageResult]) -> list[tuple[Any, ...]]:
    return [(result.index, result.mode, unclocked(result.records), result.validation_loss) for result in results]


def undisturbed(case: str) -> tuple[str, list[tuple[Any, ...]]]:
    changes, build, target = CASES[case]
    config = small(**changes)
    builder = build(config)
    results = call(config, builder, target)
    return tensor_digest(builder.build_rack()), told(results)


def stop_at(step: int) -> Callable[[], bool]:
    """Return a `should_stop` that is true once, after so many steps."""
    steps = iter(range(1, 10**6))
    return lambda: next(steps) == step


def kill_at(step: int) -> Callable[[Record], None]:
    steps = iter(range(1, 10**6))

    def on_step(record: Record) -> None:
        if next(steps) == step:
            raise Killed

    return on_step


# ---------------------------------------------------------------- in one process


@pytest.mark.parametrize("case", CASES)
def test_the_same_call_on_the_same_builder_goes_on(case: str) -> None:
    changes, build, target = CASES[case]
    config = small(**changes)
    builder, (digest, results), taken = build(config), undisturbed(case), list[Record]()
    steps = sum(len(records) for _, _, records, _ in results)
    stops = [step for step in (2, STEPS + 1, 2 * STEPS + 1) if step < steps]
    for n, step in enumerate(stops):
        stop = stop_at(step - (stops[n - 1] if n else 0))
        with pytest.raises(StageInterruptedError, match=r"the same call on the same builder goes on there"):
            call(config, builder, target, Hooks(on_step=taken.append, should_stop=stop))
    gone_on = told(call(config, builder, target, Hooks(on_step=taken.append)))
    assert tensor_digest(builder.build_rack()) == digest
    assert gone_on == results[-len(gone_on) :]
    assert unclocked(taken) == [record for _, _, records, _ in results for record in records]  # no step was taken twice


def test_a_stopped_builder_is_saved_as_it_is_and_goes_on(tmp_path: Path) -> None:
    digest, results = undisturbed("adapters")
    config = small(**CASES["adapters"][0])
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(StageInterruptedError):
        call(config, builder, 2, Hooks(should_stop=stop_at(STEPS + 2)))
    builder.save(tmp_path / "rack")
    loaded = ProgressiveRackBuilder.load(tmp_path / "rack")
    assert tensor_digest(loaded.build_rack()) == tensor_digest(builder.build_rack()) != digest
    steps = list[Record]()
    assert told(call(config, loaded, 2, Hooks(on_step=steps.append))) == results[1:]
    assert [record["step"] for record in steps] == [2]
    assert tensor_digest(loaded.build_rack()) == digest


def test_a_state_is_for_another_builder() -> None:
    digest, _ = undisturbed("frozen")
    config = small()
    with pytest.raises(StageInterruptedError) as stopped:
        call(config, ProgressiveRackBuilder(config), 2, Hooks(should_stop=stop_at(2)))
    state, other = stopped.value.state.copy(), ProgressiveRackBuilder(config)
    ProgressiveTrainer(config).train_progressively(other, LOADER, 2, state=state)
    assert tensor_digest(other.build_rack()) == digest


def test_what_was_edited_after_a_stop_is_where_training_begins() -> None:
    config = small()
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(StageInterruptedError):
        call(config, builder, 1, Hooks(should_stop=stop_at(2)))
    with torch.no_grad():
        builder.stacks[0].blocks[0].ffn.down_proj.weight.zero_()
    (result,) = call(config, builder, 1)
    assert [record["step"] for record in result.records] == [0, 1, 2]
    assert result.records[0]["learning_rate"] == pytest.approx(0.5 * config.training.learning_rate)


def test_other_settings_start_the_stage_anew() -> None:
    config = small()
    builder = ProgressiveRackBuilder(config)
    with pytest.raises(StageInterruptedError):
        call(config, builder, 2, Hooks(should_stop=stop_at(2)))
    config.training.learning_rate = 1e-3
    fresh = ProgressiveRackBuilder(config)
    assert told(call(config, builder, 2)) == told(call(config, fresh, 2))
    assert tensor_digest(builder.build_rack()) == tensor_digest(fresh.build_rack())


# ---------------------------------------------------------------- from a folder, in another process


@pytest.mark.parametrize(("case", "in_a_thread"), [*((case, False) for case in CASES), ("frozen", True)])
def test_the_same_script_goes_on_from_its_folder(
    case: str, in_a_thread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again, each time two steps further; every attempt has a fresh builder."""
    if in_a_thread:
        monkeypatch.setattr("stackwise_core.training.saved_state._IN_A_THREAD", 0)
    changes, build, target = CASES[case]
    digest, results = undisturbed(case)
    taken = list[Record]()
    for _ in range(10):
        config = small(**changes)
        builder, kill = build(config), kill_at(3)

        def on_step(record: Record, kill: Callable[[Record], None] = kill) -> None:
            taken.append(record)
            kill(record)

        hooks = Hooks(on_step=on_step, checkpoint_every=1, checkpoint_folder=tmp_path / "f")
        try:
            found = call(config, builder, target, hooks)
            break
        except Killed:
            continue
    assert told(found) == results
    assert tensor_digest(builder.build_rack()) == digest
    # Each kill repeats the step whose checkpoint it prevented, and the last steps of stages make none.
    assert sum(len(records) for _, _, records, _ in results) < len(taken) <= 9 * len(results)
    again = build(small(**changes))
    assert told(call(small(**changes), again, target, Hooks(on_step=kill_at(1), checkpoint_folder=tmp_path / "f"))) == (
        results
    )
    assert tensor_digest(again.build_rack()) == digest
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"rack"}


def test_a_stop_is_kept_without_checkpoints(tmp_path: Path) -> None:
    digest, results = undisturbed("frozen")
    config = small()
    with pytest.raises(StageInterruptedError, match="the same call goes on there, also in another process"):
        call(config, ProgressiveRackBuilder(config), 2, Hooks(should_stop=stop_at(2), checkpoint_folder=str(tmp_path)))
    steps, builder = list[Record](), ProgressiveRackBuilder(config)
    found = call(config, builder, 2, Hooks(on_step=steps.append, checkpoint_folder=str(tmp_path)))
    assert [record["step"] for record in steps] == [2, 0, 1, 2]
    assert (tensor_digest(builder.build_rack()), told(found)) == (digest, results)


def test_a_rack_that_the_user_holds_is_the_one_that_goes_on(tmp_path: Path) -> None:
    config, digest = small(), undisturbed("by hand")[0]
    call(config, by_hand(config), 2, Hooks(checkpoint_folder=tmp_path))
    builder = by_hand(config)
    rack, first, embedding = builder.build_rack(), builder.stack(0), builder.build_rack().embedding
    call(config, builder, 2, Hooks(checkpoint_folder=tmp_path))
    assert rack is builder.build_rack()
    assert first is builder.stack(0)
    assert embedding is rack.embedding
    assert tensor_digest(rack) == digest


def test_a_higher_target_goes_on_and_two_calls_share_a_folder(tmp_path: Path) -> None:
    config = small()
    first, whole = ProgressiveRackBuilder(config), ProgressiveRackBuilder(config)
    expected = [*told(call(config, whole, 2)), *told(call(config, whole, 3))]
    hooks = Hooks(checkpoint_folder=tmp_path)
    assert told(call(config, first, 2, hooks)) == expected[:2]
    assert told(call(config, first, 3, hooks)) == expected[2:]
    again = ProgressiveRackBuilder(config)
    assert told(call(config, again, 2, hooks)) == expected[:2]
    with pytest.raises(ConfigError, match=r"one more stack, by hand; it is as later calls left it .*a folder of its"):
        again.append_stack()
    assert told(call(config, again, 3, hooks)) == expected[2:]
    again.append_stack()
    assert tensor_digest(first.build_rack()) == tensor_digest(whole.build_rack())
    assert told(call(config, ProgressiveRackBuilder(config), 3, hooks)) == expected


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    hooks = Hooks(should_stop=stop_at(STEPS + 2), checkpoint_folder=tmp_path)
    config = small()
    with pytest.raises(StageInterruptedError):
        call(config, ProgressiveRackBuilder(config), 2, hooks)
    before = files_in(tmp_path)
    hooks = Hooks(checkpoint_folder=tmp_path)

    rate = small()
    rate.training.learning_rate = 1e-3
    message = r"optim.learning_rate: got 0.001; .* trained stage 0 with 0.002: set it back, or give another folder"
    with pytest.raises(ConfigError, match=message):
        call(rate, ProgressiveRackBuilder(rate), 2, hooks)
    later = small(stacks=[{}, {"steps": 5}])
    with pytest.raises(ConfigError, match=r"stage.optim.steps: got 5; .* trained stage 1 with 3"):
        call(later, ProgressiveRackBuilder(later), 2, hooks)
    wide = small()
    wide.model.d_model = 32
    with pytest.raises(ConfigError, match=r"shape.d_model: got 32; .* began with 16: make the two equal"):
        call(wide, ProgressiveRackBuilder(wide), 2, hooks)
    with pytest.raises(ConfigError, match=r"stacks: got \[.*'half'.*began with \[\]"):
        call(config, by_hand(config), 2, hooks)
    seeded = ProgressiveRackBuilder(config)
    torch.nn.init.zeros_(seeded.build_rack().head.norm.weight)
    with pytest.raises(ConfigError, match=r"rack_builder: got weights of head; .* began with others"):
        call(config, seeded, 2, hooks)
    assert files_in(tmp_path) == before
    unused = small()
    unused.training.batch_size = 2  # the loader decides
    assert tensor_digest_after(unused, hooks) == undisturbed("frozen")[0]


def tensor_digest_after(config: StackWiseConfig, hooks: Hooks) -> str:
    builder = ProgressiveRackBuilder(config)
    call(config, builder, 2, hooks)
    return tensor_digest(builder.build_rack())


def test_a_rack_that_was_edited_between_two_calls_needs_another_folder(tmp_path: Path) -> None:
    config, hooks = small(), Hooks(checkpoint_folder=tmp_path / "one")
    builder = ProgressiveRackBuilder(config)
    call(config, builder, 1, hooks)
    with torch.no_grad():
        builder.stacks[0].blocks[0].ffn.down_proj.weight.zero_()
    with pytest.raises(ConfigError, match=r"rack_builder: got stack 0 base; edited since .*one was written"):
        call(config, builder, 2, hooks)
    call(config, builder, 2, Hooks(checkpoint_folder=tmp_path / "two"))


def test_a_damaged_folder_is_refused_and_a_damaged_checkpoint_left_out(tmp_path: Path) -> None:
    config, hooks = small(), Hooks(should_stop=stop_at(STEPS + 2), checkpoint_folder=tmp_path)
    with pytest.raises(StageInterruptedError):
        call(config, ProgressiveRackBuilder(config), 2, hooks)
    (tmp_path / "state/state.safetensors").write_bytes(b"cut")
    steps = list[Record]()
    call(config, ProgressiveRackBuilder(config), 2, Hooks(on_step=steps.append, checkpoint_folder=tmp_path))
    assert [record["step"] for record in steps] == [0, 1, 2]
    (tmp_path / "rack/stages.json").write_bytes(b"{}")
    with pytest.raises(SavedRackError, match=r"stages.json: is damaged"):
        call(config, ProgressiveRackBuilder(config), 2, Hooks(checkpoint_folder=tmp_path))
    with pytest.raises(ConfigError, match=r"hooks.checkpoint_folder: got 3; the path of a folder is expected"):
        call(config, ProgressiveRackBuilder(config), 2, Hooks(checkpoint_folder=3))  # pyright: ignore[reportArgumentType]
