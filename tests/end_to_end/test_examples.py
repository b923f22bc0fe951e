"""The programs of examples/, each run as it stands: what they print, and what they import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
# One process for all: importing jax and compiling the same update again prove nothing.
DRIVER = """
import runpy, sys, traceback
sys.path.insert(0, "")
for path in sys.argv[1:]:
    print("\\f" + path)
    sys.path[0] = path.rpartition("/")[0]
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
"""
QUESTION = {
    "prompt": "3 4:7",
    "answer": {"numbers": [3, 4], "target": 7, "operations": "+-"},
    "kind": "countdown",
}
SAYS = {
    "compare": r"aspo: held-out avg@8 0\.\d+ -> 0\.\d+\ndapo: held-out avg@8 0\.\d+ -> 0\.\d+\n",
    "evaluate_file": r"avg@8 [01]\.\d+ \+- 0\.000, pass@8 [01]\.000\n  '.*' +\w+, reward [01]",
    "own_loop": r"0 reward \d\.\d+ updates \d\n1 reward (.*\n)*input_BT +int32 +\(\d+, 32, 16\)\n",
    "own_objective": r"What will run\n(.*\n)*  objective +own_objective:mine, group_zscore",
    "own_reward": r"   7/8 +0\.\d+(.*\n)*Held-out result",
    "sample_chat": r"3 4:7\n(  '.*' +(stop|length), mean log p -\d\.\d+\n){4}2 9:7\n",
    "score_texts": r"'1\+2=3': -\d+\.\d+ nats in 4 predicted tokens\n(  '.' +log p +-.*\n){4}",
}


@pytest.fixture(scope="module")
def printed(finished, tmp_path_factory) -> dict[str, str]:
    """What each example prints, run in a folder with a model and a file of questions."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "model").symlink_to(finished.folder / "model")
    (folder / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, EXAMPLES)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(folder), "JAX_PLATFORMS": "cpu"},
    )
    assert (folder / "compared.png").stat().st_size > 10_000, done.stdout + done.stderr
    rows = (folder / "runs/countdown_tiny-mine-seed0/metrics.jsonl").read_text().splitlines()
    assert "rule/at_cap" in json.loads(rows[0])
    outputs = (text.partition("\n") for text in done.stdout.split("\f")[1:])
    return {Path(path).stem: text for path, _, text in outputs}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_stands(path, printed):
    assert re.search(SAYS[path.stem], printed[path.stem]), printed[path.stem]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_imports_this_package_alone(path):
    text = path.read_text()
    assert text.count("\n") <= 30
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert isinstance(node, ast.ImportFrom), "from aspo_jax... import ..."
            assert (node.module or "").partition(".")[0] == "aspo_jax"
