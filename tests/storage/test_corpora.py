"""What a corpus is, is remembered while its files stay the same, and never longer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from flows.run.estimate import estimate_sequences
from flows.run.prepare import pack_corpus, sampled
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.packing import corpus_facts, read_corpus
from stackwise_core.errors import CorpusError
from stackwise_core.stages.resolve import reads_examples
from storage.adopt import plan_in
from storage.artifacts import Artifacts
from storage.corpora import facts_of
from storage.unchanged import verify_once
from support.runs import grown, tiny


class Read(Exception):
    """The corpus was read."""


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    """A folder in which files that were just written count as settled."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("storage.unchanged._TICK_NS", -(10**12))
    return Artifacts(tmp_path / "artifacts").open()


@pytest.fixture
def config(tmp_path: Path) -> StackWiseConfig:
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"text {n} " * 90)
    return tiny(tmp_path, {"data.source": f"{tmp_path}/*.txt"})


def reads(artifacts: Artifacts, config: StackWiseConfig) -> bool:
    """Return whether the corpus is read, and see that what is known of it is right."""
    n_read = list[int]()
    expected = corpus_facts(config.data.source, examples=reads_examples(config), token_type=config.data.token_type)
    assert facts_of(artifacts, config, n_read.append) == [expected]
    return bool(n_read)


