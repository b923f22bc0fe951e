"""Standard output and standard error that may end before the program does."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Stream:
    """A stream whose reader may go away: from then on what is written to it is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # A closed pipe, a terminal that is gone, a full disk. What the stream still buffers
            # goes to the null device too; else the interpreter would complain of it at its exit.
            null = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError):
                os.dup2(null, self._stream.fileno())
            os.close(null)


def _occupy_closed() -> None:
    """Open the null device as each of descriptors 0 to 2 that is closed: the next file would get
    its number, and with it what compiled code prints."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


@contextlib.contextmanager
def unbreakable_streams() -> Iterator[None]:
    """While the body runs, what cannot be printed is dropped: ``| head -5`` ends no program."""
    _occupy_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Stream(stream) for stream in before)  # None: closed
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
