"""One tiny task, warm start and finished run for all tests of this folder, in any worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from toy import TINY_CONFIG, toy_mesh
from trainer_runs import ITERATIONS, Runs

from aspo_jax.build import Machines, build_machines
from aspo_jax.config import Config, read_config
from aspo_jax.config.reading import find_config
from aspo_jax.parts import FACTORIES, parts

TINY = f"""
include '{{base}}'
{TINY_CONFIG}
WarmStart.learning_rate = 1e-2
WarmStart.target = 0.15
WarmStart.eval_every = 20
WarmStart.max_steps = 400
WarmStart.cache = '{{cache}}/warm_start'
Runtime.compilation_cache = '{{programs}}'
Objective.penalties = ('kl_penalty',)
kl_penalty.beta = 1e-2
Train.iterations = {{iterations}}
Train.prompts_per_step = 4
Train.prompts_per_minibatch = 2
Train.epochs = 2
Train.record = 2
Evaluate.every = 2
Evaluate.prompts = 16
Evaluate.samples = 4
Checkpoint.every = 2
Metrics.tensorboard = False
"""


class Finished(NamedTuple):
    """A run that nothing disturbed."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="session")
def runs(once) -> Runs:
    def write(folder: Path) -> None:
        settings: Any = jax.config  # processes share the programs of the test session
        text = TINY.format(
            base=find_config("countdown_quick"),
            cache=folder,
            programs=settings.jax_compilation_cache_dir,
            iterations=ITERATIONS,
        )
        (folder / "tiny.gin").write_text(text)

    return Runs(once("end_to_end", write) / "tiny.gin")


@pytest.fixture(scope="session")
def finished(runs: Runs, once) -> Finished:
    def train(folder: Path) -> None:
        for name, text in zip(("out", "err"), runs.run(folder / "run"), strict=True):
            (folder / name).write_text(text)

    folder = once("finished", train)
    return Finished(folder / "run", (folder / "out").read_text(), (folder / "err").read_text())


@pytest.fixture(scope="session")
def config(runs: Runs) -> Config:
    return read_config(["--config", str(runs.config)], FACTORIES)


@pytest.fixture(scope="session")
def machines(config: Config, finished: Finished):
    """The machines of a run that starts from the exported model."""
    mesh = toy_mesh()
    made: Machines = build_machines(config, parts(config, mesh), finished.folder / "model", mesh)
    with made.collector.scorer:
        yield made


@pytest.fixture(scope="session")
def abstract_state(machines: Machines):
    return machines.learner.state
