"""`stackwise report`: what it says of a run is what the run's manifests, files and metrics say."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from markupsafe import escape
from torch.nn import functional

from flows.pages.page import artifact, breakable, in_column, moment
from flows.pages.plots import HEIGHT, WIDTH, Plot, places, scale_of
from flows.pages.run_page import loss_image, page_of
from flows.pages.run_tables import tables
from flows.run.samples import judge_depths
from flows.run.terminal import print_tables
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.model.blocks import Stack
from stackwise_core.stages.charges import cost
from storage.artifacts import Artifacts
from storage.checkpoints import load_stack
from storage.racks import load_rack, open_run, open_runs
from storage.records import sealed
from storage.runs import find_run
from support.commands import Run
from support.modes import G
from support.runs import folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]


@pytest.fixture
def told(reference: Reference, run: Run) -> Any:
    return run("report", "tiny", "--artifacts", reference(), "--json").document


def test_numbers_are_those_of_the_manifests(reference: Reference, told: Any) -> None:
    root = reference()
    facts = {(m["ref"]["kind"], m["ref"]["stage"]): m["facts"] for m in manifests(root).values()}
    losses = [facts["validation", n]["validation_loss"] for n in range(3)]
    assert [stage["validation_loss"] for stage in told["stages"]] == losses
    assert told["validation_loss"] == losses[-1]
    assert [stage["gain"] for stage in told["stages"]] == [None, losses[0] - losses[1], losses[1] - losses[2]]
    assert f"to {losses[2]:.4f} nats with 3 stacks" in told["verdict"]
    assert [stage["digest"] for stage in told["stages"]] == [
        json.loads((folder_of(root, "stack", n) / "manifest.json").read_text())["digest"] for n in range(3)
    ]
    assert told["tokens"] == 3 * 12 * 4 * 16
    assert told["parameters"] == sum(p.numel() for p in load_rack(root, "tiny").parameters())


def test_what_it_cost_is_what_a_comparison_charges(reference: Reference, told: Any) -> None:
    root = reference()
    (data,) = (m for m in manifests(root).values() if m["ref"]["kind"] == "data")
    config = find_run(Artifacts(root), "tiny").config
    assert told["tflop"] * 1e12 == pytest.approx(cost(config, data["facts"]["train_sequences"]), rel=1e-12)
    assert told["tflop"] < told["tflop_recomputed"]  # 3 epochs of a cached trunk


def test_a_curve_is_the_mean_of_spans_of_steps(reference: Reference, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.pages.run.POINTS", 4)
    root = reference()
    records = [json.loads(line) for line in (folder_of(root, "stack", 1) / "metrics.jsonl").read_text().splitlines()]
    curve = run("report", "tiny", "--artifacts", root, "--json").document["stages"][1]["curve"]
    assert curve["steps"] == [3, 6, 9, 12]
    for name in ("loss", "gradient_norm", "learning_rate"):
        means = [math.fsum(record[name] for record in records[at : at + 3]) / 3 for at in range(0, 12, 3)]
        assert curve[name] == pytest.approx(means)


def test_what_trained_is_what_a_stage_wrote(run: Run, tmp_path: Path) -> None:
    """In a growth stage the new stack's files lie at the top of its artifact, those of others in folders."""
    root = tmp_path / "a"
    grown(tiny(tmp_path, {f"{G}trunk_strategy": "qlora", f"{G}target_stacks": 2, "training.steps_per_stack": 2}), root)
    document = run("report", "tiny", "--artifacts", root, "--json").document
    trained = {row["part"]: row["trained"] for row in document["parts"]}
    assert list(trained) == ["embedding", "stack 0", "stack 1", "head"]
    for n in range(2):
        files = {p.relative_to(folder_of(root, "stack", n)).as_posix() for p in folder_of(root, "stack", n).rglob("*")}
        assert (trained["head"][n] == "everything") == ("head.safetensors" in files)
        assert (trained["embedding"][n] == "everything") == ("embedding.safetensors" in files)
    assert trained["stack 1"] == [None, "everything"]
    assert trained["stack 0"] == ["everything", "adapters"]
    (parts,) = (table for table in tables(document) if table.title.startswith("What trained"))
    assert [row[-1] for row in parts.rows] == ["", "full, LoRA of rank 8", "full", ""]
    assert parts.rows[1][:3] == ["stack 0", "0", "1"]
    document["stages"][-1]["adapters"]["1"] = {"stack": 16, "progressive": 4}
    (parts,) = (table for table in tables(document) if table.title.startswith("What trained"))
    assert parts.rows[2][-1] == "full, LoRA of rank 4 and 16"


