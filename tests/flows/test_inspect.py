"""`stackwise inspect`: what it says of a store is what the store's bytes, tokens and manifests say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError

from flows.cli.main import main
from flows.pages.page import command, in_column, printable, render, result, visible
from flows.pages.plots import Mark, Scale, scale_of, tick_text
from flows.pages.provenance import phrase
from flows.pages.stack import stack_page
from flows.pages.tables import OF_CHANNELS, channel_cells, strip
from stackwise_core.data.masks import VALIDATION_VIEW
from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.stages.identity import BuildRecipe, DataRecipe
from storage.activations.format import shard_path
from storage.activations.metadata import read_metadata
from storage.activations.reader import StoreReader
from storage.artifacts import Artifacts
from storage.files import checksum_file
from storage.manifest import FileEntry, make_manifest, read_manifest
from storage.runs import find_run
from storage.sequences import load_sequences
from support.runs import folder_of, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]
GROWTH = "training.progressive"
KEPT = {"cache.keep": "all"}
TIMED = {
    **KEPT,
    f"{GROWTH}.training_objective": "mlm",
    f"{GROWTH}.time_interpretation": "input",
    f"{GROWTH}.num_time_steps": 5,
    f"{GROWTH}.target_stacks": 2,
    "training.time_sampling": "stratified",
    "training.mask_ratio_min": 0.2,
    "training.mask_ratio_max": 0.8,
    "cache.views": 2,
}


class Looked:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in err

    @property
    def document(self) -> Any:
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


Look = Callable[..., Looked]


@pytest.fixture
def kept(reference: Reference) -> Path:
    """Three stacks whose two boundaries are both kept. Not to be changed."""
    return reference(KEPT)


@pytest.fixture
def changeable(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "artifacts"))


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Look:
    def look(root: Path, uri: str, *options: object) -> Looked:
        capsys.readouterr()
        code = main(["inspect", uri, "--artifacts", str(root), *map(str, options)])
        said = capsys.readouterr()
        return Looked(code, said.out, said.err)

    return look


def values_of(root: Path, stage: int) -> tuple[np.ndarray, Any]:
    """Return all training rows of a store [rows, T, D], and its index."""
    folder = folder_of(root, "activations", stage)
    with StoreReader(folder, read_manifest(folder).checksums()) as reader:
        rows = reader.read("train", range(reader.train.rows)).double().numpy()
    return rows, read_metadata(folder)[1]["train"].rows


# ---------------------------------------------------------------- numbers


def test_the_numbers_are_those_of_the_bytes(kept: Path, look: Look) -> None:
    rows, _ = values_of(kept, 1)
    store = look(kept, "activations-1", "--json").document["store"]
    tokens = rows.reshape(-1, rows.shape[2])
    norms = np.linalg.norm(rows, axis=2)
    assert (store["sampled_rows"], store["sampled_tokens"], store["non_finite"]) == (16, 256, 0)
    for name, values in (("mean", tokens.mean(0)), ("std", tokens.std(0)), ("largest", tokens.max(0))):
        np.testing.assert_allclose(store["channels"][name], values, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(store["positions"]["norm_quantiles"]["0.9"], np.quantile(norms, 0.9, axis=0), rtol=1e-5)
    assert store["largest"] == pytest.approx(abs(rows).max(), rel=1e-5)
    assert store["tokens"]["norm_quantiles"]["1"] == pytest.approx(norms.max(), rel=1e-5)
    assert store["codecs"] == ["sharding_indexed(bytes(little), crc32c)"]


def test_fewer_rows_are_evenly_spaced(kept: Path, look: Look) -> None:
    rows, _ = values_of(kept, 1)
    store = look(kept, "activations-1", "--json", "--rows", 4).document["store"]
    assert store["sampled_rows"] == 4
    np.testing.assert_allclose(store["channels"]["std"], rows[[0, 5, 10, 15]].reshape(64, -1).std(0), rtol=1e-5)


def test_drift_from_the_boundary_below_over_the_same_rows(kept: Path, look: Look) -> None:
    (here, index), (below, index_below) = values_of(kept, 1), values_of(kept, 0)
    at = [index_below.find(index.sequence_id[row : row + 1], int(index.view[row]))[0] for row in range(len(here))]
    x, y = (rows.reshape(-1, 16) - rows.reshape(-1, 16).mean(0) for rows in (here, below[at]))
    expected = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    drift = look(kept, "activations-1", "--json").document["drift"]
    assert (drift["boundaries"], drift["here"], drift["against"], drift["rows"]) == ([1, 2], 1, 0, 16)
    assert drift["cka"][1][0] == pytest.approx(expected, rel=1e-5)
    first = look(kept, "activations-0", "--json").document["drift"]
    assert (first["here"], first["against"], first["cka"]) == (0, None, drift["cka"])
    named = look(kept, "activations-0", "--json", "--against", "activations-1").document["drift"]
    assert (named["here"], named["against"]) == (0, 1)


def test_nothing_to_compare_with(reference: Reference, look: Look) -> None:
    root = reference()  # of the two boundaries the lower one is retired
    document = look(root, "activations-1", "--json").document
    assert document["drift"] is None
    states = {entry["name"]: entry["state"] for entry in document["provenance"]}
    assert states[folder_of(root, "activations", 0).name] == "retired"


# ---------------------------------------------------------------- provenance


def test_the_chain_leads_back_to_the_data(kept: Path, look: Look) -> None:
    document = look(kept, "activations-1", "--json").document
    chain = document["provenance"]
    kinds = [entry["kind"] for entry in chain]
    assert sorted(kinds) == sorted(["data", *["build", "trunk", "stack", "activations"] * 2])
    assert kinds.index("data") < kinds.index("stack")
    seen: set[str] = set()
    for entry in chain:
        assert set(entry["made_from"]) <= seen
        (path,) = kept.glob(f"*/{entry['name']}/manifest.json")
        assert entry["digest"] == read_manifest(path.parent).digest
        seen.add(entry["name"])
    assert chain[-1]["digest"] == document["digest"]
    assert {entry["state"] for entry in chain} == {"sealed"}
    stack = next(entry for entry in chain if entry["kind"] == "stack")
    assert stack["facts"]["steps"] == 12


def test_what_is_gone_or_was_replaced_is_said(changeable: Path, look: Look) -> None:
    shutil.rmtree(folder_of(changeable, "trunk", 1))
    folder = folder_of(changeable, "build", 0)
    old = read_manifest(folder)
    (folder / "build.json").write_text((folder / "build.json").read_text() + "\n")
    path = folder / "build.json"
    files = {"build.json": FileEntry(size=path.stat().st_size, checksum=checksum_file(path))}
    recipe = BuildRecipe.model_validate(old.recipe)
    new = make_manifest(old.ref, recipe, old.inputs, files, old.facts, old.fingerprint)
    (folder / "manifest.json").write_text(new.model_dump_json())
    chain = look(changeable, "stack-1", "--json").document["provenance"]
    states = {entry["name"][:7]: entry["state"] for entry in chain}
    assert (states["trunk-1"], states["build-0"], states["stack-0"]) == ("absent", "replaced", "sealed")


def test_an_artifact_of_another_folder_is_at_home_there(kept: Path, tmp_path: Path, look: Look) -> None:
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    document = look(elsewhere, str(folder_of(kept, "activations", 1)), "--json").document
    assert document["state"] == "sealed"
    assert {entry["state"] for entry in document["provenance"]} == {"sealed"}
    assert document["drift"]["boundaries"] == [1, 2]


# ---------------------------------------------------------------- rows beside their text


def test_rows_stand_beside_the_text_of_the_corpus(kept: Path, look: Look) -> None:
    samples = look(kept, "activations-1", "--json").document["samples"]["rows"]
    assert [sample["group"] for sample in samples] == ["train"] * 4 + ["validation"] * 2
    rows, index = values_of(kept, 1)
    data = load_sequences(Artifacts(kept), find_run(Artifacts(kept), "tiny").plan.data_ref)
    for sample in samples:
        split = data[sample["view"] == VALIDATION_VIEW]
        (tokens,) = split.tokens[split.rows_of(np.array([sample["sequence_id"]]))]
        assert "".join(sample["pieces"]) == bytes(tokens.astype(np.uint8)).decode()
        assert sample["changed"] == []
    sample = samples[1]
    assert int(index.sequence_id[sample["row"]]) == sample["sequence_id"]
    np.testing.assert_allclose(sample["norms"], np.linalg.norm(rows[sample["row"]], axis=1), rtol=1e-5)


def test_the_text_is_what_the_trunk_read_masks_and_all(reference: Reference, look: Look) -> None:
    """The corruption goes by batch and time step: that it is the right one, the bytes of the store say."""
    from flows.run.inputs import rows_from_tokens
    from flows.run.stage import Stage

    root = reference(TIMED)
    run = find_run(Artifacts(root), "tiny")
    corpus, corpus_bytes = run.plan.data.corpus, run.plan.corpus_bytes
    stage = Stage(config=run.config, root=str(root), corpus=corpus, corpus_bytes=corpus_bytes, index=0)
    source = rows_from_tokens(stage)
    folder = folder_of(root, "activations", 0)
    samples = look(root, folder.name, "--json").document["samples"]["rows"]
    assert {sample["view"] for sample in samples} == {0, 1, VALIDATION_VIEW}
    with StoreReader(folder, read_manifest(folder).checksums()) as reader:
        for sample in samples:
            ids = np.array([sample["sequence_id"]])
            assert source.rows(ids, sample["view"]).equal(reader.rows(ids, sample["view"]))
            batch = source.inputs.batch(ids, sample["view"])
            (read,), (clean,) = batch["input_ids"].numpy(), batch["targets"].numpy()
            assert "".join(sample["pieces"]) == ByteTokenizer().decode(read)
            piece_of = np.repeat(np.arange(len(sample["pieces"])), sample["piece_tokens"])
            assert sample["changed"] == np.unique(piece_of[read != clean]).tolist()
    assert any(sample["changed"] for sample in samples)


def test_without_the_tokens_there_is_no_text(changeable: Path, look: Look, tmp_path: Path) -> None:
    next((changeable / "data").glob("*/train_tokens.npy")).unlink()
    found = look(changeable, "activations-1", "--json", "--html", tmp_path / "p.html").document
    assert "train_tokens.npy: is missing" in found["samples"]["why_no_text"]
    assert found["samples"]["rows"][0]["pieces"] == []
    assert len(found["samples"]["rows"][0]["norms"]) == 16
    assert "There is no text to show" in (tmp_path / "p.html").read_text()
    assert "train_tokens.npy" in look(changeable, "activations-1").out


# ---------------------------------------------------------------- terminal


def test_plain_tables_where_there_is_no_terminal(kept: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = look(kept, "activations-1")
    store = json.loads(look(kept, "activations-1", "--json").out)["store"]
    assert (found.code, found.err) == (0, "")
    assert "\x1b" not in found.out
    for name in ("Layout", "Statistics", "Channels, of 16", "Drift", "Rows", "Provenance"):
        assert f"\n{name}" in found.out
    assert f"{store['spectrum']['effective_rank']:.4g} of 16" in found.out
    tables = found.out[found.out.index("\nLayout") :].splitlines()
    assert max(map(len, tables)) <= 80
    for kind in ("data", "stack-0", "activations-0"):
        assert re.search(rf"^{kind}-[0-9a-f]{{12}} +sealed", found.out, re.MULTILINE)


def test_bars_go_from_the_smallest_to_the_largest() -> None:
    assert strip([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert strip([0, 2, 6, 8], 2) == "▁█"
    assert strip([1, None, 2], 3) == "▁?█"
    assert strip([3, 3], 5) == "▁▁"
    assert strip([None], 2) == "?"


# ---------------------------------------------------------------- the page


class Parsed(HTMLParser):
    """The elements of a page, checked to be closed in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in ("meta", "wbr") else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open[-1:] == ["style"] else data


