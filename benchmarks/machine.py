"""What the numbers were measured on: the lines that head a section of RESULTS.md."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path


def _first(path: str, key: str) -> str:
    """The value of the first ``key : value`` line of a /proc file; empty where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} absent"


def peak_mib() -> float:
    """Largest resident memory of this process, MiB; not that of the process that started it."""
    return int(_first("/proc/self/status", "VmHWM").split()[0]) / 2**10


def header(title: str, command: str, packages: Sequence[str]) -> str:
    """Title, date, machine, load of the machine at the start, versions and command, as Markdown."""
    model = _first("/proc/cpuinfo", "model name") or platform.machine()
    memory = int((_first("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20
    versions = [f"Python {platform.python_version()}", *map(_version, packages)]
    load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
    return "\n".join(
        [
            f"## {title}",
            "",
            f"- date: {time.strftime('%Y-%m-%d')}",
            f"- machine: {os.cpu_count()} cores, {model}, {memory:.0f} GiB, {platform.system()};"
            f" load average at the start (1, 5, 15 min): {load}",
            f"- versions: {', '.join(versions)}",
            f"- command: `{command}`",
            "",
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
