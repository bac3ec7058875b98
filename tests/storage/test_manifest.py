"""Manifests: what the seal covers, and that none of it can be changed unseen."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.stages.identity import NUMERICS, canonical_json
from stackwise_core.stages.plan import plan_run
from storage import manifest as manifest_module
from storage.errors import ArtifactCorruptError, ArtifactError, ArtifactUnsealedError
from storage.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    InputEntry,
    Manifest,
    digest_of,
    fingerprint,
    make_manifest,
    read_manifest,
)

PLAN = plan_run(StackWiseConfig(), "00" * 32)
STAGE = PLAN.stages[1]
REF = STAGE.ref("stack")
FILES = {
    "stack.safetensors": FileEntry(size=10, checksum="sha256:" + "1" * 64),
    "sub/head.safetensors": FileEntry(size=20, checksum="sha256:" + "2" * 64),
    "metrics.jsonl": FileEntry(size=5, checksum="sha256:" + "3" * 64, content=False),
}
INPUTS = (InputEntry(ref=PLAN.data_ref, digest="d" * 64), InputEntry(ref=PLAN.stages[0].ref("stack"), digest="e" * 64))


def make() -> Manifest:
    return make_manifest(REF, STAGE.stack, INPUTS, FILES, {"steps": 3}, {"torch": "x"})


def write(folder: Path, values: Any) -> Path:
    (folder / MANIFEST).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def refused(folder: Path) -> ArtifactCorruptError:
    with pytest.raises(ArtifactCorruptError) as caught:
        read_manifest(folder, REF)
    assert str(folder / MANIFEST) in str(caught.value)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, ValueError)
    return caught.value


@pytest.mark.parametrize("name", ["memory_bytes_peak", "memory_bytes_forecast", "validation_loss_exact", "kept_step"])
def test_a_fact_that_a_report_reckons_with_is_a_number(name: str, tmp_path: Path) -> None:
    sealed = make_manifest(REF, STAGE.stack, INPUTS, FILES, {name: "many"}, {"torch": "x"})
    write(tmp_path, sealed.model_dump_json())
    assert f"has a fact that cannot be used ({name}: " in str(refused(tmp_path))


def test_what_was_sealed_is_read_back(tmp_path: Path) -> None:
    manifest = make()
    write(tmp_path, manifest.model_dump_json(indent=1))
    assert read_manifest(tmp_path, REF) == read_manifest(tmp_path) == manifest
    assert (manifest.ref, manifest.numerics, manifest.format_version) == (REF, NUMERICS["stack"], FORMAT_VERSION)
    assert manifest.inputs == INPUTS
    assert manifest.recipe == STAGE.stack.dump()
    assert (manifest.facts, manifest.fingerprint) == ({"steps": 3}, {"torch": "x"})
    assert manifest.n_bytes == 35
    assert manifest.checksums()["sub/head.safetensors"] == (20, "sha256:" + "2" * 64)
    assert list(manifest.checksums()) == list(FILES)


def test_the_recipe_hashes_to_the_id() -> None:
    """The recipe as it stands in the file, with the kind and its numerics version, gives the id."""
    manifest = make()
    text = canonical_json({"kind": "stack", "numerics": manifest.numerics, "recipe": manifest.recipe})
    assert hashlib.sha256(text.encode()).hexdigest() == REF.sha256


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest as plain values, one of them changed; a value of ... deletes it."""
    values = make().model_dump(mode="json")
    *parents, last = path.split("/")
    place = values
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe/views", 3),
        ("recipe/optim/steps", 1),
        ("recipe/optim/learning_rate", 0.5),
        ("recipe/mask", ...),
        ("recipe/extra", 1),
        ("numerics", 2),
        ("digest", "0" * 64),
        ("files/stack.safetensors", ...),
        ("files/stack.safetensors/size", 11),
        ("files/stack.safetensors/checksum", "sha256:" + "4" * 64),
        ("files/stack.safetensors/content", False),
        ("files/metrics.jsonl/content", True),
        ("files/another", {"size": 0, "checksum": "sha256:0", "content": True}),
    ],
)
def test_an_edited_manifest_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    error = refused(write(tmp_path, changed(path, value)))
    assert "was edited: its recipe or file list does not give its hashes" in str(error)
    assert f"Remove {tmp_path} and run the command that made it again" in error.remedy


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    values = make().model_dump(mode="json")
    values["files"]["other.safetensors"] = values["files"].pop("stack.safetensors")
    assert "was edited" in str(refused(write(tmp_path, values)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ref/sha256", "a" * 64),
        ("ref/kind", "build"),
        ("ref/stage", 2),
        ("ref/sha256", REF.sha256[:12] + "0" * 52),  # the same name, another id
    ],
)
def test_a_manifest_of_another_id_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    error = refused(write(tmp_path, changed(path, value)))
    assert "belongs to" in error.problem
    assert REF.sha256 in error.problem


