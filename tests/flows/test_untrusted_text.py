"""Names, messages and texts of others are drawn by the terminal and by Prefect's pages, and never obeyed."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest

from flows.run.events import Message
from flows.run.say import say
from flows.run.terminal import LiveBars, PlainLines, plain_console, plain_table
from stackwise_core.errors import ConfigError, Fault, SavedRackError, StackWiseError, is_drawn, shown
from storage.artifacts import Artifacts
from storage.errors import ArtifactMissingError
from storage.manifest import Manifest
from storage.place import key_of
from support.commands import Run
from support.disk import ROOT
from support.house import pretend
from support.records import change

HOSTILE = "a\x1b[31m\x9b2J\u202eb\u2066\x07\udcff\r\nok [bold]c[/] :boom: | <b>`d"
"""A colour, C1, a change of direction, a byte that is no character, a second line; and markup of three kinds."""
DRAWN = r"a\x1b[31m\x9b2J\u202eb\u2066\x07\udcff\r\nok [bold]c[/] :boom: | <b>`d"
NAME = HOSTILE.replace("\udcff", "").replace("/", "")


def obeyed(text: str) -> str:
    """Return the characters that a terminal would obey, except the ends of lines."""
    return "".join(character for character in text if character != "\n" and not is_drawn(character))


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert shown(HOSTILE) == DRAWN
    assert shown("é 漢字 … 😀 \u3000") == "é 漢字 … 😀 \u3000"
    assert shown("x" * 9_999) == "x" * 5_000 + "..."
    assert shown("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_an_error_draws_what_it_names() -> None:
    assert (
        str(ConfigError([Fault(HOSTILE, HOSTILE, HOSTILE)] * 2)).split("\n") == [f"{DRAWN}: got {DRAWN}; {DRAWN}"] * 2
    )
    for kind in (SavedRackError, ArtifactMissingError):
        error = kind(Path(HOSTILE), HOSTILE, HOSTILE)
        assert str(error) == f"{DRAWN}: {DRAWN}. {DRAWN}"
        assert error.path == Path(HOSTILE)
    assert str(StackWiseError(HOSTILE)) == DRAWN.replace(r"\n", "\n")


def test_nothing_but_say_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing but `plain_console` and `plain_table` draws with rich, whose texts are markup by default."""
    found: set[str] = set()
    for path in (ROOT / "flows").rglob("*.py"):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        found |= {f"{path.stem}: {name}" for name in names if name == "print" or name.endswith(("Console", "Table"))}
    allowed = {"say: print", "terminal: _PlainConsole", "terminal: _PlainTable", "errors: _LastingConsole"}
    assert found == allowed | {"rank: print", "ranks: print"}  # to the process that started them, and to a file
    say(HOSTILE, "x")
    assert capsys.readouterr().out == f"{DRAWN}\nx\n"


def test_tables_and_progress_draw_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = plain_table("what")
    table.add_row(HOSTILE)
    file = io.StringIO()
    console = plain_console()
    console.file, console.width = file, 200
    console.print(HOSTILE)
    console.print(table)
    bars = LiveBars(console)
    bars(Message(HOSTILE))
    assert obeyed(file.getvalue()) == ""
    assert file.getvalue().count("[bold]c[/] :boom: | <b>`d") == 3
    assert DRAWN in file.getvalue()
    PlainLines()(Message(HOSTILE))
    assert capsys.readouterr().err.partition(" ")[2] == f"{DRAWN}\n"  # behind the time of day


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    """An artifacts folder whose maker chose every text in it."""
    artifacts = Artifacts(tmp_path_factory.mktemp("of a stranger")).open()
    plan = pretend(artifacts)
    attempt = artifacts.root / "runs/one/attempts/0001"
    change(attempt / "outcome.json", state="failed", message=NAME, ended=NAME)
    change(attempt / "start.json", started=NAME, host=NAME)
    other = artifacts.root / "runs" / NAME
    (artifacts.root / "runs/one").rename(other)
    (artifacts.root / "stacks" / HOSTILE.replace("/", "")).mkdir()
    for ref in (plan.stages[0].ref("build"), plan.stages[0].ref("activations")):
        path = artifacts.root / key_of(ref) / "manifest.json"
        manifest = Manifest.model_validate_json(path.read_bytes())
        manifest = manifest.model_copy(update={"facts": {"from": NAME, NAME: [NAME]}, "fingerprint": {"torch": NAME}})
        path.write_text(manifest.model_copy(update={"seal": manifest.expected_seal()}).model_dump_json())
    (artifacts.root / key_of(plan.stages[0].ref("stack")) / NAME).write_text("")
    artifacts.quarantine(plan.stages[1].ref("activations"), NAME)
    return artifacts.root


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", NAME],
        ["inspect", "build-0"],
        ["verify"],
        ["gc", "--dry-run"],
        ["du"],
        ["quarantine"],
        ["why", NAME],
        ["status", NAME + "x"],
        ["inspect", NAME],
        ["status", NAME, NAME],
    ],
)
def test_a_folder_of_a_stranger_is_listed_without_obeying_it(command: list[str], root: Path, run: Run) -> None:
    done = run(*command, "--artifacts", root)
    assert obeyed(done.out + done.err) == ""
    assert "ok [bold]" not in [line[:9] for line in (done.out + done.err).splitlines()]
    assert r"\x1b[31m\x9b2J\u202eb" in done.out + done.err
    assert "[bold]c[] :boom:" in done.out + done.err