@pytest.mark.parametrize("uri", ["activations-1", "stack-1"])
def test_a_page_is_one_file_that_needs_no_other(uri: str, kept: Path, look: Look, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    document = look(kept, uri, "--html", path, "--json").document
    text = path.read_text()
    parsed = Parsed(text)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(parsed.tags)
    assert not {"src", "href", "xlink:href", "onload"} & {name for name, _ in parsed.attributes}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text
    assert parsed.tags.count("svg") == (6 if uri == "activations-1" else 3)
    assert text.count(">stacks below</text>") == (2 if uri == "activations-1" else 0)  # the axes of a matrix
    assert "counted on a log" not in parsed.text
    for entry in document["provenance"]:
        assert entry["name"] in parsed.text
    facts = document["facts"]
    assert (f"{facts['train_loss']:.4f}" if uri == "stack-1" else "16 training rows of 16 positions") in parsed.text


def test_tensors_stand_under_their_files_and_break_between_words(kept: Path, look: Look, tmp_path: Path) -> None:
    document = look(kept, "stack-1", "--html", tmp_path / "page.html", "--json").document
    text = (tmp_path / "page.html").read_text()
    files = dict.fromkeys(tensor["file"] for tensor in document["tensors"])
    assert [line.replace("<wbr>", "") for line in re.findall(r'class="group">(.+)</th>', text)] == list(files)
    assert "<code>blocks.0.<wbr>attention.<wbr>k_<wbr>proj.<wbr>weight</code>" in text
    assert "<details open>" in text  # a few; many are folded away
    document["tensors"] *= 10
    assert "<details open>" not in stack_page(document, {})


def test_text_of_the_corpus_is_only_text(tmp_path: Path, look: Look) -> None:
    hostile = "<script>alert(1)</script> &amp; \u202e\x1b[31m \"'><blink onload=x> "
    (tmp_path / "corpus.txt").write_text(hostile * 200)
    grown(tiny(tmp_path, {f"{GROWTH}.target_stacks": 2}), tmp_path / "a")
    look(tmp_path / "a", "activations-0", "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    parsed = Parsed(text)
    assert not {"script", "blink"} & set(parsed.tags)
    assert "<script" in parsed.text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\x1b" not in look(tmp_path / "a", "activations-0").out


def test_planted_channels_are_marked_in_the_plots(kept: Path, look: Look) -> None:
    from flows.pages.store import store_page

    document = look(kept, "activations-1", "--json").document
    channels = document["store"]["channels"]
    channels["outliers"], channels["dead"], channels["rms"][3] = [3], [5], 100 * channels["outlier_bound"]
    document["store"]["non_finite"] = 12
    parsed = Parsed(store_page(document))
    assert f">{in_column([channels['rms'][3]])[0]}</td>" in store_page(document)
    assert parsed.attributes.count(("class", "outlier")) == 1
    assert parsed.attributes.count(("class", "line thin leader")) == 1  # to its number, which covers no dot
    assert parsed.attributes.count(("class", "dead")) == 1
    assert parsed.attributes.count(("class", "dot")) == 14
    assert "NaN or infinite among the sampled values: 12" in parsed.text


def test_a_store_of_nothing_finite_has_a_page_without_plots(kept: Path, look: Look) -> None:
    import torch

    from flows.pages.store import statistics_of, store_page
    from flows.pages.tables import print_store
    from storage.activations.statistics import describe_rows

    document = look(kept, "activations-1", "--json").document
    nothing = describe_rows(lambda places: torch.full((len(places), 16, 16), torch.nan), np.arange(4), 16, 16)
    document["store"] |= statistics_of(nothing)
    json.dumps(document, allow_nan=False)
    assert Parsed(store_page(document)).tags.count("svg") == 0
    print_store(document)


def test_every_value_of_a_template_is_text() -> None:
    hostile = '</text><script>"\x1b\u202e'
    made = render(
        "plot.svg.j2",
        left=0,
        top=0,
        width=1,
        height=1,
        label=hostile,
        marks=[Mark("a", {"b": hostile}, hostile, hostile)],
    )
    parsed = Parsed(str(made))
    assert parsed.tags == ["svg", "a", "title"]
    assert parsed.text.count('</text><script>"\ufffd\ufffd') == 2
    assert [value for _, value in parsed.attributes].count('</text><script>"\ufffd\ufffd') == 2
    with pytest.raises(UndefinedError):
        render("plot.svg.j2")


def test_what_is_no_letter_is_replaced() -> None:
    assert printable("a\x00\x1b\ud800\u202eé\n") == "a\ufffd\ufffd\ufffd\ufffdé\n"
    assert visible("a\n\tb", one_line=True) == "a↵→b"


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(-3, 7), [-2, 0, 2, 4, 6]),
        (Scale(0.9, 4200, log=True), [1, 10, 100, 1000]),
        (Scale(0.3, 6, log=True), [0.5, 1, 2, 5]),
        (scale_of([]), [0.96, 0.98, 1, 1.02, 1.04]),
    ],
)
def test_ticks_are_round_and_on_the_axis(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)
    places = [scale(value) for value in (scale.low, *scale.ticks(), scale.high)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 1)


