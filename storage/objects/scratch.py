"""Where on this machine the artifacts of an object store are made and kept for reading."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

VARIABLE = "STACKWISE_SCRATCH"


def scratch_of(uri: str) -> Path:
    """Return the folder of a URI: in STACKWISE_SCRATCH, or in the user's cache folder."""
    given = os.environ.get(VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(given) if given else Path(cache) / "stackwise"
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", uri.partition("://")[2]).strip("-.")[:48]
    return base.absolute() / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
