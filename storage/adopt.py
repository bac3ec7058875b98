"""The plan of a run that may adopt a rack: a saved one, an imported one, or the one that the run recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.content import OnRead, nobody
from stackwise_core.data.tokenizer import load_tokenizer
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.adopt import adopted_recipes, check_adopting
from stackwise_core.stages.identity import AdoptedRecipe
from stackwise_core.stages.plan import RunPlan, SourceFacts, facts_together, plan_run
from stackwise_core.stages.saved_rack import RACK, SavedRack
from stackwise_core.strict import read_bounded
from storage.artifacts import Artifacts, State
from storage.corpora import facts_of
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.runs import all_attempts, attempts

NO_TOKENIZER = "none"
"""What the plan of an imported run says where its checkpoint has no tokenizer.json."""
_TOKENIZER = "tokenizer.json"
_MOST_OF_A_TOKENIZER = 2**29


def plan_in(artifacts: Artifacts, config: StackWiseConfig, on_read: OnRead = nobody) -> tuple[StackWiseConfig, RunPlan]:
    """Plan the run of a valid configuration; also return it with the adopted rack's shape, if it adopts one.

    The corpus is read only if its files are not as they were when it was read last; `on_read` is then told of it.

    Raises:
        CorpusError, SavedRackError: the corpus or the rack cannot be read.
        ConfigError: the configuration does not fit the rack.
    """
    if not config.model.from_:
        return config, _planned(config, facts_of(artifacts, config, on_read))
    adopted = _adopted(artifacts, config)
    filled = check_adopting(with_tokenizer(artifacts, config, adopted), adopted)
    return filled, _planned(filled, facts_of(artifacts, filled, on_read), adopted)


def _planned(config: StackWiseConfig, facts: Sequence[SourceFacts], adopted: tuple[AdoptedRecipe, ...] = ()) -> RunPlan:
    return plan_run(config, *facts_together(config, facts), adopted, facts)


def _adopted(artifacts: Artifacts, config: StackWiseConfig) -> tuple[AdoptedRecipe, ...]:
    """Return the recipes of the adopted stacks; a run that has adopted them does not need the folder any more."""
    given = config.model.from_
    before = next(reversed(attempts(artifacts, config.run.name)), None)
    known = before.plan.adopted if before and before.config.model.from_ == given else ()
    folder = Path(given).expanduser()
    if not (folder / RACK).exists() and (imported := _imported(artifacts, config)):
        found = imported
    elif known and not folder.exists():
        return known
    else:
        _check_folder(artifacts, given, folder)
        found = adopted_recipes(SavedRack.at(folder))
    if known and found != known:
        allowed = f"its rack is not what run {config.run.name!r} adopted; restore it, or choose another run.name"
        raise ConfigError([Fault("model.from", repr(given), allowed)])
    return found


def _imported(artifacts: Artifacts, config: StackWiseConfig) -> tuple[AdoptedRecipe, ...]:
    """Return the recipes of the run that `model.from` names; none if there is no such run."""
    name = config.model.from_
    run = next(iter(attempts(artifacts, name)), None)  # growing never changes what was imported
    if run is None:
        return ()
    adopted = run.plan.adopted
    if not adopted or not adopted[-1].family or len(adopted) != len(run.plan.stages):
        allowed = "this run was not imported; load it with storage.racks.load_builder, save() it, and give the folder"
        raise ConfigError([Fault("model.from", repr(name), allowed)])
    if config.run.name == name:
        raise ConfigError([Fault("run.name", repr(name), "it is that of the imported model; choose another")])
    for ref in (stage.ref("stack") for stage in run.plan.stages):
        if artifacts.state(ref) is State.ABSENT:
            remedy = f"Import the checkpoint again as {name}: what is missing will be made"
            raise ArtifactMissingError(artifacts.where(ref), f"is missing of the imported run {name}", remedy)
        artifacts.manifest(ref)  # raises if it is damaged
    return adopted


def _check_folder(artifacts: Artifacts, given: str, folder: Path) -> None:
    """Reject with a remedy what is neither a folder nor the name of a run, or is a checkpoint as it was downloaded."""
    if folder.is_dir() and not (folder / RACK).exists() and (folder / "config.json").exists():
        allowed = f"it is a checkpoint; `stackwise import {given} --name NAME` makes it a run, and then give NAME here"
        raise ConfigError([Fault("model.from", repr(given), allowed)])
    if not folder.exists() and "/" not in given:
        runs = [name for name, found in all_attempts(artifacts).items() if found[0].plan.is_import]
        allowed = f"there is neither a folder nor a run of this name; imported: {', '.join(runs) or 'none'}"
        raise ConfigError([Fault("model.from", repr(given), allowed)])


def with_tokenizer(
    artifacts: Artifacts, config: StackWiseConfig, adopted: tuple[AdoptedRecipe, ...]
) -> StackWiseConfig:
    """Return a configuration with the tokenizer that an imported model came with, if it did.

    Raises:
        ConfigError: the configuration names another one.
        ArtifactError: it is missing or damaged.
    """
    last = adopted[-1]
    if _TOKENIZER not in last.files:
        return config
    path = _tokenizer_of(artifacts, last, len(adopted) - 1)
    copied, data = config.model_copy(deep=True), config.data
    if data.tokenizer != "byte" and Path(data.tokenizer).exists() and Path(data.tokenizer) != path:
        theirs, its = load_tokenizer(data.tokenizer, data.end_token), load_tokenizer(str(path), data.end_token)
        if theirs.name != its.name:
            allowed = f"the model of run {config.model.from_} has another; leave the key out"
            raise ConfigError([Fault("data.tokenizer", repr(data.tokenizer), allowed)])
    copied.data.tokenizer = str(path)
    return copied


def _tokenizer_of(artifacts: Artifacts, last: AdoptedRecipe, stack: int) -> Path:
    found = artifacts.sealed_folder(last.ref(stack))
    beside = [name for name in last.files if not name.endswith(".safetensors")]
    path = artifacts.place.fetch(found, beside) / _TOKENIZER
    for name in beside:
        data = read_bounded(path.with_name(name), _MOST_OF_A_TOKENIZER)
        if hashlib.sha256(data).hexdigest() != last.files[name]:
            raise ArtifactCorruptError(path.with_name(name), "is not what was imported", "Import the model again")
    return path
