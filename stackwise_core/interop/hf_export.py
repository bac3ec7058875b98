"""A rack as a folder that transformers loads without custom code: LlamaForCausalLM, or EuroBertForMaskedLM.

Stacks are flattened in data-flow order, adapters merged and quantised weights dequantised. What was written is read
back and compared with the rack before the folder takes its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from stackwise_core.config.schema import Objective
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.interop.card import Card, grown
from stackwise_core.interop.families import EUROBERT, FAMILIES, Family, family_of
from stackwise_core.interop.gguf import FILE, GgufFile, check_gguf
from stackwise_core.interop.parts import DTYPES, Dtype, Parts
from stackwise_core.interop.read_back import Comparison, read_back
from stackwise_core.interop.target import as_json, checked_target, fresh_folder, write_about, write_small
from stackwise_core.interop.tensor_files import TensorFiles, total_bytes, write_tensors
from stackwise_core.interop.tokenizer_json import GENERATION, tokenizer_files
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.strict import parse_object

Format = Literal["hf", "gguf"]
"""What an export writes: a folder for transformers, or a file for llama.cpp."""


class Exported(NamedTuple):
    """A folder that was written."""

    folder: Path
    architecture: str
    n_bytes: int
    comparison: Comparison


def export_rack(
    rack: Rack,
    to: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    tokenizer_path: Path | None = None,
    objective: Objective | None = None,
    format: Format = "hf",
    dtype: Dtype = "float32",
    seq_len: int = 2048,
    family: str = "",
    time_step: int | None = None,
    force: bool = False,
    card: Card | None = None,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a rack for transformers, whole or not at all, and read it back.

    Args:
        rack: the rack; it is left as it is.
        to: the folder: absent, empty, or with `force` one that was exported before.
        tokenizer: the one it was trained with; None writes none.
        tokenizer_path: its tokenizer.json; None for the byte tokenizer.
        objective: what it was trained for; None takes clm for a causal rack, and mlm for another.
        format: a folder for transformers (hf), or one with a file for llama.cpp (gguf).
        dtype: the type of the written tensors.
        seq_len: the longest text [tokens]: of the sequences that it was trained on.
        family: the one that an imported rack came from, where several have its blocks.
        time_step: for a rack whose time is an input, the step to fix.
        force: replace an earlier export.
        card: what the README.md says beside what is known here.
        about: what else `stackwise.json` says.

    Raises:
        ConfigError: the rack has no such export, or the folder holds something else; nothing is written.
        ExportError: what was read back is not the rack.
        OSError: a file cannot be written; the error names it.
    """
    shape = rack.shape
    objective = objective or ("clm" if shape.causal else "mlm")
    check_exportable(shape, objective, time_step)
    folder, parts = checked_target(to, force=force), Parts(rack, time_step)
    if format == "gguf":
        check_gguf(shape, parts.has_rope)
    masked = objective == "mlm"
    named = tokenizer_files(tokenizer, tokenizer_path, seq_len, masked=masked) if tokenizer else None
    ids = named.ids if named else {}
    config = model_config(shape, parts, ids, seq_len, dtype, objective, family)
    small = dict(named.files) if named and format == "hf" else {}
    if format == "hf":
        small["config.json"] = as_json(config)
    if format == "hf" and not masked:
        ends = {key: token for key, token in ids.items() if key != "mask_token_id"}
        carried = parse_object(small[GENERATION]) if GENERATION in small else {"_from_model_config": True}
        small[GENERATION] = as_json({**ends, **carried})
    card = card or Card(name=folder.name, how=grown(len(parts.stacks)))
    n_parameters = total_bytes(parts.entries, torch.uint8)
    text = card.text(config["architectures"][0], n_parameters, parts.n_blocks, dtype, gguf=format == "gguf")
    small["README.md"] = text.encode()
    with fresh_folder(folder, total_bytes(parts.entries, DTYPES[dtype])) as fresh:
        if format == "gguf":
            file = GgufFile(fresh / FILE, config, parts, dtype)
            hashes, read = file.write(named, card.name), file.reader()
        else:
            hashes = write_tensors(fresh, parts.entries, parts.tensors(), DTYPES[dtype])
            read = TensorFiles(fresh).read
        hashes |= write_small(fresh, small)
        found = read_back(read, rack, time_step, dtype, seq_len)
        told = {"dtype": dtype, "time_step": time_step, "read_back": found._asdict()}
        write_about(fresh, {**told, **(about or {})}, hashes)
        n_bytes = sum(path.stat().st_size for path in fresh.iterdir())
    return Exported(folder, config["architectures"][0], n_bytes, found)


# ---------------------------------------------------------------- what can be said


