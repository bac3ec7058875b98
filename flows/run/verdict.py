"""What a comparison says: losses with intervals, what they cost, and where growing wins and loses."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flows.run.comparison import Chosen, Grid, Result, Results
from flows.run.devices import device_memory, settings_of
from flows.run.field import Field
from flows.run.numbers import loss, percent, signed
from stackwise_core.stages.arms import CONFIGURED, CONTROLS, END_TO_END
from stackwise_core.stages.charges import charge
from stackwise_core.stages.costs import trainable_parameters
from stackwise_core.stages.memory import memory

Document = dict[str, Any]
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12)
_T_95_OF_MORE = (2.11, 2.101, 2.093)
"""Quantiles of Student's t distribution, two-sided 95 %, by degrees of freedom from 1 on."""
AXES = {"tflop": "FLOPs", "tflop_recomputed": "recomputed FLOPs", "tokens": "tokens", "seconds": "seconds"}
"""What runs are charged in."""


# ---------------------------------------------------------------- numbers


class Interval(NamedTuple):
    """A mean over seeds, with a 95 % t-interval; without one of a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of some values with its interval, None of none."""
    if not values:
        return None
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    half = (*_T_95, *_T_95_OF_MORE)[n - 2] * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


Curve = Sequence[tuple[float, float]]
"""What was spent, rising, and the loss that it gave."""


def loss_at(curve: Curve, spent: float) -> float | None:
    """Return the loss at something spent, by interpolation of logarithms; None outside the curve."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= spent <= x1:
            share = math.log(spent / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return None


def spent_for(curve: Curve, loss: float) -> float | None:
    """Return what the curve spends until it first has a loss, by interpolation of logarithms; None if it never has."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= loss <= y0:
            share = math.log(loss / y0) / math.log(y1 / y0) if y1 != y0 else 0.0
            return math.exp(math.log(x0) + share * math.log(x1 / x0))
    return None


def share_of(curve: Curve, spent: float, loss: float) -> tuple[str, float] | None:
    """Return which share of what the curve spends for a loss was spent here; beyond the curve, < or > and its bound."""
    if (theirs := spent_for(curve, loss)) is not None:
        return "", spent / theirs
    if len(curve) < 2:
        return None
    if loss < min(y for _, y in curve):
        return "<", spent / curve[-1][0]
    return (">", spent / curve[0][0]) if loss > curve[0][1] else None


def bound_of(shares: Sequence[tuple[str, float] | None]) -> str:
    """Return in words what holds of the shares of all seeds, if some lie beyond the curve; '' if nothing does."""
    known = [share for share in shares if share]
    (sign, *others) = sorted({sign for sign, _ in known} - {""}) or [""]
    if not sign or others or len(known) < len(shares):
        return ""
    values = [value for _, value in known]
    return f"{sign} {percent(max(values) if sign == '<' else min(values))}"


# ---------------------------------------------------------------- the document


def judge(field: Field, results: Results) -> Document:
    """Return the comparison as a JSON document, as far as there are results."""
    comparison, config = field.comparison, field.comparison.config
    grids = {name: field.grid(name, results) for name in comparison.arms}
    arms = [_arm(field, results, name, grid) for name, grid in grids.items()]
    by_bytes = config.data.tokenizer == "byte" and config.training.progressive.training_objective == "clm"
    document: Document = {
        "name": comparison.name,
        "artifacts": field.artifacts.uri,
        "objective": config.training.progressive.training_objective,
        "unit": "nats per byte" if by_bytes else "nats per token",
        "seq_len": config.data.seq_len,
        "train_sequences": field.n_rows,
        "judged_on": field.judged_on,
        "budget_tflop": field.unit / 1e12,
        "budgets": list(comparison.budgets),
        "rates": list(comparison.rates),
        "seeds": list(comparison.seeds),
        "arms": arms,
    }
    _add_differences(document)
    if by_bytes:
        for row in rows_of(document):
            row["bits_per_byte"] = row["loss"] and row["loss"]["mean"] / math.log(2)
    document["total_tflop"] = _total(field, results)
    document["notes"] = [*_missing(field, results), *_lost(document), *_edges(document), *_machines(results)]
    document["failures"] = _failures(field, results)
    document["verdict"], document["loses"] = verdict(document), loses(document)
    return document


def failures_of(document: Document) -> list[str]:
    """Return a line for each run that has no loss."""
    return [f"{each['run']}: {each['state']}: {each['message']}" for each in document["failures"]]


