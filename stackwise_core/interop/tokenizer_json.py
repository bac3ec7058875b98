"""The tokenizer of an exported folder, in the files that transformers reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stackwise_core.data.tokenizer import ByteTokenizer, Tokenizer
from stackwise_core.errors import ConfigError, Fault, shortened
from stackwise_core.files import inside
from stackwise_core.strict import parse_object, read_bounded, told

TOKENIZER, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, GENERATION, MODEL = "chat_template.jinja", "generation_config.json", "config.json"
_MOST_BESIDE = 2**24
_NAMES_CODE = ("auto_map", "processor_class", "tokenizer_file", "name_or_path")
"""Keys of a tokenizer_config.json that name files or code of the folder that it comes from."""


class TokenizerFiles(NamedTuple):
    """A tokenizer for transformers."""

    files: dict[str, bytes]
    """By name."""
    ids: dict[str, int]
    """`bos_token_id`, `eos_token_id`, `pad_token_id` and `mask_token_id`, where there is such a token."""


def tokenizer_files(tokenizer: Tokenizer, path: Path | None, seq_len: int, *, masked: bool) -> TokenizerFiles:
    """Return the files of a tokenizer, and the ids of the tokens that it names.

    Args:
        tokenizer: the one that the rack was trained with.
        path: its tokenizer.json; what lies beside it is carried along. None for the byte tokenizer.
        seq_len: the longest text [tokens].
        masked: whether the name of the mask token stands for it in a text, as fill-mask expects. Elsewhere a name in a
            text is text, as in training.

    Raises:
        ConfigError: a file is not what the rack was trained with, or cannot be read.
    """
    files, beside = _carried(path, tokenizer) if path else ({TOKENIZER: _bytes_description()}, {})
    # Where there is none, what fills a row is a token of texts, which transformers would leave out of them.
    pad = _named(tokenizer, beside.get("pad_token")) if path else None
    if pad is None and (not path or tokenizer.pad_token in tokenizer.special_tokens):
        pad = tokenizer.pad_token
    tokens = {"bos": _named(tokenizer, beside.get("bos_token")), "eos": tokenizer.end_token, "pad": pad}
    tokens["mask"] = tokenizer.mask_token
    known = {kind: token for kind, token in tokens.items() if token is not None}
    settings = {
        **beside,
        **{f"{kind}_token": tokenizer.name_of(token) for kind, token in known.items()},
        # The general class does what tokenizer.json says; others rebuild a tokenizer of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        # Without it transformers 4 adds token_type_ids, which its generate() then refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if path and GENERATION not in files and len(ends := end_tokens(path)) > 1:
        files[GENERATION] = _json({"eos_token_id": ends})
    if not path:
        settings["split_special_tokens"] = not masked
    files[CONFIG] = _json(settings)
    return TokenizerFiles(files, {f"{kind}_token_id": token for kind, token in known.items()})


def end_tokens(path: Path) -> list[int]:
    """Return the tokens that end a text by what lies beside a tokenizer.json: generation_config.json, else config.json.

    Raises:
        ConfigError: a file cannot be read, or names something else.
    """
    if path.name != TOKENIZER:  # others may lie among files of anybody
        return []
    for name in (GENERATION, MODEL):
        with suppress(FileNotFoundError):
            try:
                said = parse_object(read_bounded(inside(path.parent, name), _MOST_BESIDE)).get("eos_token_id")
            except ValueError as error:
                raise ConfigError([Fault(name, str(path.with_name(name)), f"cannot be read ({told(error)})")]) from None
            found: list[Any] = said if isinstance(said, list) else [said] * (said is not None)
            if not all(type(token) is int and 0 <= token < 2**31 for token in found):
                raise ConfigError([Fault(f"{name}: eos_token_id", shortened(said), "a token's id, or several")])
            if found:
                return found
    return []


def _named(tokenizer: Tokenizer, name: Any) -> int | None:
    name = name.get("content") if isinstance(name, dict) else name
    return tokenizer.token_named(name) if isinstance(name, str) else None


def _carried(path: Path, tokenizer: Tokenizer) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files to copy, and what the others beside a tokenizer.json say."""
    description = path.read_bytes()
    if hashlib.sha256(description).hexdigest() not in tokenizer.name:
        raise ConfigError([Fault("data.tokenizer", repr(str(path)), "it changed while it was read; try again")])
    files, beside = {TOKENIZER: description}, dict[str, Any]()
    for name in (SPECIAL, CONFIG, TEMPLATE, GENERATION):
        try:
            data = read_bounded(path.with_name(name), _MOST_BESIDE)
            if name in (SPECIAL, CONFIG):
                beside |= parse_object(data)
            else:
                files[name] = data if name == TEMPLATE else _json(parse_object(data))
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            allowed = f"{name} beside it cannot be carried along ({told(error)}); mend or remove it"
            raise ConfigError([Fault("data.tokenizer", repr(str(path)), allowed)]) from None
    return files, {key: value for key, value in beside.items() if key not in _NAMES_CODE}


def _bytes_description() -> bytes:
    """Return a tokenizer.json whose tokens are the bytes of the text: a byte-level BPE without merges."""
    tokenizer, exactly = ByteTokenizer(), {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": token, "content": tokenizer.name_of(token), "special": True, **exactly}
        for token in (tokenizer.mask_token, tokenizer.pad_token, tokenizer.end_token)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    document = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    return _json(document)


def byte_characters() -> list[str]:
    """Return the character by which a byte-level vocabulary writes each byte: itself if printable, else one above 255.

    The order of GPT-2 (Radford et al. 2019): the 68 others are U+0100 and following, in the order of the bytes.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()
