"""`stackwise compare`: which runs it makes, how rates are tuned, what it says of them, and what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flows.cli.compare import arms_of
from flows.compare import compare
from flows.pages.comparison import comparison_page, markdown, tables
from flows.run.comparing import known_results, open_field, run_missing
from flows.run.comparison import Comparison, Result, comparison_of, grid_of
from flows.run.events import request_stop
from flows.run.run import grow
from flows.run.verdict import (
    Interval,
    bound_of,
    failures_of,
    interval,
    judge,
    loses,
    loss_at,
    share_of,
    spent_for,
    verdict,
)
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, StackWiseError, StageInterruptedError
from storage.artifacts import Artifacts
from support.commands import Run
from support.runs import digests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

G = "training.progressive"
SMALL = {"training.steps_per_stack": 6, f"{G}.target_stacks": 2, "training.min_learning_rate": 0.0}


def small(folder: Path, changes: dict[str, Any] | None = None) -> StackWiseConfig:
    return tiny(folder, SMALL | (changes or {}))


class HereAndNow:
    """A job that trains in this process, when it is started."""

    def __init__(self, config: StackWiseConfig, artifacts: Artifacts) -> None:
        self.problem = ""
        try:
            grow(config, artifacts.uri)
        except StageInterruptedError:
            raise
        except StackWiseError as error:
            self.problem = str(error)

    def poll(self) -> str:
        return self.problem

    def stop(self) -> None:
        pass


class Fake:
    """A job that has ended with a problem, or runs until it is stopped."""

    def __init__(self, problem: str | None) -> None:
        self.problem, self.stopped = problem, False

    def poll(self) -> str | None:
        return self.problem

    def stop(self) -> None:
        self.problem, self.stopped = "stopped", True


def nothing_starts(config: StackWiseConfig, artifacts: Artifacts) -> Fake:
    pytest.fail(f"{config.run.name} was started")


def compared(comparison: Comparison, root: Path) -> dict[str, Any]:
    field = open_field(comparison, str(root))
    return judge(field, run_missing(field, HereAndNow, 1))


# ---------------------------------------------------------------- the grid of rates


def grid(losses: dict[float, float], *, extend: bool = False, rates: tuple[float, ...] = (0.5, 1.0, 2.0)) -> Any:
    comparison = Comparison.model_construct(rates=rates, extend=extend, so_far=False)
    return grid_of(comparison, losses)


def test_so_far_the_best_rate_is_that_of_those_that_were_tried() -> None:
    comparison = Comparison.model_construct(rates=(0.5, 1.0, 2.0), extend=True, so_far=True)
    assert grid_of(comparison, {}) == ((0.5, 1.0, 2.0), None, False)
    assert grid_of(comparison, {1.0: 1.2}) == ((0.5, 1.0, 2.0), 1.0, True)
    assert grid_of(comparison, {0.5: 1.4, 2.0: 1.3}) == ((0.5, 1.0, 2.0), 2.0, True)
    assert grid_of(comparison, {0.5: math.inf, 2.0: 1.3})[1] == 2.0
    assert grid_of(comparison, {0.5: 1.4, 1.0: 1.2, 2.0: 1.3}) == ((0.5, 1.0, 2.0), 1.0, False)


def test_the_best_rate_is_known_when_all_were_tried() -> None:
    assert grid({0.5: 1.4, 1.0: 1.2}) == ((0.5, 1.0, 2.0), None, False)
    assert grid({0.5: 1.4, 1.0: 1.2, 2.0: 1.3}) == ((0.5, 1.0, 2.0), 1.0, False)


def test_a_tie_goes_to_the_lower_rate() -> None:
    assert grid({0.5: 1.4, 1.0: 1.2, 2.0: 1.2}).best == 1.0
    assert grid({0.5: 1.2, 1.0: 1.2, 2.0: 1.2}) == ((0.5, 1.0, 2.0), 0.5, True)


def test_an_edge_is_said_and_a_grid_that_may_grow_goes_on_beyond_it() -> None:
    falling = {0.5: 1.4, 1.0: 1.3, 2.0: 1.2}
    assert grid(falling) == ((0.5, 1.0, 2.0), 2.0, True)
    assert grid(falling, extend=True) == ((0.5, 1.0, 2.0, 4.0), None, False)
    assert grid(falling | {4.0: 1.25}, extend=True) == ((0.5, 1.0, 2.0, 4.0), 2.0, False)
    rising = {0.5: 1.2, 1.0: 1.3, 2.0: 1.4}
    assert grid(rising, extend=True).factors == (0.25, 0.5, 1.0, 2.0)
    endless = {2.0**n: 2.0 - n / 10 for n in range(-1, 9)}
    assert grid(endless, extend=True) == ((0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0), 32.0, True)  # four points more


def test_one_rate_is_extended_to_both_sides() -> None:
    assert grid({1.0: 1.3}, rates=(1.0,)) == ((1.0,), 1.0, True)
    assert grid({1.0: 1.3}, rates=(1.0,), extend=True).factors == (0.5, 1.0)
    assert grid({1.0: 1.3, 0.5: 1.4}, rates=(1.0,), extend=True).factors == (0.5, 1.0, 2.0)


def test_a_rate_that_diverged_is_not_the_best_and_closes_the_grid() -> None:
    assert grid({0.5: 1.4, 1.0: 1.2, 2.0: math.inf}, extend=True) == ((0.5, 1.0, 2.0), 1.0, False)
    assert grid(dict.fromkeys((0.5, 1.0, 2.0), math.inf), extend=True).best is None


# ---------------------------------------------------------------- numbers


def test_an_interval_of_three_seeds_is_that_of_student() -> None:
    found = interval([1.30, 1.32, 1.37])
    assert found
    assert found.mean == pytest.approx(1.33)
    half = 4.302653 * math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(1.33 - half, abs=1e-4), pytest.approx(1.33 + half, abs=1e-4))
    assert interval([1.3]) == Interval(1.3, None, None, 1)
    assert interval([]) is None
    assert interval([1.0, 2.0] * 10)  # as many seeds as are allowed


POWER = [(x, 3 * x**-0.2) for x in (1.0, 2.0, 8.0)]
"""A curve on which interpolation of logarithms is exact."""


@pytest.mark.parametrize("x", [1.0, 1.7, 2.0, 5.0, 8.0])
def test_interpolation_is_exact_on_a_power_law_both_ways(x: float) -> None:
    loss = 3 * x**-0.2
    assert loss_at(POWER, x) == pytest.approx(loss)
    assert spent_for(POWER, loss) == pytest.approx(x)
    assert share_of(POWER, 0.6 * x, loss) == ("", pytest.approx(0.6))


def test_nothing_is_extrapolated_a_bound_is_said() -> None:
    assert loss_at(POWER, 9) is loss_at(POWER, 0.9) is spent_for(POWER, 1.0) is None
    assert share_of(POWER, 4, 1.0) == ("<", 0.5)  # even twice as much does not give it
    assert share_of(POWER, 4, 3.1) == (">", 4)
    assert share_of(POWER[:1], 4, 2.0) is None
    assert loss_at([], 1.0) is None


def test_a_bound_holds_of_every_seed() -> None:
    assert bound_of([("<", 0.5), ("<", 0.75)]) == "< 75\u00a0%"
    assert bound_of([(">", 1.5), (">", 1.25)]) == "> 125\u00a0%"
    assert bound_of([("<", 0.5), ("", 1.5)]) == "< 150\u00a0%"  # no more than the largest that is known
    for shares in ([("<", 0.5), (">", 1.25)], [("<", 0.5), None], [("", 0.5), ("", 0.75)], []):
        assert bound_of(shares) == ""


# ---------------------------------------------------------------- sentences


def row(arm: str, *losses: float, budget: float = 1.0, gap: float = 0.0, **gaps: float) -> dict[str, Any]:
    above = Interval(gap, gap - 0.01, gap + 0.01, len(losses))._asdict()
    against = {
        axis: {"share": None, "bound": "", "gap": Interval(found, found, found, 3)._asdict() if found else None}
        for axis, found in {"tflop": 0.0, "tflop_recomputed": 0.0, "tokens": 0.0, "seconds": 0.0, **gaps}.items()
    }
    loss = interval(losses)
    return {
        "arm": arm,
        "budget": budget,
        "loss": loss and loss._asdict(),
        "above_end_to_end": None if arm == "end-to-end" else above,
        "against": {} if arm == "end-to-end" else against,
    }


def document(*rows: dict[str, Any], flat: tuple[str, ...] = ("end-to-end", "flat-1/3", "flat-2/3")) -> dict[str, Any]:
    names = list(dict.fromkeys(each["arm"] for each in rows))
    arms = [
        {"arm": name, "grows": name not in flat, "budgets": [each for each in rows if each["arm"] == name]}
        for name in names
    ]
    return {"unit": "nats per byte", "budgets": sorted({each["budget"] for each in rows}), "arms": arms}


def test_the_verdict_is_of_the_best_way_to_grow_at_the_largest_budget() -> None:
    rows = [
        row("end-to-end", 1.5, 1.5, 1.5),
        row("jump", 1.3, 1.3, 1.3, gap=-0.2),
        row("end-to-end", 1.4, 1.4, 1.4, budget=3),
        row("frozen", 1.45, 1.45, 1.45, budget=3, gap=0.05),
        row("jump", 1.33, 1.33, 1.33, budget=3, gap=-0.07),
    ]
    rows[-1]["against"]["tflop"]["share"] = Interval(0.6, 0.5, 0.7, 3)._asdict()
    found = verdict({**document(*rows), "budgets": [3, 1.0]})  # whichever the rates were tuned at
    assert found == (
        "At equal FLOPs jump beats end-to-end training: 1.3300 against 1.4000 nats per byte, \u22125.0\u00a0%; "
        "it reaches the same loss with 60\u00a0% of the FLOPs; 3 seeds."
    )


def test_the_verdict_calls_the_configured_arm_what_it_is() -> None:
    found = verdict(document(row("end-to-end", 1.5, 1.5), row("configured", 1.4, 1.4, gap=-0.1)))
    assert found.startswith("At equal FLOPs the configuration as it is ")


def test_the_verdict_names_a_smaller_model_that_ends_below_the_whole_one() -> None:
    rows = [row("end-to-end", 1.5), row("flat-1/3", 1.6), row("flat-2/3", 1.45), row("jump", 1.44, gap=-0.06)]
    assert verdict(document(*rows)).endswith(
        "chance is not ruled out. A smaller model from scratch, flat-2/3, has 1.4500."
    )
    rows[2] = row("flat-2/3", 1.5)
    assert verdict(document(*rows)).endswith("chance is not ruled out.")


def test_a_difference_within_its_interval_is_none() -> None:
    rows = [row("end-to-end", 1.5, 1.5), row("jump", 1.495, 1.495, gap=-0.005)]
    rows[1]["against"]["tflop"]["share"] = Interval(0.9, 0.5, 1.3, 2)._asdict()
    assert verdict(document(*rows)) == (  # nor is a share of the FLOPs said
        "At equal FLOPs jump cannot be told apart from end-to-end training: 1.4950 against 1.5000 nats per byte, "
        "\u22120.3\u00a0%; 2 seeds."
    )
    assert loses(document(*rows)) == "Growing lost nowhere in what was tried here."


def test_no_verdict_without_both_losses() -> None:
    assert verdict(document(row("end-to-end"), row("jump", 1.4))).startswith("No verdict yet")
    assert verdict(document(row("end-to-end", 1.4), row("flat-1/3", 1.5))).startswith("No verdict yet")


def test_where_growing_loses_names_arms_measures_and_smaller_models() -> None:
    rows = [
        row("end-to-end", 1.5, 1.5),
        row("flat-2/3", 1.2, 1.2),
        row("frozen", 1.6, 1.6, gap=0.1, tokens=0.2),
        row("jump", 1.4, 1.4, gap=-0.1, tokens=0.05),
    ]
    assert loses(document(*rows)) == (
        "Growing loses to end-to-end training at equal FLOPs: frozen (+0.1000); "
        "at equal tokens: frozen (+0.2000), jump (+0.0500)."
    )
    said = "A smaller model from scratch, flat-2/3, has a lower mean loss than every arm that grows: 1.2000."
    assert verdict(document(*rows)).endswith(said)  # once is enough
    rows[2:] = [row("flat-1/3", 1.3, 1.3), row("jump", 1.4, 1.4, gap=-0.1)]
    assert loses(document(*rows)) == said.replace("flat-2/3", "flat-1/3").replace("1.2", "1.3")
    assert loses(document(*rows[:2], rows[3])) == ""  # nor does it lose nowhere
    rows = [row("flat-1/3", 1.2, budget=n) for n in (1, 2)] + [row("jump", 1.4, budget=n, gap=-0.1) for n in (1, 2)]
    assert loses(document(*rows)).endswith("grows: 1.2000 at a budget of 1, 1.2000 at a budget of 2.")


def test_a_smaller_model_is_named_though_no_grown_one_reached_the_largest_budget() -> None:
    rows = [row(arm, loss, budget=n) for arm, loss in (("end-to-end", 1.5), ("flat-1/3", 1.2)) for n in (1, 2)]
    found = document(*rows, row("jump", 1.4, budget=1, gap=-0.1))
    assert verdict(found).startswith("No verdict yet")
    assert loses(found).endswith("flat-1/3, has a lower mean loss than every arm that grows: 1.2000 at a budget of 1.")


def whole(document: dict[str, Any], spent: dict[str, float]) -> dict[str, Any]:
    """Add what a page shows; `spent` says for each arm what its runs cost, in all that they cost."""
    for arm in document["arms"]:
        arm |= {"rate": 0.01, "edge": "highest", "tuning_tflop": 1.0}
        for each in arm["budgets"]:
            axes = ("tflop", "tflop_recomputed", "tokens", "seconds", "memory_bytes_forecast", "trained_parameters")
            each |= {axis: spent[arm["arm"]] for axis in axes}
            each |= {"steps": [5], "blocks": 1, "runs": []}
    said = {"name": "tiny", "artifacts": "a", "judged_on": "4 sequences", "verdict": "", "loses": ""}
    counted = {"rates": [1.0], "seeds": [0], "budget_tflop": 1.0, "total_tflop": 1.0, "failures": [], "notes": []}
    return {**document, **said, **counted}


def test_names_in_a_chart_stand_apart_right_of_it() -> None:
    """Each led to from the dot of its arm, in the colour of its kind, past no dot of another arm."""
    rows = [row("end-to-end", 1.5, 1.52), row("flat-1/3", 1.4, 1.41), row("jump", 1.4, 1.411), row("frozen", 1.4, 1.42)]
    spent = {"end-to-end": 3.0, "flat-1/3": 1.0, "jump": 2.0, "frozen": 2.5}
    (drawn, *_) = re.findall(r"<svg.*?</svg>", comparison_page(whole(document(*rows), spent)), re.DOTALL)
    chart = ElementTree.fromstring(drawn)
    names = {mark.text: (float(mark.get("x", "")), float(mark.get("y", ""))) for mark in chart.iter("text")}
    dots = {(mark[0].text or "").split(",")[0]: mark for mark in chart.iter("circle")}
    leaders = {mark.get("x1"): mark for mark in chart.iter("line") if "leader" in mark.get("class", "")}
    heights = sorted(names[arm][1] for arm in spent)
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 15
    for arm, dot in dots.items():
        leader = leaders[dot.get("cx")]
        assert leader.get("y1") == dot.get("cy")
        assert float(leader.get("y2", "")) + 4 == pytest.approx(names[arm][1])
        assert ("run-0" in leader.get("class", "")) == (arm in ("jump", "frozen"))
        assert all(names[arm][0] > float(other.get("cx", "")) + 8 for other in dots.values())
    of_the_same = [names[arm][1] for arm in ("frozen", "jump", "flat-1/3")]
    assert of_the_same == sorted(of_the_same)  # a leader from the left goes below those right of it


def test_what_a_table_says_stands_beside_it() -> None:
    rows = [row("end-to-end", 1.5, 1.5), row("jump", 1.4, 1.4, gap=-0.1)]
    rows[1]["against"]["tflop"]["share"] = Interval(0.6, 0.5, 0.7, 3)._asdict()
    found = tables(whole(document(*rows), {"end-to-end": 1.0, "jump": 1.0}))
    losses, shares = found[0], next(table for table in found if "share" in table.title)
    assert "0.01 \u2191" in losses.rows[0]
    assert "\u2191 or \u2193 at a rate: the best of those tried is the highest or the lowest" in losses.note
    assert "\u22120.1000 \u00b1\u00a00.0100" in losses.rows[0]
    assert shares.rows[0][1] == "60\u00a0% \u00b1\u00a010\u00a0%"
    page = comparison_page(whole(document(*rows), {"end-to-end": 1.0, "jump": 1.0}))
    assert '<td class="right spread">60\u00a0% \u00b1\u00a010\u00a0%</td>' in page  # which a phone breaks before \u00b1
    assert "td.right:not(.spread) { white-space: nowrap; }" in page


def test_rows_and_columns_of_which_nothing_is_known_are_left_out() -> None:
    rows = [row("end-to-end", 1.5), row("full", 1.4, gap=-0.1), row("jump", 1.4, gap=-0.1, tokens=0.05)]
    found = tables(whole(document(*rows), dict.fromkeys(("end-to-end", "full", "jump"), 1.0)))
    (gaps,) = [table for table in found if "for equal" in table.title]
    assert (list(gaps.columns), gaps.rows) == (["arm", "|tokens"], [["jump", "+0.0500 \u00b1\u00a00.0000"]])
    assert not [table for table in found if "share" in table.title]


# ---------------------------------------------------------------- runs


def test_a_comparison_runs_what_is_missing_once(tmp_path: Path, run: Run) -> None:
    """Four controls, two rates of which the larger diverges, a curve of two budgets; then all of it is there."""
    config = small(tmp_path)
    comparison = comparison_of(config, rates=(1.0, 1e12), seeds=1, curve=(2.0,))
    found = compared(comparison, tmp_path / "artifacts")
    rows = {(each["arm"], each["budget"]): each for arm in found["arms"] for each in arm["budgets"]}
    assert list(rows) == [("configured", 1), ("end-to-end", 1), ("end-to-end", 2), ("flat-1/3", 1), ("flat-2/3", 1)]
    for arm in found["arms"]:
        assert [each["state"] for each in arm["tried"]] == ["done", "diverged"]
        assert (arm["rate"], arm["edge"]) == (0.002, "lowest")
        assert arm["tuning_tflop"] == pytest.approx(found["budget_tflop"], rel=0.2)
    flat = {budget: rows["end-to-end", budget]["loss"]["mean"] for budget in (1, 2)}
    gap = rows["configured", 1]["above_end_to_end"]
    assert gap["mean"] == pytest.approx(rows["configured", 1]["loss"]["mean"] - flat[1])
    assert rows["configured", 1]["bits_per_byte"] == pytest.approx(rows["configured", 1]["loss"]["mean"] / math.log(2))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(failures_of(found)) == 4
    assert "diverged: stage 0: step" in failures_of(found)[0]

    before = digests(tmp_path / "artifacts")
    field = open_field(comparison, str(tmp_path / "artifacts"))
    again = judge(field, run_missing(field, nothing_starts, 1))
    assert again == found
    partly = comparison.model_copy(update={"rates": (0.5, *comparison.rates), "so_far": True})
    field = open_field(partly, str(tmp_path / "artifacts"))
    so_far = judge(field, known_results(field, failed=True))  # of the rates that were tried, which 0.5 was not
    assert {(arm["rate"], arm["edge"]) for arm in so_far["arms"]} == {(0.002, "lowest")}
    config.to_yaml(tmp_path / "c.yaml")
    words = ("--rates", "1,1e12", "--seeds", 1, "--curve", 2, "--html", "c.html", "--markdown", "c.md")
    printed = run("compare", "c.yaml", *words)
    assert printed.code == 1  # something has diverged
    assert printed.err == "stackwise: " + "".join(f"{line}\n" for line in failures_of(found))
    assert all(said in printed.out for said in (found["verdict"], found["loses"], "budget", "bits/byte"))
    assert run("status", "--json").out.count('"done"') == 5  # the runs, under their names
    assert digests(tmp_path / "artifacts") == before

    page, text = (tmp_path / "c.html").read_text(), (tmp_path / "c.md").read_text()
    assert page == (tmp_path / "artifacts" / "comparisons" / "tiny" / "index.html").read_text()
    assert page.count("<svg") == 4
    for chart in re.findall(r"<svg.+?</svg>", page, re.DOTALL):  # an arm of two budgets is named once, over no dot
        assert (chart.count(">end-to-end</text>"), chart.count("<title>end-to-end, budget")) == (1, 2)
        assert chart.rindex('class="note"') < chart.index("<circle")
    for table in tables(found):
        assert all(f"| {' | '.join(row)} |" in text.replace("\\", "") for row in table.rows)
        assert all(f">{cell}</td>" in page for row in table.rows for cell in row if "<" not in cell and ">" not in cell)


def test_a_failed_run_is_told_and_does_not_stop_the_others(tmp_path: Path) -> None:
    field = open_field(comparison_of(small(tmp_path), rates=(1.0,), seeds=1), str(tmp_path / "artifacts"))
    started: list[str] = []

    def killed(config: StackWiseConfig, artifacts: Artifacts) -> Fake:
        started.append(config.run.name)
        return Fake("killed by signal 9; its log is elsewhere")

    found = judge(field, run_missing(field, killed, 2))
    assert len(started) == len(set(started)) == 4
    assert len(failures_of(found)) == 4
    assert failures_of(found)[0].endswith("failed: killed by signal 9; its log is elsewhere")
    assert found["verdict"].startswith("No verdict yet")
    assert "1 failed" in markdown(found)
    assert known_results(field) == {}  # the same command tries again


def test_a_stop_reaches_every_run_at_work(tmp_path: Path) -> None:
    field = open_field(comparison_of(small(tmp_path), rates=(1.0,), seeds=1), str(tmp_path / "artifacts"))
    jobs: list[Fake] = []

    def start(config: StackWiseConfig, artifacts: Artifacts) -> Fake:
        jobs.append(Fake(None))
        if len(jobs) == 2:
            request_stop()
        return jobs[-1]

    with pytest.raises(StageInterruptedError, match="run the same command to go on"):
        run_missing(field, start, 2)
    assert [job.stopped for job in jobs] == [True, True]


def test_a_seed_without_a_loss_and_runs_of_other_code_are_a_sentence_each(tmp_path: Path) -> None:
    field = open_field(comparison_of(small(tmp_path), rates=(1.0,), seeds=2), str(tmp_path / "artifacts"))
    results = {run: Result("done", 1.5, made_by={"commit": "a", "torch": "2"}) for run in field.wanted({})}
    results = {run: results.get(run) or Result("done", 1.6, made_by={"commit": "b"}) for run in field.wanted(results)}
    other = next(run for run in results if run.arm == "flat-1/3" and run.seed)
    said = judge(field, results | {other: Result("diverged", math.inf, message="step 3: loss nan")})["notes"]
    assert "Means are without the seeds that diverged or failed, which flatters flat-1/3." in said
    assert "Not all runs are of one commit and torch: compare their seconds with care." in said


def test_an_arm_keeps_its_name_only_as_text(tmp_path: Path) -> None:
    field = open_field(
        comparison_of(small(tmp_path), own={"<i>|*": {"arm": "full"}}, rates=(1.0,), seeds=1),
        str(tmp_path / "artifacts"),
    )
    found = judge(field, {})
    assert "<i>" not in comparison_page(found)
    assert "\\<i\\>\\|\\*" in markdown(found)


def test_arms_whose_runs_would_have_the_same_names_are_refused(tmp_path: Path) -> None:
    own = {"no decay": {"arm": "full"}, "no-decay!": {"arm": "full"}, "flat-1of3": {"arm": "full"}}
    with pytest.raises(ConfigError) as told:
        comparison_of(small(tmp_path), ["flat-1/3"], own)
    said = [str(fault) for fault in told.value.faults]
    assert said == [
        "--arms: got 'no-decay!'; its runs would have the names of those of 'no decay'; give it another",
        "--arms: got 'flat-1of3'; its runs would have the names of those of 'flat-1/3'; give it another",
    ]


def test_the_runs_are_those_of_the_configuration_itself(tmp_path: Path, run: Run) -> None:
    """A run that was made before, under another name, is part of the comparison."""
    config = small(tmp_path)
    grow(config, str(tmp_path / "artifacts"))
    field = open_field(comparison_of(config, rates=(1.0,), seeds=1), str(tmp_path / "artifacts"))
    assert [run.arm for run in known_results(field)] == ["configured"]
    config.to_yaml(tmp_path / "c.yaml")
    told = run("compare", "c.yaml", "--rates", 1, "--seeds", 1, "--so-far")
    assert told.code == 0
    assert "So far: 3 runs of 4 are still to come." in told.out


def test_the_command_hands_the_flow_what_it_takes(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server is left out, and the runs: the flow binds the arguments, and gives back the same comparison."""
    bound: list[inspect.BoundArguments] = []

    def bind(comparison: Comparison, arguments: dict[str, Any]) -> None:
        bound.append(inspect.signature(compare.fn).bind(**arguments))
        of_flow = {name: bound[0].arguments[name] for name in ("rates", "seeds", "budgets", "curve", "tflop", "extend")}
        assert comparison_of(arguments["config"], arguments["arms"], arguments["own"], **of_flow) == comparison

    monkeypatch.setattr("flows.compare.compare_to_the_end", bind)
    monkeypatch.setattr("flows.cli.compare.on_server", contextlib.nullcontext)
    small(tmp_path).to_yaml(tmp_path / "c.yaml")
    run("compare", "c.yaml", "--rates", "0.5,1", "--seeds", 2, "--curve", 2, "--jobs", 2)
    assert bound[0].arguments["jobs"] == 2


