"""One worker process as the pool sees it: lines in, lines out, nothing ever blocks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence

from aspo_jax.rewards.pool.round import Task

_PIPE_READ = 1 << 16
_GRACE_S = 0.5


class WorkerProcess:
    """A child in its own session, with the tasks that it was sent and has not answered.

    deadline: monotonic time by which its next line must have come; None while it owes none.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], startup_s: float):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a group of its own, to be killed with all its children
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a worker was started without pipes")
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)
        self._unsent = memoryview(b"")
        self._unread = b""
        self.is_ready = False
        self.owed: deque[Task] = deque()
        self.deadline: float | None = time.monotonic() + startup_s

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.owed

    @property
    def wants_to_write(self) -> bool:
        return len(self._unsent) > 0

    def send(self, tasks: Sequence[Task], lines: bytes) -> None:
        """Queue ``lines``, one for each of ``tasks``; `write` moves them."""
        self.owed.extend(tasks)
        self._unsent = memoryview(lines)

    def write(self) -> None:
        """Hand the pipe what it takes now. A dead reader shows at the next `read`."""
        try:
            self._unsent = self._unsent[os.write(self.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = memoryview(b"")

    def read(self) -> list[bytes] | None:
        """The complete lines that have come; None once the process has closed its end."""
        try:
            data = os.read(self.stdout.fileno(), _PIPE_READ)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return lines

    def kill(self) -> int:
        """End it and all processes of its group; returns its exit status.

        It is asked first: what it started outside its group (sandboxes) it has to end itself.
        """
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self.stdin.close()
        self.stdout.close()
        return status
