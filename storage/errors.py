"""What can be wrong with an artifact. Every message names the path and the remedy."""

from __future__ import annotations

from pathlib import Path

from stackwise_core.errors import StackWiseError


class ArtifactError(StackWiseError):
    """An artifact cannot be used."""

    exit_code = 3

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        """Compose one message of the path, what is wrong with it, and what to do."""
        self.path = path if isinstance(path, str) and "://" in path else Path(path)  # a Path would eat a slash
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{path}: {problem}. {remedy}")

    def __reduce__(self) -> tuple[type[ArtifactError], tuple[Path | str, str, str]]:
        return type(self), (self.path, self.problem, self.remedy)


class ArtifactMissingError(ArtifactError, FileNotFoundError):
    """Nothing is there."""


class ArtifactUnsealedError(ArtifactError):
    """Something is there, but it was never finished."""


class ArtifactCorruptError(ArtifactError, ValueError):
    """It was finished once, and is not what was sealed."""


class ArtifactNewerError(ArtifactCorruptError):
    """Newer code made it: this version cannot read it, and does not make it over."""


class StoreSpaceError(StackWiseError, OSError):
    """The disk, or the budget of the configuration, is too small for what would be written."""


class RunBusyError(StackWiseError):
    """Another live process holds the run with another configuration."""

    exit_code = 2


class ArtifactsFolderError(StackWiseError, OSError):
    """The folder of artifacts cannot be used at all."""

    exit_code = 2


class ObjectStoreError(StackWiseError, ConnectionError):
    """The object store did not answer, or refused, after all retries."""

    def __init__(self, reason: str, kept: str = "What was made is kept") -> None:
        """Compose one message of what went wrong, with the URI, and what is kept."""
        self.reason, self.kept = reason, kept
        super().__init__(f"{reason}. {kept}; run the same command again")

    def __reduce__(self) -> tuple[type[ObjectStoreError], tuple[str, str]]:
        return type(self), (self.reason, self.kept)
