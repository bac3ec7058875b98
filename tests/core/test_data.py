"""Corpora and packing: every byte of the text is in the sequences once, and train never sees validation."""

from __future__ import annotations

import tempfile
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_core.data.packing import corpus_facts, pack, read_corpus, spread_sample
from stackwise_core.data.sequences import FIRST_VALIDATION_ID, PackedSequences
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.errors import CorpusError
from support.corpora import corpus_of, texts_of

END = 258
TOKENIZER = ByteTokenizer()
TEXTS = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.encode)


def documents_in(sequences: PackedSequences) -> list[bytes]:
    """The texts between the [END] tokens; the last may be cut."""
    tokens = sequences.tokens.ravel().tolist()
    texts: list[bytes] = [b""]
    for token in tokens:
        if token == END:
            texts.append(b"")
        else:
            texts[-1] += bytes([token])
    return texts


def flat(texts: list[bytes]) -> list[int]:
    return [token for text in texts for token in [*text, END]]


# ---------------------------------------------------------------- packing


@settings(max_examples=200)
@given(
    st.lists(TEXTS, min_size=1),
    st.integers(1, 12),
    st.floats(0.05, 0.45),
)
def test_packing_keeps_every_byte_once(texts: list[bytes], seq_len: int, fraction: float) -> None:
    wanted = fraction * sum(map(len, texts))
    n_held, size = next((n, size) for n, size in enumerate(accumulate(map(len, texts)), 1) if size >= wanted)
    while n_held < len(texts) and texts[n_held] == texts[n_held - 1]:  # equal texts stay on one side
        size += len(texts[n_held])
        n_held += 1
    if size <= 1.25 * wanted:
        halves = texts[n_held:], texts[:n_held]
    else:  # the end of each text, from a whole character on
        kept = [text[: round(len(text) * (1 - fraction))].decode(errors="ignore").encode() for text in texts]
        halves = kept, [text[len(start) :] for text, start in zip(texts, kept, strict=True)]
    expected = [flat(half)[: len(flat(half)) // seq_len * seq_len] for half in halves]
    if not all(expected):
        with pytest.raises(CorpusError, match="seq_len"):
            pack(corpus_of(*texts), TOKENIZER, seq_len, 0, fraction)
    else:
        splits = pack(corpus_of(*texts), TOKENIZER, seq_len, 0, fraction)
        assert [split.tokens.ravel().tolist() for split in splits] == expected


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2, 0.45])
def test_whole_documents_are_held_out(fraction: float) -> None:
    texts = [bytes([65 + n % 26]) * (50 + n) for n in range(300)]
    train, validation = pack(corpus_of(*texts), TOKENIZER, 16, 0, fraction)
    held, kept = documents_in(validation)[:-1], documents_in(train)[:-1]
    assert held == texts[: len(held)]
    assert len(kept) > 100
    assert not {*held, texts[len(held)]} & set(kept)  # nor is the held-out document that was cut at the end
    total = sum(map(len, texts))
    # At most a quarter too much; packing drops less than one sequence.
    assert fraction * total - 16 <= validation.tokens.size <= 1.25 * fraction * total + len(texts)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_one_document_is_split_at_its_end(fraction: float) -> None:
    text = bytes(n % 101 for n in range(2000))
    train, validation = pack(corpus_of(text), TOKENIZER, 10, 0, fraction)
    cut = round(2000 * (1 - fraction))
    assert train.tokens.ravel().tolist() == list(text[:cut])  # [END] starts a sequence that is not filled
    assert validation.tokens.ravel().tolist() == list(text[cut:])


def test_a_split_does_not_break_a_character() -> None:
    text = "€".encode() * 100  # three bytes each
    train, validation = pack(corpus_of(text), TOKENIZER, 1, 0, 0.25)
    halves = [documents_in(split)[0] for split in (train, validation)]
    assert b"".join(halves) == text
    assert halves[0].decode() == "€" * 75
    for fraction in (0.2501, 0.2517, 0.254):
        halves = [documents_in(split)[0].decode() for split in pack(corpus_of(text), TOKENIZER, 1, 0, fraction)]
        assert "".join(halves) == "€" * 100


def test_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"{n // 2:03d} {'x' * 50}\n")  # every text twice
    train, validation = pack(read_corpus(f"{tmp_path}/*.txt"), TOKENIZER, 4, 0, 0.12)
    assert not set(documents_in(train)[:-1]) & set(documents_in(validation)[:-1])


def test_sequence_ids_are_stable_and_tell_their_split() -> None:
    texts = [bytes([97 + n]) * 40 for n in range(20)]
    train, validation = pack(corpus_of(*texts), TOKENIZER, 8, 0, 0.2)
    few, same_validation = pack(corpus_of(*texts), TOKENIZER, 8, 5, 0.2)
    assert train.sequence_ids.tolist() == list(range(len(train)))
    assert validation.sequence_ids.tolist() == [FIRST_VALIDATION_ID + n for n in range(len(validation))]
    assert len(few) == 5
    assert np.array_equal(few.tokens, train.tokens[:5])
    assert few.sequence_ids.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(same_validation.tokens, validation.tokens)
    for split in (train, validation):
        rows = np.array([3, 0, 2], dtype=np.int64)
        tokens, ids = split.take(rows)
        assert split.rows_of(ids).tolist() == rows.tolist()
        assert tokens.dtype == np.int64
        assert tokens.tolist() == split.tokens[[3, 0, 2]].tolist()


