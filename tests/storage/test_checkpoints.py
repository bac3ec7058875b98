"""Weights and mid-stage state: bit for bit what was saved, or nothing; never a pickle."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import pickletools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.growth_operators import new_rack
from stackwise_core.stages.plan import StagePlan, plan_run
from stackwise_core.training import saved_state
from stackwise_core.training.optimizer import make_optimizer
from stackwise_core.training.saved_state import StateWriter
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import TrainingState, capture
from storage.artifacts import SCRATCH, Artifacts
from storage.checkpoints import (
    HEAD,
    METRICS,
    STACK,
    load_embedding,
    load_head,
    load_stack,
    load_state,
    load_tensors,
    save_state,
    save_tensors,
    save_trained,
)
from storage.errors import ArtifactCorruptError, ArtifactError, StoreSpaceError
from storage.files import remove_temporaries
from support.disk import die_everywhere
from support.runs import stage_model


def configuration(**model: Any) -> StackWiseConfig:
    sizes = {"d_model": 16, "n_heads": 2, "d_ff": 32, "blocks_per_stack": 1, **model}
    return StackWiseConfig.from_dict({"model": sizes, "training": {"progressive": {"target_stacks": 2}}})


PLAN = plan_run(configuration(), "00" * 32)
FIRST, SECOND = PLAN.stages
RECORDS = [{"step": 0, "loss": 0.1 + 0.2, "learning_rate": 1e-300, "gradient_norm": 3.0}]


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), torch.atleast_1d(tensor).contiguous().view(torch.uint8).numpy().tobytes()


def same(a: TrainingState | None, b: TrainingState) -> bool:
    return (
        a is not None
        and (a.step, a.records, set(a.tensors)) == (b.step, b.records, set(b.tensors))
        and all(bits(tensor) == bits(b.tensors[name]) for name, tensor in a.tensors.items())
    )


def a_state(step: int = 1) -> TrainingState:
    """Odd shapes and values: scalars, nothing at all, NaN with a payload, -0.0, subnormals, other layouts."""
    odd = torch.tensor([0x7FC00001, -0x80000000, 1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    tensors = {
        "model.odd": odd + 0 if step == 0 else odd,
        "model.transposed": torch.arange(6.0).view(2, 3).T,
        "model.sliced": torch.arange(10.0)[::3],
        "model.empty": torch.empty(0, 3),
        "model.half": torch.tensor([[1.5]], dtype=torch.bfloat16),
        "optimizer.odd.step": torch.tensor(float(step)),
        "optimizer.odd.exp_avg": torch.full((4,), float(step)),
    }
    return TrainingState(step, tensors, [{"step": n, "loss": 1.0 / (n + 3)} for n in range(step)])


# ---------------------------------------------------------------- the middle of a stage


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for step in (1, 2, 3):
        save_state(tmp_path, a_state(step))
        assert same(load_state(tmp_path), a_state(step))
        assert same(load_state(tmp_path), a_state(step))  # reading changes nothing
    assert {path.name for path in (tmp_path / SCRATCH).iterdir()} == {"checkpoint"}


def trained_a_step() -> tuple[StageModel, torch.optim.Optimizer]:
    """A tied rack's first stage after one optimizer step, so that every moment is there."""
    rack = new_rack(FIRST.shape, 0)
    stack = Stack(FIRST.shape, FIRST.spec.n_blocks, 0)
    initialise(stack, 3)
    rack.stacks.append(stack)
    model = stage_model(rack, 0)
    optimizer = make_optimizer(model, FIRST.spec.optim)
    model.head(model.live_stacks()[0](rack.embedding(torch.arange(5)[None]))).square().sum().backward()
    optimizer.step()
    return model, optimizer


def trained_later() -> StageModel:
    """What a second stage trains, with weights of its own."""
    rack = new_rack(SECOND.shape, 1)
    rack.untie()
    for index in range(2):
        stack = Stack(SECOND.shape, SECOND.spec.n_blocks, index)
        initialise(stack, 5 + index)
        rack.stacks.append(stack)
    return stage_model(rack, 1)


def test_a_tied_model_with_its_optimizer_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained_a_step()
    assert model.embedding is not None
    assert model.head.projection.weight is model.embedding.weight
    state = capture(model, optimizer, RECORDS)
    save_state(tmp_path, state)
    found = load_state(tmp_path)
    assert same(found, state)
    assert found is not None
    assert found.tensors["optimizer.embedding.weight.step"].shape == ()
    assert found.tensors["optimizer.embedding.weight.step"].item() == 1.0
    assert not any(name.startswith("model.head.projection") for name in found.tensors)  # it is the embedding


