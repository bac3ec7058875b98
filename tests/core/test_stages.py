"""Growing by plain calls: what is made, from what, once, with which bytes."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from flows.run.events import subscribed
from flows.run.run import add_stage, grow
from flows.run.validating import CacheMismatchError
from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.data.packing import pack, read_corpus
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.errors import ConfigError, NonFiniteLossError
from stackwise_core.model.blocks import Stack
from stackwise_core.model.rack import Rack
from stackwise_core.objectives.batches import PackedBatches
from stackwise_core.objectives.losses import loss_positions
from stackwise_core.objectives.make_batch import make_batch, validation_batch
from stackwise_core.stages.resolve import resolve_mask, resolve_order, resolve_shape
from stackwise_core.training import training
from storage.activations import fill
from storage.errors import ArtifactCorruptError, StoreSpaceError
from support.runs import Recorder, digests, files_below, folder_of, grown, made_by_stages, manifests, subset, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]

MLM = {"training.progressive.training_objective": "mlm", "cache.views": 8}
UNEVEN = {  # stage 1 takes fewer steps than stage 2, of whose boundary some rows can then not be advanced
    "training.progressive.stacks": [{"n_blocks": 2}, {"steps": 8}, {"steps": 16, "n_blocks": 2}],
}
SETTINGS = [
    pytest.param({}, id="clm"),
    pytest.param(MLM, id="mlm"),
    pytest.param({**MLM, "cache.dtype": "float16"}, id="mlm-float16"),
    pytest.param({**MLM, "cache.dtype": "float32"}, id="mlm-float32"),
    pytest.param({**MLM, **UNEVEN}, id="mlm-uneven"),
]


# ---------------------------------------------------------------- the same numbers, however they come about


def test_same_configuration_gives_the_same_bytes_anywhere(tmp_path: Path, reference: Reference) -> None:
    config = tiny(tmp_path, {"run.name": "another-name", "training.checkpoint_every": 5})
    assert grown(config, tmp_path / "there").made == ["prepare data -1", *made_by_stages(3)]
    assert digests(tmp_path / "there") == digests(reference())
    for stage in range(3):
        here, there = (folder_of(root, "stack", stage) for root in (tmp_path / "there", reference()))
        for name in ("stack.safetensors", "head.safetensors"):
            assert (here / name).read_bytes() == (there / name).read_bytes()


def test_another_seed_gives_other_bytes(tmp_path: Path, reference: Reference) -> None:
    grown(tiny(tmp_path, {"run.seed": 1}), tmp_path / "a")
    shared = digests(tmp_path / "a").keys() & digests(reference()).keys()
    assert shared == subset(shared, "data", "trunk-0")  # the corpus, and the trunk that has no stacks


@pytest.mark.parametrize("changes", SETTINGS)
def test_artifacts_hold_what_the_library_trains_in_memory(
    changes: dict[str, Any], tmp_path: Path, reference: Reference
) -> None:
    config = tiny(tmp_path, changes)
    torch.set_num_threads(1)
    train, _ = pack(read_corpus(config.data.source), ByteTokenizer(), 16, 16, 0.1)
    assert len(train) == 16
    batches = PackedBatches(train, resolve_order(config, 16), 0, 16)
    builder = ProgressiveRackBuilder(config)
    results = ProgressiveTrainer(config).train_progressively(rack_builder=builder, dataloader=batches)
    rack = builder.build_rack()

    root = reference(changes)
    for stage, stack in enumerate(builder.stacks):
        _assert_equal(load_file(folder_of(root, "stack", stage) / "stack.safetensors"), stack.state_dict())
        assert manifests(root)[folder_of(root, "stack", stage).name]["facts"]["train_loss"] == results[stage].loss
    _assert_equal(load_file(folder_of(root, "stack", 2) / "head.safetensors"), rack.head.state_dict())
    _assert_equal(load_file(folder_of(root, "stack", 0) / "embedding.safetensors"), rack.embedding.state_dict())


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("changes", SETTINGS)
def test_a_cache_changes_time_not_weights(changes: dict[str, Any], tmp_path: Path, reference: Reference) -> None:
    grown(tiny(tmp_path, {**changes, "training.progressive.cache_activations": False}), tmp_path / "a")
    live, cached = digests(tmp_path / "a"), digests(reference(changes))
    assert not subset(live, "activations")
    assert subset(cached, "activations")
    for name in subset(cached, "stack"):
        assert live[name] == cached[name]


@pytest.mark.parametrize("changes", SETTINGS)
def test_a_boundary_has_the_same_bytes_advanced_or_refilled(
    changes: dict[str, Any], tmp_path: Path, reference: Reference
) -> None:
    root = tmp_path / "a"
    shutil.copytree(reference(changes), root)
    facts = manifests(root)[folder_of(root, "activations", 1).name]["facts"]
    uneven = "training.progressive.stacks" in changes
    assert facts["from"] == ("boundary 1 and tokens" if uneven else "boundary 1")
    assert facts.get("rows_from_tokens") == (32 if uneven else None)
    before = files_below(folder_of(root, "activations", 1) / "store.zarr")
    # The boundary below is retired, so what stage 2 reads can only come from tokens now.
    shutil.rmtree(folder_of(root, "activations", 1))
    shutil.rmtree(folder_of(root, "stack", 2))
    assert grown(tiny(tmp_path, changes), root).made == ["cache 1", "train 2"]
    again = folder_of(root, "activations", 1)
    assert manifests(root)[again.name]["facts"]["from"] == "tokens"
    after = files_below(again / "store.zarr")
    assert sum(map(len, after.values())) > 1000
    assert after == before
    assert digests(root) == digests(reference(changes))


def test_a_cached_boundary_is_the_rounded_stream(tmp_path: Path, reference: Reference) -> None:
    """Against an own forward pass: embedding, stack, round, stack, round."""
    from storage.activations.reader import StoreReader

    config, root = tiny(tmp_path, MLM), reference(MLM)
    rack = _rack_from_files(config, root, 3)
    folder = folder_of(root, "activations", 1)
    files = {name: (e["size"], e["checksum"]) for name, e in manifests(root)[folder.name]["files"].items()}
    train, validation = pack(read_corpus(config.data.source), ByteTokenizer(), 16, 16, 0.1)
    with StoreReader(folder, files) as store:
        assert store.train.rows == 3 * 16  # three epochs, each under its own view
        for sequences, row, view in ((train, 5, 0), (train, 5, 2), (validation, 0, VALIDATION_VIEW)):
            tokens, ids = sequences.take(np.array([row]))
            mask = resolve_mask(config, 2)
            mask = mask.for_validation() if view < 0 else mask
            stream = rack.embedding(
                make_batch({"input_ids": tokens, "sequence_ids": ids, "view": view}, mask)["input_ids"]
            )
            for stack in list(rack.stacks)[:2]:
                stream = stack(stream.float()).to(torch.bfloat16)
            assert torch.equal(store.rows(ids, view), stream.detach())


# ---------------------------------------------------------------- what is made, and what is not


def test_a_second_run_makes_nothing(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference(), tmp_path)
    before = files_below(root)
    assert grown(tiny(tmp_path), root).made == []
    changed = {name for name, data in files_below(root).items() if before.get(name) != data}
    assert {Path(name).parts[0] for name in changed} <= {"runs", "locks"}


def test_one_more_stack_trains_one_stage(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference(), tmp_path)
    before = digests(root)
    more = tiny(tmp_path, {"training.progressive.target_stacks": 4})
    assert grown(more, root).made == ["cache 2", "validate 2", "build 3", "trunk 3", "train 3", "validate 3"]
    assert manifests(root)[folder_of(root, "activations", 2).name]["facts"]["from"] == "boundary 2"
    after = digests(root)
    assert {name: after[name] for name in before} == before

    at_once = reference({"training.progressive.target_stacks": 4})
    assert {name: after[name] for name in digests(at_once)} == digests(at_once)


def test_keep_last_keeps_one_boundary_and_its_word(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference({"training.progressive.target_stacks": 4}), tmp_path)
    config = tiny(tmp_path, {"training.progressive.target_stacks": 4})

    def kept() -> list[bool]:
        return [(folder_of(root, "activations", stage) / "store.zarr").exists() for stage in range(3)]

    assert kept() == [False, False, True]
    assert grown(config, root).made == []
    assert kept() == [False, False, True]


def test_keep_all_remakes_the_one_that_is_gone(tmp_path: Path, reference: Reference) -> None:
    every = reference({"cache.keep": "all"})
    for stage in range(2):
        root = _copy(every, tmp_path / str(stage))
        before = files_below(folder_of(root, "activations", stage) / "store.zarr")
        shutil.rmtree(folder_of(root, "activations", stage))
        assert grown(tiny(tmp_path, {"cache.keep": "all"}), root).made == [f"cache {stage}"]
        assert digests(root) == digests(every)
        assert files_below(folder_of(root, "activations", stage) / "store.zarr") == before


def test_a_lost_stack_is_remade_alone(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference(), tmp_path)
    shutil.rmtree(folder_of(root, "stack", 1))
    assert grown(tiny(tmp_path), root).made == ["cache 0", "train 1"]
    assert digests(root) == digests(reference())
    assert not (folder_of(root, "activations", 0) / "store.zarr").exists()  # and its boundary is retired again


def test_a_half_written_artifact_is_remade(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference(), tmp_path)
    stack = folder_of(root, "stack", 2)
    (stack / "manifest.json").unlink()
    (stack / "stack.safetensors").write_bytes(b"half of it")
    assert grown(tiny(tmp_path), root).made == ["train 2"]
    assert digests(root) == digests(reference())
    assert not list((root / "trash").iterdir())


def test_a_sweep_shares_what_is_below_it(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference({"cache.keep": "all"}), tmp_path)
    longer = {"cache.keep": "all", "run.name": "longer", "training.progressive.stacks": [{}, {}, {"steps": 8}]}
    # The boundary that stage 2 reads holds other rows for other steps, so it and its check are new.
    assert grown(tiny(tmp_path, longer), root).made == ["cache 1", "validate 1", "train 2", "validate 2"]


# ---------------------------------------------------------------- redone on purpose


@pytest.mark.parametrize(
    ("how", "made"),
    [
        ({"from_stack": 1}, ["cache 0", *made_by_stages(3, first=1)]),
        ({"force": "train"}, ["train 0", "cache 0", "train 1", "train 2"]),
        ({"force": "cache", "from_stack": 1}, ["cache 1"]),
        ({"force": "validate", "from_stack": 2}, ["validate 2"]),
    ],
)
def test_redoing_gives_the_same_bytes(
    how: dict[str, Any], made: list[str], tmp_path: Path, reference: Reference
) -> None:
    root = _copy(reference(), tmp_path)
    before = folder_of(root, "stack", 2).stat().st_ino
    assert grown(tiny(tmp_path), root, **how).made == made
    assert digests(root) == digests(reference())
    assert folder_of(root, "stack", 2).stat().st_ino == before  # equal bytes: the old one stays


def test_redoing_to_other_bytes_is_told(tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same recipe, other numbers: what was made from the old ones must not pass for made from the new ones."""
    root = _copy(reference(), tmp_path)
    real = training.train_stack

    def drifting(model: Any, *args: Any, **kwargs: Any) -> Any:
        records = real(model, *args, **kwargs)
        with torch.no_grad():
            model.head.norm.weight[0] += 1.0
        return records

    monkeypatch.setattr(training, "train_stack", drifting)
    one = tiny(tmp_path, {"training.progressive.target_stacks": 1, "run.name": "one"})
    assert grown(one, root, force="train").made == ["train 0", "validate 0"]
    monkeypatch.undo()
    with pytest.raises(ArtifactCorruptError, match=r"was made from other bytes of stack-0-.*--from-stack 0$"):
        grown(tiny(tmp_path), root)
    grown(tiny(tmp_path), root, from_stack=0)
    assert {name: digests(root)[name] for name in digests(reference())} == digests(reference())


