"""A rack grown in the library is adopted by a run: the same rack, the same growth, and clear refusals."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.run.run import grow
from flows.run.stage import Stage
from flows.run.training import train
from stackwise_core import ProgressiveRackBuilder, ProgressiveTrainer
from stackwise_core.config import StackWiseConfig
from stackwise_core.errors import ConfigError, SavedRackError, StackWiseError
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack import Rack
from stackwise_core.model.stream import Stream
from stackwise_core.stages.adopt import adopted_recipes
from stackwise_core.stages.resolve import TimeShape
from stackwise_core.stages.saved_rack import SavedRack
from stackwise_core.training.boundary import LiveTrunk
from storage.adopt import plan_in
from storage.artifacts import Artifacts
from storage.checkpoints import load_embedding, load_head, load_stack
from storage.stores import open_store
from support.adopting import library_rack, run_batches
from support.commands import Run
from support.configurations import ids
from support.modes import DEPTH, MODES, G
from support.runs import digests, grown, manifests, subset, tiny

pytestmark = pytest.mark.usefixtures("quick_disk")

Reference = Callable[..., Path]
CASES = ("nf4 dual", "int8", *(pytest.param(case, marks=pytest.mark.slow) for case in ("mixed", "input", "joint")))


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Path:
    """Two stacks grown on next tokens, in a folder."""
    return grown_rack(tmp_path_factory.mktemp("library"), {}, reference)[1]


def grown_rack(folder: Path, changes: dict[str, Any], reference: Reference) -> tuple[ProgressiveRackBuilder, Path]:
    """Grow two stacks in memory, as the run of the reference does, and save them."""
    config = tiny(reference().parent, changes)
    builder = library_rack(config, run_batches(config, reference()), 2)
    builder.save(folder / "rack")
    return builder, folder / "rack"


def as_good_as_trained(config: StackWiseConfig, n_stacks: int) -> ProgressiveRackBuilder:
    builder = ProgressiveRackBuilder(config)
    for _ in range(n_stacks):
        builder.append_stack()
    builder.trained.update(range(n_stacks))
    return builder


def adopting(rack: Path, reference: Reference, changes: dict[str, Any] | None = None) -> StackWiseConfig:
    return tiny(reference().parent, {"model.from": str(rack), **(changes or {})})


@pytest.mark.parametrize("case", CASES)
def test_growth_goes_on_from_the_library_with_the_bits_of_a_run(
    case: str, tmp_path: Path, reference: Reference
) -> None:
    """Stages 0 and 1 in the library and the rest in a run that adopts them: the later stacks of one undisturbed run."""
    whole, changes = reference(MODES[case]), MODES[case]
    builder, rack = grown_rack(tmp_path, changes, reference)
    config = tiny(whole.parent, {**changes, "model.from": str(rack)})
    made = grown(config, tmp_path / "artifacts").made
    assert made[:3] == ["prepare data -1", "adopt 0", "adopt 1"]
    assert "validate 0" not in made
    _, plan = plan_in(Artifacts(tmp_path / "artifacts"), config)
    stages, artifacts = plan.stages, Artifacts(tmp_path / "artifacts")
    kept = load_stack(artifacts, stages[:2], 1)
    assert tensor_digest(kept) == tensor_digest(builder.stack(1))
    ours, theirs = digests(tmp_path / "artifacts"), digests(whole)
    for stage in range(2, len(stages)):
        (mine,), (its,) = (subset(names, f"stack-{stage}") for names in (ours, theirs))
        assert mine != its  # another history, so another id
        assert ours[mine] == theirs[its]


def test_boundary_and_logits_are_those_of_the_library(tmp_path: Path, reference: Reference) -> None:
    """The rack decides what its stacks are, whatever the configuration of the run says of stacks."""
    quick = {"training.steps_per_stack": 1, "training.warmup_steps": 0}
    library = tiny(reference().parent, {**quick, f"{G}qlora_enabled": True, f"{G}qlora_rank": 2})
    builder, batches = ProgressiveRackBuilder(library), run_batches(library, reference())
    builder.append_stack(n_blocks=2)
    builder.prepend_stack(precision="half")
    builder.append_stack(precision="nvfp4")
    builder.append_stack(precision="qlora")
    ProgressiveTrainer(library).train_progressively(builder, batches, 4)
    builder.save(tmp_path / "rack")

    own = {f"{G}target_stacks": 5, f"{G}new_stack_precision": "bfloat16", f"{G}stacks": [{"n_blocks": 7}]}
    config, artifacts = adopting(tmp_path / "rack", reference, {**quick, **own}), Artifacts(tmp_path / "artifacts")
    grown(config, artifacts.root)
    plans = plan_in(artifacts, config)[1].stages[:4]
    assert plans[-1].spec.anatomy.order == (1, 0, 2, 3)
    assert [stack.precision for stack in plans[-1].spec.stacks] == ["full", "half", "nvfp4", "qlora"]
    rack = Rack(plans[-1].shape)
    rack.untie()
    rack.embedding, rack.head = load_embedding(artifacts, plans), load_head(artifacts, plans)
    rack.stacks.extend(load_stack(artifacts, plans, index) for index in (1, 0, 2, 3))
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert rack(tokens).equal(builder.build_rack()(tokens))

    trunk = LiveTrunk(builder.build_rack().embedding, builder.stacks, Stream("bfloat16"))
    with open_store(artifacts, plans[-1].ref("activations")) as store:
        assert store.rows(batches[0]["sequence_ids"], 0).equal(trunk(torch.as_tensor(batches[0]["input_ids"])))


def test_a_rack_with_time_as_input_brings_its_time(tmp_path: Path, reference: Reference) -> None:
    changes = {**MODES["elbo"], "training.steps_per_stack": 1, "training.warmup_steps": 0}
    _, rack = grown_rack(tmp_path, changes, reference)
    filled, plan = plan_in(Artifacts(tmp_path), adopting(rack, reference, {f"{G}training_objective": "mlm"}))
    assert plan.stages[2].shape.time == TimeShape(n_steps=10, dim=16, encoding="sinusoidal")
    assert filled.training.progressive.time_interpretation == "input"
    assert plan.stages[2].mask == plan.stages[1].mask
    assert filled.training.progressive.num_time_steps == 10


def test_a_run_that_only_adopts_validates_and_can_be_raised(rack: Path, tmp_path: Path, reference: Reference) -> None:
    root = tmp_path / "artifacts"
    assert grown(adopting(rack, reference, {f"{G}target_stacks": 2}), root).made == [
        "prepare data -1",
        "adopt 0",
        "adopt 1",
        "validate 1",
    ]
    (name,) = subset(manifests(root), "validation-1")
    facts = manifests(root)[name]["facts"]
    changes = {
        "training.new_stack_init": "copy_zero",
        "training.learning_rate": 1e-30,
        "training.min_learning_rate": 0.0,
    }
    raised = grown(adopting(rack, reference, changes), root).made
    assert raised == ["cache 1", "validate 1", "build 2", "trunk 2", "train 2", "validate 2"]
    (grown_name,) = subset(manifests(root), "validation-2")
    after = manifests(root)[grown_name]["facts"]
    # A stack whose outputs are zero changes nothing.
    assert facts["validation_loss_exact"] == facts["validation_loss"] == after["validation_loss_exact"]


def test_the_folder_may_move_or_go_once_it_is_adopted(tmp_path: Path, reference: Reference) -> None:
    rack, root = tmp_path / "rack", tmp_path / "artifacts"
    as_good_as_trained(tiny(reference().parent), 2).save(rack)
    config = adopting(rack, reference, {f"{G}target_stacks": 2})
    before = ids(plan_in(Artifacts(root), config)[1])
    grown(config, root)
    moved = rack.rename(tmp_path / "moved")
    assert ids(plan_in(Artifacts(root), adopting(moved, reference, {f"{G}target_stacks": 2}))[1]) == before
    assert grown(adopting(rack, reference), root).made == [
        "cache 1",
        "validate 1",
        "build 2",
        "trunk 2",
        "train 2",
        "validate 2",
    ]
    with pytest.raises(SavedRackError, match="no such folder"):  # another run does not know it
        grow(adopting(rack, reference, {"run.name": "other"}), str(root))


def test_another_rack_in_the_folder_is_refused_under_the_same_name(tmp_path: Path, reference: Reference) -> None:
    builder, rack = as_good_as_trained(tiny(reference().parent), 1), tmp_path / "rack"
    builder.save(rack)
    grown(adopting(rack, reference, {f"{G}target_stacks": 1}), tmp_path / "artifacts")
    with torch.no_grad():
        builder.stack(0).blocks[0].attention.q_proj.weight.add_(1.0)
    builder.save(rack)
    with pytest.raises(ConfigError, match="its rack is not what run 'tiny' adopted"):
        grow(adopting(rack, reference), str(tmp_path / "artifacts"))
    assert (
        grown(adopting(rack, reference, {"run.name": "other", f"{G}target_stacks": 1}), tmp_path / "artifacts").made[0]
        == "adopt 0"
    )


def test_what_processes_and_workers_get_plans_the_same(rack: Path, tmp_path: Path, reference: Reference) -> None:
    artifacts = Artifacts(tmp_path / "artifacts")
    config, plan = plan_in(artifacts, adopting(rack, reference))
    stage = Stage(
        adopted=plan.adopted, config=config, root=artifacts.uri, corpus=plan.data.corpus, corpus_bytes=0, index=2
    )
    for copied in (Stage.model_validate_json(stage.model_dump_json()), pickle.loads(pickle.dumps(stage))):
        assert copied.run_plan == stage.run_plan
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan
    with pytest.raises(ValueError, match="its stacks are not given"):
        Stage(config=config, root=artifacts.uri, corpus=plan.data.corpus, corpus_bytes=0, index=2)


def test_commands_show_what_was_adopted(rack: Path, tmp_path: Path, reference: Reference, run: Run) -> None:
    config = adopting(rack, reference, {"model.blocks_per_stack": 1, f"{G}stacks": [{"n_blocks": 3}]})
    config.to_yaml(tmp_path / "run.yaml")
    assert StackWiseConfig.from_yaml(tmp_path / "run.yaml") == config
    grown(config, tmp_path / "artifacts")
    planned = run("plan", tmp_path / "run.yaml").out
    assert f"1 block, adopted from {rack}" in " ".join(planned.split())
    assert f"not used: stacks.0 (model.from: {rack})" in " ".join(planned.split())
    rows = json.loads(run("plan", tmp_path / "run.yaml", "--json").out)["stages"]
    assert [row["flops"] > 0 for row in rows] == [False, False, True]
    assert [row["trainable_parameters"] > 0 for row in rows] == [False, False, True]
    status = run("status", "tiny", "--json")
    document = json.loads(status.out)
    assert (document["state"], document["stages_done"]) == ("done", 3)
    assert "append, adopted, full" in run("status", "tiny").out
    assert run("inspect", "tiny/1", "--html", tmp_path / "page.html").code == 0
    assert "<p>1 block taken from another rack, in a rack of " in (tmp_path / "page.html").read_text()
    assert f"Its first 2 stacks were taken from {rack}." in run("report", "tiny").out
    assert run("verify", "tiny").code == 0
    assert run("gc").code == 0
    assert run("verify").code == 0
    assert run("why", "stack-1").code == 0
    assert "was there already" in run("train", tmp_path / "run.yaml").out


FAULTS = {
    "model.d_model: got 64; the rack in": {"model.d_model": 64},
    "model.attention: got 'bidirectional'; the rack in": {"model.attention": "bidirectional"},
    "target_stacks: got 1; the rack in": {f"{G}target_stacks": 1},
    "target_stacks: got 5; must not exceed training.progressive.max_stacks = 4": {
        f"{G}target_stacks": 5,
        f"{G}max_stacks": 4,
    },
    "time_interpretation: got 'input'; the rack in": MODES["input"],
    "cache.dtype: got 'int8'; the rack in": {"cache.dtype": "int8"},
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_contradicts_the_rack_is_refused(message: str, rack: Path, tmp_path: Path, reference: Reference) -> None:
    config = adopting(rack, reference, FAULTS[message])
    with pytest.raises(ConfigError) as caught:
        plan_in(Artifacts(tmp_path), config)
    assert message in str(caught.value)
    assert len(caught.value.faults) == 1


def test_attention_is_the_racks(rack: Path, tmp_path: Path, reference: Reference) -> None:
    """A causal rack may go on masked; next tokens on a bidirectional one would leak."""
    filled, _ = plan_in(Artifacts(tmp_path), adopting(rack, reference, {f"{G}training_objective": "mlm"}))
    assert filled.model.attention == "causal"
    _, both = grown_rack(tmp_path, DEPTH, reference)
    with pytest.raises(ConfigError, match="every position would see its own target; the rack in"):
        plan_in(Artifacts(tmp_path), adopting(both, reference))
    custom = adopting(both, reference, {f"{G}training_objective": "custom"})
    with pytest.raises(ConfigError, match="is bidirectional: next-token targets would leak"):
        plan_in(Artifacts(tmp_path), custom)


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


BAD: dict[str, Callable[[Path], object]] = {
    "no such folder": lambda rack: rack.rename(rack.with_name("away")),
    "no rack.json in this folder": lambda rack: (rack / "rack.json").unlink(),
    "stack.safetensors: is damaged": lambda rack: edit(rack / "stack-1" / "stack.safetensors"),
    "head.safetensors: is missing": lambda rack: (rack / "head.safetensors").unlink(),
    "rack.json: is damaged": lambda rack: edit(rack / "rack.json"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_rack_is_one_sentence(message: str, tmp_path: Path, reference: Reference) -> None:
    as_good_as_trained(tiny(reference().parent), 2).save(tmp_path / "rack")
    BAD[message](tmp_path / "rack")
    with pytest.raises(StackWiseError) as caught:
        grow(adopting(tmp_path / "rack", reference), str(tmp_path / "artifacts"))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_rack_that_changes_while_the_run_starts_is_not_adopted(tmp_path: Path, reference: Reference) -> None:
    builder, artifacts = as_good_as_trained(tiny(reference().parent), 1), Artifacts(tmp_path / "artifacts").open()
    builder.save(tmp_path / "rack")
    config, plan = plan_in(artifacts, adopting(tmp_path / "rack", reference))
    with torch.no_grad():
        builder.build_rack().embedding.weight.add_(1.0)
    builder.save(tmp_path / "rack")
    rest = {"config": config, "root": artifacts.uri, "corpus": plan.data.corpus, "corpus_bytes": 0, "index": 0}
    with pytest.raises(SavedRackError, match="changed while the run was starting"):
        train(Stage(adopted=plan.adopted, needed=frozenset(("stack",)), **rest), None, None)


def test_an_id_names_the_adapters_of_both_origins(tmp_path: Path, reference: Reference) -> None:
    """Of two adopted stacks the first has its progressive adapter, and the second gets that of the run."""
    dual = {f"{G}trunk_strategy": "qlora", f"{G}qlora_enabled": True, f"{G}progressive_qlora": True}
    as_good_as_trained(tiny(reference().parent, {**dual, f"{G}progressive_qlora_rank": 2}), 2).save(tmp_path / "rack")
    found = {}
    for rank in (2, 3):
        config = adopting(tmp_path / "rack", reference, {**dual, f"{G}progressive_qlora_rank": rank})
        stage = plan_in(Artifacts(tmp_path), config)[1].stages[2]
        found[rank] = stage.ref("trunk")
        assert [stack.adapters["progressive"].rank for stack in stage.spec.stacks[:2]] == [2, rank]
    assert found[2] != found[3]


def test_the_file_of_a_configuration_in_the_folder_changes_no_id(tmp_path: Path, reference: Reference) -> None:
    for name in ("one", "two"):
        as_good_as_trained(tiny(reference().parent, {"run.name": name}), 1).save(tmp_path / name)
    one, two = (adopted_recipes(SavedRack.at(tmp_path / name)) for name in ("one", "two"))
    assert one == two


def test_an_untrained_rack_and_the_library_are_refused(tmp_path: Path, reference: Reference) -> None:
    builder = ProgressiveRackBuilder(tiny(reference().parent))
    builder.save(tmp_path / "rack")
    with pytest.raises(SavedRackError, match="has no stack yet"):
        plan_in(Artifacts(tmp_path), adopting(tmp_path / "rack", reference))
    builder.append_stack()
    builder.save(tmp_path / "rack")
    with pytest.raises(SavedRackError, match="stack 0 of the rack is not trained yet"):
        plan_in(Artifacts(tmp_path), adopting(tmp_path / "rack", reference))
    with pytest.raises(ConfigError, match=r"model\.from: .*in the library"):
        ProgressiveRackBuilder(adopting(tmp_path / "rack", reference))
    with pytest.raises(ConfigError, match="a rack is adopted to grow"):
        adopting(tmp_path / "rack", reference, {f"{G}enabled": False})


def test_a_depth_below_the_adopted_rack_has_no_head(rack: Path, tmp_path: Path, reference: Reference) -> None:
    artifacts = Artifacts(tmp_path)
    _, plan = plan_in(artifacts, adopting(rack, reference))
    with pytest.raises(ConfigError, match="only the whole of it has a head"):
        load_head(artifacts, plan.stages[:1])
