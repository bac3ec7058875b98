"""What `--artifacts` names: a folder, or an object store."""

from __future__ import annotations

from pathlib import Path

from storage.layout import Artifacts


def artifacts_at(root: Path | str) -> Artifacts:
    """Return the artifacts of a folder or of a URI such as s3://bucket/prefix; nothing is asked yet."""
    if "://" in str(root):
        from storage.objects.remote import RemoteArtifacts

        return RemoteArtifacts(str(root))
    return Artifacts(root)
