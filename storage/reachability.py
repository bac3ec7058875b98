"""What gc keeps: what the runs of a place planned, and what is pinned with all that it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from stackwise_core.errors import ConfigError, Fault
from stackwise_core.stages.identity import Ref
from stackwise_core.strict import read_bounded
from storage.artifacts import Artifacts
from storage.errors import ArtifactCorruptError, ArtifactMissingError
from storage.files import write_text
from storage.place import PINS
from storage.records import sealed, unsealed
from storage.runs import attempts, counting, run_names

OnDamage = Callable[[str], object]
"""Called with a message for each record that is damaged."""


@dataclass(frozen=True)
class Reachable:
    """Names of artifacts that must stay, by reason."""

    runs: dict[str, frozenset[str]]
    pinned: frozenset[str]
    """Pinned artifacts, and what they were made from."""

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.pinned.union(*self.runs.values())


def find_reachable(
    artifacts: Artifacts,
    runs: Iterable[str] | None = None,
    *,
    newest_only: bool = False,
    on_damage: OnDamage | None = None,
) -> Reachable:
    """Find what some runs (by default all) planned, or of each only the attempts that count, and what is pinned.

    Runs and pins that are damaged are left out if `on_damage` is given, which is called with a message for each.

    Raises:
        ArtifactCorruptError: a record of a run, or the manifest of a pinned artifact, cannot be trusted.
    """
    reached: dict[str, frozenset[str]] = {}
    for name in run_names(artifacts) if runs is None else runs:
        with telling(on_damage):
            reached[name] = frozenset(ref.name for ref in planned(artifacts, name, newest_only=newest_only))
    pinned = pins(artifacts, on_damage)
    with telling(on_damage):
        pinned = made_from(artifacts, pinned)
    return Reachable(reached, frozenset(ref.name for ref in pinned))


@contextlib.contextmanager
def telling(on_damage: OnDamage | None) -> Generator[None]:
    """Call `on_damage`, if it is given, with what is damaged instead of raising it."""
    try:
        yield
    except ArtifactCorruptError as error:
        if on_damage is None:
            raise
        on_damage(str(error))


def planned(artifacts: Artifacts, run: str, *, newest_only: bool = False) -> list[Ref]:
    """Return every artifact that a run planned, each after what it is made from."""
    found = attempts(artifacts, run)
    chosen = counting(artifacts, found) if newest_only else found
    return list(dict.fromkeys(ref for attempt in chosen for ref in attempt.plan.recipes))


def newest_first(artifacts: Artifacts) -> list[str]:
    """Return the names of all runs by when they were last started, the newest first."""
    started = {name: attempts(artifacts, name)[-1].start["started"] for name in run_names(artifacts)}
    return sorted(started, key=lambda name: (started[name], name), reverse=True)


def made_from(artifacts: Artifacts, refs: Iterable[Ref]) -> list[Ref]:
    """Return artifacts and, by the manifests that are there, all that they were made from, in no order."""
    found, to_ask = dict[Ref, None](), list(refs)
    while to_ask:
        ref = to_ask.pop()
        if ref in found:
            continue
        found[ref] = None
        if (manifest := artifacts.known(ref)) is not None:
            to_ask += [entry.ref for entry in manifest.inputs]
    return list(found)


# ---------------------------------------------------------------- pins


def pins(artifacts: Artifacts, on_damage: OnDamage | None = None) -> list[Ref]:
    """Return what is pinned, sorted by name. A pin is a file with the artifact's name that contains its full id.

    A damaged pin raises ArtifactCorruptError, or `on_damage` is called with its message.
    """
    found: list[Ref] = []
    for path in sorted((artifacts.root / PINS).glob("*.json")):
        with telling(on_damage):
            found.append(_read_pin(artifacts, path))
    return found


def _read_pin(artifacts: Artifacts, path: Path) -> Ref:
    try:
        ref = Ref.model_validate(unsealed(read_bounded(path)))
        if path.stem != ref.name:
            raise ValueError(f"it is named after another than {ref.name}")
        return ref
    except (OSError, ValueError):
        remedy = "Remove it, and pin again the artifact it is named after"
        raise ArtifactCorruptError(artifacts.location(path), "is not a pin", remedy) from None


def pin(artifacts: Artifacts, ref: Ref) -> None:
    """Protect an artifact, and all it was made from, from gc."""
    path = artifacts.root / PINS / f"{ref.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_text(path, sealed(ref.model_dump()))
    artifacts.place.share(path)


def unpin(artifacts: Artifacts, name: str) -> Ref:
    """Remove a pin, given by the artifact's name or a unique start of it.

    Raises:
        ArtifactMissingError: nothing of that name is pinned.
        ConfigError: several are.
    """
    found = [ref for ref in pins(artifacts) if ref.name.startswith(name)]
    if not found:
        there = ", ".join(ref.name for ref in pins(artifacts)) or "none"
        raise ArtifactMissingError(name, "is not pinned", f"Pinned in {artifacts.uri}: {there}")
    exact = [ref for ref in found if ref.name == name] or found
    if len(exact) > 1:
        names = ", ".join(ref.name for ref in exact)
        raise ConfigError([Fault("--unpin", repr(name), f"{len(exact)} pins begin so: {names}")])
    path = artifacts.root / PINS / f"{exact[0].name}.json"
    artifacts.place.unshare(path)
    path.unlink()
    return exact[0]
