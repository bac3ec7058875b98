"""Sources: a document is one whatever it lies in, tokens are taken as they are, and faults say where they stand."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import tracemalloc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from flows.cli.main import main
from flows.run.prepare import prepare_data
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.examples import ExampleFormat, pack_examples
from stackwise_core.data.packing import corpus_facts, pack, read_corpus
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.errors import ConfigError, CorpusError
from stackwise_core.stages.plan import plan_config, plan_run
from stackwise_core.stages.resolve import reads_examples
from storage.artifacts import Artifacts
from storage.sequences import load_sequences
from support.corpora import texts_of
from support.runs import grown, tiny

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), min_size=1)


def write_txt(folder: Path, texts: list[str]) -> str:
    for n, text in enumerate(texts):
        (folder / f"{n}.txt").write_bytes(text.encode())
    return f"{folder}/*.txt"


def write_jsonl(folder: Path, texts: list[str]) -> str:
    """Two files, other columns, blank lines, escapes or none."""
    lines = [json.dumps({"id": n, "text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n\n".join(lines[:2]), encoding="utf-8")
    (folder / "b.JSONL").write_text("\n".join([*lines[2:], ""]), encoding="utf-8")
    return f"{folder}/*.[jJ]*"


def write_parquet(folder: Path, texts: list[str]) -> str:
    parquet.write_table(pa.table({"text": texts[::-1], "id": range(len(texts))}), folder / "all.parquet")
    return f"{folder}/all.parquet"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A dataset owner/name that the library `datasets` finds: in the working folder, as it looks there first."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    datasets.disable_progress_bars()
    yield folder
    datasets.enable_progress_bars()


def write_bin(path: Path, tokens: Any) -> Path:
    np.asarray(tokens, dtype="<u2").tofile(path)
    return path


# ---------------------------------------------------------------- one document, many containers


@settings(max_examples=25)
@given(TEXTS)
def test_texts_are_the_same_corpus_wherever_they_lie(texts: list[str]) -> None:
    filled = sorted(text.encode() for text in texts if text)
    for write in (write_txt, write_jsonl, write_parquet):
        with tempfile.TemporaryDirectory() as folder:
            source = write(Path(folder), texts)
            if not filled:
                with pytest.raises(CorpusError, match="every file it names is empty"):
                    read_corpus(source)
                continue
            corpus = read_corpus(source)
            found = texts_of(corpus)
            assert sorted(found) == filled
            reference = read_corpus(write_txt(Path(folder), texts))
            assert found == texts_of(reference)
            facts = corpus.digest, corpus.n_bytes
            assert facts == (reference.digest, sum(map(len, filled))) == corpus_facts(source)


@pytest.mark.parametrize("spelling", ["hf:owner/name", "hf:owner/name:train", "hf:owner/name/default:train"])
def test_a_dataset_of_the_hub_is_the_corpus_of_its_texts(hub: Path, tmp_path: Path, spelling: str) -> None:
    texts = [f"document {n}" for n in range(7)]
    (hub / "train.jsonl").write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts))
    (hub / "test.jsonl").write_text('{"n": 1, "text": "held out"}\n')
    assert corpus_facts(spelling) == corpus_facts(write_txt(tmp_path, texts))
    assert texts_of(read_corpus("hf:owner/name:test")) == [b"held out"]
    assert len(read_corpus("hf:owner/name:train[:3]").documents) == 3


EXAMPLES = [{"input_ids": [n, n + 1], "targets": [n + 1, 7], "masks": [True, n % 2 == 0]} for n in range(1, 9)]
FORM = ExampleFormat(seq_len=3, vocab_size=60, pad_token=0, targets_are_tokens=True)


@pytest.mark.parametrize("masked", [True, False])
def test_examples_are_the_same_wherever_they_lie(hub: Path, tmp_path: Path, masked: bool) -> None:
    rows: list[dict[str, Any]] = EXAMPLES if masked else [{k: e[k] for k in ("input_ids", "targets")} for e in EXAMPLES]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), hub / "train.parquet")
    corpora = [read_corpus(source, examples=True) for source in ("rows.jsonl", "rows.parquet", "hf:owner/name")]
    assert len({corpus.digest for corpus in corpora}) == 1
    for corpus in corpora:
        train, _ = pack_examples(corpus, FORM, 0, 0.2)
        assert train.tokens.tolist() == [[*row["input_ids"], 0] for row in rows[:6]]
        assert train.targets is not None
        assert train.targets.tolist() == [[*row["targets"], 0] for row in rows[:6]]
        assert train.masks is not None
        assert train.masks.tolist() == [[*(row["masks"] if masked else [True, True]), False] for row in rows[:6]]


# ---------------------------------------------------------------- tokens


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    """No end token, no tokenizer: of one file the first part trains, the rest validates."""
    tokens = np.random.default_rng(0).integers(0, 2**16, 1003, dtype=np.uint16)
    corpus = read_corpus(str(write_bin(tmp_path / "all.bin", tokens)))
    train, validation = pack(corpus, ByteTokenizer(), 10, 0, 0.249)
    cut = 753  # 75.1 % of 2,006 bytes are 1,507: the middle of a token
    assert train.tokens.tolist() == tokens[:750].reshape(75, 10).tolist()
    assert validation.tokens.tolist() == tokens[cut : cut + 250].reshape(25, 10).tolist()
    few, same = pack(corpus, ByteTokenizer(), 10, 3, 0.249)
    assert few.tokens.tolist() == train.tokens.tolist()[:3]
    assert same.tokens.tolist() == validation.tokens.tolist()
    assert train.tokens.dtype == np.uint16
    assert corpus.n_bytes == corpus_facts(str(tmp_path / "all.bin"))[1] == 1003


def test_token_files_are_documents(tmp_path: Path) -> None:
    for n in range(20):
        write_bin(tmp_path / f"{n}.bin", np.full(50, n))
    train, validation = pack(read_corpus(f"{tmp_path}/*.bin"), ByteTokenizer(), 10, 0, 0.1)
    assert (len(train), len(validation)) == (90, 10)
    held = set(validation.tokens.ravel().tolist())
    assert len(held) == 2
    assert set(train.tokens.ravel().tolist()) == set(range(20)) - held
    before = corpus_facts(f"{tmp_path}/*.bin")
    (tmp_path / "0.bin").rename(tmp_path / "zero.bin")
    assert corpus_facts(f"{tmp_path}/*.bin") == before


def test_tokens_are_another_corpus_than_the_text_of_their_bytes(tmp_path: Path) -> None:
    for name in ("a.bin", "a.txt"):
        (tmp_path / name).write_bytes(b"abcdefgh")
    assert corpus_facts(str(tmp_path / "a.bin"))[0] != corpus_facts(str(tmp_path / "a.txt"))[0]


def test_a_larger_corpus_takes_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is tokens, one long text or many rows; the buffers are smaller here, as the corpora are."""
    for where in ("content.CHUNK", "sources.CHUNK", "packing._BATCH_BYTES", "sequences._COPIED"):
        monkeypatch.setattr(f"stackwise_core.data.{where}", 1 << 16)
    monkeypatch.setattr("stackwise_core.data.ordering._RUN_BYTES", 1 << 19)

    def peak_of(source: Path, most: int) -> int:
        tracemalloc.start()
        try:
            facts = corpus_facts(str(source))
            train, _ = pack(read_corpus(str(source)), ByteTokenizer(), 100, most, 0.1)
            assert (len(train), len(facts)) == (most or len(train), 2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def write(kind: str, n: int) -> Path:
        path = tmp_path / f"{n}.{kind}"
        lines = (chr(97 + n % 26) * 10_000 + str(n) for n in range(n))
        path.write_text("\n".join(json.dumps({"text": line}) if kind == "jsonl" else line for line in lines))
        return write_bin(path, np.arange(5_000 * n) % 60_000) if kind == "bin" else path

    for kind in ("bin", "txt", "jsonl"):
        sources = write(kind, 200), write(kind, 800)
        for most in (0, 10):
            small, large = (peak_of(source, most) for source in sources)
            assert large < 1.2 * small < 2_000_000, (kind, most)


def config_of(folder: Path, source: Path, objective: str, vocab_size: int = 264) -> StackWiseConfig:
    growth = "training.progressive."
    return tiny(
        folder,
        {
            "data.source": str(source),
            f"{growth}training_objective": objective,
            f"{growth}target_stacks": 1,
            "model.vocab_size": vocab_size,
        },
    )


def prepare(config: StackWiseConfig, artifacts: Artifacts) -> None:
    facts = corpus_facts(config.data.source, examples=reads_examples(config))
    prepare_data(config, artifacts, plan_run(config, *facts))


@pytest.mark.usefixtures("quick_disk")
def test_a_run_of_tokens(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 200, 600)
    config = config_of(tmp_path, write_bin(tmp_path / "all.bin", tokens), "mlm")
    grown(config, tmp_path / "artifacts")
    artifacts = Artifacts(tmp_path / "artifacts")
    train, _ = load_sequences(artifacts, plan_config(config).data_ref)
    assert train.tokens.tolist() == tokens[: 16 * 16].reshape(16, 16).tolist()


@pytest.mark.parametrize(
    ("token", "objective", "says"),
    [
        (264, "clm", "264, which is outside 0 to 263; raise model.vocab_size"),
        (264, "mlm", "264, which is outside 0 to 263; raise model.vocab_size"),
        (260, "mlm", "260, which is outside 0 to 258; data.tokenizer did not make it; mlm needs the tokenizer.json"),
        (256, "mlm", r"256, which is \[MASK\], a hole in the text; data.tokenizer did not make it"),
        (258, "mlm", None),
        (263, "clm", None),
        (256, "clm", None),
    ],
)
def test_a_token_that_cannot_be_is_named(tmp_path: Path, token: int, objective: str, says: str | None) -> None:
    tokens = np.full(2_000_000, 1)
    tokens[1_500_000] = token
    config = config_of(tmp_path, write_bin(tmp_path / "all.bin", tokens), objective)
    artifacts = Artifacts(tmp_path / "artifacts").open()
    if says is None:
        prepare(config, artifacts)
        return
    with pytest.raises(CorpusError, match=rf"all\.bin: token 1,500,000 \(at byte 3,000,000\) is {says}"):
        prepare(config, artifacts)


def test_tokens_that_were_packed_for_another_model_are_asked_again(tmp_path: Path) -> None:
    """The artifact is the same: neither the objective nor the size of the vocabulary is in its id."""
    source = write_bin(tmp_path / "all.bin", [1] * 299 + [256, 270] * 150)
    artifacts = Artifacts(tmp_path / "artifacts").open()
    prepare(config_of(tmp_path, source, "clm", 271), artifacts)
    with pytest.raises(ConfigError, match=r"model\.vocab_size: got 270; the corpus holds the token 270: at least 271"):
        prepare(config_of(tmp_path, source, "clm", 270), artifacts)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: got 'byte'; the corpus was not made by it; mlm needs"):
        prepare(config_of(tmp_path, source, "mlm", 271), artifacts)


# ---------------------------------------------------------------- faults of files


@pytest.mark.parametrize(
    ("files", "source", "says"),
    [
        ({"a.bin": b"abc"}, "a.bin", r"a\.bin has 3 bytes, an odd number; a \.bin holds uint16 tokens"),
        ({"a.bin": b""}, "a.bin", "'.*a.bin'; every file it names is empty"),
        ({"a.bin": b"a\0"}, "a.bin", "its 1 tokens fill no train sequence of data.seq_len = 16"),
        ({"a.jsonl": b"\n \n"}, "a.jsonl", "'.*a.jsonl'; every file it names is empty"),
        (
            {"a.txt": b"a", "b.bin": b"ab", "c.txt": b"c"},
            "*",
            r"it names text files \(.*a\.txt\) and token files \(.*b\.bin\); name files of one kind",
        ),
        ({"a.jsonl": b"{}", "b.parquet": b""}, "*", r"jsonl files \(.*\) and parquet files \(.*\)"),
        ({"a.parquet": b"PAR1 no more"}, "a.parquet", r"a\.parquet cannot be read as parquet \(.+\)"),
        ({"a.parquet": b""}, "a.parquet", r"a\.parquet cannot be read as parquet \(.+\)"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, files: dict[str, bytes], source: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    config = config_of(tmp_path, folder / source, "clm")
    config.to_yaml(tmp_path / "run.yaml")
    assert main(["plan", str(tmp_path / "run.yaml"), "--artifacts", str(tmp_path / "artifacts")]) == 2
    assert re.search(rf"^stackwise: data\.source: .*{says}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"body": "x"}', r"the column 'text' is missing \(it has \['body'\]\); documents are read from it"),
        (b'{"text": 3}', "text is 3; a string is expected"),
        (b'{"text": null}', "text is None; a string is expected"),
        (b'{"text": ["a"]}', r"text is \['a'\]; a string is expected"),
        (b'{"text": "a", "text": "b"}', "has the key 'text' twice; leave one out"),
        (b'{"text": "ab\\ud800"}', "text holds half a surrogate pair at character 2, which is not text"),
        (b'"text"', "is not a JSON object; one JSON object a line is expected"),
        (b"plain text", r"is not JSON \(.*\); one JSON object a line is expected"),
        (b'{"text": "\xe9"}', r"is not JSON \(.*\); one JSON object a line is expected"),
        (b"[" * 100_000, r"is not JSON \(.*\); one JSON object a line is expected"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    for read in (read_corpus, corpus_facts):
        with pytest.raises(CorpusError, match=rf"^data\.source: .*/rows\.jsonl:3: {says}"):
            read(f"{tmp_path}/*.jsonl")


def test_a_wrong_column_is_named(tmp_path: Path, hub: Path) -> None:
    for column, says in (
        ({"body": ["a"]}, r": the column 'text' is missing \(it has \['body'\]\)"),
        ({"text": [1, 2]}, ":1: text is 1; a string is expected"),
        ({"text": ["a", None]}, ":2: text is None; a string is expected"),
    ):
        for path, source in ((tmp_path / "a.parquet", "a.parquet"), (hub / "train.parquet", "hf:owner/name")):
            parquet.write_table(pa.table(column), path)
            with pytest.raises(CorpusError, match=rf"^data\.source: {source}{says}"):
                read_corpus(source)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": ["a"]}, ":1: got the column 'text'; only input_ids, targets, masks are read"),
        ({"input_ids": [[1], [2]]}, ":1: the column 'targets' is missing"),
        ({"input_ids": [[1], [2]], "targets": [[1], [0.5]]}, r":1: targets is \[1.0\]; a list of integers is expected"),
        ({"input_ids": [[1], None], "targets": [[1], [1]]}, ":2: input_ids is None; a list of integers is expected"),
        ({"input_ids": [b"a"], "targets": [[1]]}, ":1: input_ids is .*; a list of integers is expected"),
        ({"input_ids": [[1]], "targets": [[1]], "masks": [[1]]}, r":1: masks is \[1\]; a list of true and false"),
    ],
)
def test_a_wrong_example_of_a_table_is_named(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(CorpusError, match=rf"^data\.source: .*/rows\.parquet{says}"):
        pack_examples(read_corpus(str(tmp_path / "rows.parquet"), examples=True), FORM, 0, 0.2)


def test_tokens_are_no_examples(tmp_path: Path) -> None:
    write_bin(tmp_path / "a.bin", [1, 2])
    with pytest.raises(CorpusError, match=r"a\.bin holds tokens and no targets; the custom objective reads jsonl"):
        read_corpus(str(tmp_path / "a.bin"), examples=True)


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:name", "write hf:owner/name or hf:owner/name/configuration, and :split after it"),
        ("hf:owner/name/a/b", "write hf:owner/name"),
        ("hf:owner/name:", "write hf:owner/name"),
        ("hf:owner/name:evil", r"cannot be loaded \(.*evil.*\); check owner, name, configuration and split"),
        ("hf:owner/name/other", r"cannot be loaded \(.*other.*\); check owner"),
        ("hf:owner/unknown", r"cannot be loaded \(.+\); check .* the connection to the hub"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_named(hub: Path, source: str, says: str) -> None:
    (hub / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(CorpusError, match=rf"^data\.source: got '{source}'; {says}") as caught:
        read_corpus(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "module", "extra"), [("a.parquet", "pyarrow", "parquet"), ("hf:a/b", "datasets", "hub")]
)
def test_a_library_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        CorpusError, match=rf"data\.source: .*{source}.* needs {module}.*pip install 'stackwise\[{extra}\]'"
    ):
        read_corpus(source)
