"""A rival in a process, and where need be an environment, of its own; JSON lines over pipes."""

from __future__ import annotations

import json
import subprocess
import sys
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