def test_ticks_are_few() -> None:
    for high in (1.05, 1.5, 1.71, 2.3, 3.4, 4.9, 6.1, 7.7, 9.4):
        ticks = Scale(0, high).ticks()
        assert 3 <= len(ticks) <= 7, high


def test_a_log_axis_has_more_than_one_tick() -> None:
    for low, high in ((2.1, 4.9), (1.9, 4.7), (0.31, 0.48), (5.1e-4, 9.7e-4), (1, 1.2), (3, 3000)):
        scale = Scale(low, high, log=True)
        assert len(scale.ticks()) >= 3
        assert all(low * 0.999 <= tick <= high * 1.001 for tick in scale.ticks())


def test_a_stack_leads_with_its_validation_loss(kept: Path, look: Look, tmp_path: Path) -> None:
    look(kept, "tiny/1/stack", "--html", tmp_path / "p.html")
    facts = json.loads((folder_of(kept, "validation", 1) / "manifest.json").read_text())["facts"]
    tiles = re.findall(r'class="tile"><b>([^<]+)</b><span>([^<]+)', (tmp_path / "p.html").read_text())
    assert tiles[0] == (f"{facts['validation_loss']:.4f}", "validation loss [nats per loss position]")
    assert " parameters of the stack and the head trained for " in (tmp_path / "p.html").read_text()


