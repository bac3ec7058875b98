"""The moment an artifact of an object store becomes, or stops to be, what everyone reads."""

from __future__ import annotations

import logging
from pathlib import Path

from storage.manifest import MANIFEST, RETIRED, Manifest
from storage.objects.bucket import Bucket
from storage.objects.folder import ObjectFolder
from storage.objects.looks import Look, Looks, key_of

_log = logging.getLogger(__name__)


def publish(bucket: Bucket, looks: Looks, work: Path, ours: Manifest, replaces: str | None) -> bool:
    """Put the files of a work folder, then its manifest under a condition.

    Args:
        bucket: where.
        looks: at what is there.
        work: the folder, its manifest in it.
        ours: that manifest.
        replaces: seal that was in place when the attempt began, '' for none; None if that is not known, since
            the attempt was begun by a process that died.

    Returns:
        Whether ours is what is sealed now. If not, another machine has sealed the artifact meanwhile.
    """
    key = key_of(ours.ref)
    before = looks.now(ours.ref)
    ours_is_there = before is not None and before.manifest.seal == ours.seal
    if before and not ours_is_there and not before.retired and before.manifest.seal != replaces:
        return _lost(bucket.where(key), ours, before)
    files = ObjectFolder(bucket, key, ours.attempt)
    there = {name: entry.size for name, entry in bucket.list(files.prefix).items()}
    if (work / RETIRED).exists():  # a copy of what was retired where it comes from
        bucket.write(f"{files.prefix}/{RETIRED}", (work / RETIRED).read_bytes())
    else:
        files.upload(work, ours.checksums(), there, f"upload-{ours.ref.kind}")
        bucket.delete([f"{files.prefix}/{RETIRED}"] if RETIRED in there else [])
    if ours_is_there:
        return True
    data = (work / MANIFEST).read_bytes()
    if before:
        bucket.replace(f"{key}/{MANIFEST}", data, before.entry)
    else:
        bucket.create(f"{key}/{MANIFEST}", data)
    # Not by the answer: a request that was repeated on a lost connection may have met its own first success.
    after = looks.now(ours.ref)
    if after is None or after.manifest.seal != ours.seal:
        delete_below(bucket, files.prefix)
        return _lost(bucket.where(key), ours, after)
    if before:
        delete_below(bucket, looks.folder(before).prefix)
    return True


def _lost(where: str, ours: Manifest, theirs: Look | None) -> bool:
    """Say so if another machine made other bytes of the same recipe."""
    if theirs and theirs.manifest.digest != ours.digest:
        _log.warning(
            "%s was sealed by another machine with other bytes (digest %s, here %s), and is used as it is there: "
            "another version, device or number of threads computes other bits",
            where,
            theirs.manifest.digest[:12],
            ours.digest[:12],
        )
    return False


def set_aside(bucket: Bucket, look: Look, looks: Looks, reason: str) -> str:
    """Move an artifact to quarantine/, the manifest first, and return its key there."""
    target = f"quarantine/{look.manifest.ref.name}.{look.manifest.attempt}"
    bucket.write(f"{target}/reason.txt", (reason + "\n").encode())
    bucket.move(f"{look.key}/{MANIFEST}", f"{target}/{MANIFEST}")
    prefix = looks.folder(look).prefix
    for name in look.sizes:
        bucket.move(f"{prefix}/{name}", f"{target}/{name}")
    return target


def delete_artifact(bucket: Bucket, key: str) -> None:
    """Delete the manifest, so that nobody reads the rest, then the rest."""
    bucket.delete([f"{key}/{MANIFEST}"])
    delete_below(bucket, key)


def delete_below(bucket: Bucket, prefix: str) -> None:
    """Delete everything below a key."""
    bucket.delete([f"{prefix}/{name}" for name in bucket.list(prefix)])
