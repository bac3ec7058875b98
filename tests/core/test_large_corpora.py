"""Corpora of any size: nothing is held whole, what was done before a kill is kept, and no change goes unnoticed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from flows.run.events import CorpusRead, Event, subscribed
from flows.run.prepare import prepare_data
from flows.run.reading import Reading
from stackwise_core.data.packing import Progress, Watch, corpus_facts, pack, read_corpus
from stackwise_core.data.sources import documents_of
from stackwise_core.data.tokenizer import ByteTokenizer, FileTokenizer
from stackwise_core.errors import CorpusError, StageInterruptedError
from stackwise_core.stages.plan import plan_config
from storage.artifacts import Artifacts
from storage.errors import StoreSpaceError
from storage.files import explain_full_disk
from storage.midstage import PackingNotes
from support.corpora import texts_of
from support.runs import tiny

TEXTS = [f"text {n} " * (1 + n % 7) for n in range(500)]


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


# ---------------------------------------------------------------- the order of documents


@pytest.mark.parametrize(("records", "n_bytes"), [(30, 1 << 20), (1 << 10, 500), (1 << 10, 1 << 20)])
def test_documents_are_in_the_order_of_their_hashes_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: int, n_bytes: int
) -> None:
    monkeypatch.setattr("stackwise_core.data.ordering._RUN_RECORDS", records)
    monkeypatch.setattr("stackwise_core.data.ordering._RUN_BYTES", n_bytes)
    texts = [*TEXTS, *TEXTS[:50], ""]
    ordered = sorted((text.encode() for text in texts if text), key=lambda text: hashlib.sha256(text).digest())
    digests = "\n".join(hashlib.sha256(text).hexdigest() for text in ordered)
    corpus = read_corpus(write_rows(tmp_path / "a.jsonl", texts), folder=tmp_path)
    assert texts_of(corpus) == texts_of(corpus) == ordered
    assert [document.digest for document in corpus.documents] == digests.split("\n")
    assert corpus.digest == hashlib.sha256(digests.encode()).hexdigest()
    assert (corpus.digest, corpus.n_bytes) == corpus_facts(str(tmp_path / "a.jsonl"))
    assert len(corpus.documents) == len(ordered)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]  # the spool has no name


# ---------------------------------------------------------------- arrays of numpy


def test_an_array_of_numpy_is_the_tokens_of_a_bin(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(4, 60_000, 1000)
    splits = []
    for wide, kinds in ((False, ("<u2",)), (True, ("<u4", "<i8"))):
        kind = "<u4" if wide else "<u2"
        tokens.astype(kind).tofile(tmp_path / "a.bin")
        expected = corpus_facts(str(tmp_path / "a.bin"), token_type="uint32" if wide else "auto")
        for name in kinds:
            np.save(tmp_path / f"{name[1:]}.npy", tokens.astype(name))
            corpus = read_corpus(str(tmp_path / f"{name[1:]}.npy"))
            assert (corpus.digest, corpus.n_bytes) == expected
            splits.append(pack(corpus, ByteTokenizer(), 10, 0, 0.25))
            assert splits[-1][0].tokens.dtype == kind
    for train, validation in splits:
        assert train.tokens.ravel().tolist() == tokens[:750].tolist()
        assert validation.tokens.ravel().tolist() == tokens[750:].tolist()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy_of(np.zeros((2, 3), np.uint16)), "holds an array of uint16 and 2 dimensions; give one of uint16, uint32"),
        (npy_of(np.zeros(9, np.float32)), "holds an array of float32 and 1 dimensions; give one of uint16"),
        (npy_of(np.zeros(9, ">u2")), "holds an array of uint16 and 1 dimensions"),
        (
            npy_of(np.zeros(9, np.uint16))[:-3],
            r"has a header that promises 9 uint16 tokens, and holds 7\.5; it was cut",
        ),
        (npy_of(np.array([1, 2, -3])), "token 2 is -3, which no vocabulary has"),
        (npy_of(np.array([1, 2**32])), "token 1 is 4294967296, which no vocabulary has"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535, "is no array of numpy: .+; write it with numpy.save"),
        (b"", "is no array of numpy"),
    ],
)
def test_an_array_that_holds_no_tokens_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(CorpusError, match=rf"^data\.source: .*a\.npy:? {says}"):
        read_corpus(str(tmp_path / "a.npy"))


# ---------------------------------------------------------------- files that change


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    documents = documents_of(write_rows(path, TEXTS), examples=False)
    next(documents)
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(CorpusError, match=r"^data\.source: .*a\.jsonl changed while it was being read; run the same"):
        list(documents)


@pytest.mark.parametrize("how", ["cut", "rewritten", "replaced"])
def test_a_file_that_changes_before_it_is_packed_is_named(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text " * 1000)
    os.utime(path, (1, 1))
    corpus = read_corpus(str(path))
    if how == "cut":
        os.truncate(path, 4000)
    elif how == "rewritten":
        path.write_text("other" * 1000)
    else:
        (tmp_path / "b").write_text("other" * 1000)
        os.utime(tmp_path / "b", (1, 1))
        (tmp_path / "b").replace(path)
    with pytest.raises(CorpusError, match=r"^data\.source: .*a\.txt changed while it was being read"):
        pack(corpus, ByteTokenizer(), 16, 0, 0.1)


# ---------------------------------------------------------------- packing that ends early


class Stopped(Exception):
    """Packing ended here."""


def stop_after(n_bytes: int) -> Callable[[int], None]:
    left = [n_bytes]

    def on_read(n: int) -> None:
        left[0] -= n
        if left[0] < 0:
            raise Stopped

    return on_read


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("fraction", [0.05, 0.3])
@pytest.mark.parametrize("most", [0, 40])
def test_packing_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, most: int
) -> None:
    """With whole documents held out, or, since one is as large as all others, the end of each."""
    monkeypatch.setattr("stackwise_core.data.packing._BATCH_BYTES", 200)
    monkeypatch.setattr("stackwise_core.data.packing._AT_ONCE", 3)
    monkeypatch.setattr("stackwise_core.data.packing._BYTES_BETWEEN_NOTES", 500)
    texts = [*TEXTS, *(["long " * 5000] if fraction == 0.05 else [])]
    corpus = read_corpus(write_rows(tmp_path / "a.jsonl", texts))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    splits = pack(corpus, ByteTokenizer(), 16, most, fraction, tmp_path / "whole")
    whole = saved(tmp_path / "whole")
    assert whole["train_tokens.npy"] == npy_of(np.asarray(splits[0].tokens))
    notes = PackingNotes(tmp_path / "notes.json", tmp_path / "killed")
    for reached in (1000, 5000, 9000):
        started = notes.read()
        watch = Watch(started, notes.write, stop_after(reached))
        with pytest.raises(Stopped):
            pack(corpus, ByteTokenizer(), 16, 0, fraction, tmp_path / "killed", watch)
        assert notes.read().documents > started.documents
    last, read, tokens = notes.read(), list[int](), tmp_path / "killed" / "train_tokens.npy"
    before = tokens.read_bytes()
    tokens.write_bytes(before[:300] + bytes([before[300] ^ 1]) + before[301:])
    assert notes.read() == Progress()  # a byte that is not as it was written
    tokens.write_bytes(before)
    assert notes.read() == last
    pack(corpus, ByteTokenizer(), 16, most, fraction, tmp_path / "killed", Watch(last, on_read=read.append))
    assert saved(tmp_path / "killed") == whole
    os.truncate(tmp_path / "killed" / "train_tokens.npy", 200)  # somebody else was there
    assert notes.read() == Progress()
    (tmp_path / "notes.json").write_text('{"documents": 3, "sizes": [0, 0], "tokens": [-1, 5]}')
    assert notes.read() == Progress()


def test_a_stop_is_obeyed_while_the_corpus_is_packed() -> None:
    with pytest.raises(StageInterruptedError, match="stopped on request while the corpus was being packed; run the"):
        Reading("packed", 10, lambda: True)(1)


def test_progress_of_a_long_reading_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now, heard = [0.0], list[Event]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    reading = Reading("packed", 1000)  # what is imported until the first bytes come is not their time
    with subscribed(heard.append):
        for now[0] in (9.0, 9.9, 11.1, 11.2, 13.0):
            reading(100)
    assert heard == [CorpusRead("packed", 300, 1000, pytest.approx(2.1)), CorpusRead("packed", 500, 1000, 4.0)]


def test_a_full_disk_names_the_file_and_what_is_packed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, {"data.source": write_rows(tmp_path / "a.jsonl", TEXTS), "data.max_sequences": 0})
    monkeypatch.setattr("stackwise_core.data.packing._BATCH_BYTES", 200)
    monkeypatch.setattr("stackwise_core.data.packing._AT_ONCE", 3)
    monkeypatch.setattr("stackwise_core.data.packing._BYTES_BETWEEN_NOTES", 500)
    artifacts, plan, write, written = Artifacts(tmp_path / "artifacts").open(), plan_config(config), os.write, [0]

    def full(fd: int, data: Any) -> int:
        if "train_tokens" in os.readlink(f"/proc/self/fd/{fd}"):
            written[0] += len(data)
            if written[0] > 9000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        says = r"packed/train_tokens\.npy: no space left to write it; free some"
        with pytest.raises(StoreSpaceError, match=says), explain_full_disk(artifacts.root):
            prepare_data(config, artifacts, plan)
    work = artifacts.root / "work" / plan.data_ref.name / "scratch"
    assert PackingNotes(work / "packing.json", work / "packed").read().documents > 10
    prepare_data(config, artifacts, plan)
    sealed = artifacts.folder(plan.data_ref)
    train, _ = pack(read_corpus(config.data.source), ByteTokenizer(), 16, 0, config.data.validation_fraction)
    assert (sealed / "train_tokens.npy").read_bytes() == npy_of(np.asarray(train.tokens))
    assert sorted(path.name for path in sealed.iterdir()) == [
        "manifest.json",
        *sorted(f"{split}_{name}.npy" for split in ("train", "validation") for name in ("tokens", "sequence_ids")),
    ]
    assert not work.exists()


# ---------------------------------------------------------------- long texts


def trained(pre: Any, normalizer: Any = None, model: Any = None, trainer: Any = None, n: int = 4000) -> Tokenizer:
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainer or trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([LONG[:n]], trainer)
    return tokenizer


def long_text() -> str:
    draw = random.Random(0)
    words = [
        "the",
        "a\u00e9b",
        "  ",
        "\n",
        "\n\n  ",
        "x" * 300,
        "don't",
        "123",
        "<s>",
        "\u00a0",
        "\u4e2d\u6587",
        "end.",
    ]
    return "".join(draw.choice(words) + draw.choice(["", " ", " ", "\n"]) for _ in range(3_000))


LONG = long_text()
UNIGRAM = trainers.UnigramTrainer(vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes after a space": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "normalised": lambda: trained(pre_tokenizers.ByteLevel(), normalizers.NFKC()),
    "pieces": lambda: trained(pre_tokenizers.Metaspace(), model=models.Unigram(), trainer=UNIGRAM),
    "no words": lambda: trained(pre_tokenizers.Sequence([]), n=200),
}


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_long_text_is_cut_where_it_changes_no_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise_core.data.tokenizer._PIECE", 3_000)
    monkeypatch.setattr("stackwise_core.data.tokenizer._WHOLE", 9_000)
    library = TOKENIZERS[name]()
    library.add_tokens([AddedToken("<s>", lstrip=True, normalized=False)])
    tokenizer, data = FileTokenizer(library.to_str()), LONG.encode()
    expected = tokenizer.encode(data)
    pieces = list(tokenizer.pieces(data[at : at + 7001] for at in range(0, len(data), 7001)))
    assert b"".join(pieces) == data
    assert np.array_equal(tokenizer.encode_all(pieces, [False] * len(pieces)), expected)
    assert max(map(len, pieces)) < 8 * 3_000 or name == "no words"
