"""An event loop in a thread of its own: what waits on engines, beside a thread that does not."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
X = TypeVar("X")


class Loop:
    """Runs coroutines for a thread that waits for them; a signal may interrupt the wait."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. Whatever ends the wait early cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def each(
        self, work: Callable[[X], Coroutine[Any, Any, T]], items: Iterable[X], at_once: int
    ) -> Iterator[tuple[X, T]]:
        """Each item with its result, in the order in which they are done, ``at_once`` at work.

        Whoever wants no more drops the iterator: what is under way is cancelled. The first failure
        cancels the rest and is raised.
        """
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        gate = asyncio.Semaphore(at_once)

        async def one(item: X) -> None:
            async with gate:
                done.put((item, await work(item)))

        async def everything() -> None:
            tasks = [asyncio.ensure_future(one(item)) for item in items]
            try:
                await asyncio.gather(*tasks)
                done.put(None)
            except BaseException as error:
                for task in tasks:
                    task.cancel()
                done.put(error)
                if not isinstance(error, Exception):
                    raise

        future = asyncio.run_coroutine_threadsafe(everything(), self._loop)
        try:
            while (found := done.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            future.cancel()

    def close(self) -> None:
        """End the thread; nothing runs any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.close()