def rows_of(document: Document) -> list[Document]:
    """Return what every arm gave at every budget."""
    return [row for arm in document["arms"] for row in arm["budgets"]]


def _arm(field: Field, results: Results, name: str, grid: Grid) -> Document:
    comparison = field.comparison
    pilots = {run.factor: run for run in field.pilots(name, grid.factors)}
    best = grid.best
    if best is None:  # so far
        best = min(pilots, key=lambda factor: results[pilots[factor]].loss if pilots[factor] in results else math.inf)
    tried = [run for factor, run in pilots.items() if factor != best and run in results]
    rate = field.config_of(pilots[best]).training.learning_rate if pilots[best] in results else None
    return {
        "arm": name,
        "grows": len(field.plan_of(pilots[grid.factors[0]]).stages) > 1,
        "rate": rate,
        "edge": grid.edge and ("highest" if any(run.factor < best for run in tried) else "lowest"),
        "tried": [_tried(field, run, results.get(run)) for run in pilots.values()],
        "tuning_tflop": math.fsum(_spent(field, run)["tflop"] for run in tried),
        "budgets": [
            _row(field, results, [Chosen(name, budget, best, seed) for seed in comparison.seeds])
            for budget in comparison.budgets_of(name)
        ],
    }


def _tried(field: Field, run: Chosen, result: Result | None) -> Document:
    rate = field.config_of(run).training.learning_rate
    return {"factor": run.factor, "rate": rate, "loss": _known(result), "state": result.state if result else "to run"}


def _known(result: Result | None) -> float | None:
    return result.loss if result and result.state == "done" else None


def _spent(field: Field, run: Chosen) -> dict[str, float]:
    """Return what a run costs by its plan."""
    config, plan = field.config_of(run), field.plan_of(run)
    charges = charge(config, plan, field.n_rows)
    steps = sum(stage.spec.optim.steps * stage.spec.optim.batch_size for stage in plan.stages)
    return {
        "tflop": math.fsum(each.total for each in charges) / 1e12,
        "tflop_recomputed": math.fsum(each.trained + each.recomputed for each in charges) / 1e12,
        "tokens": steps * config.data.seq_len,
    }


def _row(field: Field, results: Results, runs: list[Chosen]) -> Document:
    """Return what the seeds of an arm gave at a budget."""
    config, plan = field.config_of(runs[0]), field.plan_of(runs[0])
    spent, (cuda, there) = _spent(field, runs[0]), device_memory(config.hardware)
    known = {run: results[run] for run in runs if run in results and results[run].state == "done"}
    return {
        "arm": runs[0].arm,
        "budget": runs[0].budget,
        "steps": [stage.spec.optim.steps for stage in plan.stages],
        "blocks": sum(stack.n_blocks for stack in plan.stages[-1].spec.stacks),
        **spent,
        "trained_parameters": max(trainable_parameters(stage.shape, stage.spec) for stage in plan.stages),
        "memory_bytes_forecast": max(memory(each).peak for each in settings_of(config, plan, cuda=cuda, there=there)),
        "seconds": statistics.mean(each.seconds for each in known.values()) if known else None,
        "loss": _dumped(interval([each.loss for each in known.values()])),
        "runs": [
            {
                "run": field.config_of(run).run.name,
                "seed": run.seed,
                "state": results[run].state if run in results else "to run",
                "loss": _known(results.get(run)),
                "seconds": results[run].seconds if run in known else None,
            }
            for run in runs
        ],
    }


def _dumped(found: Interval | None) -> Document | None:
    return found and found._asdict()


def _add_differences(document: Document) -> None:
    """Add to every row its differences to the end-to-end arm, seed by seed."""
    (reference,) = (arm for arm in document["arms"] if arm["arm"] == END_TO_END)
    for row in rows_of(document):
        same = next((other for other in reference["budgets"] if other["budget"] == row["budget"]), None)
        theirs = _losses(same) if same else {}
        gaps = [mine - theirs[seed] for seed, mine in _losses(row).items() if seed in theirs]
        row["above_end_to_end"] = None if row["arm"] == END_TO_END else _dumped(interval(gaps))
        row["against"] = {} if row["arm"] == END_TO_END else {axis: _against(reference, row, axis) for axis in AXES}


def _losses(row: Document) -> dict[int, float]:
    return {run["seed"]: run["loss"] for run in row["runs"] if run["loss"] is not None}


