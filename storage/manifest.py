"""The manifest of an artifact: its recipe, what it was made from, and the digest of its content."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from stackwise_core.stages.identity import NUMERICS, Recipe, Ref, canonical_json
from stackwise_core.strict import MOST_OF_A_LIST, parse_object, read_bounded, told
from storage.errors import AGAIN, ArtifactCorruptError, ArtifactNewerError, ArtifactUnsealedError
from storage.links import link_error

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class FileEntry(BaseModel, frozen=True, extra="forbid"):
    """One file of an artifact."""

    size: int = Field(ge=0, lt=2**63)
    """[bytes]"""
    checksum: str
    """'sha256:' and 64 hex digits."""
    content: bool = True
    """False for logs and timings, which may differ between equal artifacts: they are not in the digest."""


class _KnownFacts(BaseModel):
    """What a fact is if an artifact has it, which depends on its kind, and on the version that made it."""

    documents: _Count = 0
    train_sequences: _Count = 0
    validation_sequences: _Count = 0
    seq_len: _Count = 0
    largest_token: _Count = 0
    mask_tokens: _Count = 0
    largest_target: _Count = 0
    blocks: _Count = 0
    stacks: _Count = 0
    steps: _Count = 0
    first_step: _Count = 0
    rack_parameters: _Count = 0
    trainable_parameters: _Count = 0
    tokens_per_second: _Count = 0
    memory_bytes_forecast: _Count = 0
    memory_bytes_peak: _Count = 0
    steps_planned: _Count = 0
    kept_step: _Count = 0
    boundary: _Count = 0
    train_rows: _Count = 0
    store_bytes: _Count = 0
    train_loss: _Number = 0
    validation_loss: _Number = 0
    validation_loss_exact: _Number = 0
    seconds: _Number = 0
    flops: _Number = 0
    by_mask_ratio: dict[Annotated[float, Field(allow_inf_nan=False)], _Number] = {}
    operator: str = ""
    strategy: str = ""
    cache: str = ""
    source: str = Field("", alias="from")


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

    def count(self, fact: str) -> int:
        """Return a fact that is a count; raises ArtifactCorruptError if the artifact lacks it."""
        if fact not in self.facts:
            remedy = f"Remove it and {AGAIN}"
            raise ArtifactCorruptError(self.ref.name, f"its manifest lacks the fact {fact}", remedy)
        return self.facts[fact]

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
    try:
        return load_manifest(folder, ref)
    except FileNotFoundError:
        raise ArtifactUnsealedError(folder, "was never sealed (it has no manifest)", f"R{AGAIN[1:]}") from None


def load_manifest(folder: Path, ref: Ref | None = None) -> Manifest:
    """Do the same as `read_manifest`, but raise FileNotFoundError if there is none."""
    path = f"{folder}/{MANIFEST}"  # a string: listings read thousands
    if os.path.islink(folder):
        raise link_error(folder)
    try:
        data = read_bounded(path, MOST_OF_A_LIST)
    except ValueError as error:
        raise ArtifactCorruptError(path, f"is no manifest ({error})", _remake(folder)) from None
    except PermissionError:
        raise ArtifactCorruptError(path, "may not be read by this user", "Let this user read it") from None
    return parse_manifest(data, path, folder, ref)


def _remake(folder: Path | str) -> str:
    return f"Remove {folder} and {AGAIN}"


def parse_manifest(data: bytes, path: Path | str, folder: Path | str, ref: Ref | None) -> Manifest:
    """Check the bytes of a manifest, which errors call `path`, of a `folder`; see `read_manifest`."""
    remedy = _remake(folder)
    try:
        found = parse_object(data)
        version = found.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            problem = f"the manifest has format {version}, this version reads up to {FORMAT_VERSION}"
            raise ArtifactNewerError(path, problem, "Use the version of StackWise that wrote it")
        manifest = Manifest.model_validate(found)
        # A manifest is written with every field, and the hash of what was read is had sooner than that of a dump.
        as_read = _hash({name: value for name, value in found.items() if name != "seal"})
        expected = as_read if as_read == manifest.seal else manifest.expected_seal()
    except ArtifactNewerError:
        raise
    except ValueError as error:
        raise ArtifactCorruptError(path, f"is no manifest ({told(error)})", remedy) from None
    if ref is not None and manifest.ref != ref:
        problem = f"belongs to {manifest.ref.name} ({manifest.ref.sha256}), not to {ref.sha256}"
        raise ArtifactCorruptError(path, problem, remedy)
    recipe = {"kind": manifest.ref.kind, "numerics": manifest.numerics, "recipe": manifest.recipe}
    if _hash(recipe) != manifest.ref.sha256 or digest_of(manifest.files) != manifest.digest:
        raise ArtifactCorruptError(path, "was edited: its recipe or file list does not give its hashes", remedy)
    if manifest.seal != expected:
        raise ArtifactCorruptError(path, "was edited: its facts or inputs are not what was sealed", remedy)
    try:
        _KnownFacts.model_validate(manifest.facts)  # a seal shows an edit, not who sealed it
    except ValidationError as error:
        raise ArtifactCorruptError(path, f"has a fact that cannot be used ({told(error)})", remedy) from None
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not _is_name(name):
            raise ArtifactCorruptError(path, f"lists {name!r}, which leads out of its folder", "Do not use it")
    return manifest


def _is_name(text: str) -> bool:
    return len(text) < 1024 and "\0" not in text


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def fingerprint(threads: int, device: str, compiled: bool, processes: int = 1) -> dict[str, Any]:
    """Return what else the numbers may depend on: versions, device, CPU, card, threads, processes, commit."""
    import torch

    card = {}
    if device.startswith("cuda"):
        deterministic = torch.are_deterministic_algorithms_enabled()
        tf32 = torch.backends.cuda.matmul.allow_tf32
        card = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        card |= {"deterministic": deterministic, "tf32": tf32}
    return {
        "torch": torch.__version__,
        "device": device,
        **card,
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
