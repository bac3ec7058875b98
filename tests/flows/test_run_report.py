"""The report of a run: its plot is read back from the image, its table from the markdown."""

from __future__ import annotations

import base64
import re
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from flows.pages.report import loss_plot, report
from flows.run.summary import StageSummary

SVG = "{http://www.w3.org/2000/svg}"


def stage(number: int, loss: float | None, by_ratio: dict[str, float] | None = None) -> StageSummary:
    return StageSummary(
        stage=number,
        name="append, frozen, full",
        states={
            "stack": "sealed",
            "activations": "sealed" if number == 0 else "none",
            "validation": "absent" if loss is None else "sealed",
        },
        artifacts={"stack": f"stack-{number}-abc"},
        steps=12,
        stacks=number + 1,
        blocks=1,
        rack_parameters=1270 * (number + 1),
        train_loss=3.25,
        validation_loss=loss,
        mask_ratio=0.15 if by_ratio else None,
        by_mask_ratio=by_ratio or {},
        seconds=61.0,
        cache_bytes=2048 if number == 0 else None,
        cache_note="last stage",
    )


def drawn(markdown: str) -> ElementTree.Element:
    """Return the image of a plot as a tree."""
    found = re.fullmatch(r"!\[Validation loss by stage\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", markdown)
    assert found
    return ElementTree.fromstring(base64.b64decode(found[1]))


def lines(plot: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Return the lines of a plot as [stage, loss], by what the ticks beside the axes say."""
    ticks = [(mark.text or "", float(mark.get("x", 0)), float(mark.get("y", 0))) for mark in plot.iter(f"{SVG}text")]
    below = [(float(text), x) for text, x, y in ticks if y == 270 - 44 + 18]
    beside = [(float(text), y - 4) for text, x, y in ticks if x == 58 - 8]
    (x0, left), (x1, right) = below[0], below[-1]
    (y0, low), (y1, high) = beside[0], beside[-1]
    found = []
    for line in plot.iter(f"{SVG}polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
        found.append(
            [
                (x0 + (x - left) * (x1 - x0) / (right - left), y0 + (y - low) * (y1 - y0) / (high - low))
                for x, y in points
            ]
        )
    return found


def test_the_plot_shows_the_loss_of_every_stage() -> None:
    plot = drawn(loss_plot([stage(0, 2.9), stage(1, 2.5), stage(2, 2.2)]))
    assert lines(plot) == [[pytest.approx(point, abs=0.01) for point in ((0, 2.9), (1, 2.5), (2, 2.2))]]
    assert [line.get("class") for line in plot.iter(f"{SVG}polyline")] == ["line"]  # one has no ramp of colours
    tips = [title.text for title in plot.iter(f"{SVG}title")]
    assert tips == ["stage 0: 2.9000", "stage 1: 2.5000", "stage 2: 2.2000"]


def test_losses_at_other_ratios_are_not_joined() -> None:
    stages = [stage(0, 2.9, {"0.15": 3.0, "0.5": 4.0}), stage(1, 1.0, {"0.15": 2.5, "0.5": 3.75})]
    plot = drawn(loss_plot(stages))
    first, second = [[(0, 3.0), (1, 2.5)], [(0, 4.0), (1, 3.75)]]
    assert lines(plot) == [[pytest.approx(point, abs=0.01) for point in line] for line in (first, second)]
    assert {"15\u00a0% masked", "50\u00a0% masked"} <= {mark.text for mark in plot.iter(f"{SVG}text")}
    colours = [line.get("style") for line in plot.iter(f"{SVG}polyline")]
    assert len(set(colours)) == 2
    assert [(dot.get("style"), dot[0].text) for dot in plot.iter(f"{SVG}circle")] == [
        (colours[0], "15\u00a0% masked, stage 0: 3.0000"),
        (colours[0], "15\u00a0% masked, stage 1: 2.5000"),
        (colours[1], "50\u00a0% masked, stage 0: 4.0000"),
        (colours[1], "50\u00a0% masked, stage 1: 3.7500"),
    ]


def test_stages_are_counted_in_whole_numbers() -> None:
    for count in (1, 2, 3, 9, 40):
        plot = drawn(loss_plot([stage(number, 3.0 - number / 100) for number in range(count)]))
        ticks = [mark.text or "" for mark in plot.iter(f"{SVG}text") if mark.get("y") == str(270 - 44 + 18)]
        assert len(ticks) >= 2
        assert all(tick.isdigit() for tick in ticks)


def test_a_stage_links_to_its_flow_run() -> None:
    note = "not used: qlora_rank (qlora_enabled: false)"
    text = report("r", "/a", [stage(0, 2.9), stage(1, None)], {0: "ab-1"}, [note], 2)
    assert f"`/a`.\n\nN{note[1:]}.\n\n![" in text
    assert (
        "| [0](../../runs/flow-run/ab-1) | append, frozen, full | 1.27 k | 3.2500 | 2.9000 | 1:01 | 2.0 KiB |" in text
    )
    assert "| 1 | append, frozen, full | 2.54 k | 3.2500 | - | 1:01 | none |" in text
    assert "- stack: `stack-1-abc` (sealed)\n- activations: none, last stage" in text
    assert report("r", "/a", [stage(0, 2.9)], {}, [], 3).startswith(
        "# r\n\n1 of 3 stages so far. Artifacts are in `/a`."
    )


def test_what_others_wrote_is_no_markdown() -> None:
    hostile = "a\x1b[31m\r\n# b [c](http://d) ![e](f) | <script>g</script> `h` *i* &lt; \\`"
    stages = [stage(0, 2.9), stage(1, 2.5).model_copy(update={"name": hostile, "cache_note": hostile})]
    tokens = MarkdownIt("commonmark").enable("table").parse(report(hostile, hostile, stages, {}, [hostile], 9))
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} == {"text", "code_inline"}  # an image of ours is no link to this parser
    assert not [token for token in tokens if token.type.startswith("html")]
    assert len([token for token in tokens if token.type == "td_open"]) == 2 * 7
    read = "".join(child.content for child in inline)
    assert read.count(r"a\x1b[31m\r\n# b [c](http://d) ![e](f) | <script>g</script>") == 5
    assert "\x1b" not in read