def test_losses_by_position_are_those_of_the_rack(reference: Reference, run: Run, tmp_path: Path) -> None:
    root = reference()
    run("report", "tiny", "--artifacts", root, "--html", tmp_path / "page.html")
    depths = json.loads((tmp_path / "page.json").read_text())["depths"]
    assert [each["depth"] for each in depths] == [1, 2, 3]
    opened = open_run(root, "tiny")
    rows = torch.as_tensor(np.stack(list(opened.validation_rows()))).long()
    rack = opened.rack(dense=True)
    losses = functional.cross_entropy(rack(rows)[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    spans = {"1": slice(0, 1), "2": slice(1, 2), "4": slice(2, 4), "8": slice(4, 8), "16": slice(8, 15)}
    expected = {last: losses[:, span].mean().item() for last, span in spans.items()}
    assert depths[-1]["loss_by_position"] == pytest.approx(expected, rel=1e-4)
    norms = [rack.hidden(rows, n).norm(dim=-1).median().item() for n in range(4)]
    assert depths[-1]["stream_norms"] == pytest.approx(norms, rel=1e-4)
    text = (tmp_path / "page.html").read_text()
    assert "position in the sequence" in text
    assert "norm of the stream" in text


def test_losses_by_noise_are_those_of_the_validation(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "a"
    masked = {f"{G}training_objective": "mlm", "training.mask_ratio": 0.5, "validation.max_sequences": 16}
    grown(tiny(tmp_path, {**masked, f"{G}target_stacks": 1, "training.steps_per_stack": 2}), root)
    run("report", "tiny", "--artifacts", root, "--html", tmp_path / "page.html")
    (depth,) = json.loads((tmp_path / "page.json").read_text())["depths"]
    facts = json.loads((folder_of(root, "validation", 0) / "manifest.json").read_text())["facts"]
    assert depth["loss_by_position"] == {}
    assert list(depth["loss_by_ratio"]) == ["0.15", "0.5", "0.85"]
    assert depth["loss_by_ratio"]["0.5"] == pytest.approx(facts["validation_loss_exact"], rel=1e-5)


def test_a_page_needs_nothing_and_is_beside_its_data(reference: Reference, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    said = run("report", "tiny", "--artifacts", reference(), "--html", page, "--prompt", "<script>the of")
    text, document = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert not re.search(r"""(?:src|href)\s*=|https?://(?!www\.w3\.org)|@import|url\(""", text)
    assert "<script>the of" not in text
    assert "&lt;script&gt;the of" in text
    assert text.count("<svg") == 7
    assert document["verdict"] in text
    assert document["verdict"] in said.out
    assert [sample["depth"] for sample in document["samples"]] == [1, 2, 3]
    again = run("report", "tiny", "--artifacts", reference(), "--prompt", "<script>the of", "--json").document
    assert again["samples"] == document["samples"]


def test_what_hardly_stretches_the_axis_is_shown(told: Any) -> None:
    def page(first: float) -> str:
        stage = told["stages"][0]
        curve = {"steps": [*range(1, 101)], "of": 100, "loss": [first, *(6.0 - n / 100 for n in range(99))]}
        curve |= {name: [1.0] * 100 for name in ("gradient_norm", "learning_rate")}
        return page_of([told | {"stages": [stage | {"curve": curve}], "parts": [], "depths": []}])

    assert "are left out" in page(9.0)
    assert "are left out" not in page(6.45)  # more than one and a half times what nine tenths of the losses span


def test_a_spike_does_not_stretch_the_axis(told: Any) -> None:
    document = told | {"depths": []}
    assert "are left out" not in page_of([document])
    stage, *others = document["stages"]
    losses = [1000.0, *stage["curve"]["loss"][1:]]
    page = page_of([document | {"stages": [stage | {"curve": stage["curve"] | {"loss": losses}}, *others]}])
    (most,) = re.findall(r"Losses above ([0-9.]+), up to 1000.0000, are left out\.", page)
    assert max(losses[1:]) < float(most) < 2 * max(losses[1:])


def test_a_curve_of_many_stages_is_drawn_by_the_means_of_a_few_hundred_spans(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> list[list[tuple[float, float]]]:
        lines = re.findall(r'class="line thin" points="([^"]+)"', page_of([told]))
        return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.split())] for line in lines[:3]]

    before = drawn()
    assert [len(line) for line in before] == [12, 12, 12]
    assert ("Grey: training, each step." in page_of([told]), "a few steps" in page_of([told])) == (True, False)
    monkeypatch.setattr("flows.pages.run_page._POINTS", 9)
    after = drawn()
    assert [len(line) for line in after] == [3, 3, 3]
    assert page_of([told]).count("the mean of a few steps.") == 2  # of losses, and of norms
    assert [line[-1][0] for line in after] == [line[-1][0] for line in before]


def test_a_page_loads_a_frozen_stack_once_for_all_depths(
    reference: Reference, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []

    def load(artifacts: Artifacts, stages: Any, stack: int) -> torch.nn.Module:
        loaded.append(stack)
        return load_stack(artifacts, stages, stack)

    monkeypatch.setattr("storage.racks.load_stack", load)
    run("report", "tiny", "--artifacts", reference(), "--html", tmp_path / "page.html")
    assert loaded == [0, 1, 2] * 2  # to judge, and to write


def nowhere(*_: object) -> None:
    """Nothing is shared."""


@pytest.mark.parametrize(
    "changes",
    [
        {f"{G}building_mode": "insert", "training.joint_steps": 2},
        {f"{G}trunk_strategy": "full"},
        {f"{G}training_objective": "mlm", f"{G}time_interpretation": "input", f"{G}num_time_steps": 4},
    ],
)
def test_each_depth_is_judged_as_if_it_were_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever of its stream is taken over from the depth before."""
    quick = {"training.steps_per_stack": 2, "training.warmup_steps": 1, "validation.max_sequences": 4}
    grown(tiny(tmp_path, {**quick, **changes}), tmp_path / "a")
    racks = open_runs(tmp_path / "a", "tiny")
    together = judge_depths(tmp_path / "a", "tiny")
    assert len(together) == len(racks) >= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.run.samples._Passed.shared", nowhere)
        assert judge_depths(tmp_path / "a", "tiny") == together


def test_a_depth_passes_only_what_the_one_before_did_not(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    forward = Stack.forward

    def watched(stack: Stack, *arguments: Any, **named: Any) -> Any:
        passed.append(stack.creation_index)
        return forward(stack, *arguments, **named)

    monkeypatch.setattr(Stack, "forward", watched)
    judge_depths(reference(), "tiny")
    assert passed == [0, 1, 2]


def test_a_narrow_page_breaks_keys_between_words(told: Any) -> None:
    assert "training.<wbr>steps_<wbr>per_<wbr>stack</td>" in page_of([told])
    assert breakable("<a.b> 0.5 c/") == "&lt;a.<wbr>b&gt; 0.5 c/"
    assert '<span class="whole">stack-1-</span><wbr><span class="whole">&lt;ab</span>' in artifact("stack-1-<ab")
    assert moment("2026-11-30T09:32:10") == '<span class="whole">2026-11-30</span> 09:32'


def test_a_page_says_what_the_columns_of_its_tables_mean(told: Any) -> None:
    notes = [table.note for table in tables(told)]
    assert all(notes)
    assert all(str(escape(note)) in page_of([told]) for note in notes)


def test_a_note_explains_no_column_that_is_not_there(told: Any) -> None:
    stages = tables(told)[0]
    assert "Gain: " in stages.note
    assert "Masked: " not in stages.note
    masked = [stage | {"gain": None, "mask_ratio": 0.4} for stage in told["stages"]]
    stages = tables(told | {"stages": masked})[0]
    assert "Gain: " not in stages.note
    assert "Masked: " in stages.note
    assert [row[stages.columns.index("|masked")] for row in stages.rows] == ["40\u00a0%"] * 3
    page = page_of([told | {"stages": masked}])
    assert "validation loss [nats per loss position] at 40\u00a0% masked</span>" in page
    assert "masked</span>" not in page_of([told])


def test_losses_at_other_mask_ratios_are_dots_apart(told: Any) -> None:
    first, *others = told["stages"]
    joined = page_of([told])
    apart = page_of([told | {"stages": [first | {"mask_ratio": 0.15}, *others]}])
    dots = 'class="dot judged"'
    assert (joined.count(dots), "do not compare" in joined) == (apart.count(dots), False)
    assert "do not compare" in apart
    other = told | {"stages": [each | {"mask_ratio": 0.4} for each in told["stages"]]}
    assert ["do not compare" in page_of(pair) for pair in ([told, told], [other, other], [told, other])] == [
        False,
        False,
        True,
    ]
    alone = re.findall(r'class="line" points="[^ "]+"', apart)
    assert (len(re.findall(r'class="line" points="[^ "]+"', joined)), len(alone)) == (0, 2)  # by step and by FLOPs


def test_numbers_below_an_axis_stand_apart() -> None:
    for most in (0.0164, 0.0351, 123_456, 9, 8_900_000):
        plot = Plot(scale_of([0.0, most], zero=True), scale_of([1.0, 2.0]), "x", "y")
        below = [(float(str(m.attributes["x"])), m.text) for m in plot.marks if m.attributes.get("y") == 270 - 44 + 18]
        assert len(below) >= 3
        for (left, one), (right, other) in itertools.pairwise(below):
            assert right - left >= 8 + 8.5 * (len(one) + len(other)) / 2  # at the largest size


def test_names_of_lines_stand_beside_the_axes_and_apart() -> None:
    names = [f"stage {n}" for n in range(9)]
    plot = Plot(places(0, 10), scale_of([1.0, 2.0]), "x", "y", names)
    plot.lines([(name, [0, 10], [2.0, 1.0 + n / 1000]) for n, name in enumerate(names)])  # all end near the lower end
    heights = sorted(float(str(m.attributes["y"])) for m in plot.marks if m.text in names)
    assert len(heights) == 9
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 15
    assert heights[-1] <= plot.y(1.0) + 17
    (at,) = {float(str(m.attributes["x"])) for m in plot.marks if m.text in names}
    assert plot.x(10) < at <= WIDTH - 8 * 7.5
    drawn = [m.attributes for m in plot.marks if m.tag == "polyline"]
    leaders = {m.attributes["style"]: m.attributes for m in plot.marks if "leader" in str(m.attributes.get("class"))}
    assert len(leaders) == 9  # in the colour of its line, from where that ends to its name
    for n, line in enumerate(drawn):
        leader = leaders[line["style"]]
        assert str(line["points"]).endswith(f" {leader['x1']},{leader['y1']}")
        (written,) = [m.attributes["y"] for m in plot.marks if m.text == names[n]]
        assert float(str(leader["y2"])) + 4 == pytest.approx(float(str(written)))


def test_a_log_axis_is_called_so() -> None:
    plot = Plot(scale_of([1, 9], log=True), scale_of([1.0, 2.0]), "position", "loss")
    assert {"position, log scale", "loss"} <= {mark.text for mark in plot.marks}
    assert "loss, log scale" in {m.text for m in Plot(places(0, 9), scale_of([1, 9], log=True), "x", "loss").marks}


def test_some_of_many_depths_are_drawn_and_named(told: Any) -> None:
    depths = [
        {"stage": n, "depth": n + 1, "loss_by_position": {"1": 3.0 - n / 10, "2": 2.0}, "loss_by_ratio": {}}
        for n in range(12)
    ]
    page = page_of([told | {"depths": [each | {"stream_norms": [1.0, 2.0]} for each in depths]}])
    assert "Of 12 stages, 4 are shown: 0, 4, 7, 11." in page
    assert len(set(re.findall(r'<polyline class="ramp" style="([^"]+)"', page))) == 4
    assert "are shown" not in page_of([told | {"depths": [each | {"stream_norms": []} for each in depths[:3]]}])


def test_a_picture_has_the_losses_of_every_stage(reference: Reference, run: Run, tmp_path: Path) -> None:
    run("report", "tiny", "--artifacts", reference(), "--svg", tmp_path / "curves.svg")
    image = ElementTree.fromstring((tmp_path / "curves.svg").read_text())
    assert len([each for each in image.iter() if each.tag.endswith("circle")]) == 3
    assert len([each for each in image.iter() if each.tag.endswith("polyline")]) == 3 + 1
    assert {"training", "validation"} <= {each.text for each in image.iter() if each.tag.endswith("text")}
    assert "prefers-color-scheme: dark" in next(each.text or "" for each in image.iter() if each.tag.endswith("style"))
    said = run("report", "tiny", "--artifacts", reference(), "--svg", tmp_path / "missing" / "curves.svg")
    assert (said.code, "cannot be written" in said.err) == (2, True)


def test_a_picture_says_below_its_axis_what_a_page_says_in_its_caption(told: Any) -> None:
    def written(*documents: Any) -> list[str]:
        image = ElementTree.fromstring(loss_image(documents) or "")
        height = float(image.get("height", "")) + float(image.get("viewBox", "").split()[1])
        below = [each for each in image.iter() if each.tag.endswith("text") and float(each.get("y", "")) > HEIGHT]
        assert all(float(each.get("y", "")) < height for each in below)
        return [each.text or "" for each in below]

    spiked = json.loads(json.dumps(told))
    spiked["stages"][1]["curve"]["loss"][0] = 1000.0
    assert written(told) == []
    assert written(told, told) == ["Thin: training, the mean of some steps. Thick, with markers: validation."]
    (left_out,) = written(spiked)
    assert left_out.endswith(", up to 1000.0000, are left out.")
    assert left_out in page_of([spiked])


def test_a_terminal_says_what_no_reader_can_guess(told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(tables(told))
    said = capsys.readouterr().out
    assert "Cache error: the validation loss on cached activations less that on exact ones." in said
    first, second, third = (stage["rack_parameters"] for stage in told["stages"])
    rows, rest = divmod((second - first) - (third - second), told["config"]["model.d_model"])
    assert (rows >= ByteTokenizer.vocab_size, rest) == (True, 0)  # a matrix, its rows rounded up
    sentence = "In stage 0 embedding and head are one matrix; from stage 1 on the head has its own."
    assert sentence in said
    assert sentence in page_of([told])
    untied = told | {"config": told["config"] | {"model.tie_embeddings": False}}
    assert sentence not in page_of([untied])


def test_numbers_of_a_column_have_equal_decimals() -> None:
    assert in_column([0.0072, 0.01097, None, 0.0]) == ["0.00720", "0.01097", "-", "0.00000"]
    assert in_column([1.2, 1.2345]) == ["1.200", "1.234"]
    assert in_column([1234.0, 0.52]) == ["1,234.00", "0.52"]
    assert in_column([-2.0, 1e-9]) == ["\u22122.00000", "0.00000"]
    assert in_column([1e-9, 2.5e-9]) == ["1.000e\u221209", "2.500e\u221209"]
    assert in_column([None]) == ["-"]


def test_samples_of_a_masked_run_go_on_from_a_withheld_row(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "a"
    by_depth = {f"{G}training_objective": "mlm", f"{G}time_interpretation": "depth", f"{G}max_stacks": 2}
    grown(tiny(tmp_path, {**by_depth, f"{G}target_stacks": 2, "training.steps_per_stack": 2}), root)
    document = run("report", "tiny", "--artifacts", root, "--samples", 5, "--json").document
    assert [len(sample["prompt"]) for sample in document["samples"]] == [8, 8]
    assert document["samples"][0]["prompt"] in (tmp_path / "corpus.txt").read_text()
    assert all(sample["text"] for sample in document["samples"])
    ratios = [list(stage["by_mask_ratio"]) for stage in document["stages"]]
    assert ratios[0] == ratios[1] != []
    assert document["stages"][1]["gain"] is None  # another ratio
    (by_ratio,) = (table for table in tables(document) if "share of masked" in table.title)
    assert len(by_ratio.rows) == 2


def test_a_run_that_is_not_over(reference: Reference, run: Run, tmp_path: Path) -> None:
    root = Path(shutil.copytree(reference(), tmp_path / "artifacts"))
    shutil.rmtree(folder_of(root, "stack", 2))  # its validation stays
    said = run("report", "tiny", "--artifacts", root, "--html", tmp_path / "page.html")
    assert said.code == 0
    assert "2 of 3 stages are done." in said.out
    outcome = next(root.glob("runs/tiny/attempts/*/outcome.json"))
    stopped = json.loads(outcome.read_text())
    outcome.write_text(sealed({**stopped, "state": "failed", "message": "loss is NaN"}))
    goes_on = "It failed: loss is NaN. The same command resumes it."
    assert goes_on in run("report", "tiny", "--artifacts", root).out
    outcome.write_text(sealed({**stopped, "state": "stopped", "message": "stopped on request before stage 2"}))
    assert "It was stopped on request before stage 2." in run("report", "tiny", "--artifacts", root).out
    outcome.unlink()
    assert "Its process ended without a word" in run("report", "tiny", "--artifacts", root).out
    document = json.loads((tmp_path / "page.json").read_text())
    assert [stage["state"] for stage in document["stages"]] == ["done", "done", "unfinished"]
    assert document["stages"][2]["digest"] is None
    assert document["stages"][2]["cache_error"] is None
    assert document["stages"][2]["tflop"] is None  # nothing of it is known to have been computed
    assert document["tflop"] == document["stages"][0]["tflop"] + document["stages"][1]["tflop"]
    (costs,) = (table for table in tables(document) if table.title == "What it cost")
    assert [row[0] for row in costs.rows] == ["0", "1"]
    assert document["validation_loss"] == document["stages"][1]["validation_loss"]


def test_runs_side_by_side(run: Run, tmp_path: Path) -> None:
    root, quick = tmp_path / "a", {"training.steps_per_stack": 2, f"{G}target_stacks": 1}
    grown(tiny(tmp_path, quick), root)
    grown(tiny(tmp_path, {**quick, "run.name": "other", "training.learning_rate": 1e-3, "run.seed": 7}), root)
    page = tmp_path / "both.html"
    said = run("report", "tiny", "other", "--artifacts", root, "--html", page)
    assert [word in said.out for word in ("training.learning_rate", "run.seed", "run.name")] == [True, True, False]
    assert len(json.loads(page.with_suffix(".json").read_text())["runs"]) == 2
    assert len(re.findall(r'class="marker run-1"[^>]*><title>', page.read_text())) == 2
    shapes = set[str]()
    for name, run_ in (("tiny", "run-0"), ("other", "run-1")):  # a key in both plots
        line, marker = rf'<line class="line {run_}".*', rf'<path class="marker {run_}" d="M[^ma]+([^"]+)".*'
        found = re.findall(rf"{line}\s*{marker}\s*<text [^>]*>{name}</text>", page.read_text())
        assert len(found) == 2
        shapes |= set(found)
    assert len(shapes) == 2
    assert "Thick, with markers: validation." in page.read_text()
    assert '<td class="text-cell key">run.<wbr>seed</td>' in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nobody",), "no such run"),
        (("tiny", "tiny"), "once"),
        (("a", "b", "c", "d", "e"), "at most 4"),
        (("tiny", "--html", "missing/page.html"), "its folder does not exist"),
        (("tiny", "--html", "page.json"), "end in .html"),
        (("tiny", "--samples", "-1"), "0 or more"),
        (("tiny", "other", "--samples", "3"), "one run only"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(
    reference: Reference, run: Run, arguments: tuple[str, ...], word: str
) -> None:
    said = run("report", *arguments, "--artifacts", reference())
    assert said.code == 2
    assert word in said.err


def test_a_stack_that_is_gone_has_no_loss_though_its_validation_is_kept(
    reference: Reference, run: Run, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(reference(), tmp_path / "artifacts"))
    shutil.rmtree(folder_of(root, "stack", 2))
    found = run("report", "tiny", "--artifacts", root, "--json").document
    _, second, third = found["stages"]
    assert (third["validation_loss"], third["gain"]) == (None, None)
    assert found["validation_loss"] == second["validation_loss"]
    assert found["verdict"].startswith("2 of 3 stages are done.")
    assert f"to {second['validation_loss']:.4f} nats with 2 stacks" in found["verdict"]
    status = run("status", "tiny", "--artifacts", root, "--json").document
    assert [stage["validation_loss"] for stage in status["stage_list"]] == [
        stage["validation_loss"] for stage in found["stages"]
    ]


def test_a_plan_costs_what_the_report_says_that_it_did(reference: Reference, run: Run) -> None:
    root = reference()
    report = run("report", "tiny", "--artifacts", root, "--json").document
    (config,) = root.glob("runs/tiny/attempts/*/config.yaml")
    planned = run("plan", config, "--artifacts", root, "--json").document["stages"]
    assert [row["flops"] / 1e12 for row in planned] == [stage["tflop"] for stage in report["stages"]]
    recomputed = [(row["flops"] + row["flops_saved_by_cache"]) / 1e12 for row in planned]
    assert recomputed == pytest.approx([stage["tflop_recomputed"] for stage in report["stages"]])
    assert recomputed[-1] > planned[-1]["flops"] / 1e12  # three epochs, filled once


def test_damaged_metrics_are_said(reference: Reference, run: Run, tmp_path: Path) -> None:
    root = Path(shutil.copytree(reference(), tmp_path / "artifacts"))
    path = folder_of(root, "stack", 0) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-2] + b"x\n")
    said = run("report", "tiny", "--artifacts", root)
    assert said.code == 3
    assert str(path) in said.err
