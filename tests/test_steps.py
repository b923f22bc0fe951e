"""The verbs of the loop, where they must not do something."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from aspo_jax.history import History
from aspo_jax.steps import restore_or_init, update


def _never(*_: Any) -> Any:
    pytest.fail("must not be called")


def test_a_resume_makes_no_second_state():
    restored = SimpleNamespace(
        state="saved", meta={"data_position": 7, "iteration": 3, "history": {"ab": [2, 0.5, 0.25]}}
    )
    checkpoints: Any = SimpleNamespace(restore=lambda shapes: restored)
    positions: list[int] = []
    history = History()
    machines: Any = SimpleNamespace(
        learner=SimpleNamespace(state="shapes", init=_never),
        initial_params=_never,
        parts=SimpleNamespace(prompts=SimpleNamespace(restore=positions.append)),
        history=history,
    )
    assert restore_or_init(checkpoints, machines) == ("saved", 3)
    assert positions == [7] and history.state() == {"ab": [2, 0.5, 0.25]}


@pytest.mark.parametrize("epochs", [1, 2])
def test_without_a_signal_nothing_is_updated(epochs):
    run: Any = SimpleNamespace(
        machines=SimpleNamespace(
            shape=SimpleNamespace(minibatches=4), learner=SimpleNamespace(step=_never)
        ),
        config=SimpleNamespace(train=SimpleNamespace(epochs=epochs)),
        phase=contextlib.nullcontext,
    )
    before: Any = "state"
    state, report = update(run, before, [])
    skipped = report.pop("update/skipped_empty")
    assert state == "state" and not report and skipped.total == skipped.count == 4 * epochs
