"""What racks, plans, results and stores show of themselves in a notebook."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer, StackWiseConfig
from stackwise_core.errors import StackWiseError
from stackwise_core.notebook import table
from stackwise_core.stages.plan import plan_run
from stackwise_core.training.results import Results
from support.house import ROOT

TOKENS = torch.arange(8 * 8).reshape(8, 8)


class Cells(HTMLParser):
    """The texts of the cells of a table, row by row, and the tags that are open at its end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def cells(shown: Any) -> list[list[str]]:
    found = Cells(shown if isinstance(shown, str) else shown._repr_html_())
    assert found.open == []
    return found.rows


def config() -> StackWiseConfig:
    config = StackWiseConfig()
    config.model.d_model, config.model.n_heads, config.hardware.threads = 16, 2, 1
    config.training.steps_per_stack, config.training.batch_size = 2, 4
    config.training.progressive.training_objective = "clm"
    return config


@pytest.fixture(scope="module")
def grown() -> tuple[ProgressiveRackBuilder, Results]:
    builder = ProgressiveRackBuilder(config())
    batches = [TOKENS[:4], TOKENS[4:]]
    return builder, ProgressiveTrainer(config()).train_progressively(builder, batches, 2, validation=batches)


def test_a_table_escapes_what_it_shows() -> None:
    html = table("<i>", ("a&b",), [("<script>alert(1)</script>",), ("\x1b[31m",), (None,), (1234,), (0.5,)])
    assert "<script>" not in html
    assert "<i>" not in html
    assert cells(html) == [["a&b"], ["<script>alert(1)</script>"], ["\\x1b[31m"], ["-"], ["1,234"], ["0.5000"]]


def test_a_table_that_is_wider_than_its_page_scrolls_and_fades_at_the_edge() -> None:
    assert re.match(r'<div style="[^"]*overflow-x: auto[^"]*mask-image', table("t", ("a",), [(1,)]))


def test_the_stored_outputs_of_the_notebook_are_drawn_as_tables_are_now() -> None:
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    shown = ["".join(each.get("data", {}).get("text/html", "")) for cell in cells for each in cell.get("outputs", [])]
    frame = table("t", ("a",), []).split("<caption")[0]
    assert sum(html.startswith(frame) for html in shown) == sum("<table" in html for html in shown) > 0


def test_a_header_stands_over_its_numbers() -> None:
    html = table("t", ("what", "size"), [("a", "3 KiB"), ("b", None)])
    assert re.findall(r"<t([hd])[^>]*text-align: (\w+)", html) == [
        ("h", "left"),
        ("h", "right"),
        *[("d", "left"), ("d", "right")] * 2,
    ]


def test_a_rack_shows_its_parts_in_the_order_of_the_data(grown: tuple[ProgressiveRackBuilder, Results]) -> None:
    builder, _ = grown
    head, *rows = cells(builder.build_rack())
    assert [row[0] for row in rows] == ["embedding", "stack 0", "stack 1", "head"]
    count = head.index("parameters")
    assert sum(int(row[count].replace(",", "")) for row in rows) == builder.get_rack_info()["parameters"]
    assert cells(builder.stacks[1])[1:] == [rows[2]]


def test_a_builder_also_shows_how_its_stacks_were_added() -> None:
    builder = ProgressiveRackBuilder(config())
    builder.append_stack()
    builder.prepend_stack(n_blocks=1, precision="bfloat16")
    rows = cells(builder)[1:-1]
    assert [row[:3] for row in rows[1:]] == [
        ["stack 1, prepend, not trained yet", "1", "bfloat16"],
        ["stack 0, append, not trained yet", "2", "full"],
    ]


def test_results_show_a_row_for_each_stage(grown: tuple[ProgressiveRackBuilder, Results]) -> None:
    _, results = grown
    head, *rows = cells(results)
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["loss"] for row in found] == [f"{result.loss:.4f}" for result in results]
    assert [row["val. loss"] for row in found] == [f"{result.validation_loss:.4f}" for result in results]
    assert cells(results[1]) == [head, rows[1]]


def test_a_plan_shows_what_its_stages_train(grown: tuple[ProgressiveRackBuilder, Results]) -> None:
    builder, results = grown
    planned = config()
    planned.training.progressive.target_stacks = 2
    head, *rows = cells(plan_run(planned, "0" * 64))
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["trained"] for row in found] == [f"{result.parameters['trained']:,}" for result in results]
    assert found[-1]["params"] == f"{builder.get_rack_info()['parameters']:,}"
    assert [row["reads the cache of"] for row in found] == ["-", "boundary 1"]


def test_results_plot_losses_over_all_stages(grown: tuple[ProgressiveRackBuilder, Results]) -> None:
    from matplotlib.figure import Figure

    _, results = grown
    axes = Figure().subplots()
    assert results.plot(axes) is axes
    *stages, validation = axes.get_lines()
    assert [np.asarray(line.get_xdata()).tolist() for line in stages] == [[1, 2], [3, 4]]
    assert [np.asarray(line.get_ydata()).tolist() for line in stages] == [result.losses for result in results]
    assert np.asarray(validation.get_xdata()).tolist() == [2, 4]
    assert np.asarray(validation.get_ydata()).tolist() == [result.validation_loss for result in results]


def test_without_matplotlib_plot_says_what_to_install(
    grown: tuple[ProgressiveRackBuilder, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(StackWiseError, match=r"pip install matplotlib$"):
        grown[1].plot()


@pytest.mark.parametrize("is_notebook", [True, False])
def test_training_shows_a_bar_in_a_notebook_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, is_notebook: bool
) -> None:
    written: list[str] = []

    def display(html: str, *, display_id: bool) -> SimpleNamespace:
        written.append(html)
        return SimpleNamespace(update=written.append)

    shell = SimpleNamespace(kernel=object() if is_notebook else None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    results = ProgressiveTrainer(config()).train_progressively(ProgressiveRackBuilder(config()), [TOKENS], 1)
    assert capsys.readouterr() == ("", "")
    if not is_notebook:
        assert written == []
        return
    assert 'value="0" max="2"' in written[0]
    assert 'value="2" max="2"' in written[-1]
    assert f"step 2 of 2, loss {results[0].loss:.4f}<" in written[-1].replace("</div>", "<")
