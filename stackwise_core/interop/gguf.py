"""A rack as one GGUF file, for llama.cpp and what is built on it. Needs the package `gguf` (extra `gguf`).

Letters: H heads, C channels of a head, I inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stackwise_core.errors import ConfigError, Fault, shortened
from stackwise_core.interop.parts import DTYPES, Dtype, Parts
from stackwise_core.interop.tokenizer_json import TEMPLATE, TOKENIZER, TokenizerFiles
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.strict import parse_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
_HUNK = 2**22
_BY_HF = "export it for transformers, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_SPLITS = {
    rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}\p{{N}}{_REST}": "qwen2",
}
"""What llama.cpp calls the pattern by which a tokenizer cuts a text into words."""
_NEIGHBOURS = ("llama", "smollm3")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_NO_MERGE = "\u00ff"
"""The byte 0xFF, which is in no UTF-8 text."""


def check_gguf(shape: ModelShape, has_rope: Sequence[bool]) -> None:
    """Check that a rack has a GGUF file that llama.cpp runs, and that the package is there.

    Args:
        shape: of the rack.
        has_rope: of each of its layers.

    Raises:
        ConfigError: it has none; the message says what has.
    """
    if not shape.causal:
        why = "llama.cpp has no architecture that fills masks; --format hf has EuroBertForMaskedLM"
        raise ConfigError([Fault("--format", "'gguf'", why)])
    if shape.rope_scaling:
        allowed = f"positions that were stretched (model.rope_scaling) are not written to GGUF here; {_BY_HF}"
        raise ConfigError([Fault("--format", "'gguf'", allowed)])
    without = [number for number, there in enumerate(has_rope, 1) if not there]
    if shape.no_rope_interval and without != list(range(4, len(has_rope) + 1, 4)):
        why = f"llama.cpp has every fourth layer of SmolLM3 without RoPE, and here it is {shortened(without)}; use hf"
        raise ConfigError([Fault("--format", "'gguf'", why)])
    if find_spec("gguf") is None:
        allowed = "it needs the package gguf: pip install 'stackwise[gguf]'"
        raise ConfigError([Fault("--format", "'gguf'", allowed)])


class GgufFile:
    """A GGUF file of a rack, written tensor by tensor and read back under the names of transformers."""

    def __init__(self, path: Path, config: Mapping[str, Any], parts: Parts, dtype: Dtype) -> None:
        """Take what config.json would say, and the tensors."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.path, self._config, self._parts, self._dtype = path, config, parts, DTYPES[dtype]
        self._architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        self._names = get_tensor_name_map(arch, parts.n_blocks)

    def _name(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    def write(self, tokenizer: TokenizerFiles | None, name: str) -> dict[str, str]:
        """Write the file and return the sha256 of each file, by name.

        Raises:
            ConfigError: the tokenizer is of a kind that this does not write.
            OSError: it cannot be written.
        """
        from gguf import GGMLQuantizationType, GGUFWriter

        kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        writer = GGUFWriter(self.path, self._architecture)
        writer.add_name(name)
        self._describe(writer)
        _add_tokenizer(writer, tokenizer, self._config["vocab_size"])
        for entry in self._parts.entries:
            kind = self._kind(entry.shape)
            size = int(np.prod(entry.shape)) * kind.itemsize
            stored = np.dtype(np.uint16 if kind.itemsize == 2 else np.float32)
            writer.add_tensor_info(self._name(entry.name), entry.shape, stored, size, GGMLQuantizationType[kinds[kind]])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for hf_name, tensor in self._parts.tensors():
                stored = self._permuted(hf_name, tensor.detach().cpu()).to(self._kind(tuple(tensor.shape)))
                writer.write_tensor_data(stored.contiguous().view(torch.uint8).numpy())
            writer.close()
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while data := file.read(_HUNK):
                digest.update(data)
        return {self.path.name: digest.hexdigest()}

    def _kind(self, shape: tuple[int, ...]) -> torch.dtype:
        """Norms and biases stay float32: llama.cpp computes with nothing else there."""
        return self._dtype if len(shape) > 1 else torch.float32

    def _describe(self, writer: GGUFWriter) -> None:
        config = self._config
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])

    def _permuted(self, name: str, tensor: Tensor, *, back: bool = False) -> Tensor:
        """Return queries and keys [H C, I] with the two halves of a head's channels interleaved, or `back`.

        llama.cpp rotates neighbouring channels in some architectures, and the two halves in all others.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self._architecture not in _NEIGHBOURS or heads is None:
            return tensor
        halves = (self._config[heads], -1, 2) if back else (self._config[heads], 2, self._config["head_dim"] // 2)
        return tensor.view(*halves, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)

    def reader(self) -> Any:
        """Return a function from the name of a tensor in transformers to the tensor in the file."""
        from gguf import GGUFReader

        found = {tensor.name: tensor for tensor in GGUFReader(self.path).tensors}

        def read(name: str) -> Tensor:
            stored = found[self._name(name)]
            shape = tuple(int(size) for size in reversed(stored.shape))
            values = torch.from_numpy(np.array(stored.data)).view(torch.uint8).view(self._kind(shape)).view(shape)
            return self._permuted(name, values, back=True)

        return read


def _add_tokenizer(writer: GGUFWriter, tokenizer: TokenizerFiles | None, n_rows: int) -> None:
    """Add a byte-level BPE; rows of the embedding that stand for no token are called unused."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    from tokenizers import Tokenizer as Library

    text = tokenizer.files[TOKENIZER]
    document = parse_object(text)
    model, added = document.get("model") or {}, document.get("added_tokens") or []
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or []]
    names = {token: name for name, token in model["vocab"].items()}
    tokens = [names.get(row, f"[UNUSED_{row}]") for row in range(n_rows)]
    types = [_NORMAL if row in names else _UNUSED for row in range(n_rows)]
    for entry in added:
        tokens[entry["id"]], types[entry["id"]] = entry["content"], _CONTROL if entry["special"] else 4
    if not merges:  # llama.cpp asks for one
        merges = [f"{_NO_MERGE} {_NO_MERGE}"]
        if _UNUSED in types:
            tokens[types.index(_UNUSED)] = 2 * _NO_MERGE
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_of(document))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for key, token in tokenizer.ids.items():
        getattr(writer, f"add_{key}")(token)
    first = Library.from_str(text.decode()).encode("").ids[:1]
    writer.add_add_bos_token(first == [tokenizer.ids.get("bos_token_id")])
    if template := tokenizer.files.get(TEMPLATE):
        writer.add_chat_template(template.decode())


def _split_of(document: Mapping[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a tokenizer cuts a text."""
    model, cuts = document.get("model") or {}, document.get("pre_tokenizer") or {}
    steps: Sequence[Any] = cuts.get("pretokenizers") or [cuts]
    kinds = [step.get("type") for step in steps]
    if model.get("type") == "BPE" and kinds[-1] == "ByteLevel" and not document.get("normalizer"):
        if kinds == ["ByteLevel"]:
            return "gpt-2" if steps[0].get("use_regex", True) else "qwen2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and pattern in _KNOWN_SPLITS:
            return _KNOWN_SPLITS[pattern]
    allowed = f"GGUF knows byte-level BPEs that cut words as GPT-2, Llama 3, Qwen2 and SmolLM do; {_BY_HF}"
    raise ConfigError([Fault("data.tokenizer", json.dumps(kinds), allowed)])
