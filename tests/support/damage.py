"""Damages to the files of an artifacts folder, each by its name, and the commands that then read it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stackwise_core.stages.identity import Ref, canonical_json
from stackwise_core.stages.state_header import write_header
from storage.artifacts import Artifacts
from storage.files import checksum_file
from storage.manifest import MANIFEST, FileEntry, Manifest, digest_of, read_manifest
from storage.midstage import STATE_FOLDER
from storage.place import FOLDERS, PINS, QUARANTINE, REASON
from storage.reachability import pin
from storage.records import sealed
from support.records import vouch

NASTY = "[/b]\x1b[31m\ud800"


Damage = Callable[[Path], object]


def _write(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data)


def _replace(make: Damage) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _values(to: Any) -> Damage:
    """Give every value of a JSON object another type."""

    def damage(path: Path) -> None:
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            path.write_text(json.dumps(to))
            return
        values = {name: to for name in found if name != "seal"}
        path.write_text(sealed(values) if "seal" in found else json.dumps(values))

    return damage


DAMAGES: dict[str, Damage] = {
    "gone": lambda path: path.unlink(),
    "empty": _write(b""),
    "null": _write(b"null"),
    "list": _write(b"[]"),
    "object": _write(b"{}"),
    "text": _write(json.dumps(NASTY).encode()),
    "noise": _write(bytes(range(256))),
    "deep": _write(b"[" * 100_000),
    "deep value": _write(b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
    "NaN": _write(b'{"a": NaN, "format_version": 1e999}'),
    "digits": _write(b'{"format_version": ' + b"9" * 6000 + b"}"),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "huge": lambda path: os.truncate(path, 2**40),
    "folder": _replace(lambda path: path.mkdir()),
    "pipe": _replace(os.mkfifo),
    "loop": _replace(lambda path: path.symlink_to(path.name)),
    "device": _replace(lambda path: path.symlink_to("/dev/zero")),
    "lists": _values([1, "x"]),
    "numbers": _values(7),
    "nothings": _values(None),
    "nasty": _values(NASTY),
}


def seal(path: Path, manifest: Manifest) -> None:
    """Write a manifest as its maker would."""
    path.write_text(manifest.model_copy(update={"seal": manifest.expected_seal()}).model_dump_json(indent=1))


def resealed_file(path: Path, data: bytes) -> None:
    """Replace a file of an artifact, and seal it as its maker would."""
    path.write_bytes(data)
    folder = next(parent for parent in path.parents if (parent / MANIFEST).exists())
    manifest, name = Manifest.model_validate_json((folder / MANIFEST).read_bytes()), path.relative_to(folder).as_posix()
    entry = FileEntry(size=len(data), checksum=checksum_file(path), content=manifest.files[name].content)
    files = {**manifest.files, name: entry}
    seal(folder / MANIFEST, manifest.model_copy(update={"files": files, "digest": digest_of(files)}))


def resealed(path: Path, section: str, value: Any) -> None:
    """Give every entry of a section of a manifest a value, and seal it as its maker would."""
    found = json.loads(path.read_text())
    found[section] = {name: value for name in found[section]}
    manifest = Manifest.model_validate(found)
    ref = manifest.ref
    if section == "recipe":
        recipe = {"kind": ref.kind, "numerics": manifest.numerics, "recipe": manifest.recipe}
        ref = Ref(kind=ref.kind, stage=ref.stage, sha256=hashlib.sha256(canonical_json(recipe).encode()).hexdigest())
    seal(path, manifest.model_copy(update={"ref": ref}))
    if section == "recipe":
        path.parent.rename(path.parent.with_name(ref.name))


_LIES: dict[str, Any] = {"lists": [1], "texts": "[/b]\x1b[31m", "nothings": None, "numbers": -1, "objects": {"a": {}}}
DAMAGES |= {
    f"sealed {section} {name}": partial(resealed, section=section, value=value)
    for section in ("facts", "recipe", "fingerprint")
    for name, value in _LIES.items()
}

_CONTENTS = {"empty": b"", "object": b"{}", "list": b"[]", "noise": bytes(range(256)), "deep": b"[" * 100_000}
DAMAGES |= {f"sealed file {name}": partial(resealed_file, data=data) for name, data in _CONTENTS.items()}

FILES = (
    "data/*/manifest.json",
    "builds/build-1-*/manifest.json",
    "trunks/trunk-1-*/manifest.json",
    "stacks/stack-0-*/manifest.json",
    "stacks/stack-1-*/manifest.json",
    "activations/activations-0-*/manifest.json",
    "validations/validation-1-*/manifest.json",
    "validations/validation-1-*/report.json",
    "builds/build-1-*/build.json",
    "stacks/stack-1-*/stack.safetensors",
    "stacks/stack-1-*/metrics.jsonl",
    "data/*/train_tokens.npy",
    "activations/activations-0-*/store.zarr/zarr.json",
    "activations/activations-0-*/store.zarr/activations/zarr.json",
    "activations/activations-0-*/store.zarr/activations/c.0.0.0",
    "activations/activations-0-*/records/*.json",
    "runs/tiny/current",
    "runs/tiny/attempts/0001/start.json",
    "runs/tiny/attempts/0001/outcome.json",
    "runs/tiny/attempts/0001/plan.json",
    "runs/tiny/attempts/0001/config.yaml",
    "pins/*.json",
    "locks/gc",
    "locks/run-tiny",
    "quarantine/*/reason.txt",
    "quarantine/*/manifest.json",
    "work/stack-9-*/manifest.json",
    "work/stack-9-*/scratch/checkpoint/state.json",
)
COMMANDS = (
    "status",
    "status --json",
    "status tiny",
    "verify",
    "verify tiny",
    "inspect {name}",
    "inspect {name} --json",
    "why {name}",
    "why stack-1 {config}",
    "du",
    "gc --dry-run",
    "plan {config}",
    "train {config}",
    "quarantine",
    "quarantine --release stack-0",
    "push {copy}",
    "push {copy} tiny",
    "push {copy} {name}",
    "gc --pin {name}",
    "gc --unpin stack-1",
    "gc --keep-last 0",
)


def file_of(root: Path, pattern: str) -> Path:
    """Return the first file of a pattern."""
    return min(root.glob(pattern))


def applies(pattern: str, damage: str) -> bool:
    """Say whether a damage can be done to a file."""
    if not damage.startswith("sealed"):
        return True
    room, name = pattern.partition("/")[0], pattern.rpartition("/")[2]
    return room in FOLDERS.values() and (name == MANIFEST) != damage.startswith("sealed file")


def damaged(root: Path, pattern: str, damage: str) -> str:
    """Damage the first file of a pattern; return the name of the artifact that it belongs to, or of another."""
    path = file_of(root, pattern)
    room, name = path.relative_to(root).parts[:2]
    before = set((root / room).iterdir())
    DAMAGES[damage](path)
    if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**20:
        vouch(path)
    (folder,) = set((root / room).iterdir()) - before or {root / room / name}
    return folder.name if room in FOLDERS.values() else "stack-1"


def every_kind_of_file(root: Path) -> None:
    """Add to the artifacts of the run 'tiny' a pin, an entry in quarantine, unfinished work and a signed lock."""
    stack = file_of(root, "stacks/stack-1-*")
    (root / PINS).mkdir(exist_ok=True)
    pin(Artifacts(root), read_manifest(stack).ref)
    aside = root / QUARANTINE / f"{stack.name}.1.0"
    shutil.copytree(stack, aside)
    (aside / REASON).write_text("because")
    checkpoint = root / "work" / "stack-9-0123456789ab" / STATE_FOLDER
    checkpoint.mkdir(parents=True)
    write_header(checkpoint, {"step": 3})
    shutil.copy(stack / MANIFEST, checkpoint.parents[1] / MANIFEST)
    (root / "locks" / "gc").write_text('{"pid": 1, "host": "here", "since": "now"}')
