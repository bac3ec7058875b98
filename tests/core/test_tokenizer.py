"""Tokenizers: bytes, and tokenizer.json files with `transformers` as the peer that reads the same file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from flows.run.prepare import prepare_data
from stackwise_core.config import StackWiseConfig
from stackwise_core.data.masks import MaskSpec
from stackwise_core.data.packing import pack
from stackwise_core.data.tokenizer import ByteTokenizer, decode_pieces, load_tokenizer
from stackwise_core.errors import ConfigError, CorpusError
from stackwise_core.stages.plan import plan_config, plan_run
from stackwise_core.stages.resolve import resolve_mask, resolve_shape
from storage.artifacts import Artifacts
from storage.sequences import load_sequences
from support.corpora import corpus_of
from support.runs import grown, tiny, write_corpus

BYTES = ByteTokenizer()
TEXT = "Grow one stack, [MASK] it; then the next <|endoftext|> one. Naïve 日本 text\n\n  keeps its spaces."


def byte_level(folder: Path) -> Path:
    """A BPE over bytes whose file asks for truncation, padding and a template, with the specials last."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    library.add_special_tokens(["[MASK]", "<|endoftext|>"])
    library.post_processor = processors.TemplateProcessing(
        single="[MASK] $A", special_tokens=[("[MASK]", library.token_to_id("[MASK]"))]
    )
    library.enable_truncation(5)
    library.enable_padding(length=400)
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def word_level(folder: Path, vocabulary: dict[str, int], *specials: str) -> str:
    """A vocabulary as given, ids and all; unknown words are 'what'."""
    library = Tokenizer(models.WordLevel({"what": 0, **vocabulary}, unk_token="what"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(name, special=True) for name in specials])
    library.save(str(folder / "words.json"))
    return str(folder / "words.json")


def config_of(tokenizer: Path | str, objective: str = "mlm", vocab_size: int = 400) -> StackWiseConfig:
    config = StackWiseConfig()
    config.data.tokenizer, config.model.vocab_size = str(tokenizer), vocab_size
    config.training.progressive.training_objective = objective  # pyright: ignore[reportAttributeAccessIssue]
    return config


def faults_of(config: StackWiseConfig) -> list[str]:
    try:
        config.validate()
    except ConfigError as error:
        return [str(fault) for fault in error.faults]
    return []


# ---------------------------------------------------------------- bytes


@given(st.text())
def test_byte_tokenizer_round_trips(text: str) -> None:
    tokens = BYTES.encode(text.encode())
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(text.encode())
    assert BYTES.decode(tokens.astype(np.int64)) == text


def test_specials_are_readable_and_no_bytes() -> None:
    readable = BYTES.decode(np.array([72, 105, 256, 257, 258, 300, 255]))
    assert readable == "Hi[MASK][PAD][END][?]\N{REPLACEMENT CHARACTER}"
    assert {BYTES.mask_token, BYTES.pad_token, BYTES.end_token} == {256, 257, 258}
    assert (BYTES.n_regular_tokens, BYTES.vocab_size) == (256, 259)


# ---------------------------------------------------------------- files


