"""A saved rack: the same bits when it is read, written whole or not at all, and one sentence where it is not whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from stackwise_core.config.schema import Precision
from stackwise_core.errors import ConfigError, SavedRackError
from stackwise_core.model.adapters import adapter_names, add_adapter
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.precision import convert_storage
from stackwise_core.model.rack import Rack, load_rack, save_rack
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.saved_rack import SavedRack
from support.racks import TOKENS, mixed_rack


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize("tied", [True, False])
def test_every_precision_with_both_adapters_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    rack = mixed_rack(get_args(Precision), tied=tied)
    channels = {3: ChannelStatistics(torch.arange(32.0), torch.arange(1.0, 33.0))}
    before = torch.get_rng_state()
    save_rack(tmp_path / "rack", rack, seed=7, trained=[0, 3], channels=channels)
    loaded, saved, found = load_rack(tmp_path / "rack")
    assert torch.get_rng_state().equal(before)
    assert tensor_digest(loaded) == tensor_digest(rack)
    assert loaded(TOKENS).equal(rack(TOKENS))
    assert loaded.tied == tied == (loaded.head.projection.weight is loaded.embedding.weight)
    for one, other in zip(loaded.stacks, rack.stacks, strict=True):
        assert (one.creation_index, one.precision) == (other.creation_index, other.precision)
        assert adapter_names(one) == adapter_names(other)
    trainable = {name for name, parameter in rack.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trainable
    assert (saved.seed, saved.order) == (7, (4, 3, 2, 1, 0))
    assert [stack.trained for stack in saved.stacks] == [True, False, False, True, False]
    assert [stack.mode for stack in saved.stacks] == ["append", "prepend", "prepend", "prepend", "prepend"]
    assert found.keys() == {3}
    assert found[3].mean.equal(channels[3].mean)
    assert found[3].std.equal(channels[3].std)


def test_a_stack_that_is_not_converted_yet_stays_float32(tmp_path: Path) -> None:
    rack = mixed_rack(["half"])
    convert_storage(rack.stacks[0], "full")
    save_rack(tmp_path / "rack", rack)
    loaded, saved, _ = load_rack(tmp_path / "rack")
    assert (saved.stacks[0].storage, loaded.stacks[0].precision) == ("float32", "half")
    assert tensor_digest(loaded) == tensor_digest(rack)


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    save_rack(tmp_path / "rack", mixed_rack(["full", "qlora"]), no_config="why not")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    adapters = {f"stack-1/adapter-{name}.safetensors" for name in ("stack", "progressive")}
    stacks = {"stack-0/stack.safetensors", "stack-1/stack.safetensors", *adapters}
    assert files == {f"rack/{name}" for name in {"rack.json", "embedding.safetensors", "head.safetensors", *stacks}}
    written = json.loads((tmp_path / "rack/rack.json").read_text())
    assert (written["format"], written["version"], written["no_config"]) == ("stackwise-rack", 1, "why not")
    assert written["stacks"][1]["adapters"] == {
        "stack": {"rank": 2, "alpha": 3.0},
        "progressive": {"rank": 4, "alpha": 1.0},
    }


# ---------------------------------------------------------------- damage


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "rack.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"rack: is not a saved rack \(no such folder\)"),
    "no description": (lambda folder: (folder / "rack.json").unlink(), r"rack: is not a saved rack \(no rack.json"),
    "a cut description": (cut("rack.json"), r"rack.json: is damaged"),
    "a list": (lambda folder: (folder / "rack.json").write_text("[]"), "is not of the format stackwise-rack"),
    "another format": (edited(format="gguf"), "is not of the format stackwise-rack"),
    "another version": (edited(version=2), "is of version 2 of the format, and this StackWise reads version 1"),
    "an edited description": (edited(seed=9), "is damaged, or was edited"),
    "a missing file": (lambda folder: (folder / "head.safetensors").unlink(), "head.safetensors: is missing"),
    "a cut file": (cut("stack-0/stack.safetensors"), r"stack.safetensors: is damaged \([0-9,]+ bytes"),
    "another rack's file": (
        lambda folder: shutil.copy(folder / "head.safetensors", folder / "embedding.safetensors"),
        "embedding.safetensors: is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence_with_path_and_remedy(damage: str, tmp_path: Path) -> None:
    save_rack(tmp_path / "rack", mixed_rack(["full"]))
    act, message = DAMAGES[damage]
    act(tmp_path / "rack")
    with pytest.raises(SavedRackError, match=message) as caught:
        load_rack(tmp_path / "rack")
    assert str(tmp_path / "rack") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "message"), [(b"PK\x03\x04", "is not a safetensors file"), (None, "does not fit the model")]
)
def test_a_strangers_file_with_the_right_hash_is_refused(data: bytes | None, message: str, tmp_path: Path) -> None:
    save_rack(tmp_path / "rack", mixed_rack(["full"]))
    saved = SavedRack.at(tmp_path / "rack")
    path = tmp_path / "rack/stack-0/stack.safetensors"
    path.write_bytes((tmp_path / "rack/head.safetensors").read_bytes() if data is None else data)
    files = saved.files | {"stack-0/stack.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "rack/rack.json").write_bytes(saved.model_copy(update={"files": files}).to_json())
    with pytest.raises(SavedRackError, match=f"stack-0/stack.safetensors: {message}"):
        load_rack(tmp_path / "rack")


# ---------------------------------------------------------------- where it is written


def test_a_saved_rack_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    first, second = mixed_rack(["full"]), mixed_rack(["half", "full"])
    folder = tmp_path / "deep" / "rack"
    (folder / "empty").mkdir(parents=True)
    for rack in (first, second):
        save_rack(folder, rack)
        assert tensor_digest(load_rack(folder)[0]) == tensor_digest(rack)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SavedRackError, match=r"holds notes.txt, which does not belong to the saved rack"):
        save_rack(folder, first)
    assert (folder / "notes.txt").read_text() == "mine"
    assert tensor_digest(load_rack(folder)[0]) == tensor_digest(second)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(SavedRackError, match=r"holds something that is not a saved rack"):
        save_rack(tmp_path / "photos", first)
    with pytest.raises(SavedRackError, match=r"is a file"):
        save_rack(folder / "notes.txt", first)
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "photos"}
    assert {path.name for path in folder.parent.iterdir()} == {"rack"}


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rack: got parameters of torch.bfloat16; the rack was cast"):
        save_rack(tmp_path / "rack", mixed_rack(["full"]).to(torch.bfloat16))
    twice = mixed_rack(["full", "full"])
    twice.stacks[0].creation_index = 0
    with pytest.raises(ConfigError, match=r"creation_index: got \[0, 0\]; each number from 0 on"):
        save_rack(tmp_path / "rack", twice)
    assert not any(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_old_rack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mixed_rack(["full"])
    save_rack(tmp_path / "rack", first)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError(28, "No space left", path)))
        with pytest.raises(OSError, match=r"No space left.*rack"):
            save_rack(tmp_path / "rack", mixed_rack(["half"]))
    assert tensor_digest(load_rack(tmp_path / "rack")[0]) == tensor_digest(first)
    assert [path.name for path in tmp_path.iterdir()] == ["rack"]


def test_what_a_kill_left_is_read_and_cleared(tmp_path: Path) -> None:
    """After a kill between the two renames of `replace_folder`; `test_durable` kills it before every step."""
    first = mixed_rack(["full"])
    save_rack(tmp_path / "rack", first)
    (tmp_path / "rack").rename(tmp_path / ".rack.replaced")
    shutil.copytree(tmp_path / ".rack.replaced", tmp_path / ".rack.saving")
    assert tensor_digest(load_rack(tmp_path / "rack")[0]) == tensor_digest(first)
    assert not (tmp_path / "rack").exists()  # reading changes nothing
    save_rack(tmp_path / "rack", mixed_rack(["half"]))
    assert load_rack(tmp_path / "rack")[0].stacks[0].precision == "half"
    assert [path.name for path in tmp_path.iterdir()] == ["rack"]


def test_an_adapter_added_out_of_order_acts_in_order(tmp_path: Path) -> None:
    rack = mixed_rack(["full"])
    add_adapter(rack.stacks[0], "progressive", 2, 3.0, seed=1)
    add_adapter(rack.stacks[0], "stack", 2, 5.0, seed=2)
    save_rack(tmp_path / "rack", rack)
    assert load_rack(tmp_path / "rack")[0](TOKENS).equal(rack(TOKENS))


# ---------------------------------------------------------------- a rack by itself, and its state_dict


def test_a_rack_saves_and_loads_itself(tmp_path: Path) -> None:
    rack = mixed_rack(["half", "qlora"], tied=False)
    rack.save(tmp_path / "rack")
    loaded = Rack.load(str(tmp_path / "rack"))
    assert tensor_digest(loaded) == tensor_digest(rack)
    assert [stack.trained for stack in SavedRack.at(tmp_path / "rack").stacks] == [True, True]


def test_a_state_of_two_matrices_is_refused_by_a_tied_rack() -> None:
    """torch would load first the embedding and then the head into the one matrix."""
    source, target = mixed_rack(["full"], tied=False), mixed_rack(["full"])
    before = tensor_digest(target)
    with pytest.raises(ConfigError, match=r"two matrices that differ, but this rack ties them: call rack.untie\(\)"):
        target.load_state_dict(source.state_dict())
    assert tensor_digest(target) == before
    target.untie()
    target.load_state_dict(source.state_dict())
    assert target(TOKENS).equal(source(TOKENS))


def test_a_tied_rack_stays_tied() -> None:
    source, target = mixed_rack(["full"]), mixed_rack(["full"])
    torch.nn.init.normal_(source.embedding.weight)
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.head.projection.weight is target.embedding.weight
    apart = mixed_rack(["full"], tied=False)
    apart.load_state_dict(source.state_dict())
    assert apart(TOKENS).equal(target(TOKENS))


@pytest.mark.parametrize("here", get_args(Precision))
@pytest.mark.parametrize("there", get_args(Precision))
def test_a_state_of_another_precision_is_never_rounded_silently(there: Precision, here: Precision) -> None:
    source, target = mixed_rack([there]), mixed_rack([here])
    before = tensor_digest(target)
    if there == here or (here == "full" and there in ("half", "bfloat16")):  # exact in float32
        target.load_state_dict(source.state_dict())
        assert target(TOKENS).equal(source(TOKENS))
        return
    with pytest.raises(RuntimeError, match=r"in the state, but it is stored as|[Uu]nexpected key"):
        target.load_state_dict(source.state_dict())
    assert tensor_digest(target) == before


def test_a_state_with_other_adapters_is_refused() -> None:
    source, target = mixed_rack(["full", "full"]), mixed_rack(["full", "full"])
    add_adapter(source.stacks[1], "stack", 2, 1.0, seed=0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_A"):
        target.load_state_dict(source.state_dict())
    add_adapter(target.stacks[1], "stack", 3, 1.0, seed=0)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"):
        target.load_state_dict(source.state_dict())
