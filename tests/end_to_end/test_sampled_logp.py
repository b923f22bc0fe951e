"""A run whose old log-probabilities are the sampler's: killed and gone on, refused, beside a score.

With a KL penalty, so that the reference is scored all the same.
"""

from __future__ import annotations

import signal

import pytest
from toy import bits
from trainer_runs import TRAP, last_checkpoint, metrics, rollouts

SAMPLED = "Train.old_logp=sampler"


def test_it_is_the_scored_run_but_for_rounding_and_goes_on_where_it_was_killed(
    runs, finished, abstract_state, tmp_path
):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    out, _ = runs.run(whole, SAMPLED)
    assert "old log-probabilities: the sampler's, no pass is made for them" in out
    scored, sampled = metrics(finished.folder)[0], metrics(whole)[0]
    assert sampled.keys() - scored.keys() == {"update/skipped_gap"} and not scored.keys() - sampled
    assert 0 < sampled["update/sampler_gap_max"] < 1e-4
    for name in ("update/grad_norm", "update/entropy", "update/ref_kl", "rollout/reward_mean"):
        assert sampled[name] == pytest.approx(scored[name], rel=1e-3), name

    trap = "aspo_jax.train:update:4:SIGKILL"
    runs.run(folder, SAMPLED, program=(*TRAP, trap), expect=-signal.SIGKILL)
    runs.run(folder, SAMPLED)
    assert metrics(folder) == metrics(whole) and rollouts(folder) == rollouts(whole)
    expected, found = (last_checkpoint(path, abstract_state) for path in (whole, folder))
    assert bits(found.state) == bits(expected.state)


def test_a_sampler_beyond_the_gate_ends_the_run_and_a_score_goes_on(runs, abstract_state, tmp_path):
    folder = tmp_path / "run"
    limits = ("Sampler.max_token_gap=1e-9", "Train.iterations=2")
    _, err = runs.run(folder, SAMPLED, *limits, expect=2)
    assert "nats from the trainer's on average and " in err and "nothing was updated" in err
    assert "Sampler.max_token_gap = 1e-09" in err and "Train.old_logp=score" in err
    stopped = last_checkpoint(folder, abstract_state)
    assert stopped.step == 0 and stopped.state.step == 0 and stopped.meta["data_position"] == 0
    more = ("Train.old_logp=score", "Run.accept_changes=True")
    runs.run(folder, *limits, *more)
    assert last_checkpoint(folder, abstract_state).step == 2
