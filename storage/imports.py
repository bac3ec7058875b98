"""A checkpoint as the artifacts of a run: stacks that are adopted as they are, the last with embedding and head.

The ids of the stacks depend on the bytes of all, so everything is written before the first is sealed: into work/, from
where gc removes what a killed import left.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from stackwise_core.config import StackWiseConfig
from stackwise_core.config.schema import Precision
from stackwise_core.data.tokenizer import Tokenizer, load_tokenizer
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.failpoints import failpoint
from stackwise_core.interop.checkpoint import BESIDE, CONFIG, TOKENIZER, Checkpoint, check_precision
from stackwise_core.interop.hf_import import PRECISION, rack_tensors
from stackwise_core.interop.tensor_files import write_named
from stackwise_core.interop.tokenizer_json import end_tokens
from stackwise_core.stages.adopt import adopting
from stackwise_core.stages.costs import rack_parameters, stack_parameters
from stackwise_core.stages.identity import AdoptedRecipe, DataRecipe, canonical_json
from stackwise_core.stages.plan import RunPlan, plan_run
from stackwise_core.stages.stages import StackSpec
from storage.adopt import NO_TOKENIZER
from storage.artifacts import Artifacts, State
from storage.files import explain_full_disk, write_bytes
from storage.links import delete_path
from storage.manifest import fingerprint
from storage.runs import attempts, begin_attempt

_MOST_STACKS, _MOST_BLOCKS, _USUAL_STACKS = 1024, 128, 8
_LONGEST = 131072


class Imported(NamedTuple):
    """A checkpoint that is there as a run."""

    plan: RunPlan
    was_there: bool
    digest: str
    """Of the imported files of its folder."""


def cut(n_layers: int, blocks_per_stack: int | None) -> list[range]:
    """Return the layers of each stack; None cuts a model into at most 8. Raises ConfigError."""
    size = min(_MOST_BLOCKS, -(-n_layers // _USUAL_STACKS)) if blocks_per_stack is None else blocks_per_stack
    if not 1 <= size <= _MOST_BLOCKS or n_layers > size * _MOST_STACKS:
        allowed = f"1 to {_MOST_BLOCKS} blocks, and at most {_MOST_STACKS} stacks"
        raise ConfigError([Fault("--blocks-per-stack", str(blocks_per_stack), allowed)])
    return [range(first, min(first + size, n_layers)) for first in range(0, n_layers, size)]


def import_checkpoint(
    artifacts: Artifacts,
    name: str,
    checkpoint: Checkpoint,
    blocks_per_stack: int | None = None,
    precision: Precision | None = None,
    on_stack: Callable[[str], None] = lambda name: None,
) -> Imported:
    """Make a checkpoint the artifacts of a run, unless they are there.

    Args:
        artifacts: opened.
        name: of the run.
        checkpoint: whose tensors fit its config.json.
        blocks_per_stack: None cuts it into at most 8 stacks.
        precision: in which matrices of the stacks are stored; None keeps the type that they have.
        on_stack: called with the name of each artifact when it is sealed.

    Raises:
        ConfigError: the name belongs to another run, or the tokenizer does not fit the vocabulary.
        CheckpointError: a file is damaged, or changed while it was read.
    """
    if not checkpoint.described.family.causal:
        allowed = "it fills in masked tokens; `generate` and `evaluate` read the folder, and nothing can grow on it"
        raise ConfigError([Fault("config.json: architectures", checkpoint.described.family.architecture, allowed)])
    blocks = cut(checkpoint.described.n_layers, blocks_per_stack)
    kept = precision or PRECISION[checkpoint.dtype]
    config = _config(name, checkpoint, len(blocks))
    with ThreadPoolExecutor(1) as thread, artifacts.lock(f"import-{name}"), explain_full_disk(artifacts.root):
        digest = thread.submit(checkpoint.digest)  # hashing leaves the interpreter to others
        begun = _begun(artifacts, name)
        if begun and _is_whole(artifacts, begun):
            return _again(artifacts, name, begun, digest.result(), blocks, kept)
        scratch = artifacts.root / "work" / f"import-{name}"
        delete_path(scratch)
        try:
            files = _write(checkpoint, blocks, kept, scratch)
            plan = _plan(config, _recipes(checkpoint, blocks, kept, files), scratch)
            if TOKENIZER in files:
                config.data.tokenizer = str(artifacts.folder(plan.stages[-1].ref("stack")) / TOKENIZER)
            if begun and begun.adopted != plan.adopted:
                allowed = "an import of other files, or cut otherwise, began under it; choose another name"
                raise ConfigError([Fault("--name", repr(name), allowed)])
            source = {"folder": str(checkpoint.folder.resolve()), "sha256": digest.result()}
            checkpoint.check_unchanged()
            with begin_attempt(artifacts, config, plan):
                _seal(artifacts, plan, scratch, files, source, on_stack)
        finally:
            delete_path(scratch)
    return Imported(plan, False, digest.result())


def _config(name: str, checkpoint: Checkpoint, n_stacks: int) -> StackWiseConfig:
    """Return the configuration that the run records; `adopting` fills in the shape."""
    config, described = StackWiseConfig(), checkpoint.described
    config.run.name = name
    config.data.source = "none"
    config.data.seq_len = max(8, min(described.window or described.context, _LONGEST))
    config.model.from_ = str(checkpoint.folder.resolve())
    growth = config.training.progressive
    growth.training_objective = "clm"
    growth.max_stacks = max(growth.max_stacks, n_stacks)
    growth.target_stacks = n_stacks
    return config


def _begun(artifacts: Artifacts, name: str) -> RunPlan | None:
    """Return the plan of the import of this name, finished or not; raises ConfigError if another run has the name."""
    found = attempts(artifacts, name)
    if not found:
        return None
    plan = found[-1].plan
    if not plan.is_import:
        allowed = f"it is a run that was not imported, in {artifacts.uri}; choose another name"
        raise ConfigError([Fault("--name", repr(name), allowed)])
    return plan


def _is_whole(artifacts: Artifacts, plan: RunPlan) -> bool:
    """Return whether all stacks are sealed; raises ArtifactCorruptError if one is damaged."""
    found = [artifacts.lookup(stage.ref("stack")) for stage in plan.stages]
    if damaged := next((each.error for each in found if each.error), None):
        raise damaged
    return all(each.state is State.SEALED for each in found)


def _again(
    artifacts: Artifacts, name: str, plan: RunPlan, digest: str, blocks: list[range], precision: Precision
) -> Imported:
    """Return what is there; raises ConfigError if it is anything else than this import."""
    stacks = [recipe.stack for recipe in plan.adopted]
    source = artifacts.manifest(plan.stages[-1].ref("stack")).facts["imported"]
    if source["sha256"] != digest:
        allowed = f"run {name!r} was imported from {source['folder']} with other files; choose another name"
        raise ConfigError([Fault("--name", repr(name), allowed)])
    if [(stack.n_blocks, stack.precision) for stack in stacks] != [(len(each), precision) for each in blocks]:
        has = f"{stacks[0].n_blocks} blocks per stack and precision {stacks[0].precision}"
        raise ConfigError([Fault("--name", repr(name), f"it was imported with {has}; choose another name")])
    return Imported(plan, True, digest)


def _write(checkpoint: Checkpoint, blocks: list[range], precision: Precision, scratch: Path) -> dict[str, str]:
    """Write the files of the rack below a folder, those of the tokenizer at its top; return the sha256 of each."""
    check_precision(checkpoint.described.shape, precision)
    hashes: dict[str, str] = {}

    def write(path: str, data: bytes) -> None:
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(scratch / path, data)
        hashes[path] = hashlib.sha256(data).hexdigest()

    beside = {name: checkpoint.small(name) for name in (TOKENIZER, *BESIDE)}
    for name, data in {CONFIG: checkpoint.small(CONFIG), **beside}.items():
        if data is not None and (name == CONFIG or beside[TOKENIZER] is not None):
            write(name, data)
    if TOKENIZER in hashes:
        _check_vocabulary(load_tokenizer(str(scratch / TOKENIZER)), checkpoint)
        end_tokens(scratch / TOKENIZER)
    for number, (path, tensors) in enumerate(rack_tensors(checkpoint, blocks, precision)):
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        hashes[path] = write_named(scratch / path, tensors)
        failpoint("import-write", number)
    return hashes


def _check_vocabulary(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    rows = checkpoint.described.shape.vocab_size
    if tokenizer.vocab_size > rows:
        allowed = f"its largest id is {tokenizer.vocab_size - 1}; is it the tokenizer of another model?"
        raise ConfigError([Fault("config.json: vocab_size", str(rows), f"{TOKENIZER} does not match it: {allowed}")])


def _recipes(
    checkpoint: Checkpoint, blocks: list[range], precision: Precision, files: Mapping[str, str]
) -> tuple[AdoptedRecipe, ...]:
    rack = hashlib.sha256(canonical_json(dict(files)).encode()).hexdigest()
    described = checkpoint.described
    return tuple(
        AdoptedRecipe(
            shape=described.shape,
            mode="append",
            stack=StackSpec(index=stack, n_blocks=len(layers), precision=precision, adapters={}),
            files={name: files[path] for path, name in _files_of(files, stack, last=stack == len(blocks) - 1).items()},
            rack=rack,
            family=described.family.name,
            window=described.window,
        )
        for stack, layers in enumerate(blocks)
    )


def _files_of(files: Mapping[str, str], stack: int, *, last: bool) -> dict[str, str]:
    """Return the files of a stack's artifact: path below the scratch folder -> name in the artifact."""
    own = f"stack-{stack}/"
    return {path: path.removeprefix(own) for path in files if path.startswith(own) or (last and "/" not in path)}


