"""prefect.yaml and the forms of its flows: what an operator fills in, what is refused, what a run grows to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.exceptions import CancelledRun
from prefect.utilities.callables import parameter_schema

from flows.add_stack import add_stack, grown
from flows.compare import compare
from flows.operations import collect, validate_run
from flows.services import HEARTBEAT_SECONDS, TAG
from flows.train_rack import train_rack
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import StackOverride
from stackwise_core.errors import ConfigError, StackWiseError
from stackwise_core.stages.plan import plan_run
from storage.artifacts import artifacts_at
from storage.demand import TASK_KINDS
from storage.records import sealed, unsealed
from storage.runs import asking, begin_attempt
from support.runs import tiny

REPOSITORY = Path(__file__).parents[2]
FILE: dict[str, Any] = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
FLOWS = {
    f"{flow.fn.__module__}.{flow.fn.__name__}": flow for flow in (train_rack, compare, add_stack, validate_run, collect)
}
DEPLOYMENTS = {f"{FLOWS[entry['entrypoint']].name}/{entry['name']}": entry for entry in FILE["deployments"]}


def schema_of(flow: Any) -> dict[str, Any]:
    return parameter_schema(flow.fn).model_dump()


def nodes(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        yield path, schema
    for key, value in (
        schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    ):
        yield from nodes(value, f"{path}/{key}")


# ---------------------------------------------------------------- prefect.yaml


def test_the_deployments_have_their_names() -> None:
    names = ["train-rack/quickstart", "train-rack/local", "train-rack/docker"]
    assert list(DEPLOYMENTS) == [*names, "compare/against", "add-stack/grow", "validate/verify", "gc/nightly"]
    assert len({entry["name"] for entry in DEPLOYMENTS.values()}) == len(DEPLOYMENTS)  # a list of them shows no more
    assert {entry["work_pool"]["name"] for entry in DEPLOYMENTS.values()} == {"stackwise"}


def test_no_run_holds_what_a_server_forgets() -> None:
    """Prefect leases the slots of a deployment's concurrency limit, and ends a run whose lease it does not find."""
    assert [name for name, entry in DEPLOYMENTS.items() if "concurrency_limit" in entry] == []


def test_every_run_of_a_deployment_is_found_dead_only_if_it_is() -> None:
    """Whoever starts the worker: the automation judges what carries the tag, by heartbeats of this interval."""
    assert {tuple(entry["tags"]) for entry in DEPLOYMENTS.values()} == {(TAG,)}
    sent = {
        entry["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
        for entry in DEPLOYMENTS.values()
    }
    assert sent == {str(HEARTBEAT_SECONDS)}


def test_no_schedule_is_active() -> None:
    assert [name for name, entry in DEPLOYMENTS.items() if entry.get("schedules")] == ["gc/nightly"]
    assert [schedule["active"] for schedule in DEPLOYMENTS["gc/nightly"]["schedules"]] == [False]


def test_no_path_of_one_machine_is_in_it() -> None:
    (pull,) = FILE["pull"]
    assert pull == {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PWD }}"}}


def test_the_quickstart_is_the_configuration_file() -> None:
    parameters = DEPLOYMENTS["train-rack/quickstart"]["parameters"]
    assert parameters["config"] == yaml.safe_load((REPOSITORY / "configs/quickstart.yaml").read_text())


@pytest.mark.parametrize("name", list(DEPLOYMENTS))
def test_the_parameters_of_a_deployment_are_taken_by_its_flow(name: str) -> None:
    entry = DEPLOYMENTS[name]
    flow = FLOWS[entry["entrypoint"]]
    given = entry.get("parameters", {})
    to_say = {"run": "mine"} if name == "add-stack/grow" else {}  # of which run is to grow there is no default
    assert set(schema_of(flow)["required"]) - given.keys() == to_say.keys()  # started without a form, it runs
    flow.validate_parameters(given | to_say)


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_a_form_can_show_every_parameter(flow: Any) -> None:
    schema = schema_of(flow)
    unions = [path for path, node in nodes(schema) if {"anyOf", "oneOf", "allOf"} & node.keys()]
    assert unions == []  # Prefect's form shows a union as a box of JSON
    for path, node in nodes(schema):
        for name, field in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ():
            assert field.get("description") or "$ref" in field, f"{path}/{name} is not described"
            assert {"type", "$ref", "enum"} & field.keys(), f"{path}/{name} has no type"


