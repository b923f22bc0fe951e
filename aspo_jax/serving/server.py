"""Listening on a port until a signal says to stop; what runs is finished first."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from aspo_jax.errors import UserError

_KEEP_ALIVE = 75  # s; clients drop idle connections earlier, so that none is closed under a request


_LAST_WORDS = 0.5  # s in which a client can take what is sent before its connection is dropped
_CONNECTIONS = 65536  # at once, if the system allows


class ListenError(UserError):
    """The port cannot be listened on."""


def run_server(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drain: float = 60.0,
    on_bound: Callable[[str, int], None] | None = None,
    shows_requests: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Then no connection is accepted, what runs has ``drain`` seconds to finish and is cancelled. A
    second signal cancels at once. Returns when all connections are closed.

    port: 0: any that is free. on_bound: told host and port once connections are accepted.
    shows_requests: a line on stdout for each request.

    Raises:
        ListenError: the address cannot be had.
    """
    listener = listen(host, port)
    _allow_connections()
    make_server(app, drain, on_bound, shows_requests).run(sockets=[listener])


def _allow_connections() -> None:
    """Raise how many files this process may have open: often 1,024 at first, and more allowed."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS if most == resource.RLIM_INFINITY else min(_CONNECTIONS, most)
    if few != resource.RLIM_INFINITY and few < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def make_server(
    app: ASGIApp,
    drain: float = 60.0,
    on_bound: Callable[[str, int], None] | None = None,
    shows_requests: bool = False,
) -> uvicorn.Server:
    """What `run_server` runs; ``should_exit = True`` is the signal to one in another thread."""
    config = uvicorn.Config(
        app,
        loop="asyncio",  # not what else happens to be installed
        http="h11",
        ws="none",
        lifespan="off",
        log_level="info" if shows_requests else "warning",
        access_log=shows_requests,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=drain,  # type: ignore[arg-type]  # passed on to asyncio.wait_for
    )
    return _Server(config, on_bound)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; it listens once it is served.

    Raises:
        ListenError: the address cannot be had.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenError(f"host {host!r}: {error}; expected an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another port, or stop what "
            "listens there"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Says when it listens, and returns after a signal, for there is more to close behind it."""

    def __init__(self, config: uvicorn.Config, on_bound: Callable[[str, int], None] | None):
        super().__init__(config)
        self._on_bound = on_bound
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._on_bound is not None and sockets:
            self._on_bound(*sockets[0].getsockname()[:2])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take both signals while it serves, and not raise them again behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second cancels what still runs."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; then what was cancelled has its last words, and no connection stays open."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=_LAST_WORDS)
        self._drop()
        await asyncio.sleep(0)  # the loop closes what was dropped

    def _cancel(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()
        asyncio.get_running_loop().call_later(_LAST_WORDS, self._drop)

    def _drop(self) -> None:
        """Close what is open still, for instance to a client that does not read its answer."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]  # it had a request: it is open
