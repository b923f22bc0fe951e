"""Scoring in a small pool of worker processes that can be killed.

One selector drives all workers. Each is sent a chunk of lines at a time and answers line by line,
so cheap answers cost no round trip each, and yet a late or broken answer has one name: the first
line that its worker still owes. That one alone is judged ``timeout`` or, at its second try,
``crash``; the worker is replaced and the rest of its chunk goes back into the queue.
"""

from __future__ import annotations

import difflib
import json
import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aspo_jax.rewards.graders import GRADERS
from aspo_jax.rewards.process import WorkerProcess
from aspo_jax.rewards.shaping import Shape, unshaped
from aspo_jax.rewards.verdict import REASONS, Submission, Verdict

# -P: a file of the user's folder named like a module of the standard library is not that module
WORKER_COMMAND = (sys.executable, "-P", "-m", "aspo_jax.rewards.worker")

_STARTUP_S = 60.0  # imports on a busy machine; counted apart from the time for an answer
_MAX_STARTS = 3  # one may be killed from outside while it starts; three in a row are a fault
_CHUNK = 64  # most submissions that one worker is sent at once
_TIMEOUT = Verdict(0.0, "timeout", is_valid=False)
_CRASH = Verdict(0.0, "crash", is_valid=False)


def _environment() -> dict[str, str]:
    """What a worker may know: how to find its interpreter and this very package, no more."""
    kept = ("PATH", "LD_LIBRARY_PATH")
    package_root = str(Path(__file__).resolve().parents[2])
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONPATH": package_root
    }