def test_the_keys_that_people_change_first_come_first() -> None:
    """Prefect's form orders the fields of every section by `position`."""
    fields = {name: section["properties"] for name, section in schema_of(train_rack)["definitions"].items()}
    shown = {
        name: sorted(fields[name], key=lambda key: fields[name][key]["position"])
        for name in ("RunConfig", "DataConfig", "ModelConfig", "TrainingConfig", "ProgressiveConfig")
    }
    assert shown["RunConfig"][0] == "name"
    assert shown["DataConfig"][:3] == ["source", "tokenizer", "seq_len"]
    assert shown["ModelConfig"][:2] == ["d_model", "blocks_per_stack"]
    assert shown["TrainingConfig"][:4] == ["steps_per_stack", "batch_size", "learning_rate", "progressive"]
    assert shown["ProgressiveConfig"][0] == "target_stacks"
    assert fields["TrainingConfig"]["batch_size"]["title"] == "batch_size"


def test_literals_are_drop_downs_with_their_defaults() -> None:
    growth = schema_of(train_rack)["definitions"]["ProgressiveConfig"]["properties"]
    assert growth["trunk_strategy"]["enum"] == ["frozen", "qlora", "full"]
    assert growth["trunk_strategy"]["default"] == "frozen"
    assert growth["stack_time_mapping"]["enum"] == ["linear", "exponential", "custom"]
    stack = schema_of(add_stack)["definitions"]["StackOverride"]["properties"]
    assert stack["mode"]["enum"] == ["default", "append", "prepend", "insert"]
    assert {name: field["default"] for name, field in stack.items()} == dict(StackOverride())
    assert schema_of(train_rack)["properties"]["force"]["enum"] == ["", *TASK_KINDS]


def test_the_server_refuses_wrong_values_with_their_path() -> None:
    """What the server answers 409 from: its own validation of this schema."""
    from prefect.utilities.schema_tools.validation import validate

    def refused(config: dict[str, Any], **others: Any) -> list[str]:
        errors = validate({"config": config, **others}, schema_of(train_rack), raise_on_error=False)
        return [".".join(str(part) for part in error.absolute_path) for error in errors]

    assert refused({"run": {"name": "fine"}}) == []
    assert refused({"training": {"batch_size": 0}}) == ["config.training.batch_size"]
    assert refused({"training": {"progressive": {"trunk_strategy": "thawed"}}}) == [
        "config.training.progressive.trunk_strategy"
    ]
    assert refused({"model": {"d_modl": 64}}) == ["config.model"]
    assert refused({}, from_stack=3) == []
    # What no database holds would be in every list of runs.
    assert [refused({}, from_stack=number) for number in (-2, 10**30)] == [["from_stack"], ["from_stack"]]
    errors = validate({"keep_last": 10**30}, schema_of(FLOWS["flows.operations.collect"]), raise_on_error=False)
    assert [list(error.absolute_path) for error in errors] == [["keep_last"]]


def test_what_only_our_rules_refuse_is_told_in_one_line(tmp_path: Path) -> None:
    config = tiny(tmp_path).model_copy(deep=True)
    config.model.n_heads = 3
    config.training.progressive.target_stacks = config.training.progressive.max_stacks + 1
    with pytest.raises(ConfigError) as faults:
        config.validate()
    assert len(faults.value.faults) >= 2
    with pytest.raises(StackWiseError) as refused:
        train_rack.fn(config, str(tmp_path / "artifacts"))
    assert str(refused.value) == "; ".join(str(fault) for fault in faults.value.faults)
    assert not (tmp_path / "artifacts").exists()  # nothing was begun


# ---------------------------------------------------------------- add-stack


@pytest.fixture
def begun(tmp_path: Path) -> Callable[..., StackWiseConfig]:
    """Register an attempt of a run of two stacks, without its work, as done or as failed."""

    def begin(config: StackWiseConfig, *, fails: bool = False) -> StackWiseConfig:
        artifacts = artifacts_at(str(tmp_path)).open()
        try:
            with begin_attempt(artifacts, config, plan_run(config, "c0ffee" * 8, 9999), lambda holder: None):
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert fails
        return config

    return begin


