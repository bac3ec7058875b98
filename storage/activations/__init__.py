"""The activation store: rows of hidden states on disk, written once, read in any order, never wrong."""

from storage.activations.buffers import empty_aligned
from storage.activations.format import FORMAT_VERSION, VALIDATION_VIEW, Group, GroupSpec
from storage.activations.reader import RowMissingError, StoreReader
from storage.activations.verify import checksum_file, verify_files
from storage.activations.writer import ShardRange, StoreWriter

__all__ = [
    "FORMAT_VERSION",
    "VALIDATION_VIEW",
    "Group",
    "GroupSpec",
    "RowMissingError",
    "ShardRange",
    "StoreReader",
    "StoreWriter",
    "checksum_file",
    "empty_aligned",
    "verify_files",
]
