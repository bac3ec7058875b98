"""Finding an artifact by what a user typed."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.errors import ConfigError, Fault
from storage.artifacts import Artifacts
from storage.errors import ArtifactMissingError
from storage.manifest import read_manifest
from storage.runs import run_names


def find_artifact(artifacts: Artifacts, uri: str) -> Path:
    """Return the folder of an artifact given by path, by name, or by a unique prefix of its name.

    Raises:
        ArtifactError: there is no such artifact, or it was never sealed.
        ConfigError: the prefix is ambiguous.
    """
    if (Path(uri) / "manifest.json").exists():
        return Path(uri).absolute()
    name = Path(uri).name
    found = [folder for folder in artifacts.everything() if folder.name.startswith(name)]
    exact = [folder for folder in found if folder.name == name]
    if not found:
        if Path(uri).is_dir():
            read_manifest(Path(uri))  # raises, because it has no manifest
        runs = ", ".join(run_names(artifacts)) or "none"
        remedy = f"See `stackwise status RUN`; runs: {runs}"
        raise ArtifactMissingError(uri, f"is no artifact in {artifacts.uri}", remedy)
    if len(exact or found) != 1:
        names = ", ".join(folder.name for folder in found[:5])
        raise ConfigError([Fault("URI", repr(uri), f"{len(found)} artifacts begin so in {artifacts.uri}: {names}")])
    return (exact or found)[0]