def damaged(folder: Path, damage: Callable[[Path], Any], name: str) -> TrainingState | None:
    """Load the checkpoint with one of its files damaged, and mend it."""
    path = folder / SCRATCH / "checkpoint" / name
    whole = path.read_bytes()
    try:
        damage(path)
        return load_state(folder)
    finally:
        path.write_bytes(whole)


def flip(position: int, bit: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1 << bit
        path.write_bytes(data)

    return damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path / "work", a_state(2))
    return tmp_path / "work"


def test_damaged_weights_are_no_checkpoint(saved: Path) -> None:
    name = "state.safetensors"
    size = (saved / SCRATCH / "checkpoint" / name).stat().st_size
    for position in range(0, size, 5):
        assert damaged(saved, flip(position, position % 8), name) is None
        assert damaged(saved, lambda path, n=position: os.truncate(path, n), name) is None


def test_a_cut_header_is_no_checkpoint(saved: Path) -> None:
    size = (saved / SCRATCH / "checkpoint/state.json").stat().st_size
    for length in range(0, size, 3):
        assert damaged(saved, lambda path, n=length: os.truncate(path, n), "state.json") is None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_half_a_checkpoint_is_none(name: str, saved: Path) -> None:
    assert damaged(saved, Path.unlink, name) is None
    save_state(saved.with_name("other"), a_state(1))
    other = saved.with_name("other") / SCRATCH / "checkpoint" / name
    assert damaged(saved, lambda path: shutil.copy(other, path), name) is None  # halves of two checkpoints


def test_a_damaged_header_is_no_checkpoint(saved: Path) -> None:
    """A wrong step would train on the wrong batches, and nobody would know."""
    text = (saved / SCRATCH / "checkpoint/state.json").read_bytes()
    wrong: list[str] = []
    for position in range(len(text)):
        try:
            found = damaged(saved, flip(position, position % 2), "state.json")
        except Exception as error:
            wrong.append(f"{position}: {error!r}")
            continue
        if found is not None and not same(found, a_state(2)):
            wrong.append(f"{position}: step {found.step}, records {found.records}")
    assert wrong == []


@pytest.mark.parametrize("header", ["[]", "null", "{}", '"text"'])
def test_a_strange_header_is_no_checkpoint(header: str, saved: Path) -> None:
    assert damaged(saved, lambda path: path.write_text(header), "state.json") is None


class SaveState:
    """The second checkpoint of a stage, killed at any step."""

    @staticmethod
    def prepare(folder: Path) -> None:
        save_state(folder, a_state(1))

    @staticmethod
    def act(folder: Path) -> None:
        save_state(folder, a_state(2))

    @staticmethod
    def check(folder: Path, finished: bool) -> None:
        found = load_state(folder)
        assert same(found, a_state(2)) or (same(found, a_state(1)) and not finished)
        save_state(folder, a_state(3))
        assert same(load_state(folder), a_state(3))
        remove_temporaries(folder)
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
            f"{SCRATCH}/checkpoint/state.{ending}" for ending in ("json", "safetensors")
        }


class SaveStateInAThread(SaveState):
    """The same, while training goes on."""

    @staticmethod
    def act(folder: Path) -> None:
        saved_state._IN_A_THREAD = 0
        state, writer = a_state(2), StateWriter(functools.partial(save_state, folder))
        writer.put(state)
        for tensor in state.tensors.values():
            tensor.zero_()
        writer.settle()


@pytest.mark.parametrize("story", [SaveState, SaveStateInAThread])
def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(story: type[SaveState]) -> None:
    died = die_everywhere(story)
    n_writes = 2 + sum(tensor.numel() > 0 for tensor in a_state(2).tensors.values())  # and two headers
    assert (died["rename"], died["write"], died["fsync"]) == (2, n_writes, 4)


@pytest.mark.parametrize("in_a_thread", [0, 2**40])
@pytest.mark.parametrize("writer", ["os.write", "pathlib.Path.write_bytes"])  # of the tensors, and of the header
def test_a_full_disk_keeps_the_old_checkpoint(
    writer: str, in_a_thread: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_state, "_IN_A_THREAD", in_a_thread)
    states = StateWriter(functools.partial(save_state, tmp_path))

    def keep(step: int) -> None:
        states.put(a_state(step))
        states.settle()

    keep(1)

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        with pytest.raises(StoreSpaceError, match=str(tmp_path)):
            keep(2)
    assert same(load_state(tmp_path), a_state(1))
    keep(3)
    assert same(load_state(tmp_path), a_state(3))


# ---------------------------------------------------------------- a trained stage


def load_first(artifacts: Artifacts, stages: Sequence[StagePlan], **device: torch.device) -> Stack:
    return load_stack(artifacts, stages, 0, **device)


