"""`stackwise evaluate`: every depth of a run on its own and on other text, bounds of masked runs, minimal pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.generation.judging import TextOf, judge_masked
from stackwise_core.generation.minimal_pairs import next_token_scores, shipped_pairs
from storage.racks import load_rack, open_run
from support.commands import Run
from support.modes import G
from support.runs import grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]


def test_every_depth_has_the_loss_that_the_run_recorded(reference: Reference, run: Run) -> None:
    """The validation sequences of tiny hold no end token, so that nothing is left out."""
    root = reference()
    document = run("evaluate", "tiny", "--artifacts", root, "--depth", "all", "--json").document
    recorded = {name: found["facts"] for name, found in manifests(root).items() if name.startswith("validation-")}
    losses = [recorded[name]["validation_loss_exact"] for name in sorted(recorded)]
    assert [each["nats_per_token"] for each in document["stages"]] == pytest.approx(losses, rel=1e-6)
    assert [(each["stage"], each["depth"]) for each in document["stages"]] == [(0, 1), (1, 2), (2, 3)]
    first = document["stages"][0]
    assert first["bits_per_byte"] == pytest.approx(losses[0] / math.log(2), rel=1e-6)
    assert first["perplexity_per_token"] == pytest.approx(math.exp(losses[0]), rel=1e-6)
    assert first["bytes"] == first["tokens"] == first["sequences"] * 15
    assert (first["bytes_per_token"], document["bound"], document["tokenizer"]) == (1.0, False, "byte")
    assert (root / "stacks" / first["stack"]).is_dir()
    table = run("evaluate", "tiny", "--artifacts", root, "--depth", 2).out
    assert f"{document['stages'][1]['bits_per_byte']:.4f}" in table
    assert "bits/byte" in table


def test_other_text_by_as_many_sequences_as_asked_for(reference: Reference, run: Run, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("stack trunk rack " * 20)
    how = ("evaluate", "tiny", "--artifacts", reference(), "--data", "other.txt", "--json")
    whole, some = (run(*how, "--max-sequences", n).document["stages"][0] for n in (0, 3))
    assert (whole["sequences"], whole["bytes"]) == (22, 340 - 21 - 1)  # 341 tokens, the end token does not count
    assert (some["sequences"], some["bytes"]) == (3, 45)


def test_a_masked_run_has_a_bound(run: Run, tmp_path: Path) -> None:
    quick = {"training.steps_per_stack": 1, f"{G}target_stacks": 2, f"{G}training_objective": "mlm"}
    by_depth = {**quick, f"{G}time_interpretation": "depth", f"{G}max_stacks": 2}
    root = tmp_path / "a"
    grown(tiny(tmp_path, by_depth), root)
    document = run("evaluate", "tiny", "--artifacts", root, "--draws", 2, "--json").document
    assert document["bound"]
    opened = open_run(root, "tiny")
    rows = [row[None] for row, _ in zip(opened.validation_rows(), range(8), strict=False)]
    expected = judge_masked(opened.denoisers(), rows, TextOf(ByteTokenizer()), 256, 2)
    (found,) = document["stages"]
    assert (found["nats_per_token"], found["sequences"]) == (pytest.approx(expected.nats_per_token), len(rows))
    table = run("evaluate", "tiny", "--artifacts", root).out
    assert "<= " in table
    assert "upper bounds" in table


def test_minimal_pairs(reference: Reference, run: Run, tmp_path: Path) -> None:
    pairs = [("the stack", "eht kcats"), ("frozen", "zzzzzz"), ("qqq", "rack"), ("eht kcats", "the stack")]
    lines = [json.dumps({"good": good, "bad": bad, "phenomenon": bad[:1]}) for good, bad in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, ""]))
    document = run("evaluate", "tiny", "--artifacts", reference(), "--pairs", "pairs.jsonl", "--json").document
    rack = load_rack(reference(), "tiny")

    def score(text: str) -> float:
        return next_token_scores(rack, [ByteTokenizer().encode(text.encode()).astype("int64")], [258])[0]

    right = [score(good) > score(bad) for good, bad in pairs]
    (found,) = document["stages"]
    assert (found["pairs"], found["right"], found["share"]) == (4, sum(right), pytest.approx(sum(right) / 4))
    assert 0 <= found["interval"][0] < found["share"] < found["interval"][1] <= 1
    told = [(each["phenomenon"], each["pairs"], each["right"]) for each in found["phenomena"]]
    assert told == [("e", 1, right[0]), ("z", 1, right[1]), ("r", 1, right[2]), ("t", 1, right[3])]
    assert (document["data"], document["score"]) == ("pairs.jsonl", "log probability")
    table = run("evaluate", "tiny", "--artifacts", reference(), "--pairs", "pairs.jsonl").out
    assert "95 % interval" in table
    assert "the good text of a pair has the higher log probability" in table


@pytest.mark.parametrize(("objective", "score"), [("clm", "log probability"), ("mlm", "pseudo-log-likelihood")])
def test_the_shipped_pairs(
    objective: str, score: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if objective == "mlm":  # it reads a sentence once for each letter
        monkeypatch.setattr("stackwise_core.generation.minimal_pairs._PER_FRAME", 1)
    changes = {"training.steps_per_stack": 1, f"{G}target_stacks": 1, "data.seq_len": 64}
    grown(tiny(tmp_path, {**changes, f"{G}training_objective": objective}), tmp_path / "a")
    document = run("evaluate", "tiny", "--artifacts", tmp_path / "a", "--pairs", "--json").document
    assert (document["data"], document["score"]) == ("the pairs of StackWise", score)
    (found,) = document["stages"]
    assert found["pairs"] == len(list(shipped_pairs()))
    assert sum(each["right"] for each in found["phenomena"]) == found["right"]
    assert 0.2 < found["share"] < 0.8  # it knows nothing
    table = run("evaluate", "tiny", "--artifacts", tmp_path / "a", "--pairs").out
    assert "negative polarity" in table
    assert f"has the higher {score}" in table


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("--depth", "x"), "--depth: got 'x'; K or `all`"),
        (("--depth", "7"), "depth: got 7; the run tiny has racks of these depths: 1, 2, 3"),
        (("--draws", "0", "--max-sequences", "-1"), "--max-sequences: got -1; 0 takes all; else 1 or more"),
        (("--data", "nothing.txt"), "data.source: got 'nothing.txt'"),
        (("--data", "one.txt"), "data: got no text of two tokens; give more"),
        (("--pairs", "nothing.jsonl"), "--pairs: got 'nothing.jsonl'; it cannot be read (No such file or directory)"),
        (("--pairs", "one.txt"), "--pairs: got one.txt:1; is not JSON"),
        (("--pairs", "half.jsonl"), "--pairs: got half.jsonl:2; has no texts `good` and `bad`"),
        (("--pairs", "named.jsonl"), "--pairs: got named.jsonl:1; its `phenomenon` is not a string"),
        (("--pairs", "empty.jsonl"), "--pairs: got 'empty.jsonl'; it has no line"),
        (("--pairs",), "The teacher sings every morning.: got a text of 32; of 1 to 15 tokens"),
        (("--pairs", "long.jsonl"), "long.jsonl:1: got a text of 17; of 1 to 15 tokens, as the rack was trained on"),
        (("--pairs", "one.txt", "--data", "one.txt"), "--data: got 'one.txt'; with --pairs the texts are those"),
    ],
)
def test_what_is_refused(how: tuple[str, ...], message: str, reference: Reference, run: Run, tmp_path: Path) -> None:
    texts: dict[str, Any] = {
        "one.txt": "x",
        "empty.jsonl": "\n",
        "named.jsonl": '{"good": "x", "bad": "y", "phenomenon": 1}',
        "half.jsonl": '\n{"good": "x"}\n',
        "long.jsonl": '{"good": "%s", "bad": "x"}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace("%s", "x" * 17))
    answer = run("evaluate", "tiny", "--artifacts", reference(), *how)
    assert (answer.code, answer.out) == (2, "")
    assert answer.faults[0].startswith(message)
