"""A grader process: ``python -m aspo_jax.rewards.pool.worker KINDS RULES LIMIT_S``, JSON lines.

In: one object per line, the fields of `Submission`. Out: ``"ready"`` once, or ``{"error": why}``
and the end, then for each line, in order and as soon as it is judged, ``[reward, reason,
is_valid]``. It ends when its input ends, so it cannot outlive the trainer; an answer that it is
then still busy with is ended by the alarm. What it started ends with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import TextIO

from aspo_jax.rewards.graders import GRADERS, Grade
from aspo_jax.rewards.verdict import CRASH, RewardError, Rules, Submission, Verdict


def _claim_stdout() -> TextIO:
    """The pipe for replies; whatever graded code prints goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return replies


def _judge(graders: Mapping[str, Grade], submission: Submission) -> Verdict:
    try:
        return graders[submission.kind](submission)
    except Exception:  # a grader's own fault: this sample's, not its neighbours'
        traceback.print_exc()
        return CRASH


def _leave(*_: int | FrameType | None) -> None:
    """On SIGTERM: an exception, so that whatever is under way takes down what it started."""
    raise SystemExit(1)


def serve(graders: Mapping[str, Grade], limit_s: float, replies: TextIO | None = None) -> None:
    """Judge what comes in until the input ends.

    limit_s: seconds after which a single answer ends the process. The pool kills it earlier; this
        is for the case that the pool is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no Python handler: it must end C code too
    signal.signal(signal.SIGTERM, _leave)
    with replies or _claim_stdout() as replies:
        print(json.dumps("ready"), file=replies, flush=True)
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            verdict = _judge(graders, Submission(**json.loads(line)))
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(dataclasses.astuple(verdict)), file=replies, flush=True)


def main(kinds: str, rules: str, limit_s: str) -> int:
    replies = _claim_stdout()
    try:
        how = Rules(**json.loads(rules))
        graders = {kind: GRADERS[kind].open(how) for kind in json.loads(kinds)}
    except RewardError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return 1
    serve(graders, float(limit_s), replies)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
