"""The table of graders: kind -> ``grade(text, answer, is_finished) -> Verdict``.

A grader is a pure function that returns a verdict for whatever text it is given. It runs in a
worker process (`aspo_jax.rewards.worker`); what it needs to import is paid at the worker's start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aspo_jax.rewards import countdown, exact
from aspo_jax.rewards.verdict import Verdict

Grader = Callable[[str, Any, bool], Verdict]

GRADERS: Mapping[str, Grader] = {
    "countdown": countdown.grade,
    "exact": exact.grade,
}
