"""The activation store: rows of hidden states on disk, written once, read in any order, never wrong."""

from storage.activations.buffers import empty_aligned
from storage.activations.format import FORMAT_VERSION, Group, GroupSpec
from storage.activations.reader import RowMissingError, StoreReader
from storage.activations.writer import ShardRange, StoreWriter

__all__ = [
    "FORMAT_VERSION",
    "Group",
    "GroupSpec",
    "RowMissingError",
    "ShardRange",
    "StoreReader",
    "StoreWriter",
    "empty_aligned",
]
