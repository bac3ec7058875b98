"""Racks written for transformers: transformers' own models are the reference."""

from __future__ import annotations

import errno
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.errors import ConfigError
from stackwise_core.interop import gguf, hf_export, tensor_files
from stackwise_core.interop.hf_export import export_rack
from stackwise_core.interop.read_back import ExportError
from stackwise_core.model.blocks import Stack, TimeEmbedding, initialise
from stackwise_core.model.growth_operators import new_rack
from stackwise_core.model.rack import Rack
from stackwise_core.model.saving import serialised
from stackwise_core.stages.resolve import ModelShape, TimeShape
from support.exports import greedy, opened
from support.racks import SHAPE, TOKENS, mixed_rack

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


def rack_of(*n_blocks: int, **changes: Any) -> Rack:
    """Return a random rack over bytes whose stacks were prepended in turn; norms differ from one."""
    shape = ModelShape.model_validate({**SHAPE.model_dump(), "vocab_size": 264, **changes})
    rack = new_rack(shape, seed=1)
    for index, count in enumerate(n_blocks):
        stack = Stack(shape, count, index)
        initialise(stack, index)
        rack.stacks.insert(0, stack)
    generator = torch.Generator().manual_seed(2)
    for parameter in rack.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.normal_(1.0, 0.2, generator=generator)
        else:
            parameter.mul_(4.0)  # so that attention is not flat
    return rack.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 77.0, "norm_eps": 1e-2},
        {"n_heads": 4, "n_kv_heads": 4, "tie_embeddings": False},
    ],
    ids=["tied", "untied"],
)
def test_a_causal_rack_is_a_llama(tmp_path: Path, changes: dict[str, Any]) -> None:
    rack = rack_of(1, 2, **changes)
    if not rack.tied:
        rack.head.projection.weight.mul_(-1.5)
    exported = export_rack(rack, tmp_path / "out", tokenizer=ByteTokenizer(), seq_len=64)
    model = opened(exported.folder)
    assert (exported.architecture, exported.comparison.equal) == ("LlamaForCausalLM", True)
    prompt = TOKENS + 40
    with torch.no_grad():
        assert model(prompt).logits.equal(rack(prompt))
    assert model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).equal(greedy(rack, prompt, 8))
    assert model.generation_config.eos_token_id == ByteTokenizer.end_token
    assert model.config.tie_word_embeddings == rack.tied