def _check_kinds(submissions: Iterable[Submission]) -> None:
    for kind in {submission.kind for submission in submissions}:
        if kind not in GRADERS:
            near = difflib.get_close_matches(kind, GRADERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(map(repr, GRADERS))
            raise ValueError(f"unknown kind of answer {kind!r}, expected one of {known}{hint}")


def _encode(submission: Submission) -> bytes:
    return json.dumps(vars(submission)).encode("ascii") + b"\n"


def _decode(line: bytes) -> Verdict | None:
    """The verdict of a reply; None if it is no reply."""
    try:
        reward, reason, is_valid = json.loads(line)
        verdict = Verdict(float(reward), reason, bool(is_valid))
    except (ValueError, TypeError):
        return None
    return verdict if verdict.reason in REASONS else None


class _Round:
    """The submissions of one `Scorer.score` call: which are waiting, judged, tried before."""

    def __init__(self, lines: list[bytes], chunk: int):
        self._lines = lines
        self._chunk = chunk
        self._waiting = deque(range(len(lines)))
        self._crashed: set[int] = set()
        self.verdicts: dict[int, Verdict] = {}

    @property
    def is_complete(self) -> bool:
        return len(self.verdicts) == len(self._lines)

    def take(self) -> tuple[list[int], bytes]:
        items = [self._waiting.popleft() for _ in range(min(self._chunk, len(self._waiting)))]
        return items, b"".join(self._lines[i] for i in items)

    def timed_out(self, owed: Sequence[int]) -> None:
        """The first owed answer took too long; the others never had their turn."""
        self.verdicts[owed[0]] = _TIMEOUT
        self._put_back(owed[1:])

    def crashed(self, owed: Sequence[int]) -> None:
        """The worker ended at the first owed answer: its fault if it happens twice."""
        if owed[0] in self._crashed:
            self.verdicts[owed[0]] = _CRASH
            self._put_back(owed[1:])
        else:
            self._crashed.add(owed[0])
            self._put_back(owed)

    def _put_back(self, items: Sequence[int]) -> None:
        self._waiting.extendleft(reversed(items))


class Scorer:
    """Verdicts for submissions. A context manager; `close` ends the workers.

    Args:
        workers: number of processes.
        timeout_s: seconds that a single answer may take, its worker's start not counted.
        shape: what to add to each verdict (`overlong_ramp`).
        command: what starts a worker; the limit in seconds after which it must end by itself is
            appended. Another command must speak the protocol of `aspo_jax.rewards.worker`.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        shape: Shape = unshaped,
        command: Sequence[str] = WORKER_COMMAND,
    ):
        if workers < 1:
            raise ValueError(f"Reward.workers is {workers}, expected at least 1")
        if not timeout_s > 0:
            raise ValueError(f"Reward.timeout_s is {timeout_s}, expected seconds > 0")
        self._count = workers
        self._timeout_s = timeout_s
        self._shape = shape
        self._command = (*command, str(2 * timeout_s + 5))
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._is_closed = False
        self._failed_starts = 0  # in a row
        self._start_missing()  # now, so that they get ready while the trainer compiles

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def score(self, submissions: Sequence[Submission]) -> list[Verdict]:
        """One verdict per submission, in their order.

        Raises:
            ValueError: an unknown kind, or the scorer is closed.
            RuntimeError: a worker could not start (nothing to do with what it was to judge).
        """
        if self._is_closed:
            raise ValueError("this scorer is closed")
        _check_kinds(submissions)
        chunk = max(1, min(_CHUNK, len(submissions) // (4 * self._count)))
        round_ = _Round([_encode(s) for s in submissions], chunk)
        try:
            while not round_.is_complete:
                self._advance(round_)
        except BaseException:
            self._kill_all()  # whoever still owes an answer must not give it to the next call
            raise
        return [self._shape(s, round_.verdicts[i]) for i, s in enumerate(submissions)]

    def close(self) -> None:
        """End all workers. Calling it again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._kill_all()
            self._selector.close()

    # --- one turn of the loop ---------------------------------------------------------------------

    def _advance(self, round_: _Round) -> None:
        """Hand out work, wait until something happens, deal with it."""
        self._start_missing()
        for worker in self._workers:
            if worker.is_idle:
                self._send(worker, round_)
        for key, events in self._selector.select(self._patience()):
            if key.data not in self._workers:  # lost while an earlier event was dealt with
                continue
            if events & selectors.EVENT_WRITE:
                self._write(key.data)
            else:
                self._read(key.data, round_)
        # After the replies, so that a trainer that was itself held up blames nobody for it.
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.deadline is not None and worker.deadline <= now:
                self._expire(worker, round_)

    def _patience(self) -> float | None:
        deadlines = [w.deadline for w in self._workers if w.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _send(self, worker: WorkerProcess, round_: _Round) -> None:
        items, lines = round_.take()
        if items:
            worker.send(items, lines)
            worker.deadline = time.monotonic() + self._timeout_s
            self._write(worker)

    def _write(self, worker: WorkerProcess) -> None:
        worker.write()
        is_watched = worker.stdin.fileno() in self._selector.get_map()
        if worker.wants_to_write and not is_watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif is_watched and not worker.wants_to_write:
            self._selector.unregister(worker.stdin)

    def _read(self, worker: WorkerProcess, round_: _Round) -> None:
        lines = worker.read()
        if lines is None:
            self._lose(worker, round_)
            return
        for line in lines:
            if not worker.is_ready:
                worker.is_ready = True
                self._failed_starts = 0
            elif worker.owed and (verdict := _decode(line)) is not None:
                round_.verdicts[worker.owed.popleft()] = verdict
            else:
                self._lose(worker, round_)
                return
        if lines:
            worker.deadline = time.monotonic() + self._timeout_s if worker.owed else None

    # --- workers come and go ----------------------------------------------------------------------

    def _start_missing(self) -> None:
        while len(self._workers) < self._count:
            worker = WorkerProcess(self._command, _environment(), _STARTUP_S)
            self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
            self._workers.append(worker)

    def _kill(self, worker: WorkerProcess) -> int:
        for pipe in (worker.stdin, worker.stdout):
            if pipe.fileno() in self._selector.get_map():
                self._selector.unregister(pipe)
        self._workers.remove(worker)
        return worker.kill()

    def _kill_all(self) -> None:
        for worker in list(self._workers):
            self._kill(worker)

    def _lose(self, worker: WorkerProcess, round_: _Round) -> None:
        """The worker ended, or spoke out of turn."""
        status = self._kill(worker)
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts < _MAX_STARTS:
                return
            raise RuntimeError(
                f"{_MAX_STARTS} grader processes in a row ended before they were ready (exit "
                f"status {status}); see their own message above. "
                f"Command: {' '.join(self._command)}"
            )
        if worker.owed:
            round_.crashed(list(worker.owed))

    def _expire(self, worker: WorkerProcess, round_: _Round) -> None:
        """The worker's deadline has passed."""
        self._kill(worker)
        if not worker.is_ready:
            raise RuntimeError(
                f"a grader process was not ready within {_STARTUP_S:g} s. "
                f"Command: {' '.join(self._command)}"
            )
        round_.timed_out(list(worker.owed))


def build_scorer(workers: int = 1, timeout_s: float = 5.0, shape: Shape = unshaped) -> Scorer:
    """A `Scorer` whose workers run this package's graders."""
    return Scorer(workers, timeout_s, shape)
