"""The parts of benchmarks that have a right answer: bytes, charts. Nothing is timed here."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import growing, training_step
from benchmarks.peak import peak_bytes, peak_of
from benchmarks.plot import line_chart, ticks
from stackwise_core.objectives import chunked_loss, losses
from stackwise_core.stages.arms import ARMS, CONTROLS
from storage.artifacts import artifacts_at
from storage.runs import find_run, run_names
from support.runs import folder_of, tiny

# ---------------------------------------------------------------- bytes


def test_the_peak_is_what_was_held_at_once() -> None:
    with peak_bytes(torch.device("cpu")) as peak:
        first = torch.empty(1000, 1000)
        del first
        second, third = torch.empty(500, 500), torch.empty(250_000, dtype=torch.uint8)
        del second, third
    assert peak == [4_000_000]


def test_the_peak_holds_what_a_backward_pass_keeps() -> None:
    with peak_bytes(torch.device("cpu")) as peak:
        x = torch.zeros(1_000_000, requires_grad=True)
        y = x.exp().exp()  # each result is kept for the backward pass, the last is the output
        del y
    assert peak == [3 * 4_000_000]


@pytest.mark.parametrize(
    ("allocations", "peak"),
    [
        ([(1, 10), (2, 5), (1, -10), (3, 7)], 15),
        ([(9, -100), (1, 10)], 10),  # given back here, taken before: counts neither way
        ([(1, 10), (1, 30)], 30),  # an address that was given back unheard
        ([], 0),
    ],
)
def test_the_peak_of_allocations(allocations: list[Any], peak: int) -> None:
    assert peak_of(allocations) == peak


# ---------------------------------------------------------------- steps


def test_a_step_of_the_shape_of_smollm2_does_the_work_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "SEQ_LEN", 8)
    monkeypatch.setattr(losses, "MOST_LOGITS", 1)
    chunked = mock.Mock(wraps=chunked_loss.chunked_cross_entropy)
    monkeypatch.setattr(losses, "chunked_cross_entropy", chunked)
    batch_size, model = training_step.SHAPES["SmolLM2-135M's blocks and vocabulary"]
    small = {**model, "d_model": 36, "d_ff": 48, "vocab_size": 264}
    measures = training_step.measure_shape("small", batch_size, small, 1, 1)  # raises unless the losses are equal
    assert [m.what for m in measures if m.at_least] == ["first stage / Llama", "later stage / Llama"]
    assert chunked.call_count == 5  # the comparison, a round to warm up and another, of both stages


# ---------------------------------------------------------------- growing


def test_a_run_of_the_table_is_made_again_and_then_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, {"training.steps_per_stack": 4, "training.learning_rate": 0.002})
    config.to_yaml(tmp_path / "setting_s.yaml")
    (tmp_path / "early.yaml").write_text("arm: jump\n")
    monkeypatch.setattr(growing, "HERE", tmp_path)
    monkeypatch.setattr(growing, "UNIT", 0.02)
    row = growing.Row("stdlib", "early", "training.decay=linear", "0.01", "0.001", "1", "0")
    root = str(tmp_path / "artifacts")
    found = growing.made(row, root, "")
    (name,) = run_names(artifacts_at(root).existing())
    made = find_run(artifacts_at(root).existing(), name)
    assert made.config.run.seed == 1
    assert made.config.training.learning_rate == 0.001
    assert made.config.training.decay == "linear"
    assert made.plan.stages[0].spec.optim.steps > 4  # balanced
    manifest = folder_of(Path(root), "validation", len(made.plan.stages) - 1) / "manifest.json"
    assert found.loss == json.loads(manifest.read_text())["facts"]["validation_loss"]
    monkeypatch.setattr(growing, "grow", pytest.fail)
    assert growing.made(row, root, "") == found


def test_means_are_of_the_rate_with_most_seeds_and_differences_seed_by_seed() -> None:
    def of(arm: str, rate: str, *losses: float) -> list[growing.Row]:
        return [growing.Row("stdlib", arm, "", "2", rate, str(seed), str(loss)) for seed, loss in enumerate(losses)]

    rows = [*of("end-to-end", "0.1", 3.0, 5.0), *of("end-to-end", "0.2", 2.0), *of("full", "0.1", 2.5, 4.1)]
    _, _, *lines = growing.table(rows)
    assert lines == [
        "| stdlib | 2 | end-to-end |  | 4.0000 ± 12.7060 | 2 |  | 0.1: 3.0000, 5.0000; 0.2: 2.0000 |",
        "| stdlib | 2 | full |  | 3.3000 ± 10.1648 | 2 | \u22120.7000 ± 2.5412 | 0.1: 2.5000, 4.1000 |",
    ]


def test_every_run_of_the_table_has_an_arm_and_a_loss() -> None:
    rows = list(growing.rows())
    for row in rows:
        assert row.arm in (*ARMS, *CONTROLS) or (growing.HERE / f"{row.arm}.yaml").exists(), row
        assert 0.5 < float(row.loss) < 3, row
    assert len({row[:-1] for row in rows}) == len(rows)


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.71, 1.93), (3.0, 3.0), (-7.0, 4_211.0), (0.0, 0.00037)])
def test_ticks_are_round_and_reach_around(low: float, high: float) -> None:
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 11
    assert all(b - a == pytest.approx(step) for a, b in pairwise(marks))
    assert f"{step:.0e}"[0] in "125"


def test_a_chart_puts_points_in_proportion() -> None:
    svg = line_chart({"a < b": [(0.0, 0.0), (5.0, 2.5), (10.0, 10.0)]}, "x", "y")
    places = re.search(r'points="([^"]*)"', svg)
    assert places is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in places[1].split())
    assert x1 - x0 == pytest.approx((x2 - x0) / 2, abs=0.1)
    assert y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.1)  # larger is higher up
    assert y2 < y0
    assert "a &lt; b" in svg
