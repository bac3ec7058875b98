"""The docs' snippets run, one after the other, in one namespace per page."""

from __future__ import annotations

import json
import re
import shlex
from base64 import b64decode
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_origin

import numpy as np
import pytest
import yaml

import stackwise_core
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import Section
from stackwise_core.config.unused import notes
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import RunPlan, plan_run
from storage.activations import StoreReader
from storage.manifest import read_manifest
from support.gallery import CONFIGS, write
from support.site import NOT_MADE, lay_out, link_gallery

ROOT = Path(__file__).parents[2]
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    namespace: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At two steps a stage, on less text; the outputs in it are of a whole run."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    for cell in code:
        source = "".join(cell["source"])
        for whole, small in (("steps = 400 ", "steps = 2 "), ('"*.py"', '"s*.py"'), (", 200, ", ", 8, ")):
            source = source.replace(whole, small)
        exec(compile(source, "notebook.ipynb", "exec"), namespace)
        assert "error" not in [output["output_type"] for output in cell["outputs"]]
    assert [result.steps for result in namespace["results"]] == [2, 2, 2]
    assert namespace["store"].train.rows == 2 * 16  # what the fourth stack read
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])


def test_every_page_names_only_files_that_exist() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_site_has_every_page_once(laid_out: Path) -> None:
    """Zensical finds broken links when the site is built, which `make check` does; not pages that no menu leads to."""
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for section in sections for pages in section.values() for page in pages]
    there = [page.relative_to(laid_out).as_posix() for page in laid_out.rglob("*.md")]
    assert sorted(listed) == sorted(page for page in there if not page.startswith("files/"))


def test_the_list_of_decisions_names_each_by_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    named = re.findall(r"^- \[([^]]+)\]\(([^)]+)\)", (folder / "README.md").read_text(), flags=re.MULTILINE)
    listed = {target: " ".join(title.split()) for title, target in named}
    titles = {page.name: page.read_text().splitlines()[0].removeprefix("# ") for page in folder.glob("0*.md")}
    assert listed == titles


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "docs"
    lay_out(folder)
    return folder


def _targets(page: Path) -> list[Path]:
    """Return the files that a page links to, by Markdown or HTML."""
    text = re.sub(r"~~~~.*?~~~~", "", page.read_text(), flags=re.DOTALL)
    named = re.findall(r"""\]\(([^)#:\s]+)[)#]|(?:href|src)="([^"#:]+)""", text)
    return [(page.parent / (one or other)).resolve() for one, other in named]


def test_no_link_of_the_site_is_dead_or_leaves_it(laid_out: Path) -> None:
    for page in laid_out.rglob("*.md"):
        for target in _targets(page):
            assert target.is_file(), f"{page}: {target}"
            assert target.is_relative_to(laid_out), f"{page}: {target}"


def test_a_file_that_a_page_names_is_shown_whole(laid_out: Path) -> None:
    recipe = ROOT / "configs" / "recipes" / "jump.yaml"
    page = laid_out / "files" / "configs" / "recipes" / "jump.yaml.md"
    assert page in _targets(laid_out / "modes.md")
    assert page in _targets(laid_out / "files" / "configs.md")
    said = "jump.yaml.md)<br>One jump from a shallow rack to the whole depth: two blocks are trained, then four copies"
    assert said in (laid_out / "files" / "configs.md").read_text()
    assert f"~~~~yaml\n{recipe.read_text()}~~~~" in page.read_text()


def test_the_notebook_is_a_page_of_the_site(laid_out: Path) -> None:
    page = (laid_out / "notebook.md").read_text()
    cells = json.loads((laid_out / "notebook.ipynb").read_text())["cells"]
    assert all("".join(cell["source"]) in page for cell in cells)
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert all("".join(data["text/html"]) in page for data in shown if "text/html" in data)
    drawings = [target.read_bytes() for target in _targets(laid_out / "notebook.md") if target.suffix == ".png"]
    assert drawings == [b64decode(data["image/png"]) for data in shown if "image/png" in data]


