"""Training from an external engine: a server whose answers are our own sampler's, of the same
weights as they are published. It never draws the same twice, as real engines do not.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from engine_toy import ToyEngine
from toy import toy_mesh
from trainer_runs import TRAP, finish, metrics, transcripts

from aspo_jax.config import Config
from aspo_jax.engines.building import probe_scorer
from aspo_jax.engines.owned import Owned
from aspo_jax.model import load_params
from aspo_jax.parts import build_sampler
from aspo_jax.policy import load_policy
from aspo_jax.sampler import STOP, Request

ITERATIONS = 3
SERVE = 2  # a domain of draws that is no run's
GROUP, EVALUATED = 4, 16 * 4  # samples of a prompt; of an evaluation
ITERATION = 4 * GROUP


class PagedEngine(ToyEngine):
    """An engine that draws with our own sampler. ``samples``: how many it was asked for."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.mesh, self.calls, self.samples = config, toy_mesh(), 0, 0
        self.busy = threading.Lock()
        self.policy: Any = None

    def load(self, folder: str) -> None:
        with self.busy:
            if self.policy is None:
                self.policy = load_policy(self.config, folder, self.mesh)
                self.sampler = build_sampler(self.config, self.policy, self.mesh)
            model = self.policy.model
            weights = model.shardings(self.mesh)
            self.params = load_params(folder, model.config, shardings=weights)
            self.sampler.start(self.params)

    def scored(self, prompt: Sequence[int]) -> list[float]:
        with self.busy:
            return probe_scorer(self.policy, self.mesh, prompt)(self.params).tolist()

    def group(self, prompt: Sequence[int], how: dict[str, Any], seed: int) -> list[Any]:
        with self.busy:
            self.calls += 1
            self.samples += how["n"]
            asked = [
                Request(prompt, (SERVE, seed, self.calls, i), how["max_tokens"])
                for i in range(how["n"])
            ]
            found = sorted(self.sampler.sample(asked), key=lambda c: c.request)
        return [
            (c.tokens_T.tolist(), c.logp_T.tolist(), "stop" if c.ending == STOP else "length")
            for c in found
        ]


@pytest.fixture
def engine(config: Config) -> Iterator[PagedEngine]:
    made = PagedEngine(config)
    yield made
    made.close()


def test_a_run_from_an_engine_is_killed_and_draws_nothing_again(runs, engine, tmp_path):
    folder = tmp_path / "run"
    settings = (
        f"Train.iterations={ITERATIONS}",
        "Sampler.engine=aspo_jax",
        f"Sampler.addresses=['{engine.address}']",
        f"Sampler.weights_folder='{tmp_path / 'weights'}'",
        "Objective.penalties=['kl_penalty', 'tis', 'mis']",
    )
    known = EVALUATED + ITERATION + GROUP + 1  # a group and a sample of the second iteration
    trap = f"aspo_jax.engines.remembered:Journal.add:{known + 1}:SIGKILL"
    runs.run(folder, *settings, program=(*TRAP, trap), expect=-signal.SIGKILL)
    before, drawn = metrics(folder)[0], transcripts(folder)
    weights = list((tmp_path / "weights").iterdir())
    assert len(weights) == 1, "a kill leaves them"
    journals = list((folder / "drawn").glob("*.jsonl"))
    assert sum(len(path.read_bytes().splitlines()) for path in journals) == known

    engine.samples = 0
    out, err = runs.run(folder, *settings)
    # Evaluated before the first, the third and after the last iteration.
    assert engine.samples == 3 * EVALUATED + ITERATIONS * ITERATION - known
    rows = metrics(folder)
    assert rows[0] == before, "what was drawn before the first update made the same update"
    kept = transcripts(folder)
    assert drawn and {name: kept[name] for name in drawn} == drawn
    assert "sampling from aspo_jax" in out and "is kept in drawn/ and not drawn again" in out
    assert not list((tmp_path / "weights").iterdir()), "the end leaves none"

    trained = [row for row in rows if "update/sampler_gap_mean" in row]
    assert trained
    for row in trained:
        assert row["update/sampler_gap_max"] < 1e-4 and row["update/sampler_gap_outside"] == 0
        assert row["update/tis_share"] == row["update/mis_share"] == 0


@pytest.mark.slow
def test_two_servers_of_ours_of_which_one_dies(runs, finished, tmp_path):
    command = f"{sys.executable} -m aspo_jax.serve {{model}} --name policy --port {{port}} --admin"
    servers = [Owned(f"{command} --window 16 --slots 16", tmp_path / f"{n}.log") for n in range(2)]
    folder = tmp_path / "run"
    try:
        addresses = [server.start(finished.folder / "initial_model") for server in servers]
        settings = (
            f"Train.iterations={ITERATIONS}",
            "Sampler.engine=aspo_jax",
            f"Sampler.addresses={addresses}",
            f"Sampler.weights_folder='{tmp_path / 'weights'}'",
        )
        run = runs.start(folder, *settings)
        while run.poll() is None and not (folder / "transcripts").exists():
            time.sleep(0.05)  # the first evaluation
        servers[1].stop()
        _, err = finish(run)
    finally:
        for server in servers:
            server.stop()
    assert f"{addresses[1]} is left out" in err or "sent again" in err
    gaps = [row.get("update/sampler_gap_max", 0.0) for row in metrics(folder)]
    assert len(gaps) == ITERATIONS + 1 and 0 < max(gaps) < 1e-4
