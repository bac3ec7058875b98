"""Tiny random models of transformers, and their tensors under the names of a rack."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stackwise_core.data.tokenizer import ByteTokenizer
from stackwise_core.interop.families import EMBEDDING, HEAD, NORM, Family, block_tensors, layer
from stackwise_core.interop.tokenizer_json import tokenizer_files
from stackwise_core.model.blocks import Stack
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all keys": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.25,
    },
}


def reference_model(family: Family, **changes: Any) -> Any:
    """Return a random model of transformers in float32, in which every norm and bias differs from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        name = family.architecture.removesuffix("ForCausalLM")
        own = {"no_rope_layers": [1, 0, 1], "pad_token_id": None} if family.no_rope else {}
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, family.architecture)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn(parameter.shape) * 0.3)
                    else:
                        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def as_rack(shape: ModelShape, model: Any, blocks_per_stack: int = 1) -> Rack:
    """Return a rack with the tensors of a model of transformers."""
    state: dict[str, Tensor] = model.state_dict()
    n_layers = model.config.num_hidden_layers
    rack = Rack(shape)
    rack.stacks.extend(Stack(shape, blocks_per_stack, n) for n in range(n_layers // blocks_per_stack))
    names = {
        f"stacks.{n // blocks_per_stack}.blocks.{n % blocks_per_stack}.{ours}": f"{layer(n)}{theirs}"
        for n in range(n_layers)
        for ours, theirs in block_tensors(shape).items()
    }
    names |= {"embedding.weight": EMBEDDING, "head.norm.weight": NORM, "head.projection.weight": HEAD}
    assert sorted(names.values()) == sorted(state)
    flags = {name: tensor for name, tensor in rack.state_dict().items() if name.endswith("has_rope")}
    rack.load_state_dict({**flags, **{ours: state[theirs] for ours, theirs in names.items()}})
    if shape.no_rope_interval:
        blocks = [block for stack in rack.stacks for block in stack.blocks]  # pyright: ignore
        for block, there in zip(blocks, model.config.no_rope_layers, strict=True):
            block.attention.has_rope.fill_(bool(there))
    return rack.eval()


def saved_checkpoint(folder: Path, family: Family, **changes: Any) -> tuple[Path, Any]:
    """Save a random model of transformers with a byte tokenizer; return the folder and the model."""
    shard = changes.pop("max_shard_size", "5GB")
    dtype = changes.pop("dtype", torch.float32)
    model = reference_model(family, **{"vocab_size": 264, **changes}).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=shard)
    for name, data in tokenizer_files(ByteTokenizer(), None, 64, masked=False).files.items():
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read back, since a cast of the model casts its rotary table too
        return folder, type(model).from_pretrained(folder, dtype=torch.float32).eval()


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
    """Write the tensors of a file again, as `change` leaves them."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
