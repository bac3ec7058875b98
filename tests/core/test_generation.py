"""Next tokens against a full recomputation and against transformers; draws against its processors and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stackwise_core.errors import ConfigError
from stackwise_core.generation.sampling import Draws, Sampling, candidates, choose, penalised
from stackwise_core.model.adapters import merged_dense
from stackwise_core.model.blocks import Stack, initialise
from stackwise_core.model.rack import Rack
from stackwise_core.stages.resolve import ModelShape
from support.llamas import llama_of
from support.racks import mixed_rack

V = 40
SHAPES = (
    {"n_heads": 6, "n_kv_heads": 2, "d_model": 48, "rope_theta": 77.0, "tie_embeddings": False},
    {"n_heads": 2, "n_kv_heads": 1, "d_model": 20, "d_ff": 31, "norm_eps": 1e-2},
    {"n_heads": 4, "n_kv_heads": 4, "d_model": 32},
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9], [2, 7, 1]]


def rack_of(**changes: Any) -> Rack:
    """A rack with weights so large that every part shows in the output."""
    values = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_ff": 24, "causal": True}
    shape = ModelShape.model_validate({**values, **changes})
    rack = Rack(shape)
    rack.stacks.extend(Stack(shape, n_blocks, index) for index, n_blocks in enumerate((2, 1)))
    initialise(rack, 11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in rack.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return rack.eval()


@torch.no_grad()
def recomputed(rack: Rack, prompt: list[int], n_new: int) -> list[int]:
    """The most likely tokens by the whole rack over the whole text, again for every token."""
    tokens = torch.tensor([prompt])
    for _ in range(n_new):
        tokens = torch.cat([tokens, rack(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", SHAPES)
def test_greedy_tokens_are_those_of_transformers_and_of_a_recomputation(changes: dict[str, Any]) -> None:
    rack = rack_of(**changes)
    llama = llama_of(rack, "sdpa")
    found = rack.generate(PROMPTS, 12)
    assert len({tuple(tokens) for tokens in found}) > 1
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert tokens == recomputed(rack, prompt, 12)
        ids = torch.tensor([prompt])
        theirs = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokens == theirs[0, len(prompt) :].tolist()


def test_a_mixed_rack_with_adapters_generates_what_it_computes() -> None:
    rack = mixed_rack(["full", "bfloat16", "qlora"]).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert rack.generate(prompts, 8) == [recomputed(rack, prompt, 8) for prompt in prompts]


def test_a_prompt_may_be_a_tensor_and_rows_end_by_themselves() -> None:
    rack = rack_of()
    prompts = torch.tensor([[1, 2], [3, 4]])
    whole = rack.generate(prompts, 10)
    end = whole[0][4]
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    assert rack.generate(prompts, 10, end_token=end) == expected
    heard: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        heard.append((row, token))
        return row == 1 and len([1 for each, _ in heard if each == 1]) == 3

    assert rack.generate(prompts, 10, on_token=on_token) == [whole[0], whole[1][:3]]
    assert [token for row, token in heard if row == 0] == whole[0]


def test_training_goes_on_after_generation() -> None:
    """Nothing that inference mode made is left in what training shares with it, such as the rotary table."""
    rack = rack_of(rope_theta=5.0)
    rack.generate([[1, 2, 3]], 5)
    rack.train()(torch.arange(8)[None]).sum().backward()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompts": []}, "prompts: got none; give one or more"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: got no token; one token or more of 0 to 39"),
        ({"prompts": [[1, 40]]}, r"prompts\[0\]: got the token 40; one token or more of 0 to 39"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0; 1 or more"),
        ({"temperature": -1.0}, "temperature: got -1.0; 0 takes the most likely token; else above 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p: got 0.0; above 0, up to 1"),
        ({"top_k": 5}, "top_k: got 5; temperature 0 takes the most likely token; set a temperature too, such as 1"),
        ({"seed": -1}, "seed: got -1; from 0 to 2147483647"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rack_of().generate(**{"prompts": [[1]], **how})


def test_a_bidirectional_rack_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rack: got a bidirectional rack; .*unmask"):
        rack_of(causal=False).generate([[1]])


# ---------------------------------------------------------------- draws


def logits_of(n: int, vocabulary: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))


def dense(found: tuple[Tensor | None, Tensor], vocabulary: int) -> Tensor:
    tokens, probabilities = found
    if tokens is None:
        return probabilities
    return torch.zeros(len(probabilities), vocabulary).scatter(1, tokens, probabilities)


@pytest.mark.parametrize("vocabulary", [30, 1000])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 2000},
        {"top_p": 0.8},
        {"top_p": 0.9999, "temperature": 4.0},  # more candidates than are looked at first
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.6, "min_p": 0.05},
    ],
)
def test_candidates_are_those_of_transformers(values: dict[str, Any], vocabulary: int) -> None:
    from transformers.generation import logits_process as theirs

    sampling, logits = Sampling(**{"temperature": 1.0, **values}), logits_of(6, vocabulary)
    scores, none = logits, torch.zeros(6, 1, dtype=torch.long)
    warpers: list[Any] = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for warper in warpers:
        scores = warper(none, scores)
    found = dense(candidates(logits, sampling), vocabulary)
    assert torch.equal(found > 0, scores > -torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1))


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, prompt = logits_of(2, V), torch.tensor([[3, 3, 7], [0, 1, 2]])
    seen = torch.zeros(2, V, dtype=torch.bool).scatter(1, prompt, True)
    assert torch.equal(penalised(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits))
    rack = rack_of()
    llama, ids = llama_of(rack, "sdpa"), torch.tensor([PROMPTS[0]])
    how = {"max_new_tokens": 12, "repetition_penalty": 1.4}
    theirs = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **how)
    assert rack.generate(ids, **how) == theirs[:, ids.shape[1] :].tolist() != rack.generate(ids, 12)


def test_draws_invert_the_distribution() -> None:
    """At evenly spaced uniform numbers, each token comes as often as its probability says, to one draw."""
    n, logits = 20_000, logits_of(1, 12)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for values in ({}, {"top_k": 4}, {"top_p": 0.7}):
        sampling = Sampling(temperature=1.3, **values)
        chosen = choose(logits.expand(n, -1), sampling, uniform)
        expected = dense(candidates(logits, sampling), 12)[0].double()
        counts = torch.bincount(chosen, minlength=12).double()
        assert (counts - n * expected).abs().max() <= 1.0 + n * 1e-6
        assert (counts[expected == 0] == 0).all()


def test_the_last_uniform_number_draws_a_token_that_is_possible() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    for values in ({}, {"top_k": 3}, {"top_p": 0.99}):
        drawn = choose(logits, Sampling(temperature=1.0, **values), torch.tensor([1 - 2**-53], dtype=torch.float64))
        assert drawn.item() in (0, 1)


def test_the_first_uniform_number_draws_a_token_that_is_possible() -> None:
    drawn = choose(torch.tensor([[-torch.inf, 0.0]]), Sampling(temperature=1.0), torch.zeros(1, dtype=torch.float64))
    assert drawn.item() == 1


def draws(seed: int, prompts: list[list[int]], n: int, use: int = 0) -> Any:
    return Draws(seed, prompts).uniform(np.arange(n), use)


def test_draws_depend_on_seed_and_prompt_alone() -> None:
    alone, among = draws(5, [[1, 2]], 4), draws(5, [[9], [1, 2], [1, 2]], 4)
    assert np.array_equal(alone[0], among[1])
    assert not np.array_equal(among[1], among[2])  # equal prompts are drawn apart
    assert np.array_equal(draws(5, [[1, 2]], 2), alone[:, :2])
    assert not np.array_equal(draws(6, [[1, 2]], 4), alone)
    assert not np.array_equal(draws(5, [[1, 2]], 4, use=1), alone)
    assert np.array_equal(Draws(5, [[9], [1, 2]]).uniform(np.arange(4), rows=[1]), alone)
    everything = draws(0, [[n] for n in range(500)], 20).ravel()
    assert np.abs(np.histogram(everything, bins=10, range=(0, 1))[0] - 1000).max() < 4 * np.sqrt(900)


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    rack, how = rack_of(), {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    together = rack.generate(PROMPTS, 10, **how)
    assert together == [rack.generate([prompt], 10, **how)[0] for prompt in PROMPTS]
    assert together == rack.generate(PROMPTS, 10, **how) != rack.generate(PROMPTS, 10, **{**how, "seed": 4})


def test_dense_copies_of_stacks_generate_the_same() -> None:
    rack = mixed_rack(["bfloat16", "qlora"]).eval()
    expected = rack.generate([[1, 2, 3]], 8)
    rack.stacks = nn.ModuleList(merged_dense(stack) for stack in rack.stacks if isinstance(stack, Stack))
    assert rack.generate([[1, 2, 3]], 8) == expected
