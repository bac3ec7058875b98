"""What an attacker found once: each stays found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import main
from flows.run import prepare
from flows.run.run import grow
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError
from storage.activations import fill
from storage.artifacts import Artifacts, State
from storage.errors import ArtifactCorruptError, ArtifactNewerError, ArtifactsFolderError, StoreSpaceError
from storage.runs import is_live
from support.records import rewrite


def config_of(folder: Path, **keys: object) -> StackWiseConfig:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {n} of a small text to try things on\n" for n in range(400)))
    values = {
        "run": {"name": keys.pop("name", "r")},
        "data": {"source": str(text), "seq_len": 16},
        "model": {"d_model": 16, "n_heads": 2, "blocks_per_stack": 1},
        "training": {"batch_size": 4, "steps_per_stack": 3, "warmup_steps": 0, **keys.pop("training", {})},
        "cache": {"keep": keys.pop("keep", "last")},
        "hardware": {"threads": 1},
    }
    assert not keys
    return StackWiseConfig.from_dict(values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    grow(config_of(folder, training={"progressive": {"training_objective": "clm"}}), str(folder / "a"))
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "a", tmp_path / "a")
    return tmp_path / "a"


def test_a_finished_artifact_that_is_gone_is_a_problem(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--artifacts", str(root)]) == 0
    (gone,) = (root / "stacks").glob("stack-2-*")
    shutil.rmtree(gone)
    for what in ([], ["r"]):
        capsys.readouterr()
        assert main(["verify", *what, "--artifacts", str(root)]) == 3
        assert str(gone) in capsys.readouterr().err


def test_a_folder_without_its_manifest_is_a_problem(root: Path) -> None:
    next((root / "builds").glob("build-1-*/manifest.json")).unlink()
    assert main(["verify", "--artifacts", str(root)]) == 3


@pytest.mark.parametrize("pattern", [r'"validation_loss": *[0-9.]+', r'"digest": *"[0-9a-f]{8}'])
def test_an_edited_fact_or_input_is_seen(pattern: str, root: Path) -> None:
    path = next((root / "validations").glob("validation-2-*/manifest.json"))
    text, n = re.subn(pattern, lambda found: found[0][:-2] + "00", path.read_text(), count=1)
    assert n == 1
    path.write_text(text)
    assert main(["verify", "--artifacts", str(root)]) == 3
    assert main(["inspect", path.parent.name, "--artifacts", str(root)]) == 3


def test_a_run_of_which_all_is_there_is_registered_and_keeps_what_it_says(made: Path, root: Path) -> None:
    file = root.parent / "c.yaml"
    config_of(made, name="other", training={"progressive": {"training_objective": "clm"}}).to_yaml(file)
    assert main(["train", str(file), "--artifacts", str(root)]) == 0
    assert main(["status", "other", "--artifacts", str(root)]) == 0


def test_keep_last_is_kept_although_all_is_there(tmp_path: Path) -> None:
    grow(config_of(tmp_path, keep="all"), str(tmp_path / "a"))
    file = tmp_path / "c.yaml"
    config_of(tmp_path, keep="last").to_yaml(file)
    stores = sorted((tmp_path / "a" / "activations").glob("*/store.zarr"))
    assert len(stores) == 2
    assert main(["train", str(file), "--artifacts", str(tmp_path / "a")]) == 0
    assert [store.exists() for store in stores] == [False, True]


@pytest.mark.parametrize("name", ["0001~", "0001 (copy)", "x"])
def test_a_strange_folder_among_the_attempts_is_nothing(name: str, root: Path) -> None:
    (root / "runs/r/attempts" / name).mkdir()
    assert main(["status", "--artifacts", str(root)]) == 0


def test_a_damaged_run_does_not_hide_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "runs/r", root / "runs/s")
    (root / "runs/s/attempts/0001/plan.json").write_text("")
    assert main(["status", "--artifacts", str(root), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["name"], run["state"]) for run in runs] == [("r", "done"), ("s", "damaged")]
    assert main(["status", "s", "--artifacts", str(root)]) == 3


def test_looking_writes_nothing_and_needs_no_locks_folder(root: Path) -> None:
    shutil.rmtree(root / "locks")
    assert main(["status", "--artifacts", str(root)]) == 0
    assert not is_live(Artifacts(root), "r")
    assert not (root / "locks").exists()


def test_brackets_in_a_path_are_no_markup(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = root.parent / "m[/b][red]"
    strange.parent.mkdir()
    root.rename(strange)
    assert main(["status", "r", "--artifacts", str(strange)]) == 0
    assert "m[/b][red]" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["run: {seed: 0100}", "run: {seed: 0b_}", "run: " + "[" * 3000])
def test_what_yaml_cannot_make_a_value_of_is_one_fault(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        StackWiseConfig.from_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("entry", ["hardware.threads=100000", "model.d_ff=1000000000000", "hardware.device=cuda:99999"])
def test_sizes_that_no_machine_has_are_faults(entry: str, made: Path, tmp_path: Path) -> None:
    config_of(made).to_yaml(tmp_path / "c.yaml")
    assert main(["plan", str(tmp_path / "c.yaml"), "--set", entry, "--artifacts", str(tmp_path / "a")]) == 2


def test_a_source_with_too_long_a_name_is_a_fault(made: Path, tmp_path: Path) -> None:
    config_of(made).to_yaml(tmp_path / "c.yaml")
    command = ["plan", str(tmp_path / "c.yaml"), "--artifacts", str(tmp_path / "a")]
    assert main([*command, "--set", "data.source=" + "x" * 5000]) == 2


def test_more_sampled_rows_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.validation.sampled_rows = 2**20
    stages = grow(config, str(tmp_path / "a"))
    assert stages[-1].validation_loss is not None


def test_a_work_folder_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "a").open()
    config, outside = config_of(tmp_path), tmp_path / "outside"
    grow(config, str(artifacts.root))
    ref = next(Artifacts(artifacts.root).root.glob("stacks/stack-2-*")).name
    shutil.rmtree(artifacts.root / "stacks" / ref)
    outside.mkdir()
    (artifacts.root / "work" / ref).symlink_to(outside)
    grow(config, str(artifacts.root))
    assert list(outside.iterdir()) == []
    assert not (artifacts.root / "stacks" / ref).is_symlink()


def test_hidden_files_are_not_sealed(tmp_path: Path) -> None:
    config, root = config_of(tmp_path), tmp_path / "a"
    grow(config, str(root))
    folder = next(root.glob("stacks/stack-2-*"))
    before = json.loads((folder / "manifest.json").read_text())["digest"]
    shutil.rmtree(folder)
    (root / "work" / folder.name).mkdir()
    (root / "work" / folder.name / ".DS_Store").write_bytes(b"?")
    (root / "work" / folder.name / ".hidden/.deeper").mkdir(parents=True)
    grow(config, str(root))
    assert json.loads((folder / "manifest.json").read_text())["digest"] == before


@pytest.mark.parametrize("given", ["", "ftp://host/x"])
def test_what_names_no_place_is_refused(given: str) -> None:
    with pytest.raises(ArtifactsFolderError, match="give a folder, s3://BUCKET/PREFIX"):
        Artifacts(given).open()


def test_what_a_killed_attempt_wrote_is_not_asked_of_the_disk_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, root = config_of(tmp_path), tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(fill, "failpoint", lambda task, number: 1 / 0)  # once the first shard is on the disk
        with pytest.raises(ZeroDivisionError):
            grow(config, str(root))
    (store,) = (root / "work").glob("activations-0-*")
    written = sum(path.stat().st_size for path in store.rglob("c.*"))
    usage = shutil.disk_usage(root)
    needed = 2 * prepare.forecast_store(config, Artifacts(root), _plan(config).stages[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - min(written, needed // 2)))
    grow(config, str(root))
    shutil.rmtree(next((root / "activations").glob("activations-1-*")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    config.training.progressive.target_stacks = 4
    with pytest.raises(StoreSpaceError, match="100 B are free"):
        grow(config, str(root))


def _plan(config: StackWiseConfig):
    from stackwise_core.stages.plan import plan_config

    return plan_config(config)


def test_a_loss_over_no_position_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.mask_ratio: got 1e-09"):
        grow(config_of(tmp_path, training={"mask_ratio": 1e-9}), str(tmp_path / "a"))
    assert not any((tmp_path / "a" / "stacks").iterdir())  # told before the first step


def test_damage_shows_in_the_exit_code_of_inspect(root: Path) -> None:
    (folder,) = (root / "stacks").glob("stack-2-*")
    (folder / "stack.safetensors").unlink()
    assert main(["inspect", folder.name, "--artifacts", str(root)]) == 3
    (folder / "manifest.json").unlink()
    assert main(["inspect", str(folder), "--artifacts", str(root)]) == 3
    assert Artifacts(root).state(_plan_ref(root)) is State.ABSENT


def _plan_ref(root: Path):
    from storage.runs import find_run

    return find_run(Artifacts(root), "r").plan.stages[2].ref("stack")


# ---------------------------------------------------------------- of the growth modes


def test_a_run_goes_on_although_a_file_it_named_then_has_moved(root: Path, made: Path) -> None:
    """Old attempts are read as they were: today's rules and today's disk do not lock their name."""
    (config,) = root.glob("runs/r/attempts/*/config.yaml")
    rewrite(config, config.read_text().replace("tokenizer: byte", "tokenizer: /nowhere/tokenizer.json"))
    grow(config_of(made, training={"progressive": {"training_objective": "clm"}}), str(root))
    assert main(["verify", "r", "--artifacts", str(root)]) == 0


@pytest.mark.parametrize("text", ["training:\n  progressive:\n", "\0", "training: {dnabled: 1}\n", None])
def test_a_damaged_configuration_of_an_attempt_is_named(text: str | None, root: Path, made: Path) -> None:
    (path,) = root.glob("runs/r/attempts/*/config.yaml")
    path.unlink() if text is None else rewrite(path, text)
    with pytest.raises(ArtifactCorruptError, match=re.escape(str(path))) as caught:
        grow(config_of(made, training={"progressive": {"training_objective": "clm"}}), str(root))
    by_newer_code = text is not None and "dnabled" in text
    remedy = "Use the version of StackWise that wrote it" if by_newer_code else f"Remove {path.parent}"
    assert remedy in str(caught.value)


@pytest.mark.parametrize("how", [{"from_stack": 0}, {"force": "train"}])
def test_what_newer_code_made_is_not_made_over_on_purpose(how: dict[str, Any], root: Path, made: Path) -> None:
    (path,) = root.glob("stacks/stack-0-*/manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9}))
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    config = config_of(made, training={"progressive": {"training_objective": "clm"}})
    with pytest.raises(ArtifactNewerError, match=rf"{re.escape(str(path))}.*Use the version of StackWise that wrote"):
        grow(config, str(root), **how)
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


def test_a_ratio_that_masks_nothing_has_no_loss(tmp_path: Path) -> None:
    """And where time is an input, the ratio that is told is that of a step there is."""
    text = tmp_path / "text.txt"
    text.write_text("x" * 400)
    values = {
        "data": {"source": str(text), "seq_len": 8, "validation_fraction": 0.05},
        "model": {"d_model": 16, "n_heads": 2, "blocks_per_stack": 1},
        "training": {"batch_size": 4, "steps_per_stack": 2, "warmup_steps": 0},
        "validation": {"max_sequences": 1},
        "hardware": {"threads": 1},
    }
    depth = {"time_interpretation": "depth", "num_time_steps": 2, "target_stacks": 2, "max_stacks": 2}
    values["training"] |= {"progressive": depth, "mask_ratio_min": 0.9}
    stages = grow(StackWiseConfig.from_dict(values), str(tmp_path / "a"))
    assert all(loss > 0 for stage in stages for loss in stage.by_mask_ratio.values())
    assert "0.15" not in stages[0].by_mask_ratio  # of 8 positions none is masked
    ratios = {"mask_ratio_min": 0.5, "mask_ratio_max": 0.7}
    values["training"] |= {"progressive": {**depth, "time_interpretation": "input"}, **ratios}
    stages = grow(StackWiseConfig.from_dict(values), str(tmp_path / "a"))
    assert set(stages[0].by_mask_ratio) <= {"0.5", "0.7"}


def test_the_first_stage_is_shared_by_both_ends_and_all_strategies(tmp_path: Path) -> None:
    from stackwise_core.stages.plan import plan_run

    ways = [{}, {"building_mode": "prepend"}, {"trunk_strategy": "full"}]
    ways += [{"trunk_strategy": "qlora", "progressive_qlora": True}]
    plans = [plan_run(config_of(tmp_path, training={"progressive": way}), "0" * 64) for way in ways]
    assert len({plan.stages[0].ref("stack") for plan in plans}) == 1
    assert len({plan.stages[1].ref("stack") for plan in plans}) == len(ways)
