"""A checkpoint of transformers is imported, two stacks are grown on it, and transformers loads what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.interop.families import FAMILIES
from storage.racks import load_rack
from support.checkpoints import ROPES, saved_checkpoint
from support.commands import Run
from support.exports import greedy, opened
from support.modes import G
from support.runs import grown, tiny

pytestmark = pytest.mark.usefixtures("quick_disk", "one_thread")

LLAMA, MISTRAL, QWEN2, QWEN3 = FAMILIES
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
CHECKPOINTS = {
    "Llama": (LLAMA, {"tie_word_embeddings": True, "rope_parameters": ROPES["llama3"], "max_shard_size": "40KB"}, {}),
    "Mistral": (MISTRAL, {"sliding_window": 32}, {f"{G}building_mode": "prepend"}),
    "Qwen2": (QWEN2, {"rope_parameters": ROPES["linear"]}, {f"{G}stacks": [{}, {}, {"mode": "prepend"}, {}]}),
    "Qwen3": (QWEN3, {"head_dim": 16, "rope_parameters": ROPES["yarn"]}, {}),
}
SIMPLER = ("Llama", "Mistral", "Qwen2")


@pytest.mark.parametrize("name", ["Qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in SIMPLER)])
def test_import_grow_export(name: str, tmp_path: Path, run: Run) -> None:
    family, options, changes = CHECKPOINTS[name]
    folder, model = saved_checkpoint(tmp_path / "model", family, **options)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 10], "temperature": 0.5, "do_sample": true}')
    root = tmp_path / "a"
    assert run("import", folder, "--name", "base", "--blocks-per-stack", 2, "--artifacts", root).code == 0

    document = run("export", "base", "--artifacts", root, "--to", "again", "--json").document
    assert document["read_back"]["equal"] is True
    again = opened(Path("again"))
    with torch.no_grad():
        assert again(TOKENS).logits.equal(model(TOKENS).logits)
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    for key in ("architectures", "head_dim", "rope_parameters", "tie_word_embeddings", "rms_norm_eps", "vocab_size"):
        assert ours[key] == theirs[key], key
    assert again.config.max_position_embeddings == options.get("sliding_window", 64)  # attention has no window here
    assert again.generation_config.eos_token_id == [258, 10]

    config = tiny(tmp_path, {"run.name": "grown", f"{G}target_stacks": 4, "training.steps_per_stack": 3, **changes})
    config.model = type(config.model)(from_="base", blocks_per_stack=1)  # the shape comes from what was imported
    config.training.warmup_steps = 0
    grown(config, root)
    document = run("export", "grown", "--artifacts", root, "--to", "out", "--json").document
    assert document["imported"]["family"] == name
    rack, out = load_rack(root, "grown"), opened(Path("out"))
    assert (len(rack.stacks), out.config.num_hidden_layers) == (4, 5)
    with torch.no_grad():
        logits = rack(TOKENS)
        assert out(TOKENS).logits.equal(logits)
        assert not logits.equal(model(TOKENS).logits)
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "temperature": 1.0}
    assert out.generate(TOKENS, **told).equal(greedy(rack, TOKENS, 6))
    card = Path("out/README.md").read_text()
    assert "It was imported from `model`; StackWise added 2 stacks" in card
    assert json.loads(Path("out/generation_config.json").read_bytes())["temperature"] == 0.5
