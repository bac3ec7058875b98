"""Errors of storage. Every message names the path and the remedy."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.errors import StackWiseError, shown

AGAIN = "run the command that made it again (`stackwise train` or `stackwise import`): it will be remade"
"""The end of a remedy: a stack may have been trained or imported."""


class ArtifactError(StackWiseError):
    """An artifact cannot be used."""

    exit_code = 3

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        """The message says the path, what is wrong with it, and what to do."""
        self.path = path if isinstance(path, str) and "://" in path else Path(path)  # a Path would eat a slash
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{shown(path)}: {shown(problem)}. {shown(remedy)}")

    def __reduce__(self) -> tuple[type[ArtifactError], tuple[Path | str, str, str]]:
        return type(self), (self.path, self.problem, self.remedy)


class ArtifactMissingError(ArtifactError, FileNotFoundError):
    """Nothing is there."""


class ArtifactUnsealedError(ArtifactError):
    """Something is there, but it was never sealed."""


class ArtifactCorruptError(ArtifactError, ValueError):
    """It differs from what was sealed."""


class ArtifactNewerError(ArtifactCorruptError):
    """A newer version made it: this one cannot read it, and does not replace it."""


class StoreSpaceError(StackWiseError, OSError):
    """The disk, or the budget of the configuration, is too small for what would be written."""


class RunBusyError(StackWiseError):
    """A live process uses the run with another configuration, or the folder that gc needs for itself."""

    exit_code = 2


class ArtifactsFolderError(StackWiseError, OSError):
    """The artifacts folder or bucket cannot be used at all."""

    exit_code = 2


class ObjectStoreError(StackWiseError, ConnectionError):
    """The object store did not answer, or denied the request, after all retries."""

    def __init__(self, reason: str, kept: str = "What was made is kept") -> None:
        """Compose one message of what went wrong, with the URI, and what is kept."""
        self.reason, self.kept = reason, kept
        super().__init__(f"{reason}. {kept}; run the same command again")

    def __reduce__(self) -> tuple[type[ObjectStoreError], tuple[str, str]]:
        return type(self), (self.reason, self.kept)
