"""Which files a source names, each once, how endings are read, and what is refused instead of being trained on."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.examples import ExampleFormat, pack_examples
from stackwise_core.data.packing import Corpus, corpus_facts, read_corpus
from stackwise_core.errors import ConfigError, CorpusError
from support.corpora import texts_of

TEXTS = ["one", "two\nlines", "drei ü"]
LINES = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode()


def names(source: str) -> list[str]:
    return sorted(Path(document.name).name for document in read_corpus(source).documents)


def texts_in(corpus: Corpus) -> list[str]:
    return sorted(text.decode() for text in texts_of(corpus))


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


# ---------------------------------------------------------------- each file once


def test_a_file_counts_once_however_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deep" / "same.txt").write_text("a.txt")  # another file of equal content is another document
    before = corpus_facts(f"{tmp_path}/**/*.txt")
    assert names(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "c.txt", "same.txt"]
    for n, loop in enumerate((".", "..", "er")):
        (tmp_path / "deep" / f"loop{n}").symlink_to(loop)
        (tmp_path / "deep" / "er" / f"loop{n}").symlink_to(tmp_path)
    (tmp_path / "deep" / "link.txt").symlink_to("../a.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "deep" / "b.txt")
    (tmp_path / "itself.txt").symlink_to("itself.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    for pattern in ("**/*.txt", "**/**/*.txt", "deep/../**/*.txt", "**/*.t*"):
        assert corpus_facts(f"{tmp_path}/{pattern}") == before


def test_a_folder_elsewhere_is_reached_by_its_link(tmp_path: Path) -> None:
    for name in ("here", "elsewhere/deep", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("here/a.txt", "elsewhere/deep/b.txt", ".hidden/c.txt", ".d.txt"):
        (tmp_path / name).write_text(name)
    assert names(f"{tmp_path}/here/**/*.txt") == names(f"{tmp_path}/here/**") == ["a.txt", "b.txt"]
    assert names(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt"]  # without hidden ones, as in a shell
    assert names(f"{tmp_path}/.*/*.txt") == ["c.txt"]


def test_the_current_folder_is_where_a_pattern_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "inner")
    for source in ("*.txt", "**/*.txt", "./*.txt", "../*/a.txt", "a.txt", "../inner/[a-c].t?t"):
        assert names(source) == ["a.txt"]


def test_brackets_that_exist_are_no_pattern(tmp_path: Path) -> None:
    for name in ("data [v2]/a.txt", "data v/b.txt", "[x].txt", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(f"{tmp_path}/data [v2]/*.txt") == ["a.txt"]
    assert names(f"{tmp_path}/data [vw]/*.txt") == ["b.txt"]
    assert names(f"{tmp_path}/[x].txt") == ["[x].txt"]
    with pytest.raises(
        CorpusError, match=r"no file matches; brackets are a pattern, write \[\[\] for the character \["
    ):
        read_corpus(f"{tmp_path}/data [w3]/*.txt")


# ---------------------------------------------------------------- what can be no corpus


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "made by the system"])
def test_what_is_no_stored_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path, says = tmp_path / "f.jsonl", f"a {kind}"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/proc/self/maps")
        says = "a device" if kind == "device" else "a file that the system makes while it is read"
    with pytest.raises(CorpusError, match=rf"^data\.source: got '.*f\.jsonl'; it is {says}, give a stored file$"):
        read_corpus(str(path))
    with pytest.raises(CorpusError, match=r"no file matches"):
        read_corpus(f"{tmp_path}/**/*.jsonl" if "system" not in kind else f"{tmp_path}/*.txt")
    with pytest.raises(ConfigError, match=rf"data\.tokenizer: got '.*f\.jsonl'; it cannot be read \(it is {says}"):
        StackWiseConfig.from_dict({"data": {"tokenizer": str(path)}})


def test_a_tokenizer_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=r"cannot be read \(it is larger than 536,870,912 bytes"):
        StackWiseConfig.from_dict({"data": {"tokenizer": str(tmp_path / "tokenizer.json")}})


@pytest.mark.parametrize("source", ["x" * 100_000, "*" * 100_000, "hf:" + "x" * 100_000, "a/" * 50_000, "[" * 50_000])
def test_a_huge_source_is_not_echoed_whole(source: str) -> None:
    with pytest.raises(CorpusError, match=r"^data\.source: got '") as caught:
        read_corpus(source)
    assert len(str(caught.value)) < 1_000


def test_a_huge_row_is_not_echoed_whole(tmp_path: Path) -> None:
    for row in ({"x" * 100_000: 1}, {"text": ["x" * 100_000]}, {f"column {n}": 1 for n in range(10_000)}):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(CorpusError, match=r"a\.jsonl:1: ") as caught:
            read_corpus(str(tmp_path / "a.jsonl"))
        assert len(str(caught.value)) < 1_000


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "NDJSON", "jsonlines", "ldjson", "json"])
@pytest.mark.parametrize(
    ("packed", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_lines_of_json_are_read_as_such(
    tmp_path: Path, ending: str, packed: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.{ending}{packed}").write_bytes(pack(LINES))
    corpus = read_corpus(f"{tmp_path}/a.*")
    assert texts_in(corpus) == sorted(TEXTS)
    assert (corpus.digest, corpus.n_bytes) == corpus_facts(f"{tmp_path}/a.*")


def test_a_list_in_json_is_its_rows(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert texts_in(read_corpus(str(tmp_path / "a.json"))) == sorted(TEXTS)
    examples: list[dict[str, Any]] = [{"input_ids": [n], "targets": [n]} for n in range(1, 9)]
    (tmp_path / "b.json").write_text(json.dumps(examples))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, examples)))
    form = ExampleFormat(seq_len=2, vocab_size=9, pad_token=0, targets_are_tokens=True)
    split = [
        pack_examples(read_corpus(f"{tmp_path}/b.{end}", examples=True), form, 0, 0.2) for end in ("json", "jsonl")
    ]
    assert split[0][0].tokens.tolist() == split[1][0].tokens.tolist() == [[n, 0] for n in range(1, 7)]
    for text, says in (
        ('[{"text": "a"}, 3]', r"a\.json:2: 3 is not a JSON object"),
        ('[{"text": "a"}', r"a\.json is not JSON \(.*\)"),
        (
            '{\n "text": "a"\n}',
            r"a\.json:1: is not JSON \(.*\); one .* is expected, or a file that is one list of them",
        ),
        ('[{"text": "a"}, {"text": 1}]', r"a\.json:2: text is 1; a string is expected"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CorpusError, match=says):
            read_corpus(str(tmp_path / "a.json"))


def test_compressed_text_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some ") + gzip.compress(b"text"))  # as `cat` joins them
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"more"))
    assert texts_in(read_corpus(f"{tmp_path}/*.gz")) == ["more", "some text"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read \(Not a gzipped file.*\)"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], r"a\.txt\.gz cannot be read \(.+\)"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz cannot be read \(.+\)"),
        ("a.json.bz2", b"no bz2", r"a\.json\.bz2 cannot be read \(.+\)"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-30] + bytes(30), r"a\.jsonl\.xz cannot be read \(.+\)"),
        ("a.jsonl.zst", zstd(LINES)[:-5], r"a\.jsonl\.zst cannot be read \(.+\)"),
        ("a.bin.gz", gzip.compress(b"ab"), r"a\.bin\.gz is compressed, and token files are read in place; unpack it"),
        ("a.parquet.zst", b"", r"a\.parquet\.zst is compressed, and parquet files are read in place; unpack it"),
        ("a.csv", b"text,id\na,1\n", r"a\.csv is not read as \.csv; write .* jsonl or parquet, or name it \.txt"),
        ("a.TSV.gz", gzip.compress(b"a\tb"), r"a\.TSV\.gz is not read as \.tsv; write its texts"),
        ("a.npy", b"\x93NUMPY", r"a\.npy is no array of numpy: .+; write it with numpy\.save"),
        ("a.tar.gz", b"", r"a\.tar\.gz is not read as \.tar; unpack it"),
        ("part-00000", LINES, r"part-00000 holds a JSON object on each line; name it \.jsonl"),
        ("a.log.gz", gzip.compress(LINES), r"a\.log\.gz holds a JSON object on each line; name it \.jsonl"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_corpus, corpus_facts):
        with pytest.raises(CorpusError, match=rf"^data\.source: .*{says}") as caught:
            read(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_what_is_named_txt_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(LINES)
    (tmp_path / "b.txt").write_bytes(b"{not} json\n{at} all\n")
    (tmp_path / "c.py").write_bytes(b"{'a': 1}\n{'b': 2}\n")
    assert texts_in(read_corpus(str(tmp_path / "a.txt"))) == [LINES.decode()]
    assert names(f"{tmp_path}/[bc].*") == ["b.txt", "c.py"]


# ---------------------------------------------------------------- rows that cannot be decoded


def latin1(path: Path, rows: int, wrong: int) -> None:
    """A string column with a byte that is no UTF-8, as careless writers leave it."""
    column = pa.array([b"\xe9t\xe9" if n == wrong else b"text" for n in range(rows)], pa.binary())
    string = pa.StringArray.from_buffers(rows, column.buffers()[1], column.buffers()[2])
    parquet.write_table(pa.table({"id": range(rows), "text": string}), path)


@pytest.mark.parametrize("wrong", [0, 1, 999, 1000, 1203])
def test_a_row_that_is_not_utf8_is_named(tmp_path: Path, wrong: int) -> None:
    latin1(tmp_path / "a.parquet", 1204, wrong)
    for read in (read_corpus, corpus_facts):
        with pytest.raises(
            CorpusError, match=rf"^data\.source: .*a\.parquet:{wrong + 1}: 'text' cannot be decoded \("
        ) as caught:
            read(str(tmp_path / "a.parquet"))
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_date_that_python_does_not_have_is_named(tmp_path: Path) -> None:
    rows = pa.table({"input_ids": [[1], [2]], "when": pa.array([0, 2**60], pa.timestamp("us"))})
    parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet:2: 'when' cannot be decoded \(.+\); correct or drop this row"):
        read_corpus(str(tmp_path / "a.parquet"), examples=True)


def test_a_parquet_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    """Any byte of the data may be any other: text is read, or one line says what is wrong."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"text number {n}" for n in range(400)]}), path, compression="gzip")
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    for at in draw.integers(4, len(whole) - 8, 40).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(draw.integers(1, 256))]) + whole[at + 1 :])
        message = fault_of(str(path))
        assert message == "" or re.fullmatch(r"data\.source: \S*a\.parquet.*", message)


def fault_of(source: str) -> str:
    try:
        read_corpus(source)
    except CorpusError as error:
        return str(error)
    return ""
