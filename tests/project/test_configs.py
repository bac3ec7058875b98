"""Every file in configs/ grows what it says it grows: run at small size, and looked at from the artifacts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.adapters import adapter_names, adapter_state
from stackwise_core.model.blocks import Stack
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.growth_operators import grow_stack
from stackwise_core.model.precision import base_linears, storage_of
from stackwise_core.stages.arms import ARMS, END_TO_END, arm
from stackwise_core.stages.charges import cost
from stackwise_core.stages.costs import rack_parameters
from stackwise_core.stages.plan import StagePlan, plan_config
from stackwise_core.stages.resolve import resolve_shape
from stackwise_core.stages.stages import resolve_stages
from storage.artifacts import Artifacts
from storage.checkpoints import load_embedding, load_head, load_stack
from storage.sequences import load_sequences
from support.runs import grown, manifests, write_corpus

pytestmark = pytest.mark.usefixtures("quick_disk")

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {path.stem: path for path in CONFIGS.rglob("*.yaml")}
NAMES = sorted(FILES)


def small(name: str, corpus: Path) -> StackWiseConfig:
    """Return a file's configuration, cut down to seconds; how it grows is left as it is written."""
    values = yaml.safe_load(FILES[name].read_text())
    values["data"] |= {"source": str(corpus), "seq_len": 16, "max_sequences": 32, "validation_fraction": 0.1}
    values["model"]["d_model"] = 32
    training = values["training"]
    training |= {"batch_size": 4, "steps_per_stack": 6, "warmup_steps": 1, "checkpoint_every": 4}
    if "joint_steps" in training:
        training["joint_steps"] = 4
    for stack in training["progressive"].get("stacks", []):
        if "steps" in stack:
            stack["steps"] = 3
    values["hardware"] = {"threads": 1, "device": "cpu"}
    values["validation"] = {"max_sequences": 8, "sampled_rows": 64}
    return StackWiseConfig.from_dict(values)


def make_examples(folder: Path) -> Path:
    """Make the examples of truecase.yaml by the command that its first lines give, cut to the length used here."""
    lines = (CONFIGS / "truecase.yaml").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("#   python"))
    command = "\n".join(line.removeprefix("#") for line in lines[first : lines.index("", first)])
    command = command.strip().replace("python", sys.executable, 1)
    command = command.replace("20 < len(line) <= 128", "8 < len(line) <= 16")
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return folder / "examples.jsonl"


class Grown:
    """What a run of a small configuration left on disk."""

    def __init__(self, config: StackWiseConfig, root: Path) -> None:
        grown(config, root)
        self.artifacts, self.manifests = Artifacts(root), manifests(root)
        plan = plan_config(config)
        self.data_ref, self.stages = plan.data_ref, plan.stages

    @property
    def order(self) -> tuple[int, ...]:
        return self.stages[-1].spec.anatomy.order

    @property
    def cached(self) -> list[int]:
        """The boundaries that were stored, in stacks below."""
        return [stage.activations.boundary for stage in self.stages if stage.activations is not None]

    def after(self, n_stages: int) -> tuple[StagePlan, ...]:
        return self.stages[:n_stages]

    def stack(self, index: int, n_stages: int) -> Stack:
        return load_stack(self.artifacts, self.after(n_stages), index)

    def digests(self, n_stages: int) -> dict[str, str]:
        """Return the digest of every part of the rack as some stages left it."""
        stages = self.after(n_stages)
        parts: dict[str, Any] = {f"stack {c}": self.stack(c, n_stages) for c in stages[-1].spec.anatomy.order}
        parts |= {"head": load_head(self.artifacts, stages), "embedding": load_embedding(self.artifacts, stages)}
        return {name: tensor_digest(part) for name, part in parts.items()}

    def changed(self, stage: int) -> set[str]:
        """Return the parts of the rack that a stage changed, its new stack among them."""
        after = self.digests(stage + 1)
        before = self.digests(stage)
        return {name for name, digest in after.items() if before.get(name) != digest}

    def storage(self, index: int) -> set[str]:
        return {storage_of(linear) for linear in base_linears(self.stack(index, len(self.stages))).values()}

    def facts(self, kind: str, stage: int) -> dict[str, Any]:
        return self.manifests[self.stages[stage].ref(kind).name]["facts"]  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Callable[[str], Grown]:
    made: dict[str, Grown] = {}

    def of(name: str) -> Grown:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            corpus = make_examples(folder) if name == "truecase" else write_corpus(folder / "corpus.txt")
            made[name] = Grown(small(name, corpus), folder / "artifacts")
        return made[name]

    return of