def test_the_page_of_a_stack_says_what_else_trained_and_at_which_ratio(kept: Path, look: Look) -> None:
    document = look(kept, "tiny/1/stack", "--json").document
    mask = {"seed": 0, "ratio": 0.65, "corruption": "mask", "mask_token": 256, "n_regular_tokens": 256}
    document["recipe"] |= {"mask": mask}
    files = ("embedding.safetensors", "head.safetensors", "stack-0/stack.safetensors", "stack-1/stack.safetensors")
    document["tensors"] = [{**document["tensors"][0], "file": file} for file in files]
    page = stack_page(document, {"validation_loss": 2.0})
    assert " parameters of 2 stacks, the embedding and the head trained for " in page
    assert "[nats per loss position] at 65\u00a0% masked<" in page


def test_numbers_of_ticks() -> None:
    values = [0, -0.5, 12000, 1e-6, 0.30000000000000004, 2e7]
    assert [tick_text(value) for value in values] == ["0", "\u22120.5", "12,000", "1e\u22126", "0.3", "2e7"]


def test_a_trunk_has_its_strategy_since_its_stacks_may_lie_above_and_train_and_none_without_stacks() -> None:
    first, second = ({"kind": "trunk", "facts": {"strategy": "frozen", "stacks": n}} for n in (0, 1))
    assert (phrase(first), phrase(second)) == ("no stack", "strategy frozen, 1 stack")


