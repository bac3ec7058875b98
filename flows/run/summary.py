"""What a run came to, stage by stage, read from its manifests."""

from __future__ import annotations

from pydantic import BaseModel

from stackwise_core.stages.identity import Kind
from stackwise_core.stages.plan import RunPlan, StagePlan
from storage.artifacts import Artifacts, State
from storage.manifest import Manifest, read_manifest
from storage.midstage import bytes_written, step_reached


class StageSummary(BaseModel, frozen=True):
    """One stage. A number that is not known yet is None."""

    stage: int
    name: str
    """How people call it: 'append, frozen, full'."""
    states: dict[str, str]
    """State on disk of each artifact, by kind; 'none' where the stage makes none."""
    artifacts: dict[str, str]
    """Name of each artifact, by kind."""
    steps: int
    """Of training."""
    steps_kept: int | None = None
    """That need not be taken again, of a stage that is not trained yet; None: it has no checkpoint."""
    bytes_kept: int = 0
    """Of a store that is not sealed yet: its shards that are written."""
    stacks: int
    """Of the rack after this stage."""
    blocks: int
    """That this stage added; in joint training, all."""
    rack_parameters: int | None = None
    trainable_parameters: int | None = None
    train_loss: float | None = None
    """At the last step [nats per loss position]."""
    validation_loss: float | None = None
    """[nats per loss position]"""
    mask_ratio: float | None = None
    """Of the masked objective: losses of stages at different ratios are not comparable."""
    by_mask_ratio: dict[str, float] = {}
    """Validation losses at ratios that all stages share, where their own differ [nats per loss position]."""
    seconds: float | None = None
    """Of all five tasks."""
    tokens_per_second: int | None = None
    """While training."""
    cache_bytes: int | None = None
    """Of the store this stage wrote, also if it was retired since."""
    cache_note: str = ""
    """Why there is no store, or where it came from."""


def summarise(artifacts: Artifacts, plan: RunPlan) -> list[StageSummary]:
    """Return one summary per stage of a plan, whatever of it exists."""
    return [_summarise_stage(artifacts, stage) for stage in plan.stages]


def _summarise_stage(artifacts: Artifacts, stage: StagePlan) -> StageSummary:
    kinds: list[Kind] = [kind for kind in _KINDS if stage.recipe(kind) is not None]
    states = {kind: artifacts.state(stage.ref(kind)) for kind in kinds}
    manifests = {kind: found for kind in kinds if (found := _manifest(artifacts, stage, kind, states[kind]))}
    facts = {kind: manifest.facts for kind, manifest in manifests.items()}
    stack, cache, validation = (facts.get(kind, {}) for kind in ("stack", "activations", "validation"))
    seconds = [found.get("seconds", 0.0) for found in facts.values()]
    return StageSummary(
        stage=stage.index,
        name=stage.spec.name,
        states={kind: states[kind].value if kind in states else "none" for kind in _KINDS},
        artifacts={kind: stage.ref(kind).name for kind in kinds},
        steps=stage.stack.optim.steps,
        steps_kept=None if stack else step_reached(artifacts, stage.ref("stack")),
        bytes_kept=bytes_written(artifacts, stage.ref("activations")) if "activations" in kinds else 0,
        stacks=len(stage.spec.stacks),
        blocks=stage.spec.n_blocks,
        rack_parameters=stack.get("rack_parameters"),
        trainable_parameters=stack.get("trainable_parameters"),
        train_loss=stack.get("train_loss"),
        validation_loss=validation.get("validation_loss"),
        mask_ratio=stage.stack.mask.mean_ratio if stage.stack.mask else None,
        by_mask_ratio=validation.get("by_mask_ratio", {}),
        seconds=round(sum(seconds), 1) if stack else None,
        tokens_per_second=stack.get("tokens_per_second"),
        cache_bytes=manifests["activations"].n_bytes if "activations" in manifests else None,
        cache_note=f"from {cache['from']}" if cache else stage.no_cache_reason,
    )


def _manifest(artifacts: Artifacts, stage: StagePlan, kind: Kind, state: State) -> Manifest | None:
    if state not in (State.SEALED, State.RETIRED):
        return None
    return read_manifest(artifacts.folder(stage.ref(kind)), stage.ref(kind))


_KINDS: tuple[Kind, ...] = ("build", "trunk", "stack", "activations", "validation")
