"""What works at a URI, tried with objects of a few bytes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from storage.errors import ArtifactsFolderError, ObjectStoreError
from storage.objects.bucket import FEW_RETRIES, Bucket


def probe(uri: str) -> str:
    """Read, write and write under a condition; say in a line how long a request takes.

    Raises:
        ArtifactsFolderError: one of them does not work; one line says why and what to do.
    """
    bucket = Bucket(uri, FEW_RETRIES)
    bucket.check(writes=True)
    key = f"leases/probe-{uuid.uuid4().hex}"
    try:
        put = _milliseconds(lambda: bucket.write(key, b"1"))
        read = _milliseconds(lambda: bucket.read(key))
        bucket.delete([key])
    except (ObjectStoreError, FileNotFoundError) as error:
        raise ArtifactsFolderError(f"{bucket.uri}: {error}") from None
    return f"{bucket.uri} reads, writes and keeps conditions; a small object: put {put:.0f} ms, read {read:.0f} ms"


def _milliseconds(ask: Callable[[], object]) -> float:
    start = time.perf_counter()
    ask()
    return 1000.0 * (time.perf_counter() - start)