Run = Callable[[str], Grown]

# ---------------------------------------------------------------- the files as they are


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_valid_and_named_after_its_run(name: str) -> None:
    assert StackWiseConfig.from_yaml(FILES[name]).run.name == name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_every_key_is_explained(name: str) -> None:
    lines = FILES[name].read_text().splitlines()
    assert lines[0].startswith("# ")
    keys = [line for line in lines if re.match(r"\s+(- )?[a-z_]+:", line)]
    sections = ("progressive:",)
    bare = [line for line in keys if "# " not in line and not line.strip().startswith(sections)]
    assert len(keys) > 12
    assert not bare


# ---------------------------------------------------------------- what each grows


def test_quickstart_inserts_below_a_tail_that_trains_and_caches_what_is_below_both(run_of: Run) -> None:
    run = run_of("quickstart")
    assert (run.order, run.cached) == ((1, 2, 0), [1])
    assert run.changed(1) == {"stack 0", "stack 1", "head"}
    assert run.changed(2) == {"stack 0", "stack 2", "head"}


def test_prepend_trains_the_new_stack_alone(run_of: Run) -> None:
    run = run_of("prepend")
    assert (run.order, run.cached) == ((2, 1, 0), [])
    assert run.changed(1) == {"stack 1"}
    assert run.changed(2) == {"stack 2"}


def test_mixed_gives_each_stack_its_own(run_of: Run) -> None:
    run = run_of("mixed")
    assert run.order == (2, 0, 1, 3)
    assert [len(run.stack(c, 4).blocks) for c in range(4)] == [2, 1, 2, 3]
    assert [run.storage(c) for c in range(4)] == [{"float32"}, {"bfloat16"}, {"float32"}, {"float16"}]
    assert [run.facts("stack", c)["steps"] for c in range(4)] == [6, 6, 3, 6]
    assert [run.changed(c) for c in (1, 2, 3)] == [{"stack 1", "head"}, {"stack 2"}, {"stack 3", "head"}]
    assert run.cached == [1, 3]  # below stack 1 and below stack 3; nothing for the stage that prepends


def test_qlora_trains_adapters_of_the_top_of_a_quantised_trunk(run_of: Run) -> None:
    run = run_of("qlora")
    assert [run.storage(c) for c in range(3)] == [{"nf4"}] * 3
    assert run.changed(1) == {"stack 0", "stack 1", "head"}
    assert run.changed(2) == {"stack 1", "stack 2", "head"}
    assert run.cached == [1]  # below the one trunk stack whose adapters train
    before, after = run.stack(1, 2), run.stack(1, 3)
    assert (adapter_names(before), adapter_names(after)) == (["stack"], ["stack", "progressive"])
    for base, trained in zip(base_linears(before).values(), base_linears(after).values(), strict=True):
        assert tensor_digest(base) == tensor_digest(trained)
    progressive = adapter_state(after, "progressive")
    assert all(tensor.abs().sum() > 0 for tensor in progressive.values())  # B is no longer zero: it learned
    ranks = [
        adapter_state(run.stack(c, 3), "stack")["blocks.0.attention.q_proj.lora_A.weight"].shape[0] for c in (0, 1)
    ]
    assert ranks == [8, 16]


def test_nvfp4_stores_a_trained_stack_in_four_bits(run_of: Run) -> None:
    run = run_of("nvfp4")
    assert [run.storage(c) for c in range(3)] == [{"nvfp4"}] * 3
    assert run.cached == [1, 2]
    assert run.changed(2) == {"stack 2", "head"}
    quantised = run.facts("validation", 1)
    assert quantised["cache"] == "equals live"  # and the live rack here is the stored one


