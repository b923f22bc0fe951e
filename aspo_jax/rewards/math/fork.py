"""Run a function in a child that can be killed and leaves nothing in this process.

A fork of a process that has imported everything starts in a millisecond, ends with all that the
function did to memory, caches and modules, and is killed at its time limit whatever it is busy
with. For single-threaded processes only (grader processes; never the trainer).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Literal

from aspo_jax.rewards.code import jail

_EXHAUSTED, _FAULT = 3, 4
# An exception, or in C code: a fault, too deep a stack, a library that gives up.
_OUT_OF_MEMORY = (_EXHAUSTED, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
_MEMORY = 2 * 2**30


def in_child(
    function: Callable[[], float], limit_s: float
) -> float | Literal["timeout", "exhausted", "crash"]:
    """What ``function`` returns (a number or a bool), or why it did not: time, memory or depth, its
    own fault."""
    incoming, outgoing = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(incoming)
        _serve(function, outgoing, parent, limit_s)
    os.close(outgoing)
    try:
        is_answered = select.select([incoming], [], [], limit_s)[0]
        reply = os.read(incoming, 64) if is_answered else None  # nothing if it ended without one
    finally:
        os.kill(child, signal.SIGKILL)  # a zombie at worst: nobody has waited for it yet
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(incoming)
    if reply is None:
        return "timeout"
    if reply:
        return json.loads(reply)
    return "exhausted" if status in _OUT_OF_MEMORY else "crash"


def _serve(function: Callable[[], float], outgoing: int, parent: int, limit_s: float) -> None:
    status = _FAULT
    try:
        jail.die_with_parent(parent)
        jail.limit(cpu_s=int(limit_s) + 2, memory=_MEMORY, file=0, processes=None)
        jail.restrict_where_possible(jail.python_folders())
        os.write(outgoing, json.dumps(function()).encode("ascii"))
        status = 0
    except (MemoryError, RecursionError):
        status = _EXHAUSTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
