"""The real trainer in processes of its own, and what it leaves behind."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2

from aspo_jax.run.checkpoint import Checkpoints, Restored
from aspo_jax.run.metrics import read_metrics

events: Any = event_pb2  # its classes are made at run time
TRAIN = ("-m", "aspo_jax.train")
TRAP = (str(Path(__file__).with_name("trap.py")),)
ITERATIONS = 6  # of the tiny config
CLOCKS = ("seconds/", "speed/")


class Runs:
    """Starts training processes that share one config file."""

    def __init__(self, config: Path):
        self.config = config

    def start(self, folder: Path, *flags: str, program: tuple[str, ...] = TRAIN):
        """A process that trains into ``folder``; flags are those of the command line's --set."""
        settings = [f"Run.folder='{folder}'", *flags]
        arguments = ["--config", str(self.config), *(x for s in settings for x in ("--set", s))]
        return launch(*program, *arguments)

    def run(self, folder: Path, *flags: str, program: tuple[str, ...] = TRAIN, expect: int = 0):
        """Train to the end; returns standard output and standard error."""
        return finish(self.start(folder, *flags, program=program), expect)


def launch(*arguments: str) -> subprocess.Popen[str]:
    # Without the flags of a test session: a user's process has one CPU device.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> tuple[str, str]:
    """Wait for the exit status that is expected; returns standard output and standard error."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == expect, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def until_stopped(process: subprocess.Popen[str]) -> None:
    """Wait until a trapped process has stopped itself by SIGSTOP."""
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found and found.si_code == os.CLD_STOPPED, process.communicate()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without clocks."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def transcripts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "transcripts").iterdir())}


def rollouts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "rollouts").iterdir())}


def last_checkpoint(folder: Path, abstract_state: Any) -> Restored:
    with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        restored = checkpoints.restore(abstract_state)
    assert restored is not None
    return restored


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, per tag: a process that starts at a step replaces what came after."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in _events(path):
            if event.session_log.status == events.SessionLog.START:
                shown = {
                    tag: [(step, value) for step, value in points if step < event.step]
                    for tag, points in shown.items()
                }
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def _events(path: Path) -> Iterator[Any]:
    """TFRecord framing: length, its checksum, data, their checksum; a killed file may end torn."""
    data, start = path.read_bytes(), 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length
        if end + 4 > len(data):
            return
        yield events.Event.FromString(data[start + 12 : end])
        start = end + 4