def _against(reference: Document, row: Document, axis: str) -> Document:
    """Return the share of what the end-to-end curve spends for the same loss, and the gap at the same spending."""
    shares, gaps = list[tuple[str, float] | None](), list[float]()
    for run in row["runs"]:
        if run["loss"] is None:
            continue
        spent, curve = _amount(row, run, axis), _curve(reference, run["seed"], axis)
        shares.append(share_of(curve, spent, run["loss"]))
        gaps += [] if (theirs := loss_at(curve, spent)) is None else [run["loss"] - theirs]
    within = [share[1] for share in shares if share and not share[0]]
    return {
        "share": _dumped(interval(within)) if len(within) == len(shares) else None,
        "bound": bound_of(shares),
        "gap": _dumped(interval(gaps)) if len(gaps) == len(shares) else None,
    }


def _amount(row: Document, run: Document, axis: str) -> float:
    return run["seconds"] if axis == "seconds" else row[axis]


def _curve(reference: Document, seed: int, axis: str) -> Curve:
    runs = [(row, run) for row in reference["budgets"] for run in row["runs"] if run["seed"] == seed]
    return sorted((_amount(row, run, axis), run["loss"]) for row, run in runs if run["loss"] is not None)


def _total(field: Field, results: Results) -> float:
    """Return the FLOPs of all runs; runs that are the same are counted once, stages that runs share are not."""
    different = {tuple(field.plan_of(run).recipes): run for run in results}
    return math.fsum(_spent(field, run)["tflop"] for run in different.values())


def _failures(field: Field, results: Results) -> list[Document]:
    return [
        {"run": field.config_of(run).run.name, "arm": run.arm, "state": each.state, "message": each.message}
        for run, each in results.items()
        if each.state != "done"
    ]


def _missing(field: Field, results: Results) -> list[str]:
    """Return a line if there are runs without a result: then rates may change, too."""
    left = [run for run in field.planned(results) if run["state"] == "to run"]
    return [f"So far: {len(left)} runs of {len(left) + len(results)} are still to come."] if left else []


def _lost(document: Document) -> list[str]:
    """Return a line if there are means over some seeds only."""
    rows = [row for row in rows_of(document) if row["loss"]]
    lost = dict.fromkeys(row["arm"] for row in rows for run in row["runs"] if run["state"] in ("diverged", "failed"))
    return [f"Means are without the seeds that diverged or failed, which flatters {', '.join(lost)}."] if lost else []


def _edges(document: Document) -> list[str]:
    at_edge = [arm["arm"] for arm in document["arms"] if arm["edge"]]
    if not at_edge:
        return []
    if len(document["rates"]) == 1:
        return ["No rate was tuned: --rates has one factor."]
    which = "all arms" if len(at_edge) == len(document["arms"]) else ", ".join(at_edge)
    return [f"The best rate is at the edge of the grid, so a better one may lie beyond: {which}. --extend tries more."]


def _machines(results: Results) -> list[str]:
    """Return a line if the runs were made by different code or machines, since their seconds say little then."""
    made = [result.made_by for result in results.values() if result.state == "done"]
    differing = [key for key in (made[0] if made else {}) if len({str(each.get(key)) for each in made}) > 1]
    if not differing:
        return []
    return [f"Not all runs are of one {' and '.join(differing)}: compare their seconds with care."]


# ---------------------------------------------------------------- sentences


def verdict(document: Document) -> str:
    """Return in a sentence how the best way to grow compares with training end to end."""
    rows = _at_largest(document)
    grown = [rows[arm["arm"]] for arm in document["arms"] if arm["grows"] and arm["arm"] in rows]
    if END_TO_END not in rows or not grown:
        return "No verdict yet: end-to-end training and a way to grow need a loss each."
    best, flat = min(grown, key=lambda row: row["loss"]["mean"]), rows[END_TO_END]
    gap = best["above_end_to_end"]
    if gap is None:
        return "No verdict yet: no seed has both losses." + _said_of_smaller(document)
    sign, against = _sign(gap), best["against"]["tflop"]
    of_theirs = percent(against["share"]["mean"]) if against["share"] else against["bound"]
    cost = f"it reaches the same loss with {of_theirs} of the FLOPs" if of_theirs and sign else ""
    relative = percent(gap["mean"] / flat["loss"]["mean"], "+.1f")
    how = {-1: "beats", 1: "loses to", 0: "cannot be told apart from"}[sign]
    numbers = f"{loss(best['loss']['mean'])} against {loss(flat['loss']['mean'])} {document['unit']}, {relative}"
    n = gap["n"]
    seeds = "one seed, so chance is not ruled out" if n == 1 else f"{n} seeds"
    arm = "the configuration as it is" if best["arm"] == CONFIGURED else best["arm"]
    said = f"At equal FLOPs {arm} {how} end-to-end training: {'; '.join(filter(None, (numbers, cost, seeds)))}."
    return said + _said_of_smaller(document)


