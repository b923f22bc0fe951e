"""The sequences of one HTTP request, from the engine to whoever answers it.

A task of its own takes what the engine draws and cuts it, so that a stop string frees its row at
once, however slowly the client reads. What waits for a slow client is at most what was drawn for
its own request; a client that goes away cancels the request.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest

from aspo_jax.sampler import NONFINITE, Request
from aspo_jax.serving.answers import Answer, Piece, joined
from aspo_jax.serving.errors import ApiError
from aspo_jax.serving.seam import Engine, EngineError, Growth, Overloaded

MOST_NAME = 200  # characters of a request's name
_log = logging.getLogger(__name__)


class Registry:
    """The requests under way by their ids, for whoever wants to abort some."""

    def __init__(self):
        self._running: dict[str, list[Running]] = {}

    def add(self, running: Running) -> None:
        for name in running.names:
            self._running.setdefault(name, []).append(running)

    def remove(self, running: Running) -> None:
        for name in running.names:
            self._running[name].remove(running)
            if not self._running[name]:
                del self._running[name]

    def abort(self, names: Sequence[str]) -> int:
        """End these requests with what they have; how many there were."""
        found = {id(r): r for name in names for r in self._running.get(name, [])}
        for running in found.values():
            running.abort()
        return len(found)

    def __len__(self) -> int:
        return len({id(r) for running in self._running.values() for r in running})


class Names(NamedTuple):
    """What a request is called: by us, and by the client where it gave a name."""

    shown: str
    given: str | None = None


def names_of(prefix: str, request: HttpRequest, given: str | None) -> Names:
    """The names of a request: its field request_id, its header X-Request-Id, or one made up.

    Raises:
        ApiError: the name is too long.
    """
    given = given or request.headers.get("x-request-id") or None
    if given is not None and len(given) > MOST_NAME:
        raise ApiError(
            f"the name of the request has {len(given)} characters, expected at most {MOST_NAME}",
            param="request_id",
        )
    return Names(f"{prefix}-{given or uuid.uuid4().hex}", given)


class Running:
    """Sequences under way. It is entered, then iterated: (index, piece), until all have ended.

    Raises, on entering or while iterated:
        ApiError: the engine is overloaded, fails, or its distribution is not finite.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        names: Names,
        registry: Registry,
    ):
        self._engine, self._requests, self._answers = engine, requests, answers
        self.names, self._registry = {name for name in names if name}, registry
        self._pieces: asyncio.Queue[tuple[int, Piece] | ApiError] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Running:
        self._registry.add(self)
        if not self._requests:
            return self
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._work(entered))
        try:
            await entered
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._registry.remove(self)
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self._answers)
        while left:
            found = await self._pieces.get()
            if isinstance(found, ApiError):
                raise found
            left -= found[1].finish is not None
            yield found

    def abort(self) -> None:
        """End all sequences with what they have."""
        if self._pump is not None:
            self._pump.cancel()
        for index, answer in enumerate(self._answers):
            if answer.finish is None:
                self._pieces.put_nowait((index, answer.end()))

    async def _work(self, entered: asyncio.Future[None]) -> None:
        """Take from the engine until every answer has its end; say what fails."""
        try:
            async with self._engine.generate(self._requests) as growth:
                if not entered.done():
                    entered.set_result(None)
                await self._take(growth)
        except Exception as error:
            self._fail(api_error(error), entered)
        finally:  # aborted while it waited to be taken
            if not entered.done():
                entered.set_result(None)

    def _fail(self, error: ApiError, entered: asyncio.Future[None]) -> None:
        if entered.done():
            self._pieces.put_nowait(error)
        else:
            entered.set_exception(error)

    async def _take(self, growth: Growth) -> None:
        left = len(self._answers)
        async for grown in growth:
            answer = self._answers[grown.index]
            if answer.finish is not None or not (grown.tokens or grown.ending):
                continue
            piece = answer.add(grown)
            if piece.finish == NONFINITE:
                raise EngineError(
                    "the model gave a distribution that is not finite; load other weights"
                )
            if piece.finish and grown.ending is None:
                growth.cancel(grown.index)
            self._pieces.put_nowait((grown.index, piece))
            left -= piece.finish is not None
            if not left:
                return
        raise EngineError("the engine left sequences without an ending")


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error below the HTTP side."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(str(error), status=503)
    if isinstance(error, EngineError):
        return ApiError(str(error), status=500)
    _log.error("a request failed", exc_info=error)
    return ApiError(f"{type(error).__name__}: {error}", status=500)


async def collect(running: Running, count: int) -> list[Piece]:
    """Each of the answers in one piece."""
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    async with running:
        async for index, piece in running:
            pieces[index].append(piece)
    return [joined(of_one) for of_one in pieces]


class Gone(Exception):
    """The client went away before its answer was ready."""


async def while_connected(request: HttpRequest, work: Callable[[], Any]) -> Any:
    """What the coroutine function returns; it is cancelled when the client goes away.

    The request's body has been read.

    Raises:
        Gone: the client went away.
    """
    task = asyncio.ensure_future(work())
    watch = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await cancel(task, watch)


async def disconnected(receive: Callable[[], Any]) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is not of interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
