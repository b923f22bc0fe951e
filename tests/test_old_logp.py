"""Old log-probabilities that are the sampler's own: the same update, behind a gate."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
import toy

from aspo_jax.build import check_inputs
from aspo_jax.config import ConfigError, read_config
from aspo_jax.learner import Gate, Goal, build_learner
from aspo_jax.losses import aspo, chain, kl_penalty, token_mean
from aspo_jax.optimizers import adamw
from aspo_jax.parts import FACTORIES
from aspo_jax.plan import plan
from aspo_jax.planning.programs import DECODE, PREFILL, SCORE, UPDATE

MODEL, LAYOUT = toy.toy_model(), (3, 2, 32)
GATE = Gate(mean=0.01, largest=0.5)
GOAL = Goal(chain(aspo(), kl_penalty(beta=0.1)), token_mean)
PARAMS, REFERENCE = (toy.random_params(MODEL, seed) for seed in (0, 1))


def learner(gate: Gate | None, sizes: tuple[int, ...] = (1, 1, 1)):
    mesh = toy.toy_mesh(*sizes)
    optimizer = adamw(optax.constant_schedule(0.01), MODEL.axes())
    return build_learner(MODEL, toy.HEAD._replace(mesh=mesh), GOAL, optimizer, mesh, gate=gate)


@pytest.fixture(scope="module")
def scoring():
    return learner(None)


@pytest.fixture(scope="module")
def sampled():
    return learner(GATE)


def with_sampled(scoring: Any, gap: float, tokens: int) -> Any:
    """A mini-batch whose sampler is off by ``gap`` nats in the first tokens of the responses."""
    part = toy.minibatch(toy.examples(), *LAYOUT)
    old = scoring.old_policy(PARAMS, None, scoring.place(part))
    logp = np.array(old.old_logp_BT)
    places = np.argwhere(part.rows.is_response_BT)[:tokens]
    logp[tuple(places.T)] += gap
    rows = dataclasses.replace(part.rows, sampler_logp_BT=logp)
    return dataclasses.replace(part, rows=rows)


def state_of(learner: Any) -> Any:
    return learner.init(jax.tree.map(jax.numpy.copy, PARAMS))


def test_an_exact_sampler_makes_the_update_of_the_score_pass(scoring, sampled):
    part = with_sampled(scoring, 0.0, 0)
    made = {}
    for name, it in (("score", scoring), ("sampler", sampled)):
        placed = toy.with_old(it, PARAMS, part, REFERENCE)
        made[name] = it.step(state_of(it), placed, None, True)
    old = toy.with_old(sampled, PARAMS, part, REFERENCE).old
    assert old and old.old_entropy_BT is None and old.ref_logp_BT is not None
    np.testing.assert_array_equal(old.old_logp_BT, part.rows.sampler_logp_BT)
    for x, y in zip(*(jax.tree.leaves(state.params) for state, _ in made.values()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    score, own = (toy.figures(report) for _, report in made.values())
    assert own.keys() - score.keys() == {
        *("sampler_gap_mean", "sampler_gap_max", "sampler_gap_outside", "skipped_gap")
    }
    assert own["sampler_gap_max"] == own["abs_log_ratio_max"] < 1e-5 and own["skipped_gap"] == 0
    for name, value in score.items():
        assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_gap_within_the_gate_is_measured_and_moves_the_first_ratio(scoring, sampled):
    part = toy.with_old(sampled, PARAMS, with_sampled(scoring, 0.1, 2), REFERENCE)
    state, report = sampled.step(state_of(sampled), part, None, True)
    got, tokens = toy.figures(report), int(part.rows.is_response_BT.sum())
    assert got["sampler_gap_max"] == pytest.approx(0.1, rel=1e-3)
    assert got["sampler_gap_mean"] == pytest.approx(0.2 / tokens, rel=1e-3)
    assert got["abs_log_ratio_max"] == got["sampler_gap_max"] and state.step == 1


@pytest.mark.parametrize(("gap", "tokens"), [(0.6, 1), (0.4, 99), (-0.4, 99)])
def test_beyond_the_gate_the_first_update_changes_no_bit(scoring, sampled, gap, tokens):
    """One token that is far off, or all of them a little."""
    part = toy.with_old(sampled, PARAMS, with_sampled(scoring, gap, tokens), REFERENCE)
    state = state_of(sampled)
    before = toy.bits(state)
    state, report = sampled.step(state, part, None, True)
    got = toy.figures(report)
    assert toy.bits(state) == before and got["skipped_gap"] == 1
    assert report["grad_norm"].count == 0 == got["skipped_nonfinite"] == got["skipped_empty"]
    state, report = sampled.step(state, part, None, False)  # the policy has moved: no gap
    assert state.step == 1 and report["skipped_gap"].count == 0
    assert report["sampler_gap_mean"].count == 0 and report["sampler_gap_max"].value == -np.inf
    assert report["old_entropy"].count == 0 < report["entropy"].count


def test_devices_agree_on_the_gate(scoring):
    """The one token that is far off lies on one of them."""
    on_four = learner(GATE, (2, 1, 2))
    place = toy.on(toy.toy_mesh(2, 1, 2), MODEL, PARAMS)
    far, near = (
        toy.with_old(on_four, place, with_sampled(scoring, gap, 1), REFERENCE) for gap in (0.6, 0.1)
    )
    state, report = on_four.step(on_four.init(place), far, None, True)
    assert toy.figures(report)["skipped_gap"] == 1 and state.step == 0
    state, report = on_four.step(state, near, None, True)
    assert toy.figures(report)["skipped_gap"] == 0 and state.step == 1


def test_weights_that_are_broken_are_no_gap(scoring, sampled):
    part = toy.with_old(sampled, PARAMS, with_sampled(scoring, 0.0, 0), REFERENCE)
    state = state_of(sampled)
    broken = dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))
    _, report = sampled.step(broken, part, None, True)
    got = toy.figures(report)
    assert got["skipped_nonfinite"] == 1 and got["skipped_gap"] == 0


# --- the setting --------------------------------------------------------------------------------


def read(*flags: str) -> Any:
    flags = ("Train.old_logp=sampler", *flags)
    return read_config([word for flag in flags for word in ("--set", flag)], FACTORIES)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "Objective.penalties=['tis']",
            "Train.old_logp = 'sampler' leaves out the pass that gives the trainer's own log-proba"
            "bilities, to compare the sampler's with: Objective.penalties 'tis' reads sampler_logp;"
            " set it to 'score'",
        ),
        ("Objective.name=otb", "squared probabilities: Objective.name 'otb' reads old_square"),
        ("Objective.name=old_rules:bold", "entropies: Objective.name 'old_rules:bold' reads old_e"),
    ],
)
def test_a_rule_that_needs_the_pass_is_refused_by_name(flag, message, tmp_path, monkeypatch):
    (tmp_path / "old_rules.py").write_text(
        "from aspo_jax.losses import Objective\n"
        "from aspo_jax.losses.objective import require, weight_only\n"
        "def bold():\n"
        "    def coefficient(tokens, state, stats):\n"
        "        w_BT = require(tokens, 'old_entropy_BT', 'bold')\n"
        "        return weight_only(w_BT, w_BT)\n"
        "    return Objective(coefficient)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_inputs(read(flag))
    assert message in str(error.value)


def test_a_truncated_distribution_is_refused_before_anything_is_drawn():
    with pytest.raises(ConfigError, match=r"Sampler.top_p = 0.9 biases training"):
        read("Sampler.top_p=0.9")


@pytest.mark.parametrize(("penalties", "has_pass"), [("()", False), ("('kl_penalty',)", True)])
def test_a_plan_has_the_pass_only_where_there_is_something_to_score(penalties, has_pass):
    found = plan(read(f"Objective.penalties={penalties}"), "cpu:1", lower_only=True)
    wanted = [UPDATE, *([SCORE] if has_pass else []), PREFILL, DECODE]
    assert [row.program for row in found.rows] == wanted
    assert list(found.programs.by_name) == wanted
