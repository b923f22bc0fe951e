"""Scoring in a small pool of worker processes that can be killed.

One selector drives all workers. Each is sent a chunk of tasks at a time and answers line by line,
so cheap answers cost no round trip each, and yet a late or broken answer has one name: the first
task that its worker still owes. That one alone is judged ``timeout`` or, at its second try,
``crash``; the worker is replaced and the rest of its chunk goes back into the queue.

`Scorer.begin` judges in a thread what is submitted while more is still being sampled; verdicts are
kept by the caller's numbers, whatever order they come in. `Scorer.score` does so with a list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo_jax.errors import nearest
from aspo_jax.rewards import custom
from aspo_jax.rewards.graders import CUSTOM, GRADERS, KINDS
from aspo_jax.rewards.pool.process import WorkerProcess
from aspo_jax.rewards.pool.round import Round, Task
from aspo_jax.rewards.verdict import CRASH, REASONS, RewardError, Rules, Submission, Verdict

# -P: a file of the user's folder named like a module of the standard library is not that module
WORKER_COMMAND = (sys.executable, "-P", "-m", "aspo_jax.rewards.pool.worker")

_STARTUP_S = 60.0  # imports on a busy machine; counted apart from the time for an answer
_MAX_STARTS = 3  # one may be killed from outside while it starts; three in a row are a fault


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


def _decode(line: bytes, count: int) -> list[Verdict] | None:
    """So many verdicts of a reply; None if it is no such reply."""
    try:
        verdicts = [
            Verdict(float(r), reason, bool(is_valid)) for r, reason, is_valid in json.loads(line)
        ]
    except (ValueError, TypeError):
        return None
    is_sound = len(verdicts) == count and all(v.reason in REASONS for v in verdicts)
    return verdicts if is_sound else None


def _greeting(line: bytes) -> dict[str, Any]:
    """A worker's first line: what it can do, or why it cannot start."""
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, dict):
            return said
    return {}


def _unknown(kind: str, kinds: Iterable[str]) -> ValueError:
    known = ", ".join(map(repr, kinds))
    return ValueError(
        f"unknown kind of answer {kind!r}{nearest(kind, kinds)}, expected one of {known}"
    )


class Grading:
    """Submissions that are judged in the background while more of them come: `Scorer.begin`."""

    def __init__(self, scorer: Scorer, round_: Round):
        self._scorer, self._round = scorer, round_
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="grading", daemon=True)
        self._has_ended = threading.Event()  # a join that Ctrl-C interrupts takes it for ended

    def __enter__(self) -> Grading:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not self._has_ended.is_set():
            self._round.is_cancelled = True
            self._scorer.wake()
            self._has_ended.wait()
        self._thread.join()

    def submit(self, number: int, submission: Submission) -> None:
        """Have it judged; results come in the order of the numbers.

        Raises:
            ValueError: an unknown kind, or a number used before.
        """
        self._scorer.check_kind(submission.kind)
        self._round.add(number, submission)
        self._scorer.wake()

    def verdict(self, number: int) -> Verdict | None:
        """The verdict on a submission as far as it is known: None while it is being judged."""
        return self._round.verdicts.get(number)

    def give_up(self) -> None:
        """Judge no more; waits for what workers are at.

        Raises:
            RewardError: a worker could not start.
        """
        self._round.is_given_up = True
        self._wait()

    def results(self) -> list[tuple[Submission, Verdict]]:
        """Every submission and its verdict, by number; waits for those still being judged.

        Raises:
            RewardError: a worker could not start.
            ValueError: a function judges whole groups, and one is not whole.
        """
        self._round.is_closed = True
        self._wait()
        return self._round.results()

    def _wait(self) -> None:
        self._scorer.wake()
        self._has_ended.wait()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._scorer.work(self._round)
        except BaseException as error:
            self._error = error
        finally:
            self._has_ended.set()


