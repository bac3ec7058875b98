"""The folder that an export is written to: whole or not at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.files import recover_folder, replace_folder, write_file
from stackwise_core.strict import parse_object, read_bounded

ABOUT = "stackwise.json"
"""What an export is; it lists the other files."""
_FORMAT = "stackwise-export"


def checked_target(to: str | Path, *, force: bool) -> Path:
    """Return a folder to write: absent, empty, or with `force` one that was exported before and nothing else.

    Raises:
        ConfigError: it holds something else; it is left as it is.
    """
    folder = Path(to).expanduser().resolve()
    try:
        if not folder.exists():
            recover_folder(folder)
        if not folder.exists():
            return folder
        if not folder.is_dir():
            raise _UnusableError("it is a file")
        if not (present := {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}):
            return folder
        if not force:
            raise _UnusableError("it is not empty; name another folder, or say --force to replace an earlier export")
        if not (exported := exported_files(folder)):
            raise _UnusableError("it holds something that was not exported; name another folder, or remove it")
        if strange := sorted(present - exported):
            raise _UnusableError(f"it holds {strange[0]}, which was not exported; name another folder, or remove it")
    except _UnusableError as error:
        raise _refused(to, str(error)) from None
    except OSError as error:
        raise _refused(to, f"it cannot be used ({error.strerror})") from None
    return folder


class _UnusableError(Exception):
    """Why a folder cannot be written."""


def _refused(to: str | Path, allowed: str) -> ConfigError:
    return ConfigError([Fault("--to", repr(str(to)), allowed)])


def exported_files(folder: Path) -> set[str]:
    """Return the files that an export wrote into a folder; none if none did."""
    found = about_export(folder)
    return {*found["files"], ABOUT} if found else set()


def about_export(folder: Path) -> dict[str, Any]:
    """Return what an export says of itself; empty if the folder is none."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        found = parse_object(read_bounded(folder / ABOUT))
        if found.get("format") == _FORMAT and isinstance(found.get("files"), dict):
            return found
    return {}


@contextlib.contextmanager
def fresh_folder(folder: Path, n_bytes: int) -> Generator[Path]:
    """Give a new folder to write `n_bytes` into, which takes the place of another when the block ends without an error.

    Raises:
        ConfigError: there is no room, or nothing may be written there.
    """
    around = next(path for path in (folder, *folder.parents) if path.exists())
    if n_bytes > (free := shutil.disk_usage(around).free):
        raise _refused(folder, f"{n_bytes:,} bytes are to be written, and {free:,} are free there; free some")
    fresh = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise _refused(folder, f"nothing can be written there ({error.strerror})") from None
    try:
        yield fresh
        replace_folder(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def write_small(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write small files and return the sha256 of each."""
    for name, data in files.items():
        write_file(folder / name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def write_about(folder: Path, about: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Write what an export is, with the sha256 of each of its files."""
    write_file(folder / ABOUT, as_json({"format": _FORMAT, "version": 1, **about, "files": hashes}))


def as_json(value: Any) -> bytes:
    """Return a value as JSON for people and programs."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