def test_time_as_depth_gives_each_stack_a_heavier_noise(run_of: Run) -> None:
    run = run_of("time-as-depth")
    assert run.order == (3, 2, 1, 0)
    assert [stage.stack.time_step for stage in run.stages] == [0, 1, 2, 3]
    ratios = [stage.stack.mask.ratio for stage in run.stages if stage.stack.mask is not None]
    assert ratios == pytest.approx([0.15, 0.40, 0.65, 0.90])
    assert run.changed(3) == {"stack 3"}
    # The validation masks of a ratio nest in those of a higher one, so their numbers rise with the stages.
    positions = [run.facts("validation", stage)["loss_positions"] for stage in range(4)]
    assert positions == sorted(set(positions))
    assert set(run.facts("validation", 3)["by_mask_ratio"]) == {"0.15", "0.3", "0.5", "0.7", "0.9"}


def test_time_as_input_is_embedded_and_weighs_the_bound(run_of: Run) -> None:
    run = run_of("time-as-input")
    for stage in run.stages:
        assert stage.stack.weighting == "elbo"
        assert stage.stack.mask is not None
        assert stage.stack.mask.time is not None
        assert (stage.stack.mask.time.n_steps, stage.stack.mask.time.elbo) == (100, True)
    embedding = load_embedding(run.artifacts, run.after(1))
    assert any(name.startswith("time") for name in embedding.state_dict())
    assert run.cached == [1, 2]
    assert run.changed(2) == {"stack 2", "head"}


def test_full_trains_everything_in_every_stage(run_of: Run) -> None:
    run = run_of("full")
    assert (run.order, run.cached) == ((0, 1, 2), [])
    assert run.changed(1) == {"stack 0", "stack 1", "head", "embedding"}
    assert run.changed(2) == {"stack 0", "stack 1", "stack 2", "head", "embedding"}
    assert [stage.spec.optim.min_learning_rate for stage in run.stages] == [0.002, 0.002, 0.0]  # one clock


def test_jump_copies_the_first_blocks_and_then_trains_all_by_one_clock(run_of: Run) -> None:
    run = run_of("jump")
    assert (run.order, run.cached) == ((0, 1), [])
    assert [len(run.stack(c, 2).blocks) for c in (0, 1)] == [2, 4]
    assert run.changed(1) == {"stack 0", "stack 1", "head", "embedding"}
    (build,) = run.artifacts.root.glob("builds/build-1-*/build.json")
    copied = grow_stack(run.stages[1].shape, 4, 1, "copy", 0, [run.stack(0, 1)])
    for n, block in enumerate(copied.blocks):
        assert tensor_digest(block) == tensor_digest(run.stack(0, 1).blocks[n % 2])
    assert json.loads(build.read_text())["initial_tensors"] == tensor_digest(copied)
    optims = [stage.spec.optim for stage in run.stages]
    assert [(optim.warmup_steps, optim.decay_steps) for optim in optims] == [(1, 0), (0, 1)]
    assert (optims[1].decay, optims[1].min_learning_rate) == ("linear", 0.0)


def test_diffusion_depth_spreads_all_ratios_over_its_stacks(run_of: Run) -> None:
    run = run_of("diffusion-depth")
    assert (run.order, run.cached) == ((0, 1, 2, 3), [])  # no row is read twice
    assert run.changed(3) == {"stack 3", "head"}
    masks = [stage.mask for stage in run.stages if stage.mask]
    assert [mask.ratio for mask in masks] == pytest.approx([0.15, 0.40, 0.65, 0.90])
    spans = [mask.span for mask in masks if mask.span]
    assert [span.low for span in spans] == pytest.approx([0.15, 0.25, 0.50, 0.75])
    assert [span.high for span in spans] == pytest.approx([0.30, 0.55, 0.80, 0.90])
    positions = [run.facts("validation", stage)["loss_positions"] for stage in range(4)]
    assert positions == sorted(set(positions))  # judged at its own ratio
    assert set(run.facts("validation", 3)["by_mask_ratio"]) == {"0.15", "0.3", "0.5", "0.7", "0.9"}


