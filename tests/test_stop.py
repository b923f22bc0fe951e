"""`aspo_jax.run.stop`: the first signal saves, the second ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from checkpoint_toy import await_line, start, state_at

from aspo_jax.run.checkpoint import Checkpoints
from aspo_jax.run.stop import EXIT_SAVED, Interrupted, StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_interrupts_what_may_be_dropped(number: signal.Signals):
    before = [signal.getsignal(s) for s in StopRequest.SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        with pytest.raises(Interrupted), stop.interruptible():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert stop.signal == number
        with pytest.raises(Interrupted), stop.interruptible():
            raise AssertionError("a stop that was requested before must not be forgotten")
    assert [signal.getsignal(s) for s in StopRequest.SIGNALS] == before


def test_a_signal_outside_only_sets_the_flag(caplog: pytest.LogCaptureFixture):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a repeat at once is the same request
        assert stop.requested
    assert caplog.messages == ["SIGTERM: saving, then stopping; again: stop at once, unsaved"]


@pytest.mark.parametrize(
    ("phase", "number", "work"),
    [
        ("sampling", signal.SIGTERM, {"rollouts": 0, "updates": 0}),
        ("update", signal.SIGINT, {"rollouts": 1, "updates": 1}),
    ],
)
def test_a_stopped_run_saves_and_says_so(tmp_path: Path, phase: str, number: int, work: dict):
    program = start("run_until_stopped", tmp_path, phase)
    await_line(program, "ready")
    program.send_signal(number)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == EXIT_SAVED == 75, errors
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(state_at(0))
    assert restored is not None
    assert restored.meta == work


def test_a_second_signal_ends_at_once_even_in_compiled_code(tmp_path: Path):
    program = start("run_until_stopped", tmp_path, "compiled")
    await_line(program, "ready")
    time.sleep(0.5)
    program.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert program.poll() is None
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=5)
    assert program.returncode == 128 + signal.SIGINT, errors


def test_a_closed_terminal_never_ends_a_run_at_once(tmp_path: Path):
    program = start("run_until_stopped", tmp_path, "long update")
    await_line(program, "ready")
    for _ in range(3):
        program.send_signal(signal.SIGHUP)
        time.sleep(0.6)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == EXIT_SAVED, errors


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stop.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


class SignalInFinalizer:
    """Stands for any place where Python drops an exception and prints a traceback instead."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_a_stop_that_python_would_drop_arrives_all_the_same(capfd: pytest.CaptureFixture[str]):
    with StopRequest(same_request_s=0.0) as stop:
        with pytest.raises(Interrupted), stop.interruptible():
            SignalInFinalizer()
            time.sleep(5)
        assert stop.signal == signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err