def test_no_run_cools_down_which_would_not_be_charged(tmp_path: Path) -> None:
    comparison = comparison_of(small(tmp_path, {"training.schedule": "one_clock", "validation.cooldown_steps": 2}))
    assert comparison.config.validation.cooldown_steps == 0


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "an unknown arm": (["--arms", "forzen"], "--arms: got 'forzen'; there is no such arm; did you mean frozen?"),
    "a rate": (["--rates", "1,-2"], "--rates: got -2; a number above 0 is expected"),
    "no number": (["--rates", "1,x"], "--rates: got 'x'; a number is expected, such as 0.5"),
    "no rate": (["--rates", ","], "--rates: got nothing; at least one number is expected, such as 1"),
    "seeds": (["--seeds", "0"], "--seeds: got 0; 1 to 20 are expected"),
    "half a seed": (["--seeds", "1.5"], "--seeds: got '1.5'; a whole number is expected, such as 3"),
    "a budget": (["--budgets", "inf"], "--budgets: got inf; a number above 0 is expected"),
    "jobs": (["--jobs", "0"], "--jobs: got 0; at least 1 is expected"),
    "too few steps": (
        ["--budgets", "0.1"],
        "arm configured at budget 0.1: training.steps_per_stack: got 0 in",
    ),
    "other text": (["--arms", "other.yaml"], "the text, tokenizer or sequences of arm other: got data-"),
    "an unknown key": (
        ["--arms", "full:training.decays=linear"],
        "arm full decays=linear at budget 1: training.decays: got",
    ),
    "a share": (["--arms", "full:anneal=2"], "anneal of full anneal=2: got 2; a share of the FLOPs between 0 and 1"),
    "an anneal of one step, not of its share": (
        ["--arms", "frozen+anneal:training.joint_steps=1"],
        "arm frozen+anneal joint_steps=1 at budget 1: training.steps_per_stack: got 1 in the shortest stage",
    ),
    "two of one name": (
        ["--arms", "other.yaml,./other.yaml"],
        "--arms: got './other.yaml'; another arm is called other",
    ),
    "another objective": (
        ["--arms", f"frozen:{G}.training_objective=mlm"],
        "training_objective of arm frozen training_objective=mlm: got mlm; clm end to end: no measure is common",
    ),
    "an arm that may end early": (
        ["--arms", "full:validation.patience=3"],
        "validation.patience of full patience=3: got a value; where a stage may end early",
    ),
    "a seed of its own": (["--arms", "full:run.seed=3"], "run.seed of full seed=3: got a value; runs are named and"),
    "no such file": (["--arms", "none.yaml"], "none.yaml: got no such file"),
    "a long name": (["--name", "n" * 60], "--name: got 'nnn"),
    "no name": (["--name", "a b"], "run.name: got 'a b'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_comparison_that_makes_no_sense_is_refused_before_anything_is_trained(
    what: str, tmp_path: Path, run: Run
) -> None:
    small(tmp_path).to_yaml(tmp_path / "c.yaml")
    (tmp_path / "other.yaml").write_text("arm: frozen\ndata: {seq_len: 8}\n")
    words, message = REFUSED[what]
    result = run("compare", "c.yaml", *words)
    assert result.code == 2
    assert f"stackwise: {message}" in result.err
    assert len(result.err.splitlines()) <= 5
    assert not list(tmp_path.glob("artifacts/stacks/*"))


