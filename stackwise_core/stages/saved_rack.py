"""What is known of a rack in a folder: `rack.json`, which describes it and lists its files. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from stackwise_core.config.schema import Mode, ModelConfig, Precision
from stackwise_core.errors import SavedRackError
from stackwise_core.files import standing_folder
from stackwise_core.stages.identity import canonical_json
from stackwise_core.stages.resolve import ModelShape, Value, WhereSaid
from stackwise_core.stages.stages import StackSpec
from stackwise_core.strict import parse_json, told

RACK, CONFIG, BUILDER, STOPPED = "rack.json", "config.yaml", "builder.json", "stopped.safetensors"
MOMENTS = "moments.safetensors"
BEFORE_JOINT, BEFORE_STOP = "before-joint", "before-stop"
Storage = Literal["float32", "float16", "bfloat16", "nvfp4", "nf4"]
_FORMAT, _VERSION = "stackwise-rack", 1
_DIGEST = "sha256"


class SavedAnneal(Value, frozen=True):
    """A joint anneal of a saved rack; the rack before it is in `before-joint`."""

    settings: str
    """The hash of what it was made with; '' where that cannot be told in another process."""
    after: dict[int, dict[str, str]]
    """The digests of the parts of every stack as it left them, by creation index."""


class SavedStop(Value, frozen=True):
    """An interrupted stage of a saved rack; its tensors are in `stopped.safetensors`."""

    settings: str
    """The hash of what it was trained with."""
    step: int
    records: list[dict[str, float]]
    after: dict[str, str]
    """The digests of the rack's parts as the stop left them; the rack before the stage is in `before-stop`."""
    undone: bool
    """Whether the rack is as before the stage already."""


class SavedBuilder(Value, frozen=True):
    """`builder.json`: what a builder knows beside its rack, to go on as if it had not been saved."""

    given: bool
    """Whether it was made from a configuration, and not from dimensions alone."""
    dimensions: dict[str, Any]
    """The sizes that it was given as arguments."""
    building_mode: Mode | None
    default_precision: Precision | None
    model: ModelConfig
    """The section `model` of its rack."""
    said: tuple[str, ...]
    """The keys of its configuration that somebody set; the others say nothing, though the file holds their defaults."""
    created: dict[int, dict[str, str]]
    """The digests of the parts of every stack as it was created, by creation index."""
    created_ends: tuple[str, str]
    """The digests of embedding and head as they were created."""
    annealed: SavedAnneal | None = None
    stopped: SavedStop | None = None


_AGAIN = "Save the rack again, or take another copy of the folder"


class SavedStack(StackSpec, frozen=True):
    """A stack of a saved rack."""

    storage: Storage
    """How its matrices are stored: float32 as long as it has not been trained, and then as its precision says."""
    mode: Mode
    tail: WhereSaid[int] = Field(default=0, ge=0)
    """The stacks above an inserted one when it was created."""
    trained: bool
    """Whether its stage is over; of a rack that was saved without its builder, always true: it is taken as it is."""


class SavedRack(Value, frozen=True):
    """`rack.json`."""

    shape: ModelShape
    seed: int | None
    """The seed of the builder's configuration; None where the rack was saved without its builder."""
    tied: bool
    """Whether the head's matrix is the embedding's; `head.safetensors` holds it all the same."""
    order: tuple[int, ...]
    """Creation indices in data-flow order."""
    stacks: tuple[SavedStack, ...]
    """In creation order."""
    trainable: tuple[str, ...] = ()
    """Names of the rack's parameters that had `requires_grad`; after training there are none."""
    no_config: str = ""
    """Why there is no `config.yaml`, if there is none."""
    files: dict[str, str] = Field(default_factory=dict)
    """POSIX path relative to the folder -> sha256 of its bytes, of every file but `rack.json`."""

    folder: Path = Field(default=Path(), exclude=True)
    """Where it was read from."""

    @model_validator(mode="after")
    def _is_a_rack(self) -> SavedRack:
        indices = list(range(len(self.stacks)))
        if [stack.index for stack in self.stacks] != indices or sorted(self.order) != indices:
            raise ValueError("order and stacks do not name the same stacks")
        return self

    def to_json(self) -> bytes:
        """Return the text of `rack.json`, with the hash of its own content."""
        content = self.model_dump(mode="json")
        head = {"format": _FORMAT, "version": _VERSION, _DIGEST: _digest(content)}
        return json.dumps({**head, **content}, indent=1).encode()

    @classmethod
    def at(cls, folder: str | Path) -> SavedRack:
        """Read what a folder says of its rack.

        Raises:
            SavedRackError: there is no saved rack, another version wrote it, or `rack.json` is damaged.
        """
        named = Path(folder).expanduser()
        folder = standing_folder(named)
        try:
            written = parse_json((folder / RACK).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            found = f"no {RACK} in this folder" if folder.is_dir() else "no such folder"
            raise SavedRackError(named, f"is not a saved rack ({found})", "Give a folder that save() wrote") from None
        except ValueError as error:
            raise SavedRackError(folder / RACK, f"is damaged ({told(error)})", _AGAIN) from None
        return _parsed(folder / RACK, written).model_copy(update={"folder": folder})

    @property
    def tensor_files(self) -> list[str]:
        """The files of the rack itself, without what its builder needs beside it."""
        own = (name for name in self.files if name.partition("/")[0] not in (BEFORE_JOINT, BEFORE_STOP))
        return [name for name in own if name.endswith(".safetensors") and name not in (STOPPED, MOMENTS)]

    def read(self, name: str) -> bytes:
        """Return the bytes of one of its files; raises SavedRackError if they are not what was saved."""
        path = self.folder / name
        if name not in self.files:
            raise SavedRackError(self.folder / RACK, f"does not list {name}", _AGAIN)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise SavedRackError(path, "is missing", _AGAIN) from None
        if (found := hashlib.sha256(data).hexdigest()) != self.files[name]:
            problem = f"is damaged ({len(data):,} bytes, sha256 {found[:12]}, saved with {self.files[name][:12]})"
            raise SavedRackError(path, problem, _AGAIN)
        return data


def _parsed(path: Path, written: Any) -> SavedRack:
    head = {key: written.pop(key, None) for key in ("format", "version", _DIGEST)} if isinstance(written, dict) else {}
    if head.get("format") != _FORMAT:
        raise SavedRackError(path, f"is not of the format {_FORMAT}", "Give a folder that save() wrote")
    if head["version"] != _VERSION:
        problem = f"is of version {head['version']!r} of the format, and this StackWise reads version {_VERSION}"
        raise SavedRackError(path, problem, "Open it with the version of StackWise that wrote it")
    if head[_DIGEST] != _digest(written):
        raise SavedRackError(path, "is damaged, or was edited: its content does not have the hash it names", _AGAIN)
    try:
        return SavedRack.model_validate(written)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        problem = f"cannot be read by this version ({'.'.join(map(str, fault['loc']))}: {fault['msg']})"
        raise SavedRackError(path, problem, "Open it with the version of StackWise that wrote it") from None


def _digest(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