# ---------------------------------------------------------------- judging


@pytest.mark.parametrize("changes", [pytest.param({}, id="clm"), pytest.param({**MLM, **UNEVEN}, id="mlm-uneven")])
def test_the_report_is_what_the_files_give(changes: dict[str, Any], tmp_path: Path, reference: Reference) -> None:
    config, root = tiny(tmp_path, changes), reference(changes)
    _, validation = pack(read_corpus(config.data.source), ByteTokenizer(), 16, 16, 0.1)
    n_rows = min(8, len(validation))
    tokens, ids = validation.take(np.arange(n_rows))
    mask = resolve_mask(config, 0)
    batch = validation_batch({"input_ids": tokens, "sequence_ids": ids}, mask)
    where = loss_positions(batch)
    for depth in (1, 2, 3):
        rack = _rack_from_files(config, root, depth)
        report = json.loads((folder_of(root, "validation", depth - 1) / "report.json").read_text())
        assert report["validation_sequences"] == n_rows
        assert report["loss_positions"] == int(where.sum()) > 10
        for key, dtype in (("validation_loss_exact", torch.float32), ("validation_loss", torch.bfloat16)):
            stream = rack.embedding(batch["input_ids"])
            for number, stack in enumerate(rack.stacks, 1):
                stream = stack(stream.to(dtype if number > 1 else torch.float32).float())
            loss = F.cross_entropy(rack.head(stream)[where].double(), batch["targets"][where])
            # Rows of one batch, not one by one: another order of summation, hence not exactly.
            assert report[key] == pytest.approx(loss.item(), rel=1e-4 if key == "validation_loss" else 1e-6), key
        if depth > 1:
            assert report["validation_loss"] != report["validation_loss_exact"]


