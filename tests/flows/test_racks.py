"""A rack that a run has grown, opened in the library: at every depth, to be grown on, and what there is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stackwise_core.errors import ConfigError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError, ArtifactsFolderError
from storage.racks import load_builder, load_rack, open_run
from storage.runs import begin_attempt
from support.adopting import adopted, library_rack, run_batches
from support.modes import MODES, G, grown_in_memory, plan_of
from support.runs import folder_of, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]


@pytest.mark.parametrize("mode", ["mixed", "nf4 dual"])
def test_every_depth_is_the_rack_that_its_stage_left(mode: str, reference: Reference) -> None:
    root = reference(MODES[mode])
    config = tiny(root.parent, MODES[mode])
    builder = ProgressiveRackBuilder(config)
    for depth in range(1, config.training.progressive.target_stacks + 1):
        grown_in_memory(config, root, builder, depth)
        loaded = load_rack(root, "tiny", depth)
        assert tensor_digest(loaded) == tensor_digest(builder.build_rack())
        assert loaded.tied == builder.build_rack().tied == (depth == 1)
        assert load_builder(root, "tiny", depth).n_trained == depth


def test_a_dense_rack_computes_the_same(reference: Reference) -> None:
    opened = open_run(reference(MODES["nf4 dual"]), "tiny")
    stored, dense, tokens = opened.rack(), opened.rack(dense=True), torch.arange(20).view(2, 10)
    torch.testing.assert_close(dense(tokens), stored(tokens), rtol=1e-5, atol=1e-5)
    assert {tensor.dtype for tensor in dense.state_dict().values()} == {torch.float32}
    assert not any("lora" in name for name in dense.state_dict())
    assert any("lora" in name for name in stored.state_dict())


@pytest.mark.parametrize("mode", ["qlora top", "depth prepend joint", "int8 mixed"])
def test_the_library_grows_on_as_it_would_have_by_itself(mode: str, reference: Reference) -> None:
    root = reference(MODES[mode])
    config = tiny(root.parent, MODES[mode])
    loaded, builder = load_builder(root, "tiny"), grown_in_memory(config, root)
    target = config.training.progressive.target_stacks + 1
    for each in (loaded, builder):
        grown_in_memory(config, root, each, target)
    assert tensor_digest(loaded.build_rack()) == tensor_digest(builder.build_rack())
    assert loaded.get_rack_info() == builder.get_rack_info()


def test_before_and_after_the_joint_anneal(reference: Reference) -> None:
    root = reference(MODES["joint"])
    annealed, before = load_rack(root, "tiny"), load_rack(root, "tiny", 3)
    assert len(annealed.stacks) == len(before.stacks) == 3
    assert tensor_digest(before) == tensor_digest(load_rack(reference(MODES["append"]), "tiny"))
    assert tensor_digest(annealed) != tensor_digest(before)


def test_a_rack_that_was_adopted_and_grown_on(tmp_path: Path, reference: Reference) -> None:
    """There and back again: from the library to a run, and from the run to the library."""
    config = tiny(reference().parent)
    builder = library_rack(config, run_batches(config, reference()), 2)
    builder.save(tmp_path / "rack")
    root = tmp_path / "a"
    adopted(reference().parent, {}, tmp_path / "rack", root)
    assert tensor_digest(load_rack(root, "tiny", 2)) == tensor_digest(builder.build_rack())
    with pytest.raises(ConfigError, match=r"depth: got 1; the run tiny has racks of these depths: 2, 3"):
        load_rack(root, "tiny", 1)  # the head belongs to the whole rack that was adopted
    loaded = load_builder(root, "tiny")
    assert loaded.n_trained == 3
    grown_in_memory(config, reference(), loaded, 4)
    assert loaded.n_trained == 4


def test_what_there_is_not_is_one_sentence(tmp_path: Path) -> None:
    one, three = ({f"{G}target_stacks": target} for target in (1, 3))
    root = tmp_path / "a"
    with pytest.raises(ArtifactsFolderError):
        load_rack(root, "tiny")
    grown(tiny(tmp_path, one), root)
    with pytest.raises(ConfigError, match=r"RUN: got 'other'; no such run in .*; there: tiny"):
        load_rack(root, "other")
    config = tiny(tmp_path, three)
    with begin_attempt(Artifacts(root).open(), config, plan_of(config)):
        pass  # planned, and no further
    assert len(load_rack(root, "tiny").stacks) == 1
    for depth in (3, 0):
        with pytest.raises(ConfigError, match=rf"depth: got {depth}; the run tiny has racks of these depths: 1"):
            load_builder(root, "tiny", depth)
    with pytest.raises(ConfigError, match=r"depth: got 'all'"):
        load_rack(root, "tiny", "all")  # pyright: ignore[reportArgumentType]
    path = folder_of(root, "stack", 0) / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactCorruptError, match=r"head.safetensors"):
        load_rack(root, "tiny")
