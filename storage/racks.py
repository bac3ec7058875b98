"""A rack that a run has grown, at any depth, opened in the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.corpus import tokenizer_of
from stackwise_core.config.stacks import settings_of
from stackwise_core.data.tokenizer import Tokenizer
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.model.adapters import adapter_names, merged_dense
from stackwise_core.model.blocks import Stack
from stackwise_core.model.precision import base_linears, storage_of
from stackwise_core.model.rack import Rack
from stackwise_core.model.rack_builder import ProgressiveRackBuilder
from stackwise_core.model.saved_builder import check_no_code
from stackwise_core.model.snapshot import Snapshot
from stackwise_core.stages.adopt import adopting
from stackwise_core.stages.plan import StagePlan
from storage.artifacts import Artifacts, State, artifacts_at
from storage.checkpoints import load_all_channels, load_embedding, load_head, load_stack
from storage.runs import Attempt, find_run


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
        return _config(self.attempt)

    def rack(self, *, dense: bool = False) -> Rack:
        """Return its rack, see `load_rack`; `dense` gives float32 stacks, adapters merged, which are faster to run."""
        rack = _rack(self.artifacts, self.stages)
        for number, stack in enumerate(rack.stacks if dense else ()):
            if isinstance(stack, Stack) and not _is_dense(stack):
                rack.stacks[number] = merged_dense(stack)
        return rack.requires_grad_(False).eval()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that it was trained with; raises ConfigError if the file is gone or is another now."""
        tokenizer, expected = tokenizer_of(self.config), self.attempt.plan.data.tokenizer
        if tokenizer.name != expected:
            allowed = f"run {self.attempt.name} was trained with another ({expected}); restore that file"
            raise ConfigError([Fault("data.tokenizer", repr(self.config.data.tokenizer), allowed)])
        return tokenizer


def open_run(uri: str | Path, run: str, depth: int | None = None) -> OpenedRun:
    """Find the rack of a run without loading it; arguments and errors as those of `load_rack`."""
    artifacts = artifacts_at(uri).existing()
    attempt = find_run(artifacts, run)
    return OpenedRun(artifacts, attempt, _stages(artifacts, attempt, depth))


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
    builder, channels = ProgressiveRackBuilder(config), load_all_channels(artifacts, stages)
    builder.take_rack(_rack(artifacts, stages), last.anatomy.order, channels, settings_of(config, 0).mode)
    if last.mode == "joint" and len(stages) > 1:
        before = Snapshot.all_of(_rack(artifacts, stages[:-1]), dict(builder.channels))
        builder.keep_annealed("", before)  # what settings it was made with matters only to a trainer of the library
    return builder


def _config(attempt: Attempt) -> StackWiseConfig:
    """Return the configuration of a run, as one that the library could have grown the rack with."""
    if not (adopted := attempt.plan.adopted):
        return attempt.config
    filled = adopting(attempt.config, adopted)
    filled.model.from_ = ""
    return StackWiseConfig.model_validate(filled.model_dump())  # the library does not adopt: it has the rack


def _stages(artifacts: Artifacts, attempt: Attempt, depth: int | None) -> tuple[StagePlan, ...]:
    """Return the stages of a run up to the one that left the rack of a depth."""
    stages = attempt.plan.stages
    sealed = [artifacts.state(stage.ref("stack")) is State.SEALED for stage in stages]
    trained = stages[: sealed.index(False)] if False in sealed else stages
    # Of equal depths the first: the other is annealed. Of an adopted rack only the last stack has a head.
    by_depth = {len(stage.spec.stacks): stage for stage in reversed(trained) if stage.validation}
    if depth is None and by_depth:
        return trained
    if depth not in by_depth:
        there = ", ".join(map(str, sorted(by_depth))) or "none yet: its first stage is not trained"
        allowed = f"the run {attempt.name} has racks of these depths: {there}"
        raise ConfigError([Fault("depth", repr(depth), allowed)])
    return stages[: by_depth[depth].index + 1]


def _rack(artifacts: Artifacts, stages: tuple[StagePlan, ...]) -> Rack:
    last = stages[-1]
    with torch.random.fork_rng(devices=[]):  # modules draw numbers, which are then replaced
        rack = Rack(last.shape)
        rack.untie()
        rack.embedding, rack.head = load_embedding(artifacts, stages), load_head(artifacts, stages)
        rack.stacks.extend(load_stack(artifacts, stages, stack) for stack in last.spec.anatomy.order)
    ends = rack.embedding.weight, rack.head.projection.weight
    if last.shape.tie_embeddings and len(stages) == 1 and torch.equal(*ends):  # one matrix, until a second stage
        rack.tie()
    return rack.requires_grad_(False).eval()


def _is_dense(stack: Stack) -> bool:
    return not adapter_names(stack) and {storage_of(linear) for linear in base_linears(stack).values()} == {"float32"}