def _rack_from_files(config: Any, root: Path, depth: int) -> Rack:
    """Return a rack as stage depth - 1 recorded it."""
    rack = Rack(resolve_shape(config))
    rack.untie()
    rack.embedding.load_state_dict(load_file(folder_of(root, "stack", 0) / "embedding.safetensors"))
    rack.head.load_state_dict(load_file(folder_of(root, "stack", depth - 1) / "head.safetensors"))
    for stage in range(depth):
        weights = load_file(folder_of(root, "stack", stage) / "stack.safetensors")
        stack = Stack(rack.shape, 1 + max(int(name.split(".")[1]) for name in weights), stage)
        stack.load_state_dict(weights)
        rack.stacks.append(stack)
    return rack.requires_grad_(False)


def test_depth_and_training_improve_the_loss(tmp_path: Path, reference: Reference) -> None:
    losses = [
        json.loads((folder_of(reference(), "validation", stage) / "report.json").read_text())["validation_loss"]
        for stage in range(3)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < np.log(264) - 0.5


def test_the_trunk_stays_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "a"
    grown(tiny(tmp_path, {"training.progressive.target_stacks": 1}), root)
    before = {name: folder_of(root, "stack", 0) / name for name in ("stack.safetensors", "embedding.safetensors")}
    seen = {name: path.read_bytes() for name, path in before.items()}
    grown(tiny(tmp_path), root)
    assert {name: path.read_bytes() for name, path in before.items()} == seen
    assert not list(folder_of(root, "stack", 2).glob("embedding*"))
    copies = load_file(folder_of(root, "stack", 1) / "stack.safetensors")
    trunk = load_file(folder_of(root, "stack", 0) / "stack.safetensors")
    assert all(not torch.equal(copies[name], trunk[name]) for name in trunk)  # the copy has trained


def test_the_training_log_has_a_line_per_step(reference: Reference) -> None:
    lines = (folder_of(reference(), "stack", 1) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(12))
    assert records[-1]["loss"] < records[0]["loss"]
    manifest = manifests(reference())[folder_of(reference(), "stack", 1).name]
    assert manifest["files"]["metrics.jsonl"]["content"] is False  # a log is not what the artifact is
    assert manifest["facts"]["train_loss"] == records[-1]["loss"]


# ---------------------------------------------------------------- what goes wrong


def test_a_wrong_cache_is_quarantined_and_heals(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of one row is off by a bit; every checksum is right."""
    real = fill._compute

    def slightly_wrong(rows: Any, shard: Any, *others: Any) -> torch.Tensor:
        values = real(rows, shard, *others)
        if shard.group == "train":
            values.view(torch.int16)[7, 3, 2] ^= 1
        return values

    root = tmp_path / "a"
    monkeypatch.setattr(fill, "_compute", slightly_wrong)
    with pytest.raises(CacheMismatchError, match=r"stage 0: 1 of \d+ sampled rows differ .*\[\(7, 0\)\]") as error:
        grown(tiny(tmp_path), root)
    assert error.value.exit_code == 1
    monkeypatch.undo()

    (kept,) = (root / "quarantine").iterdir()
    assert str(kept) in str(error.value)
    assert kept.name.startswith("activations-0-")
    assert "(7, 0)" in (kept / "reason.txt").read_text()
    assert (kept / "store.zarr" / "activations" / "c.0.0.0").exists()
    assert not list((root / "activations").iterdir())
    assert not list((root / "validations").iterdir())

    again = grown(tiny(tmp_path), root)
    assert again.made == ["cache 0", "validate 0", *made_by_stages(3, first=1)]
    assert digests(root) == digests(reference())


def test_a_budget_too_small_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    root = tmp_path / "a"
    with pytest.raises(ConfigError, match=r"cache\.max_gb: got 1e-06; .* are free in") as error:
        grown(tiny(tmp_path, {"cache.max_gb": 1e-6}), root)
    assert "\n" not in str(error.value)
    assert set(_made_in(root)) == {"data"}


def test_a_full_disk_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 100, 100))
    root = tmp_path / "a"
    with pytest.raises(StoreSpaceError, match=r"cache\.max_gb is 50\.0; .* 100 B are free in .*/a"):
        grown(tiny(tmp_path), root)
    assert set(_made_in(root)) == {"data"}
    # Without caches nothing large is written, and the same disk will do.
    grown(tiny(tmp_path, {"training.progressive.cache_activations": False}), root)


def test_the_forecast_counts_what_is_stored(tmp_path: Path, reference: Reference) -> None:
    """Rows visited x positions x channels x bytes: what the check compares with the disk."""
    for changes in ({}, MLM, {**MLM, "cache.dtype": "float32"}):
        facts = manifests(reference(changes))[folder_of(reference(changes), "activations", 0).name]["facts"]
        rows = facts["train_rows"] + facts["validation_rows"]
        assert facts["train_rows"] == (48 if changes else 16)
        assert facts["store_bytes"] == rows * 16 * 16 * (4 if "cache.dtype" in changes else 2)


def _made_in(root: Path) -> list[str]:
    rooms = ("data", "builds", "trunks", "stacks", "activations", "validations", "work", "quarantine")
    return [room for room in rooms if (root / room).exists() and any((root / room).iterdir())]


def test_a_loss_that_explodes_stops_the_stage(tmp_path: Path, reference: Reference) -> None:
    root = tmp_path / "a"
    with pytest.raises(NonFiniteLossError, match=r"learning_rate .*sequence ids ") as error:
        grown(tiny(tmp_path, {"training.learning_rate": 1e30}), root)
    assert error.value.exit_code == 1
    assert not list((root / "stacks").iterdir())
    again = grown(tiny(tmp_path), root)
    assert again.made == made_by_stages(3)[2:]  # build and trunk do not depend on the rate
    assert {name: digests(root)[name] for name in digests(reference())} == digests(reference())


def test_stages_before_a_failure_stay(tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 explodes at its seventh step: stage 0 stays as it is, and stage 1 goes on from its last checkpoint."""
    from stackwise_core.training import training as core

    real = core.train_step

    def exploding(model: Any, batch: Any, optimizer: Any, spec: Any, step: int, scale: Any, ranks: Any) -> Any:
        if model.embedding is None and step == 6:
            model.live_stacks()[-1].blocks[0].ffn.down_proj.weight.data[0, 0] = float("inf")
        return real(model, batch, optimizer, spec, step, scale, ranks)

    root = tmp_path / "a"
    monkeypatch.setattr(core, "train_step", exploding)
    with pytest.raises(NonFiniteLossError, match=r"^stage 1: step 7: loss nan"):
        grown(tiny(tmp_path), root)
    monkeypatch.undo()
    sealed = digests(root)
    assert subset(sealed, "stack") == subset(digests(reference()), "stack-0")

    again = grown(tiny(tmp_path), root)
    assert again.made == ["train 1", "cache 1", "validate 1", *made_by_stages(3, first=2)]
    assert again.messages == ["stage 1 goes on from its checkpoint at step 4"]
    assert digests(root) == digests(reference())


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_cache_is_refused_by_name(damage: str, tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference(), tmp_path)
    shard = folder_of(root, "activations", 1) / "store.zarr/activations/c.0.0.0"
    _damage(shard, damage)
    shutil.rmtree(folder_of(root, "stack", 2))  # whose training reads it
    with pytest.raises(ArtifactCorruptError) as error:
        grown(tiny(tmp_path), root)
    assert error.value.exit_code == 3
    assert str(shard) in str(error.value)
    assert str(folder_of(root, "activations", 1)) in error.value.remedy

    shutil.rmtree(folder_of(root, "activations", 1))  # as the remedy says
    grown(tiny(tmp_path), root)
    assert digests(root) == digests(reference())


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_cache_is_not_advanced(damage: str, tmp_path: Path, reference: Reference) -> None:
    """One more stack: the boundary above is computed from the damaged one, or that is refused; never ignored."""
    root = _copy(reference(), tmp_path)
    shard = folder_of(root, "activations", 1) / "store.zarr/activations/c.0.0.0"
    _damage(shard, damage)
    with pytest.raises(ArtifactCorruptError) as error:
        grown(tiny(tmp_path, {"training.progressive.target_stacks": 4}), root)
    assert (error.value.exit_code, error.value.path) == (3, shard)
    assert not list((root / "stacks").glob("stack-3-*"))


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    if how == "flip":
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-7])
    else:
        path.unlink()


