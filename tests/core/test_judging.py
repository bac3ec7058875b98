"""Bits per byte and bounds against dense recomputations, closed forms and enumerations; sequences."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stackwise_core.data.rows import in_batches, rows_of
from stackwise_core.data.tokenizer import ByteTokenizer, load_tokenizer
from stackwise_core.data.tokenizer import Tokenizer as OurTokenizer
from stackwise_core.errors import ConfigError, CorpusError
from stackwise_core.generation.judging import (
    TextOf,
    judge_masked,
    judge_next_tokens,
)
from stackwise_core.generation.unmask import Denoiser
from stackwise_core.model.rack import Rack
from support.racks import lively_rack

BYTES = ByteTokenizer()
TEXT = "Naïve 日本 text grows; the next 🦊 jumps over it, and on and on it goes."


def rack_of(vocab_size: int = 264, causal: bool = True, seed: int = 1) -> Rack:
    return lively_rack(vocab_size, seed=seed, causal=causal)


@torch.no_grad()
def dense_nats(rack: Rack, inputs: list[int], targets: list[int]) -> list[float]:
    log_p = rack(torch.tensor([inputs]))[0].double().log_softmax(-1)
    return [-float(log_p[place, target]) for place, target in enumerate(targets)]


def byte_level(folder: Path) -> OurTokenizer:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    library.add_tokens(["né"])
    library.add_special_tokens(["[MASK]", "<|endoftext|>"])
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder / "tokenizer.json"))


def by_words(folder: Path) -> OurTokenizer:
    library = Tokenizer(models.BPE(byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    library.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=120))
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("make", [lambda _: BYTES, byte_level, by_words], ids=["bytes", "byte level", "words"])
def test_bits_per_byte_are_those_of_a_dense_recomputation(make: Any, tmp_path: Path) -> None:
    """Token by token: the end token carries neither nats nor bytes, the first token of a sequence is not predicted."""
    tokenizer: OurTokenizer = make(tmp_path)
    tokens, end = tokenizer.encode(TEXT.encode()).tolist(), tokenizer.end_token
    rack = rack_of(tokenizer.vocab_size)
    rows = [np.array([*tokens[:9], end, *tokens[9:12]]), np.array([*tokens[12:20], end])]
    found = judge_next_tokens(rack, in_batches(rows, 4), TextOf(tokenizer))
    nats, n_bytes, n_tokens = 0.0, 0, 0
    for row in ([tokens[:9], tokens[9:12]], [tokens[12:20], []]):
        inputs, ends = [*row[0], end, *row[1]], len(row[0]) - 1
        losses = dense_nats(rack, inputs[:-1], inputs[1:])
        nats += sum(losses) - losses[ends]
        n_tokens += len(losses) - 1
        whole = [*row[0], *row[1]]
        n_bytes += len(tokenizer.decode(np.array(whole)).encode()) - len(tokenizer.decode(np.array(whole[:1])).encode())
    if make is not by_words:  # half a character decodes to three bytes: count by the text where it is whole
        n_bytes = sum(text_bytes(tokenizer, part) for part in (tokens[1:12], tokens[13:20]))
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.n_tokens, found.n_bytes, found.n_sequences) == (n_tokens, n_bytes, 2)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)


def text_bytes(tokenizer: OurTokenizer, tokens: list[int]) -> int:
    """By latin-1 escapes: what each token is, found by the growth of the whole encoded text."""
    if tokenizer is BYTES:
        return len(tokens)
    library: Any = tokenizer._library  # pyright: ignore
    return sum(len(library.id_to_token(token)) if token < 300 else 3 for token in tokens)


def test_all_tokens_of_a_text_have_its_bytes(tmp_path: Path) -> None:
    for tokenizer in (BYTES, byte_level(tmp_path), by_words(tmp_path)):
        for text in (TEXT, "on it", "x"):
            tokens = tokenizer.encode(text.encode()).astype(np.int64)
            assert TextOf(tokenizer).n_bytes(tokens) == len(text.encode())


def test_a_rack_that_knows_nothing_has_the_entropy_of_its_vocabulary() -> None:
    rack = rack_of(causal=False)
    torch.nn.init.zeros_(rack.head.projection.weight)
    batches = [np.arange(20).reshape(2, 10)]
    masked = judge_masked([Denoiser(rack)], batches, TextOf(BYTES), 256, 60)
    assert masked.nats_per_token == pytest.approx(math.log(264), rel=1e-5)
    following = judge_next_tokens(rack, batches, TextOf(BYTES))
    assert following.nats_per_token == pytest.approx(math.log(264), rel=1e-6)
    assert following.error == pytest.approx(0.0, abs=1e-6)


def test_the_bound_is_its_expectation_over_all_masks() -> None:
    """Enumerated: every number of masked tokens is as likely, and every choice of places."""
    rack, tokens = rack_of(causal=False), [5, 9, 258, 7]
    expected = 0.0
    for n in range(1, 5):
        choices = list(itertools.combinations(range(4), n))
        for places in choices:
            masked = [256 if place in places else token for place, token in enumerate(tokens)]
            losses = dense_nats(rack, masked, tokens)
            expected += sum(losses[place] for place in places if tokens[place] < 256) / n / len(choices)
    found = judge_masked([Denoiser(rack)], [np.array([tokens])], TextOf(BYTES), 256, 300)
    assert found.nats == pytest.approx(expected, rel=0.05)
    assert (found.n_tokens, found.n_bytes) == (3, 3)


def test_each_number_of_masked_tokens_asks_its_depth() -> None:
    racks = [rack_of(causal=False, seed=seed) for seed in (1, 2)]
    shares: dict[int, list[float]] = {0: [], 1: []}
    for number, rack in enumerate(racks):
        rack.embedding.register_forward_pre_hook(
            lambda _, given, number=number: shares[number].append(float((given[0] == 256).float().mean()))
        )
    denoisers = [Denoiser(racks[0], 0.9), Denoiser(racks[1], 0.4)]
    judge_masked(denoisers, [np.arange(10)[None]], TextOf(BYTES), 256, 40)
    assert min(shares[0]) == pytest.approx(0.5)
    assert max(shares[1]) == pytest.approx(0.4)
    assert len(shares[0]) == pytest.approx(24, abs=1)


def test_draws_depend_on_the_tokens_alone() -> None:
    rack, rows = rack_of(causal=False), np.arange(40).reshape(4, 10)
    together = judge_masked([Denoiser(rack)], [rows], TextOf(BYTES), 256, 4)
    alone = [judge_masked([Denoiser(rack)], [row[None]], TextOf(BYTES), 256, 4).nats for row in rows]
    assert together.nats == pytest.approx(sum(alone))
    assert judge_masked([Denoiser(rack)], [rows[:1]], TextOf(BYTES), 256, 4).error is None
    assert together.error == pytest.approx(np.std(np.array(alone) / 10, ddof=1) / 2)


# ---------------------------------------------------------------- sequences


def test_sequences_of_a_source(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 20)
    source = str(tmp_path / "*.txt")
    rows = list(rows_of(source, BYTES, 16))
    everything = np.concatenate(rows)
    assert [len(row) for row in rows] == [16] * 7 + [11]
    assert everything.tolist() == [token for n in range(3) for token in [*f"{n} ".encode()] * 20 + [258]]
    assert [batch.shape for batch in in_batches([*rows, np.array([1])], 4)] == [(4, 16), (3, 16), (1, 11)]
    tokens = np.arange(30, dtype="<u2")
    (tmp_path / "t.bin").write_bytes(tokens.tobytes())
    assert np.concatenate(list(rows_of(str(tmp_path / "t.bin"), BYTES, 8))).tolist() == tokens.tolist()
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(CorpusError, match=r"e\.txt.*is empty|every file it names is empty"):
        list(rows_of(str(tmp_path / "e.txt"), BYTES, 8))


def test_no_text_is_no_number() -> None:
    for batches in ([], [np.array([[258, 258]])]):
        with pytest.raises(ConfigError, match="data: got no text of two tokens; give more"):
            judge_next_tokens(rack_of(), batches, TextOf(BYTES))
