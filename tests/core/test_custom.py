"""The custom objective through the flow's steps: with the targets of clm it is clm, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.functions import load_function, source_digest
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import RunPlan, plan_config
from storage.artifacts import Artifacts
from storage.sequences import load_sequences
from support.runs import folder_of, grown, manifests, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

CUSTOM = {"training.progressive.training_objective": "custom"}
LOSSES = """
from torch.nn import functional as F

def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")

def smoothed(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
"""


def plan_of(config: StackWiseConfig) -> RunPlan:
    return plan_config(config)


def write_shifted(path: Path, splits: tuple[PackedSequences, PackedSequences]) -> Path:
    """Write sequences as examples whose targets are their successors; the last position has none."""
    rows = [row for split in splits for row in split.tokens.tolist()]
    with path.open("w") as file:
        for tokens in rows:
            masks = [True] * (len(tokens) - 1) + [False]
            example = {"input_ids": tokens, "targets": [*tokens[1:], tokens[-1]], "masks": masks}
            file.write(json.dumps(example) + "\n")
    return path


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> tuple[Path, dict[str, Any]]:
    """A clm run's artifacts, and the changes that make the same run of its sequences as examples."""
    folder = tmp_path_factory.mktemp("causal")
    config = tiny(folder)
    grown(config, folder / "artifacts")
    splits = load_sequences(Artifacts(folder / "artifacts"), plan_of(config).data_ref)
    n_train, n_validation = map(len, splits)
    source = write_shifted(folder / "examples.jsonl", splits)
    same = {
        "data.source": str(source),
        "data.max_sequences": 0,
        "data.validation_fraction": n_validation / (n_train + n_validation),
    }
    return folder / "artifacts", {**CUSTOM, **same}


@pytest.mark.parametrize("growth", [{}, {"training.progressive.cache_activations": False}])
def test_targets_of_clm_give_the_stacks_of_clm(
    tmp_path: Path, causal: tuple[Path, dict[str, Any]], growth: dict[str, Any]
) -> None:
    reference, same = causal
    grown(tiny(tmp_path, {**same, **growth}), tmp_path / "artifacts")
    for stage in range(3):
        found, wanted = (folder_of(root, "stack", stage) for root in (tmp_path / "artifacts", reference))
        assert found.name != wanted.name
        for name in ("stack.safetensors", "head.safetensors"):
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), (stage, name)
        facts = [
            json.loads((folder_of(root, "validation", stage) / "manifest.json").read_text())["facts"]
            for root in (tmp_path / "artifacts", reference)
        ]
        for key in ("validation_loss", "validation_loss_exact", "loss_positions"):
            assert facts[0][key] == facts[1][key]


def test_a_loss_that_is_cross_entropy_gives_its_losses(
    tmp_path: Path, causal: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-6: the built-in one is fused with the projection, and sums in another order."""
    reference, same = causal
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "losses_of_a_run.py").write_text(LOSSES)
    found: dict[str, list[float]] = {}
    for name in ("cross_entropy", "smoothed"):
        config = tiny(tmp_path, {**same, "training.custom_loss": f"losses_of_a_run:{name}"})
        root = tmp_path / name
        grown(config, root)
        found[name] = losses_of(root)
    assert found["cross_entropy"] == pytest.approx(losses_of(reference), abs=1e-6)
    assert found["smoothed"][-1] > found["cross_entropy"][-1] + 0.01  # a prediction that is sure costs more


def losses_of(root: Path) -> list[float]:
    """Every training loss of the run, in order."""
    metrics = [folder_of(root, "stack", stage) / "metrics.jsonl" for stage in range(3)]
    found = [json.loads(line) for path in metrics for line in path.read_text().splitlines()]
    losses = [record["loss"] for record in found if "loss" in record]
    assert len(losses) == 36
    return losses


def test_ids_hold_the_loss_and_that_the_corpus_is_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "losses_in_ids.py").write_text(LOSSES.replace("F.cross", "f.cross").replace("as F", "as f"))
    plans = [plan_of(tiny(tmp_path, changes)) for changes in ({}, CUSTOM)]
    for name in ("cross_entropy", "smoothed"):
        plans.append(plan_of(tiny(tmp_path, {**CUSTOM, "training.custom_loss": f"losses_in_ids:{name}"})))
    assert [plan.data.examples for plan in plans] == [False, True, True, True]
    assert [plan.data_ref == plans[1].data_ref for plan in plans] == [False, True, True, True]
    assert len({plan.stages[0].ref("stack").sha256 for plan in plans}) == 4
    assert all("examples" not in plan.data.dump() for plan in plans[:1])


def test_text_is_no_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source: .*/corpus\.txt:1: is not JSON .* one JSON object a line"):
        grown(tiny(tmp_path, CUSTOM), tmp_path / "artifacts")
    assert not manifests(tmp_path / "artifacts")


def test_validation_without_a_loss_is_told_before_training(tmp_path: Path) -> None:
    """Only the last of the three that validate has a loss position, and only two are to be looked at."""
    rows = [{"input_ids": [n, 1], "targets": [1, n], "masks": [n < 17 or n == 19] * 2} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    changes = {**CUSTOM, "data.source": str(tmp_path / "rows.jsonl"), "data.validation_fraction": 0.15}
    says = r"validation\.max_sequences: got 2; none of the 2 validation sequences has a loss position; raise it"
    for _ in range(2):  # the second time the sequences are there already
        with pytest.raises(ConfigError, match=says):
            grown(tiny(tmp_path, {**changes, "validation.max_sequences": 2}), tmp_path / "artifacts")
        assert {name.split("-")[0] for name in manifests(tmp_path / "artifacts")} == {"data"}
    grown(tiny(tmp_path, {**changes, "validation.max_sequences": 3}), tmp_path / "artifacts")


# ---------------------------------------------------------------- functions by name


def test_functions_are_found_on_the_path_and_never_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_a_stranger.py").write_text("def f():\n    return 1\n")
    with pytest.raises(ConfigError, match=r"of_a_stranger:f.*No module named.*such as PYTHONPATH=\."):
        load_function("of_a_stranger:f", "key")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_functions.py").write_text("def double(x):\n    return 2 * x\n\n\nnumber = 3\n")
    double = load_function("my_functions:double", "key")
    assert double(4) == 8
    assert load_function(double, "key") is double
    for name, says in (
        ("my_functions:triple", "key: got 'my_functions:triple'; module my_functions has nothing called 'triple'"),
        ("my_functions:number", "key: got 'my_functions:number'; module my_functions has no function called 'number'"),
        ("no_functions:f", r"key: got 'no_functions:f'; cannot be imported \(ModuleNotFoundError: .*; say where"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_function(name, "key")


def test_the_digest_is_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, body in (("first", "return x"), ("second", "return x"), ("third", "return -x")):
        (tmp_path / f"{name}_source.py").write_text(f"# {name}\ndef f(x):\n    {body}\n")
    first, second, third = (
        source_digest(load_function(f"{name}_source:f", "key"), "key") for name in ("first", "second", "third")
    )
    assert first == second != third
    with pytest.raises(ConfigError, match=r"its source cannot be read .* write it in a Python file"):
        source_digest(len, "key")
