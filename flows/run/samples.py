"""What the rack of every depth of a run makes of withheld sequences: text, losses, and norms of its stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.generation.generate import generate
from stackwise_core.generation.sampling import Sampling
from stackwise_core.generation.unmask import Unmasking, unmask
from stackwise_core.model.rack import Rack
from stackwise_core.objectives.losses import Batch, input_time_step, loss_positions, several
from stackwise_core.objectives.make_batch import validation_batch
from stackwise_core.training.hardware import use_hardware
from storage.racks import OpenedRun, open_runs

_TEMPERATURE = 0.8
_MOST_GIVEN = 32  # tokens
_MOST_ROWS, _MOST_TOKENS = 16, 8192
"""Withheld sequences that are judged."""
_RATIOS = (0.15, 0.5, 0.85)
"""Shares of masked tokens at which a masked rack is judged."""
_LOGITS_AT_ONCE = 512  # positions: a row of logits can have a megabyte


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
    config = found[-1].config  # of all depths: reading it takes longer than a small rack
    tokenizer, context = found[-1].tokenizer(), config.data.seq_len
    if prompt:
        given = tokenizer.encode(prompt.encode()).tolist()[: context - 1]
    else:
        given = next(iter(found[-1].validation_rows()))[: min(_MOST_GIVEN, context // 2)].tolist()
    n_new, prompt = min(n_new, context - len(given)), tokenizer.decode(np.asarray(given))
    texts = (tokenizer.decode(np.asarray(new)) for new in _continued(found, config, tokenizer, given, n_new))
    return [{**_named(opened), "prompt": prompt, "text": text} for opened, text in zip(found, texts, strict=True)]


def _named(opened: OpenedRun) -> dict[str, Any]:
    return {"stage": opened.stages[-1].index, "depth": len(opened.stages[-1].spec.stacks)}


def _racks(found: Sequence[OpenedRun]) -> Iterator[Rack]:
    return found[-1].racks([opened.stages[-1] for opened in found])


def _continued(
    found: Sequence[OpenedRun], config: StackWiseConfig, tokenizer: Tokenizer, given: list[int], n_new: int
) -> Iterator[list[int]]:
    """Yield for each depth the tokens that follow, one after the other or filled in, as the rack was trained."""
    device = use_hardware(config.hardware)
    if config.training.progressive.training_objective == "clm":
        sampling = Sampling(temperature=_TEMPERATURE)
        for rack in _racks(found):
            yield generate(rack.to(device), [given], n_new, sampling)[0].tokens
        return
    for opened in found:
        yield _filled_in(opened, tokenizer, given, n_new, device)


def _filled_in(
    opened: OpenedRun, tokenizer: Tokenizer, given: list[int], n_new: int, device: torch.device
) -> list[int]:
    assert tokenizer.mask_token is not None  # it was trained with one
    never = {tokenizer.pad_token, *range(tokenizer.vocab_size, opened.shape.vocab_size)}
    row = [*given, *[tokenizer.mask_token] * n_new]
    how = Unmasking(temperature=_TEMPERATURE)
    forbidden = sorted(never - {tokenizer.end_token})  # which may stand in for a missing pad token
    return unmask(opened.denoisers(device), [row], tokenizer.mask_token, how, forbidden)[0][len(given) :]


@torch.no_grad()
def judge_depths(uri: str | Path, run: str) -> list[dict[str, Any]]:
    """Return how the rack of each depth judges some withheld sequences.

    Returns:
        A document for each depth: `stage`, `depth`; `loss_by_position`, the mean cross-entropy [nats] of spans of
        positions by the last of each, counted from 1; or, of a masked rack, `loss_by_ratio` by the share of masked
        tokens; and `stream_norms`, the median norm of a token's stream below the first stack and above each.

    Raises:
        ConfigError: the run has no rack, or no withheld sequence.
        ArtifactError: a file is missing or damaged.
    """
    found = open_runs(uri, run)
    config = found[-1].config
    fields = found[-1].validation_fields(max(1, min(_MOST_ROWS, _MOST_TOKENS // config.data.seq_len)))
    pairs, passed = zip(found, _racks(found), strict=True), dict[str, _Passed]()
    return [{**_named(opened), **_judged(opened, rack, config, fields, passed)} for opened, rack in pairs]


@dataclass(frozen=True)
class _Passed:
    """What the rack before made of a batch: the next rack begins where it differs."""

    batch: Batch
    embedding: nn.Module
    stacks: list[nn.Module]
    norms: list[float]
    """Below the first stack, and above each."""
    streams: dict[int, Tensor]
    """The last two, by the number of stacks below: what was inserted lies below one stack."""

    def shared(self, rack: Rack, batch: Batch) -> int | None:
        """Return above how many stacks the stream of another rack is known, at most; None if it is nowhere."""
        begins = (self.batch, batch), (self.embedding.state_dict(), rack.embedding.state_dict())
        if not all(_equal(ours, theirs) for ours, theirs in begins):
            return None
        pairs = itertools.takewhile(lambda pair: pair[0] is pair[1], zip(self.stacks, rack.stacks, strict=False))
        n_same = len(list(pairs))
        return max((n for n in self.streams if n <= n_same), default=None)


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


def _judged(
    opened: OpenedRun, rack: Rack, config: StackWiseConfig, fields: dict[str, Any], passed: dict[str, _Passed]
) -> dict[str, Any]:
    objective, own = config.training.progressive.training_objective, opened.stages[-1].mask
    mask = own and own.for_validation()
    masks = {str(ratio): mask.at_ratio(ratio) for ratio in _RATIOS} if mask else {"": None}
    device = use_hardware(config.hardware)
    rack.to(device)
    norms, by_position, by_ratio = list[float](), dict[str, float](), dict[str, float]()
    for ratio, corruption in masks.items():
        batch = validation_batch(fields, corruption, objective)
        passed[ratio] = _pass(rack, batch, device, passed.get(ratio))
        norms, losses_BT = passed[ratio].norms, _losses_of(rack, passed[ratio].streams[len(rack.stacks)], batch)
        if corruption is None:
            by_position = _in_spans(losses_BT)
        elif bool(losses_BT.isfinite().any()):
            by_ratio[ratio] = losses_BT.nanmean().item()
    return {"loss_by_position": by_position, "loss_by_ratio": by_ratio, "stream_norms": norms}


def _pass(rack: Rack, batch: Batch, device: torch.device, before: _Passed | None) -> _Passed:
    """Pass a batch through a rack, from where it differs from the one before."""
    documents = several(batch.get("documents"))
    documents_BT = None if documents is None else documents.to(device)
    start = before.shared(rack, batch) if before else None
    if before is None or start is None:
        streams, norms, start = {0: rack.embedding(batch["input_ids"].to(device), input_time_step(batch))}, [], 0
        norms.append(streams[0].norm(dim=-1).median().item())
    else:
        streams, norms = {start: before.streams[start]}, before.norms[: start + 1]
    for n, stack in enumerate(rack.stacks[start:], start + 1):
        streams[n] = stack(streams[n - 1], documents_BT=documents_BT)
        norms.append(streams[n].norm(dim=-1).median().item())
        streams.pop(n - 2, None)
    return _Passed(batch, rack.embedding, list(rack.stacks), norms, streams)


def _losses_of(rack: Rack, stream_BTD: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy of every loss position [B, T], NaN elsewhere."""
    device = stream_BTD.device
    at_P = loss_positions(batch).flatten().nonzero().squeeze(1)
    losses = torch.full((batch["targets"].numel(),), torch.nan)
    for part_P in at_P.split(_LOGITS_AT_ONCE):
        logits_PV = rack.head(stream_BTD.flatten(0, 1)[part_P.to(device)])
        targets_P = batch["targets"].flatten()[part_P].to(device)
        losses[part_P] = F.cross_entropy(logits_PV.float(), targets_P, reduction="none").cpu()
    return losses.view(batch["targets"].shape)


def _in_spans(losses_BT: Tensor) -> dict[str, float]:
    """Return the means of positions 1, 2, 3 to 4, 5 to 8 and so on, by the last of each."""
    ends = [min(2**n, losses_BT.shape[1]) for n in range((losses_BT.shape[1] - 1).bit_length() + 1)]
    spans = {end: losses_BT[:, start:end] for start, end in zip([0, *ends], ends, strict=False)}
    return {str(end): span.nanmean().item() for end, span in spans.items() if bool(span.isfinite().any())}