def test_what_a_page_does_not_break() -> None:
    stack, store, build = (
        {"kind": "stack", "facts": {"steps": 20, "rack_parameters": 106_000}},
        {"kind": "activations", "facts": {"train_rows": 1600, "store_bytes": 6 << 20}},
        {"kind": "build", "facts": {"operator": "copy", "blocks": 1}},
    )
    assert result(stack) == "20 steps, rack of 106\u00a0k"
    assert result(store) == "1,600 rows, 6.0\u00a0MiB"
    assert result(build) == "copy, 1 block"
    assert command("train /a/b --to <x>") == 'train /a/<wbr>b <span class="whole">--to</span> &lt;x&gt;'


def test_columns_of_channels_have_equal_decimals() -> None:
    channels = {name: [0.2523, 0.119, None] for name in OF_CHANNELS}
    assert channel_cells(channels, [1, 0]) == [("0.1190",) * 6, ("0.2523",) * 6]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("uri", "options", "code", "message"),
    [
        ("tiny", ["--html", "p.html"], 2, "tiny is a run: name what it made, such as tiny/0; `stackwise report` has"),
        ("data", ["--html", "p.html"], 2, "--html: got 'p.html'; data-"),
        ("validation-1", ["--html", "p.html"], 2, "has no page; stores and stacks have"),
        ("stack-1", ["--html", "no/where/p.html"], 2, "--html: got 'no/where/p.html'; its folder does not exist"),
        ("stack-1", ["--html", "."], 2, "--html: got '.'; it cannot be written ("),
        ("stack-1", ["--against", "activations-1"], 2, "--against: got 'activations-1'; stack-1-"),
        ("activations-1", ["--against", "stack-1"], 2, "is no store; name one"),
        ("activations-1", ["--against", "activations-1"], 2, "it is the store itself"),
        ("activations-1", ["--against", "activations-7"], 3, "activations-7: is no artifact or run in "),
        ("stack-1", ["--rows", "9"], 2, "--rows: got 9; stack-1-"),
        ("activations-1", ["--rows", "0"], 2, "--rows: got 0; read one row at least"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    uri: str, options: list[str], code: int, message: str, kept: Path, look: Look, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found = look(kept, uri, *options)
    assert (found.code, found.out) == (code, "")
    (line,) = found.err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_other_data_is_not_compared(kept: Path, reference: Reference, look: Look) -> None:
    other = folder_of(reference({**KEPT, f"{GROWTH}.target_stacks": 2, "data.seq_len": 8}), "activations", 0)
    found = look(kept, "activations-1", "--against", other)
    assert (found.code, found.out) == (2, "")
    assert "it holds other sequences than activations-1-" in found.err


def test_a_store_of_another_width_is(kept: Path, reference: Reference, look: Look) -> None:
    other = folder_of(reference({**KEPT, f"{GROWTH}.target_stacks": 2, "model.d_model": 8}), "activations", 0)
    drift = look(kept, "activations-1", "--json", "--against", other).document["drift"]
    assert drift["stores"][drift["against"]] == other.name
    assert 0 < drift["cka"][drift["here"]][drift["against"]] < 1
    assert drift["cosine"][drift["here"]][drift["against"]] is None


def test_a_retired_store_has_no_page(reference: Reference, look: Look, tmp_path: Path) -> None:
    found = look(reference(), "activations-0", "--html", tmp_path / "p.html")
    assert found.code == 3
    assert "was retired" in found.err
    assert look(reference(), "activations-1", "--against", "activations-0").code == 3


def test_addresses_of_a_run(kept: Path, look: Look) -> None:
    for address, kind in (("tiny/1", "stack"), ("tiny/1/stack", "stack"), ("tiny/0/activations", "activations")):
        stage = int(address.split("/")[1])
        assert look(kept, address, "--json").document["folder"] == str(folder_of(kept, kind, stage))
    listed = look(kept, "tiny", "--json").document["artifacts"]
    assert [row["address"] for row in listed if row["address"].startswith("tiny/2")] == [
        f"tiny/2/{kind}" for kind in ("build", "trunk", "stack", "validation")
    ]
    for row in listed:
        assert look(kept, row["address"], "--json").document["folder"].endswith(row["artifact"])
    assert "tiny/0/activations  activations-0-" in look(kept, "tiny").out


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("tiny/3", "it has stages 0 to 2"),
        ("tiny/2/activations", "stage 2 made build, trunk, stack, validation"),
        ("tiny/0/stack/x", "stage 0 made"),
        ("nobody/1", "is no artifact"),
        ("tny/1", "did you mean tiny?"),
    ],
)
def test_an_address_of_nothing_says_what_there_is(kept: Path, look: Look, address: str, word: str) -> None:
    found = look(kept, address)
    assert found.code == (2 if address.startswith("tiny/") else 3)
    assert word in found.err


