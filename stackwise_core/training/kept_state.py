"""What the optimizer of a stage goes on from: what the stage before left, and what a new stack takes of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

import torch
from torch import Tensor, nn

from stackwise_core.model.growth_operators import copied_block
from stackwise_core.stages.stages import StageSpec
from stackwise_core.training.adamw8bit import BLOCK, SCALES, STATE, in_8_bits, in_float32
from stackwise_core.training.optimizer import eight_bit_parameters, muon_parameters
from stackwise_core.training.stage_model import StageModel
from stackwise_core.training.training import trainable

_TIED, _EMBEDDING = "head.projection.weight", "embedding.weight"
_ADAMW, _MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
"""What each keeps for a parameter; `step` is a scalar, so that each has its bias correction."""


def kept_moments(model: StageModel, spec: StageSpec, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the optimizer of a stage begins with, as `<name>.<moment>`.

    Args:
        model: of the stage.
        spec: of the stage; `spec.state` says what it takes.
        left: the moments that the stage before left, by the names that its model had.
    """
    if spec.state == "nothing":
        return {}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in left.items():
        name, _, moment = key.rpartition(".")
        by_name.setdefault(_bare(name), {})[moment] = value
    was_tied = "head.norm.weight" in by_name and _TIED not in by_name
    wanted = dict.fromkeys((id(p) for p in muon_parameters(model, spec.optim)), _MUON)
    wanted |= dict.fromkeys((id(p) for p in eight_bit_parameters(model, spec.optim)), STATE)
    found = dict[str, Tensor]()
    for name, parameter in trainable(model):
        kept = by_name.get(_EMBEDDING if name == _TIED and was_tied else _bare(name), {})
        if not kept and spec.state == "kept and copied":
            kept = _of_sources(name, spec, by_name)
        kept = _as(wanted.get(id(parameter), _ADAMW), kept)
        if kept and _fit(kept, parameter):
            found |= {f"{name}.{moment}": value for moment, value in kept.items()}
    return found


def _as(wanted: Set[str], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a parameter as its optimizer has it, nothing if that of another cannot become it."""
    if set(kept) == STATE and wanted == _ADAMW:
        return in_float32(kept)
    if set(kept) == _ADAMW and wanted == STATE:
        return in_8_bits(kept)
    return dict(kept) if set(kept) == wanted else {}


def _of_sources(name: str, spec: StageSpec, left: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the moments of what a parameter of the new stack is a copy of; of two sources the mean."""
    found = [left.get(source, {}) for source in _copied_from(_bare(name), spec)]
    if len(found) == 1:
        return dict(found[0])
    found = [in_float32(each) for each in found]
    if not found or not all(each.keys() == found[0].keys() for each in found):
        return {}
    return {moment: torch.stack([each[moment] for each in found]).mean(0) for moment in found[0]}


def _copied_from(name: str, spec: StageSpec) -> Iterator[str]:
    """Yield the names of what a parameter of the new stack is a copy of."""
    prefix = f"stacks.{spec.index}.blocks."
    if not name.startswith(prefix) or ".lora_" in name:  # a copy has fresh adapters
        return
    block, _, rest = name.removeprefix(prefix).partition(".")
    for source in spec.sources:
        n_blocks, of = spec.new.n_blocks, spec.stacks[source].n_blocks
        copied = copied_block(int(block), n_blocks, of, interleaved=spec.init.interleaved)
        yield f"stacks.{source}.blocks.{copied}.{rest}"


def _bare(name: str) -> str:
    """Return the name that a parameter has in a layer without adapters: the trunk may have been given some since."""
    return name.replace(".base_layer.", ".")


def _fit(moments: Mapping[str, Tensor], parameter: nn.Parameter) -> bool:
    """Return whether moments have the shapes of a parameter's."""
    others = {"step": (), **dict.fromkeys(SCALES, (-(-parameter.numel() // BLOCK),))}
    return all(value.shape == others.get(moment, parameter.shape) for moment, value in moments.items())
