"""A grader process: ``python -m aspo_jax.rewards.worker LIMIT_S``, JSON lines over its pipes.

In: one object per line, the fields of `Submission`. Out: ``"ready"`` once, then for each line, in
order and as soon as it is judged, ``[reward, reason, is_valid]``. It ends when its input ends, so
it cannot outlive the trainer; an answer that it is then still busy with is ended by the alarm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import TextIO

from aspo_jax.rewards.graders import GRADERS, Grader
from aspo_jax.rewards.verdict import Submission, Verdict


def _claim_stdout() -> TextIO:
    """The pipe for replies; whatever graded code prints goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return replies


def _judge(graders: Mapping[str, Grader], submission: Submission) -> Verdict:
    try:
        grade = graders[submission.kind]
        return grade(submission.text, submission.answer, submission.is_finished)
    except Exception:  # a grader's own fault: this sample's, not its neighbours'
        traceback.print_exc()
        return Verdict(0.0, "crash", is_valid=False)


def serve(graders: Mapping[str, Grader], limit_s: float) -> None:
    """Judge what comes in until the input ends.

    limit_s: seconds after which a single answer ends the process. The pool kills it earlier; this
        is for the case that the pool is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no Python handler: it must end C code too
    with _claim_stdout() as replies:
        print(json.dumps("ready"), file=replies, flush=True)
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            verdict = _judge(graders, Submission(**json.loads(line)))
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(dataclasses.astuple(verdict)), file=replies, flush=True)


if __name__ == "__main__":
    serve(GRADERS, limit_s=float(sys.argv[1]))
