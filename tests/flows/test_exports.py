"""`stackwise export`: a run becomes a folder for transformers, at any depth; what it refuses, and what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.artifacts import Artifacts
from storage.racks import load_rack
from storage.runs import begin_attempt
from support.commands import Run
from support.exports import greedy, opened
from support.hub import Hub, serving
from support.modes import DEPTH, MODES, G, plan_of
from support.runs import folder_of, grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

Reference = Callable[..., Path]
PREPEND = {f"{G}building_mode": "prepend", f"{G}target_stacks": 2}
TOKENS = torch.tensor([[*b"the stack grows "], [*b"a frozen trunk ."]])


@pytest.mark.parametrize("changes", [PREPEND, {**PREPEND, **DEPTH}], ids=["causal", "time as depth"])
def test_every_depth_as_it_was_recorded(tmp_path: Path, changes: dict[str, Any], run: Run) -> None:
    grown(tiny(tmp_path, changes), tmp_path / "a")
    for depth in (1, 2):
        result = run("export", "tiny", "--artifacts", "a", "--to", f"out-{depth}", "--depth", depth)
        assert (result.code, result.err) == (0, "")
        assert "equal those of the run, bit for bit" in result.out
        rack, model = load_rack("a", "tiny", depth), opened(Path(f"out-{depth}"))
        with torch.no_grad():
            assert model(TOKENS).logits.equal(rack(TOKENS))
        if rack.shape.causal:
            ours = greedy(rack, TOKENS, 4)
            assert model.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None).equal(ours)


def test_the_record_beside_the_weights(reference: Reference, run: Run) -> None:
    root = reference()
    document = run("export", "tiny", "--artifacts", root, "--to", "new/out", "--dtype", "bfloat16", "--json").document
    plan = plan_of(tiny(root.parent))
    assert [entry["id"] for entry in document["stacks"]] == [stage.ref("stack").sha256 for stage in plan.stages]
    assert document["data"] == plan.data_ref.sha256
    assert (document["run"], document["depth"], document["dtype"]) == ("tiny", 3, "bfloat16")
    assert document["read_back"]["equal"] is False
    folder = Path("new/out")
    assert {path.name for path in folder.iterdir()} == {*document["files"], "stackwise.json"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "| 2 | append, frozen, full |" in card
    assert str(root.parent) not in card  # a path of this machine


def test_what_is_unfinished_is_said(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "a"
    grown(tiny(tmp_path, {f"{G}target_stacks": 1}), root)
    config = tiny(tmp_path)
    with begin_attempt(Artifacts(root).open(), config, plan_of(config)):
        pass  # planned, and no further
    result = run("export", "tiny", "--artifacts", root, "--to", "out")
    assert result.code == 0
    assert "2 of the run's 3 stages are not finished" in result.out
    result = run("export", "tiny", "--artifacts", root, "--to", "other", "--depth", 2)
    assert result.code == 2
    assert result.faults == ["depth: got 2; the run tiny has racks of these depths: 1"]
    assert run("export", "tony", "--artifacts", root, "--to", "other").code == 2
    assert not Path("other").exists()


def test_damage_is_named(tmp_path: Path, reference: Reference, run: Run) -> None:
    shutil.copytree(reference(), tmp_path / "a")
    path = folder_of(tmp_path / "a", "stack", 1) / "stack.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = run("export", "tiny", "--artifacts", tmp_path / "a", "--to", "out")
    assert result.code == 3
    assert "stack.safetensors" in result.err
    assert not Path("out").exists()


def test_time_as_an_input_asks_for_a_step(tmp_path: Path, run: Run) -> None:
    root = tmp_path / "a"
    grown(tiny(tmp_path, {**MODES["input"], f"{G}target_stacks": 1}), root)
    result = run("export", "tiny", "--artifacts", root, "--to", "out")
    assert result.code == 2
    assert "give one of 0 to 9" in result.faults[0]
    assert run("export", "tiny", "--artifacts", root, "--to", "out", "--time-step", 3).code == 0
    with torch.no_grad():
        expected = load_rack(root, "tiny")(TOKENS, torch.tensor([3, 3]))
        assert opened(Path("out"))(TOKENS).logits.equal(expected)


def test_a_tokenizer_is_carried_along(tmp_path: Path, run: Run) -> None:
    """With its chat template and its first token, without what would run code; a changed one is refused."""
    from transformers import AutoTokenizer

    path = write_tokenizer(tmp_path)
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    path.with_name("tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    path.with_name("chat_template.jinja").write_text("{{ messages[0]['content'] }}</s>")
    root = tmp_path / "a"
    grown(tiny(tmp_path, {f"{G}target_stacks": 1, "data.tokenizer": str(path)}), root)
    assert run("export", "tiny", "--artifacts", root, "--to", "out").code == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer("the rack")["input_ids"] == [256, *(byte_ids("the rack"))]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab</s>"
    model = opened(Path("out"))
    assert (model.config.bos_token_id, model.config.eos_token_id) == (256, 257)
    settings = Path("out/tokenizer_config.json").read_text()
    assert "auto_map" not in settings
    assert json.loads(settings)["model_input_names"] == ["input_ids", "attention_mask"]
    result = run("export", "tiny", "--artifacts", root, "--to", "file", "--format", "gguf")
    assert (result.code, result.err) == (0, "")
    read = AutoTokenizer.from_pretrained("file", gguf_file="model.gguf")
    assert read("the rack", add_special_tokens=False)["input_ids"] == byte_ids("the rack")
    assert (read.bos_token_id, read.eos_token_id, read.chat_template) == (256, 257, tokenizer.chat_template)
    path.with_name("chat_template.jinja").unlink()
    path.with_name("chat_template.jinja").symlink_to("/etc/hostname")
    result = run("export", "tiny", "--artifacts", root, "--to", "other")
    assert (result.code, "chat_template.jinja beside it cannot be carried along (is a link)" in result.err) == (2, True)
    write_tokenizer(tmp_path, "<t>")
    result = run("export", "tiny", "--artifacts", root, "--to", "other")
    assert (result.code, "was trained with another" in result.err) == (2, True)
    assert not Path("other").exists()


def write_tokenizer(folder: Path, first: str = "<s>") -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([first, "</s>"])
    library.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 256)])
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def byte_ids(text: str) -> list[int]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index({" ": "\u0120"}.get(letter, letter)) for letter in text]


def test_a_corpus_of_tokens_has_no_tokenizer(tmp_path: Path, run: Run) -> None:
    np.random.default_rng(0).integers(0, 300, 4000).astype(np.uint16).tofile(tmp_path / "corpus.bin")
    changes = {f"{G}target_stacks": 1, "data.source": str(tmp_path / "corpus.bin"), "model.vocab_size": 320}
    grown(tiny(tmp_path, changes), tmp_path / "a")
    result = run("export", "tiny", "--artifacts", tmp_path / "a", "--to", "out")
    assert result.code == 0
    assert "no tokenizer was written" in result.out
    assert not Path("out/tokenizer.json").exists()
    assert opened(Path("out")).config.eos_token_id is None


def test_where_nothing_can_be_written(reference: Reference, run: Run) -> None:
    Path("file").touch()
    result = run("export", "tiny", "--artifacts", reference(), "--to", "file/out")
    assert (result.code, len(result.faults)) == (2, 1)
    assert result.faults[0].startswith("--to: got ")


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def test_a_folder_is_sent(reference: Reference, run: Run, hub: Hub) -> None:
    hub.files = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old", "LICENSE": b"mine"}
    result = run("export", "tiny", "--artifacts", reference(), "--to", "out", "--push", "owner/name")
    assert result.code == 0
    assert f"to {hub.url}/owner/name: README.md, config.json, " in result.out
    assert f"sent: {hub.url}/owner/name/commit/1" in result.out
    there = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert hub.files == {**there, "LICENSE": b"mine"}
    (created,) = hub.created
    assert created.get("private", created.get("visibility") == "private")
    assert hub.tokens - {""} == {"Bearer hf_secret"}  # the check of the card's front matter goes without
    assert "hf_secret" not in result.out + result.err


def test_what_is_not_sent(reference: Reference, run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def push(name: str) -> tuple[int, list[str]]:
        result = run("export", "tiny", "--artifacts", reference(), "--to", "out", "--force", "--push", name)
        return result.code, result.faults

    assert push("name") == (2, ["--push: got 'name'; owner/name is expected, of letters, digits, '-', '_' and '.'"])
    hub.refuses = 403
    code, faults = push("owner/name")
    assert (code, len(faults)) == (1, 1)
    assert f"{hub.url}/owner/name: it was not sent" in faults[0]
    assert opened(Path("out"))
    monkeypatch.delenv("HF_TOKEN")
    assert push("owner/name")[0] == 2
    assert not hub.files
