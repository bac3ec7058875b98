"""A bit that is flipped anywhere in an artifacts folder is found by `verify`, or changes nothing."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from flows.run.events import Event, StepTaken, request_stop, stopping_on_signals, subscribed
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import GROWTH
from stackwise_core.errors import StageInterruptedError
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError
from storage.manifest import read_manifest
from storage.place import FOLDERS
from storage.retirement import RETIRED
from support.damage import every_kind_of_file
from support.runs import digests, folder_of, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

DECIDES_NOTHING = ("runs/*/current", "locks/*", "prefect/*", "work/**/*", "trash/**/*", "quarantine/**/*")
"""`current` is for people; locks name their last holder; what Prefect recorded is never read; a checkpoint is used if
its checksums fit; what is in quarantine is put back by hand, after every byte was compared."""
QUICK, ALL = 10, 150


def config_of(folder: Path, stacks: int) -> StackWiseConfig:
    small = {"training.steps_per_stack": 2, "validation.sampled_rows": 2, "training.checkpoint_every": 1}
    small |= {"training.optimizer_state": "keep"}
    return tiny(folder, {f"{GROWTH}.target_stacks": stacks, "cache.keep": "all", **small})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attempts of a run: one is done, one was stopped in the middle of its last stage."""
    folder = tmp_path_factory.mktemp("made")
    root = folder / "a"
    grow(config_of(folder, 2), str(root))

    def stop(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 1:
            request_stop()

    with subscribed(stop), stopping_on_signals(), pytest.raises(StageInterruptedError):
        grow(config_of(folder, 3), str(root))
    assert list(root.glob("work/stack-2-*/scratch/checkpoint/state.json"))
    (store,) = root.glob("activations/activations-0-*")
    Artifacts(root).retire(read_manifest(store).ref)
    (root / "prefect").mkdir()
    (root / "prefect" / "server.log").write_text("a log")
    every_kind_of_file(root)
    return root


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)


def decides_nothing(root: Path) -> set[Path]:
    return {path for pattern in DECIDES_NOTHING for path in root.glob(pattern)} & set(files_of(root))


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def value_of(path: Path) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(path.read_bytes())
    return path.read_bytes()


@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, ALL), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_flipped_bit_is_found_or_changes_nothing(seeds: range, made: Path, capsys: Any) -> None:
    free = decides_nothing(made)
    for seed in seeds:
        draw = random.Random(seed)
        path = draw.choice(files_of(made))
        before, value = path.read_bytes(), value_of(path)
        flip(path, draw)
        code, told = main(["verify", "--artifacts", str(made)]), "".join(capsys.readouterr())
        same = path in free or value == value_of(path)
        path.write_bytes(before)
        assert code == (0 if same else 3), (seed, path, told)
        assert same or str(named(made, path)) in told, (seed, path, told)


def test_every_flipped_bit_of_a_retirement_is_found(made: Path, capsys: Any) -> None:
    (path,) = made.glob(f"activations/*/{RETIRED}")
    before = path.read_bytes()
    for seed in range(8):
        flip(path, random.Random(seed))
        assert main(["verify", path.parent.name, "--artifacts", str(made)]) == 3, path.read_bytes()
        assert str(path.parent) in "".join(capsys.readouterr())
        path.write_bytes(before)


def named(root: Path, path: Path) -> Path:
    """Return what must be named: the folder of an artifact, or the file."""
    room, name = path.relative_to(root).parts[:2]
    return root / room / name if room in FOLDERS.values() else path


def test_what_decides_nothing_is_exactly_what_is_listed(made: Path) -> None:
    listed = {path.relative_to(made).parts[0] for path in decides_nothing(made)}
    assert listed == {"runs", "locks", "prefect", "work", "quarantine"}
    deciding = {path.relative_to(made).parts[0] for path in set(files_of(made)) - decides_nothing(made)}
    assert deciding == {*FOLDERS.values(), "runs", "pins"} - {"cooldowns"}  # the run has none
    assert {path.name for path in decides_nothing(made) if "runs" in path.parts} == {"current"}


@pytest.mark.slow
def test_flipped_bits_of_what_decides_nothing_change_nothing(made: Path, tmp_path: Path, capsys: Any) -> None:
    """Not what commands say, and no bit of what is made from there: a damaged checkpoint does not count."""
    roots = [tmp_path / "a" / "root", tmp_path / "b" / "root"]
    for root in roots:
        shutil.copytree(made, root)
    draw, free = random.Random(0), decides_nothing(roots[1])
    unfinished = {path for path in free if path.is_relative_to(roots[1] / "work")}
    for path in free - unfinished:
        flip(path, draw)
    said = [list(commands(root, capsys)) for root in roots]
    assert said[0] == said[1]
    for path in unfinished:
        flip(path, draw)
    for root in roots:
        grow(config_of(made.parent, 3), str(root))
    assert digests(roots[0]) == digests(roots[1])
    assert main(["verify", "--artifacts", str(roots[1])]) == 0


def test_a_store_that_is_damaged_while_it_is_read_is_blamed_for_the_loss(tmp_path: Path) -> None:
    """Its checksums were compared when it was first read: what is flipped after that is read as it is."""
    root = tmp_path / "a"

    def spoil(event: Event) -> None:
        if isinstance(event, StepTaken) and (event.stage, event.step) == (1, 8):  # the second epoch
            for shard in folder_of(root, "activations", 0).glob("store.zarr/activations/c.*"):
                with shard.open("r+b") as file:
                    file.write(b"\xff" * (shard.stat().st_size // 2))  # NaN

    config = tiny(tmp_path, {"training.steps_per_stack": 12, "training.progressive.target_stacks": 2})
    with subscribed(spoil), pytest.raises(ArtifactCorruptError) as error:
        grow(config, str(root))
    store = folder_of(root, "activations", 0)
    assert re.match(
        rf"{store}: was damaged while the stage read it, and gave a loss that is not .*Remove", str(error.value)
    )


def commands(root: Path, capsys: Any) -> Iterator[tuple[int, str]]:
    for words in ("status", "status tiny", "verify", "verify tiny", "du --json", "gc --dry-run --json", "why stack-1"):
        code = main([*words.split(), "--artifacts", str(root)])
        yield code, "".join(capsys.readouterr()).replace(str(root), "ROOT")
