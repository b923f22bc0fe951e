"""The submissions of one call, as the tasks that workers are given and the verdicts they make."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from aspo_jax.rewards.graders import CUSTOM, GRADERS
from aspo_jax.rewards.verdict import CRASH, Submission, Verdict, weighted


class Task(NamedTuple):
    """What one judge says of one submission, or of all of a prompt.

    judge: a kind of answers, or the name of a function of the user's.
    numbers: of the submissions.
    """

    judge: str
    numbers: tuple[int, ...]


class Round:
    """Which submissions are waiting, judged, tried before.

    The caller's thread adds and closes or gives up, the thread that grades does all the rest.

    functions: names of the user's functions, each of which judges every submission besides its
        kind; weights: one for each.
    has_parts: verdicts say what they are made of.
    group: submissions of a prompt, numbered one after the other from a multiple of it.
    """

    def __init__(
        self,
        functions: Sequence[str] = (),
        weights: Sequence[float] = (),
        has_parts: bool = False,
        group: int = 1,
    ) -> None:
        self._functions, self._weights, self._has_parts = functions, weights, has_parts
        self._group = group
        self._submissions: dict[int, Submission] = {}
        self._arrived: deque[int] = deque()
        self._incomplete: dict[int, list[int]] = {}  # group -> those of its numbers that are there
        self._waiting: dict[str, deque[Task]] = {}  # by judge
        self._crashed: set[Task] = set()
        self._parts: dict[int, dict[str, Verdict]] = {}
        self.verdicts: dict[int, Verdict] = {}
        self.is_closed = self.is_given_up = self.is_cancelled = False

    def add(self, number: int, submission: Submission) -> None:
        if number in self._submissions:
            raise ValueError(f"submission {number} is there already")
        self._submissions[number] = submission
        self._arrived.append(number)

    @property
    def is_complete(self) -> bool:
        return self.is_closed and len(self.verdicts) == len(self._submissions)

    def take(self, workers: int, of_groups: Collection[str]) -> tuple[list[Task], bytes]:
        """The next chunk: for one judge, and small enough to leave some for the other workers.

        of_groups: the functions that judge whole groups.

        Raises:
            ValueError: there is one, and the round was closed with a group that is not whole.
        """
        if self.is_given_up:
            return [], b""
        self._lay_out(of_groups)
        queue = next((queue for queue in self._waiting.values() if queue), None)
        if queue is None:
            return [], b""
        judge, fair = queue[0].judge, max(1, len(queue) // (4 * workers))
        chunk = GRADERS[judge].chunk if judge in GRADERS else 1
        tasks = [queue.popleft() for _ in range(min(len(queue), fair, chunk))]
        return tasks, "".join(map(self._line, tasks)).encode("ascii")

    def _lay_out(self, of_groups: Collection[str]) -> None:
        """Turn what has arrived into tasks."""
        is_closed = self.is_closed  # before the look at what has arrived: nothing comes after it
        while self._arrived:
            number = self._arrived.popleft()
            for judge in self._judges(number):
                if judge not in of_groups:
                    self._queue(judge).append(Task(judge, (number,)))
            members = self._incomplete.setdefault(number // self._group, [])
            members.append(number)
            if len(members) == self._group:
                whole = tuple(sorted(self._incomplete.pop(number // self._group)))
                for judge in of_groups:
                    self._queue(judge).append(Task(judge, whole))
        if is_closed and of_groups and self._incomplete:
            found = len(next(iter(self._incomplete.values())))
            raise ValueError(
                f"found {found} submissions of a group, expected all {self._group}: "
                f"{', '.join(of_groups)} judge whole groups"
            )

    def _line(self, task: Task) -> str:
        fields = [vars(self._submissions[number]) for number in task.numbers]
        if task.judge in GRADERS:  # only functions look at the other columns, which may be long
            fields = [own | {"row": {}} for own in fields]
        return f"{json.dumps([task.judge, fields])}\n"

    def _judges(self, number: int) -> list[str]:
        """Whoever judges a submission; the first says whether it is right."""
        kind = self._submissions[number].kind
        return [*([] if kind == CUSTOM else [kind]), *self._functions]

    def _queue(self, judge: str) -> deque[Task]:
        return self._waiting.setdefault(judge, deque())

    def judged(self, task: Task, verdicts: Sequence[Verdict]) -> None:
        """A reply; a grader that failed gets a second try."""
        if CRASH in verdicts and task not in self._crashed:
            self._crashed.add(task)
            self._queue(task.judge).appendleft(task)
            return
        for number, verdict in zip(task.numbers, verdicts, strict=True):
            self._parts.setdefault(number, {})[task.judge] = verdict
            self._combine(number)

    def _combine(self, number: int) -> None:
        """The verdict on a submission that all have judged."""
        judges, parts = self._judges(number), self._parts[number]
        if len(parts) == len(judges):
            ordered = {judge: parts[judge] for judge in judges}
            own = [1.0] * (len(judges) - len(self._functions))
            self.verdicts[number] = (
                weighted(ordered, [*own, *self._weights]) if self._has_parts else parts[judges[0]]
            )

    def lost(self, owed: Sequence[Task], verdict: Verdict) -> None:
        """The worker was lost at the first owed task; the others never had their turn."""
        for task in reversed(owed[1:]):
            self._queue(task.judge).appendleft(task)
        self.judged(owed[0], [verdict] * len(owed[0].numbers))

    def results(self) -> list[tuple[Submission, Verdict]]:
        return [(self._submissions[i], self.verdicts[i]) for i in sorted(self._submissions)]
