"""The manifest of an artifact: its recipe, what it was made from, and the digest of its content."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ValidationError

from stackwise_core.stages.identity import NUMERICS, Recipe, Ref, canonical_json
from storage.errors import ArtifactCorruptError, ArtifactNewerError, ArtifactUnsealedError

MANIFEST = "manifest.json"
RETIRED = "retired.json"
FORMAT_VERSION = 1


class FileEntry(BaseModel, frozen=True, extra="forbid"):
    """One file of an artifact."""

    size: int
    """[bytes]"""
    checksum: str
    """'sha256:' and 64 hex digits."""
    content: bool = True
    """False for logs and timings, which may differ between equal artifacts: they are not in the digest."""


class InputEntry(BaseModel, frozen=True, extra="forbid"):
    """One artifact that this one was made from."""

    ref: Ref
    digest: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The seal of an artifact: written last, it lists every file. What has no manifest is not read."""

    format_version: int = FORMAT_VERSION
    ref: Ref
    recipe: dict[str, Any]
    numerics: int
    inputs: tuple[InputEntry, ...]
    files: dict[str, FileEntry]
    digest: str
    """Hash of the content files: equal digests are equal bytes."""
    facts: dict[str, Any]
    """What the task measured: losses, counts, seconds."""
    fingerprint: dict[str, Any]
    """Versions and hardware it was computed with. Recorded, not part of the id."""
    created: str
    seal: str = ""
    """Hash of all of the above, so that a changed fact or input is noticed too."""

    def expected_seal(self) -> str:
        """Return what `seal` must be."""
        return _hash(self.model_dump(mode="json", exclude={"seal"}))

    @property
    def attempt(self) -> str:
        """Folder below the artifact in which an object store keeps the files."""
        return self.seal[:16]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def checksums(self) -> dict[str, tuple[int, str]]:
        """Return {path: (size, checksum)}, as the activation reader and `verify` take it."""
        return {path: (entry.size, entry.checksum) for path, entry in self.files.items()}


def make_manifest(
    ref: Ref,
    recipe: Recipe,
    inputs: tuple[InputEntry, ...],
    files: dict[str, FileEntry],
    facts: dict[str, Any],
    fingerprint: dict[str, Any],
) -> Manifest:
    """Compose the manifest of a finished artifact."""
    manifest = Manifest(
        ref=ref,
        recipe=recipe.dump(),
        numerics=NUMERICS[recipe.kind],
        inputs=inputs,
        files=files,
        digest=digest_of(files),
        facts=facts,
        fingerprint=fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return manifest.model_copy(update={"seal": manifest.expected_seal()})


def digest_of(files: dict[str, FileEntry]) -> str:
    """Return the hash of the sorted list of content files, their sizes and checksums."""
    return _hash({path: [entry.size, entry.checksum] for path, entry in files.items() if entry.content})


def read_manifest(folder: Path, ref: Ref | None = None) -> Manifest:
    """Read and check the manifest of a sealed artifact.

    Raises:
        ArtifactError: there is none, or it cannot be parsed, has a newer format or another id, or was edited.
    """
    path = folder / MANIFEST
    if not path.exists():
        remedy = "Run `stackwise train` with the configuration that makes it: it will be made"
        raise ArtifactUnsealedError(folder, "was never sealed (it has no manifest)", remedy)
    return parse_manifest(path.read_bytes(), path, folder, ref)


def parse_manifest(data: bytes, path: Path | str, folder: Path | str, ref: Ref | None) -> Manifest:
    """Check the bytes of a manifest, which errors call `path`, of a `folder`; see `read_manifest`."""
    remedy = f"Remove {folder} and run the same command again: it will be remade"
    version = _version_of(data)
    if version > FORMAT_VERSION:
        problem = f"the manifest has format {version}, this version reads up to {FORMAT_VERSION}"
        raise ArtifactNewerError(path, problem, "Use the version of StackWise that wrote it")
    try:
        manifest = Manifest.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        raise ArtifactCorruptError(path, f"is no manifest ({str(error).splitlines()[0]})", remedy) from None
    if ref is not None and manifest.ref != ref:
        problem = f"belongs to {manifest.ref.name} ({manifest.ref.sha256}), not to {ref.sha256}"
        raise ArtifactCorruptError(path, problem, remedy)
    recipe = {"kind": manifest.ref.kind, "numerics": manifest.numerics, "recipe": manifest.recipe}
    if _hash(recipe) != manifest.ref.sha256 or digest_of(manifest.files) != manifest.digest:
        raise ArtifactCorruptError(path, "was edited: its recipe or file list does not give its hashes", remedy)
    if manifest.seal != manifest.expected_seal():
        raise ArtifactCorruptError(path, "was edited: its facts or inputs are not what was sealed", remedy)
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactCorruptError(path, f"lists {name!r}, which leads out of its folder", "Do not use it")
    return manifest


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _version_of(data: bytes) -> int:
    try:
        version = json.loads(data).get("format_version", 0)
    except (ValueError, AttributeError):
        return 0
    return version if isinstance(version, int) else 0


def fingerprint(threads: int, device: str, compiled: bool, processes: int = 1) -> dict[str, Any]:
    """Return what else the numbers may depend on: versions, device, CPU, threads, processes, commit."""
    import torch

    return {
        "torch": torch.__version__,
        "device": device,
        "cpu": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "processes": processes,
        "compile": compiled,
        "python": platform.python_version(),
        "commit": _commit(),
    }


@functools.cache
def _commit() -> str:
    """Return the checked-out commit of this code, or '' outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
