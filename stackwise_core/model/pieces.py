"""Named tensors whose rows lie in several safetensors files, of which only the rows that are asked for are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


class Pieces(Mapping[str, Tensor]):
    """The tensors of some files by name: the rows in each file follow those in the files before it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files; raises ValueError if one is no safetensors file."""
        self._files: dict[str, list[Any]] = {}
        """The open files that have a tensor, by its name."""
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # SafetensorError, or OSError
                raise ValueError(f"{path} is not a safetensors file ({error})") from None
            for name in file.keys():  # noqa: SIM118, it is no mapping
                self._files.setdefault(name, []).append(file)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a whole tensor."""
        shapes = [file.get_slice(name).get_shape() for file in self._files[name]]
        return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else [])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor, read from the files that have them."""
        found, first = list[Tensor](), 0
        for file in self._files[name]:
            piece = file.get_slice(name)
            last = first + piece.get_shape()[0]
            if max(start, first) < min(stop, last):
                found.append(piece[max(start, first) - first : min(stop, last) - first])
            first = last
        return torch.cat(found) if found else self._files[name][0].get_slice(name)[:1][:0]

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor, in memory of its own."""
        files = self._files[name]
        return files[0].get_tensor(name) if len(files) == 1 else torch.cat([file.get_tensor(name) for file in files])

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._files)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """Return the shape of a named tensor, without reading it."""
    return tensors.shape(name) if isinstance(tensors, Pieces) else tensors[name].shape


def rows_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Return some rows of a named tensor, and read no others."""
    return tensors.rows(name, start, stop) if isinstance(tensors, Pieces) else tensors[name][start:stop]
