"""Sample rows of a store, beside the text they were computed from."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from flows.pages.page import listed, number
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.data.masks import IntArray
from stackwise_core.data.order import RowOrder
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.data.tokenizer import ByteTokenizer, Tokenizer, decode_pieces
from stackwise_core.errors import ConfigError
from stackwise_core.stages.identity import ActivationRecipe, DataRecipe
from stackwise_core.training.boundary import InputsFromTokens
from storage.activations.format import Group
from storage.activations.metadata import GroupMetadata
from storage.activations.reader import StoreReader
from storage.activations.statistics import evenly_spaced
from storage.artifacts import Artifacts
from storage.errors import ArtifactError
from storage.manifest import Manifest
from storage.runs import find_run, run_names
from storage.sequences import load_sequences

_ROWS: dict[Group, int] = {"train": 4, "validation": 2}
_POSITIONS = 256
"""Longer rows are cut."""


def sample_rows(
    artifacts: Artifacts, manifest: Manifest, reader: StoreReader, groups: dict[Group, GroupMetadata]
) -> tuple[list[dict[str, Any]], str]:
    """Return sample rows of a store with their text and token norms, and the reason if there is no text.

    Each is {group, row, sequence_id, view, norms, pieces, piece_tokens, changed}: the input of the row in readable
    pieces, the number of tokens in each piece, and the indices of the pieces that masking changed.
    """
    source, why_not = _text_source(artifacts, manifest)
    samples = list[dict[str, Any]]()
    for group, wanted in _ROWS.items():
        index = groups[group].rows
        for row in evenly_spaced(len(index.view), wanted).tolist():
            sequence_id, view = int(index.sequence_id[row]), int(index.view[row])
            stream_TD = reader.read(group, [row])[0, :_POSITIONS].double()
            norms = listed(stream_TD.norm(dim=1).numpy())
            text = source.text(sequence_id, view) if source else {"pieces": [], "piece_tokens": [], "changed": []}
            sample = {"group": group, "row": row, "sequence_id": sequence_id, "view": view}
            samples.append({**sample, "norms": norms, **text})
    return samples, why_not


def title_of(sample: dict[str, Any]) -> str:
    """Return the title of a sample row; the sequences of each split are numbered from 0."""
    name = f"{sample['sequence_id'] % FIRST_VALIDATION_ID:,}"
    view = f", view {sample['view']}" if sample["group"] == "train" else ""
    known = [norm for norm in sample["norms"] if norm is not None]
    norms = f"; norms {number(min(known))} to {number(max(known))}" if known else ""
    group = "training" if sample["group"] == "train" else "validation"
    return f"{group} row {sample['row']:,}: sequence {name}{view}{norms}"


def norms_by_piece(sample: dict[str, Any]) -> list[tuple[str, int, list[float]]]:
    """Return each piece of a sample's text, its first position, and the norms that are finite among its tokens."""
    found: list[tuple[str, int, list[float]]] = []
    first = 0
    for piece, length in zip(sample["pieces"], sample["piece_tokens"], strict=True):
        found.append((piece, first, [norm for norm in sample["norms"][first : first + length] if norm is not None]))
        first += length
    return found


class _TextSource:
    """The inputs of a store's rows as text."""

    def __init__(
        self, splits: tuple[PackedSequences, PackedSequences], recipe: ActivationRecipe, by: Tokenizer
    ) -> None:
        train, validation = splits
        time = recipe.mask.time if recipe.mask else None
        order = RowOrder(
            seed=recipe.order_seed,
            n_rows=len(train),
            batch_size=recipe.batch_size,
            views=recipe.views,
            fixed_batches=time is not None and time.by_batch,  # the input of a row depends on its batch
            block=recipe.shuffle_block,
        )
        self.splits, self.tokenizer = splits, by
        self.inputs = InputsFromTokens(train, validation, recipe.mask, order)

    def text(self, sequence_id: int, view: int) -> dict[str, Any]:
        """Return the input of one row in readable pieces."""
        ids = np.array([sequence_id], dtype=np.int64)
        split = self.splits[view < 0]
        clean_T = split.take(split.rows_of(ids))[0][0, :_POSITIONS]
        input_ids: torch.Tensor = self.inputs.batch(ids, view)["input_ids"]
        read_T: IntArray = input_ids[0, :_POSITIONS].numpy()
        pieces = decode_pieces(self.tokenizer, read_T)
        lengths = [n_tokens for _, n_tokens in pieces]
        parts = np.split(clean_T != read_T, np.cumsum(lengths)[:-1])
        return {
            "pieces": [text for text, _ in pieces],
            "piece_tokens": lengths,
            "changed": [number for number, part in enumerate(parts) if part.any()],
        }


def _text_source(artifacts: Artifacts, manifest: Manifest) -> tuple[_TextSource | None, str]:
    ref = next((entry.ref for entry in manifest.inputs if entry.ref.kind == "data"), None)
    if ref is None:
        return None, "its manifest names no tokens"
    try:
        recipe = ActivationRecipe.model_validate(manifest.recipe)
        splits, data = load_sequences(artifacts, ref), DataRecipe.model_validate(artifacts.manifest(ref).recipe)
    except ArtifactError as error:
        return None, f"the tokens cannot be read ({error})"
    except ValidationError:
        return None, "another version of StackWise made the recipes of the store or of its tokens"
    tokenizer = _tokenizer(artifacts, data.tokenizer)
    if tokenizer is None:
        return None, f"no run in {artifacts.root} names a file with the tokenizer {data.tokenizer[:19]}..."
    return _TextSource(splits, recipe, tokenizer), ""


def _tokenizer(artifacts: Artifacts, name: str) -> Tokenizer | None:
    """Return a tokenizer by its name, which contains the hash of its file; the configurations of runs give the path."""
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    for run in run_names(artifacts):
        with contextlib.suppress(ArtifactError, ConfigError):  # damaged or missing: try the next run
            config = find_run(artifacts, run).config
            if config.data.tokenizer != ByteTokenizer.name and tokenizer_of(config).name == name:
                return tokenizer_of(config)
    return None