LOADERS: tuple[Callable[..., torch.nn.Module], ...] = (load_first, load_head, load_embedding)


@pytest.fixture(scope="module")
def model() -> StageModel:
    return trained_a_step()[0]


def seal_stage(root: Path, model: StageModel, stage: StagePlan = FIRST, **instead: bytes) -> Artifacts:
    """Seal a stage; `instead` puts other bytes in the place of a file, as a stranger might have sealed them."""
    artifacts = Artifacts(root).open()
    ref = stage.ref("stack")
    save_trained(artifacts.work(ref), stage.spec, model, RECORDS)
    for name, data in instead.items():
        (artifacts.work(ref) / f"{name}.safetensors").write_bytes(data)
    artifacts.seal(ref, stage.stack, (), {}, {}, records=(METRICS,))
    return artifacts


def test_a_trained_stage_comes_back(model: StageModel, tmp_path: Path) -> None:
    artifacts, randomness = seal_stage(tmp_path, model), torch.get_rng_state()
    stack, head, embedding = (load(artifacts, [FIRST]) for load in LOADERS)
    assert torch.equal(torch.get_rng_state(), randomness)  # nothing is drawn for tensors that are read
    for loaded, module in ((stack, model.live_stacks()[0]), (head, model.head), (embedding, model.embedding)):
        assert module is not None
        expected = module.state_dict()
        assert {name: bits(tensor) for name, tensor in loaded.state_dict().items()} == {
            name: bits(tensor) for name, tensor in expected.items()
        }
        assert tensor_digest(loaded) == tensor_digest(module)
    assert stack.creation_index == 0
    folder = artifacts.folder(FIRST.ref("stack"))
    assert [json.loads(line) for line in (folder / METRICS).read_text().splitlines()] == RECORDS
    assert not artifacts.manifest(FIRST.ref("stack")).files[METRICS].content


def test_a_trained_stage_goes_straight_to_a_device(model: StageModel, tmp_path: Path) -> None:
    artifacts = seal_stage(tmp_path, model)
    for load in LOADERS:
        loaded = load(artifacts, [FIRST], device=torch.device("meta"))
        assert all(tensor.is_meta for tensor in loaded.state_dict().values())


def test_head_and_embedding_are_tied_while_training_and_two_tensors_afterwards(
    model: StageModel, tmp_path: Path
) -> None:
    assert model.embedding is not None
    assert model.head.projection.weight is model.embedding.weight
    artifacts = seal_stage(tmp_path, model)
    head, embedding = load_head(artifacts, [FIRST]), load_embedding(artifacts, [FIRST])
    assert torch.equal(head.projection.weight, embedding.weight)
    with torch.no_grad():
        head.projection.weight.zero_()
    assert torch.equal(embedding.weight, model.embedding.weight)
    assert torch.equal(load_embedding(artifacts, [FIRST]).weight, model.embedding.weight)


def test_a_later_stage_saves_no_embedding(model: StageModel, tmp_path: Path) -> None:
    """The embedding of a rack is the one of the first stage, its head the one of the last."""
    first, last = seal_stage(tmp_path, model), trained_later()
    artifacts = seal_stage(tmp_path, last, SECOND)
    assert set(artifacts.manifest(SECOND.ref("stack")).files) == {STACK, HEAD, METRICS}
    stages = [FIRST, SECOND]
    assert load_stack(artifacts, stages, 1).creation_index == 1
    assert tensor_digest(load_stack(artifacts, stages, 1)) == tensor_digest(last.live_stacks()[0])
    assert tensor_digest(load_stack(artifacts, stages, 0)) == tensor_digest(model.live_stacks()[0])
    assert tensor_digest(load_embedding(artifacts, stages)) == tensor_digest(load_embedding(first, [FIRST]))
    assert tensor_digest(load_head(artifacts, stages)) == tensor_digest(last.head)
    assert tensor_digest(load_head(artifacts, [FIRST])) == tensor_digest(model.head)


def tensors_of(module: torch.nn.Module, **changes: Tensor | None) -> bytes:
    tensors = {**{name: tensor.clone() for name, tensor in module.state_dict().items()}, **changes}
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


NORM = "blocks.0.ffn_norm.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({NORM: torch.ones(17)}, "does not fit"),
        ({NORM: torch.ones(1)}, "does not fit"),
        ({NORM: torch.ones(16, 1)}, "does not fit"),
        ({NORM: torch.ones(16, dtype=torch.bfloat16)}, "does not fit"),
        ({NORM: None}, "does not fit"),
        ({"blocks.1.ffn_norm.weight": torch.ones(16)}, "does not fit"),
    ],
)
def test_weights_of_another_model_are_refused(
    change: dict[str, Any], problem: str, model: StageModel, tmp_path: Path
) -> None:
    artifacts = seal_stage(tmp_path, model, stack=tensors_of(model.live_stacks()[0], **change))
    with pytest.raises(ArtifactCorruptError, match=problem) as caught:
        load_stack(artifacts, [FIRST], 0)
    assert str(artifacts.folder(FIRST.ref("stack")) / STACK) in str(caught.value)
    assert caught.value.exit_code == 3
    load_head(artifacts, [FIRST])


