"""Hosts of a network on this machine: Linux network namespaces on a bridge, each with a name and an address."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Generator

_NET = "10.213.77"
HERE = f"{_NET}.1"
"""Where the hosts find what listens on this machine."""


class Host:
    """A network host: what is started with its prefix sees its network and its name, and no other."""

    def __init__(self, number: int) -> None:
        self.name = f"sw-{os.getpid()}-{number}"
        self.address = f"{_NET}.{number + 1}"

    @property
    def prefix(self) -> list[str]:
        """What stands before a command that runs there."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named]


def why_not() -> str:
    """Return why there can be no such network here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [program for program in ("ip", "unshare") if shutil.which(program) is None]:
        return f"not installed: {', '.join(missing)}"
    probe = f"sw-{os.getpid()}-probe"
    if (done := _ip("netns", "add", probe)).returncode:
        return f"no network namespaces: {done.stderr.strip()}"
    _ip("netns", "delete", probe)
    return ""


@contextlib.contextmanager
def network(n_hosts: int) -> Generator[list[Host]]:
    """Make hosts that reach this machine at `HERE` and each other."""
    bridge = f"sw{os.getpid()}"
    hosts = [Host(number) for number in range(1, n_hosts + 1)]
    try:
        _do("link", "add", bridge, "type", "bridge")
        _do("address", "add", f"{HERE}/24", "dev", bridge)
        _do("link", "set", bridge, "up")
        for number, host in enumerate(hosts):
            outside, inside = f"{bridge}o{number}", f"{bridge}i{number}"
            _do("netns", "add", host.name)
            _do("link", "add", outside, "type", "veth", "peer", "name", inside)
            _do("link", "set", outside, "master", bridge, "up")
            _do("link", "set", inside, "netns", host.name)
            _do("-netns", host.name, "address", "add", f"{host.address}/24", "dev", inside)
            for link in (inside, "lo"):
                _do("-netns", host.name, "link", "set", link, "up")
        yield hosts
    finally:
        for host in hosts:
            _ip("netns", "delete", host.name)  # and its end of the cable, and so the other
        _ip("link", "delete", bridge)


def _do(*arguments: str) -> None:
    done = _ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)
