"""What corpora were when they were last read, so that they are not read again while their files stay the same.

Files are known as `storage.unchanged` says. A record that is damaged counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from pydantic import BaseModel, ValidationError

from stackwise_core.config import StackWiseConfig
from stackwise_core.data.content import OnRead, nobody
from stackwise_core.data.files import paths_of
from stackwise_core.data.mixture import sources_of
from stackwise_core.data.packing import corpus_facts
from stackwise_core.data.sources import hub_revision
from stackwise_core.errors import StackWiseError
from stackwise_core.stages.identity import canonical_json
from stackwise_core.stages.plan import SourceFacts
from stackwise_core.stages.resolve import reads_examples
from stackwise_core.strict import read_bounded
from storage.artifacts import Artifacts
from storage.files import write_text
from storage.unchanged import Look, look_at

ROOM = "corpora"
_READING = 1
"""Raise it when the same files give another hash, or another size."""


class _Record(BaseModel, frozen=True, extra="forbid", strict=True):
    """One reading of a corpus."""

    asked: str
    """Hash of what names the corpus, and how it is read."""
    files: str
    """Hash of all files, as they are known without reading them."""
    corpus: str
    n_bytes: int
    check: str = ""
    """Hash of the other fields."""

    def checked(self) -> _Record:
        """Return the record with its check."""
        fields = self.model_dump(exclude={"check"})
        return self.model_copy(update={"check": _hash(canonical_json(fields))})


def facts_of(artifacts: Artifacts, config: StackWiseConfig, on_read: OnRead = nobody) -> list[SourceFacts]:
    """Return the content hash and the size of each source, as `corpus_facts`, from the last reading if it still holds.

    Otherwise the source is read, and remembered where an artifacts folder is.
    """
    return [_facts_of(artifacts, config, source.name, on_read) for source in sources_of(config.data.source)]


def _facts_of(artifacts: Artifacts, config: StackWiseConfig, source: str, on_read: OnRead) -> SourceFacts:
    data, examples = config.data, reads_examples(config)
    asked = _hash(canonical_json([_READING, source, os.getcwd(), examples, data.token_type]))
    path = artifacts.root / ROOM / f"{asked[:16]}.json"
    look, known = _look_at(source), _read(path)
    if look and known and (known.asked, known.files) == (asked, look.sha256):
        return SourceFacts(known.corpus, known.n_bytes)
    facts = SourceFacts(*corpus_facts(source, examples=examples, token_type=data.token_type, on_read=on_read))
    if look and look.settled and _look_at(source) == look and artifacts.root.is_dir():
        _write(path, _Record(asked=asked, files=look.sha256, corpus=facts.digest, n_bytes=facts.n_bytes))
    return facts


def _look_at(source: str) -> Look | None:
    """Look at the files of a source, or ask the hub which commit a dataset is at; None if neither can be seen."""
    if source.startswith("hf:"):
        revision = hub_revision(source)
        return Look(_hash(f"hub {revision}"), settled=True) if revision else None
    try:
        return look_at(paths_of(source))
    except (OSError, StackWiseError):
        return None


def _read(path: Path) -> _Record | None:
    try:
        if path.parent.is_symlink():
            return None
        found = _Record.model_validate_json(read_bounded(path))
    except (OSError, ValueError, ValidationError):
        return None
    return found if found == found.checked() else None


def _write(path: Path, record: _Record) -> None:
    """Write a record where that is allowed: without one the corpus is read again."""
    with contextlib.suppress(OSError, StackWiseError):
        if path.parent.is_symlink():
            return
        path.parent.mkdir(exist_ok=True)
        write_text(path, record.checked().model_dump_json())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
