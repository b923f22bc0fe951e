"""A rival in a process, and where need be an environment, of its own; JSON lines over pipes.

The first part is for the benchmark, the second for workers, whose environments have other packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Rival:
    """A worker script of this folder; ``versions`` is None and ``missing`` says why if absent."""

    def __init__(self, script: str, argument: Path, python: str = sys.executable):
        self.script = script
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), str(argument)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._read()
        self.missing: str | None = hello.get("absent")
        self.versions: dict[str, str] | None = hello.get("versions")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.script} ended; its error is above")
        return json.loads(line)

    def ask(self, *question: Any) -> dict[str, Any]:
        """The answer to one question."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let the worker end by itself."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# --- in the worker ------------------------------------------------------------------------------


def own_output() -> Callable[[dict[str, Any]], None]:
    """Keep standard output for answers; what libraries print goes to standard error from now on."""
    pipe, sys.stdout = sys.stdout, sys.stderr
    return lambda message: print(json.dumps(message), file=pipe, flush=True)


def serve(
    say: Callable[[dict[str, Any]], None],
    build_update: Callable[[str], Callable[[], tuple[float, float]]],
) -> None:
    """Answer questions ``[name, repeats]`` until the benchmark is done.

    An update of that name returns (loss, gradient norm); it is built and run once, untimed, when
    the name is first heard. The answer: ``{"seconds": [...], "loss", "grad_norm"}``, the last two
    from that first run.
    """
    updates, first = {}, {}
    for line in sys.stdin:
        name, repeats = json.loads(line)
        if name not in updates:
            updates[name] = build_update(name)
            first[name] = updates[name]()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            updates[name]()
            seconds.append(time.perf_counter() - start)
        say({"seconds": seconds, "loss": first[name][0], "grad_norm": first[name][1]})
