"""`generate` and `evaluate` of a folder: an export, a saved rack, a checkpoint; what is none of these is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stackwise_core.interop.families import FAMILIES
from stackwise_core.interop.folders import open_folder
from storage.racks import load_builder, load_rack
from support.checkpoints import saved_checkpoint
from support.commands import Run
from support.exports import opened
from support.modes import G
from support.runs import grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]
PROMPTS = ("--prompt", "stack", "--prompt", "the trunk")
TEXT = "the trunk grows under a rack, stack by stack, and then another layer. " * 4


@pytest.fixture
def answers(run: Run, tmp_path: Path) -> Callable[..., tuple[list[Any], list[float]]]:
    """Return the tokens that a run or a folder makes, and its nats on a text."""
    (tmp_path / "text.txt").write_text(TEXT)

    def of(name: Any, *options: Any, evaluated: tuple[Any, ...] = ()) -> tuple[list[Any], list[float]]:
        made = run("generate", name, *PROMPTS, "--max-new-tokens", 6, "--json", *options).document
        how = ("--data", tmp_path / "text.txt", "--max-sequences", 0, "--json")
        judged = run("evaluate", name, *how, *options, *evaluated).document
        assert {"run", "folder"} & made.keys() == {"run", "folder"} & judged.keys()
        nats = [each["nats_per_token"] for each in judged["stages"]]
        return [each["tokens"] for each in made["completions"]], nats

    return of


def same(found: Any, expected: Any) -> None:
    """Where files lie in memory changes the last bits."""
    assert found == (expected[0], pytest.approx(expected[1], rel=1e-6))


def test_an_export_and_a_saved_rack_answer_as_their_run(
    reference: Reference, run: Run, answers: Any, tmp_path: Path
) -> None:
    root = reference()
    expected = answers("tiny", "--artifacts", root)
    assert run("export", "tiny", "--artifacts", root, "--to", "out").code == 0
    same(answers("out"), expected)
    load_builder(root, "tiny").save(tmp_path / "builder")
    same(answers("./builder", "--tokenizer", "byte"), expected)
    same(answers(tmp_path / "builder"), expected)
    load_rack(root, "tiny").save(tmp_path / "rack")
    assert "there is no tokenizer.json in it" in run("generate", "rack", "--prompt", "x").err
    shutil.copy("out/tokenizer.json", "rack")
    same(answers("rack", evaluated=("--seq-len", 16)), expected)
    document = run("generate", "rack", "--prompt", "x", "--json").document
    assert (document["folder"], document["stage"], document["depth"]) == ("rack", None, 3)


def test_a_checkpoint_answers_as_transformers_does(answers: Any, tmp_path: Path, run: Run) -> None:
    folder, model = saved_checkpoint(tmp_path / "model", FAMILIES[2], dtype=torch.bfloat16, max_shard_size="20KB")
    made, nats = answers(folder, "--tokenizer", "byte")
    for tokens, prompt in zip(made, PROMPTS[1::2], strict=True):
        given = torch.tensor([list(prompt.encode())])
        found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False)
        assert tokens == [token for token in found[0, len(prompt) :].tolist() if token != 258]
    ids = torch.tensor(list(TEXT.encode()))
    total = 0.0
    for row in ids.split(64):
        with torch.no_grad():
            total += float(F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum"))
    assert nats == pytest.approx([total / (len(ids) - math.ceil(len(ids) / 64))], rel=1e-5)
    table = run("evaluate", folder, "--data", tmp_path / "text.txt").out
    assert "Qwen2" in table
    assert str(folder) in table


def test_an_exported_rack_of_masked_tokens_fills_in_as_its_run(run: Run, answers: Any, tmp_path: Path) -> None:
    quick = {"training.steps_per_stack": 2, f"{G}target_stacks": 1, f"{G}training_objective": "mlm"}
    grown(tiny(tmp_path, quick), tmp_path / "a")
    assert run("export", "tiny", "--artifacts", tmp_path / "a", "--to", "out").code == 0
    same(answers("out"), answers("tiny", "--artifacts", tmp_path / "a"))
    rack = open_folder("out").rack()
    tokens = torch.tensor([[5, 256, 7, 256]])
    with torch.no_grad():
        assert rack(tokens).equal(opened(Path("out"))(tokens).logits)
    answer = run("import", "out", "--name", "x", "--artifacts", tmp_path / "a")
    assert (answer.code, answer.faults[0][:51]) == (2, "config.json: architectures: got EuroBertForMaskedLM")
    answer = run("generate", "out", "--prompt", "x", "--top-k", 2)
    assert answer.faults == ["--top-k: got 2; folder out was trained with mlm, where it means nothing; leave it out"]


def test_time_as_an_input_of_a_saved_rack(run: Run, answers: Any, tmp_path: Path) -> None:
    quick = {"training.steps_per_stack": 2, f"{G}target_stacks": 1, f"{G}training_objective": "mlm"}
    by_input = {**quick, f"{G}time_interpretation": "input", f"{G}num_time_steps": 10}
    grown(tiny(tmp_path, by_input), tmp_path / "a")
    load_builder(tmp_path / "a", "tiny").save(tmp_path / "builder")
    same(answers("builder"), answers("tiny", "--artifacts", tmp_path / "a"))
    load_rack(tmp_path / "a", "tiny").save(tmp_path / "rack")
    answer = run("generate", "rack", "--prompt", "x", "--tokenizer", "byte")
    assert (answer.code, "time is an input of it" in answer.faults[0]) == (2, True)


def test_a_run_comes_before_a_folder_of_its_name(reference: Reference, run: Run, tmp_path: Path) -> None:
    saved_checkpoint(tmp_path / "tiny", FAMILIES[0])
    how = ("--prompt", "x", "--max-new-tokens", 2, "--json")
    assert run("generate", "tiny", "--artifacts", reference(), *how).document["run"] == "tiny"
    assert run("generate", "./tiny", "--artifacts", reference(), *how).document["folder"] == "tiny"
    assert run("generate", "tiny", "--artifacts", "nowhere", *how).document["folder"] == "tiny"


def _lost(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9])


def _linked(folder: Path) -> None:
    (folder / "tokenizer_config.json").rename(folder.parent / "outside")
    (folder / "tokenizer_config.json").symlink_to(folder.parent / "outside")


def _of_another(folder: Path) -> None:
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["vocab"]["many"] = 700
    (folder / "tokenizer.json").write_text(json.dumps(text))


def _only(name: str) -> Callable[[Path], None]:
    def only(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / name).touch()

    return only


def _emptied(folder: Path) -> None:
    _only("README.md")(folder)
    for room in ("runs", "stacks"):
        (folder / room).mkdir()


def _renamed(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "architectures": ["Gemma2ForCausalLM"]}))


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (_lost("config.json"), 3, "model: holds neither rack.json nor config.json. Give a folder of save()"),
        (_only("model.gguf"), 3, "model: holds model.gguf, which is for llama.cpp. Export the run again with"),
        (_emptied, 3, "model: holds artifacts. Name a run, and give --artifacts model"),
        (_only("rack.json"), 3, "model/rack.json: is damaged"),
        (_lost("model.safetensors"), 3, "model: has neither model.safetensors nor model.safetensors.index.json"),
        (_lost("tokenizer.json"), 2, "DIR: got 'model'; there is no tokenizer.json in it; put it there, or name"),
        (_linked, 3, "model/tokenizer_config.json: is a link that leads out of the folder, to "),
        (_of_another, 2, "tokenizer: got 'model/tokenizer.json'; its largest id is 700, and the model has 264 tokens"),
        (_cut, 3, "model/model.safetensors: is damaged or truncated"),
        (_renamed, 2, "config.json: architectures: got ['Gemma2ForCausalLM']; its blocks are others than ours"),
        (shutil.rmtree, 3, "model: is not a saved rack (no such folder)"),
    ],
)
def test_what_is_no_rack_is_refused_in_one_sentence(
    damage: Callable[[Path], None], code: int, message: str, tmp_path: Path, run: Run
) -> None:
    saved_checkpoint(tmp_path / "model", FAMILIES[0])
    damage(tmp_path / "model")
    for command in (("generate", "--prompt", "x"), ("evaluate", "--data", "text.txt")):
        answer = run(command[0], "./model", *command[1:])
        assert (answer.code, answer.out, len(answer.faults)) == (code, "", 1)
        assert answer.faults[0].startswith(message)


def test_options_that_a_run_or_a_folder_does_not_have(reference: Reference, run: Run, tmp_path: Path) -> None:
    saved_checkpoint(tmp_path / "model", FAMILIES[0])
    for how, message in {
        ("generate", "tiny", "--prompt", "x", "--tokenizer", "byte"): "--tokenizer: got 'byte'; a run has the tok",
        ("generate", "./model", "--prompt", "x", "--depth", "2"): "--depth: got 2; a folder holds a rack of one depth",
        ("evaluate", "./model"): "--data: got nothing; a folder has no validation sequences; name a text",
        ("evaluate", "./model", "--seq-len", "8"): "--seq-len: got 8; it is for --data; leave it out",
    }.items():
        answer = run(*how, "--artifacts", reference())
        assert (answer.code, answer.out) == (2, "")
        assert answer.faults[0].startswith(message)