def test_a_file_encodes_as_transformers_does(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = byte_level(tmp_path)
    tokenizer, peer = load_tokenizer(str(path)), PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokens = tokenizer.encode(TEXT.encode())
    assert tokens.tolist() == peer.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(tokens.astype(np.int64)) == TEXT
    specials = {tokenizer.mask_token, tokenizer.end_token}
    assert not specials & set(tokens.tolist())  # a text that spells a special is text
    assert tokenizer.decode(np.array([tokenizer.mask_token])) == "[MASK]"
    assert tokenizer.n_regular_tokens == peer.vocab_size  # which leaves added tokens out
    assert tokenizer.special_tokens == tuple(peer.convert_tokens_to_ids(["[MASK]", "<|endoftext|>"]))
    assert tokenizer.vocab_size == peer.vocab_size + 2


@pytest.mark.parametrize(
    ("specials", "mask", "end", "pad"),
    [
        (["[PAD]", "[SEP]", "[MASK]"], "[MASK]", "[SEP]", "[PAD]"),
        (["</s>", "<pad>", "<mask>"], "<mask>", "</s>", "<pad>"),
        (["[SEP]", "</s>", "<|endoftext|>", "[END]"], None, "[END]", "[END]"),
        (["[SEP]", "</s>", "<|endoftext|>"], None, "<|endoftext|>", "<|endoftext|>"),
        (["[SEP]", "</s>"], None, "</s>", "</s>"),
        (["<mask>", "[MASK]"], "[MASK]", None, "what"),
        ([], None, None, "what"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_specials_are_found_by_name(
    tmp_path: Path, specials: list[str], mask: str | None, end: str | None, pad: str, first: bool
) -> None:
    """Wherever they stand; without any, padding is id 0, the word 'what'."""
    names = [*specials, "what", "a", "b"] if first and pad != "what" else ["what", "a", *specials, "b"]
    ids = {name: n for n, name in enumerate(names)}
    tokenizer = load_tokenizer(word_level(tmp_path, ids, *specials))
    assert (tokenizer.mask_token, tokenizer.end_token) == (mask and ids[mask], end and ids[end])
    assert tokenizer.pad_token == ids[pad]
    assert tokenizer.special_tokens == tuple(sorted(ids[name] for name in specials))
    assert (tokenizer.n_regular_tokens, tokenizer.vocab_size) == (3, len(names))


def test_a_special_is_known_by_its_name_or_by_its_flag(tmp_path: Path) -> None:
    """[MASK] of the vocabulary, <odd> that is only flagged, and ids that the vocabulary leaves out."""
    path = word_level(tmp_path, {"[MASK]": 2, "a": 4, "<odd>": 5, "b": 9}, "<odd>")
    tokenizer = load_tokenizer(path)
    assert tokenizer.special_tokens == (1, 2, 3, 5, 6, 7, 8)
    assert (tokenizer.n_regular_tokens, tokenizer.vocab_size) == (3, 10)


def test_large_vocabularies_are_stored_wide(tmp_path: Path) -> None:
    for n_words, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        words = {f"w{n}": n for n in range(1, n_words)}
        tokenizer = load_tokenizer(word_level(tmp_path, words))
        tokens = tokenizer.encode(f"w1 w{n_words - 1} w77".encode())
        assert tokens.dtype == dtype
        assert tokens.tolist() == [1, n_words - 1, 77]
        text = " ".join(f"w{n_words - 1 - n}" for n in range(40)).encode()
        train, validation = pack(corpus_of(text), tokenizer, 4, 0, 0.25)
        assert train.tokens.dtype == validation.tokens.dtype == dtype
        assert train.take(np.array([0]))[0].tolist() == [[n_words - 1 - n for n in range(4)]]


@pytest.mark.parametrize(("specials", "between"), [(["[END]"], [3]), ([], [])])
def test_documents_end_as_the_tokenizer_can_say(tmp_path: Path, specials: list[str], between: list[int]) -> None:
    tokenizer = load_tokenizer(word_level(tmp_path, {"a": 1, "b": 2, **dict.fromkeys(specials, 3)}, *specials))
    texts = [b"a", b"a a a", b"b b a", b"b a"]
    corpus = corpus_of(*texts)
    train, validation = pack(corpus, tokenizer, 1, 0, 0.07)
    assert validation.tokens.ravel().tolist() == [1, *between]
    assert train.tokens.ravel().tolist() == [1, 1, 1, *between, 2, 2, 1, *between, 2, 1, *between]


# ---------------------------------------------------------------- random replacements


@settings(max_examples=40)
@given(st.sets(st.integers(0, 30), max_size=20), st.integers(1, 12), st.integers(0, 99))
def test_random_replacements_skip_specials_in_order(specials: set[int], n_regular: int, seed: int) -> None:
    """The n-th regular id replaces what would be n if there were no specials among them."""
    regular = [token for token in range(60) if token not in specials][:n_regular]
    plain = MaskSpec(seed=seed, ratio=1.0, corruption="bert", mask_token=99, n_regular_tokens=n_regular)
    scattered = plain.model_copy(update={"special_tokens": tuple(sorted(specials))})
    tokens, ids = np.full((4, 64), 77), np.arange(4)
    masks = np.ones(tokens.shape, dtype=bool)
    drawn, found = (spec.corrupt(tokens, masks, ids, 0) for spec in (plain, scattered))
    expected = [token if token in (77, 99) else regular[token] for token in drawn.ravel().tolist()]
    assert found.ravel().tolist() == expected
    assert len({*expected} & {*regular}) > len(regular) // 3  # and so the comparison saw replacements


def test_the_configuration_hands_specials_to_the_masks(tmp_path: Path) -> None:
    path = word_level(tmp_path, {"[PAD]": 1, "a": 2, "[MASK]": 3, "b": 4}, "[PAD]", "[MASK]")
    mask = resolve_mask(config_of(path), 0)
    assert mask is not None
    assert (mask.mask_token, mask.n_regular_tokens, mask.special_tokens) == (3, 3, (1, 3))
    tokens = np.full((64, 64), 50)
    found = mask.at_ratio(1.0).corrupt(tokens, np.ones(tokens.shape, dtype=bool), np.arange(64), 0)
    assert set(found.ravel().tolist()) == {0, 2, 3, 4, 50}


# ---------------------------------------------------------------- rules


def test_faults_of_the_file_are_told_by_validate(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no tokenizer")
    (tmp_path / "other.json").write_text('{"version": "1.0"}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    empty = Tokenizer(models.WordLevel({"[MASK]": 0}, unk_token="[MASK]"))
    empty.save(str(tmp_path / "empty.json"))
    for name, says in (
        ("absent.json", "it cannot be read (No such file or directory, seen from"),
        (".", "it cannot be read (Is a directory"),
        ("text.json", "it is not a tokenizer.json (expected ident"),
        ("other.json", "it is not a tokenizer.json (Model missing"),
        ("bytes.json", "it is not a tokenizer.json ('utf-8' codec"),
        ("empty.json", "it is not a tokenizer.json (its vocabulary is empty)"),
    ):
        path = str(tmp_path / name)
        (fault,) = faults_of(config_of(path))
        assert fault.startswith(f"data.tokenizer: got {path!r}; {says}")
        assert fault.endswith("or use 'byte'")


def test_masks_need_a_mask_token_and_tokens_need_rows(tmp_path: Path) -> None:
    path = word_level(tmp_path, {"a": 1, "b": 700})
    assert faults_of(config_of(path, "clm", 701)) == faults_of(config_of(path, "custom", 701)) == []
    assert faults_of(config_of(path, "mlm", 700)) == [
        f"model.vocab_size: got 700; data.tokenizer = {path!r} needs at least 701; 0 takes what it needs",
        f"data.tokenizer: got {path!r}; it has neither [MASK] nor <mask>, which mlm needs; "
        "add one to it, or use training_objective: clm",
    ]
    assert faults_of(config_of("byte", "mlm", 258)) == [
        "model.vocab_size: got 258; the byte tokenizer needs at least 259; 0 takes what it needs"
    ]


@pytest.mark.parametrize(("largest", "n_rows"), [(3, 64), (63, 64), (64, 128), (700, 704)])
def test_a_vocabulary_has_the_rows_that_its_tokenizer_needs(tmp_path: Path, largest: int, n_rows: int) -> None:
    """Rounded up to a multiple of 64; the byte tokenizer has 264, which ids of earlier runs hold."""
    config = config_of(word_level(tmp_path, {"[MASK]": 1, "b": largest}, "[MASK]"), vocab_size=0)
    assert faults_of(config) == []
    assert resolve_shape(config).vocab_size == n_rows
    assert plan_run(config, "00" * 32).stages[0].shape.vocab_size == n_rows
    assert resolve_shape(StackWiseConfig()).vocab_size == 264
    config.model.vocab_size = 2000
    assert resolve_shape(config).vocab_size == 2000


def test_bytes_cost_no_library(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from stackwise_core.config import StackWiseConfig\n"
        "from stackwise_core.stages.plan import plan_run\n"
        "plan_run(StackWiseConfig.from_dict({}), '00' * 32)\n"
        "print(sorted({'tokenizers', 'torch'} & set(sys.modules)))\n"
        "StackWiseConfig.from_dict({'data': {'tokenizer': sys.argv[1]}, 'model': {'vocab_size': 400}})\n"
        "print(sorted({'tokenizers', 'torch'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, str(byte_level(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n['tokenizers']\n", done.stderr


# ---------------------------------------------------------------- ids


def test_ids_of_bytes_are_what_they_were() -> None:
    """Seen before there were other tokenizers: new fields at their defaults are part of no id."""
    plan = plan_run(StackWiseConfig(), "00" * 32)
    assert plan.data.dump()["tokenizer"] == "byte"
    assert plan.data_ref.sha256 == "5c77be235d958b3493ee81f68eaea1d169ed71085864803ef9574d255c946297"
    stack = plan.stages[1].ref("stack").sha256
    assert stack == "21172e2cfe17d66ca85a397e9581a9dc03bddd4d6080b7832b830ae1553ba6b6"


def test_ids_hold_the_file_and_not_its_place(tmp_path: Path) -> None:
    path, elsewhere = byte_level(tmp_path), tmp_path / "moved.json"
    plan = plan_run(config_of(path), "00" * 32)
    assert plan.data.tokenizer == f"sha256:{sha256(path.read_bytes()).hexdigest()}"
    shutil.move(path, elsewhere)
    assert plan_run(config_of(elsewhere), "00" * 32) == plan
    values = json.loads(elsewhere.read_text())
    values["model"]["vocab"] = {"[NEW]" if word == "!" else word: n for word, n in values["model"]["vocab"].items()}
    elsewhere.write_text(json.dumps(values))
    assert plan_run(config_of(elsewhere), "00" * 32).data_ref != plan.data_ref


# ---------------------------------------------------------------- a run


@pytest.mark.usefixtures("quick_disk")
def test_a_run_of_words(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "corpus.txt", words=1200).read_text().split()
    ids = {word: n for n, word in enumerate(sorted(set(text)), 2)}
    changes: dict[str, Any] = {
        "data.tokenizer": word_level(tmp_path, {"[MASK]": 1, **ids}, "[MASK]"),
        "training.progressive.training_objective": "mlm",
        "training.progressive.target_stacks": 2,
    }
    config, artifacts = tiny(tmp_path, changes), Artifacts(tmp_path / "artifacts")
    grown(config, artifacts.root)
    plan = plan_config(config)
    train, _ = load_sequences(artifacts, plan.data_ref)
    assert train.tokens.ravel().tolist() == [ids[word] for word in text][: train.tokens.size]
    loss = artifacts.manifest(plan.stages[1].ref("validation")).facts["validation_loss"]
    assert 0 < loss < np.log(plan.stages[0].shape.vocab_size)


def test_a_tokenizer_that_changes_while_a_run_starts_is_told(tmp_path: Path) -> None:
    words = sorted(set(write_corpus(tmp_path / "corpus.txt", words=1200).read_text().split()))
    path = word_level(tmp_path, {word: n for n, word in enumerate(words, 1)})
    config = tiny(tmp_path, {"data.tokenizer": path})
    plan = plan_config(config)
    word_level(tmp_path, {word: n for n, word in enumerate(reversed(words), 1)})
    with pytest.raises(CorpusError, match=r"data\.tokenizer: got .*; it changed while the run was starting"):
        prepare_data(config, Artifacts(tmp_path / "artifacts").open(), plan)


def test_merges_dropped_at_random_are_refused(tmp_path: Path) -> None:
    """One text would have many encodings, and one id many bytes."""
    path = byte_level(tmp_path)
    values = json.loads(path.read_text())
    values["model"]["dropout"] = 0.5
    path.write_text(json.dumps(values))
    (fault,) = faults_of(config_of(path))
    assert "drops merges at random (dropout)" in fault


def test_an_id_out_of_all_proportion_is_refused_at_once(tmp_path: Path) -> None:
    path = Path(word_level(tmp_path, {"a": 1, "b": 2}, "[MASK]"))
    path.write_text(path.read_text().replace('"b": 2', '"b": 4000000000'))
    (fault,) = faults_of(config_of(path))
    assert "its largest id is 4,000,000," in fault


def test_a_text_that_cannot_be_encoded_is_told(tmp_path: Path) -> None:
    path = Path(word_level(tmp_path, {"a": 1, "b": 2}, "[MASK]"))
    values = json.loads(path.read_text())
    values["model"]["unk_token"] = "[NOT THERE]"
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(path))
    with pytest.raises(ConfigError, match="it cannot encode the corpus"):
        tokenizer.encode(b"a zebra b")


@given(st.text(max_size=12), st.integers(0, 8))
@settings(max_examples=60)
def test_pieces_are_the_text_and_the_tokens(text: str, first: int) -> None:
    """Also where a row begins or ends within a character."""
    tokens = BYTES.encode(text.encode())[first:].astype(np.int64)
    pieces = decode_pieces(BYTES, tokens)
    assert sum(n_tokens for _, n_tokens in pieces) == len(tokens)
    assert "".join(piece for piece, _ in pieces) == BYTES.decode(tokens)


def test_a_piece_is_a_character_however_many_tokens_it_has(tmp_path: Path) -> None:
    tokens = np.array([*"né".encode(), BYTES.mask_token, *"日".encode(), 0x80, ord("a")])
    assert decode_pieces(BYTES, tokens) == [("n", 1), ("é", 2), ("[MASK]", 1), ("日", 3), ("\ufffda", 2)]
    tokenizer = load_tokenizer(str(byte_level(tmp_path)))
    tokens = tokenizer.encode(TEXT.encode()).astype(np.int64)
    assert "".join(piece for piece, _ in decode_pieces(tokenizer, tokens)) == tokenizer.decode(tokens)
