"""What `--artifacts` names: a folder, or an object store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storage.layout import Artifacts

if TYPE_CHECKING:
    from storage.objects.remote import RemoteArtifacts


def artifacts_at(root: Path | str) -> Artifacts:
    """Return the artifacts of a folder or of a URI such as s3://bucket/prefix; nothing is asked yet."""
    if "://" in str(root):
        from storage.objects.remote import RemoteArtifacts

        return RemoteArtifacts(str(root))
    return Artifacts(Path(root).expanduser() if str(root).startswith("~") else root)  # a form has no shell


def as_remote(artifacts: Artifacts) -> RemoteArtifacts | None:
    """Return artifacts in an object store as what they are; None: they are in a folder."""
    if not artifacts.is_remote:
        return None
    from storage.objects.remote import RemoteArtifacts

    assert isinstance(artifacts, RemoteArtifacts)
    return artifacts
