"""What stands where Prefect's API is expected: it answers what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any


class FakeApi:
    """By path below /api: a document, a status to fail with, or text; and what was asked."""

    def __init__(self, port: int) -> None:
        """Answer as a healthy server of our version."""
        self.url = f"http://127.0.0.1:{port}/api"
        self.answers: dict[str, Any] = {
            "/health": True,
            "/admin/version": version("prefect"),
            "/automations/filter": [],
        }
        self.text: str | None = None
        self.status = 0
        self.asked: list[tuple[str, Any]] = []
        self.headers: list[str | None] = []


@contextlib.contextmanager
def fake_api() -> Generator[FakeApi]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: Any) -> None:
            path = self.path.removeprefix("/api")
            api.asked.append((path, body))
            api.headers.append(self.headers["Authorization"])
            there = self.path.startswith("/api/") and path in api.answers
            self.send_response(api.status or (200 if there or api.text is not None else 404))
            self.end_headers()
            text = api.text if api.text is not None else json.dumps(api.answers.get(path, {"detail": "Not Found"}))
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        api = FakeApi(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()