def test_a_run_that_is_done_gets_one_stack_more(begun: Callable[..., StackWiseConfig], tmp_path: Path) -> None:
    config = begun(tiny(tmp_path, {"training.progressive.target_stacks": 2}))
    more = grown(str(tmp_path), config.run.name, StackOverride(n_blocks=3, precision="bfloat16"), "somebody")
    assert more.training.progressive.target_stacks == 3
    before, after = plan_run(config, "c0ffee" * 8, 9999), plan_run(more, "c0ffee" * 8, 9999)
    reused = [stage.ref("stack") for stage in after.stages[:2]]
    assert reused == [stage.ref("stack") for stage in before.stages]
    assert (after.stages[2].spec.stacks[2].n_blocks, after.stages[2].spec.stacks[2].precision) == (3, "bfloat16")


def test_again_after_a_failure_it_grows_to_the_same_stack(
    begun: Callable[..., StackWiseConfig], tmp_path: Path
) -> None:
    config = begun(tiny(tmp_path, {"training.progressive.target_stacks": 2}))
    stack = StackOverride(steps=7)
    more = begun(grown(str(tmp_path), config.run.name, stack, "somebody"), fails=True)
    assert grown(str(tmp_path), config.run.name, stack, "somebody") == more
    with pytest.raises(ConfigError, match="its newest attempt is not done"):  # else its wish would be lost
        grown(str(tmp_path), config.run.name, StackOverride(steps=8), "somebody")
    with pytest.raises(ConfigError, match="its newest attempt is not done"):
        grown(str(tmp_path), config.run.name, StackOverride(), "somebody")


def test_a_retry_after_all_was_done_adds_nothing(begun: Callable[..., StackWiseConfig], tmp_path: Path) -> None:
    """Killed between its last seal and Prefect's word that it is done, a flow run is retried: it has its stack."""
    config = begun(tiny(tmp_path, {"training.progressive.target_stacks": 2}))
    ask = (str(tmp_path), config.run.name, StackOverride())
    with asking("ada"):
        more = begun(grown(*ask, "ada"))
    assert grown(*ask, "ada") == more
    with asking("grace"):
        most = begun(grown(*ask, "grace"))
    assert most.training.progressive.target_stacks == 4
    assert grown(*ask, "ada") == more  # which others have grown since
    assert grown(*ask, "grace") == most


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    artifacts_at(str(tmp_path)).open()
    with pytest.raises(ConfigError, match=r"'nobody'; no such run in .*; there: none yet"):
        grown(str(tmp_path), "nobody", StackOverride(), "somebody")
    with pytest.raises(StackWiseError, match="gone"):  # the folder itself
        grown(str(tmp_path / "gone"), "nobody", StackOverride(), "somebody")


def test_a_run_that_is_stopped_stops_the_flow_that_grew_it(
    begun: Callable[..., StackWiseConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise CancelledRun("stopped on request after step 5 of 12")

    monkeypatch.setattr("flows.add_stack.train_rack", stopped)
    state: Any = add_stack.fn(begun(tiny(tmp_path)).run.name, str(tmp_path))
    assert (state.name, state.message) == ("Cancelled", "stopped on request after step 5 of 12")


def test_a_run_is_not_grown_by_code_that_came_with_it(
    begun: Callable[..., StackWiseConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[StackWiseConfig] = []
    monkeypatch.setattr("flows.add_stack.train_rack", lambda config, artifacts: asked.append(config))
    config = begun(tiny(tmp_path))
    (path,) = tmp_path.glob("runs/*/attempts/*/config.yaml")
    config.training.progressive.training_objective = "custom"
    config.training.custom_loss = "of_a_stranger:loss"
    config.to_yaml(path)
    start = path.with_name("start.json")
    start.write_text(sealed({**unsealed(start.read_bytes()), "files": {}}))  # the stranger's own
    with pytest.raises(StackWiseError, match=r"trust_functions: got false; run 'tiny' names of_a_stranger:loss"):
        add_stack.fn(config.run.name, str(tmp_path))
    assert not asked
    add_stack.fn(config.run.name, str(tmp_path), trust_functions=True)
    assert [each.training.custom_loss for each in asked] == ["of_a_stranger:loss"]
