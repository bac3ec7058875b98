"""The plan of a run that may adopt a rack: read from its folder, or from what the run recorded of it."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.content import OnRead, nobody
from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.adopt import adopted_recipes, check_adopting
from stackwise_core.stages.identity import AdoptedRecipe
from stackwise_core.stages.plan import RunPlan, plan_run
from stackwise_core.stages.saved_rack import SavedRack
from storage.artifacts import Artifacts
from storage.corpora import facts_of
from storage.runs import attempts


def plan_in(artifacts: Artifacts, config: StackWiseConfig, on_read: OnRead = nobody) -> tuple[StackWiseConfig, RunPlan]:
    """Plan the run of a valid configuration; also return it with the adopted rack's shape, if it adopts one.

    The corpus is read only if its files are not as they were when it was read last; `on_read` is then told of it.

    Raises:
        CorpusError, SavedRackError: the corpus or the rack cannot be read.
        ConfigError: the configuration does not fit the rack.
    """
    if not config.model.from_:
        return config, plan_run(config, *facts_of(artifacts, config, on_read))
    adopted = _adopted(artifacts, config)
    filled = check_adopting(config, adopted)
    return filled, plan_run(filled, *facts_of(artifacts, filled, on_read), adopted)


def _adopted(artifacts: Artifacts, config: StackWiseConfig) -> tuple[AdoptedRecipe, ...]:
    """Return the recipes of the adopted stacks; a run that has adopted them does not need the folder any more."""
    given = config.model.from_
    before = next(reversed(attempts(artifacts, config.run.name)), None)
    known = before.plan.adopted if before and before.config.model.from_ == given else ()
    folder = Path(given).expanduser()
    if known and not folder.exists():
        return known
    found = adopted_recipes(SavedRack.at(folder))
    if known and found != known:
        allowed = f"its rack is not what run {config.run.name!r} adopted; restore it, or choose another run.name"
        raise ConfigError([Fault("model.from", repr(given), allowed)])
    return found
