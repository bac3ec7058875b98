"""Prefect's API, asked without importing prefect: is it there, is it one, of which version, who works for it."""

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

_EXAMPLE = "such as http://127.0.0.1:4200/api"


def ask(url: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 5.0) -> Any:
    """Ask an API, with a body by POST; return what it answers.

    Raises:
        OSError: nobody answers, or with an error (`urllib.error.HTTPError`).
        ValueError: the answer is no JSON, or the URL none.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", headers=_headers())
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def _headers() -> dict[str, str]:
    """Return what a server asks for that is not open to everybody, from the variables that Prefect reads too."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif words := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
    return headers


def fault_of(url: str) -> str:
    """Return what is wrong with an API and what to do, or nothing if runs can use it."""
    if not _is_url(url):
        return f"the URL of Prefect's API is expected, {_EXAMPLE}"
    if shown(url) != url:
        return "a name and a password are not given in it, but by PREFECT_API_AUTH_STRING=NAME:PASSWORD"
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
    """Return a URL as messages show it, without a password."""
    return re.sub(r"//[^/]*@", "//***@", url)


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is no number
        return False
    return parts.scheme in ("http", "https") and named and not any(character.isspace() for character in url)


def _fault_of_answer(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return f"it refuses us (HTTP {error.code}); set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY, to what it expects"
    if error.code >= 500:
        return f"it is not well (HTTP {error.code}); its log says why: a full disk, a database that is gone"
    return f"what answers is not Prefect's API (HTTP {error.code}); its URL ends in /api, {_EXAMPLE}"


def _fault_of_version(theirs: str) -> str:
    """Return why a server's version will not do: Prefect's clients work with servers of their own version or newer."""
    ours = version("prefect")
    if _numbers(theirs)[:1] == _numbers(ours)[:1] and _numbers(theirs) >= _numbers(ours):
        return ""
    return f"the server is Prefect {theirs}, this is {ours}; run both with one version: `pip install prefect=={ours}`"


def _numbers(release: str) -> tuple[int, ...]:
    """Return (major, minor) of a version; of a patch nothing depends."""
    return tuple(int(number) for number in release.split(".")[:2])


def workers_alive(url: str, pool: str) -> list[str] | None:
    """Return the names of a pool's workers that were heard of lately, or None if there is no such pool."""
    try:
        found = ask(url, f"/work_pools/{pool}/workers/filter", {})
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
    return sorted(worker["name"] for worker in found if worker["status"] == "ONLINE")


def is_registered(url: str, automation: str) -> bool:
    """Say whether there is an automation of that name, switched on."""
    named = {"automations": {"name": {"any_": [automation]}}}
    return any(found["enabled"] for found in ask(url, "/automations/filter", named))