def test_a_whole_manifest_of_another_artifact_is_refused(tmp_path: Path) -> None:
    """Consistent in itself, but in the wrong place."""
    other = PLAN.stages[0]
    write(tmp_path, make_manifest(other.ref("stack"), other.stack, (), FILES, {}, {}).model_dump_json())
    assert read_manifest(tmp_path).ref == other.ref("stack")
    assert f"belongs to {other.ref('stack').name}" in refused(tmp_path).problem


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
@pytest.mark.parametrize(
    "otherwise_readable",
    [
        True,
        False,
    ],
)
def test_a_newer_format_names_both_versions(version: int, otherwise_readable: bool, tmp_path: Path) -> None:
    values = changed("format_version", version)
    if not otherwise_readable:
        values["invented_later"] = {"x": 1}
    error = refused(write(tmp_path, values))
    assert error.problem == f"the manifest has format {version}, this version reads up to {FORMAT_VERSION}"
    assert error.remedy == "Use the version of StackWise that wrote it"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '"text"', "{}", '{"format_version": "x"}', "\x00\x01", '{"ref": {}}']
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    assert refused(write(tmp_path, text)).problem.startswith("is no manifest (")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\x80\x81\xff{}")
    assert "is no manifest" in refused(tmp_path).problem


def test_an_unknown_field_or_kind_is_refused(tmp_path: Path) -> None:
    for path, value in (("surprise", 1), ("files/stack.safetensors/mode", 7), ("ref/kind", "pickle"), ("files", [])):
        assert "is no manifest" in refused(write(tmp_path, changed(path, value))).problem


def test_no_manifest_is_unsealed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnsealedError, match="was never sealed") as caught:
        read_manifest(tmp_path, REF)
    assert isinstance(caught.value, ArtifactError)


def test_every_cut_and_every_flipped_bit_is_seen_or_harmless(tmp_path: Path) -> None:
    """Of what an id or the digest covers; facts, inputs, fingerprint and logs are records only."""
    original = make()
    text = original.model_dump_json().encode()
    path = tmp_path / MANIFEST
    covered = ("ref", "recipe", "numerics", "digest")

    def same_or_refused(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            found = read_manifest(tmp_path, REF)
        except ArtifactCorruptError:
            return True
        listed = {name: entry for name, entry in found.files.items() if entry.content}
        same_files = listed == {name: entry for name, entry in FILES.items() if entry.content}
        return same_files and all(getattr(found, name) == getattr(original, name) for name in covered)

    for size in range(0, len(text), 7):
        assert same_or_refused(text[:size])
    for position in range(0, len(text), 3):
        flipped = bytearray(text)
        flipped[position] ^= 1 << position % 7
        assert same_or_refused(bytes(flipped)), flipped[max(position - 20, 0) : position + 20]


# ---------------------------------------------------------------- the digest


def test_the_digest_is_of_content_files_only() -> None:
    entry = FileEntry(size=1, checksum="sha256:aa")
    log = FileEntry(size=9, checksum="sha256:bb", content=False)
    base = digest_of({"a": entry, "b": entry})
    assert digest_of({"b": entry, "a": entry}) == base
    assert digest_of({"a": entry, "b": entry, "log": log}) == base
    assert digest_of({"a": entry, "b": entry, "log": log.model_copy(update={"checksum": "sha256:cc"})}) == base
    others = [
        {"a": entry},
        {"a": entry, "c": entry},
        {"a": entry, "b": entry, "c": entry},
        {"a": entry, "b": FileEntry(size=2, checksum="sha256:aa")},
        {"a": entry, "b": FileEntry(size=1, checksum="sha256:ab")},
        {"a": entry, "b": FileEntry(size=1, checksum="sha256:aa", content=False)},
        {},
    ]
    digests = [digest_of(files) for files in others]
    assert base not in digests
    assert len(set(digests)) == len(digests) - 1  # {a} alone, and {a} with a log
    assert digests[0] == digests[5]


def test_facts_fingerprint_and_inputs_are_not_in_the_digest() -> None:
    one = make_manifest(REF, STAGE.stack, INPUTS, FILES, {"seconds": 1.0}, {"threads": 1})
    two = make_manifest(REF, STAGE.stack, (), FILES, {"seconds": 2.0}, {"threads": 8})
    assert one.digest == two.digest
    assert (one.facts, one.fingerprint, one.inputs) != (two.facts, two.fingerprint, two.inputs)


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_says_on_what_it_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = fingerprint(3, "cpu", True)
    assert (found["threads"], found["device"], found["compile"]) == (3, "cpu", True)
    assert found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found

    def no_git(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(manifest_module.subprocess, "run", no_git)
    assert _fresh_commit() == ""


def test_a_git_that_hangs_does_not_stop_the_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], **kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(manifest_module.subprocess, "run", hangs)
    assert _fresh_commit() == ""


def _fresh_commit() -> str:
    """The commit as a process finds it that has not asked before."""
    manifest_module._commit.cache_clear()
    try:
        return fingerprint(1, "cpu", False)["commit"]
    finally:
        manifest_module._commit.cache_clear()
