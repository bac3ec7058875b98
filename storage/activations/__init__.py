"""The activation store: rows of hidden states on disk, written once, read in any order, and checked when read."""

from storage.activations.reader import StoreReader

__all__ = ["StoreReader"]