def test_the_gallery_links_the_reports_that_are_made(tmp_path: Path) -> None:
    page, gallery = tmp_path / "gallery.md", tmp_path / "gallery"
    page.write_text((ROOT / "docs" / "gallery.md").read_text())
    link_gallery(tmp_path)
    assert NOT_MADE in page.read_text()
    assert not [target for target in _targets(page) if target.suffix == ".html"]
    gallery.mkdir()
    reports = [gallery / f"{Path(config).name}.html" for config in CONFIGS]
    for report in reports:
        report.touch()
    link_gallery(tmp_path)
    assert NOT_MADE not in page.read_text()
    assert [target for target in _targets(page) if target.suffix == ".html"] == reports


def test_the_library_reference_has_every_public_name() -> None:
    """Its signatures and docstrings are read from the source when the site is built; a name that is gone fails here."""
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        named = getattr(import_module(module), attribute)
        assert get_origin(named) is Literal or named.__doc__, name
    assert {f"stackwise_core.{name}" for name in stackwise_core.__all__} <= {*listed}


def test_the_library_reference_has_the_words_of_every_type_that_it_names() -> None:
    """A signature says `Mode`; what that may be stands under its own name."""
    page = (ROOT / "docs" / "reference.md").read_text()
    blocks = re.findall(r"^::: (\S+)\n((?: +\S.*\n)*)", page, flags=re.MULTILINE)
    options = {name: (yaml.safe_load(block) or {}).get("options", {}) for name, block in blocks}
    shown = {name.rpartition(".")[2] for name, option in options.items() if option.get("show_attribute_values")}
    needed: set[str] = set()
    for name, option in options.items():
        module, _, attribute = name.rpartition(".")
        named = getattr(import_module(module), attribute)
        members = vars(named) if isinstance(named, type) else {}
        public = option.get("members") or [member for member in members if not member.startswith("_")]
        described = [named, *(members[member] for member in ("__init__", *public) if member in members)]
        annotations = " ".join(str(each) for one in described for each in getattr(one, "__annotations__", {}).values())
        if get_origin(named) is not Literal:
            needed |= {
                word
                for word, value in vars(import_module(named.__module__)).items()
                if get_origin(value) is Literal and re.search(rf"\b{word}\b", annotations)
            }
    assert needed == shown


def test_the_reference_of_the_configuration_is_that_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli.main import main

    assert main(["config", "--markdown"]) == 0
    written = capsys.readouterr().out
    assert written == (ROOT / "docs" / "configuration.md").read_text(), (
        "write it again: stackwise config --markdown > docs/configuration.md"
    )
    sections = re.findall("^## (.+)$", written, flags=re.MULTILINE)
    assert len(sections) == len({*sections})


@pytest.mark.parametrize(
    ("page", "fewest"), [("README.md", 6), ("docs/walkthrough.md", 6), ("docs/reports.md", 4), ("docs/recipes.md", 12)]
)
def test_the_commands_of_a_page_parse(page: str, fewest: int) -> None:
    from flows.cli.main import parse

    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^stackwise (.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    assert len(lines) >= fewest
    for line in lines:
        assert parse(shlex.split(line)).command


def test_the_reader_of_the_format_page_reads_a_store(reference: Callable[..., Path]) -> None:
    page = ROOT / "docs" / "activation-store.md"
    namespace: dict[str, Any] = {}
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile(snippet, str(page), "exec"), namespace)
    root = reference({"cache.keep": "all"})
    (folder,) = (root / "activations").glob("activations-0-*")
    with StoreReader(folder, read_manifest(folder).checksums()) as reader:
        rows = reader.read("train", range(reader.train.rows)).float().numpy()
    assert len(rows) > 1
    recipes = (ROOT / "docs" / "recipes.md").read_text()
    for snippet in re.findall(r"```py\n(.*?)```", recipes, flags=re.DOTALL):
        other: dict[str, Any] = {}
        exec(snippet.replace("artifacts/activations/activations-1-3f2a", str(folder)), other)
        assert np.array_equal(np.asarray(other["first"], np.float32), rows[0])
    for number, row in enumerate(rows):
        assert np.array_equal(namespace["read_row"](folder, number), row)


