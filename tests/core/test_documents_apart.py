"""Documents that are kept apart: each is as if it were alone, in the model, the loss, the packing and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.masks import MaskSpec
from stackwise_core.data.packing import pack, read_corpus
from stackwise_core.data.rows import rows_of
from stackwise_core.data.sequences import documents_in
from stackwise_core.data.tokenizer import ByteTokenizer, load_tokenizer
from stackwise_core.errors import ConfigError
from stackwise_core.generation.judging import TextOf, judge_masked, judge_next_tokens
from stackwise_core.generation.unmask import Denoiser
from stackwise_core.model.blocks import Stack
from stackwise_core.model.rack import Rack
from stackwise_core.model.stream import EXACT
from stackwise_core.objectives.losses import several, summed_loss
from stackwise_core.objectives.make_batch import make_batch
from stackwise_core.stages.plan import plan_run
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.training.boundary import advance
from support.llamas import llama_of

END = ByteTokenizer.end_token
LENGTHS = ((5, 1, 6), (12,), (2, 10), (4, 4, 4))


def rack_of(*, causal: bool, **shape: Any) -> Rack:
    torch.manual_seed(0)
    rack = Rack(ModelShape(vocab_size=264, d_model=16, n_heads=4, n_kv_heads=2, d_ff=32, causal=causal, **shape))
    rack.stacks.extend(Stack(rack.shape, 1, n) for n in range(2))
    for parameter in rack.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return rack.eval()


def rows(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sequences of documents of some lengths, each with its end token; the last may be cut off."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(97, 122, (len(lengths), 12))
    for row, each in zip(tokens, lengths, strict=True):
        row[np.cumsum(each)[:-1] - 1] = END
    return tokens


def alone(tokens: np.ndarray[Any, np.dtype[np.int64]]) -> list[list[Tensor]]:
    """The documents of each sequence."""
    return [
        [torch.from_numpy(part) for part in np.split(row, np.cumsum(each)[:-1])]
        for row, each in zip(tokens, LENGTHS, strict=True)
    ]


def test_documents_are_numbered_by_their_end_tokens() -> None:
    tokens = np.array([[1, 9, 2, 9, 9, 3], [9, 1, 2, 3, 4, 9]])
    assert documents_in(tokens, 9).tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]]
    assert several(torch.zeros(2, 6)) is None
    assert several(torch.from_numpy(documents_in(tokens, 9))) is not None


@torch.no_grad()
def test_a_causal_rack_gives_each_document_the_logits_that_transformers_gives_it_alone() -> None:
    rack, tokens = rack_of(causal=True), rows()
    llama = llama_of(rack)
    documents = torch.from_numpy(documents_in(tokens, END))
    found = rack(torch.from_numpy(tokens), documents=documents)
    for row, parts in zip(found, alone(tokens), strict=True):
        expected = torch.cat([llama(part[None]).logits[0] for part in parts])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    together = rack(torch.from_numpy(tokens))
    assert not torch.allclose(found[0], together[0], atol=1e-2)
    torch.testing.assert_close(found[1], together[1], rtol=1e-4, atol=1e-4)  # one document


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"qkv_bias": True, "qk_norm": True, "rope_theta": 100.0}])
def test_a_bidirectional_rack_gives_each_document_what_it_gives_it_alone(shape: dict[str, Any]) -> None:
    rack, tokens = rack_of(causal=False, **shape), rows()
    found = rack(torch.from_numpy(tokens), documents=torch.from_numpy(documents_in(tokens, END)))
    for row, parts in zip(found, alone(tokens), strict=True):
        torch.testing.assert_close(row, torch.cat([rack(part[None])[0] for part in parts]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_has_the_same_bytes_in_any_batch() -> None:
    """So that a cache holds what the live trunk computes, although attention is faster for single documents."""
    rack, tokens = rack_of(causal=True), torch.from_numpy(rows())
    documents, entering = torch.from_numpy(documents_in(tokens.numpy(), END)), rack.embedding(tokens)
    stacks = [stack for stack in rack.stacks if isinstance(stack, Stack)]
    together = advance(stacks, entering, EXACT, documents)
    for n in range(len(tokens)):
        one = slice(n, n + 1)
        assert advance(stacks, entering[one], EXACT, documents[one]).equal(together[one])
    assert advance(stacks, entering[1:2], EXACT).equal(together[1:2])


@torch.no_grad()
def test_the_loss_is_the_sum_of_those_of_the_documents() -> None:
    rack, tokens = rack_of(causal=True), rows()
    llama = llama_of(rack)
    batch = make_batch({"input_ids": tokens, "documents": documents_in(tokens, END)}, None)
    hidden = rack.hidden(batch["input_ids"], documents=batch["documents"])
    loss, positions = summed_loss(hidden, rack.head, batch)
    losses = [
        torch.nn.functional.cross_entropy(llama(part[None]).logits[0, :-1], part[1:], reduction="sum")
        for parts in alone(tokens)
        for part in parts
        if len(part) > 1
    ]
    assert positions == sum(n - 1 for each in LENGTHS for n in each)
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)


def test_masked_batches_keep_their_masks_and_know_the_documents() -> None:
    tokens, spec = rows(), MaskSpec(seed=0, ratio=0.5, corruption="bert", mask_token=256, n_regular_tokens=256)
    fields = {"input_ids": tokens, "sequence_ids": np.arange(4)}
    plain = make_batch(fields, spec)
    apart = make_batch({**fields, "documents": documents_in(tokens, END)}, spec)
    assert all(torch.equal(plain[name], apart[name]) for name in ("input_ids", "targets", "masks"))
    assert torch.equal(apart["documents"], torch.from_numpy(documents_in(tokens, END)))  # of what was not masked
    with pytest.raises(ConfigError, match="documents"):
        make_batch({**fields, "documents": np.zeros((4, 3), dtype=np.int64)}, spec)


@torch.no_grad()
def test_figures_are_those_of_the_documents() -> None:
    tokens, text = rows(), TextOf(ByteTokenizer())
    rack = rack_of(causal=True)
    whole = judge_next_tokens(rack, [tokens], text, END)
    parts = [part.numpy()[None] for each in alone(tokens) for part in each if len(part) > 1]
    single = judge_next_tokens(rack, [part for part in parts if text.is_text(part[0, 1:]).any()], text)
    assert (whole.n_tokens, whole.n_bytes) == (single.n_tokens, single.n_bytes)
    assert whole.nats == pytest.approx(single.nats, rel=1e-5)
    masked = rack_of(causal=False)
    found = [judge_masked([Denoiser(masked, 0.5)], [tokens], text, 256, 4, end) for end in (None, END)]
    assert found[0].n_bytes == found[1].n_bytes
    assert found[0].nats != found[1].nats
    one = rows(((12,),))
    same = [judge_masked([Denoiser(masked, 0.5)], [one], text, 256, 4, end).nats for end in (None, END)]
    assert same[0] == pytest.approx(same[1], rel=1e-5)


# ---------------------------------------------------------------- packing and configuration


def words(folder: Path) -> tuple[Tokenizer, str]:
    """A tokenizer that begins a text with [BOS] by its own configuration."""
    vocabulary = {name: n for n, name in enumerate(["[UNK]", "[BOS]", "</s>", "a", "b", "c"])}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[BOS]", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    library.save(str(folder / "words.json"))
    return library, str(folder / "words.json")


def test_a_document_begins_and_ends_as_the_tokenizer_says(tmp_path: Path) -> None:
    library, name = words(tmp_path)
    texts = ["a b c " * n for n in range(1, 30)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    corpus, tokenizer = read_corpus(f"{tmp_path}/*.txt"), load_tokenizer(name)
    for begin in (True, False):
        splits = pack(corpus, tokenizer, 8, 0, 0.3, begin=begin)
        held: list[int] = []
        kept: list[int] = []
        for document in corpus.documents:
            ids = [*library.encode(Path(document.name).read_text(), add_special_tokens=begin).ids, 2]
            (held if len(held) < len(np.ravel(splits[1].tokens[:])) else kept).extend(ids)
        for split, expected in zip(splits, (kept, held), strict=True):
            found = np.ravel(split.tokens[:])
            assert found.tolist() == expected[: len(found)]
        found = np.concatenate(list(rows_of(f"{tmp_path}/*.txt", tokenizer, 8, begin=begin)))
        assert (found == 1).sum() == (len(texts) if begin else 0)


def of(**data: Any) -> StackWiseConfig:
    growth = {"training": {"progressive": {"training_objective": "clm"}}}
    return StackWiseConfig.from_dict({"data": {"documents": "separate", **data}, **growth})


def test_what_cannot_be_kept_apart(tmp_path: Path) -> None:
    library, name = words(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.documents: got 'separate'; what ends a document in a\.bin"):
        of(source="a.bin")
    assert of(source="a.bin", tokenizer=name).data.documents == "separate"
    (tmp_path / "bare.json").write_text(library.to_str().replace("</s>", "<x>"))
    with pytest.raises(ConfigError, match="the tokenizer has no end token"):
        of(tokenizer=str(tmp_path / "bare.json"))


def test_only_documents_that_are_kept_apart_have_other_ids() -> None:
    plain, apart = plan_run(of(documents="concat"), "0" * 64), plan_run(of(), "0" * 64)
    assert "separated_by" not in plain.data.dump()
    assert apart.data.dump() == {**plain.data.dump(), "separated_by": END}
    assert plain.stages[0].build == apart.stages[0].build
    assert plain.stages[0].stack != apart.stages[0].stack


def test_examples_have_their_sequences_to_themselves(tmp_path: Path) -> None:
    config = StackWiseConfig.from_dict(
        {"data": {"documents": "separate"}, "training": {"progressive": {"training_objective": "custom"}}}
    )
    assert plan_run(config, "0" * 64).data.separated_by is None
