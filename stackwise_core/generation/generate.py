"""Next tokens of a causal rack, for a batch of prompts of any lengths.

Letters: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.generation.kv_cache import KVCache
from stackwise_core.generation.sampling import Draws, Sampling, choose, penalised
from stackwise_core.stages.resolve import ModelShape

Reason = Literal["end", "stop", "length"]
"""Why a text ended: the end token, a stop string, or as many tokens as were asked for."""
OnToken = Callable[[int, int], bool]
"""Called with the number of a prompt and its new token; returns whether that text ends here."""
Prompts = Tensor | Sequence[Sequence[int]]


class RackLike(Protocol):
    """What is needed of a rack."""

    shape: ModelShape
    embedding: Any
    stacks: nn.ModuleList
    head: Any


@dataclass
class Generated:
    """The new tokens of one prompt."""

    tokens: list[int] = field(default_factory=list[int])
    """Without the prompt and without the end token."""
    reason: Reason = "length"


@torch.inference_mode()
def generate(
    rack: RackLike,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    end_tokens: Iterable[int] = (),
    on_token: OnToken | None = None,
) -> list[Generated]:
    """Return the new tokens of each prompt.

    Args:
        rack: causal, in the order of its stacks; where it is, computation is.
        prompts: token ids: [B, T], or a list of lists.
        max_new_tokens: at most as many of each.
        sampling: how each is chosen.
        end_tokens: a text ends where one of these is chosen.
        on_token: called with every token that is not an end token, in order.

    Raises:
        ConfigError: the rack is not causal, or a prompt is empty or has a token that the rack does not know.
    """
    rows = checked_prompts(prompts, rack.shape.vocab_size)
    if not rack.shape.causal:
        allowed = "it sees both sides of a token: fill masked tokens with unmask() instead"
        raise ConfigError([Fault("rack", "a bidirectional rack", allowed)])
    if max_new_tokens < 1:
        raise ConfigError([Fault("max_new_tokens", repr(max_new_tokens), "1 or more")])
    texts, ends, device = [Generated() for _ in rows], set(end_tokens), rack.embedding.weight.device
    places = np.arange(max_new_tokens if sampling.temperature else 1, dtype=np.int64)
    uniform = torch.from_numpy(Draws(sampling.seed, rows).uniform(places)).to(device)
    cache = KVCache([len(row) for row in rows], max_new_tokens, [len(each.blocks) for each in _of(rack)], device)
    seen_BV = _seen(rows, rack.shape.vocab_size, device) if sampling.repetition_penalty != 1 else None
    logits_BV, running = _read(rack, cache, rows, device), set(range(len(rows)))
    for step in range(max_new_tokens):
        if seen_BV is not None:
            logits_BV = penalised(logits_BV, seen_BV, sampling.repetition_penalty)
        tokens_B = choose(logits_BV, sampling, uniform[:, step if sampling.temperature else 0])
        for row, token in enumerate(tokens_B.tolist()):
            if row in running and (reason := _ended(texts[row], row, token, ends, on_token)):
                texts[row].reason = reason
                running.remove(row)
        if not running or step == max_new_tokens - 1:
            break
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        cache.grow()
        logits_BV = _logits(rack, cache, tokens_B[:, None])
    return texts


def checked_prompts(prompts: Prompts, vocab_size: int) -> list[list[int]]:
    """Return prompts as lists of ids; raises ConfigError if there is none, one is empty, or an id is unknown."""
    rows = [[int(token) for token in row] for row in prompts]
    if not rows:
        raise ConfigError([Fault("prompts", "none", "give one or more")])
    for number, row in enumerate(rows):
        wrong = next((token for token in row if not 0 <= token < vocab_size), None)
        if not row or wrong is not None:
            received = "no token" if wrong is None else f"the token {wrong}"
            allowed = f"one token or more of 0 to {vocab_size - 1}"
            raise ConfigError([Fault(f"prompts[{number}]", received, allowed)])
    return rows


def _of(rack: RackLike) -> list[Any]:
    return list(rack.stacks)


def _ended(text: Generated, row: int, token: int, ends: set[int], on_token: OnToken | None) -> Reason | None:
    """Add a token to a text; return why the text ends here, if it does."""
    if token in ends:
        return "end"
    text.tokens.append(token)
    return "stop" if on_token is not None and on_token(row, token) else None


def _read(rack: RackLike, cache: KVCache, rows: list[list[int]], device: torch.device) -> Tensor:
    """Return the logits after each prompt [B, V]; prompts of one length are read together."""
    by_length = dict[int, list[int]]()
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    logits_BV: Tensor | None = None
    for numbers in by_length.values():
        cache.begin(numbers)
        tokens_BT = torch.tensor([rows[number] for number in numbers], device=device)
        found_BV = _logits(rack, cache, tokens_BT)
        logits_BV = found_BV.new_empty(len(rows), found_BV.shape[1]) if logits_BV is None else logits_BV
        logits_BV[numbers] = found_BV
    assert logits_BV is not None
    return logits_BV


def _logits(rack: RackLike, cache: KVCache, tokens_BT: Tensor) -> Tensor:
    """Return the logits after the last of some new tokens: [B, V]."""
    x_BTD = rack.embedding(tokens_BT)
    for stack, memory in zip(_of(rack), cache.stacks, strict=True):
        x_BTD = stack(x_BTD, memory)
    return rack.head(x_BTD[:, -1]).float()


def _seen(rows: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    seen_BV = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for row, tokens in enumerate(rows):
        seen_BV[row, tokens] = True
    return seen_BV
