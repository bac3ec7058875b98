"""Requests to Prefect's API, without importing prefect: no proxy before this machine, and no wait without an end."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

from flows.run.say import complain, report
from stackwise_core.errors import ConfigError, Fault

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SECONDS_BETWEEN_QUESTIONS = 5.0
_SECONDS_UNTIL_TOLD = 10.0
_SECONDS_UNTIL_GIVEN_UP = 120.0


def ask(url: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 5.0) -> Any:
    """Send a GET request, or a POST request if there is a body, and return the JSON answer.

    Raises:
        OSError: no answer, or an HTTP error (`urllib.error.HTTPError`).
        ValueError: the answer is not JSON, or the URL is invalid.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", headers=_headers())
    if body is not None:
        request.data = json.dumps(body).encode()
    # Not left to no_proxy: urllib wants [::1] in it, at which httpx raises.
    direct = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    with urllib.request.build_opener(*direct).open(request, timeout=timeout) as answer:
        return json.load(answer)


def _headers() -> dict[str, str]:
    """Return the headers, with credentials from the environment variables that Prefect itself reads."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif credentials := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    return headers


def shown(url: str) -> str:
    """Return a URL without its password, for messages."""
    return re.sub(r"//[^/]*@", "//***@", url)


# ---------------------------------------------------------------- proxies


def is_loopback(host: str) -> bool:
    """Return whether a host, given by name or address, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def bypass_proxy(host: str = "") -> None:
    """Let no proxy stand between this machine and itself, for this process and its children, whatever asks.

    Adds the names of this machine, and `host` if it is one, to the user's own exceptions, in no_proxy and NO_PROXY:
    some programs read the one, some the other.
    """
    if not urllib.request.getproxies_environment():
        return
    lower, upper = os.environ.get("no_proxy", ""), os.environ.get("NO_PROXY", "")
    for name, own in (("no_proxy", lower or upper), ("NO_PROXY", upper or lower)):
        hosts = [entry for each in own.split(",") if (entry := each.strip())]
        if "*" not in hosts:
            names = (*_LOOPBACK, *([host] if is_loopback(host) else []))
            os.environ[name] = ",".join(dict.fromkeys([*hosts, *names]))


def check_proxies() -> None:
    """Check that Prefect's client accepts the proxies of the environment: it reads also those that it bypasses.

    Raises:
        ConfigError: it would end with a traceback; names the variables.
    """
    found = {value: name for name, value in os.environ.items() if name.lower().endswith("_proxy") and value}
    if not urllib.request.getproxies_environment():
        return
    import httpx  # takes a third of a second

    try:
        httpx.Client().close()
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        values = ", ".join(repr(shown(value)) for value in found)
        raise ConfigError([Fault(", ".join(found.values()), values, f"Prefect cannot use that: {error}")]) from None


# ---------------------------------------------------------------- a server that is silent


@contextlib.contextmanager
def watching(url: str) -> Generator[None]:
    """Tell that a server has stopped to answer while the block runs, and end this process if it waits for it in vain.

    Prefect's client itself would wait for it seven minutes at each request, without a word.
    """
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(url, ended), daemon=True, name="watch")
    watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(url: str, ended: threading.Event) -> None:
    heard = waiting_since = time.monotonic()
    told = False
    while not ended.wait(_SECONDS_BETWEEN_QUESTIONS):
        problem = _silence(url)
        now = time.monotonic()
        if not problem:
            if told:
                report(f"Prefect's server {shown(url)} answers again")
            heard = waiting_since = now
            told = False
            continue
        if _is_computing():
            waiting_since = now
        if not told and now - heard >= _SECONDS_UNTIL_TOLD:
            told = True
            limit = f"waiting for it at most {_SECONDS_UNTIL_GIVEN_UP / 60:.0f} minutes between two tasks"
            report(f"Prefect's server {shown(url)} does not answer ({problem}); {limit}")
        if now - waiting_since >= _SECONDS_UNTIL_GIVEN_UP:
            _give_up(url, ended)
            return


def _is_computing() -> bool:
    """Return whether the main thread is in code of a run, not in Prefect's, which waits for the server."""
    main = threading.main_thread().ident or 0
    frame = sys._current_frames().get(main)  # pyright: ignore[reportPrivateUsage] -- the documented way
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(("stackwise_core.", "storage.", "flows.run.")):
            return True
        if module.startswith("prefect."):
            return False
        frame = frame.f_back
    return False


def _silence(url: str) -> str:
    """Return why a server is silent, or '' if it says anything; unlike /health, /ready asks its database."""
    try:
        ask(url, "/ready")
    except (urllib.error.HTTPError, ValueError, http.client.HTTPException):
        return ""
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""


def _give_up(url: str, ended: threading.Event) -> None:
    silent = f"has not answered for {_SECONDS_UNTIL_GIVEN_UP / 60:.0f} minutes"
    kept = "what was sealed is kept; once the server works, the same command continues"
    with contextlib.suppress(OSError):  # a reader that is gone
        complain(f"stackwise: Prefect's server {shown(url)} {silent}; {kept}")
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(20.0)
    os._exit(1)
