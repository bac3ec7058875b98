"""An exported folder, sent to a repository of Hugging Face. Needs the package huggingface_hub (extra `hub`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise_core.errors import ConfigError, Fault, StackWiseError
from stackwise_core.interop.target import exported_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPLACED = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "model.gguf"]
"""Files of an earlier export that would contradict those of this one."""


class PushError(StackWiseError):
    """The repository did not take the folder; the folder is there."""


class Repository:
    """A repository of models, by owner/name."""

    def __init__(self, name: str) -> None:
        """Check the name and that somebody is logged in, before anything is made.

        The token comes from HF_TOKEN or from the login of `hf auth login`, and from nowhere else.

        Raises:
            ConfigError: the name is not owner/name, or there is no token.
        """
        if find_spec("huggingface_hub") is None:
            raise _refused(name, "it needs the package huggingface_hub: pip install 'stackwise[hub]'")
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError:
            name_is_wrong = True
        else:
            name_is_wrong = name.count("/") != 1
        if name_is_wrong:
            raise _refused(name, "owner/name is expected, of letters, digits, '-', '_' and '.'")
        if not get_token():
            raise _refused(name, "there is no token; set HF_TOKEN, or log in with `hf auth login`")
        self.name, self._api = name, HfApi(library_name="stackwise")

    @property
    def where(self) -> str:
        """Its address."""
        return f"{_endpoint(self._api)}/{self.name}"

    def push(self, folder: Path) -> str:
        """Send the files that were exported into a folder, and no others, in one commit; return its address.

        A repository that is not there is made, and is private. Weights of an earlier export are replaced.

        Raises:
            PushError: it was refused, or could not be reached.
        """
        from httpx import HTTPError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            self._api.create_repo(self.name, private=True, exist_ok=True)
            commit = self._api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                allow_patterns=sorted(exported_files(folder)),
                delete_patterns=_REPLACED,
                commit_message="Export of StackWise",
            )
        except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, ValueError) as error:
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise PushError(f"{self.where}: it was not sent ({told[-1]}); the folder {folder} is complete") from None
        return str(commit.commit_url)


def _endpoint(api: HfApi) -> str:
    return str(api.endpoint)


def _refused(name: str, allowed: str) -> ConfigError:
    return ConfigError([Fault("--push", repr(name), allowed)])
