"""Fixtures of the tests of storage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from support.stores import Store, small_store


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
