"""A grader process: ``python -m aspo_jax.rewards.pool.worker KINDS RULES LIMIT_S``, JSON lines.

In: one task per line, ``[judge, submissions]``: the name of a kind or a function, and the fields of
one `Submission` or of all of a prompt. Out: ``{"groups": names}`` once, the judges that want whole
prompts, or ``{"error": why}`` and the end; then for each task, in order and as soon as it is done,
``[[reward, reason, is_valid], ...]``. It ends when its input ends, so it cannot outlive the
trainer; a task that it is then still busy with is ended by the alarm. What it started ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TextIO

from aspo_jax.rewards.graders import Judge, open_judges
from aspo_jax.rewards.verdict import CRASH, RewardError, Rules, Submission, Verdict


def _claim_stdout() -> TextIO:
    """The pipe for replies; whatever graded code prints goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return replies


def _judge(judge: Judge, submissions: Sequence[Submission]) -> list[Verdict]:
    try:
        return judge(submissions)
    except Exception:  # a grader's own fault: this task's, not its neighbours'
        traceback.print_exc()
        return [CRASH] * len(submissions)


def _leave(*_: int | FrameType | None) -> None:
    """On SIGTERM: an exception, so that whatever is under way takes down what it started."""
    raise SystemExit(1)


def serve(
    judges: Mapping[str, Judge],
    limit_s: float,
    replies: TextIO | None = None,
    groups: Sequence[str] = (),
) -> None:
    """Judge what comes in until the input ends.

    limit_s: seconds per answer after which a task ends the process. The pool kills it earlier; this
        is for the case that the pool is gone.
    groups: the judges that want whole prompts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no Python handler: it must end C code too
    signal.signal(signal.SIGTERM, _leave)
    with replies or _claim_stdout() as replies:
        print(json.dumps({"groups": list(groups)}), file=replies, flush=True)
        for line in sys.stdin.buffer:
            judge, fields = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, limit_s * len(fields))
            verdicts = _judge(judges[judge], [Submission(**own) for own in fields])
            signal.setitimer(signal.ITIMER_REAL, 0)
            plain = [(v.reward, v.reason, v.is_valid) for v in verdicts]
            print(json.dumps(plain), file=replies, flush=True)


def main(kinds: str, rules: str, limit_s: str) -> int:
    replies = _claim_stdout()
    try:
        judges, groups = open_judges(json.loads(kinds), Rules(**json.loads(rules)))
    except RewardError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return 1
    serve(judges, float(limit_s), replies, groups)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