class Scorer:
    """Verdicts for submissions. A context manager; `close` ends the workers.

    Args:
        workers: number of processes.
        rules: how the graders judge. For the kind ``code`` the sandbox is attacked first.
        kinds: the graders that the workers get ready.
        command: what starts a worker; the kinds, the rules and the limit in seconds after which it
            must end by itself are appended. Another command must speak the protocol of
            `aspo_jax.rewards.pool.worker`.

    sandbox: one line about the sandbox for the kind ``code``; None without that kind.
    parts: what rewards can be made of, kinds and functions, by name: what each is multiplied with.
        None where there is only one.

    Raises:
        ValueError: no worker, no time, or a kind that there is no grader for.
        RewardError: no sandbox that is safe enough, or functions that cannot be told apart.
    """

    def __init__(
        self,
        workers: int,
        rules: Rules,
        kinds: Collection[str] = ("countdown", "exact"),
        command: Sequence[str] = WORKER_COMMAND,
    ):
        if workers < 1:
            raise ValueError(f"Reward.workers is {workers}, expected at least 1")
        if not rules.timeout_s > 0:
            raise ValueError(f"Reward.timeout_s is {rules.timeout_s}, expected seconds > 0")
        for kind in set(kinds) - GRADERS.keys():
            raise _unknown(kind, GRADERS)
        self.sandbox: str | None = None
        if "code" in kinds:
            rules, self.sandbox = _choose_sandbox(rules)
        self._rules = rules
        self._count = workers
        self._kinds = tuple(sorted(kinds))
        self._functions = custom.names(rules.functions, KINDS)
        self._weights = tuple(rules.weights) or (1.0,) * len(self._functions)
        self.parts: Mapping[str, float] = self._weighted_parts()
        self._of_groups: tuple[str, ...] = ()  # functions, as a worker says when it is ready
        longest = max(rules.timeout_s, *(GRADERS[kind].limit_s(rules) for kind in kinds))
        self._command = (
            *command,
            json.dumps(self._kinds),
            json.dumps(dataclasses.asdict(rules)),
            str(2 * longest + 5),
        )
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._workers: list[WorkerProcess] = []
        self._is_closed = False
        self._failed_starts = 0  # in a row
        self._start_missing()  # now, so that they get ready while the trainer compiles

    def _weighted_parts(self) -> dict[str, float]:
        names, weights = self._functions, self._weights
        if len(names) != len(weights):
            raise RewardError(
                f"found {len(weights)} Reward.weights for {len(names)} Reward.functions, expected "
                "one for each"
            )
        own = dict.fromkeys((kind for kind in self._kinds if kind != CUSTOM), 1.0)
        every = own | dict(zip(names, weights, strict=True))
        return every if names and (len(every) > 1 or weights != (1.0,)) else {}

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def score(self, submissions: Sequence[Submission], group: int = 1) -> list[Verdict]:
        """One verdict per submission, in their order.

        group: so many in a row are answers to one prompt.

        Raises:
            ValueError: an unknown kind, or the scorer is closed; a function judges whole groups,
                and the last is not whole.
            RewardError: a worker could not start (nothing to do with what it was to judge).
        """
        with self.begin(group) as grading:
            for number, submission in enumerate(submissions):
                grading.submit(number, submission)
            return [verdict for _, verdict in grading.results()]

    def begin(self, group: int = 1) -> Grading:
        """A context manager that judges in the background; one at a time.

        group: answers to one prompt: they have the numbers p * group to p * group + group - 1.

        Raises:
            ValueError: the scorer is closed.
        """
        if self._is_closed:
            raise ValueError("this scorer is closed")
        return Grading(self, self._round(group))

    def _round(self, group: int = 1) -> Round:
        return Round(self._functions, self._weights, bool(self.parts), group)

    def wait_until_ready(self) -> None:
        """Wait until every worker can judge; if one cannot, close.

        Raises:
            RewardError: one cannot start, and why.
        """
        nothing = self._round()
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

    def check_kind(self, kind: str) -> None:
        """Refuse a kind that this scorer has no grader for."""
        if kind not in GRADERS:
            raise _unknown(kind, self._kinds)
        if kind not in self._kinds:
            raise ValueError(
                f"this scorer was built without the grader {kind!r}; give Scorer "
                f"kinds={(*self._kinds, kind)}"
            )

    def wake(self) -> None:
        """Let the thread that grades look at its round again."""
        with contextlib.suppress(BlockingIOError):  # it is full of such calls
            os.write(self._waker, b"!")

    def work(self, round_: Round) -> None:
        """Judge until a round is complete, given up or cancelled."""
        try:
            while not (self._is_over(round_) or round_.is_cancelled):
                self._advance(round_)
        finally:
            if not self._is_over(round_):
                self._kill_all()  # whoever still owes an answer must not give it to the next call

    def _is_over(self, round_: Round) -> bool:
        is_idle = not any(worker.owed for worker in self._workers)
        return round_.is_complete or (round_.is_given_up and is_idle)

    # --- one turn of the loop ---------------------------------------------------------------------

    def _advance(self, round_: Round) -> None:
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

    def _send(self, worker: WorkerProcess, round_: Round) -> None:
        tasks, lines = round_.take(self._count, self._of_groups)
        if tasks:
            worker.send(tasks, lines)
            self._set_deadline(worker)
            self._write(worker)

    def _set_deadline(self, worker: WorkerProcess) -> None:
        """By when the first owed answer must be there."""
        worker.deadline = None
        if worker.owed:
            worker.deadline = time.monotonic() + self._limit_s(worker.owed[0])

    def _limit_s(self, task: Task) -> float:
        if task.judge in GRADERS:
            return GRADERS[task.judge].limit_s(self._rules)
        return self._rules.timeout_s * len(task.numbers)

    def _write(self, worker: WorkerProcess) -> None:
        worker.write()
        is_watched = worker.stdin.fileno() in self._selector.get_map()
        if worker.wants_to_write and not is_watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif is_watched and not worker.wants_to_write:
            self._selector.unregister(worker.stdin)

    def _read(self, worker: WorkerProcess, round_: Round) -> None:
        lines = worker.read()
        if lines is None:
            self._lose(worker, round_)
            return
        for line in lines:
            owed = len(worker.owed[0].numbers) if worker.owed else 0
            if not worker.is_ready:
                self._welcome(worker, _greeting(line))
            elif owed and (verdicts := _decode(line, owed)) is not None:
                round_.judged(worker.owed.popleft(), verdicts)
            else:
                self._lose(worker, round_)
                return
        if lines:
            self._set_deadline(worker)

    def _welcome(self, worker: WorkerProcess, said: Mapping[str, Any]) -> None:
        if "error" in said:
            raise RewardError(said["error"])
        self._of_groups = tuple(said.get("groups", ()))
        worker.is_ready = True
        self._failed_starts = 0

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

    def _lose(self, worker: WorkerProcess, round_: Round) -> None:
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
            round_.lost(list(worker.owed), CRASH)

    def _expire(self, worker: WorkerProcess, round_: Round) -> None:
        """The worker's deadline has passed."""
        self._kill(worker)
        if not worker.is_ready:
            raise RewardError(
                f"a grader process was not ready within {_STARTUP_S:g} s. "
                f"Command: {' '.join(self._command)}"
            )
        round_.lost(list(worker.owed), Verdict(0.0, "timeout"))


def _choose_sandbox(rules: Rules) -> tuple[Rules, str]:
    """The rules with a tier that withstood the probe in place of ``auto``, and a report of a line.

    In a process of its own, for a sandbox makes its process the parent of orphans.

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
