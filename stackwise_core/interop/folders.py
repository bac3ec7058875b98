"""A rack in a folder of its own, with no run behind it: one that `save()` wrote, an export, or a checkpoint.

The folder is a stranger's: nothing of it runs, and no link is followed out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.stacks import resolve_time_input
from stackwise_core.data.masks import IntArray
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import CheckpointError, ConfigError, Fault, SavedRackError
from stackwise_core.files import inside
from stackwise_core.generation.unmask import Denoiser
from stackwise_core.interop.checkpoint import BESIDE, CONFIG, TOKENIZER, Checkpoint
from stackwise_core.interop.gguf import FILE
from stackwise_core.interop.hf_import import checkpoint_rack
from stackwise_core.interop.parts import dense_rack
from stackwise_core.interop.target import about_export
from stackwise_core.model.rack import Rack
from stackwise_core.model.saved_builder import config_in, record_in
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.saved_rack import RACK, SavedRack

_LONGEST = 131072
"""The largest `data.seq_len`."""


@dataclass(frozen=True)
class OpenedFolder:
    """A folder whose rack is not read yet."""

    folder: Path
    kind: str
    """`saved rack`, or the family of a checkpoint."""
    source: SavedRack | Checkpoint
    config: StackWiseConfig
    """What is known of how it was trained: its objective, the length of its sequences, its tokenizer."""
    tokenizer_name: str
    """`byte`, or the path of its tokenizer.json; empty if there is none."""
    is_imported: bool
    """Whether it was trained elsewhere, on texts with the start tokens of its tokenizer."""

    @property
    def shape(self) -> ModelShape:
        """The shape of its rack."""
        return self.source.described.shape if isinstance(self.source, Checkpoint) else self.source.shape

    @property
    def called(self) -> dict[str, str]:
        """What a document calls it."""
        return {"folder": str(self.folder)}

    @property
    def ids(self) -> dict[str, Any]:
        """What a document says of its rack: no stage made it, and a checkpoint has no stacks."""
        depth = None if isinstance(self.source, Checkpoint) else len(self.source.stacks)
        return {"stage": None, "how": self.kind, "depth": depth, "stack": None}

    def rack(self, *, dense: bool = False) -> Rack:
        """Return its rack on the CPU; `dense` gives float32 stacks, adapters merged, as a checkpoint always has."""
        if isinstance(self.source, Checkpoint):
            return checkpoint_rack(self.source)
        rack = Rack.load(self.folder).requires_grad_(False)
        return dense_rack(rack) if dense else rack

    def denoisers(self, device: torch.device | None = None) -> list[Denoiser]:
        """Return the dense rack that fills in masked tokens: where depth is time, that of the whole depth."""
        time, ratios = resolve_time_input(self.config), tuple[float, ...]()
        if self.shape.time and time is None:
            allowed = "time is an input of it, and no configuration beside it says its ratios; save() its builder"
            raise ConfigError([Fault("DIR", repr(str(self.folder)), allowed)])
        if self.shape.time and time:
            ratios = tuple(time.ratios(np.arange(time.n_steps, dtype=np.int64)).tolist())
        return [Denoiser(self.rack(dense=True).to(device), step_ratios=ratios)]

    def validation_rows(self) -> Iterator[IntArray]:
        """Raise ConfigError: there are none."""
        raise ConfigError([Fault("--data", "nothing", "a folder has no validation sequences; name a text")])

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer beside it; raises ConfigError if there is none, or it is another model's."""
        if not self.tokenizer_name:
            allowed = f"there is no {TOKENIZER} in it; put it there, or name one with --tokenizer"
            raise ConfigError([Fault("DIR", repr(str(self.folder)), allowed)])
        tokenizer = tokenizer_of(self.config)
        if tokenizer.vocab_size > (rows := self.shape.vocab_size):
            allowed = f"its largest id is {tokenizer.vocab_size - 1}, and the model has {rows} tokens: is it another's?"
            raise ConfigError([Fault("tokenizer", repr(self.tokenizer_name), allowed)])
        return tokenizer


def open_folder(folder: str | Path, tokenizer: str = "") -> OpenedFolder:
    """Find what a folder is, by what lies in it, and read no tensor.

    Args:
        folder: of `save()`, of an export, or of a Hugging Face checkpoint.
        tokenizer: `byte` or the path of a tokenizer.json; empty is the one in the folder.

    Raises:
        SavedRackError: it is none of these, or a file is missing, damaged, or a link out of the folder.
        ConfigError: its model is of another architecture.
    """
    folder = Path(folder).expanduser()
    named = tokenizer or (_checked_tokenizer(folder) if (folder / TOKENIZER).exists() else "")
    if (folder / CONFIG).exists():
        return _checkpoint(folder, named)
    if not (folder / RACK).exists() and folder.is_dir():
        remedy = "Give a folder of save(), of `stackwise export`, or of a Hugging Face checkpoint"
        found = f"holds neither {RACK} nor {CONFIG}"
        if (folder / FILE).exists():
            found, remedy = f"holds {FILE}, which is for llama.cpp", "Export the run again with --format hf"
        elif (folder / "runs").is_dir() and (folder / "stacks").is_dir():
            found, remedy = "holds artifacts", f"Name a run, and give --artifacts {folder}"
        raise SavedRackError(folder, found, remedy)
    return _saved(folder, named)


def _checked_tokenizer(folder: Path) -> str:
    """Return the path of the tokenizer.json in a folder, when neither it nor a file beside it leads out of there."""
    for name in (TOKENIZER, *BESIDE):
        try:
            inside(folder, name)
        except ValueError as error:
            raise CheckpointError(folder / name, str(error), "Copy the folder with `cp -rL` and use the copy") from None
    return str(folder / TOKENIZER)


def _checkpoint(folder: Path, tokenizer: str) -> OpenedFolder:
    checkpoint = Checkpoint(folder)
    described, config = checkpoint.described, StackWiseConfig()
    config.data.seq_len = max(8, min(described.window or described.context, _LONGEST))
    config.training.progressive.training_objective = "clm" if described.shape.causal else "mlm"
    config.data.tokenizer = tokenizer or "byte"
    about = about_export(folder)
    elsewhere = not about or "imported" in about
    return OpenedFolder(folder, described.family.name, checkpoint, config, tokenizer, is_imported=elsewhere)


def _saved(folder: Path, tokenizer: str) -> OpenedFolder:
    saved = SavedRack.at(folder)
    record = record_in(saved)
    if record and not saved.no_config:
        config = config_in(saved, record.said)
        # A path says nothing on another machine, and a stranger could have it lead anywhere.
        tokenizer = tokenizer or ("byte" if config.data.tokenizer == "byte" else "")
    else:
        config = StackWiseConfig()
        config.data.seq_len = _LONGEST
        config.training.progressive.training_objective = "clm" if saved.shape.causal else "mlm"
    config.hardware, config.data.tokenizer = StackWiseConfig().hardware, tokenizer or "byte"
    return OpenedFolder(folder, "saved rack", saved, config, tokenizer, is_imported=False)
