"""A checkpoint of transformers is imported, two stacks are grown on it, and transformers loads what is exported."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.interop.checkpoint import Checkpoint
from stackwise_core.interop.families import FAMILIES
from stackwise_core.interop.hf_import import checkpoint_rack
from storage.racks import load_rack
from support.checkpoints import ROPES, saved_checkpoint
from support.children import Child, run_to
from support.commands import Run
from support.exports import greedy, opened
from support.modes import G
from support.runs import digests, grown, subset, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

FAMILY = {family.name: family for family in FAMILIES}
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({"tie_word_embeddings": True, "rope_parameters": ROPES["llama3"], "max_shard_size": "40KB"}, {}),
    "Mistral": ({"sliding_window": 32}, {f"{G}building_mode": "prepend"}),
    "Qwen2": ({"rope_parameters": ROPES["linear"]}, {f"{G}stacks": [{}, {}, {"mode": "prepend"}, {}]}),
    "Qwen3": ({"head_dim": 16, "rope_parameters": ROPES["yarn"]}, {}),
    "SmolLM3": ({"tie_word_embeddings": True}, {f"{G}building_mode": "prepend", "model.blocks_per_stack": 2}),
    "OLMo2": ({}, {}),
}
"""What the checkpoint has, and how it is grown on."""
QUICK = "Qwen3"
GROWTH = {"run.name": "grown", f"{G}target_stacks": 4, "training.steps_per_stack": 6, "training.warmup_steps": 0}


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY]
)
def test_import_grow_export(name: str, tmp_path: Path, run: Run) -> None:
    options, changes = CHECKPOINTS[name]
    folder, model = saved_checkpoint(tmp_path / "model", FAMILY[name], **options)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 10], "temperature": 0.5, "do_sample": true}')
    root = tmp_path / "a"
    assert run("import", folder, "--name", "base", "--blocks-per-stack", 2, "--artifacts", root).code == 0
    alone = shutil.copytree(root, tmp_path / "alone")

    document = run("export", "base", "--artifacts", root, "--to", "again", "--json").document
    assert document["read_back"]["equal"] is True
    again = opened(Path("again"))
    with torch.no_grad():
        assert again(TOKENS).logits.equal(model(TOKENS).logits)
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    for key in ("architectures", "head_dim", "rope_parameters", "tie_word_embeddings", "rms_norm_eps", "vocab_size"):
        assert ours.get(key) == theirs.get(key), key
    assert again.config.max_position_embeddings == options.get("sliding_window", 64)  # attention has no window here
    assert again.generation_config.eos_token_id == [258, 10]

    said = {**GROWTH, "model": {"from": "base", "blocks_per_stack": 1}, **changes}  # its shape comes from the import
    assert Child(tmp_path, root, said, "train:5:KILL").go().ended() == -signal.SIGKILL
    assert grown(tiny(tmp_path, said), root).made[0] == "train 2"
    grown(tiny(tmp_path, said), alone)
    assert digests(root) == digests(alone)

    document = run("export", "grown", "--artifacts", root, "--to", "out", "--json").document
    assert document["imported"]["family"] == name
    rack, out = load_rack(root, "grown"), opened(Path("out"))
    assert (len(rack.stacks), out.config.num_hidden_layers) == (4, sum(len(stack.blocks) for stack in rack.stacks))
    with torch.no_grad():
        logits = rack(TOKENS)
        assert out(TOKENS).logits.equal(logits)
        assert checkpoint_rack(Checkpoint("out"))(TOKENS).equal(logits)
        assert not logits.equal(model(TOKENS).logits)
    if name == "SmolLM3":  # two stacks of two blocks before the three: copies of the first two
        assert out.config.no_rope_layers == [1, 0, 1, 0, 1, 0, 1]
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "temperature": 1.0}
    assert out.generate(TOKENS, **told).equal(greedy(rack, TOKENS, 6))
    assert rack.generate(TOKENS, 6) == greedy(rack, TOKENS, 6)[:, TOKENS.shape[1] :].tolist()
    card = Path("out/README.md").read_text()
    assert "It was imported from `model`; StackWise added 2 stacks" in card
    carried = json.loads(Path("out/generation_config.json").read_bytes())
    assert (carried["temperature"], carried["eos_token_id"]) == (0.5, [258, 10])


def test_an_import_killed_anywhere_is_completed_by_the_same_command(tmp_path: Path, run: Run) -> None:
    folder, _ = saved_checkpoint(tmp_path / "model", FAMILY["Llama"])
    said, root = ("import", folder, "--name", "base", "--artifacts"), tmp_path / "a"
    for failpoint, sealed in [("import-write:1", []), ("import-seal:1", ["stack-0"])]:
        assert run_to(f"{failpoint}:KILL", *said, root) == -signal.SIGKILL
        assert [name.rsplit("-", 1)[0] for name in subset(digests(root) if sealed else (), "stack")] == sealed
        assert list((root / "work").iterdir()) != []
    assert "base is imported" in run(*said, root).out
    assert run(*said, tmp_path / "b").code == 0
    assert digests(root) == digests(tmp_path / "b")
    assert list((root / "work").iterdir()) == []
