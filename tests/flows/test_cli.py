"""The command line as a contract: exit codes, one clear line per fault, JSON on stdout, no needless imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flows.cli import plan
from flows.cli.main import main
from flows.run import devices, validating
from flows.run.events import Message
from flows.run.run import add_stage
from storage.activations import fill
from storage.artifacts import Artifacts
from support.commands import Run
from support.runs import (
    digests,
    files_below,
    folder_of,
    grown,
    made_by_stages,
    manifests,
    tiny,
    tiny_values,
    write_corpus,
)

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]
COMMANDS = (
    *(
        "train",
        "plan",
        "status",
        "inspect",
        "generate",
        "verify",
        "gc",
        "du",
        "why",
        "push",
        "pull",
        "quarantine",
        "doctor",
    ),
    *("server", "worker", "heartbeat", "notify", "export", "join"),
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny configuration as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(write_corpus(tmp_path / "corpus.txt"))))
    return path


@pytest.fixture
def artifacts(tmp_path: Path, config: Path, reference: Reference) -> Path:
    """The finished artifacts of the tiny configuration, to be changed freely."""
    shutil.copytree(reference(), tmp_path / "artifacts")
    return tmp_path / "artifacts"


# ---------------------------------------------------------------- help


def test_help_shows_an_example_and_imports_nothing_heavy() -> None:
    script = """if True:
        import contextlib, io, json, sys
        from flows.cli.main import main
        said, heavy = {}, set()
        for command in ([], *[[name] for name in sys.argv[1:]]):
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                main([*command, "--help"])
            said[" ".join(command)] = out.getvalue()
            heavy |= {"torch", "prefect", "zarr", *(() if command else ("numpy", "pydantic"))} & sys.modules.keys()
        print(json.dumps([said, sorted(heavy)]))
    """
    answer = subprocess.run([sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True, check=True)
    said, heavy = json.loads(answer.stdout)
    assert heavy == []
    assert set(said) == {"", *COMMANDS}
    for command, text in said.items():
        example = text[text.index("\nexample: ") :].splitlines()[1]
        assert example.startswith(f"example: stackwise {command}")
    assert all(f"  {code} " in said[""] or f" {code} " in said[""] for code in range(4))


def test_help_is_wrapped_between_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        main(["gc", "--help"])
    assert "\nremove unreachable artifacts and leftovers of killed\nprocesses\n" in capsys.readouterr().out


def test_without_a_command_or_with_another(run: Run) -> None:
    for arguments in ([], ["sing"], ["train"], ["train", "a", "b"], ["status", "--yaml"]):
        result = run(*arguments)
        assert result.code == 2
        assert result.err.splitlines()[-1].startswith("stackwise")
    assert run("stats", "tiny").err.splitlines()[-1].endswith("there is no command 'stats'; did you mean status?")


def test_an_unknown_option_is_told_with_the_usage_of_its_command(run: Run) -> None:
    usage, *_, last = run("status", "--folow", "tiny").err.splitlines()
    assert usage.startswith("usage: stackwise status ")
    assert last == "stackwise status: error: unrecognized arguments: --folow"


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_a_misspelt_run_is_told_before_torch_is_loaded(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Artifacts(tmp_path / "artifacts").open()
    (tmp_path / "text.txt").write_text("a text")
    for module in ("storage.racks", "stackwise_core.training.hardware", "flows.run.exporting"):
        monkeypatch.setitem(sys.modules, module, None)  # to import it would fail
    given = {"generate": ("--prompt", "a"), "evaluate": ("--data", "text.txt"), "export": ("--to", "model")}
    result = run(command, "nobody", *given[command])
    assert result.code == 2
    assert result.faults[0].startswith("RUN: got 'nobody'; no such run in ")


# ---------------------------------------------------------------- a wrong configuration


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("training.batchsize=8", "training.batchsize: got 8; there is no such key; did you mean batch_size?"),
        ("training.batch_size=many", "training.batch_size: got 'many'; input should be a valid integer"),
        ("training.batch_size=0", "training.batch_size: got 0; input should be greater than or equal to 1"),
        ("model.n_heads=3", "model.n_heads: got 3; must divide model.d_model = 16"),
        ("run.name=../up", "run.name: got '../up'; string should match pattern"),
        ("training.progressive.target_stacks=99", "training.progressive.target_stacks: got 99; must not exceed"),
        ("nonsense", "--set: got 'nonsense'; KEY=VALUE is expected"),
        ("=8", "--set: got '=8'; KEY=VALUE is expected"),
        ("run.name.more=8", "run.name.more: got 8; name is a value, not a section"),
        ("data.source=none/*.txt", "data.source: got 'none/*.txt'; no file matches"),
        ("data.source=empty.txt", "data.source: got 'empty.txt'; every file it names is empty"),
        ("data.source=binary.txt", "data.source: binary.txt is binary (byte 3 is NUL); give text files"),
        ("data.source=latin.txt", "data.source: latin.txt is not UTF-8 text (byte 3); give text files"),
        ("data.source=.", "data.source: got '.'; it is a folder; add /**/*.txt"),
    ],
)
def test_a_fault_is_one_line_with_path_value_and_remedy(
    command: str, override: str, fault: str, run: Run, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9 def")
    result = run(command, config, "--set", override)
    assert result.code == 2
    assert result.out == ""
    (line,) = result.faults
    assert line.startswith(fault)
    assert not list(tmp_path.glob("artifacts/*/*"))


def test_what_a_machine_lacks_is_said_before_a_server_starts(
    run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpus", list)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("train", config, "--set", "hardware.device=cuda", "--set", "tracking.to=[wandb]")
    assert result.code == 2
    assert result.faults == [
        "hardware.device: got 'cuda'; this machine has no CUDA device; use auto or cpu",
        "tracking.to: got 'wandb'; it is not installed: pip install 'stackwise[wandb]'",
    ]
    assert not list(tmp_path.glob("artifacts/runs/*"))


def test_every_fault_is_told_at_once(run: Run, config: Path) -> None:
    overrides = ("training.batch_size=none", "model.n_heads=3", "cache.colour=red", "model.attention=bidirectional")
    result = run("train", config, *(part for override in overrides for part in ("--set", override)))
    assert result.code == 2
    assert {line.partition(":")[0] for line in result.faults} == {
        "training.batch_size",
        "model.n_heads",
        "cache.colour",
        "model.attention",
    }


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("none.yaml", None, "none.yaml: got no such file"),
        ("broken.yaml", "run:\n  name: a\n data: [", "broken.yaml:3: got "),
        (
            "twice.yaml",
            "run: {seed: 1}\nmodel: {}\nrun: {seed: 2}\n",
            "twice.yaml:3: got the key 'run' stands here twice",
        ),
        ("list.yaml", "- a\n- b\n", "list.yaml: got list; a mapping"),
        ("folder.yaml", "", "folder.yaml: got "),
    ],
)
def test_a_configuration_that_cannot_be_read(name: str, text: str | None, where: str, run: Run, tmp_path: Path) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif text is not None:
        (tmp_path / name).write_text(text)
    for command in ("train", "plan"):
        result = run(command, name)
        assert result.code == 2
        (line,) = result.faults
        assert line.startswith(where)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ("--force", "everything"),
            "--force: got 'everything'; the tasks are build, trunk, train, cool, cache, validate",
        ),
        (("--from-stack", 3), "--from-stack: got 3; the stages are 0 to 2"),
        (("--from-stack", -2), "--from-stack: got -2; stages are counted from 0"),
    ],
)
def test_what_cannot_be_redone(arguments: tuple[object, ...], fault: str, run: Run, config: Path) -> None:
    result = run("train", config, *arguments)
    assert (result.code, result.faults) == (2, [fault])


def test_artifacts_that_cannot_be_a_folder(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = run("train", config, "--artifacts", "taken")
    assert result.code == 2
    (line,) = result.faults
    assert line.startswith(f"--artifacts {tmp_path}/taken: cannot be written (")
    for command in (["status"], ["status", "tiny"], ["inspect", "stack-0"], ["verify"]):
        result = run(*command, "--artifacts", "nowhere")
        assert result.code == 2
        assert "there is no such folder" in result.faults[0]
        assert not (tmp_path / "nowhere").exists()


def test_another_text_under_a_used_name(run: Run, config: Path, artifacts: Path, tmp_path: Path) -> None:
    """Told where the run begins, before anything is made."""
    from stackwise_core.errors import CorpusError

    before = digests(artifacts)
    values = yaml.safe_load((artifacts / "runs/tiny/attempts/0001/config.yaml").read_text())
    source = Path(values["data"]["source"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = tiny(elsewhere)
    grown(first, elsewhere / "a")
    write_corpus(elsewhere / "corpus.txt", seed=1)
    with pytest.raises(CorpusError, match="its text is not what run 'tiny' was started on") as error:
        grown(tiny(elsewhere), elsewhere / "a")
    assert error.value.exit_code == 2
    assert digests(elsewhere / "a").keys() == before.keys()
    assert source.exists()


# ---------------------------------------------------------------- all is there


def test_a_finished_run_is_found_without_torch_or_prefect(artifacts: Path, config: Path, tmp_path: Path) -> None:
    script = """if True:
        import json, sys
        from flows.cli.main import main
        code = main(sys.argv[1:])
        print(json.dumps([code, sorted({"torch", "prefect", "zarr"} & sys.modules.keys())]))
    """
    command = [sys.executable, "-c", script, "train", config.name]
    environment = {**os.environ, "COLUMNS": "120", "PREFECT_API_URL": "http://127.0.0.1:9/api"}  # nobody answers
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)  # registers its own config
    before = files_below(artifacts)
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *said, last = answer.stdout.splitlines()
    assert json.loads(last) == [0, []]
    assert answer.stderr == ""
    assert any("tiny was there already: 3 stacks" in line for line in said)
    assert "grow: stackwise train tiny.yaml --set training.progressive.target_stacks=4" in said
    assert files_below(artifacts) == before


# ---------------------------------------------------------------- plan


def test_plan_says_what_would_run_and_writes_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    document = run("plan", config, "--json").document
    assert not (tmp_path / "artifacts").exists()
    assert document["complete"] is False
    assert document["data"]["state"] == "absent"
    assert document["train_sequences"] == 16
    to_run = [f"{task} {stage['stage']}" for stage in document["stages"] for task in stage["to_run"]]
    assert to_run == made_by_stages(3)
    assert [stage["cache_bytes"] is None for stage in document["stages"]] == [False, False, True]
    assert document["stages"][2]["cache_note"].startswith("last stage")
    text = run("plan", config)
    assert text.code == 0
    assert text.out.count("\nstage ") == 3


NOTE = "not used: mask_ratio (training_objective: clm)"


def test_unused_keys_are_noted_and_nothing_is_made_anew(run: Run, config: Path, artifacts: Path) -> None:
    override = ("--set", "training.mask_ratio=0.3")
    document = run("plan", config, "--json", *override).document
    assert (document["notes"], document["complete"]) == ([NOTE], True)
    assert NOTE in run("plan", config, *override).out.splitlines()
    trained = run("train", config, *override)
    assert (trained.code, trained.err) == (0, f"{NOTE}\n")
    assert run("plan", config, "--json").document["notes"] == []


def test_a_plan_says_what_would_be_faster_on_a_gpu(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*settings: str) -> bool:
        changes = [part for setting in settings for part in ("--set", setting)]
        return plan.ADVICE in run("plan", config, "--json", *changes).document["notes"]

    low = "training.progressive.new_stack_precision=bfloat16"
    assert not said()
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("H100", 0)])
    monkeypatch.setattr(devices, "version", lambda name: "2.13.0+cu130")
    assert said("hardware.device=auto")
    assert not said("hardware.device=auto", low)
    assert not said("hardware.device=cpu")
    assert said("hardware.device=cuda")


def test_a_run_reports_unused_keys_before_it_begins(tmp_path: Path) -> None:
    changes = {"training.mask_ratio": 0.3, "training.progressive.target_stacks": 1}
    assert Message(NOTE) in grown(tiny(tmp_path, changes), tmp_path / "a").events[:3]


def test_plan_agrees_with_what_was_made(run: Run, config: Path, artifacts: Path) -> None:
    document = run("plan", config, "--json").document
    assert document["complete"] is True
    known = manifests(artifacts)
    assert document["data"]["artifact"] in known
    for stage in document["stages"]:
        assert stage["to_run"] == []
        facts = known[folder_of(artifacts, "stack", stage["stage"]).name]["facts"]
        assert stage["trainable_parameters"] == facts["trainable_parameters"]
        assert stage["rack_parameters"] == facts["rack_parameters"]
        if stage["stage"] < 2:
            cache = known[folder_of(artifacts, "activations", stage["stage"]).name]["facts"]
            assert stage["cache_bytes"] == cache["store_bytes"]
    assert [stage["states"].get("activations") for stage in document["stages"]] == ["retired", "sealed", None]

    more = run("plan", config, "--json", "--set", "training.progressive.target_stacks=4").document
    to_run = [f"{task} {stage['stage']}" for stage in more["stages"] for task in stage["to_run"]]
    assert to_run == ["cache 2", "validate 2", "build 3", "trunk 3", "train 3", "validate 3"]


# ---------------------------------------------------------------- status


def test_status_of_a_finished_run(run: Run, artifacts: Path) -> None:
    (entry,) = run("status", "--json").document["runs"]
    report = json.loads((folder_of(artifacts, "validation", 2) / "report.json").read_text())
    assert entry["validation_loss"] == report["validation_loss"]
    assert (entry["name"], entry["state"], entry["stages_done"], entry["attempts"]) == ("tiny", "done", 3, 1)

    document = run("status", "tiny", "--json").document
    assert [stage["states"]["activations"] for stage in document["stage_list"]] == ["retired", "sealed", "none"]
    assert document["stage_list"][1]["artifacts"]["stack"] == folder_of(artifacts, "stack", 1).name
    text = run("status", "tiny").out
    assert all(name in text for name in digests(artifacts) if not name.startswith("data-"))
    assert f"{report['validation_loss']:.4f}" in text
    assert "done" in run("status").out


def test_status_while_running_after_a_failure_and_after_a_kill(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def add(stage: Any) -> None:
        seen.append(run("status", "--json").document["runs"][0])
        if stage.index == 1:
            raise KeyError("boom")
        add_stage(stage)

    with pytest.raises(KeyError):
        grown(tiny(tmp_path), tmp_path / "artifacts", add=add)
    assert [(entry["state"], entry["stages_done"]) for entry in seen] == [("running", 0), ("running", 1)]
    (failed,) = run("status", "--json").document["runs"]
    assert (failed["state"], failed["message"], failed["stages_done"]) == ("failed", "'boom'", 1)
    assert "boom" in run("status", "tiny").out

    (tmp_path / "artifacts/runs/tiny/attempts/0001/outcome.json").unlink()  # which a kill would not have written
    assert run("status", "tiny", "--json").document["state"] == "killed"
    grown(tiny(tmp_path), tmp_path / "artifacts")
    again = run("status", "tiny", "--json").document
    assert (again["state"], again["attempts"], again["message"]) == ("done", 2, "")


def test_status_of_a_run_that_is_not_there(run: Run, artifacts: Path) -> None:
    result = run("status", "other")
    assert result.code == 2
    assert result.faults[0].endswith("there: tiny")


# ---------------------------------------------------------------- inspect


def test_inspect_a_store(run: Run, artifacts: Path) -> None:
    folder = folder_of(artifacts, "activations", 1)
    document = run("inspect", "activations-1", "--json").document
    assert document["folder"] == str(folder)
    assert document["store"]["shape"] == [16, 16, 16]
    assert document["store"]["dtype"] == "bfloat16"
    assert document["store"]["non_finite"] == 0
    assert document["digest"] == digests(artifacts)[folder.name]
    for uri in (folder.name, f"artifacts/activations/{folder.name}", str(folder)):
        assert run("inspect", uri, "--json").document == document
    assert folder.name in run("inspect", folder.name).out


def test_inspect_every_kind(run: Run, artifacts: Path) -> None:
    for name, manifest in manifests(artifacts).items():
        document = run("inspect", name, "--json").document
        assert document["ref"] == manifest["ref"]
        assert document["state"] == ("retired" if name.startswith("activations-0") else "sealed")
        assert run("inspect", name).code == 0


@pytest.mark.parametrize("uri", ["stack-", "stack-7", "nothing/at/all"])
def test_inspect_what_is_ambiguous_or_absent(uri: str, run: Run, artifacts: Path) -> None:
    result = run("inspect", uri)
    (line,) = result.faults
    assert result.code == (2 if uri == "stack-" else 3)
    assert line.startswith(f"artifact: got '{uri}'; " if uri == "stack-" else f"{uri}: is no artifact or run in ")
    if uri == "stack-":
        assert "3 begin so" in line
        assert folder_of(artifacts, "stack", 1).name in line


# ---------------------------------------------------------------- verify


def test_verify_reads_every_byte_and_derives_rows(run: Run, artifacts: Path) -> None:
    everything = run("verify")
    assert everything.code == 0
    assert everything.out.count("ok  ") == len(digests(artifacts))
    assert "all as sealed" in everything.out
    assert not everything.out.rstrip().endswith(" 0 cached rows derived again from tokens")
    stack = folder_of(artifacts, "stack", 1)
    for what in ("tiny", stack.name, str(stack)):
        assert run("verify", what).code == 0
    assert ": 1 artifact, " in run("verify", stack.name).out
    assert run("verify", "nothing").code == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "add"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("activations", "store.zarr/activations/c.0.0.0"),
        ("activations", "store.zarr/view/c.0"),
        ("stack", "head.safetensors"),
    ],
)
def test_verify_says_what_is_damaged(
    damage: str, kind: str, name: str, run: Run, artifacts: Path, config: Path
) -> None:
    folder = folder_of(artifacts, kind, 1)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "flip":
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "delete":
        path.unlink()
    else:
        path = path.with_name("extra.bin")
        path.write_bytes(b"more")
    for what in ([], ["tiny"], [folder.name]):
        result = run("verify", *what)
        assert result.code == 3
        assert f"BAD {folder.name}" in result.out
        assert str(path) in result.err
        assert result.out.count("BAD ") == 1
    # Training does not go on from it either, where a size tells without reading.
    if kind == "stack" and damage in ("cut", "delete"):
        result = run("train", config)
        assert (result.code, len(result.faults)) == (3, 1)
        assert str(path) in result.faults[0]


def test_verify_finds_edited_manifests(run: Run, artifacts: Path) -> None:
    manifest = folder_of(artifacts, "stack", 1) / "manifest.json"
    for old, new in (('"learning_rate": 0.002', '"learning_rate": 0.003'), ('"digest": "', '"digest": "0'), ("{", "")):
        text = manifest.read_text()
        assert old in text
        manifest.write_text(text.replace(old, new))
        result = run("verify")
        assert result.code == 3
        assert str(manifest) in result.err
        manifest.write_text(text)
    assert run("verify").code == 0


def test_verify_derives_what_checksums_cannot_tell(
    run: Run, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store sealed with wrong numbers: every byte is as sealed, and yet it is not what tokens give."""
    real = fill._compute

    def wrong(rows: Any, shard: Any, *others: Any) -> torch.Tensor:
        values = real(rows, shard, *others)
        if shard.group == "train":
            values.view(torch.int16)[3] ^= 1
        return values

    monkeypatch.setattr(fill, "_compute", wrong)
    monkeypatch.setattr(validating, "_check_store", lambda stage, ref: {})
    grown(tiny(tmp_path, {"cache.keep": "all"}), tmp_path / "artifacts")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = run("verify", "tiny")
    assert result.code == 3
    assert "BAD " not in result.out
    assert "sampled rows differ from tokens: [(3, 0)]" in result.err


def test_a_damaged_checksum_of_data(run: Run, artifacts: Path, config: Path) -> None:
    (tokens,) = artifacts.glob("data/*/train_tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert run("verify").code == 3
    result = run("train", config, "--set", "training.progressive.target_stacks=4")
    assert result.code == 3
    assert str(tokens) in result.faults[0]
