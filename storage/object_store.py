"""The client of an object store: the operations that artifacts need, retries, and errors in plain words.

Credentials and the endpoint come from the environment only: obstore reads the variables that the tools of each store
use (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS and so on).
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url

from storage.errors import ArtifactsFolderError, ObjectStoreError
from storage.place import Entry

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import RetryConfig

RETRIES: RetryConfig = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
"""Of one request. With obstore's backoff a store may be away for half a minute."""
FEW_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
"""For requests that may fail, so that a wrong endpoint is reported soon and a run that failed ends soon."""
_AGAIN = 3
_BLOCK_BYTES = 16 * 2**20
_BLOCKS_AHEAD = 4
Result = TypeVar("Result")


class ObjectStore:
    """A prefix in a bucket. Keys are relative to it. Thread-safe."""

    def __init__(self, uri: str, retries: RetryConfig | None = None) -> None:
        """Name it by a URI without credentials, such as s3://bucket/prefix; the first operation connects."""
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
            raise ObjectStoreError(f"{self.where(key)}: {_reason_of(error)}") from None

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
        """Return a small object and its entry in a listing; FileNotFoundError if there is none."""

        def ask() -> tuple[bytes, Entry]:
            answer = obstore.get(self._store, key)
            return bytes(answer.bytes()), _entry(answer.meta)

        with self._explained(key):
            return _again(ask)

    def ranges(self, key: str, offsets: Sequence[int], n_bytes: int) -> list[np.ndarray]:
        """Return ranges of one size, near ones fetched together: uint8 [n_bytes] each, shorter past the end."""
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
        """Yield a large object in order, uint8 [<= 16 MiB] each, while the next blocks are being fetched."""

        def fetch(start: int) -> np.ndarray:
            return self.ranges(key, [start], min(_BLOCK_BYTES, size - start))[0]

        starts = iter(range(0, size, _BLOCK_BYTES))
        with ThreadPoolExecutor(_BLOCKS_AHEAD) as pool:
            coming = [pool.submit(fetch, start) for start in islice(starts, _BLOCKS_AHEAD)]
            while coming:
                block = coming.pop(0).result()
                coming += [pool.submit(fetch, start) for start in islice(starts, 1)]
                yield block

    # ------------------------------------------------------------ writing

    def write(self, key: str, data: bytes | Path) -> None:
        """Put an object atomically; an existing one is replaced."""
        with self._explained(key):
            _again(lambda: obstore.put(self._store, key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Put a small object unless it exists; say whether it was put.

        False may also mean that a first try put it and only its answer was lost: read what is there.
        """
        try:
            with self._explained(key), contextlib.suppress(AlreadyExistsError):
                _again(lambda: obstore.put(self._store, key, data, mode="create", use_multipart=False))
                return True
        except FileNotFoundError:  # a bucket that vanished
            raise ObjectStoreError(f"{self.where(key)}: could not be written; is the bucket still there?") from None
        return False

    def replace(self, key: str, data: bytes, version: UpdateVersion) -> bool:
        """Replace a small object if it still has a version; say whether it was replaced, as `create`."""
        with self._explained(key), contextlib.suppress(PreconditionError, FileNotFoundError):
            _again(lambda: obstore.put(self._store, key, data, mode=version, use_multipart=False))
            return True
        return False

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; missing ones are ignored."""
        if not keys:
            return
        with self._explained(keys[0]), contextlib.suppress(FileNotFoundError):
            _again(lambda: obstore.delete(self._store, list(keys)))

    def delete_below(self, prefix: str) -> None:
        """Delete everything below a key."""
        self.delete([f"{prefix}/{name}" for name in self.list(prefix)])

    def move(self, key: str, to: str) -> None:
        """Copy an object within the store, then delete it."""
        with self._explained(key):
            obstore.rename(self._store, key, to)

    # ------------------------------------------------------------ at the start

    def check(self, *, writes: bool) -> None:
        """Raise ArtifactsFolderError unless the store answers and, for writes, accepts them and honours conditions."""
        try:
            ObjectStore(self.uri, FEW_RETRIES).folders("")
            if writes:
                self._check_conditions()
        except ObjectStoreError as error:
            raise ArtifactsFolderError(f"--artifacts {error.reason}") from None

    def _check_conditions(self) -> None:
        """Put one object twice under the condition that it does not exist: the second must be refused."""
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
    """Repeat what obstore does not repeat by itself; every operation here may be done twice."""
    for _ in range(_AGAIN):
        try:
            return ask()
        except GenericError as error:
            if not _was_not_repeated(error):
                raise
    return ask()


def _entry(meta: ObjectMeta) -> Entry:
    version: UpdateVersion = {}
    if meta["e_tag"] is not None:
        version["e_tag"] = meta["e_tag"]
    if meta["version"] is not None:
        version["version"] = meta["version"]
    return Entry(meta["size"], meta["last_modified"], version)


def probe(uri: str) -> str:
    """Return a line on how long requests take; raise ArtifactsFolderError if reads, writes or conditions fail."""
    store = ObjectStore(uri, FEW_RETRIES)
    store.check(writes=True)
    key = f"leases/probe-{uuid.uuid4().hex}"
    try:
        put = _milliseconds(lambda: store.write(key, b"1"))
        read = _milliseconds(lambda: store.read(key))
        store.delete([key])
    except (ObjectStoreError, FileNotFoundError) as error:
        raise ArtifactsFolderError(f"{store.uri}: {error}") from None
    return f"{store.uri} reads, writes and keeps conditions; a small object: put {put:.0f} ms, read {read:.0f} ms"


def _milliseconds(ask: Callable[[], object]) -> float:
    start = time.perf_counter()
    ask()
    return 1000.0 * (time.perf_counter() - start)


# ---------------------------------------------------------------- what an error of obstore means

_MEANINGS = {
    "NoSuchBucket": "there is no such bucket; create it, or check AWS_ENDPOINT_URL",
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the store does not accept the secret key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "AccessDenied": "the store denies access; check what these credentials may do with this bucket",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
}
_CREDENTIALS = (
    "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
    "(gs: GOOGLE_APPLICATION_CREDENTIALS) in the environment"
)
_METADATA_SERVICES = ("169.254.169.254", "metadata.google.internal", "169.254.170.2")


def _is_lost(error: Exception) -> bool:
    """Say whether the connection is at fault: the same request may get through next time."""
    return "HTTP error:" in str(error) and "builder error" not in str(error)


def _was_not_repeated(error: Exception) -> bool:
    """Say whether the connection is at fault, and obstore did not try again: half an answer, an unsafe request."""
    return _is_lost(error) and not re.search(r"after \d+ retries", str(error))


def _reason_of(error: Exception) -> str:
    """Say in a line what went wrong, without the text of the answer, which may hold headers, keys or a body."""
    text = str(error)
    if "Missing AccessKeyId" in text or "Missing SecretAccessKey" in text or any(s in text for s in _METADATA_SERVICES):
        return _CREDENTIALS
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return _MEANINGS.get(code[1], f"the store answered {code[1]}")
    endpoint = re.search(r"(https?://)(?:[^/@\s]*@)?([^/?\s]+)", text)
    where = f" at {endpoint[1]}{endpoint[2]}" if endpoint else ""
    if "builder error" in text:
        return f"the endpoint{where} is not https; set AWS_ALLOW_HTTP=true if that is wanted"
    if _is_lost(error):
        return f"no connection to the store{where}, or it broke off every time; check AWS_ENDPOINT_URL and the network"
    if status := re.search(r"status code: (\d{3} [A-Za-z ]+)", text):
        return f"the store{where} answered {status[1].strip()}"
    return f"the store{where} failed ({type(error).__name__})"
