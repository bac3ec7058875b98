"""What is no checkpoint of ours is refused in one line, before a tensor is read: with key, value and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.errors import CheckpointError, ConfigError, StackWiseError
from stackwise_core.interop.checkpoint import Checkpoint
from stackwise_core.interop.config_json import describe
from stackwise_core.interop.families import FAMILIES
from support.checkpoints import rewritten, saved_checkpoint

LLAMA, MISTRAL, QWEN2, QWEN3, *_ = FAMILIES
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "architectures: got ['Gemma2ForCausalLM']"),
        ({"architectures": None, "model_type": "gpt_neox"}, "model_type: got 'gpt_neox'; its blocks are others"),
        ({"model_type": "qwen2"}, "model_type: got 'qwen2'; LlamaForCausalLM has 'llama'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type: got 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type: got 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters: got"),
        ({"rope_parameters": {**YARN, "factor": "big"}}, "its numbers do not fit"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "all layers have the same positions"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_parameters.rope_theta: got 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "names code of its own"),
        ({"hidden_size": None}, "hidden_size: got 'nothing'"),
        ({"hidden_size": 10**12}, "hidden_size: got 1000000000000"),
        ({"vocab_size": "96"}, "vocab_size: got '96'"),
        ({"num_attention_heads": 5}, "must divide hidden_size = 32"),
        ({"num_key_value_heads": 3}, "must divide num_attention_heads = 4"),
        ({"head_dim": 7}, "head_dim: got 7"),
    ],
)
def test_what_the_block_does_not_do_is_refused_by_key_and_value(changes: dict[str, Any], told: str) -> None:
    values = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        describe(values)
    assert str(caught.value).startswith("config.json: ")
    assert told in str(caught.value)


def test_both_dialects_say_the_same_positions() -> None:
    new = describe({**CONFIG, "rope_parameters": {**YARN, "rope_theta": 5e5}})
    assert describe({**CONFIG, "rope_theta": 5e5, "rope_scaling": {**YARN, "type": "yarn"}}) == new
    assert (new.shape.rope_theta, new.shape.rope_scaling and new.shape.rope_scaling.kind) == (5e5, "yarn")
    scaled = describe({**CONFIG, "rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}}).shape.rope_scaling
    assert scaled is not None
    assert scaled.attention_factor == pytest.approx(1.2772588 / 1.1386294)


def test_a_window_is_the_longest_sequence_that_is_the_same_function() -> None:
    mistral = {**CONFIG, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    qwen = {**mistral, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 64}
    windows = [describe({**mistral, "sliding_window": size}).window for size in (None, 64)]
    assert [*windows, describe(mistral).window] == [0, 64, 4096]
    assert [describe({**qwen, "use_sliding_window": used}).window for used in (False, True)] == [0, 64]


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_checkpoint(tmp_path_factory.mktemp("untied") / "model", LLAMA)[0]


@pytest.fixture
def folder(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "model"))


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _index(folder: Path, where: Any) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _link(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


Q = "model.layers.1.self_attn.q_proj"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is damaged"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json: is damaged"),
    "pickled": (_pickled, "pytorch_model.bin: is pickled, and may run code"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "truncated": (_truncated, "is damaged or truncated (has "),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged or truncated (its header"),
    "a tensor missing": (lambda f: rewritten(f, lambda t: t.pop(f"{Q}.weight")), f"lacks {Q}.weight"),
    "head missing": (lambda f: rewritten(f, lambda t: t.pop("lm_head.weight")), "lacks lm_head.weight"),
    "more tensors": (
        lambda f: rewritten(f, lambda t: t.update({f"{Q}.bias": torch.zeros(32), "x": torch.zeros(1)})),
        f"has {Q}.bias and 1 more, which config.json does not describe",
    ),
    "other shape": (
        lambda f: rewritten(f, lambda t: t.update({f"{Q}.weight": torch.zeros(16, 32)})),
        f"has {Q}.weight as [16, 32], and config.json asks for [32, 32]",
    ),
    "other type": (
        lambda f: rewritten(f, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.float64)})),
        "has model.norm.weight in F64",
    ),
    "no map": (lambda f: _index(f, {}), "has no weight_map"),
    "path in map": (lambda f: _index(f, {"a": "../a.safetensors"}), "'../a.safetensors', which is no file"),
    "shard missing": (lambda f: _index(f, {"a": "b.safetensors"}), "b.safetensors: is missing"),
    "map lacks": (lambda f: _index(f, {"lm_head.weight": "a.safetensors"}), "does not name model.embed_tokens.weight"),
    "link": (_link, "is a link that leads out of the folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(case: str, folder: Path) -> None:
    damage, told = WRONG[case]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_folder_may_be_a_link_and_hold_links_inside_itself(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    assert Checkpoint(tmp_path / "link").digest() == Checkpoint(folder).digest()


def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder_too(folder: Path, tmp_path: Path) -> None:
    """Its files are links to contents that all snapshots of the model share; a link to anywhere else stays refused."""
    model = tmp_path / "hub" / "models--owner--name"
    snapshot = model / "snapshots" / "0123abc"
    for made in (snapshot, model / "blobs"):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint(snapshot).digest() == Checkpoint(folder).digest()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        Checkpoint(snapshot)


def test_a_file_that_changes_while_it_is_read_is_noticed(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.check_unchanged()
    rewritten(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(StackWiseError, match="changed while it was read"):
        checkpoint.check_unchanged()
