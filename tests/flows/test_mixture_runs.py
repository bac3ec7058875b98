"""Runs on a mixture of sources: what they train on, what is packed again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import CorpusError
from storage.adopt import plan_in
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError
from storage.sequences import load_sequences
from support.commands import Run
from support.runs import digests, grown, tiny, write_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "one two " * 9}) + "\n" for _ in range(9)))
    write_corpus(tmp_path / "a.txt", words=900)
    return tmp_path


def mixture(folder: Path, a: float, b: float, **changes: Any) -> StackWiseConfig:
    source = [{"source": f"{folder}/a.txt", "weight": a}, {"source": f"{folder}/b.jsonl", "weight": b}]
    base = {"data.source": source, "data.max_sequences": 0, "training.progressive.target_stacks": 1}
    return tiny(folder, base | {"training.steps_per_stack": 2} | changes)


def prepared(recorder: Any) -> int:
    return sum(made.startswith("prepare data") for made in recorder.made)


def test_a_run_trains_on_the_shares_and_other_weights_pack_nothing_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, config = folder / "artifacts", mixture(folder, 1, 3)
    assert prepared(grown(config, root)) == 3
    before, artifacts = digests(root), Artifacts(root)
    assert prepared(grown(config, root)) == 0
    assert digests(root) == before

    plan = plan_in(artifacts, config)[1]
    a, b = (load_sequences(artifacts, source.data.ref(-1)) for source in plan.sources)
    for n, split in enumerate(load_sequences(artifacts, plan.data_ref)):
        tokens, ids = split.take(np.arange(len(split)))
        known = {row.tobytes(): name for name, part in (("a", a[n]), ("b", b[n])) for row in np.asarray(part.tokens)}
        found = [known[row.astype(np.uint16).tobytes()] for row in tokens]
        assert found.count("b") == pytest.approx(0.75 * len(found), abs=1)
        assert np.array_equal(ids, split.sequence_ids)
        assert len(set(ids.tolist())) == len(ids)
    assert len(load_sequences(artifacts, plan.data_ref)[0]) == len(a[0]) + len(b[0])

    def never(*given: Any) -> None:
        raise AssertionError("packed again")

    with monkeypatch.context() as patch:
        patch.setattr("flows.run.prepare.pack", never)
        assert prepared(grown(mixture(folder, 1, 1, **{"run.name": "even", "data.max_sequences": 20}), root)) == 1

    # A source that is gone is packed again where it is needed, with the same bytes.
    artifacts.discard(plan.sources[0].data.ref(-1))
    assert prepared(grown(config, root)) == 1
    assert before.items() <= digests(root).items()


def test_plan_and_verify_know_the_sources(folder: Path, run: Run) -> None:
    config = mixture(folder, 1, 3)
    (folder / "config.yaml").write_text(config.to_yaml())
    root = ("--artifacts", str(folder / "artifacts"))
    counted = run("plan", str(folder / "config.yaml"), "--json", *root).document
    grown(config, folder / "artifacts")
    document = run("plan", str(folder / "config.yaml"), "--json", *root).document
    assert document["sources"] == counted["sources"]
    assert document["train_sequences"] == counted["train_sequences"]
    assert [round(each["share"], 2) for each in document["sources"]] == [0.25, 0.75]
    assert sum(each["train_sequences"] for each in document["sources"]) == document["train_sequences"]
    text = run("plan", str(folder / "config.yaml"), *root).out
    assert "times its" in text
    assert "% of its" in text
    assert "all as sealed" in run("verify", "tiny", *root).out
    assert "0 B" in run("gc", "--dry-run", *root).out


def test_rows_that_no_source_has_are_damage(folder: Path) -> None:
    config, root = mixture(folder, 1, 3), folder / "artifacts"
    grown(config, root)
    ref = plan_in(Artifacts(root), config)[1].data_ref
    path = root / "data" / ref.name / "train_rows.npy"
    rows = np.load(path)
    rows[3] = 10**6
    np.save(path, rows)
    with pytest.raises(ArtifactCorruptError):
        load_sequences(Artifacts(root), ref)


@pytest.mark.parametrize(
    ("tokens", "others", "message"),
    [
        ((np.arange(900) % 300).astype("<u2"), "a.txt", r"holds the token 299, and .*a\.txt is text"),
        ((np.arange(900) % 200).astype("<u2"), "a.txt", ""),
        ((np.arange(900) % 200).astype("<u2"), "c.npy", "holds tokens of 16 bits, and .* of 32"),
    ],
)
def test_tokens_of_another_tokenizer(tokens: Any, others: str, message: str, folder: Path) -> None:
    tokens.tofile(folder / "t.bin")
    np.save(folder / "c.npy", (np.arange(900) % 100).astype("<u4"))
    changes = {"data.source": [f"{folder}/t.bin", f"{folder}/{others}"], "model.vocab_size": 512}
    config = tiny(folder, changes | {"training.progressive.target_stacks": 1, "training.steps_per_stack": 2})
    if not message:
        grown(config, folder / "artifacts")
        return
    with pytest.raises(CorpusError, match=message):
        grown(config, folder / "artifacts")


def test_examples_are_mixed(folder: Path) -> None:
    for name, token in (("x", 7), ("y", 9)):
        row = {"input_ids": [token] * 8, "targets": [token] * 8}
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
    source = [{"source": f"{folder}/{name}.jsonl", "weight": weight} for name, weight in (("x", 3), ("y", 1))]
    changes = {"data.source": source, "training.progressive.training_objective": "custom"}
    config, root = tiny(folder, changes | {"training.progressive.target_stacks": 1}), folder / "artifacts"
    grown(config, root)
    fields = load_sequences(Artifacts(root), plan_in(Artifacts(root), config)[1].data_ref)[0].fields(np.arange(16))
    assert sorted(fields["input_ids"][:, 0].tolist()) == [7] * 12 + [9] * 4
    assert np.array_equal(fields["targets"][fields["masks"]], fields["input_ids"][fields["masks"]])
