"""Two hosts of a network with one object store between them grow two branches of one trunk: the trunk is made once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.network import HERE, Host, network, why_not
from support.operating import Site
from support.runs import ALL_OF, tiny
from support.s3_server import environment, objects, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Reference = Callable[..., Path]

# Says when it could begin, begins when it is told to, then says what it made.
_GROW = (
    "import json, os, socket, sys; os.fsync = lambda fd: None\n"
    "sys.path.insert(0, sys.argv[1])\n"
    "from support.runs import grown\n"
    "from stackwise_core.config import StackWiseConfig\n"
    "import flows.run.run\n"
    "print(socket.gethostname(), flush=True)\n"
    "config = StackWiseConfig.from_dict(json.loads(sys.stdin.readline()))\n"
    "print(json.dumps(grown(config, sys.argv[2]).made), flush=True)\n"
)


def branch(folder: Path, name: str, n_blocks: int) -> Any:
    """Return the tiny configuration with a third stack of so many blocks."""
    return tiny(folder, {"run.name": name, "training.progressive.stacks": [{}, {}, {"n_blocks": n_blocks}]})


def started(host: Host, folder: Path, port: int, uri: str) -> subprocess.Popen[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "GOOGLE_"))}
    there = {"AWS_ENDPOINT_URL": f"http://{HERE}:{port}", "STACKWISE_SCRATCH": str(folder / host.name)}
    return subprocess.Popen(
        [*host.prefix, sys.executable, "-c", _GROW, str(ROOT / "tests"), uri],
        env={**outside, **environment(port), **there, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_hosts_make_the_trunk_of_two_branches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [branch(tmp_path, "left", 1), branch(tmp_path, "right", 2)]
    with serving("") as server, network(2) as hosts:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        uri = server.bucket()
        processes = [started(host, tmp_path, server.port, uri) for host in hosts]
        try:
            names = [process.stdout.readline().strip() for process in processes if process.stdout]
            assert names == [host.name for host in hosts], [p.stderr.read() for p in processes if p.stderr]
            for process, config in zip(processes, configs, strict=True):
                assert process.stdin is not None
                process.stdin.write(json.dumps(config.model_dump(mode="json")) + "\n")
                process.stdin.flush()
            said = [process.communicate(timeout=900) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0, 0], said
        made = [json.loads(out) for out, _ in said]
        kept = objects(uri)

    # By what the hosts did: the data and stages 0 and 1 once, by whoever had the lease; stage 2 by each.
    trunk = ["prepare data -1", *ALL_OF[0], *ALL_OF[1]]
    counted = Counter(made[0] + made[1])
    assert {task: counted[task] for task in trunk} == dict.fromkeys(trunk, 1)
    assert all(task in each for each in made for task in ("build 2", "train 2", "validate 2"))
    assert_made_once(kept)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_workers_on_two_hosts_run_two_branches_and_make_the_trunk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("") as server, network(2) as hosts:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        uri = server.bucket()
        store = {**environment(server.port), "AWS_ENDPOINT_URL": f"http://{HERE}:{server.port}"}
        site = Site(tmp_path / "site", HERE, **store)
        try:
            site.start_server()
            site.wait_for_server()
            for host in hosts:
                site.start_worker(*host.prefix, STACKWISE_SCRATCH=str(tmp_path / host.name))
                site.wait_for_worker()
            site.deploy()
            runs = []
            for name, n_blocks in (("left", 1), ("right", 2)):
                config = branch(tmp_path, name, n_blocks).model_dump(mode="json")
                runs.append(site.start({"config": config, "artifacts": uri}))
            for run in runs:
                assert site.wait_for(run, seconds=900)["state_type"] == "COMPLETED", site.logs(run)
            logs = [site.logs(run) for run in runs]
            kept = objects(uri)
        finally:
            site.end()

    workers = [re.search(r"Worker '(\S+)' submitting", "\n".join(lines)) for lines in logs]
    assert {worker[1] for worker in workers if worker} == {"worker-1", "worker-2"}
    told = Counter(line for lines in logs for line in lines)
    for stage, times in ((0, 1), (1, 1), (2, 2)):
        assert told[f"stage {stage}: train"] == times
    assert_made_once(kept)


def assert_made_once(kept: dict[str, bytes]) -> None:
    """By what is there: one seal of each artifact, and no files of an attempt that lost against it."""
    manifests = {name: json.loads(data) for name, data in kept.items() if name.endswith("/manifest.json")}
    stages = Counter(name.split("/")[1].rsplit("-", 1)[0] for name in manifests)
    assert all(stages[f"{kind}-{stage}"] == 1 for kind in ("stack", "activations", "validation") for stage in (0, 1))
    assert stages["stack-2"] == stages["validation-2"] == 2
    for name, manifest in manifests.items():
        below = [key.removeprefix(name.removesuffix("manifest.json")) for key in kept if key.startswith(name[:-13])]
        assert {key.split("/")[0] for key in below} - {"manifest.json"} <= {manifest["seal"][:16]}, name
    assert not [key for key in kept if key.startswith("leases/")]
