"""An engine that the run starts by a command, and ends."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from aspo_jax.engines import keeper
from aspo_jax.shell import join

_TAIL = 2000  # characters of its log that an error shows


class Owned:
    """The process of a command, in a session of its own, with its output in a log file.

    command: words as in a shell, without a shell; ``{model}`` and ``{port}`` stand for the folder
        of the weights and a free port of this machine.
    log: file that its output is added to. ``model``: the folder that it was started on.
    """

    def __init__(self, command: str, log: Path):
        self._command, self.log = command, log
        self._process: subprocess.Popen[bytes] | None = None
        self.model: Path | None = None

    def start(self, model: Path) -> str:
        """Start it on a model's folder; returns its address.

        A program that is not there shows in the log, and by the end of the process.
        """
        self.stop()
        self.model = model
        port = _free_port()
        filled = {"{model}": str(model), "{port}": str(port)}
        words = [_replaced(word, filled) for word in shlex.split(self._command)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"--- {join(words)}\n".encode())
            log.flush()
            # The keeper's input is our pipe: it sees the end of this process, whatever ends it.
            self._process = subprocess.Popen(
                [sys.executable, keeper.__file__, *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's signals are the run's to handle
            )
        return f"http://127.0.0.1:{port}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it and all that it started; nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3 * keeper.GRACE_S)

    def state(self) -> str:
        """What to say of a process that ended, or does not answer."""
        status = None if self._process is None else self._process.poll()
        how = "does not answer" if status is None else f"ended with status {status}"
        try:
            text = self.log.read_text(errors="replace")[-_TAIL:]
        except OSError:
            text = ""
        return f"the engine of Sampler.command {how}; the end of {self.log}:\n{text}"


def _replaced(word: str, filled: dict[str, str]) -> str:
    for name, value in filled.items():
        word = word.replace(name, value)
    return word


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
