"""Make the runs of setting_s.csv again: `python -m benchmarks.growing --artifacts FOLDER [--source SHAKESPEARE]`.

docs/results.md is made of these losses. A run takes 5 minutes of a core per 16 TFLOP; all of them, one after another,
take 15 hours. What the folder of artifacts holds is not made again. Each line is a run, its loss in the file and the
loss that was found. Without --artifacts: the means of the arms as they are in the file, with what they differ from
end-to-end training.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from flows.cli.compare import arms_of
from flows.run.comparing import open_field
from flows.run.comparison import Chosen, Result, comparison_of
from flows.run.numbers import signed
from flows.run.run import grow
from flows.run.say import say
from flows.run.verdict import interval
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import load_yaml
from stackwise_core.stages.arms import CONTROLS, END_TO_END, changed

HERE = Path(__file__).parent
UNIT = 62.96
"""Budget of 20 tokens a parameter, end to end [TFLOP]."""


class Row(NamedTuple):
    """A run that was made."""

    corpus: str
    arm: str
    """One of `stackwise compare`, or the name of a YAML file here."""
    changes: str
    """KEY=VALUE, by colons; empty where the arm is as it is."""
    tflop: str
    learning_rate: str
    seed: str
    loss: str
    """[nats per byte]"""


def main() -> None:
    """Make what is not there of the chosen runs, and print how far each is from what is written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growing", description=__doc__)
    parser.add_argument("--artifacts", default="", metavar="FOLDER", help="kept, and resumed from")
    parser.add_argument("--source", default="", metavar="FILE", help="the text of tiny Shakespeare; without it, stdlib")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows that begin so, such as stdlib,full")
    options = parser.parse_args()
    if not options.artifacts:
        say(*table(rows()))
        return
    for row in list(rows()):
        if ",".join(row).startswith(options.only) and (row.corpus == "stdlib" or options.source):
            result = made(row, options.artifacts, options.source)
            difference = result.loss - float(row.loss)
            say(f"{', '.join(filter(None, row[:-1]))}: written {row.loss}, found {result.loss:.4f} ({difference:+.4f})")


def rows() -> Iterable[Row]:
    """Return the rows of setting_s.csv."""
    with (HERE / "setting_s.csv").open(newline="") as file:
        yield from (Row(**row) for row in csv.DictReader(file))


def made(row: Row, artifacts: str, source: str) -> Result:
    """Return the result of a run, which is made unless it is there."""
    of_corpus = {} if row.corpus == "stdlib" else {"data.source": source, "run.name": "t"}
    config = changed(StackWiseConfig.model_validate(load_yaml(HERE / "setting_s.yaml")), of_corpus)
    file = HERE / f"{row.arm}.yaml"
    names, own = arms_of(":".join(filter(None, (str(file) if file.exists() else row.arm, row.changes))))
    (arm,) = own or names
    factor = float(row.learning_rate) / config.training.learning_rate
    chosen = Chosen(arm, float(row.tflop) / UNIT, factor, int(row.seed))
    comparison = comparison_of(
        config,
        [name for name in names if name not in CONTROLS],
        own,
        rates=(factor,),
        seeds=chosen.seed + 1,
        budgets=(chosen.budget,),
        tflop=UNIT,
    )
    field = open_field(comparison, artifacts)
    if (found := field.look(chosen)) is None:
        grow(field.config_of(chosen), artifacts)
        found = field.look(chosen)
    assert found is not None
    return found


def table(found: Iterable[Row]) -> list[str]:
    """Return every arm at the rate that most seeds were run at, the better one of two, as lines of Markdown.

    Differences from end-to-end training are taken seed by seed.
    """
    losses: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in found:
        by_rate = losses.setdefault((row.corpus, row.tflop, row.arm, row.changes), {})
        by_rate.setdefault(row.learning_rate, {})[row.seed] = float(row.loss)
    best = {of: max(by_rate.values(), key=lambda s: (len(s), -mean(s.values()))) for of, by_rate in losses.items()}
    lines = [
        "| corpus | TFLOP | arm | changes | loss | seeds | above end to end | by rate |",
        "|---|--:|---|---|--:|--:|--:|---|",
    ]
    for (corpus, tflop, *arm), by_rate in losses.items():
        of_arm, control = best[corpus, tflop, *arm], best.get((corpus, tflop, END_TO_END, ""), {})
        apart = [of_arm[seed] - control[seed] for seed in of_arm if seed in control and of_arm is not control]
        rates = "; ".join(f"{rate}: {', '.join(f'{loss:.4f}' for loss in s.values())}" for rate, s in by_rate.items())
        cells = [corpus, tflop, *arm, _shown([*of_arm.values()]), str(len(of_arm)), _shown(apart, "+.4f"), rates]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(values: Sequence[float], form: str = ".4f") -> str:
    """Return a mean and half of its 95 % t-interval."""
    if (found := interval(values)) is None:
        return ""
    half = f" ± {found.high - found.mean:.4f}" if found.high is not None else ""
    return signed(found.mean, form) + half


if __name__ == "__main__":
    main()
