"""Every way to grow, through the flow's steps: cached equals live, memory equals disk, killed equals undisturbed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.model.adapters import adapter_state
from stackwise_core.model.digests import tensor_digest
from stackwise_core.stages import resolve
from stackwise_core.stages.resolve import resolve_order
from storage.artifacts import Artifacts
from storage.checkpoints import load_channels, load_embedding, load_stack, load_tensors
from storage.racks import load_builder, load_rack
from storage.sequences import load_sequences
from support.modes import MODES, QUANTISED_MODES, G, grown_in_memory, plan_of
from support.runs import digests, folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")


CACHED = [
    "append",
    "kept",
    "muon",
    "qlora top",
    "nf4",
    "nvfp4 top",
    "bfloat16",
    "one clock joint",
    "mixed",
    "insert",
    "insert below quantised",
    "insert below qlora",
    "fresh",
    "depth",
    "input",
    "input per sequence",
    "elbo",
    *QUANTISED_MODES,
]

BY_DEFAULT = ("append", "prepend", "kept full", "insert", "nf4 dual", "int8 mixed", "input per sequence", "depth joint")
BY_DEFAULT += ("fresh",)
"""Together they have every place, trunk, precision of the stream and kind of time; the others are run with the slow."""


def slow_unless(by_default: Collection[str]) -> list[Any]:
    return [pytest.param(mode, marks=() if mode in by_default else pytest.mark.slow, id=mode) for mode in MODES]


Reference = Callable[..., Path]


def final_digest(root: Path) -> str:
    """Return the digest of the rack as the run left it on disk."""
    return tensor_digest(load_rack(root, "tiny"))


@pytest.mark.parametrize("mode", slow_unless(BY_DEFAULT))
def test_a_rack_grown_in_memory_has_the_same_bits(mode: str, tmp_path: Path, reference: Reference) -> None:
    """The trainer of the library, live trunk and all, against the artifacts of the flow."""
    root = reference(MODES[mode])
    config = tiny(root.parent, MODES[mode])
    builder = grown_in_memory(config, root)
    loaded = load_builder(root, "tiny")
    assert final_digest(root) == tensor_digest(builder.build_rack()) == tensor_digest(loaded.build_rack())
    assert [stack.creation_index for stack in builder.stacks] == list(plan_of(config).stages[-1].spec.anatomy.order)
    assert loaded.get_rack_info() == builder.get_rack_info()
    assert loaded.build_rack().tied == builder.build_rack().tied


def test_statistics_are_of_the_first_rows_and_kept_with_the_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer rows than a stage trains on, which end within a batch; in memory and on disk, by hand."""
    monkeypatch.setattr(resolve, "STATISTICS_ROWS", 10)
    config, root = tiny(tmp_path, MODES["int8"]), tmp_path / "a"
    grown(config, root)
    builder = grown_in_memory(config, root)
    assert tensor_digest(builder.build_rack()) == final_digest(root)
    artifacts, stages = Artifacts(root), plan_of(config).stages
    for stack in range(3):
        on_disk, in_memory = load_channels(artifacts, stages, stack), builder.channels[stack]
        assert all(a.equal(b) for a, b in zip(on_disk, in_memory, strict=True))
    train, _ = load_sequences(artifacts, plan_of(config).data_ref)
    rows = [row for batch, _, _ in resolve_order(config, len(train)).batches(0, 3) for row in batch][:10]
    with torch.no_grad():
        embedding, first = load_embedding(artifacts, stages[:1]), load_stack(artifacts, stages[:1], 0)
        output_PD = first(embedding(torch.from_numpy(train.tokens[rows].astype("int64")))).flatten(0, 1).double()
    mean, std = load_channels(artifacts, stages, 0)
    torch.testing.assert_close(mean.double(), output_PD.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), output_PD.std(0, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", CACHED)
def test_a_cache_changes_time_and_not_results(mode: str, tmp_path: Path, reference: Reference) -> None:
    cached, live = reference(MODES[mode]), reference({**MODES[mode], f"{G}cache_activations": False})
    assert any(name.startswith("activations") for name in digests(cached))
    assert not any(name.startswith("activations") for name in digests(live))
    assert final_digest(cached) == final_digest(live)


@pytest.mark.parametrize("mode", MODES)
def test_every_cache_equals_the_live_trunk(mode: str, reference: Reference) -> None:
    """Validation of each stage has derived every row of its store again, from tokens through the whole trunk."""
    found = manifests(reference(MODES[mode]))
    stored = [name for name in found if name.startswith("activations")]
    checked = [entry["facts"] for name, entry in found.items() if name.startswith("validation")]
    assert sum(facts.get("cache") == "equals live" for facts in checked) == len(stored)
    assert bool(stored) == (mode in CACHED or (mode.endswith(("joint", "joint nf4")) and "prepend" not in mode))


class _Killed(Exception):
    pass


@pytest.mark.parametrize("mode", slow_unless(BY_DEFAULT))
def test_a_killed_stage_goes_on_to_the_same_bytes(
    mode: str, tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage dies once at step 5, after its checkpoint at step 4."""
    from stackwise_core.training import training

    undisturbed = digests(reference(MODES[mode]))
    fresh = False
    failpoint = training.failpoint

    def die(task: str, step: int) -> None:
        nonlocal fresh
        failpoint(task, step)
        if step == 1:
            fresh = True
        if step == 5 and fresh:
            fresh = False
            raise _Killed

    monkeypatch.setattr(training, "failpoint", die)
    config, root = tiny(tmp_path, MODES[mode]), tmp_path / "a"
    for _ in plan_of(config).stages:
        with pytest.raises(_Killed):
            grown(config, root)
    recorder = grown(config, root)
    assert any("goes on from its checkpoint at step 4" in text for text in recorder.messages)
    assert digests(root) == undisturbed


@pytest.mark.parametrize(
    "mode", ["prepend", "full", "nf4 dual", "mixed", "joint", "one clock joint", "depth joint", "int8 mixed"]
)
def test_one_stack_more_leaves_what_is_there(mode: str, tmp_path: Path, reference: Reference) -> None:
    """Raising target_stacks grows from the rack before the anneal, and anneals again."""
    changes = MODES[mode]
    target = changes.get(f"{G}target_stacks", 3)
    lower, root = {**changes, f"{G}target_stacks": target - 1}, tmp_path / "a"
    grown(tiny(tmp_path, lower), root)
    before = digests(root)
    recorder = grown(tiny(tmp_path, changes), root)
    assert "train 0" not in recorder.made
    after = digests(root)
    assert {name: after[name] for name in before} == before
    undisturbed = digests(reference(changes))
    assert {name: after[name] for name in undisturbed} == undisturbed


def test_the_same_seed_and_another_give_the_same_and_other_adapters(reference: Reference) -> None:
    root = reference(MODES["nf4"])
    config = tiny(root.parent, MODES["nf4"])
    stages = plan_of(config).stages
    first, second = load_stack(Artifacts(root), stages, 1), load_stack(Artifacts(root), stages, 2)
    a = adapter_state(first, "stack")
    b = adapter_state(second, "stack")
    assert a.keys() == b.keys()
    assert not any(torch.equal(a[key], b[key]) for key in a)


def test_statistics_are_taken_of_every_output_that_a_stage_changed(reference: Reference) -> None:
    """Of the stack that adapts, of the new one above it and of those above a prepended one; not below."""
    found: dict[str, list[set[str]]] = {}
    for mode in ("int8 qlora top", "int8 mixed"):
        root = reference(MODES[mode])
        files = [folder_of(root, "stack", stage) / "channels.safetensors" for stage in range(4)]
        found[mode] = [{name.split(".")[0][-1] for name in load_tensors(file)} for file in files]
    assert found["int8 qlora top"] == [{"0"}, {"0", "1"}, {"1", "2"}, {"2", "3"}]
    assert found["int8 mixed"] == [{"0"}, {"0", "1"}, {"2"}, {"3"}]
    assert not (folder_of(reference(MODES["mixed"]), "stack", 0) / "channels.safetensors").exists()


def test_one_id_is_one_result_whatever_the_mode(reference: Reference) -> None:
    """Modes share artifacts by id: what two of them name alike they made alike, to the byte."""
    made: dict[str, tuple[str, str]] = {}
    shared: set[str] = set()
    for mode, changes in MODES.items():
        for name, digest in digests(reference(changes)).items():
            first, found = made.setdefault(name, (mode, digest))
            assert digest == found, f"{name} of {mode} and of {first}"
            if first != mode:
                shared.add(name.split("-")[0])
    assert shared == {"data", "build", "trunk", "stack", "activations", "validation"}