def test_with_a_page_the_terminal_says_where_it_is(kept: Path, look: Look, tmp_path: Path) -> None:
    assert look(kept, "tiny/1/stack", "--html", tmp_path / "p.html").out.splitlines() == [
        f"{folder_of(kept, 'stack', 1).name}: page in {tmp_path / 'p.html'}"
    ]


@pytest.mark.parametrize("html", [False, True])
def test_a_damaged_shard_is_named(html: bool, changeable: Path, look: Look, tmp_path: Path) -> None:
    path = folder_of(changeable, "activations", 1) / shard_path("train", 0)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    found = look(changeable, "activations-1", *(["--html", tmp_path / "p.html"] if html else ["--json"]))
    assert (found.code, found.out) == (3, "")
    assert f"{path}: the checksum of chunk 0 differs" in found.err
    assert not (tmp_path / "p.html").exists()


def test_a_damaged_tensor_is_named(changeable: Path, look: Look, tmp_path: Path) -> None:
    path = folder_of(changeable, "stack", 1) / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = look(changeable, "stack-1", "--html", tmp_path / "p.html")
    assert (found.code, found.out) == (3, "")
    assert f"{path}: checksum " in found.err


def test_the_tokenizer_is_found_through_a_run(tmp_path: Path, look: Look) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    (tmp_path / "corpus.txt").write_text("grow one stack, then the next é one; " * 60)
    grown(tiny(tmp_path, {f"{GROWTH}.target_stacks": 2, "data.tokenizer": str(path)}), tmp_path / "a")
    text = "".join(look(tmp_path / "a", "activations-0", "--json").document["samples"]["rows"][0]["pieces"])
    assert text.strip("\ufffd") in "grow one stack, then the next é one; " * 3
    assert len(text) >= 12
    path.unlink()
    samples = look(tmp_path / "a", "activations-0", "--json").document["samples"]
    data = read_manifest(next((tmp_path / "a" / "data").iterdir()))
    assert DataRecipe.model_validate(data.recipe).tokenizer[:19] in samples["why_no_text"]
    assert samples["rows"][0]["pieces"] == []
