"""Fixtures of the tests of storage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.artifacts import Artifacts
from support import demand
from support.places import KINDS, BucketPlace, FolderPlace, Place
from support.stores import Store, small_store


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts").open()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the plan of support.demand makes, sealed: to be copied, or put back as it was."""
    return demand.seal_all(tmp_path_factory.mktemp("template") / "artifacts").root


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("original")
    return folder, small_store().write(folder)


@pytest.fixture(scope="session")
def original_int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("int8")
    return folder, small_store("int8").write(folder)


@pytest.fixture
def sealed_int8(original_int8: Any, tmp_path: Path) -> tuple[Store, Path, dict[str, tuple[int, str]]]:
    folder, files = original_int8
    return small_store("int8"), shutil.copytree(folder, tmp_path / "a"), files


@pytest.fixture
def sealed(original: Any, tmp_path: Path) -> tuple[Store, Path, dict[str, tuple[int, str]]]:
    folder, files = original
    return small_store(), shutil.copytree(folder, tmp_path / "a"), files


# ---------------------------------------------------------------- places of every kind


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a held lock again at once, without sleeping."""
    monkeypatch.setattr("storage.locks.sleep", lambda seconds: None)


@pytest.fixture
def new_place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """Make an empty place of a kind."""

    def make(kind: str, name: str = "place") -> Place:
        if kind == "folder":
            return FolderPlace(tmp_path / name)
        request.getfixturevalue("s3")  # the environment that leads there
        uri = request.getfixturevalue("s3_server").bucket()
        return BucketPlace(uri, tmp_path / f"{name}-machines", monkeypatch)

    return make


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, new_place: Callable[..., Place]) -> Place:
    return new_place(request.param)


@pytest.fixture
def target(place: Place, new_place: Callable[..., Place]) -> Place:
    """A place of the other kind: bytes go from folders to buckets and back."""
    return new_place(next(kind for kind in KINDS if kind != place.kind), "target")
