"""A rack that a run has grown, at any depth, opened in the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.schema import Mode
from stackwise_core.config.stacks import resolve_time_input, settings_of
from stackwise_core.data.masks import IntArray
from stackwise_core.data.sequences import PackedSequences
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.generation.unmask import Denoiser
from stackwise_core.interop.parts import dense_rack
from stackwise_core.model.rack import Rack
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.saved_builder import check_no_code
from stackwise_core.model.snapshot import Snapshot
from stackwise_core.stages.adopt import adopting
from stackwise_core.stages.identity import StackRecipe
from stackwise_core.stages.plan import StagePlan
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.stages import last_trained
from storage.adopt import NO_TOKENIZER, with_tokenizer
from storage.artifacts import Artifacts, State, artifacts_at
from storage.checkpoints import load_all_channels, load_embedding, load_head, load_stack
from storage.runs import Attempt, find_run
from storage.sequences import load_sequences


@dataclass(frozen=True)
class OpenedRun:
    """A run whose rack is there at some depth."""

    artifacts: Artifacts
    attempt: Attempt
    stages: tuple[StagePlan, ...]
    """Up to the one that left the rack of this depth."""

    @property
    def config(self) -> StackWiseConfig:
        """Its configuration, with the shape of the rack that it adopted, if any."""
        return _config(self.artifacts, self.attempt)

    @property
    def is_imported(self) -> bool:
        """Whether its first stacks are those of a model that was trained elsewhere, on texts with its start tokens."""
        return any(recipe.family for recipe in self.attempt.plan.adopted)

    @property
    def called(self) -> dict[str, str]:
        """What a document calls it."""
        return {"run": self.attempt.name}

    @property
    def ids(self) -> dict[str, Any]:
        """What a document says of its rack."""
        stage = self.stages[-1]
        said = {"stage": stage.index, "how": stage.spec.name, "depth": len(stage.spec.stacks)}
        return {**said, "stack": stage.ref("stack").name}

    @property
    def shape(self) -> ModelShape:
        """The shape of its rack."""
        return self.stages[-1].shape

    def rack(self, *, dense: bool = False) -> Rack:
        """Return its rack, see `load_rack`; `dense` gives float32 stacks, adapters merged, which are faster to run."""
        rack = _rack(self.artifacts, self.stages)
        return dense_rack(rack) if dense else rack

    def denoisers(self, device: torch.device | None = None) -> list[Denoiser]:
        """Return dense racks that fill in masked tokens: one or, where depth is time, one for each depth by its noise.

        A depth is the rack as its stage left it; after a joint anneal, those of the annealed stacks that it had.
        """
        stages, config = self.stages, self.config
        last = stages[-1]
        time = resolve_time_input(config)
        if config.training.progressive.time_interpretation != "depth":
            steps = np.arange(time.n_steps, dtype=np.int64) if time else None
            ratios = tuple(time.ratios(steps).tolist()) if time and steps is not None else ()
            return [Denoiser(self.rack(dense=True).to(device), step_ratios=ratios)]
        if isinstance(last.stack, StackRecipe) and last.stack.joint_times:
            whole, order = self.rack(dense=True), last.spec.anatomy.order
            spans = last.stack.joint_spans or (None,) * len(order)
            pairs = zip(last.stack.joint_times, spans, strict=True)
            ratios = [span.up_to if span else ratio for (_, ratio), span in pairs]
            racks = [
                _part(whole, [number for number, stack in enumerate(order) if stack <= c]) for c in range(len(order))
            ]
        else:
            having = [stage for stage in stages if stage.mask is not None and stage.has_head]
            ratios = [mask.span.up_to if mask.span else mask.ratio for stage in having if (mask := stage.mask)]
            racks = list(self.racks(having))
        found = [Denoiser(rack.to(device), ratio) for rack, ratio in zip(racks, ratios, strict=True)]
        return sorted(found, key=lambda denoiser: denoiser.ratio, reverse=True)

    def racks(self, stages: Sequence[StagePlan]) -> Iterator[Rack]:
        """Yield the dense racks of some stages; a stack is loaded once as long as no stage between changes it."""
        loaded = dict[tuple[object, ...], nn.Module]()
        for stage in stages:
            so_far = self.stages[: stage.index + 1]
            rack = dense_rack(_rack(self.artifacts, so_far, loaded))
            states = [_state_of(so_far, stack) for stack in stage.spec.anatomy.order]
            loaded = dict(zip(states, rack.stacks, strict=True))
            yield rack

    def validation_rows(self) -> Iterator[IntArray]:
        """Yield its validation sequences [T], mapped into memory; raises ConfigError if it has none here."""
        validation = self._validation()
        for row in range(len(validation)):
            yield validation.take(np.asarray([row]))[0][0]

    def validation_fields(self, most: int) -> dict[str, Any]:
        """Return the first of its validation sequences as a batch; raises ConfigError if it has none here."""
        validation = self._validation()
        return validation.fields(np.arange(min(most, len(validation))))

    def _validation(self) -> PackedSequences:
        ref = self.attempt.plan.data_ref
        if self.artifacts.state(ref) in (State.ABSENT, State.RETIRED):
            allowed = f"run {self.attempt.name} has no validation sequences in {self.artifacts.uri}; name a text"
            raise ConfigError([Fault("--data", "nothing", allowed)])
        return load_sequences(self.artifacts, ref)[1]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that it was trained with; raises ConfigError if the file is gone or is another now."""
        expected = self.attempt.plan.data.tokenizer
        if expected == NO_TOKENIZER:
            allowed = "its checkpoint has no tokenizer.json; add one to the folder and import it under another name"
            raise ConfigError([Fault("RUN", repr(self.attempt.name), allowed)])
        tokenizer = tokenizer_of(self.config)
        if tokenizer.name != expected:
            allowed = f"run {self.attempt.name} was trained with another ({expected}); restore that file"
            raise ConfigError([Fault("data.tokenizer", repr(self.config.data.tokenizer), allowed)])
        return tokenizer