def test_a_damaged_stack_is_refused_by_name(tmp_path: Path, reference: Reference) -> None:
    root = _copy(reference(), tmp_path)
    weights = folder_of(root, "stack", 1) / "stack.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactCorruptError) as error:
        grown(tiny(tmp_path, {"training.progressive.target_stacks": 4}), root)
    assert (error.value.exit_code, error.value.path) == (3, weights)
    shutil.rmtree(weights.parent)
    grown(tiny(tmp_path, {"training.progressive.target_stacks": 4}), root)
    full = digests(reference({"training.progressive.target_stacks": 4}))
    assert {name: digests(root)[name] for name in full} == full


def test_a_store_another_live_run_reads_is_not_retired(tmp_path: Path, reference: Reference) -> None:
    root, heard = tmp_path / "a", []
    # Both share stages 0 and 1; the other one, alive all the time, plans to read both boundaries.
    other = tiny(tmp_path, {"run.name": "other"})

    def meanwhile(stage: Any) -> None:
        if stage.index == 0:
            grow(tiny(tmp_path), str(root))
            assert all((folder_of(root, "activations", n) / "store.zarr").exists() for n in (0, 1))
        add_stage(stage)

    with subscribed(heard.append):
        grow(other, str(root), add=meanwhile)
    assert any("is kept: another run that is alive plans to read it" in str(event) for event in heard)
    assert [(folder_of(root, "activations", n) / "store.zarr").exists() for n in (0, 1)] == [False, True]


@pytest.mark.parametrize("moment", ["between stages", "within a stage"])
def test_a_process_that_lags_does_not_remake_what_was_retired(
    moment: str, tmp_path: Path, reference: Reference
) -> None:
    """Another process of the run finishes while this one stands in stage 0, or between stages 0 and 1."""
    root, four = tmp_path / "a", {"training.progressive.target_stacks": 4}

    def late(stage: Any) -> None:
        if stage.index == 0 and moment == "within a stage":
            grow(tiny(tmp_path, four), str(root))
        add_stage(stage)
        if stage.index == 0 and moment == "between stages":
            grow(tiny(tmp_path, four), str(root))

    heard = Recorder()
    with subscribed(heard):
        grow(tiny(tmp_path, four), str(root), add=late)
    assert heard.made == ["prepare data -1", *made_by_stages(4)]
    assert digests(root) == digests(reference(four))


def _copy(root: Path, to: Path) -> Path:
    shutil.copytree(root, to / "artifacts")
    return to / "artifacts"
