"""The few operations that artifacts need of an object store, and its errors in words.

Credentials and the endpoint come from the environment and nowhere else: obstore reads the variables that
the tools of each store use (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS and so on).
"""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url

from storage.errors import ArtifactsFolderError, ObjectStoreError
from storage.objects.reasons import reason_of, was_not_repeated

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import RetryConfig

RETRIES: RetryConfig = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
"""Of one request. With obstore's backoff a store that is away for half a minute is waited for."""
FEW_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
"""Where an answer is not worth a minute: an endpoint that is wrong is told soon, and a run that failed ends soon."""
_AGAIN = 3
_BLOCK_BYTES = 16 * 2**20
_BLOCKS_AHEAD = 4
Result = TypeVar("Result")


class Entry(NamedTuple):
    """One object of a listing."""

    size: int
    modified: datetime
    version: UpdateVersion
    """What a conditional write compares."""


class Bucket:
    """A prefix in a bucket. Keys are relative to it. Several threads may use it at once."""

    def __init__(self, uri: str, retries: RetryConfig | None = None) -> None:
        """Name it; nothing is asked before the first operation.

        Args:
            uri: such as s3://bucket/prefix.
            retries: of each request; without it `RETRIES`.

        Raises:
            ArtifactsFolderError: it is no URI of a store that is known, or holds a user or a key.
        """
        self.uri, self._retries = uri.rstrip("/"), retries
        scheme, _, rest = self.uri.partition("://")
        name = rest.partition("/")[0]
        if scheme not in ("s3", "gs") or not name:
            raise ArtifactsFolderError(f"--artifacts {uri!r}: give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
        if {"@", "?", "#"} & set(rest) or ":" in name:
            raise ArtifactsFolderError(
                f"--artifacts {scheme}://...: keys and options are not taken from the URI, which ends up in records; "
                "set them in the environment (docs/object-stores.md)"
            )

    def where(self, key: str) -> str:
        """Return the URI of a key."""
        return f"{self.uri}/{key}" if key else self.uri

    @functools.cached_property
    def _store(self) -> Any:
        return from_url(self.uri, retry_config=self._retries or RETRIES)

    @contextlib.contextmanager
    def _explained(self, key: str) -> Generator[None]:
        """Turn what obstore raises into one error that names the URI and what to do."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:  # obstore raises the latter for a missing object
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                raise FileNotFoundError(2, "no such object", self.where(key)) from None
            raise ObjectStoreError(f"{self.where(key)}: {reason_of(error)}") from None

    # ------------------------------------------------------------ reading

    def list(self, prefix: str) -> dict[str, Entry]:
        """Return everything below a prefix, by key relative to it."""

        def ask() -> dict[str, Entry]:
            found = chain.from_iterable(obstore.list(self._store, prefix or None, chunk_size=1000))
            start = len(prefix) + 1 if prefix else 0
            return {each["path"][start:]: _entry(each) for each in found}

        with self._explained(prefix):
            return _again(ask)

    def folders(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix that have something below them, sorted."""
        with self._explained(prefix):
            found = _again(lambda: obstore.list_with_delimiter(self._store, prefix))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def read(self, key: str) -> tuple[bytes, Entry]:
        """Return a small object and what a listing would say of it.

        Raises:
            FileNotFoundError: there is none.
        """

        def ask() -> tuple[bytes, Entry]:
            answer = obstore.get(self._store, key)
            return bytes(answer.bytes()), _entry(answer.meta)

        with self._explained(key):
            return _again(ask)

    def ranges(self, key: str, offsets: Sequence[int], n_bytes: int) -> list[np.ndarray]:
        """Return ranges of one size, near ones fetched together: uint8 [n_bytes] each, shorter past the end.

        Raises:
            FileNotFoundError: there is no such object.
        """
        lengths = [n_bytes] * len(offsets)
        with self._explained(key):
            try:
                found = _again(lambda: obstore.get_ranges(self._store, key, starts=offsets, lengths=lengths))
            except GenericError as error:
                if "InvalidRange" not in str(error):
                    raise
                return [np.empty(0, np.uint8)] * len(offsets)  # the object ends before the first byte
        return [np.frombuffer(memoryview(each), np.uint8) for each in found]

    def blocks(self, key: str, size: int) -> Generator[np.ndarray]:
        """Give a large object in order, some blocks ahead: uint8 [<= 16 MiB] each; nothing if it has no bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """
        starts = list(range(0, size, _BLOCK_BYTES))
        with ThreadPoolExecutor(_BLOCKS_AHEAD) as pool:

            def fetch(start: int) -> np.ndarray:
                return self.ranges(key, [start], min(_BLOCK_BYTES, size - start))[0]

            coming = [pool.submit(fetch, start) for start in starts[:_BLOCKS_AHEAD]]
            for number in range(len(starts)):
                block = coming.pop(0).result()
                if number + _BLOCKS_AHEAD < len(starts):
                    coming.append(pool.submit(fetch, starts[number + _BLOCKS_AHEAD]))
                yield block

    # ------------------------------------------------------------ writing

    def write(self, key: str, data: bytes | Path) -> None:
        """Put an object, whole or not at all; one that is there is replaced."""
        with self._explained(key):
            _again(lambda: obstore.put(self._store, key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Put a small object unless there is one; say whether it was put.

        False may also mean that a first try put it and only the answer was lost: look at what is there.
        """
        try:
            with self._explained(key), contextlib.suppress(AlreadyExistsError):
                _again(lambda: obstore.put(self._store, key, data, mode="create", use_multipart=False))
                return True
        except FileNotFoundError:  # a bucket that vanished
            raise ObjectStoreError(f"{self.where(key)}: could not be written; is the bucket still there?") from None
        return False

    def replace(self, key: str, data: bytes, before: Entry) -> bool:
        """Replace a small object if it is still what it was before; say whether it was replaced, as `create`."""
        with self._explained(key), contextlib.suppress(PreconditionError, FileNotFoundError):
            _again(lambda: obstore.put(self._store, key, data, mode=before.version, use_multipart=False))
            return True
        return False

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there do not matter."""
        if not keys:
            return
        with self._explained(keys[0]), contextlib.suppress(FileNotFoundError):
            _again(lambda: obstore.delete(self._store, list(keys)))

    def move(self, key: str, to: str) -> None:
        """Copy an object within the store, then delete it."""
        with self._explained(key):
            obstore.rename(self._store, key, to)

    # ------------------------------------------------------------ at the start

    def check(self, *, writes: bool) -> None:
        """Make sure that the store answers and, if it is to be written, that it can be, and keeps conditions.

        Raises:
            ArtifactsFolderError: one line that says why not.
        """
        try:
            Bucket(self.uri, FEW_RETRIES).folders("")
            if writes:
                self._check_conditions()
        except ObjectStoreError as error:
            raise ArtifactsFolderError(f"--artifacts {error.reason}") from None

    def _check_conditions(self) -> None:
        """Put one object twice under the condition that it is not there: the second must be refused."""
        key = f"leases/probe-{uuid.uuid4().hex}"
        self.create(key, b"1")
        second = self.create(key, b"2")
        self.delete([key])
        if second:
            raise ArtifactsFolderError(
                f"--artifacts {self.uri}: this store ignores If-None-Match, so two machines could seal one artifact; "
                "use one that keeps conditional writes"
            )


def _again(ask: Callable[[], Result]) -> Result:
    """Ask again what obstore does not repeat by itself; everything here may be done twice."""
    for _ in range(_AGAIN):
        try:
            return ask()
        except GenericError as error:
            if not was_not_repeated(error):
                raise
    return ask()


def _entry(meta: ObjectMeta) -> Entry:
    version: UpdateVersion = {}
    if meta["e_tag"] is not None:
        version["e_tag"] = meta["e_tag"]
    if meta["version"] is not None:
        version["version"] = meta["version"]
    return Entry(meta["size"], meta["last_modified"], version)
