"""Orderly stops: a signal lets a run save itself; a second one ends it at once.

with StopRequest() as stop, Checkpoints(path, keep=2) as checkpoints:
    with contextlib.suppress(Interrupted):
        for step in ...:
            with stop.interruptible():
                ...                                      # sampling, grading: dropped at a stop
            ...                                          # the update: always finished
            if stop.requested:
                break
    checkpoints.save(step, state, meta)                  # the second signal can still end this
sys.exit(EXIT_SAVED if stop.requested else 0)
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EXIT_SAVED = 75
"""Exit status of a run that a signal stopped, with all it had done saved (EX_TEMPFAIL of
sysexits.h): run the same command again to go on."""

_LOST = b"\0"  # no signal has this number

_logger = logging.getLogger(__name__)


class Interrupted(BaseException):
    """A stop was requested inside `StopRequest.interruptible`.

    Like KeyboardInterrupt not an Exception: no ``except Exception`` on the way may swallow it.
    """


class StopRequest:
    """Catches SIGTERM, SIGINT and SIGHUP in the main thread while its ``with`` block runs.

    The first signal sets `requested`, and raises `Interrupted` if the program is, or next comes,
    inside `interruptible`. A second SIGTERM or SIGINT ends the process at once with status 128 +
    its number, even during a compilation or a device computation, when no Python handler can run.
    Repeats within ``same_request_s`` are one request: ``timeout`` signals both its child and the
    child's process group, a wrapper script may forward what the terminal already sent.

    SIGHUP is what a terminal that is closed sends, to all that run in it, perhaps several times:
    it asks for a stop, and never ends one at once. Started under ``nohup``, a program ignores it
    and goes on.

    agree: for several processes, whether any of them was asked to stop; all call it together. No
        process may then leave a block that others are in, so `Interrupted` is only raised on
        entering one, on all of them. May be set later, outside of `interruptible`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, agree: Callable[[bool], bool] | None = None, *, same_request_s: float = 0.5):
        self.signal: signal.Signals | None = None
        self.agree = agree
        self._same_request_s = same_request_s
        self._is_interruptible = False
        self._is_lost = False

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python runs handlers in the main thread, between bytecodes; the bytes of the wake-up
        # descriptor are written by the C handler itself, so the watcher sees signals at once.
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        self._old_handlers = {
            number: signal.signal(number, self._on_signal)
            for number in self.SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._old_hook
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.close()
        self._watcher.join()
        self._reader.close()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a stop may abandon: `Interrupted` is raised in it, or on entering it."""
        self._is_interruptible = self.agree is None
        try:
            if self.agree(self.requested) if self.agree else self.requested:
                raise Interrupted(self.signal)
            yield
        finally:
            self._is_interruptible = False

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested and not self._is_lost:
            return
        self._is_lost = False
        self.signal = self.signal or signal.Signals(number)
        if self._is_interruptible:
            raise Interrupted(self.signal)

    def _on_unraisable(self, unraisable: Any) -> None:
        """Where Python was in a finalizer or in a callback of the garbage collector, it drops an
        exception and goes on: have the watcher cause another, in place of a traceback."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._old_hook(unraisable)
        elif self._is_interruptible:
            self._writer.send(_LOST)

    def _watch(self) -> None:
        """Announce the first signal, end the process at the second (see ``__enter__``)."""
        first_s, own_signals = None, 0
        while byte := self._reader.recv(1):
            if byte == _LOST:
                time.sleep(0.01)  # the main thread is still on its way out of there
                self._is_lost, own_signals = True, own_signals + 1
                _thread.interrupt_main(self.signal or signal.SIGTERM)
            elif byte[0] not in self.SIGNALS:
                continue
            elif first_s is None:
                first_s = time.monotonic()
                name = signal.Signals(byte[0]).name
                _logger.warning("%s: saving, then stopping; again: stop at once, unsaved", name)
            elif own_signals:
                own_signals -= 1
            elif byte[0] != signal.SIGHUP and time.monotonic() - first_s > self._same_request_s:
                os._exit(128 + byte[0])
