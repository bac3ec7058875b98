"""`stackwise notify`: a run that fails is told, by the server, to the address that was given."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from support.commands import Run


class Listener(HTTPServer):
    """Keeps what is posted to it."""

    def __init__(self) -> None:
        self.said: queue.Queue[dict[str, str]] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        listener = self.server
        assert isinstance(listener, Listener)
        listener.said.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def listener() -> Generator[Listener]:
    with Listener() as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening
        listening.shutdown()


@pytest.mark.slow
@pytest.mark.flow
def test_a_run_that_fails_is_told_and_those_of_others_and_subflows_are_not(
    prefect_api: str, listener: Listener, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.flows import Flow
    from prefect.states import Completed, Failed

    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    assert run("notify", listener.address).out.endswith("is registered, and posts to this address\n")
    assert "was there already" in run("notify", listener.address).out
    with get_client(sync_client=True) as client:

        def ends(flow: str, name: str, tag: str, state: object) -> None:
            made = client.create_flow_run(Flow(lambda: None, name=flow), name=name, tags=[tag])
            client.set_flow_run_state(made.id, state, force=True)  # pyright: ignore[reportArgumentType]

        ends("train-rack", "a-stranger", "theirs", Failed(message="no"))
        ends("add-stack-task", "a-subflow", "stackwise", Failed(message="no"))
        ends("train-rack", "well", "stackwise", Completed())
        ends("train-rack", "mine", "stackwise", Failed(message="stage 1: the loss is NaN"))
        said = listener.said.get(timeout=300)
        assert said["text"].startswith("mine is Failed: stage 1: the loss is NaN")
        assert "registered" in run("notify", listener.address, "--done").out
        ends("train-rack", "done", "stackwise", Completed())
        assert listener.said.get(timeout=300)["text"].startswith("done is Completed")
    assert "is removed" in run("notify", "--off").out
    with get_client(sync_client=True) as client, pytest.raises(ObjectNotFound):  # nor is the address still there
        client.read_block_document_by_name("stackwise", "custom-webhook")
    assert "was not there" in run("notify", "--off").out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((), "the address to post to"), (("ftp://a/b",), "the address to post to"), (("http://a", "--off"), "leave")],
)
def test_what_is_no_address_is_refused(run: Run, arguments: tuple[str, ...], word: str) -> None:
    told = run("notify", *arguments)
    assert told.code == 2
    assert word in told.err
