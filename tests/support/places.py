"""Places of artifacts of every kind, and what the tests of all places do with them.

What is stored is looked at, and damaged, by other means than our code: the file system, or boto3. Where places differ
on purpose, `Expected` says how. One suite for all places holds a third one, or one written anew, to the same behaviour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.stages.identity import Ref
from stackwise_core.stages.plan import RunPlan
from storage.artifacts import Artifacts, artifacts_at
from storage.collect import Collection
from storage.errors import ArtifactError, RunBusyError
from storage.manifest import InputEntry, Manifest
from support.artifacts import CONTENT, LOG, fill_work
from support.house import plan_of
from support.s3_server import client_of
from support.s3_server import machine as being

LESS: dict[str, Any] = {"training": {"progressive": {"target_stacks": 1}}}
FASTER: dict[str, Any] = {"training": {"learning_rate": 0.5, **LESS["training"]}}
TWO: dict[str, Any] = {"training": {"progressive": {"target_stacks": 2}}}
PLAN = plan_of(**TWO)[1]
STAGE = PLAN.stages[0]
REF, STORE, OTHER = STAGE.ref("stack"), STAGE.ref("activations"), PLAN.stages[1].ref("stack")

ROOMS = {
    "data": "data",
    "build": "builds",
    "trunk": "trunks",
    "stack": "stacks",
    "activations": "activations",
    "validation": "validations",
}


# ---------------------------------------------------------------- places


@dataclasses.dataclass(frozen=True)
class Expected:
    """In what places differ, each by design."""

    kills: tuple[str, ...]
    """Failpoints between the manifest in work and the seal of a stack of stage 0."""
    winner: int
    """Of two who made different bytes at once: whose stay, the first's to seal (0) or the last's (1). In a folder the
    lock of the artifact lets nobody begin while another makes it; in a bucket a lease may go stale (decision 15)."""
    young_stays: bool
    """Whether gc leaves what is younger than its grace: in a bucket a run may not have been heard of (decision 18)."""
    gc_beside_a_run: Callable[[], contextlib.AbstractContextManager[Any]]
    """What meets a gc while a run is live: it is refused where there is a lock, else it goes by the plans of runs."""
    strangers_stop_readers: bool
    """Whether a file that is not in the sealed list does: in a bucket nobody but `verify` meets it."""
    sharers_keep_machines_out: bool
    """Whether a lock that one machine shares is refused to another that wants it alone: a lease says who lives."""


class Place:
    """An artifacts root, whoever opens it, and what is stored there, whoever wrote it."""

    kind: str
    expected: Expected
    uri: str

    @functools.cached_property
    def here(self) -> Artifacts:
        """Opened by a first machine, or process."""
        return self.open("here")

    @functools.cached_property
    def there(self) -> Artifacts:
        """Opened by another."""
        return self.open("there")

    def unopened(self, machine: str = "yet another") -> Artifacts:
        """Name it as a new process of a machine."""
        raise NotImplementedError

    def open(self, machine: str = "yet another") -> Artifacts:
        """Open it as a new process of a machine."""
        return self.unopened(machine).open()

    def stored(self, below: str = "") -> dict[str, bytes]:
        """Return all that is stored under a key, by key; not locks, which a look may leave."""
        raise NotImplementedError

    def sums(self) -> dict[str, tuple[int, str]]:
        """Return size and hash of all that is stored, by key; not locks."""
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def wipe(self, key: str) -> None:
        """Delete a file, or all below a key."""
        raise NotImplementedError

    def key(self, ref: Ref, name: str) -> str:
        """Return the key of a file of an artifact, sealed or not."""
        raise NotImplementedError

    def pass_a_day(self) -> None:
        """Let all that is stored be older than any grace."""

    # What follows is the same wherever it is.

    def room(self, ref: Ref) -> str:
        return f"{ROOMS[ref.kind]}/{ref.name}"

    def called(self, ref: Ref) -> str:
        """Return what messages call an artifact."""
        return f"{self.uri}/{self.room(ref)}"

    def files(self, ref: Ref) -> dict[str, bytes]:
        """Return the files of an artifact by name, those of any other attempt at it by key."""
        found, own = self.stored(f"{self.room(ref)}/"), self.key(ref, "")
        manifest = f"{self.room(ref)}/manifest.json"
        return {"manifest.json" if key == manifest else key.removeprefix(own): data for key, data in found.items()}

    def damage(self, ref: Ref, name: str, how: str) -> str:
        """Damage a file where it is stored; return what messages call it."""
        key = self.key(ref, name)
        damage(self, key, how)
        return f"{self.uri}/{key}"

    @property
    def n_bytes(self) -> int:
        return sum(size for size, _ in self.sums().values())


class FolderPlace(Place):
    kind = "folder"
    expected = Expected(
        kills=("promote-stack:0",),
        winner=1,
        young_stays=False,
        gc_beside_a_run=lambda: pytest.raises(RunBusyError, match="run live"),
        strangers_stop_readers=True,
        sharers_keep_machines_out=True,
    )

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def unopened(self, machine: str = "yet another") -> Artifacts:
        return artifacts_at(self.uri)

    def _paths(self) -> Iterator[tuple[str, Path]]:
        found = ((path.relative_to(self.root).as_posix(), path) for path in self.root.rglob("*") if path.is_file())
        return ((key, path) for key, path in found if not key.startswith("locks/"))

    def stored(self, below: str = "") -> dict[str, bytes]:
        return {key: path.read_bytes() for key, path in self._paths() if key.startswith(below)}

    def sums(self) -> dict[str, tuple[int, str]]:
        return {key: (len(data), hashlib.sha256(data).hexdigest()) for key, data in self.stored().items()}

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    def wipe(self, key: str) -> None:
        path = self.root / key
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def key(self, ref: Ref, name: str) -> str:
        return f"{self.room(ref)}/{name}"


class BucketPlace(Place):
    kind = "bucket"
    expected = Expected(
        kills=("promote-stack:0", "upload-stack:1", "upload-stack:4"),
        winner=0,
        young_stays=True,
        gc_beside_a_run=contextlib.nullcontext,
        strangers_stop_readers=False,
        sharers_keep_machines_out=False,
    )

    def __init__(self, uri: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self._scratch, self._monkeypatch = uri, scratch, monkeypatch

    def unopened(self, machine: str = "yet another") -> Artifacts:
        with being(self._scratch / machine):
            return artifacts_at(self.uri)

    def _list(self, below: str) -> Iterator[tuple[str, Any]]:
        client, bucket, prefix = client_of(self.uri)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + below):
            found = ((entry["Key"].removeprefix(prefix), entry) for entry in page.get("Contents", ()))
            yield from ((key, entry) for key, entry in found if not key.startswith("leases/"))

    def stored(self, below: str = "") -> dict[str, bytes]:
        client, bucket, prefix = client_of(self.uri)
        return {key: client.get_object(Bucket=bucket, Key=prefix + key)["Body"].read() for key, _ in self._list(below)}

    def sums(self) -> dict[str, tuple[int, str]]:
        return {key: (entry["Size"], entry["ETag"]) for key, entry in self._list("")}

    def write(self, key: str, data: bytes) -> None:
        client, bucket, prefix = client_of(self.uri)
        client.put_object(Bucket=bucket, Key=prefix + key, Body=data)

    def wipe(self, key: str) -> None:
        client, bucket, prefix = client_of(self.uri)
        for each in [each for each, _ in self._list(key) if each == key or each.startswith(f"{key}/")]:
            client.delete_object(Bucket=bucket, Key=prefix + each)

    def key(self, ref: Ref, name: str) -> str:
        manifest = self.stored(f"{self.room(ref)}/manifest.json")
        if name == "manifest.json":
            return f"{self.room(ref)}/{name}"
        try:
            attempt = json.loads(*manifest.values())["seal"][:16]
        except (TypeError, ValueError, KeyError):
            attempt = "0123456789abcdef"  # of an upload that was not finished
        return f"{self.room(ref)}/{attempt}/{name}"

    def pass_a_day(self) -> None:
        from datetime import UTC, datetime, timedelta

        tomorrow = datetime.now(UTC) + timedelta(hours=25)
        self._monkeypatch.setattr("storage.sealed_objects.clock", lambda: tomorrow)


KINDS = ("folder", "bucket")

only_in_a_bucket = pytest.mark.parametrize("place", ["bucket"], indirect=True)
"""Where no lock keeps others out for sure."""


# ---------------------------------------------------------------- what tests do


def fill(artifacts: Artifacts, files: dict[str, bytes], ref: Ref = REF) -> None:
    fill_work(artifacts, files, ref)


def seal(artifacts: Artifacts, files: dict[str, bytes] = CONTENT, ref: Ref = REF, **facts: Any) -> Manifest:
    """Make and seal an artifact with a log; what differs in its facts differs in its seal."""
    fill(artifacts, {**LOG, **files}, ref)
    inputs = (InputEntry(ref=PLAN.data_ref, digest="d" * 64),)
    return artifacts.seal(ref, PLAN.recipes[ref], inputs, facts, {"torch": "x"}, records=tuple(LOG))


def contents(artifacts: Artifacts, ref: Ref = REF) -> dict[str, bytes]:
    """Return the files of a sealed artifact as a reader gets them, every byte compared."""
    folder = artifacts.checked(ref)
    return {name: (folder / name).read_bytes() for name in artifacts.manifest(ref).files}


def damage(place: Place, key: str, how: str) -> None:
    data = b"".join(place.stored(key).values())
    if how == "missing":
        place.wipe(key)
    else:
        place.write(key, {"flipped": bytes([data[0] ^ 1]) + data[1:], "cut off": data[:-1], "longer": data + b"x"}[how])


@contextlib.contextmanager
def meanwhile(failpoint: str, act: Callable[[], Any]) -> Generator[None]:
    """Do something when this process comes to a failpoint, such as 'promote-stack:0', the first time."""
    done: list[int] = []

    def act_once(pid: int, number: int) -> None:
        patch.delenv("STACKWISE_FAILPOINT")
        done.append(number)
        act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", act_once)
        patch.setenv("STACKWISE_FAILPOINT", f"{failpoint}:KILL")
        yield
    assert done, f"{failpoint} was not reached"


class Killed(BaseException):
    """Stands for the end of this process."""


@contextlib.contextmanager
def killed_at(failpoint: str) -> Generator[None]:
    """Be killed at a failpoint."""

    def die() -> None:
        raise Killed

    with meanwhile(failpoint, die), contextlib.suppress(Killed):
        yield


def names(found: Collection) -> set[str]:
    return {removal.path.name for removal in found.removals}


def names_of(plan: RunPlan) -> set[str]:
    return {ref.name for ref in plan.recipes}


def sealed_names(place: Place) -> set[str]:
    """Return the artifacts that have a manifest where they are stored."""
    found = (key.split("/") for key in place.sums())
    return {key[1] for key in found if key[0] in ROOMS.values() and key[2:] == ["manifest.json"]}


def caught(error: type[ArtifactError], ask: Callable[[Ref], Any], ref: Ref = REF) -> ArtifactError:
    with pytest.raises(error) as found:
        ask(ref)
    assert type(found.value) is error
    assert found.value.exit_code == 3
    return found.value


def refused(error: type[ArtifactError], artifacts: Artifacts, ref: Ref = REF) -> ArtifactError:
    """Return the one error that all who want a sealed artifact get."""
    asks = (artifacts.manifest, artifacts.checked, artifacts.input_entry)
    (message,) = {str(caught(error, ask, ref)) for ask in asks}
    assert artifacts.sealed(ref) is None
    found = caught(error, artifacts.manifest, ref)
    assert str(found) == message
    return found