QWEN2, QWEN3 = {"qkv_bias": True, "head_dim": 12}, {"qk_norm": True, "n_heads": 3, "head_dim": 8}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "high_freq_factor": 3.0}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "truncate": False}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen2", {**QWEN2, "rope_scaling": {"kind": "linear", "factor": 4.0}}),
        ("Qwen3", {**QWEN3, "rope_scaling": YARN}),
        ("Llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3}),
        ("Mistral", {"n_heads": 3, "head_dim": 8}),
    ],
)
def test_every_family(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    rack = rack_of(1, 2, **changes)
    for name, parameter in rack.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_()
    exported = export_rack(rack, tmp_path / "out", tokenizer=ByteTokenizer(), seq_len=8)
    assert (exported.architecture, exported.comparison.equal) == (f"{architecture}ForCausalLM", True)
    model = opened(exported.folder)
    tokens = torch.arange(2 * 100).view(2, 100) % 256
    with torch.no_grad():
        assert model(tokens).logits.equal(rack(tokens))
    assert model.config.max_position_embeddings == 8
    if "rope_scaling" not in changes:  # transformers reads no Mistral from GGUF, llama.cpp takes it for a Llama
        assert export_rack(rack, tmp_path / "other", format="gguf").comparison.equal
        return
    version_4 = json.loads((exported.folder / "config.json").read_bytes())
    assert version_4["rope_scaling"] | {"rope_theta": rack.shape.rope_theta} == version_4["rope_parameters"]
    with pytest.raises(ConfigError, match=r"model\.rope_scaling"):
        export_rack(rack, tmp_path / "other", format="gguf")


def test_every_precision_with_adapters_merged(tmp_path: Path) -> None:
    """Sums in another order: what merging changes is 1e-6 of the largest logit, what it would leave out is 1e-1."""
    rack = mixed_rack(["full", "half", "nvfp4", "bfloat16", "qlora"], tied=False)
    found = export_rack(rack, tmp_path / "out").comparison
    with torch.no_grad():
        wanted, logits = rack(TOKENS), opened(tmp_path / "out")(TOKENS).logits
    assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert found.difference < 1e-5
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_bidirectional_rack_fills_masks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    rack = rack_of(2, 1, causal=False)
    folder = export_rack(rack, tmp_path / "out", tokenizer=ByteTokenizer(), seq_len=64).folder
    model, tokenizer = opened(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert model(TOKENS).logits.equal(rack(TOKENS))
        ids = torch.tensor([[*b"a", 256, *b"c"]])
        likeliest = rack(ids)[0, 1].softmax(-1).topk(3)
    filled = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)("a[MASK]c")
    assert [entry["token"] for entry in filled] == likeliest.indices.tolist()
    assert [entry["score"] for entry in filled] == pytest.approx(likeliest.values.tolist())


def test_a_step_of_time_as_an_input(tmp_path: Path) -> None:
    time = TimeShape(n_steps=5, dim=6, encoding="sinusoidal")
    rack = rack_of(1, causal=False, time=time.model_dump())
    assert isinstance(rack.embedding.time, TimeEmbedding)
    for step in (0, 4):
        export_rack(rack, tmp_path / str(step), time_step=step)
        with torch.no_grad():
            logits = opened(tmp_path / str(step))(TOKENS).logits
            assert logits.equal(rack(TOKENS, torch.full((2,), step)))
    for step, received in ((None, "None"), (5, "5"), (-1, "-1")):
        with pytest.raises(ConfigError, match=rf"time_step: got {received}; .*0 to 4"):
            export_rack(rack, tmp_path / "none", time_step=step)
    with pytest.raises(ConfigError, match="time is no input"):
        export_rack(rack_of(1), tmp_path / "none", time_step=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_in_several_files(tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MOST_OF_A_FILE", 20_000)
    rack = rack_of(1, 2)
    exported = export_rack(rack, tmp_path / "out", dtype=dtype)
    files = sorted(path.name for path in exported.folder.glob("*.safetensors"))
    assert len(files) > 2
    assert max((exported.folder / name).stat().st_size for name in files) < 25_000
    model, kind = opened(exported.folder), getattr(torch, dtype)
    assert model.dtype == kind
    for parameter in rack.parameters():
        parameter.copy_(parameter.to(kind))
    with torch.no_grad():
        assert model.float()(TOKENS).logits.equal(rack(TOKENS))
    assert 0 < exported.comparison.difference < 0.05


def test_bytes_are_the_tokens_of_any_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_rack(rack_of(1), tmp_path / "out", tokenizer=ByteTokenizer())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    draw = random.Random(0)
    characters = [*map(chr, range(256)), *"€ß字😀\u0301\u200d\ufeff", "[MASK]", "[END]", "  ", "\r\n"]
    for _ in range(100):
        text = "".join(draw.choices(characters, k=draw.randrange(30)))
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (258, 257, 256)


def test_a_config_in_the_words_of_version_4_and_5(tmp_path: Path) -> None:
    export_rack(rack_of(1, rope_theta=5e5), tmp_path / "out", tokenizer=ByteTokenizer(), seq_len=48)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, None)
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["max_position_embeddings"] == 48
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_bytes())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (258, 257)


@pytest.mark.parametrize(("objective", "causal", "instead"), [("mlm", True, "EuroBert"), ("custom", False, "Llama")])
def test_what_has_no_export_says_what_would(tmp_path: Path, objective: Any, causal: bool, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"objective: got {objective} with .* attention; .*{instead}"):
        export_rack(rack_of(1, causal=causal), tmp_path / "out", objective=objective)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"qkv_bias": True, "qk_norm": True}, {"qk_norm": True, "causal": False}])
def test_blocks_that_no_family_has(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model: got .*qk_norm with .* attention; .*Qwen3 for qk_norm"):
        export_rack(rack_of(1, **changes), tmp_path / "out")


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, QWEN2, QWEN3],
    ids=["tied", "untied", "Qwen2", "Qwen3"],
)
def test_a_gguf_file_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    rack = rack_of(1, 2, **{"n_heads": 4, "rope_theta": 77.0, **changes})
    exported = export_rack(rack, tmp_path / "out", tokenizer=ByteTokenizer(), seq_len=64, format="gguf")
    wide = export_rack(rack, tmp_path / "hf").folder if "head_dim" in changes else None
    # transformers reads no width of heads from a GGUF file, as llama.cpp does.
    how = {"config": AutoConfig.from_pretrained(wide, max_position_embeddings=64, eos_token_id=258)} if wide else {}
    model = opened(exported.folder, gguf_file="model.gguf", **how)
    with torch.no_grad():
        assert model(TOKENS).logits.equal(rack(TOKENS))
    assert (model.config.max_position_embeddings, model.config.eos_token_id) == (64, 258)
    tokenizer = AutoTokenizer.from_pretrained(exported.folder, gguf_file="model.gguf")
    text = "grüße \u00ff\u00ff 😀  x"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert {path.name for path in exported.folder.iterdir()} == {"model.gguf", "README.md", "stackwise.json"}


