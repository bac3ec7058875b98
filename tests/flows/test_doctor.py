"""`doctor`: it tells what works, finds what does not, and starts without torch or prefect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from flows.cli import doctor
from flows.run import devices
from flows.run.devices import Gpu
from flows.services import AUTOMATION
from stackwise_core.config.schema import HardwareConfig
from storage import files
from support.commands import Run
from support.fake_api import FakeApi, fake_api


@pytest.fixture(autouse=True)
def _no_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.fixture
def api() -> Generator[FakeApi]:
    with fake_api() as served:
        yield served


def findings(run: Run, *arguments: object) -> dict[str, Any]:
    document = run("doctor", "--json", *arguments).document
    assert document["ok"] == all(entry["ok"] for entry in document["findings"])
    return {entry["what"]: entry for entry in document["findings"]}


def test_a_machine_that_works(run: Run, tmp_path: Path) -> None:
    result = run("doctor")
    assert result.code == 0
    lines = result.out.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("ok  ") for line in lines)
    for library in ("torch", "prefect", "zarr"):
        assert f"{library} {version(library)}" in result.out
    assert not list(tmp_path.iterdir())  # it makes no folder, and leaves nothing in one
    assert "flock" not in findings(run)["locks"]["says"]


def test_it_starts_without_what_it_names(tmp_path: Path) -> None:
    script = """if True:
        import json, sys
        from flows.cli.main import main
        code = main(["doctor"])
        print(json.dumps([code, sorted({"torch", "prefect", "zarr"} & sys.modules.keys())]))
    """
    answer = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == [0, []]


@pytest.mark.parametrize(
    "command", [("gc",), ("du",), ("why", "stack-1"), ("push", "there"), ("quarantine",), ("gc", "--pin", "stack-1")]
)
def test_housekeeping_needs_neither_torch_nor_prefect(
    command: tuple[str, ...], tmp_path: Path, reference: Callable[..., Path], quick_disk: None
) -> None:
    import shutil

    shutil.copytree(reference(), tmp_path / "artifacts")
    script = """if True:
        import json, sys
        from flows.cli.main import main
        code = main(sys.argv[1:])
        print(json.dumps([code, sorted({"torch", "prefect", "zarr"} & sys.modules.keys())]))
    """
    told = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout.splitlines()[-1]) == [0, []]


def test_locks_that_do_nothing_are_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: flock succeeds, and keeps nobody out."""
    monkeypatch.setattr(doctor.FileLock, "try_acquire", lambda self: True)
    result = run("doctor")
    assert result.code == 1
    assert "BAD locks" in result.out
    assert "flock does not work in" in result.out


def test_a_folder_that_cannot_be_written_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refused)
    found = findings(run)
    assert (found["locks"]["ok"], found["locks"]["says"]) == (False, "/there: Permission denied")


def test_a_remote_file_system_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x " + str(tmp_path) + " nfs4 rw 0 0\n")
    monkeypatch.setattr(files, "_MOUNTS", mounts)
    assert findings(run)["file system"]["says"].startswith("nfs4, remote")


def test_a_full_disk_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = findings(run)["disk"]
    assert (found["ok"], found["says"].startswith("1.0 MiB free in ")) == (False, True)


def test_the_prefect_api(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "starts an embedded server" in findings(run)["prefect"]["says"]
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    found = findings(run)["prefect"]
    assert (found["ok"], "does not answer" in found["says"]) == (False, True)


def test_postgres_is_offered_where_sqlite_was_locked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "artifacts/prefect/server.log"
    log.parent.mkdir(parents=True)
    log.write_text("sqlite3.OperationalError: database is locked\nelse\n" * 3)
    found = findings(run)["prefect"]
    assert found["ok"]
    assert found["says"].endswith(
        f"; {log} says 3 times that its database, SQLite, was locked: run `stackwise server` on Postgres: "
        "docs/operating.md"
    )
    monkeypatch.setattr(doctor, "_MOST_OF_A_LOG", 60)  # as of a log of gigabytes
    assert " says 1 times " in findings(run)["prefect"]["says"]
    log.write_text("all is well\n")
    assert findings(run)["prefect"]["says"].endswith("starts an embedded server")


def test_what_runs_at_the_prefect_api(run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", api.url)
    says = findings(run)["prefect"]["says"]
    assert says.startswith(f"{api.url} answers, version {version('prefect')}; no pool stackwise: `stackwise worker`")
    assert says.endswith("; runs of dead machines stay Running: `stackwise heartbeat` mends that")

    api.answers["/work_pools/stackwise/workers/filter"] = []
    api.answers["/automations/filter"] = [{"name": AUTOMATION, "enabled": False}]
    says = findings(run)["prefect"]["says"]
    assert "pool stackwise, no worker: start `stackwise worker`" in says
    assert "stay Running" in says  # what is switched off does nothing

    workers = [{"name": "ada", "status": "ONLINE"}, {"name": "dead", "status": "OFFLINE"}]
    api.answers["/work_pools/stackwise/workers/filter"] = workers
    api.answers["/automations/filter"] = [{"name": AUTOMATION, "enabled": True}]
    found = findings(run)["prefect"]
    assert found["ok"]
    assert found["says"].endswith("; pool stackwise, workers online: ada; runs of dead machines become Crashed")
    assert ("/automations/filter", {"automations": {"name": {"any_": [AUTOMATION]}}}) in api.asked


def test_an_api_behind_a_page_of_login_is_told(run: Run, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which only what says that it is healthy is let through."""
    monkeypatch.setenv("PREFECT_API_URL", api.url)

    def no_json(*arguments: Any) -> None:
        json.loads("<html>")

    monkeypatch.setattr(doctor, "workers_alive", no_json)
    found = findings(run)["prefect"]
    assert (found["ok"], "no JSON" in found["says"]) == (False, True)


def test_a_missing_library_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LIBRARIES", ("numpy", "no-such-library"))
    found = findings(run)["libraries"]
    assert (found["ok"], "missing: no-such-library" in found["says"]) == (False, True)


def test_a_gpu_that_torch_cannot_use_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: [Gpu("H100", 80 * 2**30)])
    builds = {"+cpu": False, "+cu128": True, "": True}
    for build, works in builds.items():
        monkeypatch.setattr(doctor, "version", lambda name, build=build: f"2.13.0{build}")
        found = findings(run)["device"]
        assert found["ok"] == works
        assert found["says"].startswith("H100")
        assert ("new_stack_precision=bfloat16" in found["says"]) == works
    monkeypatch.setattr(devices, "gpus", list)
    assert findings(run)["device"]["says"] == f"cpu, {len(os.sched_getaffinity(0))} cores; no CUDA device"


def test_the_driver_is_asked_as_its_interface_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """Two devices, of which one has been lost."""

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device: Any, index: int) -> int:
            device._obj.value = index
            return 0 if index else 100

        def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
            name.value = f"GPU {device.value}".encode()[: length - 1]
            return 0

        def cuDeviceTotalMem_v2(self, n_bytes: Any, device: Any) -> int:
            n_bytes._obj.value = 16 * 2**30
            return 0

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver())
    assert devices.gpus() == [Gpu("GPU 1", 16 * 2**30)]
    assert devices.device_memory(HardwareConfig(device="cuda")) == (True, 16 * 2**30)
    assert devices.device_memory(HardwareConfig(device="cuda:3")) == (True, 0)
    (cuda, whole), (_, each) = (devices.device_memory(HardwareConfig(device="cpu", processes=n)) for n in (1, 4))
    assert (cuda, each) == (False, whole // 4)  # the processes of a machine share its memory