_NONE_YET = "none yet: its first stage is not trained"


def open_run(uri: str | Path, run: str, depth: int | None = None) -> OpenedRun:
    """Find the rack of a run without loading it; arguments and errors as those of `load_rack`."""
    artifacts = artifacts_at(uri).existing()
    attempt = find_run(artifacts, run)
    return OpenedRun(artifacts, attempt, _stages(artifacts, attempt, depth))


def open_runs(uri: str | Path, run: str) -> list[OpenedRun]:
    """Find the racks of a run at every depth, and after its joint anneal; raises ConfigError if there is none."""
    whole = open_run(uri, run)
    having = [stage.index + 1 for stage in whole.stages if stage.has_head]
    return [OpenedRun(whole.artifacts, whole.attempt, whole.stages[:end]) for end in having]


def load_rack(uri: str | Path, run: str, depth: int | None = None) -> Rack:
    """Return the rack of a run on the CPU, every stack in its storage type, nothing of it training.

    Args:
        uri: what `--artifacts` takes: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
        run: name of the run; its newest attempt counts, or an earlier one that added more stacks to the same.
        depth: the number of stacks, as the stage that added the last of them left the rack; None is the rack as far
            as it is trained, after the joint anneal if there is one.

    Raises:
        ConfigError: there is no such run, or no rack of this depth; it lists what there is.
        ArtifactError: a file is missing or damaged.
    """
    return open_run(uri, run, depth).rack()