def numbered(n: int, first_id: int = 0) -> PackedSequences:
    """Return sequences that hold their row number, in their targets and masks too."""
    rows = np.arange(n)
    tokens = np.repeat(rows, 4).reshape(n, 4).astype(np.uint16)
    return PackedSequences(tokens, first_id + rows, tokens.astype(np.int64), tokens % 2 == 1)


def test_a_sample_is_spread_over_the_corpus() -> None:
    train, validation = numbered(1003), numbered(500, FIRST_VALIDATION_ID)
    for most, n_validation in ((100, 50), (7, 32), (1002, 500)):
        splits = spread_sample(train, validation, most)
        for split, n_all, n in zip(splits, (1003, 500), (most, n_validation), strict=True):
            rows = split.tokens[:, 0].tolist()
            assert [row in range(part * n_all // n, (part + 1) * n_all // n) for part, row in enumerate(rows)] == [
                True
            ] * n
            assert split.targets is not None
            assert split.masks is not None
            assert split.targets[:, 0].tolist() == rows
            assert split.masks[:, 0].tolist() == [row % 2 == 1 for row in rows]
        assert splits[0].sequence_ids.tolist() == list(range(most))
        assert splits[1].sequence_ids.tolist() == [FIRST_VALIDATION_ID + n for n in range(n_validation)]
        offsets = [row - part * 1003 // most for part, row in enumerate(splits[0].tokens[:, 0].tolist())]
        assert most > 1000 or len(set(offsets)) > 4  # by hash, not at equal distances
        assert np.array_equal(splits[0].tokens, spread_sample(train, validation, most)[0].tokens)
    assert spread_sample(train, validation, 1003) == (train, validation)
    assert len(spread_sample(numbered(100), numbered(9), 10)[1]) == 9


@pytest.mark.parametrize(("text", "says"), [(b"abc", "train"), (b"a" * 100, "validation")])
def test_too_short_is_one_error(text: bytes, says: str) -> None:
    with pytest.raises(CorpusError, match=rf"data\.source: got 'here'; .*{says} sequence of data\.seq_len = 64"):
        pack(corpus_of(text), TOKENIZER, 64, 0, 0.05)


# ---------------------------------------------------------------- corpora


@settings(max_examples=20)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), TEXTS, min_size=1))
def test_digest_depends_on_texts_not_on_names(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second", "deeper")
        first.mkdir()
        second.mkdir(parents=True)
        for n, (name, text) in enumerate(files.items()):
            (first / name).write_bytes(text)
            (second / f"{99 - n}.txt").write_bytes(text)
        corpora = [read_corpus(f"{first}/*"), read_corpus(f"{folder}/second/**/*.txt")]
        assert corpora[0].digest == corpora[1].digest == corpus_facts(f"{first}/*")[0]
        texts = [texts_of(corpus) for corpus in corpora]
        assert texts[0] == texts[1]
        assert sorted(texts[0]) == sorted(files.values())
        (first / "one.more").write_bytes(b"more")
        assert corpus_facts(f"{first}/*")[0] != corpora[0].digest


def test_digest_changes_with_a_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc")
    before = corpus_facts(str(file))[0]
    file.write_bytes(b"xbc")
    assert corpus_facts(str(file))[0] != before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"ab\0c", "binary.*byte 2"),
        (b"abc\xe9", r"not UTF-8 text \(byte 3\)"),
        (b"a" * (2**20 - 1) + "é".encode() + b"\xe9a", r"not UTF-8 text \(byte 1048577\)"),  # chunks split the first é
        (b"a" * (2**20 - 1) + b"\xc3a", r"not UTF-8 text \(byte 1048575\)"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"^data\.source: .*bad\.txt.*{says}"):
        read_corpus(str(file))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"absent\.txt.*no file matches"):
        read_corpus(str(tmp_path / "absent.txt"))
    with pytest.raises(CorpusError, match=rf"{tmp_path}.*it is a folder; add /\*\*/\*\.txt"):
        read_corpus(str(tmp_path))


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked.txt").write_text("text")

    def refuse(path: Path) -> BinaryIO:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("stackwise_core.data.sources.opened", refuse)
    with pytest.raises(CorpusError, match=r"locked\.txt cannot be read \(Permission denied\)"):
        read_corpus(str(tmp_path / "*.txt"))


def test_a_path_with_brackets_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "notes [1].txt").write_text("text")
    assert texts_of(read_corpus(str(tmp_path / "notes [1].txt"))) == [b"text"]


def test_standard_library_is_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "a.py",
        "json/b.py",
        "site-packages/c.py",
        "dist-packages/d.py",
        "test/e.py",
        "json/tests/f.py",
        "g.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert {Path(document.name).name for document in read_corpus("stdlib").documents} == {"a.py", "b.py"}


def test_standard_library_is_there_and_always_the_same() -> None:
    corpus, again = read_corpus("stdlib"), read_corpus("stdlib")
    assert corpus.digest == again.digest
    assert [document.digest for document in corpus.documents] == sorted(document.digest for document in again.documents)
    assert sum(len(document.content) for document in corpus.documents) > 1_000_000
    names = {Path(document.name).name for document in corpus.documents}
    assert {"ast.py", "decoder.py"} <= names
    assert not {"torch_version.py", "test_ast.py"} & names  # neither site-packages nor tests
