"""What the README shows is what runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m aspo_jax.train",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
)
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_snippet_runs(snippet, tmp_path):
    subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_command_stands_alone_on_its_line(command):
    assert [line.strip() for line in README.read_text().splitlines()].count(command) == 1


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", README.read_text())
    assert [link for link in links if not (README.parent / link).exists()] == []