def test_the_gallery_names_the_pages_that_are_made() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text()
    named = re.findall(r"^\| `(.*?)` \|.*?`configs/(.*?)\.yaml`", page, flags=re.MULTILINE)
    assert [(Path(config).name, config) for config in CONFIGS] == named


@pytest.mark.slow
def test_the_pages_of_the_gallery_are_made(tmp_path: Path) -> None:
    write(tmp_path / "gallery")
    for config in CONFIGS:
        page = (tmp_path / "gallery" / f"{Path(config).name}.html").read_text()
        assert page.count("<svg") > 2
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)  # needs no network


# ---------------------------------------------------------------- the tables of modes.md


def _paths(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return the dotted path of every key, by its last name."""
    paths: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            paths |= _paths(field.annotation, f"{prefix}{name}.")
        else:
            paths[name] = prefix + name
    return paths


def _rows(heading: str) -> list[tuple[str, str]]:
    """Return the first two columns of the table below a heading of modes.md."""
    page = (ROOT / "docs" / "modes.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert rows
    return [(settings.strip(), says.strip()) for settings, says in rows]


def _configured(settings: str) -> StackWiseConfig:
    """Return the default configuration with "`key: value`, `key: value`" applied."""
    paths, values = _paths(StackWiseConfig), dict[str, Any]()
    pairs = [yaml.safe_load(pair) for pair in re.findall(r"`([^`]+)`", settings)]
    apply_overrides(values, {paths[key]: value for pair in pairs for key, value in pair.items()})
    return StackWiseConfig.from_dict(values)


def _plan(changes: dict[str, Any]) -> RunPlan:
    values: dict[str, Any] = {}
    apply_overrides(values, changes)
    return plan_run(StackWiseConfig.from_dict(values), "0" * 64)


@pytest.mark.parametrize(("settings", "stored"), _rows("What may be cached"))
def test_what_may_be_cached(settings: str, stored: str) -> None:
    plan = plan_run(_configured(settings), "0" * 64)
    boundaries = [stage.activations.boundary for stage in plan.stages if stage.activations is not None]
    assert (", ".join(map(str, boundaries)) or "none") == stored


@pytest.mark.parametrize(("settings", "line"), _rows("What is not used"))
def test_what_is_not_used(settings: str, line: str) -> None:
    assert notes(_configured(settings)) == [f"not used: {line.strip('`')}"]


@pytest.mark.parametrize(("settings", "line"), _rows("What is taken instead"))
def test_what_is_taken_instead(settings: str, line: str) -> None:
    assert notes(_configured(settings)) == [f"taken: {line.strip('`')}"]


@pytest.mark.parametrize(("settings", "because"), _rows("What is refused"))
def test_what_is_refused(settings: str, because: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _configured(settings)
    named = [fault.path.rpartition(".")[2] for fault in refused.value.faults]
    assert all(f"`{name}" in settings + because for name in named), named


GROWTH = "training.progressive."


@pytest.mark.parametrize(
    ("changes", "n_kept"),
    [
        ({f"{GROWTH}target_stacks": 4}, 3),
        ({"run.name": "other"}, 3),
        ({"training.checkpoint_every": 7, "training.activation_checkpointing": True}, 3),
        ({"hardware.threads": 1, "hardware.device": "cpu", "hardware.compile": True}, 3),
        ({f"{GROWTH}cache_activations": False}, 3),
        ({"model.n_kv_heads": 4}, 3),  # what 0 stands for
        ({"training.joint_steps": 10}, 3),
        ({f"{GROWTH}stacks": [{}, {}, {"n_blocks": 1}]}, 2),
        ({f"{GROWTH}progressive_qlora": True, f"{GROWTH}trunk_strategy": "frozen"}, 3),
        ({"training.learning_rate": 1e-3}, 0),
        ({"run.seed": 1}, 0),
    ],
)
def test_what_an_id_names(changes: dict[str, Any], n_kept: int) -> None:
    before = [stage.ref("stack") for stage in _plan({}).stages]
    after = [stage.ref("stack") for stage in _plan(changes).stages]
    assert [a == b for a, b in zip(before, after, strict=False)] == [c < n_kept for c in range(3)]
