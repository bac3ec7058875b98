"""The configuration in YAML: there and back, with errors that name the line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import StackOverride
from stackwise_core.config.yaml import parse_value
from stackwise_core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def read_yaml(text: str | bytes, **overrides: Any) -> StackWiseConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return StackWiseConfig.from_yaml(path, overrides)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        *(("run", {"name": name}) for name in ("1e3", "12e4567", "true")),
        *(("data", {"source": source}) for source in ("null", "a\x85b", "a: b # c\x85\ufeff")),
        *(("training", {"learning_rate": rate}) for rate in (1e16, 1e300)),
    ],
)
def test_what_looks_like_something_else_round_trips(section: str, value: dict[str, Any]) -> None:
    config = StackWiseConfig.from_dict({section: value})
    assert read_yaml(config.to_yaml()) == config


def test_to_yaml_writes_what_it_returns(tmp_path: Path) -> None:
    config = StackWiseConfig.from_dict({"run": {"seed": 3}, "data": {"source": "texts/*.txt"}})
    text = config.to_yaml(tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == text
    assert StackWiseConfig.from_yaml(tmp_path / "run.yaml") == config


def test_to_yaml_writes_utf8_in_any_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from stackwise_core.config import StackWiseConfig as C;"
        "C.from_dict({'data': {'source': chr(252) + '.txt'}}).to_yaml(sys.argv[1])"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **locale}, check=True, capture_output=True)
    assert StackWiseConfig.from_yaml(tmp_path / "run.yaml").data.source == "ü.txt"


def test_a_callable_cannot_be_written() -> None:
    config = StackWiseConfig()
    config.training.progressive.time_mapping = lambda *_: 0
    with pytest.raises(ConfigError, match=r"training\.progressive\.time_mapping"):
        config.to_yaml()


def test_numbers_of_yaml() -> None:
    text = "training: {learning_rate: 1e-3, min_learning_rate: 1E-4, weight_decay: 5e-2, gradient_clip: 2}"
    training = read_yaml(text).training
    assert (training.learning_rate, training.min_learning_rate) == (0.001, 0.0001)
    assert (training.weight_decay, training.gradient_clip) == (0.05, 2.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("+2E5", 2e5),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{0: {rank: 4}}", {0: {"rank": 4}}),
        ("clm", "clm"),
        ("e5", "e5"),
        ("cuda:0", "cuda:0"),
        ("'8'", "8"),
        ("[1, 2", "[1, 2"),
        ("my file #1.txt", "my file #1.txt"),
        ("#1.txt", "#1.txt"),
        ("'a' # b", "a"),
        ("[1] # two", [1]),
        ("0100", "0100"),  # not 64
        ("1:30", "1:30"),  # not 90
        ("1:30.5", "1:30.5"),
        ("2024-01-31", "2024-01-31"),
        ("0x10", 16),
        ("0", 0),
    ],
)
def test_values_on_the_command_line(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_are_applied_on_top() -> None:
    overrides = {"training.batch_size": 8, "training.progressive.target_stacks": 2, "run.seed": 7}
    config = read_yaml("training: {batch_size: 4, steps_per_stack: 50}", **overrides)
    assert (config.training.batch_size, config.training.steps_per_stack) == (8, 50)
    assert (config.training.progressive.target_stacks, config.run.seed) == (2, 7)
    with pytest.raises(ConfigError, match=r"training\.batch_size\.x: got 1; batch_size is a value"):
        read_yaml("training: {batch_size: 4}", **{"training.batch_size.x": 1})


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("run: {seed: 1}\ntraining:\n  batch_size: 4\n  batch_size: 8\n", 4, "the key 'batch_size' stands here twice"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", 2, "the key 'run' stands here twice"),
        ("run:\n  seed: 1\n bad\n", 3, "mend the YAML on this line"),
        ("run: {seed: 1\n\ndata: x}}", 3, "mend the YAML on this line"),
        ("run:\n  seed: 0100\n", 2, "0100 with a leading 0 is a number to the base 8 in YAML; write 100, or quote it"),
        ("run: !!python/object/apply:os.getcwd []\n", 1, "constructor"),
    ],
)
def test_broken_yaml_names_the_line(text: str, line: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_yaml(text)
    assert caught.value.faults[0].path.endswith(f"run.yaml:{line}")


@pytest.mark.parametrize("text", ["run:\n  name: {{ name }}\n", "? [a, b]\n: 1\n"])
def test_unhashable_keys_are_broken_yaml(text: str) -> None:
    assert parse_value("{{ name }}") == "{{ name }}"
    with pytest.raises(ConfigError, match=r"run\.yaml:\d"):
        read_yaml(text)


def test_merge_keys_work() -> None:
    text = "training:\n  progressive:\n    stacks: [&a {steps: 30}, {<<: *a, n_blocks: 3}]\n"
    assert read_yaml(text).training.progressive.stacks[1] == StackOverride(steps=30, n_blocks=3)


@pytest.mark.parametrize("text", ["- run\n- data\n", "just words", "3", b"run: {name: \xff}", b"run: {name: 'a\x00'}"])
def test_no_configuration_at_all(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(text)


def test_what_looks_like_a_date_is_a_name() -> None:
    assert read_yaml("run: {name: 2024-01-31}").run.name == "2024-01-31"
    assert read_yaml("data: {source: 1:30}").data.source == "1:30"
    with pytest.raises(ConfigError, match=r"run\.seed: got '1:30'; input should be a valid integer"):
        read_yaml("run: {seed: 1:30}")


def test_a_device_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"/dev/zero: got longer than 16,777,216 bytes; give a readable YAML"):
        StackWiseConfig.from_yaml("/dev/zero")


def test_a_huge_value_is_not_echoed_whole() -> None:
    huge = "x" * 100_000
    for text in (f"run: {{seed: {huge}}}", f"run: {{{huge[:1000]}: 1}}", f"data: {{tokenizer: {huge}}}", f"{huge}: 1"):
        with pytest.raises(ConfigError) as caught:
            read_yaml(text)
        assert len(str(caught.value)) < 1_000
    with pytest.raises(ConfigError) as caught:
        read_yaml("", **{f"run.seed.{huge}": huge})
    assert len(str(caught.value)) < 1_000


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: got no such file"):
        StackWiseConfig.from_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=f"{tmp_path}: got a folder"):
        StackWiseConfig.from_yaml(tmp_path)
    assert read_yaml("# nothing but a comment\n") == StackWiseConfig()