def _at_largest(document: Document) -> dict[str, Document]:
    """Return what the arms gave at the largest budget, those that have a loss."""
    budget = max(document["budgets"])
    return {row["arm"]: row for row in rows_of(document) if row["budget"] == budget and row["loss"]}


def _smaller(document: Document) -> Document | None:
    """Return the best smaller model that was trained from scratch, if the whole one is not better."""
    rows = _at_largest(document)
    controls = [rows[name] for name in CONTROLS if name in rows and name != CONFIGURED]
    best = min(controls, key=lambda row: row["loss"]["mean"], default=None)
    judged = END_TO_END in rows and any(arm["grows"] and arm["arm"] in rows for arm in document["arms"])
    return best if judged and best and best["arm"] != END_TO_END else None


def _said_of_smaller(document: Document) -> str:
    """Return a sentence on that model: that it ends below every way to grow, where it does, or else its loss."""
    if (best := _smaller(document)) is None:
        return ""
    plain = f"A smaller model from scratch, {best['arm']}, has {loss(best['loss']['mean'])}."
    return f" {_beaten(document).get(best['arm'], plain)}"


def _sign(gap: Document) -> int:
    """Return -1 or 1 if a difference is below or above 0 for sure, or was seen for one seed, else 0."""
    low = gap["mean"] if gap["low"] is None else gap["low"]
    high = gap["mean"] if gap["high"] is None else gap["high"]
    return -1 if high < 0 else 1 if low > 0 else 0


def loses(document: Document) -> str:
    """Return in a sentence where growing is worse than what it is compared with."""
    grows = {arm["arm"] for arm in document["arms"] if arm["grows"]}
    grown = [row for row in rows_of(document) if row["arm"] in grows and row["loss"]]
    many = len(document["budgets"]) > 1
    lost = [
        _losing(grown, "FLOPs", many, lambda row: row["above_end_to_end"]),
        *(
            _losing(grown, AXES[axis], many, lambda row, axis=axis: row["against"][axis]["gap"])
            for axis in ("tflop_recomputed", "tokens", "seconds")
        ),
    ]
    said = [f"Growing loses to end-to-end training {'; '.join(filter(None, lost))}."] if any(lost) else []
    beaten, named = _beaten(document), _smaller(document)  # which the verdict names
    said += [sentence for arm, sentence in beaten.items() if named is None or arm != named["arm"]]
    if not grown:
        return ""
    return " ".join(said) or ("" if beaten else "Growing lost nowhere in what was tried here.")


def _losing(
    rows: Sequence[Document], axis: str, many: bool, gap_of: Callable[[Document], Mapping[str, Any] | None]
) -> str:
    """Return which rows are above end-to-end training for as much of something, those that may be chance left out."""
    named = [
        f"{row['arm']}{_at(row, many=many)} ({signed(gap['mean'])})"
        for row in rows
        if (gap := gap_of(row)) and _sign(dict(gap)) > 0
    ]
    return f"at equal {axis}: {', '.join(named)}" if named else ""


def _beaten(document: Document) -> dict[str, str]:
    """Return by its arm a sentence for each smaller flat model that ends below every way to grow at some budget."""
    many, sentences = len(document["budgets"]) > 1, dict[str, str]()
    grown = [row for arm in document["arms"] if arm["grows"] for row in arm["budgets"] if row["loss"]]
    for arm in document["arms"]:
        if arm["grows"] or arm["arm"] not in CONTROLS or arm["arm"] in (END_TO_END, CONFIGURED):
            continue
        found = list[str]()
        for row in arm["budgets"]:
            rivals = [each["loss"]["mean"] for each in grown if each["budget"] == row["budget"]]
            if row["loss"] and rivals and row["loss"]["mean"] < min(rivals):
                found.append(f"{loss(row['loss']['mean'])}{_at(row, many=many)}")
        if found:
            what = f"A smaller model from scratch, {arm['arm']}, has a lower mean loss than every arm that grows"
            sentences[arm["arm"]] = f"{what}: {', '.join(found)}."
    return sentences


def _at(row: Document, *, many: bool) -> str:
    return f" at a budget of {row['budget']:g}" if many else ""
