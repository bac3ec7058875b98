"""Examples of a custom objective: what a line holds is in its row, padding has no loss, faults name their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.run.prepare import prepare_data
from stackwise_core.data.examples import ExampleFormat, pack_examples
from stackwise_core.data.packing import Corpus, read_corpus
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.errors import ConfigError, CorpusError
from stackwise_core.stages.plan import plan_config
from storage.artifacts import Artifacts
from support.corpora import corpus_of as documents
from support.runs import tiny

PAD = 57
FORM = ExampleFormat(seq_len=6, vocab_size=60, pad_token=PAD, targets_are_tokens=True)
Line = dict[str, list[Any]]


def lines_of(lengths: list[int], seed: int = 0, masked: bool = True) -> list[Line]:
    draw = np.random.default_rng(seed)
    lines: list[Line] = []
    for length in lengths:
        line: Line = {name: draw.integers(0, 60, length).tolist() for name in ("input_ids", "targets")}
        if masked:
            line["masks"] = [True, *(draw.random(length - 1) < 0.5).tolist()]
        lines.append(line)
    return lines


def corpus_of(*files: list[Line]) -> Corpus:
    texts = ["\n".join(json.dumps(line) for line in lines).encode() for lines in files]
    return documents(*texts, ending="jsonl")


def rows_of(split: PackedSequences) -> list[tuple[list[int], list[int], list[bool]]]:
    assert split.targets is not None
    assert split.masks is not None
    return list(zip(split.tokens.tolist(), split.targets.tolist(), split.masks.tolist(), strict=True))


def padded(lines: list[Line]) -> list[tuple[list[int], list[int], list[bool]]]:
    found: list[tuple[list[int], list[int], list[bool]]] = []
    for line in lines:
        n = len(line["input_ids"])
        masks = line.get("masks", [True] * n)
        rest = 6 - n
        found.append((line["input_ids"] + [PAD] * rest, line["targets"] + [0] * rest, masks + [False] * rest))
    return found


# ---------------------------------------------------------------- rows


@settings(max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=40), st.floats(0.05, 0.45), st.booleans(), st.integers(0, 99))
def test_every_line_is_one_padded_row(lengths: list[int], fraction: float, masked: bool, seed: int) -> None:
    lines = lines_of(lengths, seed, masked)
    cut = len(lines) // 3
    train, validation = pack_examples(corpus_of(lines[:cut], lines[cut:]), FORM, 0, fraction)
    n_held = max(1, round(len(lines) * fraction))
    assert rows_of(train) == padded(lines[:-n_held])
    assert rows_of(validation) == padded(lines[-n_held:])
    assert train.sequence_ids.tolist() == list(range(len(train)))
    assert validation.sequence_ids.tolist() == [FIRST_VALIDATION_ID + n for n in range(n_held)]


def test_at_most_so_many_train_and_as_many_validate() -> None:
    lines = lines_of([3] * 20)
    _, validation = pack_examples(corpus_of(lines), FORM, 0, 0.2)
    few, same = pack_examples(corpus_of(lines), FORM, 7, 0.2)
    assert rows_of(few) == padded(lines[:7])
    assert rows_of(same) == rows_of(validation) == padded(lines[16:])


def test_batches_hold_targets_and_masks_of_their_rows() -> None:
    lines = lines_of([4, 6, 1, 5])
    train, _ = pack_examples(corpus_of(lines), FORM, 0, 0.25)
    fields = train.fields(np.array([2, 0]))
    rows = list(zip(*(fields[name].tolist() for name in ("input_ids", "targets", "masks")), strict=True))
    assert rows == [padded(lines)[2], padded(lines)[0]]
    assert fields["sequence_ids"].tolist() == [2, 0]
    text = PackedSequences(train.tokens, train.sequence_ids)
    assert text.fields(np.array([1])).keys() == {"input_ids", "sequence_ids"}


def test_an_example_without_loss_positions_is_one() -> None:
    lines = lines_of([4, 4, 4])
    lines[0]["masks"] = [False] * 4
    lines[0]["targets"] = [-100] * 4  # no target, and none is asked for
    train, _ = pack_examples(corpus_of(lines), FORM, 0, 0.3)
    assert rows_of(train) == padded(lines[:2])


def test_a_loss_of_its_own_takes_any_target() -> None:
    lines: list[Line] = [{"input_ids": [1, 2], "targets": [-(2**63), 2**63 - 1]}] * 2
    form = ExampleFormat(seq_len=2, vocab_size=60, pad_token=PAD, targets_are_tokens=False)
    train, _ = pack_examples(corpus_of(lines), form, 0, 0.3)
    assert train.targets is not None
    assert train.targets.tolist() == [[-(2**63), 2**63 - 1]]


def test_tokens_are_stored_as_wide_as_they_need() -> None:
    for largest, pad, dtype in ((2**16 - 1, 0, np.uint16), (2**16, 0, np.uint32), (5, 2**16, np.uint32)):
        form = ExampleFormat(seq_len=3, vocab_size=2**17, pad_token=pad, targets_are_tokens=True)
        lines: list[Line] = [{"input_ids": [1, 2], "targets": [3, 4]}, {"input_ids": [largest], "targets": [7]}]
        for split in pack_examples(corpus_of(lines), form, 0, 0.3):
            assert split.tokens.dtype == dtype
        assert split.tokens.tolist() == [[largest, pad, pad]]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("once upon a time", r"is not JSON \(.*; the custom objective reads one JSON object a line"),
        ("[1, 2]", "is not a JSON object; the custom objective reads one JSON object a line"),
        ('{"targets": [1]}', r"the column 'input_ids' is missing \(it has \['targets'\]\)"),
        ('{"input_ids": [1]}', r"the column 'targets' is missing \(it has \['input_ids'\]\)"),
        ('{"input_ids": [1], "targets": [1], "mask": [true]}', "got the column 'mask'; only input_ids, targets, masks"),
        ('{"input_ids": [1, 2], "targets": [1]}', "got 1 targets for 2 input_ids; give one for each"),
        ('{"input_ids": [1], "targets": [1], "masks": []}', "got 0 masks for 1 input_ids; give one for each"),
        ('{"input_ids": [], "targets": []}', "got 0 input_ids; give 1 to data.seq_len = 6"),
        ('{"input_ids": [1,1,1,1,1,1,1], "targets": [1,1,1,1,1,1,1]}', "got 7 input_ids; .* 6, or raise that"),
        ('{"input_ids": [60], "targets": [1]}', "the token 60, outside 0 to 59; correct it, or raise model.vocab_size"),
        ('{"input_ids": [-1], "targets": [1]}', "input_ids hold the token -1, outside 0 to 59; correct it$"),
        ('{"input_ids": [1], "targets": [60]}', "targets hold the target 60, outside 0 to 59; .* raise model.vocab"),
        ('{"input_ids": [1], "targets": [-100]}', "the target -100, .* correct it, or give masks that are false"),
        ('{"input_ids": [1.5], "targets": [1]}', r"input_ids is \[1.5\]; a list of integers is expected"),
        ('{"input_ids": "ab", "targets": [1]}', "input_ids is 'ab'; a list of integers is expected"),
        ('{"input_ids": [true], "targets": [1]}', r"input_ids is \[True\]; a list of integers is expected"),
        ('{"input_ids": [1], "targets": [1], "masks": [1]}', r"masks is \[1\]; a list of true and false is expected"),
        ('{"input_ids": [1], "targets": [9223372036854775808]}', "targets holds a number that does not fit into 64"),
        ("[" * 100_000, "is not JSON"),
        (
            '{"input_ids": [1], "input_ids": [2], "targets": [1]}',
            "has the key 'input_ids' twice",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    good = '{"input_ids": [1], "targets": [2]}'
    (tmp_path / "rows.jsonl").write_text(f"{good}\n\n  \n{line}\n{good}\n")
    with pytest.raises(CorpusError, match=rf"^data\.source: .*/rows\.jsonl:4: .*{says}"):
        pack_examples(read_corpus(f"{tmp_path}/*.jsonl", examples=True), FORM, 0, 0.1)


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ([], "none of its 0 training examples .of 0. has"),
        ([True], "none of its 0 training examples .of 1. has"),
        ([False, True], "none of its 1 training examples .of 2. has"),
        ([True, True, False], "none of its 1 validation examples .of 3. has"),
    ],
)
def test_each_split_needs_a_loss_position(masks: list[bool], says: str) -> None:
    lines: list[Line] = [{"input_ids": [1], "targets": [1], "masks": [mask]} for mask in masks]
    with pytest.raises(CorpusError, match=rf"data\.source: got 'here'; {says} a loss position"):
        pack_examples(corpus_of(lines), FORM, 0, 0.1)


def test_what_was_packed_for_a_larger_model_is_not_fed_to_a_smaller(tmp_path: Path) -> None:
    """The artifact has the same id, so its tokens are asked again."""
    lines: list[Line] = [{"input_ids": [300, 2], "targets": [n, 310 + n % 2]} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    artifacts = Artifacts(tmp_path / "artifacts").open()

    def prepare(**changes: Any) -> None:
        values = {"data.source": str(tmp_path / "rows.jsonl"), "training.progressive.training_objective": "custom"}
        config = tiny(tmp_path, values | changes)
        prepare_data(config, artifacts, plan_config(config))

    with pytest.raises(CorpusError, match=r"rows\.jsonl:1: input_ids hold the token 300, outside 0 to 263"):
        prepare()
    prepare(**{"model.vocab_size": 312})
    with pytest.raises(ConfigError, match=r"got 311; .* holds the target 311: at least 312 is needed") as caught:
        prepare(**{"model.vocab_size": 311})
    assert [fault.path for fault in caught.value.faults] == ["model.vocab_size"]
    prepare(**{"model.vocab_size": 311, "training.custom_loss": "json:dumps"})
    with pytest.raises(ConfigError, match="got 300; the corpus holds the token 300: at least 301 is needed"):
        prepare(**{"model.vocab_size": 300, "training.custom_loss": "json:dumps"})