@pytest.mark.parametrize("changes", [{"no_rope_interval": 4}, {"qk_norm": True, "norm_outputs": True}], ids=str)
def test_gguf_files_that_transformers_does_not_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    """By what llama.cpp takes: names, and for SmolLM3 the channels of a pair side by side."""
    from gguf import GGUFReader

    rack = rack_of(5, n_heads=4, **changes)
    export_rack(rack, tmp_path / "out", format="gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(tmp_path / "out/model.gguf").tensors}
    block = rack.stacks[0].get_submodule("blocks.4")
    wanted = {f"blk.4.{theirs}.weight": block.get_submodule(ours).weight for ours, theirs in IN_GGUF.items()}
    if "qk_norm" in changes:
        after = {"attention_norm": "post_attention_norm", "ffn_norm": "post_ffw_norm"}
        after |= {f"attention.{each}_norm": f"attn_{each}_norm" for each in "qk"}
    else:
        after = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
        width = rack.shape.head_dim
        paired = [c + half * width // 2 for c in range(width // 2) for half in range(2)]
        for each in "qk":
            name = f"blk.4.attn_{each}.weight"
            rows = [h * width + c for h in range(len(wanted[name]) // width) for c in paired]
            wanted[name] = wanted[name][rows]
    wanted |= {f"blk.4.{theirs}.weight": block.get_submodule(ours).weight for ours, theirs in after.items()}
    assert {name for name in found if name.startswith("blk.4.")} == set(wanted)
    assert all(found[name].equal(weight) for name, weight in wanted.items())


IN_GGUF = {
    **{f"attention.{each}_proj": f"attn_{each}" for each in "qkv"},
    "attention.o_proj": "attn_output",
    **{f"ffn.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
}


def test_half_a_gguf_file_and_what_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rack = rack_of(1)
    export_rack(rack, tmp_path / "out", format="gguf", dtype="bfloat16")
    model = opened(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    for parameter in rack.parameters():
        if parameter.dim() > 1:  # norms stay float32
            parameter.copy_(parameter.bfloat16())
    with torch.no_grad():
        assert model(TOKENS).logits.equal(rack(TOKENS))
    with pytest.raises(ConfigError, match=r"--format: got 'gguf'; llama\.cpp has no architecture that fills masks"):
        export_rack(rack_of(1, causal=False), tmp_path / "other", format="gguf")
    with pytest.raises(ConfigError, match=r"every fourth layer of SmolLM3 without RoPE, and here it is \[2\]; use hf"):
        export_rack(rack_of(3, no_rope_interval=2), tmp_path / "other", format="gguf")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'stackwise\[gguf\]'"):
        export_rack(rack, tmp_path / "other", format="gguf")


# ---------------------------------------------------------------- the folder


def test_a_folder_with_anything_else_in_it_stays(tmp_path: Path) -> None:
    rack, out = rack_of(1), tmp_path / "out"
    out.mkdir()
    export_rack(rack, out)
    with pytest.raises(ConfigError, match=r"--to: .* is not empty"):
        export_rack(rack, out)
    export_rack(rack, out, dtype="bfloat16", force=True)
    assert json.loads((out / "config.json").read_bytes())["dtype"] == "bfloat16"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which was not exported"):
        export_rack(rack, out, force=True)
    (out / "stackwise.json").unlink()
    with pytest.raises(ConfigError, match="holds something that was not exported"):
        export_rack(rack, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="it is a file"):
        export_rack(rack, tmp_path / "file")


def test_tensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    types = {"a": torch.float32, "z": torch.float32, "b": torch.uint8, "c": torch.bfloat16, "e": torch.float16}
    tensors = {f"{name}.weight": torch.randn(3, n + 1).to(dtype) for n, (name, dtype) in enumerate(types.items())}
    tensors |= {"flag": torch.tensor(True), "turned": torch.randn(4, 3).T}
    told = tensor_files.write_named(tmp_path / "file", tensors)
    assert (tmp_path / "file").read_bytes() == (data := serialised(tensors))
    assert told == hashlib.sha256(data).hexdigest()


def test_what_reads_back_differently_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rack, out, write = rack_of(1, 1), tmp_path / "out", tensor_files.write_tensors
    export_rack(rack, out)
    before = (out / "config.json").stat()

    def damaging(folder: Path, *others: Any) -> Any:
        hashes = write(folder, *others)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 64  # of the head's norm, which every logit depends on
        (folder / "model.safetensors").write_bytes(data)
        return hashes

    monkeypatch.setattr(hf_export, "write_tensors", damaging)
    with pytest.raises(ExportError, match="was read back with other bits"):
        export_rack(rack, out, force=True)
    assert (out / "config.json").stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_export, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_rack(rack_of(1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_float16(tmp_path: Path) -> None:
    rack = rack_of(1)
    rack.embedding.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match="dtype: got float16; some weights are too large for it; use bfloat16"):
        export_rack(rack, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())
