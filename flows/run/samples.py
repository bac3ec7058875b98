"""Text from the rack of every depth of a run, from one beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.generation.generate import generate
from stackwise_core.generation.sampling import Sampling
from stackwise_core.generation.unmask import Unmasking, unmask
from stackwise_core.training.hardware import use_hardware
from storage.racks import OpenedRun, open_runs

_TEMPERATURE = 0.8
_MOST_GIVEN = 32  # tokens


def sample_depths(uri: str | Path, run: str, n_new: int, prompt: str = "") -> list[dict[str, Any]]:
    """Return what the rack of each depth makes of a text, by default the beginning of the first withheld sequence.

    Args:
        uri: what `--artifacts` takes.
        run: its name.
        n_new: new tokens, at most as many as the context has room for.
        prompt: the text to go on from.

    Returns:
        A document for each depth: `stage`, `depth`, `prompt` and `text`. Draws are the same every time.

    Raises:
        ConfigError: the run has no rack, no tokenizer, no withheld sequence, or its targets are not text.
        ArtifactError: a file is missing or damaged.
    """
    found = open_runs(uri, run)
    tokenizer, context = found[-1].tokenizer(), found[-1].config.data.seq_len
    if prompt:
        given = tokenizer.encode(prompt.encode()).tolist()[: context - 1]
    else:
        given = next(iter(found[-1].validation_rows()))[: min(_MOST_GIVEN, context // 2)].tolist()
    n_new = min(n_new, context - len(given))
    return [
        {
            "stage": opened.stages[-1].index,
            "depth": len(opened.stages[-1].spec.stacks),
            "prompt": tokenizer.decode(np.asarray(given)),
            "text": tokenizer.decode(np.asarray(_continued(opened, tokenizer, given, n_new))),
        }
        for opened in found
    ]


def _continued(opened: OpenedRun, tokenizer: Tokenizer, given: list[int], n_new: int) -> list[int]:
    """Return the tokens that follow, one after the other or filled in among masks, as the rack was trained."""
    device = use_hardware(opened.config.hardware)
    if opened.config.training.progressive.training_objective == "clm":
        sampling = Sampling(temperature=_TEMPERATURE)
        return generate(opened.rack(dense=True).to(device), [given], n_new, sampling)[0].tokens
    assert tokenizer.mask_token is not None  # it was trained with one
    never = {tokenizer.pad_token, *range(tokenizer.vocab_size, opened.shape.vocab_size)}
    row = [*given, *[tokenizer.mask_token] * n_new]
    how = Unmasking(temperature=_TEMPERATURE)
    forbidden = sorted(never - {tokenizer.end_token})  # which may stand in for a missing pad token
    return unmask(opened.denoisers(device), [row], tokenizer.mask_token, how, forbidden)[0][len(given) :]
