"""Reads the small files of an artifacts folder, which may be damaged, or a stranger's: bounded, and JSON strictly."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from stackwise_core.errors import cut

MOST_OF_A_RECORD = 2**20
"""Bytes of a file that holds a few values."""
MOST_OF_A_LIST = 2**28
"""Bytes of a manifest, or a plan: they grow with the files and the stages."""


def read_bounded(path: Path | str, most: int = MOST_OF_A_RECORD) -> bytes:
    """Return the bytes of a plain file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a link, a folder or a device, or has more than `most` bytes.
        OSError: this user may not read it, or the disk does not give it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except NotADirectoryError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError("is a link") from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is not a plain file")
        if found.st_size > most:
            raise ValueError(f"has {found.st_size:,} bytes, more than {most:,}")
        return file.read(found.st_size)


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text; raises ValueError if it is none, is nested too deeply, or holds a NaN."""
    return from_json(data, allow_inf_nan=False)


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raises ValueError, as `parse_json`, also if it is of another type."""
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    return found


def told(error: Exception) -> str:
    """Return what is wrong with a file that was read so, in one line."""
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return cut(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": "))
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return cut(str(error).partition("\n")[0])