def test_frozen_has_one_clock_over_what_the_cache_feeds(run_of: Run) -> None:
    run = run_of("frozen")
    assert (run.order, run.cached) == ((0, 1, 2), [1, 2])
    assert run.changed(1) == {"stack 1", "head"}
    assert run.changed(2) == {"stack 2", "head"}
    optims = [stage.spec.optim for stage in run.stages]
    assert [(optim.warmup_steps, optim.decay_steps) for optim in optims] == [(1, 0), (0, 0), (0, 3)]
    assert [optim.min_learning_rate for optim in optims] == [0.002, 0.002, 0.0]


def test_insert_trains_the_stack_above_the_new_one_with_it(run_of: Run) -> None:
    run = run_of("insert")
    assert (run.order, run.cached) == ((1, 2, 0), [1])  # nothing is below the first that is inserted
    assert run.changed(1) == {"stack 0", "stack 1", "head"}
    assert run.changed(2) == {"stack 0", "stack 2", "head"}


def test_frozen_anneal_trains_everything_once_at_the_end(run_of: Run) -> None:
    run = run_of("frozen-anneal")
    assert [stage.spec.mode for stage in run.stages] == ["append", "append", "append", "joint"]
    assert run.changed(2) == {"stack 2", "head"}
    assert run.changed(3) == {"stack 0", "stack 1", "stack 2", "head", "embedding"}
    assert run.facts("stack", 3)["steps"] == 4
    assert run.cached == [1, 2]
    rates = [(stage.spec.optim.learning_rate, stage.spec.optim.min_learning_rate) for stage in run.stages]
    assert rates == [(0.002, 0.002)] * 3 + [(0.002, 0.0)]  # from its peak, and nowhere before


def test_end_to_end_is_one_stage(run_of: Run) -> None:
    run = run_of("end-to-end")
    assert [(stage.spec.mode, stage.spec.anatomy.order) for stage in run.stages] == [("joint", (0, 1, 2))]
    assert run.facts("stack", 0)["trainable_parameters"] == run.facts("stack", 0)["rack_parameters"]
    assert len({run.digests(1)[f"stack {c}"] for c in range(3)}) == 3  # random each, no copies


def test_truecase_learns_the_targets_that_are_given(run_of: Run) -> None:
    run = run_of("truecase")
    assert (run.order, run.cached) == ((0, 1), [1])
    assert {stage.stack.objective for stage in run.stages} == {"cross-entropy"}
    train, _ = load_sequences(run.artifacts, run.data_ref)
    fields = train.fields(np.arange(len(train)))
    tokens, targets, masks = fields["input_ids"], fields["targets"], fields["masks"]
    assert (tokens[masks] == np.char.lower(targets[masks].astype(np.uint32).view("U1")).view(np.uint32)).all()
    assert 0.3 < masks.mean() < 1.0
    losses = [run.facts("validation", stage)["validation_loss"] for stage in (0, 1)]
    assert losses[1] < losses[0] < math.log(264)


@pytest.mark.parametrize("name", NAMES)
def test_every_cache_was_compared_with_the_live_trunk(name: str, run_of: Run) -> None:
    run = run_of(name)
    compared = [run.facts("validation", stage.index)["cache"] for stage in run.stages]
    assert compared == ["none" if stage.activations is None else "equals live" for stage in run.stages]


def test_every_file_has_a_test_of_its_own() -> None:
    source = Path(__file__).read_text()
    assert [name for name in NAMES if f'run_of("{name}")' not in source] == []


def test_the_setting_of_the_results_spends_what_its_first_lines_say() -> None:
    setting = StackWiseConfig.from_yaml(CONFIGS.parent / "benchmarks" / "setting_s.yaml")
    assert cost(setting, 400_000) == pytest.approx(63e12, rel=0.01)
    quarter = arm(setting, ARMS[END_TO_END](setting), 63e12 / 4, 400_000)
    tokens = quarter.training.steps_per_stack * quarter.training.batch_size * quarter.data.seq_len
    assert tokens / rack_parameters(resolve_shape(quarter), resolve_stages(quarter)[0]) == pytest.approx(5, rel=0.02)
