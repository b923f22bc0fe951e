"""What is served: a sampler whose session lives on a thread that alone uses the devices.

The event loop hands work to the thread as closures and hears of what was drawn by callbacks;
neither waits for the other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from aspo_jax.errors import UserError
from aspo_jax.sampler import ABORTED, Completion, Delta, PagedSampler, Request, Session
from aspo_jax.serving.seam import EngineError, Grown, Overloaded, PromptScore

Result = TypeVar("Result")
Score = Callable[[Any, Sequence[int], int], PromptScore]  # (params, tokens, top) -> score

_logger = logging.getLogger(__name__)


class Device:
    """The thread that uses the devices, for all engines of a server in turn."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._engines: list[DeviceEngine] = []
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def add(self, engine: DeviceEngine) -> None:
        """Let an engine's sequences grow from now on."""
        self.call(lambda: self._engines.append(engine)).result()

    def call(self, action: Callable[[], Result]) -> concurrent.futures.Future[Result]:
        """Let the thread do something between two decode calls."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def act() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(action())
            except BaseException as error:  # whoever waits for the result gets it
                future.set_exception(error)

        self._work.put(act)
        return future

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            growing = [engine for engine in self._engines if engine.has_work]
            try:
                action = self._work.get(block=not growing)
            except queue.Empty:
                for engine in growing:
                    engine.step()
                continue
            if action is None:
                return
            action()


class _Running:
    """A sequence under way: who hears of it and what it has drawn, as far as it was told."""

    def __init__(self, growth: _Growth, index: int, request: Request):
        self.growth, self.index, self.request = growth, index, request
        self.tokens: list[int] = []

    def go_on(self) -> None:
        """Ask for what is left, behind what was drawn."""
        request, drawn = self.request, len(self.tokens)
        most = request.max_tokens
        self.request = request._replace(
            tokens=(*request.tokens, *self.tokens),
            max_tokens=None if most is None else most - drawn,
            written=request.written + drawn,
        )
        self.tokens = []


class Weights(NamedTuple):
    """Weights that stand ready, and the label that they will have; None: the one there is."""

    params: Any
    label: str | None


class DeviceEngine:
    """See `aspo_jax.serving.seam.Engine`.

    sampler: made with `Serving`, and started. score: (the sampler's params, tokens, top) -> score.
    read: folder -> params for the sampler's `start`.
    limit: sequences that may run and wait together.
    """

    def __init__(
        self,
        device: Device,
        sampler: PagedSampler,
        *,
        score: Score,
        read: Callable[[str], Any],
        limit: int = 1024,
        version: str = "default",
    ):
        self.version, self._limit = version, limit
        self._device, self._sampler, self._score, self._read = device, sampler, score, read
        self._session: Session = sampler.open()
        self._running: dict[int, _Running] = {}  # by number in the session
        self._held: list[_Running] = []  # submitted while nothing new is begun
        self._is_begun, self._is_drawing = True, True  # whether new ones are, and whether any is
        self._emptied: list[concurrent.futures.Future[None]] = []  # who waits for no one to run
        self._failure: Exception | None = None
        self._is_paused = False
        self._count = 0  # sequences under way, on the event loop
        device.add(self)

    # --- on the event loop ----------------------------------------------------------------------

    @property
    def window(self) -> int:
        return self._sampler.limits.window or self._sampler.limits.max_response_tokens

    @property
    def logprobs_mode(self) -> str:
        return "raw" if getattr(self._sampler.choice, "is_raw", False) else "processed"

    @property
    def is_alive(self) -> bool:
        return self._failure is None

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    def generate(self, requests: Sequence[Request]) -> _Growth:
        return _Growth(self, requests)

    async def score(self, tokens: Sequence[int], top: int) -> PromptScore:
        self._take(1)
        try:
            return await self._call(lambda: self._score(self._sampler.params, tokens, top))
        finally:
            self._count -= 1

    async def load(self, folder: str, label: str | None) -> None:
        """Sequences under way go on with the new weights, behind what they have."""
        try:  # beside what the thread goes on drawing
            params = await asyncio.to_thread(self._read, folder)
        except (UserError, OSError, ValueError) as error:
            raise EngineError(f"{error}; the weights that were served before go on") from error
        await self._call(lambda: self._swap(Weights(params, label)))

    async def follow(self, weights: Weights) -> None:
        """Take other weights between two sequences: those under way end with the old ones."""
        await self._call(lambda: self._begin(False))
        await asyncio.wrap_future(await self._call(self._when_empty))
        await self._call(lambda: self._swap(weights))
        if not self._is_paused:
            await self._call(lambda: self._begin(True))

    async def pause(self, mode: str) -> None:
        if mode == "abort":
            await self._call(self.abort_all)
        if mode == "wait":
            await self._call(lambda: self._begin(False))
            await asyncio.wrap_future(await self._call(self._when_empty))
        self._is_paused = True
        await self._call(lambda: self._draw(False))

    async def resume(self) -> None:
        self._is_paused = False
        await self._call(lambda: self._draw(True))
        await self._call(lambda: self._begin(True))

    async def _call(self, action: Callable[[], Result]) -> Result:
        if self._failure is not None:
            raise EngineError(f"the engine has failed: {self._failure}")
        return await asyncio.wrap_future(self._device.call(action))

    def _take(self, count: int) -> None:
        if self._count + count > self._limit:
            raise Overloaded(
                f"{self._count} sequences are under way, and {count} more would be above the "
                f"limit of {self._limit}; try again later, or serve with a larger --queue"
            )
        self._count += count

    # --- on the thread --------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self._is_drawing and self.is_alive and not self._session.is_idle

    def step(self) -> None:
        """One decode call; whoever waits for its tokens hears of them."""
        try:
            step = self._session.step()
        except Exception as error:
            _logger.exception("the engine has failed")
            self._fail(error)
            return
        endings = {completion.request: completion for completion in step.completions}
        told = [self._tell(delta, endings.pop(delta.request, None)) for delta in step.deltas]
        told += [self._tell(Delta(n, 0, [], [], []), ended) for n, ended in endings.items()]
        _notify(told)
        self._look()

    def _tell(self, delta: Delta, ended: Completion | None) -> tuple[_Growth, Grown]:
        running = self._running[delta.request]
        if ended is not None:
            del self._running[delta.request]
        # One that lost its row is drawn again, with the same tokens: they are known already.
        new = slice(max(len(running.tokens) - delta.start, 0), None)
        running.tokens += delta.tokens[new]
        return running.growth, Grown(
            running.index,
            delta.tokens[new],
            delta.logp[new],
            delta.top[new] if delta.top else [[] for _ in delta.tokens[new]],
            None if ended is None else ended.ending,
            self.version,
        )

    def begin(self, growth: _Growth, requests: Sequence[Request]) -> None:
        """Take the requests of a call."""
        for index, request in enumerate(requests):
            running = _Running(growth, index, request)
            if self._is_begun:
                self._submit(running)
            else:
                self._held.append(running)

    def _submit(self, running: _Running) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            self._running[self._session.submit(running.request)] = running
        except Exception as error:
            _notify([(running.growth, error)])

    def cancel(self, growth: _Growth, index: int | None) -> None:
        """Forget one sequence of a call, or all."""

        def is_meant(running: _Running) -> bool:
            return running.growth is growth and index in (None, running.index)

        for number in [n for n, running in self._running.items() if is_meant(running)]:
            self._session.cancel(number)
            del self._running[number]
        self._held = [running for running in self._held if not is_meant(running)]
        self._look()

    def abort_all(self) -> None:
        """End everything that runs and waits."""
        ended = [*self._running.values(), *self._held]
        for number in self._running:
            self._session.cancel(number)
        self._running, self._held = {}, []
        _notify([
            (running.growth, Grown(running.index, [], [], [], ABORTED, self.version))
            for running in ended
        ])  # fmt: skip
        self._look()

    def _begin(self, is_begun: bool) -> None:
        self._is_begun = is_begun
        if is_begun:
            held, self._held = self._held, []
            for running in held:
                self._submit(running)

    def _draw(self, is_drawing: bool) -> None:
        self._is_drawing = is_drawing

    def _when_empty(self) -> concurrent.futures.Future[None]:
        """Done once nothing runs."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._emptied.append(future)
        self._look()
        return future

    def _look(self) -> None:
        if not self._running:
            for future in self._emptied:
                future.set_result(None)
            self._emptied = []

    def _swap(self, weights: Weights) -> None:
        """Go on with other weights; the cache is made anew, for it is of the old ones."""
        self._sampler.start(weights.params)
        if weights.label is not None:
            self.version = weights.label
        self._session = self._sampler.open()
        running, self._running = self._running, {}
        for one in running.values():
            one.go_on()
            self._submit(one)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        ended = [*self._running.values(), *self._held]
        self._running, self._held = {}, []
        _notify([(running.growth, error) for running in ended])
        self._look()


Heard = Grown | Exception


def _notify(told: Iterable[tuple[_Growth, Heard]]) -> None:
    """Let the event loops hear, each once for all that is of it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Growth, Heard]]] = {}
    for growth, heard in told:
        by_loop.setdefault(growth.loop, []).append((growth, heard))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, pairs)
        except RuntimeError:  # the loop is closed: nobody listens any more
            continue


def _deliver(pairs: Sequence[tuple[_Growth, Heard]]) -> None:
    for growth, heard in pairs:
        growth.hear(heard)


class _Growth:
    """See `aspo_jax.serving.seam.Growth`."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, engine: DeviceEngine, requests: Sequence[Request]):
        self._engine, self._requests = engine, requests
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()
        self._left = set(range(len(requests)))  # those without an ending

    async def __aenter__(self) -> _Growth:
        engine = self._engine
        if not engine.is_alive:
            raise EngineError(f"the engine has failed: {engine._failure}")
        engine._take(len(self._requests))
        self.loop = asyncio.get_running_loop()
        engine._device.call(lambda: engine.begin(self, self._requests))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._left:
            self._engine._device.call(lambda: self._engine.cancel(self, None))
        self._engine._count -= len(self._left)
        self._left.clear()

    def hear(self, heard: Heard) -> None:
        """On the event loop."""
        self._heard.put_nowait(heard)

    async def __aiter__(self) -> AsyncIterator[Grown]:
        while self._left:
            heard = await self._heard.get()
            if isinstance(heard, Exception):
                raise EngineError(str(heard)) from heard
            if heard.index not in self._left:
                continue  # drawn before the thread heard of its end
            if heard.ending is not None:
                self._end(heard.index)
            yield heard

    def cancel(self, index: int) -> None:
        if index in self._left:
            self._end(index)
            self._engine._device.call(lambda: self._engine.cancel(self, index))

    def _end(self, index: int) -> None:
        self._left.discard(index)
        self._engine._count -= 1
