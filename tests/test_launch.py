"""The launchers, as far as they can be checked here; local.sh runs in end_to_end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from aspo_jax.runtime import LAUNCH_VARIABLES

LAUNCHERS = sorted((Path(__file__).parents[1] / "launch").iterdir())


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_is_short_and_says_what_it_needs(path):
    lines = path.read_text().splitlines()
    header = [line for line in lines[:20] if line.startswith("#")]
    assert len(lines) < 60 and any("Needs:" in line for line in header)


@pytest.mark.parametrize(
    "path", [p for p in LAUNCHERS if p.suffix != ".yaml"], ids=lambda path: path.name
)
def test_is_a_shell_program(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert "-m aspo_jax.train" in path.read_text()


def test_pods_of_the_jobset_know_each_other():
    (path,) = (p for p in LAUNCHERS if p.suffix == ".yaml")
    spec = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert set(LAUNCH_VARIABLES) <= environment.keys()
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == int(environment["ASPO_NUM_PROCESSES"])
