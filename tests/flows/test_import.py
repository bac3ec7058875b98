"""A checkpoint becomes a run with its bits, and a run that grows on it leaves these as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.run.maintenance import verify
from stackwise_core.config import StackWiseConfig
from stackwise_core.config.yaml import apply_overrides
from stackwise_core.errors import ConfigError
from stackwise_core.interop.checkpoint import Checkpoint
from stackwise_core.interop.families import FAMILIES
from stackwise_core.model.digests import tensor_digest
from stackwise_core.model.rack import Rack
from storage.adopt import plan_in
from storage.artifacts import Artifacts
from storage.errors import ArtifactMissingError
from storage.imports import cut, import_checkpoint
from storage.racks import load_rack, open_run
from support.checkpoints import ROPES, rewritten, saved_checkpoint
from support.commands import Run
from support.runs import digests, grown, manifests, subset, tiny_values, write_corpus

pytestmark = pytest.mark.usefixtures("quick_disk")

LLAMA, MISTRAL, QWEN2, QWEN3, *_ = FAMILIES
TOKENS = torch.randint(0, 259, (2, 24), generator=torch.Generator().manual_seed(1))
G = "training.progressive."
GROWN_ON = {
    "Llama": (LLAMA, {"max_shard_size": "40KB", "tie_word_embeddings": True, "dtype": torch.bfloat16}, {}),
    "Mistral": (MISTRAL, {"dtype": torch.bfloat16}, {f"{G}building_mode": "prepend"}),
    "Qwen2": (QWEN2, {"rope_parameters": ROPES["yarn"]}, {f"{G}trunk_strategy": "qlora"}),
    "Qwen3": (QWEN3, {"head_dim": 16, "dtype": torch.float16}, {f"{G}new_stack_precision": "qlora"}),
}


def growing(folder: Path, on: str, changes: dict[str, Any] | None = None) -> StackWiseConfig:
    """A configuration that says nothing of the model but where it comes from."""
    values = tiny_values(write_corpus(folder / "corpus.txt"))
    values["model"] = {"from": on, "blocks_per_stack": 1}
    values["training"] |= {"steps_per_stack": 3, "warmup_steps": 0, "learning_rate": 1e-2, "min_learning_rate": 1e-2}
    values["cache"] = {"dtype": "float32"}
    values["training"]["progressive"]["target_stacks"] = 4
    apply_overrides(values, changes or {})
    return StackWiseConfig.from_dict(values)


def logits(rack: Rack) -> torch.Tensor:
    with torch.no_grad():
        return rack(TOKENS)


@pytest.mark.parametrize(
    "name", [name if name in ("Llama", "Qwen2") else pytest.param(name, marks=pytest.mark.slow) for name in GROWN_ON]
)
def test_a_family_is_imported_with_its_bits_and_grown_on(name: str, tmp_path: Path, run: Run) -> None:
    family, options, changes = GROWN_ON[name]
    folder, model = saved_checkpoint(tmp_path / "model", family, **options)
    root = tmp_path / "artifacts"
    told = run("import", folder, "--name", "base", "--blocks-per-stack", 2, "--artifacts", root, "--json").document
    assert (told["family"], told["blocks"], told["was_there"]) == (name, [2, 1], False)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    rack = load_rack(root, "base")
    with torch.no_grad():
        theirs = model(TOKENS, output_hidden_states=True)
        assert torch.equal(rack(TOKENS), theirs.logits)
        assert torch.equal(rack.hidden(TOKENS, 1), theirs.hidden_states[2])

    made = grown(growing(tmp_path, "base", changes), root).made
    assert not [task for task in made if task.startswith("adopt")]  # they are there
    assert made[-1] == "validate 3"
    after = load_rack(root, "tiny")
    assert len(after.stacks) == 4
    ours = {stack.creation_index: stack for stack in after.stacks}  # pyright: ignore
    for stack in rack.stacks:
        kept = {key: value for key, value in ours[stack.creation_index].state_dict().items() if ".lora_" not in key}
        kept = {key.replace(".base_layer.", "."): value for key, value in kept.items()}
        assert all(torch.equal(value, kept[key]) for key, value in stack.state_dict().items())
    assert not torch.equal(logits(after), theirs.logits)
    assert verify(str(root), None, print).problems == []


def test_the_first_step_of_growth_starts_from_the_imported_function(tmp_path: Path, run: Run) -> None:
    """`copy_zero` is the operator where none was chosen: a rate of almost nothing leaves the logits as they are."""
    folder, model = saved_checkpoint(tmp_path / "model", LLAMA)
    root = tmp_path / "artifacts"
    assert run("import", folder, "--name", "base", "--artifacts", root).code == 0
    still = {"training.learning_rate": 1e-30, "training.min_learning_rate": 0.0, "training.weight_decay": 0.0}
    config = growing(tmp_path, "base", still)
    _, plan = plan_in(Artifacts(root), config)
    assert [stage.spec.operator for stage in plan.stages[3:]] == ["copy_zero"]
    assert plan.stages[0].stack == open_run(root, "base").attempt.plan.stages[0].stack
    grown(config, root)
    with torch.no_grad():
        torch.testing.assert_close(logits(load_rack(root, "tiny")), model(TOKENS).logits, rtol=0, atol=1e-6)
    chosen = growing(tmp_path, "base", {"training.new_stack_init": "copy"})
    assert plan_in(Artifacts(root), chosen)[1].stages[3].spec.operator == "copy"


def test_blocks_inserted_between_those_of_an_import_are_all_that_changes(tmp_path: Path, run: Run) -> None:
    """Block expansion as in LLaMA Pro: identities at first, and only they train."""
    folder, _ = saved_checkpoint(tmp_path / "model", LLAMA)
    root = tmp_path / "artifacts"
    assert run("import", folder, "--name", "base", "--blocks-per-stack", 1, "--artifacts", root).code == 0
    inserted = [{"mode": "insert", "tail_stacks": 2}, {"mode": "insert", "tail_stacks": 1}]
    changes = {f"{G}stacks": [{}, {}, {}, *inserted], f"{G}tail_strategy": "frozen", f"{G}target_stacks": 5}
    config = growing(tmp_path, "base", changes)
    stages = plan_in(Artifacts(root), config)[1].stages
    assert stages[4].spec.anatomy.order == (0, 3, 1, 4, 2)
    assert [(stage.spec.operator, stage.spec.source) for stage in stages[3:]] == [("copy_zero", 0), ("copy_zero", 1)]
    assert stages[3].activations  # of the three stacks below the second one
    grown(config, root)
    before, after = load_rack(root, "base"), load_rack(root, "tiny")
    assert tensor_digest(after.head) == tensor_digest(before.head)
    assert tensor_digest(after.embedding) == tensor_digest(before.embedding)
    for old, place in enumerate((0, 2, 4)):
        assert tensor_digest(after.stacks[place]) == tensor_digest(before.stacks[old])
    for place in (1, 3):
        assert all(p.any() for name, p in after.stacks[place].named_parameters() if name.endswith("o_proj.weight"))
    assert not torch.equal(logits(after), logits(before))


def test_a_quantised_tail_trains_adapters_or_nothing(tmp_path: Path, run: Run) -> None:
    folder, _ = saved_checkpoint(tmp_path / "model", LLAMA)
    root = tmp_path / "artifacts"
    assert run("import", folder, "--name", "base", "--precision", "qlora", "--artifacts", root).code == 0
    with pytest.raises(ConfigError) as refused:
        plan_in(Artifacts(root), growing(tmp_path, "base", {f"{G}building_mode": "insert"}))
    assert "tail_strategy: got 'full'; stack 2 is quantised" in str(refused.value)
    assert "use frozen or qlora" in str(refused.value)
    config = growing(tmp_path, "base", {f"{G}building_mode": "insert", f"{G}tail_strategy": "qlora"})
    grown(config, root)
    anatomy = plan_in(Artifacts(root), config)[1].stages[3].spec.anatomy
    assert anatomy.trains == ("nothing", "nothing", "everything", "adapters")
    tail = load_rack(root, "tiny").stacks[-1]
    assert all(p.any() for name, p in tail.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `model` and the artifacts of its import `base`."""
    from flows.cli.main import main

    where = tmp_path_factory.mktemp("imported")
    folder, _ = saved_checkpoint(where / "model", MISTRAL, sliding_window=32)
    assert main(["import", str(folder), "--name", "base", "--artifacts", str(where / "artifacts")]) == 0
    return where


