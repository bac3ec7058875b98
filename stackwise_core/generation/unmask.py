"""Masked tokens of a rack, filled in over several steps: the surest first, the others once they can see those.

Discrete diffusion by unmasking (Nie et al. 2025, LLaDA, section 2.4; block by block: Arriola et al. 2025).

Letters: T positions, M masked positions, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from stackwise_core.data.masks import FloatArray, IntArray
from stackwise_core.errors import ConfigError
from stackwise_core.generation.generate import Prompts, RackLike, checked_prompts
from stackwise_core.generation.sampling import Draws, Sampling, choose, common_checks, faults_of

Order = Literal["confidence", "margin", "entropy", "random"]
"""Which masked token is filled in first: see `Unmasking.order`."""
_USE_TOKEN, _USE_ORDER = 1, 2
MOST_LOGITS = 2**25
"""Logits that are held at a time."""


@dataclass(frozen=True)
class Unmasking:
    """How masked tokens are filled in. Raises ConfigError with every value that cannot be."""

    order: Order = "confidence"
    """Which come first: the highest probability, the largest margin over the second, the lowest entropy, any."""
    steps: int = 0
    """Steps for each block; 0 is one for each token or, where depth is time, one for each stack."""
    block_length: int = 0
    """Masked tokens are filled in blocks of this many, from left to right; 0 is all at once."""
    temperature: float = 0.0
    """Of the draw of a token; 0 takes the most likely one."""
    seed: int = 0
    """Of the draws."""
    guidance: float = 0.0
    """How far logits move away from those that a rack has where the given tokens are masked too (Nie et al. 2024)."""

    def __post_init__(self) -> None:
        checks = (
            ("order", self.order in get_args(Order), f"one of {', '.join(get_args(Order))}"),
            ("steps", self.steps >= 0, "0 chooses them; else 1 or more"),
            ("block_length", self.block_length >= 0, "0 is all at once; else 1 or more"),
            ("guidance", 0 <= self.guidance < float("inf"), "0 for no guidance, or a number above 0"),
            *common_checks(self.temperature, self.seed),
        )
        if faults := faults_of(self, checks):
            raise ConfigError(faults)


@dataclass(frozen=True)
class Denoiser:
    """A rack that fills in masked tokens."""

    rack: RackLike
    ratio: float = 1.0
    """The share of masked tokens up to which it is used, where depth is time."""
    step_ratios: tuple[float, ...] = ()
    """Where time is an input: the share of masked tokens of each time step."""

    def time_step(self, share: float) -> int | None:
        """Return the time step whose share of masked tokens is nearest."""
        return int(np.abs(np.asarray(self.step_ratios) - share).argmin()) if self.step_ratios else None


def denoiser_for(denoisers: Sequence[Denoiser], n_masked: int, n_tokens: int) -> Denoiser:
    """Return, of denoisers by falling ratio, that of the least noise which covers the share of masked tokens."""
    return next((each for each in reversed(denoisers) if each.ratio * n_tokens >= n_masked), denoisers[0])


@torch.inference_mode()
def unmask(
    denoisers: Sequence[Denoiser], rows: Prompts, mask_token: int, how: Unmasking, never: Sequence[int] = ()
) -> list[list[int]]:
    """Return token ids with every masked token filled in.

    At each step one rack predicts all masked tokens of the block, and as many as the step's share are kept. With
    several denoisers, of falling noise, a step takes the one of the least noise that still covers the share of masked
    tokens. Without `how.steps` it fills in all that lies above the share of the next one: one pass of a reverse
    trajectory, in which each rack reads the tokens that were kept before.

    Args:
        denoisers: one, or where depth is time those of every depth, by falling `ratio`.
        rows: token ids [B, T], or a list of lists, some of them `mask_token`.
        mask_token: what stands for a token to be filled in.
        how: the order, the steps, the draws.
        never: tokens that are not put in, beside `mask_token`.
    """
    filled = checked_prompts(rows, denoisers[0].rack.shape.vocab_size)
    draws = Draws(how.seed, filled)
    for number, tokens in enumerate(filled):
        masked = [place for place, token in enumerate(tokens) if token == mask_token]
        size, never_in = how.block_length or max(1, len(masked)), [mask_token, *never]
        given = [place for place, token in enumerate(tokens) if token != mask_token] if how.guidance else []
        for first in range(0, len(masked), size):
            _fill_block(denoisers, tokens, masked[first:], size, how, never_in, given, draws, number)
    return filled


def _fill_block(
    denoisers: Sequence[Denoiser],
    tokens: list[int],
    masked: list[int],
    size: int,
    how: Unmasking,
    never: list[int],
    given: list[int],
    draws: Draws,
    number: int,
) -> None:
    """Fill in the first `size` of the masked positions, in place; the others stay masked meanwhile.

    The mask token is the first of `never`; `given` are the positions that guidance masks.
    """
    block, later = masked[:size], len(masked[size:])
    n_steps = min(how.steps or len(block), len(block))
    step, n_block = 0, len(block)
    while block:
        n_masked = len(block) + later
        level = denoisers.index(denoiser_for(denoisers, n_masked, len(tokens)))
        if len(denoisers) > 1 and not how.steps:
            n_left = int(denoisers[level + 1].ratio * len(tokens)) - later if level + 1 < len(denoisers) else 0
        else:
            n_left = round(n_block * (1 - (step + 1) / n_steps))
        n_now = min(len(block), max(1, len(block) - n_left))
        uniform = [draws.uniform(np.asarray(block, dtype=np.int64), use, [number])[0] for use in _uses(step)]
        streams = [_stream(denoisers[level], tokens, block, n_masked)]
        if given:
            without = [never[0] if place in set(given) else token for place, token in enumerate(tokens)]
            blind = denoiser_for(denoisers, n_masked + len(given), len(tokens))
            streams.append(_stream(blind, without, block, n_masked + len(given)))
        found, sureness = _predict(streams, how, never, uniform)
        kept = np.argsort(-sureness, kind="stable")[:n_now]  # of equally sure ones the left
        for index in kept.tolist():
            tokens[block[index]] = int(found[index])
        block = [place for index, place in enumerate(block) if index not in set(kept.tolist())]
        step += 1


def _uses(step: int) -> tuple[int, int]:
    return (2 * step + _USE_TOKEN, 2 * step + _USE_ORDER)


def _stream(denoiser: Denoiser, tokens: list[int], block: list[int], n_masked: int) -> tuple[RackLike, Tensor]:
    """Return a denoiser's rack and its stream below the head at the positions of the block [M, D]."""
    rack = denoiser.rack
    device = rack.embedding.weight.device
    step = denoiser.time_step(n_masked / len(tokens))
    x_BTD = rack.embedding(torch.tensor([tokens], device=device), None if step is None else torch.tensor([step]))
    for stack in rack.stacks:
        x_BTD = stack(x_BTD)
    return rack, x_BTD[0, block]


