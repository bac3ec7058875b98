"""`stackwise config`: every key of the schema, and what a file changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from flows.cli.main import main
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from support.commands import Run
from support.house import ROOT


def test_every_key_with_its_default(run: Run) -> None:
    keys = {key["name"]: key for key in run("config", "--json").document["keys"]}
    values: dict[str, object] = {}
    apply_overrides(values, {name: key["default"] for name, key in keys.items()})
    assert StackWiseConfig.from_dict(values) == StackWiseConfig()
    n_leaves = len(_leaves(StackWiseConfig().model_dump(mode="json")))
    assert len(keys) == n_leaves
    assert all(key["description"] for key in keys.values())
    printed = run("config", "cache").out
    assert "cache.dtype: " in printed
    assert "training." not in printed


def test_the_words_that_a_key_allows_are_shown_and_no_other_is_accepted(run: Run) -> None:
    keys = {key["name"]: key["choices"] for key in run("config", "--json").document["keys"] if key["choices"]}
    assert keys["data.documents"] == ["concat", "separate"]
    assert keys["training.progressive.stack_time_mapping"] == ["linear", "exponential", "custom"]
    assert keys["tracking.to"] == ["tensorboard", "wandb", "mlflow", "trackio"]
    assert "    values: concat, separate\n" in run("config", "data").out
    for name in keys:
        values: dict[str, object] = {}
        apply_overrides(values, {name: "neither"})
        with pytest.raises(ConfigError, match="neither"):
            StackWiseConfig.from_dict(values)


def test_descriptions_fit_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["config", "validation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert max(map(len, lines)) > 50


def _leaves(values: dict[str, object], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "configs" / "recipes").glob("*.yaml")))
def test_what_a_file_changes_makes_the_same_configuration(run: Run, tmp_path: Path, file: str) -> None:
    changed = run("config", "--diff", ROOT / "configs" / "recipes" / file, "--json").document["keys"]
    values: dict[str, object] = {}
    apply_overrides(values, {key["name"]: key["value"] for key in changed})
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(values))
    assert StackWiseConfig.from_yaml(again) == StackWiseConfig.from_yaml(ROOT / "configs" / "recipes" / file)


def test_a_change_is_shown_beside_the_default(run: Run) -> None:
    lines = run("config", "--diff", ROOT / "configs" / "quickstart.yaml", "--set", "training.batch_size=8").out
    assert "training.batch_size: 8" in lines
    (line,) = (line for line in lines.splitlines() if line.startswith("training.batch_size"))
    assert line.endswith("# 32")
    assert "training.learning_rate" not in lines


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("nothing",), "the sections: run, data, model"),
        (("--set", "training.batch_size=8"), "name one by --diff"),
        (("--diff", "missing.yaml"), "missing.yaml"),
    ],
)
def test_nonsense_is_a_sentence(run: Run, arguments: tuple[str, ...], word: str) -> None:
    said = run("config", *arguments)
    assert said.code == 2
    assert word in said.err
