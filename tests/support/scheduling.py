"""The order in which pytest-xdist hands out test files."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

_ON_ONE_SERVER = ("test_filling.py", "test_flow.py", "test_operate.py", "test_server.py")


class OneServerScheduling(LoadFileScheduling):
    """Files go to processes as they become free, but those on the session's Prefect server to one: it starts once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "the Prefect server" if file.endswith(_ON_ONE_SERVER) else file