def _predict(
    streams: Sequence[tuple[RackLike, Tensor]], how: Unmasking, never: list[int], uniform: Sequence[FloatArray]
) -> tuple[IntArray, FloatArray]:
    """Return a token for each position of a block and how sure it is: [M] both.

    With guidance w there is a second stream, which was not given the tokens of the prompt: logits are (1 + w) times
    those of the first, less w times its own.
    """
    n_block, vocab_size = len(streams[0][1]), streams[0][0].shape.vocab_size
    draw_M = torch.from_numpy(uniform[0]).to(streams[0][1].device)
    found, sureness = list[Tensor](), list[Tensor]()
    size = max(1, MOST_LOGITS // vocab_size)
    for some in (slice(first, first + size) for first in range(0, n_block, size)):
        logits_MV, *blind = (rack.head(hidden_MD[some]).float() for rack, hidden_MD in streams)
        for without_MV in blind:
            logits_MV = (1 + how.guidance) * logits_MV - how.guidance * without_MV
        logits_MV[:, never] = -torch.inf
        chosen_M = choose(logits_MV, Sampling(temperature=how.temperature), draw_M[some])
        found.append(chosen_M)
        sureness.append(sureness_of(logits_MV.softmax(-1), chosen_M, how.order))
    sure_M = uniform[1] if how.order == "random" else torch.cat(sureness).cpu().numpy()
    return torch.cat(found).cpu().numpy(), sure_M


def sureness_of(probabilities_MV: Tensor, chosen_M: Tensor, order: Order) -> Tensor:
    """Return how sure a rack is of a position [M], larger is surer; of an order at random zeros."""
    if order == "confidence":
        return probabilities_MV.gather(-1, chosen_M[:, None])[:, 0]
    if order == "margin":
        first, second = probabilities_MV.topk(2).values.unbind(-1)
        return first - second
    if order == "entropy":
        return torch.special.entr(probabilities_MV).sum(-1).neg()
    return torch.zeros_like(chosen_M, dtype=torch.float32)
