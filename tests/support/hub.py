"""A repository host as huggingface_hub sees it, on loopback: it keeps what is sent to it."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What a host got."""

    def __init__(self) -> None:
        self.url = ""
        self.tokens: set[str] = set()
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = 0
        """A status that every request gets instead of an answer."""

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/owner/name"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]}
        if "/tree/" in path:
            return [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in self.files.items()]
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "deletedFile":
                    del self.files[value["path"]]
            return {"commitUrl": f"{self.url}/owner/name/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
        return {}


@contextlib.contextmanager
def serving() -> Generator[Hub]:
    """Serve until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("authorization", ""))
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            data = json.dumps({"error": "not yours"} if hub.refuses else hub.answer(self.path, body)).encode()
            self.send_response(hub.refuses or 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