def _plan(config: StackWiseConfig, recipes: Sequence[AdoptedRecipe], scratch: Path) -> RunPlan:
    """Return the plan of a run that has no corpus and nothing left to make."""
    filled = adopting(config, recipes)
    plan = plan_run(filled, "", adopted=recipes)
    there = scratch / TOKENIZER
    data = DataRecipe(
        corpus="",
        tokenizer=load_tokenizer(str(there)).name if there.exists() else NO_TOKENIZER,
        seq_len=config.data.seq_len,
        max_sequences=0,
        validation_fraction=config.data.validation_fraction,
    )
    stages = tuple(stage.model_copy(update={"validation": None}) for stage in plan.stages)
    return RunPlan(data=data, corpus_bytes=0, stages=stages)


def _seal(
    artifacts: Artifacts,
    plan: RunPlan,
    scratch: Path,
    files: Mapping[str, str],
    source: dict[str, str],
    on_stack: Callable[[str], None],
) -> None:
    """Move the files of each stack into its artifact, and seal it unless it is sealed."""
    for stage in plan.stages:
        ref, spec, recipe = stage.ref("stack"), stage.spec, stage.stack
        assert isinstance(recipe, AdoptedRecipe)
        with artifacts.lock(ref.name):
            if artifacts.state(ref) is not State.SEALED:
                artifacts.discard_work(ref)
                work, checksums = artifacts.work(ref), dict[str, tuple[int, str]]()
                for path, name in _files_of(files, spec.index, last=stage is plan.stages[-1]).items():
                    os.replace(scratch / path, work / name)
                    checksums[name] = (work / name).stat().st_size, f"sha256:{files[path]}"
                failpoint("import-seal", stage.index)
                facts: dict[str, Any] = {
                    "adopted": True,
                    "imported": {"family": recipe.family, **source},
                    "blocks": spec.n_blocks,
                    "stack_parameters": stack_parameters(stage.shape, spec.new),
                    "rack_parameters": rack_parameters(stage.shape, spec),
                }
                artifacts.seal(ref, recipe, (), facts, fingerprint(1, "cpu", compiled=False), checksums=checksums)
        on_stack(ref.name)