def check_exportable(shape: ModelShape, objective: Objective, time_step: int | None) -> None:
    """Check that transformers has an architecture for a rack.

    Raises:
        ConfigError: it has none; the message says why, and what would have one.
    """
    faults: list[Fault] = []
    if shape.time and time_step is None:
        why = "time is an input of this rack and of no architecture in transformers; an export fixes one step"
        faults.append(Fault("time_step", "None", f"{why}: give one of 0 to {shape.time.n_steps - 1}"))
    elif shape.time and time_step is not None and not 0 <= time_step < shape.time.n_steps:
        faults.append(Fault("time_step", str(time_step), f"this rack has the steps 0 to {shape.time.n_steps - 1}"))
    if not shape.time and time_step is not None:
        allowed = "time is no input of this rack; leave it out, and choose a stack's step by the depth"
        faults.append(Fault("time_step", str(time_step), allowed))
    attention, why = "causal" if shape.causal else "bidirectional", ""
    if objective == "mlm" and shape.causal:
        why = "no architecture in transformers fills masks with causal attention; with model.attention: bidirectional"
        why += " mlm has EuroBertForMaskedLM"
    if objective == "custom" and not shape.causal:
        why = "no architecture in transformers has targets of one's own with bidirectional attention; mlm has"
        why += " EuroBertForMaskedLM, and causal attention LlamaForCausalLM"
    if why:
        faults.append(Fault("objective", f"{objective} with {attention} attention", why))
    if family_for(shape) is None:
        why = "no architecture in transformers has such blocks; with causal attention there is Qwen2 for qkv_bias,"
        why += " Qwen3 for qk_norm, OLMo2 for qk_norm with norm_outputs, SmolLM3 for no_rope_interval, and Llama or"
        why += " Mistral for none of them"
        faults.append(Fault("model", f"{_extras(shape)} with {attention} attention", why))
    if faults:
        raise ConfigError(faults)


_WITH_A_WINDOW = ("mistral", "qwen2", "qwen3")
"""Their attention sees a window of 4,096 tokens unless config.json says otherwise."""


def family_for(shape: ModelShape, imported: str = "") -> Family | None:
    """Return the family that transformers knows a rack as; None if there is none.

    `imported` is the one that it came from.
    """
    whole, found = shape.d_model % shape.n_heads == 0, family_of(shape)
    like_llama = found is not None and found.model_type == "llama"
    if not shape.causal:
        return EUROBERT if whole and like_llama else None
    # Llama and EuroBERT insist on a width that the heads divide; Mistral has the same blocks and does not.
    return _MISTRAL if like_llama and (imported == _MISTRAL.name or not whole) else found


_MISTRAL = next(family for family in FAMILIES if family.model_type == "mistral")


def _extras(shape: ModelShape) -> str:
    named = [name for name in ("qkv_bias", "qk_norm", "norm_outputs", "no_rope_interval") if getattr(shape, name)]
    return ", ".join([*named, *(() if shape.has_usual_heads else ("head_dim",))])


def _without_rope(shape: ModelShape, parts: Parts) -> dict[str, Any]:
    if not shape.no_rope_interval:
        return {}
    layers = [int(there) for there in parts.has_rope]
    return {"no_rope_layers": layers, "no_rope_layer_interval": shape.no_rope_interval}


def _rope(shape: ModelShape) -> dict[str, Any] | None:
    """Return how positions are stretched in the words of transformers; None if they are not."""
    if shape.rope_scaling is None:
        return None
    said = shape.rope_scaling.model_dump(exclude_defaults=True)
    kind = said.pop("kind")
    needed = {"factor": shape.rope_scaling.factor}
    if kind != "linear":
        needed["original_max_position_embeddings"] = shape.rope_scaling.original_max_position_embeddings
    if kind == "llama3":
        needed |= {name: getattr(shape.rope_scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    return {"rope_type": kind, **said, **needed}


def model_config(
    shape: ModelShape,
    parts: Parts,
    ids: Mapping[str, int],
    seq_len: int,
    dtype: Dtype,
    objective: Objective,
    imported: str = "",
) -> dict[str, Any]:
    """Return config.json, in the words of transformers 5 and of transformers 4.

    Each reads its own: version 4 knows no `rope_parameters` and would take 10,000 for theta, without a word.
    """
    family, scaling = family_for(shape, imported), _rope(shape)
    assert family is not None
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": parts.n_blocks,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        **({"sliding_window": None} if family.model_type in _WITH_A_WINDOW else {}),
        **_without_rope(shape, parts),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": parts.tied,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **({"mask_token_id": ids["mask_token_id"]} if objective == "mlm" and "mask_token_id" in ids else {}),
    }
