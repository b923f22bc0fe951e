"""Scoring in a small pool of worker processes that can be killed.

One selector drives all workers. Each is sent a chunk of lines at a time and answers line by line,
so cheap answers cost no round trip each, and yet a late or broken answer has one name: the first
line that its worker still owes. That one alone is judged ``timeout`` or, at its second try,
``crash``; the worker is replaced and the rest of its chunk goes back into the queue.

`Scorer.score` judges a list. `Scorer.begin` judges in a thread what is submitted while more is
still being sampled; verdicts are kept by the caller's numbers, whatever order they come in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from aspo_jax.rewards.graders import KINDS, Rules, chunk
from aspo_jax.rewards.pool.process import WorkerProcess
from aspo_jax.rewards.verdict import REASONS, RewardError, Submission, Verdict

# -P: a file of the user's folder named like a module of the standard library is not that module
WORKER_COMMAND = (sys.executable, "-P", "-m", "aspo_jax.rewards.pool.worker")

_STARTUP_S = 60.0  # imports on a busy machine; counted apart from the time for an answer
_MAX_STARTS = 3  # one may be killed from outside while it starts; three in a row are a fault
_TIMEOUT = Verdict(0.0, "timeout")
_CRASH = Verdict(0.0, "crash", is_valid=False)


def _environment() -> dict[str, str]:
    """What a worker may know: how to find its interpreter, this very package, and the user's own.

    The user's modules come last: they cannot stand in for ours or for the standard library's.
    """
    kept = ("PATH", "LD_LIBRARY_PATH")
    package_root = str(Path(__file__).resolve().parents[3])
    own = [folder or os.getcwd() for folder in sys.path[:1]]
    own += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [package_root, *dict.fromkeys(filter(None, [*own, os.getcwd()]))]
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(folders)
    }


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


def _trouble(line: bytes) -> str | None:
    """Why a worker cannot start, where its first line says so."""
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, dict):
            return said.get("error")
    return None


class _Round:
    """The submissions of one call: which are waiting, judged, tried before.

    The caller's thread adds and closes, the thread that grades does all the rest.
    """

    def __init__(self) -> None:
        self._lines: dict[int, bytes] = {}
        self._submissions: dict[int, Submission] = {}
        self._waiting: deque[int] = deque()
        self._crashed: set[int] = set()
        self.verdicts: dict[int, Verdict] = {}
        self.is_closed = False

    def add(self, number: int, submission: Submission) -> None:
        if number in self._submissions:
            raise ValueError(f"submission {number} is there already")
        self._submissions[number] = submission
        self._lines[number] = _encode(submission)
        self._waiting.append(number)

    @property
    def is_complete(self) -> bool:
        return self.is_closed and len(self.verdicts) == len(self._lines)

    def take(self, workers: int) -> tuple[list[int], bytes]:
        """The next chunk: of one kind, and small enough to leave some for the other workers."""
        items: list[int] = []
        fair = max(1, len(self._waiting) // (4 * workers))
        while self._waiting and len(items) < min(fair, chunk(self.kind(self._waiting[0]))):
            items.append(self._waiting.popleft())
        return items, b"".join(self._lines[i] for i in items)

    def kind(self, number: int) -> str:
        return self._submissions[number].kind

    def results(self) -> list[tuple[Submission, Verdict]]:
        return [(self._submissions[i], self.verdicts[i]) for i in sorted(self._submissions)]

    def judged(self, number: int, verdict: Verdict) -> None:
        """A reply; a grader that failed gets a second try."""
        if verdict == _CRASH and number not in self._crashed:
            self._crashed.add(number)
            self._put_back([number])
        else:
            self.verdicts[number] = verdict

    def timed_out(self, owed: Sequence[int]) -> None:
        """The first owed answer took too long; the others never had their turn."""
        self.verdicts[owed[0]] = _TIMEOUT
        self._put_back(owed[1:])

    def crashed(self, owed: Sequence[int]) -> None:
        """The worker ended at the first owed answer: its fault if it happens twice."""
        self._put_back(owed[1:])
        self.judged(owed[0], _CRASH)

    def _put_back(self, items: Sequence[int]) -> None:
        self._waiting.extendleft(reversed(items))


class Grading:
    """Submissions that are judged in the background while more of them come: `Scorer.begin`."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self._round = _Round()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="grading", daemon=True)

    def __enter__(self) -> Grading:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._thread.is_alive():
            self._scorer.cancel()
            self._thread.join()

    def submit(self, number: int, submission: Submission) -> None:
        """Have it judged; results come in the order of the numbers.

        Raises:
            ValueError: an unknown kind, or a number used before.
        """
        self._scorer.check_kinds([submission])
        self._round.add(number, submission)
        self._scorer.wake()

    def results(self) -> list[tuple[Submission, Verdict]]:
        """Every submission and its verdict, by number; waits for those still being judged.

        Raises:
            RewardError: a worker could not start.
        """
        self._round.is_closed = True
        self._scorer.wake()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._round.results()

    def _work(self) -> None:
        try:
            self._scorer.work(self._round)
        except BaseException as error:
            self._error = error