def test_every_loader_is_strict(model: StageModel, tmp_path: Path) -> None:
    artifacts = seal_stage(
        tmp_path,
        model,
        head=save({"norm.weight": torch.ones(16)}),
        embedding=save({"weight": torch.ones(264, 17)}),
        stack=save({}),
    )
    for load in LOADERS:
        with pytest.raises(ArtifactCorruptError, match="does not fit"):
            load(artifacts, [FIRST])


def garbage() -> dict[str, bytes]:
    whole = save({"weight": torch.ones(3)})
    return {
        "nothing": b"",
        "noise": b"\x93NUMPY nonsense",
        "cut": whole[:-4],
        "longer": whole + b"x",
        "huge header": (2**62).to_bytes(8, "little") + whole[8:],
        "no json": whole[:8] + b"x" * (len(whole) - 8),
        "a pickle": pickle.dumps({"weight": [1.0]}),
    }


@pytest.mark.parametrize("kind", garbage())
def test_what_is_no_safetensors_file_is_refused(kind: str, model: StageModel, tmp_path: Path) -> None:
    artifacts = seal_stage(tmp_path, model, head=garbage()[kind])
    with pytest.raises(ArtifactCorruptError, match="is not a safetensors file") as caught:
        load_head(artifacts, [FIRST])
    assert caught.value.path.name == HEAD
    load_stack(artifacts, [FIRST], 0)


def test_a_flipped_weight_is_refused(model: StageModel, tmp_path: Path) -> None:
    artifacts = seal_stage(tmp_path, model)
    path = artifacts.folder(FIRST.ref("stack")) / STACK
    flip(path.stat().st_size - 1, 0)(path)
    for load in LOADERS:
        with pytest.raises(ArtifactError, match=STACK):
            load(artifacts, [FIRST])


# ---------------------------------------------------------------- digests and files


def test_the_digest_sees_names_shapes_types_and_every_bit() -> None:
    def digest(**tensors: Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return tensor_digest(module)

    base = torch.arange(6.0)
    variants = [
        digest(a=base),
        digest(b=base),
        digest(a=base.view(2, 3)),
        digest(a=base.view(3, 2)),
        digest(a=base.view(torch.int32)),
        digest(a=base.double()),
        digest(a=base + torch.tensor([0, 0, 0, 0, 0, 5e-7])),
        digest(a=torch.tensor(0.0)),
        digest(a=torch.tensor(-0.0)),
        digest(a=base, b=base),
    ]
    assert len(set(variants)) == len(variants)
    assert digest(b=base, a=base + 1) == digest(a=base + 1, b=base)
    transposed = torch.arange(6.0).view(3, 2).T
    assert digest(a=transposed) == digest(a=transposed.contiguous())
    by_hand = hashlib.sha256(b"a torch.float32 (6,)\n" + np.arange(6, dtype="<f4").tobytes()).hexdigest()
    assert variants[0] == by_hand


def test_tensor_files_round_trip(tmp_path: Path) -> None:
    tensors = a_state().tensors
    save_tensors(tmp_path / "a", tensors)
    found = load_tensors(tmp_path / "a")
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in tensors.items()}
    with pytest.raises(ArtifactCorruptError, match="not a safetensors file"):
        load_tensors(tmp_path / "missing")


def test_no_file_is_a_pickle(model: StageModel, tmp_path: Path) -> None:
    artifacts = seal_stage(tmp_path, model)
    save_state(artifacts.work(SECOND.ref("stack")), a_state(2))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        assert path.suffix in (".json", ".jsonl", ".safetensors")
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))  # torch.save's zip, and a pickle
        with pytest.raises(ValueError, match=r"opcode|pickle"):
            list(pickletools.genops(data))


class Bomb:
    """Unpickling this would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_checkpoint_that_is_a_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the right checksum in its header."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / SCRATCH / "checkpoint"
    folder.mkdir(parents=True)
    payload = pickle.dumps(Bomb())
    (folder / "state.safetensors").write_bytes(payload)
    header = {"step": 1, "sha256": hashlib.sha256(payload).hexdigest(), "records": []}
    (folder / "state.json").write_text(json.dumps(header))
    with contextlib.suppress(Exception):
        assert load_state(tmp_path) is None
    assert not (tmp_path / "exploded").exists()