def test_a_file_may_be_changed_in_a_word(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("arm: frozen\ntraining: {decay: linear}\n")
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "other.yaml").write_text("arm: full\n")
    assert arms_of(f"{tmp_path}/a:b/other.yaml,full:data.source=x.yaml")[1] == {
        "other": {"arm": "full"},
        "full source=x.yaml": {"arm": "full", "data.source": "x.yaml"},
    }
    names, own = arms_of(f"{tmp_path}/mine.yaml:training.warmup_steps=1,full")
    assert names == ["full"]
    arm = {"arm": "frozen", "training": {"decay": "linear"}, "training.warmup_steps": 1}
    assert own == {"mine warmup_steps=1": arm}
    comparison = comparison_of(small(tmp_path), names, own)
    changes = comparison.arms["mine warmup_steps=1"]
    assert changes["training.warmup_steps"] == 1
    assert changes["training.decay"] == "linear"
    assert changes[f"{G}.trunk_strategy"] == "frozen"


def test_the_plan_names_every_run_and_trains_nothing(tmp_path: Path, run: Run) -> None:
    small(tmp_path).to_yaml(tmp_path / "c.yaml")
    (tmp_path / "no-clock.yaml").write_text("arm: frozen\ntraining: {schedule: per_stage}\n")
    named = "full,no-clock.yaml,full:training.decay=linear,no-clock.yaml:training.warmup_steps=1"
    words = ("--arms", named, "--seeds", 2, "--budgets", "1,3", "--json")
    found = json.loads(run("compare", "c.yaml", "--plan", *words).out)["runs"]
    arms = ("configured", "end-to-end", "flat-1/3", "flat-2/3", "full", "no-clock", "full decay=linear")
    arms += ("no-clock warmup_steps=1",)
    assert tuple(dict.fromkeys(each["arm"] for each in found)) == arms
    assert len(found) == len(arms) * (3 + 1 + 2)  # three rates; the other seed; both at the other budget
    assert {each["rate"] for each in found} == {0.001, 0.002, 0.004, None}
    assert {each["state"] for each in found} == {"to run"}
    assert not list(tmp_path.glob("artifacts/stacks/*"))