def load_builder(
    uri: str | Path, run: str, depth: int | None = None, *, trust_functions: bool = False
) -> ProgressiveRackBuilder:
    """Return the rack of a run in a builder with the run's configuration, to grow on; see `load_rack`.

    Growth goes on from the rack before its joint anneal, if there is one, as it does in a run. `trust_functions`
    imports the functions that the configuration names, which may have come with the artifacts: without it, they are
    refused with a ConfigError.
    """
    opened = open_run(uri, run, depth)
    artifacts, attempt, stages = opened.artifacts, opened.attempt, opened.stages
    config, last = opened.config, stages[-1].spec
    check_no_code(config, attempt.where, trusted=trust_functions)
    modes: list[Mode] = [stage.spec.mode for stage in stages if stage.spec.mode != "joint"]
    if not modes:  # joint training from scratch adds all stacks as the configuration says
        modes = [settings_of(config, stack).mode for stack in range(len(last.stacks))]
    builder, channels = ProgressiveRackBuilder(config), load_all_channels(artifacts, stages)
    builder.take_rack(_rack(artifacts, stages), last.anatomy.order, channels, modes)
    if last.mode == "joint" and len(stages) > 1:
        before = Snapshot.all_of(_rack(artifacts, stages[:-1]), dict(builder.channels))
        builder.keep_annealed("", before)  # what settings it was made with matters only to a trainer of the library
    return builder


def _config(artifacts: Artifacts, attempt: Attempt) -> StackWiseConfig:
    """Return the configuration of a run, as one that the library could have grown the rack with."""
    if not (adopted := attempt.plan.adopted):
        return attempt.config
    filled = adopting(with_tokenizer(artifacts, attempt.config, adopted), adopted)
    filled.model.from_ = ""
    return StackWiseConfig.model_validate(filled.model_dump())  # the library does not adopt: it has the rack


def _stages(artifacts: Artifacts, attempt: Attempt, depth: int | None) -> tuple[StagePlan, ...]:
    """Return the stages of a run up to the one that left the rack of a depth."""
    stages = attempt.plan.stages
    # What is damaged was trained: reading it says so.
    there_are = [artifacts.state(stage.ref("stack")) in (State.SEALED, State.CORRUPT) for stage in stages]
    trained = stages[: there_are.index(False)] if False in there_are else stages
    # Of equal depths the first: the other is annealed. Of an adopted rack only the last stack has a head.
    by_depth = {len(stage.spec.stacks): stage for stage in reversed(trained) if stage.has_head}
    if depth is None and by_depth:
        return trained
    if depth not in by_depth:
        imported = any(recipe.family for recipe in attempt.plan.adopted)
        none = "none: a stack of the imported model is missing; import it again" if imported else _NONE_YET
        there = ", ".join(map(str, sorted(by_depth))) or none
        allowed = f"the run {attempt.name} has racks of these depths: {there}"
        raise ConfigError([Fault("depth", repr(depth), allowed)])
    return stages[: by_depth[depth].index + 1]


def _rack(
    artifacts: Artifacts, stages: tuple[StagePlan, ...], loaded: Mapping[tuple[object, ...], nn.Module] | None = None
) -> Rack:
    """Return the rack that stages left; stacks that are `loaded`, by their state, are taken from there."""
    last, loaded = stages[-1], loaded or {}
    with torch.device("meta"):
        rack = Rack(last.shape)
    rack.untie()
    rack.embedding, rack.head = load_embedding(artifacts, stages), load_head(artifacts, stages)
    for stack in last.spec.anatomy.order:
        there = loaded.get(_state_of(stages, stack)) if loaded else None
        rack.stacks.append(load_stack(artifacts, stages, stack) if there is None else there)
    ends = rack.embedding.weight, rack.head.projection.weight
    if last.shape.tie_embeddings and len(stages) == 1 and torch.equal(*ends):  # one matrix, until a second stage
        rack.tie()
    return rack.requires_grad_(False).eval()


def _state_of(stages: Sequence[StagePlan], stack: int) -> tuple[object, ...]:
    """Return what tells a stack as some stages left it from the same stack as others did."""
    anatomies = [stage.spec.anatomy for stage in stages]
    base, adapters = last_trained(anatomies, stack, "base"), last_trained(anatomies, stack, "adapters")
    return stack, base, adapters, tuple(stages[-1].spec.stacks[stack].adapters)


def _part(rack: Rack, numbers: Sequence[int]) -> Rack:
    """Return a rack of some of a rack's stacks, by their places, with the same ends; nothing is copied."""
    with torch.device("meta"):
        part = Rack(rack.shape)
    part.embedding, part.head = rack.embedding, rack.head
    part.stacks.extend(rack.stacks[number] for number in numbers)
    return part.eval()