def edit_in_place(folder: Path) -> None:
    """Change a letter, and give the file its old times."""
    path = folder / "1.txt"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"text", b"test"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_another(folder: Path) -> None:
    path, other = folder / "1.txt", folder / "other"
    other.write_bytes(path.read_bytes().replace(b"text", b"test"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


CHANGES = {
    "longer": lambda folder: (folder / "1.txt").write_text("longer " * 99),
    "edited": edit_in_place,
    "replaced": replace_by_another,
    "another": lambda folder: (folder / "9.txt").write_text("another " * 99),
    "gone": lambda folder: (folder / "1.txt").unlink(),
    "renamed": lambda folder: (folder / "1.txt").rename(folder / "7.txt"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_corpus_is_read_once_until_a_file_changes(
    change: str, artifacts: Artifacts, config: StackWiseConfig, tmp_path: Path
) -> None:
    assert [reads(artifacts, config) for _ in range(3)] == [True, False, False]
    assert not reads(Artifacts(artifacts.root), config)
    CHANGES[change](tmp_path)
    assert [reads(artifacts, config) for _ in range(2)] == [True, False]


def test_a_corpus_is_read_again_in_another_way(artifacts: Artifacts, config: StackWiseConfig, tmp_path: Path) -> None:
    np.arange(2000).astype("<u4").tofile(tmp_path / "a.bin")
    ways = [
        tiny(tmp_path, {"data.source": f"{tmp_path}/a.bin", "data.token_type": kind}) for kind in ("auto", "uint32")
    ]
    with pytest.raises(CorpusError, match="looks like integers of 32 bits"):
        reads(artifacts, ways[0])
    assert [reads(artifacts, ways[1]) for _ in range(2)] == [True, False]
    with pytest.raises(CorpusError, match="looks like integers of 32 bits"):
        reads(artifacts, ways[0])


def test_files_that_were_just_written_are_read_again(
    artifacts: Artifacts, config: StackWiseConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have changed since within the same tick of the clock."""
    with monkeypatch.context() as patch:
        patch.setattr("storage.unchanged._TICK_NS", 10**12)
        assert [reads(artifacts, config) for _ in range(2)] == [True, True]
    assert [reads(artifacts, config) for _ in range(2)] == [True, False]


def test_a_dataset_is_read_again_when_it_has_another_commit(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, commit = list[str](), ["a" * 40]

    def facts(source: str, **how: Any) -> tuple[str, int]:
        read.append(source)
        return "0" * 64, 7

    class Hub:
        def dataset_info(self, name: str, timeout: float) -> SimpleNamespace:
            if not commit[0]:
                raise OSError(f"{name}: no connection")
            return SimpleNamespace(sha=commit[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("storage.corpora.corpus_facts", facts)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    config = tiny(tmp_path, {"data.source": "hf:owner/name:train"})
    for commit[0], n_read in (("a" * 40, 1), ("a" * 40, 1), ("b" * 40, 2), ("", 3), ("", 4), ("b" * 40, 4)):
        assert facts_of(artifacts, config) == [("0" * 64, 7)]
        assert len(read) == n_read
    (tmp_path / "owner" / "name").mkdir(parents=True)  # which the library prefers
    facts_of(artifacts, config)
    assert len(read) == 5


def test_a_damaged_record_counts_for_nothing(artifacts: Artifacts, config: StackWiseConfig, tmp_path: Path) -> None:
    reads(artifacts, config)
    (record,) = (artifacts.root / "corpora").iterdir()
    whole = record.read_bytes()
    for at in range(0, len(whole), 7):
        record.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert reads(artifacts, config)
        assert record.read_bytes() == whole
    for content in (b"", whole[:-9], b"[" * 10**5, json.dumps({**json.loads(whole), "n_bytes": 7}).encode()):
        record.write_bytes(content)
        assert reads(artifacts, config)
    (tmp_path / "elsewhere").mkdir()
    record.rename(tmp_path / "elsewhere" / record.name)
    record.symlink_to(tmp_path / "elsewhere" / record.name)
    assert reads(artifacts, config)
    record.unlink()
    record.parent.rmdir()
    record.parent.symlink_to(tmp_path / "elsewhere")
    assert [reads(artifacts, config) for _ in range(2)] == [True, True]
    assert [path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()] == [whole]


def test_nothing_is_remembered_where_nothing_is(config: StackWiseConfig, tmp_path: Path, artifacts: Artifacts) -> None:
    absent = Artifacts(tmp_path / "absent")
    assert [reads(absent, config) for _ in range(2)] == [True, True]
    assert not absent.root.exists()
    (artifacts.root / "corpora").write_text("in the way")
    assert [reads(artifacts, config) for _ in range(2)] == [True, True]


def test_a_complete_run_reads_neither_corpus_nor_sequences(
    tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, {"training.progressive.target_stacks": 1})
    grown(config, artifacts.root)

    def read(*given: Any, **named: Any) -> None:
        raise Read

    monkeypatch.setattr("storage.corpora.corpus_facts", read)
    monkeypatch.setattr("flows.run.prepare.load_sequences", read)
    assert len(grow(config, str(artifacts.root))) == config.training.progressive.target_stacks
    assert plan_in(artifacts, config)[1].data.corpus == plan_in(Artifacts(artifacts.root), config)[1].data.corpus


def test_sealed_files_are_hashed_once_until_they_change(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir()
    (folder / "a").write_bytes(b"abc")
    files = {"a": (3, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")}
    assert verify_once(folder, files, "0") == []
    assert "missing" in verify_once(folder, {**files, "b": (3, "sha256:00")}, "1")[0]
    (folder / "b").write_bytes(b"abc")
    assert "not in the sealed list" in verify_once(folder, files, "0")[0]
    (folder / "b").unlink()
    before = (folder / "a").stat()
    (folder / "a").write_bytes(b"xyz")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "checksum" in verify_once(folder, files, "0")[0]


# ---------------------------------------------------------------- estimates


def words(folder: Path) -> str:
    library = Tokenizer(models.WordLevel({"[UNK]": 0, "w": 1, "[END]": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(folder / "words.json"))
    return str(folder / "words.json")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "bin", "examples"])
@pytest.mark.parametrize("most", [0, 50])
@pytest.mark.parametrize("by", ["byte", "words"])
def test_a_large_corpus_is_estimated_before_it_is_packed(kind: str, most: int, by: str, tmp_path: Path) -> None:
    texts = [f"some {n} words of a text " * (n % 9 + 1) for n in range(400)]
    if kind == "txt":
        (tmp_path / "a.txt").write_text("".join(texts))
    elif kind == "bin":
        (np.arange(40_000) % 200).astype("<u2").tofile(tmp_path / "a.bin")
    else:
        rows = [{"text": text} if kind == "jsonl" else {"input_ids": [1], "targets": [1]} for text in texts]
        (tmp_path / f"a.{'jsonl' if kind == 'jsonl' else 'json'}").write_text("\n".join(map(json.dumps, rows)))
    objective = "custom" if kind == "examples" else "clm"
    config = tiny(
        tmp_path,
        {
            "data.source": str(next(tmp_path.glob("a.*"))),
            "data.max_sequences": most,
            "data.tokenizer": by if by == "byte" else words(tmp_path),
            "training.progressive.training_objective": objective,
            "model.vocab_size": 300,
        },
    )
    corpus = read_corpus(config.data.source, examples=reads_examples(config))
    exact = [len(split) for split in sampled(config, *pack_corpus(config, corpus))]
    assert estimate_sequences(config, corpus.n_bytes) == pytest.approx(exact, rel=0.08)
