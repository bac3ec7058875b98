"""What a tokenizer.json must give a corpus: a token that ends documents, and one for every character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.unused import notes
from stackwise_core.data.coverage import Coverage
from stackwise_core.data.packing import pack
from stackwise_core.data.tokenizer import load_tokenizer
from stackwise_core.errors import ConfigError
from stackwise_core.stages.plan import plan_run
from support.corpora import corpus_of


def words(folder: Path, *specials: str, name: str = "tokenizer.json") -> str:
    """Words 'what' (0), 'a' (1) and the specials from 2 on."""
    library = Tokenizer(models.WordLevel({"what": 0, "a": 1}, unk_token="what"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(special, special=True) for special in specials])
    library.save(str(folder / name))
    return str(folder / name)


def config_of(path: str, end_token: str = "", **data: Any) -> StackWiseConfig:
    values: dict[str, Any] = {"data": {"tokenizer": path, "end_token": end_token, **data}}
    return StackWiseConfig.from_dict({**values, "training": {"progressive": {"training_objective": "clm"}}})


# ---------------------------------------------------------------- the end of documents


@pytest.mark.parametrize(
    ("specials", "beside", "asked", "end"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], None, "", "<|end_of_text|>"),
        (["<bos>", "<eos>"], None, "", "<eos>"),
        (["<|im_start|>", "<|im_end|>"], None, "", "<|im_end|>"),
        (["<|endoftext|>", "<|end_of_text|>"], None, "", "<|endoftext|>"),  # as before there were others
        (["<end>", "</s>"], "<end>", "", "<end>"),
        (["<end>", "</s>"], {"content": "<end>", "lstrip": False}, "", "<end>"),
        (["<end>", "</s>"], "</s>", "<end>", "<end>"),  # asked for
        (["<end>"], None, "<end>", "<end>"),
        (["<end>", "</s>"], 3, "", "</s>"),
        (["<end>"], None, "", None),
    ],
)
@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_documents_end_with_the_tokenizers_own_token(
    tmp_path: Path, specials: list[str], beside: Any, asked: str, end: str | None, where: str
) -> None:
    path = words(tmp_path, *specials)
    if beside is not None:
        (tmp_path / where).write_text(json.dumps({"bos_token": "x", "eos_token": beside}))
    tokenizer = load_tokenizer(path, asked)
    after = [] if end is None else [2 + specials.index(end)]
    corpus = corpus_of(b"a", b"a a", b"a a")
    train, validation = pack(corpus, tokenizer, 1, 0, 0.14)
    assert train.tokens.ravel().tolist() == [1, 1, *after, 1, 1, *after]
    assert validation.tokens.ravel().tolist() == [1, *after]
    assert set(after) <= set(tokenizer.special_tokens)


def test_the_end_token_is_in_ids_unless_the_file_alone_implied_it_all_along(tmp_path: Path) -> None:
    path = words(tmp_path, "</s>", "<end>")
    plain = plan_run(config_of(path), "00" * 32)
    assert plan_run(config_of(path, "</s>"), "00" * 32) == plain
    asked = plan_run(config_of(path, "<end>"), "00" * 32)
    assert asked.data_ref != plain.data_ref
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert plan_run(config_of(path), "00" * 32) == asked
    other = words(tmp_path, "</s>", "<end>", name="other.json")  # of which it says nothing
    assert plan_run(config_of(other), "00" * 32) == plain


def test_an_end_token_that_is_none_is_named(tmp_path: Path) -> None:
    path = words(tmp_path, "</s>")
    for end_token, tokenizer, says in (
        ("<end>", path, rf"^data\.end_token: got '<end>'; data\.tokenizer = '{path}' has no such token; name one"),
        ("</s>", "byte", r"^data\.end_token: got '</s>'; the byte tokenizer has \[END\]; leave it out$"),
    ):
        with pytest.raises(ConfigError, match=says):
            config_of(tokenizer, end_token)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ConfigError, match=r"no token '<end>', which tokenizer_config\.json names .* data\.end_token"):
        config_of(path)
    assert load_tokenizer(path, "</s>").end_token == 2
    for of_someone_else in ("no JSON", "[1]", "{}", '{"eos_token": null}'):
        (tmp_path / "tokenizer_config.json").write_text(of_someone_else)
        assert load_tokenizer(path).end_token == 2


def test_documents_without_an_end_are_told(tmp_path: Path) -> None:
    bare = words(tmp_path, name="bare.json")
    says = f"data.tokenizer: {bare} has no end token of a known name, so documents run into one another; "
    assert notes(config_of(bare)) == [f"{says}name one with data.end_token"]
    assert notes(config_of(bare, source="tokens.bin")) == []
    assert notes(config_of(words(tmp_path, "<eos>"))) == notes(config_of("byte")) == []


# ---------------------------------------------------------------- every character


def bpe(letters: str | list[str], **how: Any) -> Tokenizer:
    return Tokenizer(models.BPE({letter: n for n, letter in enumerate(dict.fromkeys(letters))}, [], **how))


def dropped(library: Tokenizer, text: str) -> str:
    return Coverage(library).dropped_from(text)


def test_a_corpus_is_refused_before_a_character_is_dropped(tmp_path: Path) -> None:
    library = bpe("abc é")
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a é b".encode()).tolist() == [0, 3, 4, 3, 1]
    with pytest.raises(ConfigError, match=r"no token for '日' \(U\+65E5\) and would drop it .*; give a .* byte-level"):
        tokenizer.encode("a 日b".encode())


@settings(max_examples=60)
@given(st.text(st.sampled_from("abé日😀 \n"), max_size=8), st.sets(st.sampled_from("abé日😀 \n")))
def test_what_is_dropped_is_found(text: str, letters: set[str]) -> None:
    """Exactly the texts that do not survive a round trip, where a token is a character."""
    library = bpe(sorted(letters | {"z"}))
    survived = "".join(library.id_to_token(token) for token in library.encode(text).ids)
    assert dropped(library, text) == next((each for each in text if each not in letters), "")
    assert (survived == text) == (dropped(library, text) == "")


def test_tokenizers_that_drop_nothing_are_let_through() -> None:
    hard = "naïve 日本 😀\n\t\0"
    by_bytes = bpe(pre_tokenizers.ByteLevel.alphabet())
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel()
    falling_back = bpe(["a", *(f"<0x{byte:02X}>" for byte in range(256))], byte_fallback=True)
    unknown = bpe(["a", "?"], unk_token="?")
    stripped = bpe("aeinv")
    stripped.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    stripped.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # which leaves spaces out by intent
    added = bpe("a")
    added.add_tokens(["😀"])
    whole = bpe(["日本"], ignore_merges=True)
    for library, text in (
        (by_bytes, hard),
        (falling_back, hard),
        (unknown, hard),
        (stripped, "naïve  vin"),
        (added, "a😀a"),
        (whole, "日本"),
    ):
        assert dropped(library, text) == ""
        assert library.encode(text).ids


def test_letters_that_only_some_places_know_are_found() -> None:
    by_few_bytes = bpe(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ã"}))
    by_few_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert dropped(by_few_bytes, "日é") == "é"
    few = bpe(["<0xE6>", "<0x97>", "<0xA5>"], byte_fallback=True)
    assert (dropped(few, "日"), dropped(few, "日本")) == ("", "本")
    ends = bpe(["a", "b", "a</w>"], end_of_word_suffix="</w>")
    ends.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert (dropped(ends, "ba aba"), dropped(ends, "ba ab")) == ("", "b")
    assert np.size(ends.encode("ab").ids) == 1
    starts = bpe(["a", "##a", "b"], continuing_subword_prefix="##")
    starts.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert (dropped(starts, "aa baa"), dropped(starts, "ab")) == ("", "b")
