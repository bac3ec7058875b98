"""The files of a Hugging Face checkpoint: what lies in its folder, and its tensors one by one.

The folder is a stranger's: JSON is read strictly and up to a size, only safetensors are opened, and no link is followed
out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from stackwise_core.errors import CheckpointError, ConfigError, Fault
from stackwise_core.files import inside
from stackwise_core.interop.config_json import Described, describe
from stackwise_core.interop.families import EMBEDDING, HEAD, NORM, block_tensors, layer
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.strict import MOST_OF_A_LIST, parse_object, read_bounded, told

CONFIG, SINGLE, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What is kept beside the tokenizer where it is there."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MOST_OF_A_HEADER = 10**8
_AGAIN = "Download the folder again"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Stored(NamedTuple):
    """A tensor of a file, by its header."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A folder whose every tensor is known by name, type and shape, and none is read yet."""

    def __init__(self, folder: str | Path) -> None:
        """Read config.json, the index and the headers of a folder, and compare them.

        Raises:
            CheckpointError: it is no checkpoint, or a file is missing, damaged, or a link out of the folder.
            ConfigError: it is one of another architecture, or says something that the block does not do.
        """
        self.folder = Path(folder).expanduser()
        self.config = self._object(CONFIG)
        self.described: Described = describe(self.config)
        self.tensors = self._headers()
        self._stamps = self._stamped()
        self.is_tied = self._check_tensors()

    # ------------------------------------------------------------ small files

    def small(self, name: str, most: int = MOST_OF_A_LIST) -> bytes | None:
        """Return the bytes of a file that is no tensor; None if there is none."""
        try:
            return read_bounded(self._inside(name), most)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise CheckpointError(self.folder / name, f"cannot be read ({told(error)})", _AGAIN) from None

    def _object(self, name: str) -> dict[str, Any]:
        data = self.small(name)
        if data is None:
            found = f"no {name}" if self.folder.is_dir() else "no such folder"
            remedy = "Give a folder with config.json, model.safetensors and tokenizer.json"
            raise CheckpointError(self.folder, f"is no Hugging Face checkpoint ({found})", remedy)
        try:
            return parse_object(data)
        except ValueError as error:
            raise CheckpointError(self.folder / name, f"is damaged ({told(error)})", _AGAIN) from None

    def _inside(self, name: str) -> Path:
        """Return the real path of a file; one that leads out of the folder is refused."""
        try:
            return inside(self.folder, name)
        except ValueError as error:
            remedy = "Copy the folder with `cp -rL` and import the copy"
            raise CheckpointError(self.folder / name, str(error), remedy) from None

    # ------------------------------------------------------------ tensors

    def path(self, file: str) -> Path:
        """Return where one of its files with tensors is."""
        return self._inside(file)

    @property
    def files(self) -> list[str]:
        """The files that hold its tensors, sorted."""
        return sorted({stored.file for stored in self.tensors.values()})

    def _headers(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        if (self.folder / INDEX).exists():
            where = self._weight_map()
            for file in sorted(set(where.values())):
                found |= {name: Stored(file, *of) for name, of in self._header(file).items()}
            for name in sorted(where.keys() ^ found.keys()):
                holds = "names" if name in where else "does not name"
                raise CheckpointError(self.folder / INDEX, f"{holds} {name}, unlike the files", _AGAIN)
            for name, file in where.items():
                if found[name].file != file:
                    raise CheckpointError(self.folder / file, f"lacks {name}, which the index puts there", _AGAIN)
            return found
        if not (self.folder / SINGLE).exists():
            names = sorted(path.name for path in self.folder.iterdir())
            if pickled := [name for name in names if name.endswith(_PICKLED)]:
                remedy = "Give the checkpoint as safetensors: save_pretrained of transformers writes them"
                raise CheckpointError(self.folder / pickled[0], "is pickled, and may run code when it is read", remedy)
            raise CheckpointError(self.folder, f"has neither {SINGLE} nor {INDEX}", _AGAIN)
        return {name: Stored(SINGLE, *of) for name, of in self._header(SINGLE).items()}

    def _weight_map(self) -> dict[str, str]:
        where = self._object(INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise CheckpointError(self.folder / INDEX, "has no weight_map", _AGAIN)
        for file in where.values():
            if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
                raise CheckpointError(self.folder / INDEX, f"names {file!r}, which is no file of the folder", _AGAIN)
        return where

    def _header(self, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return type and shape of every tensor of a file, whose size must be what its header says."""
        path = self._inside(file)
        try:
            with path.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if size > _MOST_OF_A_HEADER:
                    raise ValueError(f"its header would have {size:,} bytes")
                header = parse_object(opened.read(size))
                there = os.fstat(opened.fileno()).st_size
            header.pop("__metadata__", None)
            found = {name: (str(of["dtype"]), tuple(map(int, of["shape"]))) for name, of in header.items()}
            wanted = 8 + size + max((int(of["data_offsets"][1]) for of in header.values()), default=0)
            if there != wanted:
                raise ValueError(f"has {there:,} bytes, and its header describes {wanted:,}")
        except FileNotFoundError:
            raise CheckpointError(self.folder / file, "is missing", _AGAIN) from None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(self.folder / file, f"is damaged or truncated ({told(error)})", _AGAIN) from None
        return found

    def _check_tensors(self) -> bool:
        """Check that every tensor of the architecture is there and no other, in its shape; say if the head is tied."""
        shape, n_layers = self.described.shape, self.described.n_layers
        wanted = expected(shape, n_layers)
        tied = shape.tie_embeddings and HEAD not in self.tensors
        if tied:
            del wanted[HEAD]
        ours = {name for name in self.tensors if not name.endswith(".rotary_emb.inv_freq")}  # older ones hold the table
        if missing := sorted(wanted.keys() - ours):
            raise CheckpointError(self.folder, f"lacks {_some(missing)}, which {CONFIG} asks for", _AGAIN)
        if more := sorted(ours - wanted.keys()):
            remedy = f"{self.described.family.architecture} has no such tensor: is it another model?"
            raise CheckpointError(self.folder, f"has {_some(more)}, which {CONFIG} does not describe", remedy)
        for name, sizes in wanted.items():
            stored = self.tensors[name]
            if stored.shape != sizes:
                problem = f"has {name} as {list(stored.shape)}, and {CONFIG} asks for {list(sizes)}"
                raise CheckpointError(self.folder / stored.file, problem, f"Mend {CONFIG}, or download again")
            if stored.dtype not in _DTYPES:
                remedy = f"{', '.join(_DTYPES)} can be imported"
                raise CheckpointError(self.folder / stored.file, f"has {name} in {stored.dtype}", remedy)
        return tied

    @property
    def dtype(self) -> str:
        """The type of its matrices; float32 if they are of several."""
        found = {self.tensors[name].dtype for name in self.tensors if name.endswith("_proj.weight")}
        return _DTYPES[found.pop()] if len(found) == 1 else "float32"

    # ------------------------------------------------------------ identity

    def _stamped(self) -> list[tuple[int, int, int]]:
        found = [os.stat(self._inside(file)) for file in self.files]
        return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file with tensors is another than when the headers were read."""
        if self._stamped() != self._stamps:
            raise CheckpointError(self.folder, "changed while it was read", "Import it again")

    def digest(self) -> str:
        """Return the hash of all its files that are imported; each is read once."""
        hashes = {file: _hash_of(self._inside(file)) for file in self.files}
        for name in (CONFIG, TOKENIZER, *BESIDE):
            if (data := self.small(name)) is not None:
                hashes[name] = hashlib.sha256(data).hexdigest()
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def expected(shape: ModelShape, n_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, the head among them, by its name."""
    D, V = shape.d_model, shape.vocab_size
    widths = {"q_proj": shape.q_width, "k_proj": shape.kv_width, "v_proj": shape.kv_width}
    widths |= {"gate_proj": shape.d_ff, "up_proj": shape.d_ff}

    def sizes(name: str) -> tuple[int, ...]:
        *_, module, kind = name.split(".")
        if kind == "bias":
            return (widths[module],)
        if module in ("q_norm", "k_norm"):
            return (shape.qk_norm_widths[module == "k_norm"],)
        if module.endswith("norm"):
            return (D,)
        into = {"o_proj": (D, shape.q_width), "down_proj": (D, shape.d_ff)}
        return into.get(module) or (widths[module], D)

    block = {theirs: sizes(ours) for ours, theirs in block_tensors(shape).items()}
    blocks = {f"{layer(n)}{theirs}": size for n in range(n_layers) for theirs, size in block.items()}
    return {EMBEDDING: (V, D), **blocks, NORM: (D,), HEAD: (V, D)}


def _some(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_precision(shape: ModelShape, precision: str) -> None:
    """Check that the matrices of a shape can be stored in a precision; raises ConfigError."""
    widths = {"hidden_size": shape.d_model, "intermediate_size": shape.d_ff}
    widths |= {"heads": shape.q_width, "key and value heads": shape.kv_width}
    for what, width in widths.items():
        if precision == "nvfp4" and width % 16:
            raise ConfigError([Fault("--precision", "'nvfp4'", f"16 must divide the width of {what}, {width}")])
