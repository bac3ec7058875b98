"""A real S3-speaking server over HTTP on loopback (moto's), machines that use it, and a cable to cut."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

KEY, SECRET = "AKIASTACKWISETESTKEY", "a/secret/that+must/be/seen/nowhere"

# One request at a time: moto looks at a condition and then puts, which two threads could do at once.
_SERVE = (
    "import os, sys, threading\n"
    "from werkzeug.serving import make_server\n"
    "from moto.server import DomainDispatcherApplication, create_backend_app\n"
    "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
    "app = DomainDispatcherApplication(create_backend_app)\n"
    "make_server('127.0.0.1', 0, app, fd=int(sys.argv[1])).serve_forever()\n"
)


class S3Server:
    """The server, and the environment by which its clients find it."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def bucket(self) -> str:
        """Make a bucket of its own for a test and return a URI in it."""
        name = f"b{uuid.uuid4().hex[:12]}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=240).close()
        return f"s3://{name}/some/prefix"


def environment(port: int) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }


@contextlib.contextmanager
def serving(address: str = "127.0.0.1") -> Generator[S3Server]:
    """Start the server on an address, "" for all; requests wait at its socket until it is up."""
    with socket.create_server((address, 0), backlog=128) as listening:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(listening.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listening.fileno()],
        )
        try:
            yield S3Server(listening.getsockname()[1])
        finally:
            process.kill()
            process.communicate()


class Cable:
    """A TCP proxy to the server that can be cut: connections end after so many bytes of an answer."""

    def __init__(self, port: int) -> None:
        self.to, self.connections = port, 0
        self.answer_bytes: Iterator[int] | None = None
        """Of each following connection; negative: the request is not carried either. None cuts nothing."""
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                left = next(self.answer_bytes, None) if self.answer_bytes is not None else None
                threading.Thread(target=self._carry, args=(client, left), daemon=True).start()

    def _carry(self, client: socket.socket, left: int | None) -> None:
        if left is not None and left < 0:
            client.close()
            return
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.to)) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            while left is None or left > 0:
                data = server.recv(65536 if left is None else min(65536, left))
                if not data:
                    return
                client.sendall(data)
                left = None if left is None else left - len(data)
            client.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


@contextlib.contextmanager
def machine(scratch: Path) -> Generator[Path]:
    """Be a machine with this scratch folder for as long as the block lasts."""
    with mock.patch.dict(os.environ, {"STACKWISE_SCRATCH": str(scratch)}):
        yield scratch


def scratch_root(scratch: Path) -> Path:
    """Return the one root in a scratch folder."""
    (found,) = scratch.iterdir()
    return found


def objects(uri: str) -> dict[str, bytes]:
    """Return everything below a URI, by boto3: a client that is not ours."""
    client, bucket, prefix = client_of(uri)
    found: dict[str, bytes] = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            body = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            found[entry["Key"].removeprefix(prefix)] = body
    return found


def put(uri: str, name: str, data: bytes) -> None:
    client, bucket, prefix = client_of(uri)
    client.put_object(Bucket=bucket, Key=prefix + name, Body=data)


def delete(uri: str, *names: str) -> None:
    client, bucket, prefix = client_of(uri)
    for name in names:
        client.delete_object(Bucket=bucket, Key=prefix + name)


def client_of(uri: str) -> tuple[Any, str, str]:
    client = _client(os.environ["AWS_ENDPOINT_URL"])
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return client, bucket, f"{prefix}/"


@functools.cache
def _client(endpoint: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=endpoint, **keys)


def copy_bucket(uri: str, to: str) -> str:
    """Copy everything below a URI, so that a test can damage it; return the new URI."""
    for name, data in objects(uri).items():
        put(to, name, data)
    return to


def on(scratch: Path, uri: str) -> Any:
    """Return the artifacts as a machine with this scratch folder opens them."""
    from storage.artifacts import artifacts_at

    with machine(scratch):
        artifacts = artifacts_at(uri)
    return artifacts.open()