def test_the_same_import_is_there_already_and_another_is_refused(imported: Path, tmp_path: Path, run: Run) -> None:
    root, folder = imported / "artifacts", imported / "model"
    again = ("--name", "base", "--artifacts", root)
    before = digests(root)
    assert "base was there already: Mistral, 3 blocks in 3 stacks" in run("import", folder, *again).out
    other = run("import", folder, "--blocks-per-stack", 2, *again)
    assert (other.code, other.faults) == (
        2,
        ["--name: got 'base'; it was imported with 1 blocks per stack and precision full; choose another name"],
    )
    changed = shutil.copytree(folder, tmp_path / "model")
    rewritten(changed, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "with other files; choose another name" in run("import", changed, *again).err
    assert digests(root) == before
    shared = run("import", folder, "--name", "more", "--artifacts", root, "--json").document
    assert set(shared["stacks"]) == subset(before, "stack")
    assert list((root / "work").iterdir()) == []


def test_an_import_that_ended_early_is_completed_by_the_same_command(imported: Path, tmp_path: Path, run: Run) -> None:
    artifacts, folder = Artifacts(tmp_path / "artifacts").open(), imported / "model"

    def end(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(artifacts, "base", Checkpoint(folder), on_stack=end)
    assert list(digests(artifacts.root)) == sorted(subset(digests(imported / "artifacts"), "stack-0"))
    with pytest.raises(ArtifactMissingError, match="Import the checkpoint again as base: what is missing will be made"):
        plan_in(artifacts, growing(tmp_path, "base"))
    again = ("--name", "base", "--artifacts", artifacts.root)
    assert "began under it; choose another name" in run("import", folder, "--precision", "half", *again).err
    assert "base is imported" in run("import", folder, *again).out
    assert digests(artifacts.root) == digests(imported / "artifacts")
    grown(growing(tmp_path, "base"), artifacts.root)
    assert run("import", folder, "--name", "tiny", "--artifacts", artifacts.root).faults == [
        f"--name: got 'tiny'; it is a run that was not imported, in {artifacts.root}; choose another name"
    ]
    assert "this run was not imported" in _refusal(artifacts, growing(tmp_path, "tiny", {"run.name": "more"}))


def _refusal(artifacts: Artifacts, config: StackWiseConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_in(artifacts, config)
    return str(caught.value)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_all_end_tokens_of_a_checkpoint_end_a_text(file: str, imported: Path, tmp_path: Path, run: Run) -> None:
    folder, root = shutil.copytree(imported / "model", tmp_path / "model"), tmp_path / "artifacts"
    said = ("--prompt", "Hi", "--max-new-tokens", 6, "--json", "--artifacts")
    (whole,) = run("generate", "base", *said, imported / "artifacts").document["completions"]
    assert len(set(whole["tokens"])) > 2
    another = next(token for token in whole["tokens"] if token != whole["tokens"][0])
    (folder / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((folder / "config.json").read_bytes()) if file == "config.json" else {}
    (folder / file).write_text(json.dumps({**settings, "eos_token_id": [258, another]}))
    assert run("import", folder, "--name", "base", "--artifacts", root).code == 0
    (text,) = run("generate", "base", *said, root).document["completions"]
    assert text["tokens"] == whole["tokens"][: whole["tokens"].index(another)]
    assert run("export", "base", "--artifacts", root, "--to", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out/generation_config.json").read_bytes())["eos_token_id"] == [258, another]
    (folder / file).write_text(json.dumps({**settings, "eos_token_id": ["</s>"]}))
    refused = run("import", folder, "--name", "more", "--artifacts", root)
    assert (refused.code, refused.faults) == (2, [f"{file}: eos_token_id: got ['</s>']; a token's id, or several"])


def test_damage_of_what_was_imported_is_mended_by_importing_again(imported: Path, tmp_path: Path, run: Run) -> None:
    root = shutil.copytree(imported / "artifacts", tmp_path / "artifacts")
    at, (stack,) = ("--artifacts", root), (root / "stacks").glob("stack-1-*")
    (stack / "stack.safetensors").write_bytes(b"")
    for command in (("generate", "base", "--prompt", "a"), ("verify", "base")):
        damaged = run(*command, *at)
        assert damaged.code == 3
        assert (
            "run the command that made it again (`stackwise train` or `stackwise import`)" in damaged.out + damaged.err
        )
    shutil.rmtree(stack)
    gone = run("generate", "base", "--prompt", "a", *at)
    assert (gone.code, "a stack of the imported model is missing; import it again" in gone.err) == (2, True)
    missing = run("verify", "base", *at)
    assert "import the checkpoint again as base: what is missing will be made" in missing.out + missing.err
    assert run("import", imported / "model", "--name", "base", *at).code == 0
    assert digests(root) == digests(imported / "artifacts")


@pytest.mark.parametrize("precision", ["half", pytest.param("qlora", marks=pytest.mark.slow)])
def test_a_precision_may_be_asked_for(precision: str, imported: Path, tmp_path: Path, run: Run) -> None:
    root = tmp_path / "artifacts"
    options = ("--name", "low", "--precision", precision, "--artifacts", root)
    assert run("import", imported / "model", *options, "--json").document["precision"] == precision
    low, base = load_rack(root, "low"), load_rack(imported / "artifacts", "base")
    assert [stack.precision for stack in low.stacks] == [precision] * 3  # pyright: ignore[reportAttributeAccessIssue]
    error = (logits(low) - logits(base)).std() / logits(base).std()
    assert 0 < error < {"half": 1e-2, "qlora": 0.5}[precision]


def test_every_command_knows_an_imported_run(imported: Path, tmp_path: Path, run: Run) -> None:
    root = imported / "artifacts"
    at = ("--artifacts", root)
    assert "base" in run("status", *at).out
    status = run("status", "base", *at, "--json").document
    assert (status["state"], status["stages_done"]) == ("done", 3)
    assert run("verify", "base", *at).code == 0
    assert "0 B" in run("gc", "--dry-run", *at).out
    assert run("du", *at).code == 0
    name = sorted(subset(manifests(root), "stack-2"))[0]
    assert run("inspect", name, *at, "--html", tmp_path / "page.html").code == 0
    assert "taken from a checkpoint" in (tmp_path / "page.html").read_text()
    assert run("why", name, *at).code == 0
    copied = tmp_path / "copied"
    assert run("push", copied, "base", *at).code == 0
    assert digests(copied) == digests(root)
    assert torch.equal(logits(load_rack(copied, "base")), logits(load_rack(root, "base")))
    assert str(copied) in open_run(copied, "base").config.data.tokenizer  # the copy has its own
    assert open_run(copied, "base").tokenizer().decode(torch.tensor([72, 105]).numpy()) == "Hi"
    text = run("generate", "base", *at, "--prompt", "Hi", "--max-new-tokens", 3, "--json").document
    assert text["completions"][0]["prompt"] == "Hi"


@pytest.mark.parametrize(
    ("on", "changes", "told"),
    [
        ("nowhere", {}, "model.from: got 'nowhere'; there is neither a folder nor a run of this name; imported: base"),
        ("MODEL", {}, "it is a checkpoint; `stackwise import "),
        ("base", {"run.name": "base"}, "run.name: got 'base'; it is that of the imported model"),
        ("base", {"data.seq_len": 64}, "data.seq_len: got 64; the model of run base attends within a window of 32"),
        ("base", {"model.d_model": 64}, "model.d_model: got 64; the model of run base has 32; leave the key out"),
        ("base", {"model.qk_norm": True}, "model.qk_norm: got True; the model of run base has False"),
        ("base", {f"{G}target_stacks": 2}, "the model of run base has 3 stacks"),
    ],
)
def test_what_does_not_fit_the_imported_model_is_refused(
    on: str, changes: dict[str, Any], told: str, imported: Path, tmp_path: Path
) -> None:
    given = str(imported / "model") if on == "MODEL" else on
    assert told in _refusal(Artifacts(imported / "artifacts"), growing(tmp_path, given, changes))


def test_another_tokenizer_is_refused_and_the_same_one_may_be_named(imported: Path, tmp_path: Path) -> None:
    artifacts, its = Artifacts(imported / "artifacts"), imported / "model" / "tokenizer.json"
    named = plan_in(artifacts, growing(tmp_path, "base", {"data.tokenizer": str(its)}))[1]
    assert named == plan_in(artifacts, growing(tmp_path, "base"))[1]
    (tmp_path / "other.json").write_text(its.read_text().replace('"version": "1.0"', '"version":  "1.0"'))
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*the model of run base has another; leave the key out"):
        plan_in(artifacts, growing(tmp_path, "base", {"data.tokenizer": str(tmp_path / "other.json")}))


def test_a_tokenizer_that_does_not_match_the_vocabulary_is_refused(tmp_path: Path, run: Run) -> None:
    folder, _ = saved_checkpoint(tmp_path / "model", LLAMA, vocab_size=96)
    refused = run("import", folder, "--name", "base", "--artifacts", tmp_path / "artifacts")
    assert (refused.code, len(refused.faults)) == (2, 1)
    assert "config.json: vocab_size: got 96; tokenizer.json does not match it" in refused.err
    (folder / "tokenizer.json").unlink()
    assert run("import", folder, "--name", "base", "--artifacts", tmp_path / "artifacts").code == 0
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        open_run(tmp_path / "artifacts", "base").tokenizer()
    assert run("import", folder, "--name", "a b", "--artifacts", tmp_path / "artifacts").code == 2


@pytest.mark.parametrize(
    ("layers", "asked", "blocks"),
    [(30, None, [4] * 7 + [2]), (3, None, [1, 1, 1]), (5, 2, [2, 2, 1]), (4, 128, [4]), (5, 0, None), (5, 129, None)],
)
def test_a_model_is_cut_into_stacks(layers: int, asked: int | None, blocks: list[int] | None) -> None:
    if blocks is None:
        with pytest.raises(ConfigError, match="--blocks-per-stack"):
            cut(layers, asked)
    else:
        cuts = cut(layers, asked)
        assert [len(each) for each in cuts] == blocks
        assert [number for each in cuts for number in each] == list(range(layers))
