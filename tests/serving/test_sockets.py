"""Over real sockets on loopback: clients that go away, read slowly or stay; signals that drain."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from wire_toy import ScriptedEngine, app_of, events_of, says

from aspo_jax.serving.server import ListenError, _allow_connections, listen, make_server, run_server

HOST = "127.0.0.1"


class Live:
    """A server in a thread."""

    def __init__(self, engine: ScriptedEngine, tokenizer: Any, **settings: Any):
        self.engine, self.app = engine, app_of(engine, tokenizer, **settings)
        self.ports: list[int] = []
        bound = threading.Event()

        def on_bound(host: str, port: int) -> None:
            self.ports.append(port)
            bound.set()

        self.server = make_server(self.app, 5, on_bound)
        listener = listen(HOST, 0)
        # Its connections have it too: what does not fit waits in the process, as from afar.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        assert bound.wait(10)

    @property
    def registry(self):
        return self.app.state.site.registry

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def connect(self, buffer: int | None = None) -> socket.socket:
        made = socket.socket()
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(20)
        made.connect((HOST, self.ports[0]))
        return made

    def send(self, buffer: int | None = None, **fields: Any) -> socket.socket:
        made = self.connect(buffer)
        made.sendall(request_of({"prompt": "hi", **fields}))
        return made

    def ask(self, **fields: Any) -> dict[str, Any]:
        connection = http.client.HTTPConnection(HOST, self.ports[0], timeout=20)
        with contextlib.closing(connection):
            body = json.dumps({"prompt": "hi", **fields})
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            return json.loads(connection.getresponse().read())


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@pytest.fixture
def live(tokenizer) -> Iterator[Callable[..., Live]]:
    made: list[Live] = []

    def make(script: Any, settings: dict[str, Any] | None = None, **engine: Any) -> Live:
        made.append(Live(ScriptedEngine(script, **engine), tokenizer, **(settings or {})))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that must happen soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def whole(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while part := sock.recv(2**20):
        parts.append(part)
    return b"".join(parts)


def body_of(response: bytes) -> str:
    """The body of a chunked response."""
    _, _, rest = response.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    return body.decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(tokenizer, live, stream):
    server = live(lambda request: [70] * 100_000, window=200_000, delay=0.002)
    sock = server.send(stream=stream, max_tokens=100_000, n=3)
    if stream:
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    until(lambda: server.engine.running == 3)
    sock.close()
    until(lambda: server.engine.running == 0)
    until(lambda: len(server.registry) == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_all_is_paused(live, stream):
    server = live(lambda request: [70])
    server.engine.go.clear()
    sock = server.send(stream=stream)
    until(lambda: server.engine.running == 1)
    sock.close()
    until(lambda: server.engine.running == 0 and len(server.registry) == 0)


LONG = {"stream": True, "max_tokens": 100_000, "logprobs": 20, "return_token_ids": True}


def likely() -> list[tuple[int, float]]:
    return [(i, -i / 8) for i in range(3, 23)]  # makes every event long


def test_a_slow_reader_holds_up_nobody_and_gets_all(live):
    count = 1000
    server = live(lambda request: [70] * count, window=200_000)
    server.engine.likely = likely()
    sock = server.send(buffer=4096, **LONG)
    until(lambda: server.engine.drawn == count and server.engine.running == 0, 20)
    (running,) = {id(r): r for found in server.registry._running.values() for r in found}.values()
    assert 0 < running._pieces.qsize() <= count  # what waits is at most its own tokens
    assert server.ask(max_tokens=2, prompt="other")["choices"][0]["text"] == "dd"
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += sock.recv(2**20)
    pieces = [event["choices"][0] for event in events_of(body_of(received))]
    assert sum(len(piece["token_ids"]) for piece in pieces) == count
    assert "".join(piece["text"] for piece in pieces) == "d" * count
    until(lambda: len(server.registry) == 0)
    sock.close()


def test_a_reader_that_never_reads_is_given_up(live):
    server = live(lambda request: [70] * 100_000, {"patience": 0.2}, window=200_000)
    server.engine.likely = likely()
    sock = server.send(buffer=4096, **LONG)
    until(lambda: server.engine.running == 1)
    until(lambda: server.engine.running == 0 and len(server.registry) == 0, 20)
    assert server.engine.drawn < 100_000
    sock.close()


def test_a_slow_reader_that_goes_away_frees_its_row(live):
    server = live(lambda request: [70] * 100_000, window=200_000, delay=0.0001)
    server.engine.likely = likely()
    sock = server.send(buffer=4096, **LONG)
    until(lambda: server.engine.drawn > 1000, 20)
    sock.close()
    until(lambda: server.engine.running == 0 and len(server.registry) == 0)


def test_who_stays_gets_the_same_whoever_leaves(tokenizer, live):
    """200 clients: half go away, a quarter read slowly, and of none anything is left."""

    def script(request):
        return [*tokenizer.encode(f"answer {request.identity[1]} " * 3), 2]

    server = live(script, delay=0.002, window=100, block=3)

    def one(number: int) -> str | None:
        fields = {"stream": number % 4 > 1, "seed": number, "max_tokens": 60}
        with server.send(buffer=4096, **fields) as sock:
            if number % 2:
                time.sleep(0.01 * (number % 5))
                return None
            if number % 4 == 0:
                return server.ask(seed=number, max_tokens=60)["choices"][0]["text"]
            return slowly_read(sock)

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(one, range(200)))
    assert texts == [None if i % 2 else f"answer {i} " * 3 for i in range(200)]
    until(lambda: server.engine.running == 0 and len(server.registry) == 0)
    state = server.server.server_state
    until(lambda: not state.tasks and not state.connections)


def slowly_read(sock: socket.socket) -> str:
    """The text of a stream."""
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += sock.recv(300)
        time.sleep(0.005)
    return "".join(event["choices"][0]["text"] for event in events_of(body_of(received)))


@pytest.mark.parametrize("named", ["field", "header", "shown"])
def test_requests_are_aborted_by_name(tokenizer, live, named):
    server = live(says(tokenizer, "a" * 5000), {"is_admin": True}, window=6000, delay=0.002)
    fields = {"request_id": "mine"} if named == "field" else {}
    connection = http.client.HTTPConnection(HOST, server.ports[0], timeout=20)
    headers = {"content-type": "application/json"}
    if named != "field":
        headers["x-request-id"] = "mine"
    body = json.dumps({"prompt": "hi", "max_tokens": 5000, "n": 2, **fields})
    connection.request("POST", "/v1/completions", body, headers)
    until(lambda: server.engine.drawn > 10)
    other = http.client.HTTPConnection(HOST, server.ports[0], timeout=20)
    names = json.dumps({"request_ids": ["nobody", "cmpl-mine" if named == "shown" else "mine"]})
    other.request("POST", "/abort_requests", names, {"content-type": "application/json"})
    assert json.loads(other.getresponse().read()) == {"status": "aborted", "aborted": 1}
    found = json.loads(connection.getresponse().read())
    assert found["id"] == "cmpl-mine"
    for choice in found["choices"]:
        assert choice["finish_reason"] == "abort" and set(choice["text"]) == {"a"}
    until(lambda: server.engine.running == 0 and len(server.registry) == 0)
    connection.close()
    other.close()


def test_a_connection_serves_many_requests(tokenizer, live):
    server = live(says(tokenizer, "hello", 2))
    connection = http.client.HTTPConnection(HOST, server.ports[0], timeout=20)
    connection.connect()
    own = connection.sock.getsockname()
    for fields in ({}, {"stream": True}, {"prompt": 5}, {}):
        body = json.dumps({"prompt": "hi", **fields})
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        content = response.read()
        assert ("content-length" in response.headers) == ("stream" not in fields)
        assert content and connection.sock.getsockname() == own
    connection.close()


def test_what_is_no_http_is_refused(tokenizer, live):
    server = live(says(tokenizer, "hello", 2))
    for sent in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n"):
        sock = server.connect()
        sock.sendall(sent + b"\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 4")
        sock.close()
    assert server.ask()["choices"][0]["text"] == "hello"


def test_a_body_that_never_ends_is_not_kept(tokenizer, live):
    server = live(says(tokenizer, "hello", 2), {"body_limit": 10_000})
    sock = server.connect()
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(100):
            sock.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            time.sleep(0.001)
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(100).startswith(b"HTTP/1.1 413")
    sock.close()
    sock = server.connect()  # a client that goes away within its body
    sock.sendall(request_of({"prompt": "hi"})[:-5])
    sock.close()
    assert server.ask()["choices"][0]["text"] == "hello"


def test_a_port_in_use_is_said():
    with listen(HOST, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on {HOST}:{port}.*another port"):
            run_server(lambda *_: None, HOST, port)  # type: ignore[arg-type]
    with pytest.raises(ListenError, match="expected an address of this machine"):
        run_server(lambda *_: None, "no.such.host.invalid", 0)  # type: ignore[arg-type]


def test_as_many_connections_as_the_system_allows(monkeypatch):
    kind = resource.RLIMIT_NOFILE
    few, most = resource.getrlimit(kind)
    try:
        resource.setrlimit(kind, (300, most))
        monkeypatch.setattr("aspo_jax.serving.server._CONNECTIONS", 400)
        _allow_connections()
        assert resource.getrlimit(kind) == (400, most)
        monkeypatch.setattr("aspo_jax.serving.server._CONNECTIONS", 350)
        _allow_connections()
        assert resource.getrlimit(kind) == (400, most)  # never fewer
    finally:
        resource.setrlimit(kind, (few, most))


# --- signals -----------------------------------------------------------------------------------


class Child:
    """Servers in another process, one at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serving_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    def serve(self, drain: float, delay: float = 0.0, is_paused: bool = False) -> int:
        """Start one; its port."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{drain} {delay} {int(is_paused)}\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    made = Child()
    yield made
    made.process.kill()
    made.process.communicate()


def open_stream(port: int) -> socket.socket:
    sock = socket.create_connection((HOST, port), timeout=20)
    sock.sendall(request_of({"prompt": "hi", "stream": True}))
    return sock


def test_sigterm_lets_what_runs_finish(child):
    port = child.serve(drain=20, delay=0.06)
    with open_stream(port) as sock, socket.create_connection((HOST, port)) as idle:
        start = sock.recv(100)
        child.signal()
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), timeout=5)
        assert idle.recv(100) == b""  # who only stays connected holds nothing up
        events = list(events_of(body_of(start + whole(sock))))
    assert "".join(e["choices"][0]["text"] for e in events) == "abcdefghijklmnop"
    assert child.line() == "ended 0"


def test_a_second_signal_waits_for_no_reader(live):
    server = live(lambda request: [70] * 100_000, {"patience": 60}, window=200_000, delay=0.001)
    server.engine.likely, server.server.config.timeout_graceful_shutdown = likely(), 60
    with server.send(buffer=4096, **LONG):
        until(lambda: server.engine.drawn > 500, 20)
        for _ in range(2):
            server.server.handle_exit(signal.SIGTERM, None)
            time.sleep(0.2)
        server.thread.join(5)
        assert not server.thread.is_alive() and server.engine.running == 0


@pytest.mark.parametrize(("drain", "signals"), [(0.3, 1), (60, 2)])
def test_what_does_not_finish_is_cancelled(child, drain, signals):
    """After the time it has, or by a second signal."""
    port = child.serve(drain, is_paused=True)
    with open_stream(port) as sock, socket.create_connection((HOST, port), timeout=20) as other:
        other.sendall(request_of({"prompt": "hi"}))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        for _ in range(signals):
            child.signal()
            time.sleep(0.2)
        assert child.line() == "ended 0"
        assert time.monotonic() - start < 5
        assert other.recv(1000).startswith(b"HTTP/1.1 503")
