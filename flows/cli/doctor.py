"""`stackwise doctor`: checks of this machine, one line each. Imports neither torch nor prefect."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flows.cli.arguments import add_common
from flows.network import ask, shown
from flows.run import devices
from flows.run.numbers import size
from flows.run.say import say_json
from flows.run.terminal import say_hanging
from flows.server import fault_of, is_registered, workers_alive
from flows.services import AUTOMATION, POOL
from flows.settings import SettingsError, find_api
from storage.artifacts import artifacts_at
from storage.errors import ArtifactsFolderError
from storage.files import file_system_of, is_local
from storage.locks import FileLock

_LIBRARIES = ("torch", "prefect", "zarr", "safetensors", "numpy", "pydantic", "peft", "bitsandbytes", "torchao")
_LITTLE_BYTES = 2**30
"""Less free space fails the check, because the store of a small model is larger."""
_MOST_OF_A_LOG = 2**22
_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1]) as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(7)
"""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    add_common(parser, examine, json=True)


def examine(options: argparse.Namespace) -> int:
    """Run every check and print a line for each; return 0 if all pass, else 1."""
    artifacts = artifacts_at(options.artifacts)
    folder = next(parent for parent in (artifacts.root, *artifacts.root.parents) if parent.is_dir())
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "python": lambda: (True, f"{platform.python_version()}, stackwise {version('stackwise')}"),
        "libraries": _check_libraries,
        "device": _check_device,
        "disk": lambda: _check_disk(folder),
        "file system": lambda: _check_file_system(folder),
        "locks": lambda: _check_locks(folder),
        "prefect": lambda: _check_prefect(artifacts.root / "prefect" / "server.log"),
    }
    if artifacts.is_remote:
        checks["object store"] = lambda: _check_objects(artifacts.uri)
    findings: list[dict[str, object]] = []
    for what, check in checks.items():
        try:
            ok, says = check()
        except OSError as error:
            ok, says = False, f"{error.filename or folder}: {error.strerror or error}"
        findings.append({"what": what, "ok": ok, "says": says})
    passed = all(finding["ok"] for finding in findings)
    if options.json:
        say_json({"ok": passed, "findings": findings})
    else:
        for finding in findings:
            say_hanging(f"{'ok  ' if finding['ok'] else 'BAD '}{finding['what']:<13}", str(finding["says"]))
    return 0 if passed else 1


def _check_libraries() -> tuple[bool, str]:
    found, missing = list[str](), list[str]()
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    lacks = f"; missing: {', '.join(missing)}: install StackWise again" if missing else ""
    return not missing, ", ".join(found) + lacks


def _check_device() -> tuple[bool, str]:
    n_cores = len(os.sched_getaffinity(0))
    gpus = [gpu.name for gpu in devices.gpus()]
    if not gpus:
        return True, f"cpu, {n_cores} cores; no CUDA device"
    if version("torch").endswith("+cpu"):
        return False, f"{', '.join(gpus)}, but torch is built without CUDA: install one that has it, or set device: cpu"
    return True, f"{', '.join(gpus)}; {n_cores} CPU cores; {devices.ADVICE}"


def _check_disk(folder: Path) -> tuple[bool, str]:
    free = shutil.disk_usage(folder).free
    return free >= _LITTLE_BYTES, f"{size(free)} free in {folder}"


def _check_file_system(folder: Path) -> tuple[bool, str]:
    kind = file_system_of(folder) or "unknown"
    return True, f"{kind}, {'local' if is_local(folder) else 'remote: only processes of one machine may share it'}"


def _check_locks(folder: Path) -> tuple[bool, str]:
    """Let another process try to take a lock while this one holds it, and afterwards."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".stackwise-doctor-") as file:
        rival = [sys.executable, "-S", "-c", _TRY_LOCK, file.name]
        with FileLock(Path(file.name)):
            during = subprocess.run(rival, check=False, stderr=subprocess.DEVNULL).returncode
        after = subprocess.run(rival, check=False, stderr=subprocess.DEVNULL).returncode
    if during == 7 and after == 0:
        return True, "a lock keeps other processes out until it is released"
    return False, f"flock does not work in {folder}: two runs could write one artifact; use a local disk"


def _check_objects(uri: str) -> tuple[bool, str]:
    from storage.object_store import probe

    try:
        return True, probe(uri)
    except ArtifactsFolderError as error:
        return False, str(error)


def _check_prefect(log: Path) -> tuple[bool, str]:
    try:
        given = find_api()
    except SettingsError as error:
        return False, str(error)
    if not (url := given.value):
        return True, f"PREFECT_API_URL is not set: `stackwise train` starts an embedded server{_locked(log)}"
    if fault := fault_of(url):
        return False, f"{given}: got {shown(url)!r}; {fault}"
    try:
        dead = "become Crashed" if is_registered(url, AUTOMATION) else "stay Running: `stackwise heartbeat` mends that"
        dead = f"runs of dead machines {dead}"
        says = f"{url}{given.by} answers, version {ask(url, '/admin/version')}; {_workers(url)}; {dead}"
        return True, says
    except ValueError as error:
        return False, f"{url} answers and is healthy, but its list of workers is no JSON ({error})"


def _locked(log: Path) -> str:
    """Return what to do if a server's log says that writes to SQLite collided; only its last part counts."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _MOST_OF_A_LOG))
        count = file.read(_MOST_OF_A_LOG).count(b"database is locked")
    remedy = "run `stackwise server` on Postgres: docs/operating.md"
    return f"; {log} says {count} times that its database, SQLite, was locked: {remedy}" if count else ""


def _workers(url: str) -> str:
    workers = workers_alive(url, POOL)
    if workers is None:
        return f"no pool {POOL}: `stackwise worker` makes it"
    online = f"workers online: {', '.join(workers)}" if workers else "no worker: start `stackwise worker`"
    return f"pool {POOL}, {online}"
