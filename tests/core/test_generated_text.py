"""Text as it comes: joined it is what decoding everything gives, never half a character, never a stop string."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stackwise_core.data.tokenizer import ByteTokenizer, load_tokenizer
from stackwise_core.data.tokenizer import Tokenizer as OurTokenizer
from stackwise_core.errors import ConfigError
from stackwise_core.generation.text import TextStream

BYTES = ByteTokenizer()
TEXT = "Naïve 日本 text 🦊 goes on and on."


def streamed(tokenizer: OurTokenizer, tokens: list[int], prompt: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces: list[str] = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces


@given(st.binary(max_size=12), st.binary(max_size=10))
@settings(max_examples=60)
def test_any_bytes_come_as_decoding_them_at_once(data: bytes, prompt: bytes) -> None:
    """Python replaces a broken character by one U+FFFD or by several; the letters between are what must agree."""
    pieces = streamed(BYTES, list(data), list(prompt))
    whole = data.decode(errors="replace")
    assert "".join(pieces).replace("\ufffd", "") == whole.replace("\ufffd", "")


@given(st.text(max_size=8))
@settings(max_examples=40)
def test_characters_come_whole(text: str) -> None:
    data = text.encode(errors="replace")
    pieces = streamed(BYTES, list(data), list(b"x"))
    assert "".join(pieces) == data.decode()
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_piece_comes_with_the_token_that_completes_it() -> None:
    assert streamed(BYTES, list("aé🦊b".encode()), []) == ["a", "", "é", "", "", "", "🦊", "b", ""]
    assert streamed(BYTES, [*b"a", 0xF0, 0x9F], []) == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_tokenizers_from_files(kind: str, tmp_path: Path) -> None:
    """Of words, the decoder drops the space before the first one: a continuation must keep it."""
    library = Tokenizer(models.BPE(byte_fallback=kind == "words", unk_token=None))
    pre, decoder = (
        (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
        if kind == "bytes"
        else (pre_tokenizers.Metaspace(), decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]))
    )
    library.pre_tokenizer, library.decoder = pre, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    library.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode(TEXT.encode()).tolist()
    for cut in (1, 3, 9, len(tokens) - 1):
        prompt, rest = tokens[:cut], tokens[cut:]
        whole, before = (tokenizer.decode(np.asarray(each)) for each in (tokens, prompt))
        if not before.endswith("\ufffd"):
            assert "".join(streamed(tokenizer, rest, prompt)) == whole[len(before) :]


def test_a_stop_string_ends_the_text_before_it() -> None:
    data = list(b"one, two; three")
    pieces = streamed(BYTES, data, [], ("; t", "zzz"))
    assert "".join(pieces) == "one, two"
    assert pieces == [*"one, two", "", "", "", ""]  # the beginning of a stop string is held back
    assert streamed(BYTES, list(b"a; b"), [], ("; t",)) == ["a", "", "", "; b", ""]
    assert "".join(streamed(BYTES, list(b"end;"), [], ("; t",))) == "end;"
    assert "".join(streamed(BYTES, list("aé🦊b".encode()), [], ("é🦊",))) == "a"
    assert "".join(streamed(BYTES, data, [], ("three", "two"))) == "one, "
    with pytest.raises(ConfigError, match="stop: got ''; a text of one character or more"):
        TextStream(BYTES, [], ["a", ""])
