"""A client of Prefect's REST API that does not import prefect: is it there, which version, which workers."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from stackwise_core.errors import ConfigError, Fault, StackWiseError

_EXAMPLE = "such as http://127.0.0.1:4200/api"


class ServerError(StackWiseError):
    """Prefect's server did not start, ended early, or failed while a run used it."""


def check_api(url: str, received: str = "") -> None:
    """Check that PREFECT_API_URL is a compatible Prefect API that answers.

    Args:
        url: of the API.
        received: the value of the variable, for the message; by default the URL.

    Raises:
        ConfigError: it is not; says what to do.
    """
    if fault := fault_of(url):
        raise ConfigError([Fault("PREFECT_API_URL", received or repr(shown(url)), fault)])


def lost_server(seen: str) -> ServerError:
    """Return the error for a server that failed during a run.

    Args:
        seen: what the run saw; part of the message if the server works again by now.
    """
    url = os.environ.get("PREFECT_API_URL", "")
    return ServerError(
        f"Prefect's server {shown(url)} failed during the run: {fault_of(url) or seen}; what was sealed is kept, and "
        "once the server is well the same command goes on"
    )


def ask(url: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 5.0) -> Any:
    """Send a GET request, or a POST request if there is a body, and return the JSON answer.

    Raises:
        OSError: no answer, or an HTTP error (`urllib.error.HTTPError`).
        ValueError: the answer is not JSON, or the URL is invalid.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", headers=_headers())
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def _headers() -> dict[str, str]:
    """Return the headers, with credentials from the same environment variables that Prefect reads."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif credentials := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    return headers


def fault_of(url: str) -> str:
    """Return what is wrong with an API and what to do, or '' if runs can use it."""
    if not _is_url(url):
        return f"the URL of Prefect's API is expected, {_EXAMPLE}"
    if shown(url) != url:
        return "give name and password by PREFECT_API_AUTH_STRING=NAME:PASSWORD, not in the URL"
    try:
        if ask(url, "/health") is not True:
            return f"what answers is not Prefect's API; its URL ends in /api, {_EXAMPLE}"
        return _fault_of_version(str(ask(url, "/admin/version")))
    except urllib.error.HTTPError as error:
        return _fault_of_answer(error)
    except OSError as error:
        reason = getattr(error, "reason", error)
        return (
            f"it does not answer ({reason}); start it with `stackwise server`; without it `stackwise train` embeds one"
        )
    except (ValueError, http.client.HTTPException):
        return f"what answers is not Prefect's API; its URL ends in /api, {_EXAMPLE}"


def shown(url: str) -> str:
    """Return a URL without its password, for messages."""
    return re.sub(r"//[^/]*@", "//***@", url)


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # an incomplete IPv6 address, or a port that is not a number
        return False
    return parts.scheme in ("http", "https") and named and not any(character.isspace() for character in url)


def _fault_of_answer(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return f"it denies access (HTTP {error.code}); set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
    if error.code >= 500:
        return f"it is unhealthy (HTTP {error.code}); its log says why: a full disk, a database that is gone"
    return f"what answers is not Prefect's API (HTTP {error.code}); its URL ends in /api, {_EXAMPLE}"


def _fault_of_version(theirs: str) -> str:
    """Return why a server's version does not work, or '': Prefect's clients need a server of their version or newer."""
    ours = version("prefect")
    if _numbers(theirs)[:1] == _numbers(ours)[:1] and _numbers(theirs) >= _numbers(ours):
        return ""
    return f"the server is Prefect {theirs}, this is {ours}; run both with one version: `pip install prefect=={ours}`"


def _numbers(release: str) -> tuple[int, ...]:
    """Return (major, minor) of a version; patch versions are compatible."""
    return tuple(int(number) for number in release.split(".")[:2])


def workers_alive(url: str, pool: str) -> list[str] | None:
    """Return the names of a pool's online workers, or None if there is no such pool."""
    try:
        found = ask(url, f"/work_pools/{pool}/workers/filter", {})
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
    return sorted(worker["name"] for worker in found if worker["status"] == "ONLINE")


def is_registered(url: str, automation: str) -> bool:
    """Return whether an automation of that name exists and is enabled."""
    named = {"automations": {"name": {"any_": [automation]}}}
    return any(found["enabled"] for found in ask(url, "/automations/filter", named))