class Scorer:
    """Verdicts for submissions. A context manager; `close` ends the workers.

    Args:
        workers: number of processes.
        rules: how the graders judge; a number is short for `Rules` with that ``timeout_s``.
        kinds: the graders that the workers get ready.
        command: what starts a worker; the kinds, the rules and the limit in seconds after which it
            must end by itself are appended. Another command must speak the protocol of
            `aspo_jax.rewards.pool.worker`.
    """

    def __init__(
        self,
        workers: int,
        rules: Rules | float,
        kinds: Collection[str] = ("countdown", "exact"),
        command: Sequence[str] = WORKER_COMMAND,
    ):
        self._rules = rules if isinstance(rules, Rules) else Rules(timeout_s=rules)
        if workers < 1:
            raise ValueError(f"Reward.workers is {workers}, expected at least 1")
        if not self._rules.timeout_s > 0:
            raise ValueError(f"Reward.timeout_s is {self._rules.timeout_s}, expected seconds > 0")
        self._count = workers
        self._kinds = tuple(sorted(kinds))
        longest = max((self._rules.limit_s(kind) for kind in kinds), default=1.0)
        self._command = (
            *command,
            json.dumps(self._kinds),
            json.dumps(dataclasses.asdict(self._rules)),
            str(2 * longest + 5),
        )
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._workers: list[WorkerProcess] = []
        self._is_closed = self._is_cancelled = False
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
            RewardError: a worker could not start (nothing to do with what it was to judge).
        """
        self._check_open()
        self.check_kinds(submissions)
        round_ = _Round()
        for number, submission in enumerate(submissions):
            round_.add(number, submission)
        round_.is_closed = True
        self.work(round_)
        return [verdict for _, verdict in round_.results()]

    def begin(self) -> Grading:
        """A context manager that judges in the background; one at a time.

        Raises:
            ValueError: the scorer is closed.
        """
        self._check_open()
        return Grading(self)

    def wait_until_ready(self) -> None:
        """Wait until every worker can judge; if one cannot, close.

        Raises:
            RewardError: one cannot start, and why.
        """
        nothing = _Round()
        try:
            while not all(worker.is_ready for worker in self._workers):
                self._advance(nothing)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all workers. Calling it again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._kill_all()
            self._selector.close()
            os.close(self._woken)
            os.close(self._waker)

    # --- for Grading ------------------------------------------------------------------------------

    def check_kinds(self, submissions: Iterable[Submission]) -> None:
        """Refuse a kind that this scorer has no grader for."""
        for kind in {submission.kind for submission in submissions} - set(self._kinds):
            if kind in KINDS:
                raise ValueError(
                    f"this scorer was built without the grader {kind!r}; give build_scorer "
                    f"kinds={(*self._kinds, kind)}"
                )
            near = difflib.get_close_matches(kind, self._kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(map(repr, self._kinds))
            raise ValueError(f"unknown kind of answer {kind!r}, expected one of {known}{hint}")

    def wake(self) -> None:
        """Let the thread that grades look at its round again."""
        with contextlib.suppress(BlockingIOError):  # it is full of such calls
            os.write(self._waker, b"!")

    def cancel(self) -> None:
        """Make `work` of another thread give up."""
        self._is_cancelled = True
        self.wake()

    def work(self, round_: _Round) -> None:
        """Judge until a round is complete."""
        self._is_cancelled = False
        try:
            while not round_.is_complete and not self._is_cancelled:
                self._advance(round_)
        finally:
            if not round_.is_complete:
                self._kill_all()  # whoever still owes an answer must not give it to the next call

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("this scorer is closed")

    # --- one turn of the loop ---------------------------------------------------------------------

    def _advance(self, round_: _Round) -> None:
        """Hand out work, wait until something happens, deal with it."""
        self._start_missing()
        for worker in self._workers:
            if worker.is_idle:
                self._send(worker, round_)
        for key, events in self._selector.select(self._patience()):
            if key.data is None:
                os.read(self._woken, 4096)
                continue
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
        items, lines = round_.take(self._count)
        if items:
            worker.send(items, lines)
            self._set_deadline(worker, round_)
            self._write(worker)

    def _set_deadline(self, worker: WorkerProcess, round_: _Round) -> None:
        """By when the first owed answer must be there."""
        worker.deadline = None
        if worker.owed:
            limit_s = self._rules.limit_s(round_.kind(worker.owed[0]))
            worker.deadline = time.monotonic() + limit_s

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
                if (trouble := _trouble(line)) is not None:
                    raise RewardError(trouble)
                worker.is_ready = True
                self._failed_starts = 0
            elif worker.owed and (verdict := _decode(line)) is not None:
                round_.judged(worker.owed.popleft(), verdict)
            else:
                self._lose(worker, round_)
                return
        if lines:
            self._set_deadline(worker, round_)

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
            raise RewardError(
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
            raise RewardError(
                f"a grader process was not ready within {_STARTUP_S:g} s. "
                f"Command: {' '.join(self._command)}"
            )
        round_.timed_out(list(worker.owed))


def build_scorer(
    workers: int = 1,
    rules: Rules | float = 5.0,
    kinds: Collection[str] = ("countdown", "exact"),
) -> Scorer:
    """A `Scorer` whose workers run this package's graders.

    For the kind ``code`` the sandbox is chosen here, by attacking it (`choose_sandbox`).

    Raises:
        RewardError: no sandbox that is safe enough.
    """
    rules = rules if isinstance(rules, Rules) else Rules(timeout_s=rules)
    if "code" in kinds:
        rules, _ = choose_sandbox(rules)
    return Scorer(workers, rules, kinds)


def choose_sandbox(rules: Rules) -> tuple[Rules, str]:
    """The rules with a tier that withstood the probe in place of ``auto``, and a report of a line.

    Raises:
        RewardError: the tier asked for, or for ``auto`` any but ``rlimits``, does not hold here.
    """
    command = [sys.executable, "-P", "-m", "aspo_jax.rewards.code.sandbox", rules.sandbox]
    done = subprocess.run(
        command, env=_environment(), capture_output=True, text=True, timeout=_STARTUP_S
    )
    try:
        tier, line = json.loads(done.stdout)
    except ValueError:
        raise RewardError(f"the probe of the sandbox failed: {done.stderr[-2000:]}") from None
    if tier is None:
        raise RewardError(line)
    return dataclasses.replace(rules, sandbox=tier), line
