"""The notebook of examples/: kept with its outputs, and run anew in the slow tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "aspo_in_ten_minutes.ipynb"


def outputs(cells: list[dict[str, Any]]) -> list[list[Any]]:
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def check(cells: list[dict[str, Any]]) -> None:
    """The weight maps, the gradient by hand, two runs and the picture of one."""
    shown = outputs(cells)
    assert not any(output["output_type"] == "error" for group in shown for output in group)
    pictures = [g for g in shown if any("image/png" in o.get("data", {}) for o in g)]
    assert len(pictures) == 2
    texts = "".join("".join(o.get("text", "")) for group in shown for o in group)
    assert "by autodiff" in texts and texts.count("Held-out result") == 2
    assert "flipped  held-out avg@16" in texts


def test_the_notebook_is_kept_with_its_outputs():
    assert NOTEBOOK.stat().st_size < 2**20
    check(json.loads(NOTEBOOK.read_text())["cells"])


@pytest.mark.slow
def test_the_notebook_runs_as_it_stands(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=place).execute()
    check(notebook.cells)
