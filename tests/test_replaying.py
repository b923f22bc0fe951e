"""A replayed rollout: its gradients are the update's, its weights the rules'."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
from toy import HEAD, examples, figures, on, random_params, toy_learner, toy_mesh, toy_model

from aspo_jax.learner import Goal
from aspo_jax.losses import (
    Objective,
    aspo,
    cispo,
    gspo,
    kl_penalty,
    ppo_clip,
    reinforce,
    sequence_mean,
)
from aspo_jax.losses.objective import Coefficient
from aspo_jax.policy import Policy
from aspo_jax.replaying import ReplayError, replay
from aspo_jax.rows import BatchShape, fill

SHAPE = BatchShape(minibatches=2, microbatches=3, rows=2, row_tokens=32)


@pytest.fixture(scope="module")
def toy():
    model = toy_model()
    learner = toy_learner(model, Goal(aspo(), sequence_mean), optax.sgd(0.0))
    params = on(toy_mesh(), model, random_params(model))
    later = on(toy_mesh(), model, random_params(model, seed=0, scale=0.33))
    return model, learner, params, later


@pytest.fixture(scope="module")
def recorded(toy):
    """Rows of two mini-batches, as a run would have recorded them."""
    _, learner, params, _ = toy
    rows = []
    for number in (0, 1):
        made = examples(count=8, seed=number)
        placed = learner.place(fill(made, SHAPE))
        old = learner.old_policy(params, None, placed)
        flat: Any = {
            name: np.asarray(x).reshape(-1, SHAPE.row_tokens)
            for name, x in {
                "id": placed.rows.sequence_id_BT,
                "is_response": placed.rows.is_response_BT,
                "target": placed.rows.target_BT,
                "sampler": placed.rows.sampler_logp_BT,
                "logp": old.old_logp_BT,
                "entropy": old.old_entropy_BT,
            }.items()
        }
        for e in made:
            rows.append(_row(e, number, flat))
    return rows


def _row(e, number, flat):
    """The example's row: its place is where its own log-probabilities are."""
    count = int(e.is_response_L.sum())
    response, logp = e.tokens_L[-count:], e.logp_L[-count:].astype(np.float32)
    for b, ids in enumerate(flat["id"]):
        for i in range(1, ids.max() + 1):
            chosen = (ids == i) & flat["is_response"][b]
            if np.array_equal(flat["sampler"][b][chosen], logp):
                return {
                    "minibatch": number,
                    "group": e.group,
                    "advantage": e.advantage,
                    "prompt_tokens": e.tokens_L[:-count].tolist(),
                    "response_tokens": response.tolist(),
                    "sampler_logp": logp.tolist(),
                    "old_logp": flat["logp"][b][chosen].tolist(),
                    "old_entropy": flat["entropy"][b][chosen].tolist(),
                    **dict.fromkeys(("ref_logp", "teacher_logp")),
                }
    raise AssertionError("the example is in no row")


def replayed(toy, rows, objectives, params=None):
    model, _, _, later = toy
    policy: Any = Policy(model, None, lambda ids: "", HEAD, ())
    how = (SHAPE, objectives, sequence_mean, toy_mesh())
    return replay(policy, later if params is None else params, rows, *how)


def test_norms_and_clip_shares_are_those_of_the_update(toy, recorded):
    model, learner, _, later = toy
    rules = {"aspo": aspo(cap=1.5), "ppo_clip": ppo_clip(), "gspo": gspo(0.05, 0.05)}
    found = replayed(toy, recorded, rules)
    for name, rule in rules.items():
        own = toy_learner(model, Goal(rule, sequence_mean), optax.sgd(0.0))
        reports = []
        for number in (0, 1):
            part = fill([e for e in examples(count=8, seed=number)], SHAPE)
            placed = learner.place(part)
            placed = dataclasses.replace(placed, old=learner.old_policy(toy[2], None, placed))
            state = own.init(jax.tree.map(lambda x: x.copy(), later))
            reports.append(own.step(state, placed)[1])
        norms = [figures(report)["grad_norm"] for report in reports]
        judged = found.objectives[name]
        np.testing.assert_allclose(judged.grad_norm, np.mean(norms), rtol=1e-5)
        for sign in ("positive", "negative"):
            shares = [report[f"clip_share_{sign}"] for report in reports]
            total, count = (sum(float(x[i]) for x in shares) for i in (0, 1))
            assert judged.clip_share[sign] == pytest.approx(total / count)
    assert found.distance.minibatches == 2 and found.distance.responses == 16
    assert found.distance.abs_log_ratio_mean > 0.01


def test_cosines_compare_gradients(toy, recorded):
    rules = {"aspo": aspo(), "twice": scaled(2.0), "against": scaled(-1.0), "none": scaled(0.0)}
    rules |= {"cispo": cispo()}
    found = replayed(toy, recorded, rules).objectives
    assert found["aspo"].cosine == pytest.approx(1, abs=1e-5)
    assert found["twice"].cosine == pytest.approx(1, abs=1e-5)
    assert found["twice"].grad_norm == pytest.approx(2 * found["aspo"].grad_norm, rel=1e-5)
    assert found["against"].cosine == pytest.approx(-1, abs=1e-5)
    assert found["none"].cosine is None and found["none"].grad_norm == 0
    assert 0 < (found["cispo"].cosine or 0) < 0.9999


def scaled(factor: float) -> Objective:
    rule = aspo()

    def coefficient(tokens, state, stats):
        made = rule.coefficient(tokens, state, stats)
        return made._replace(weight_BT=factor * made.weight_BT)

    return Objective(coefficient)


def test_weights_are_sorted_by_sign_and_ratio(toy, recorded):
    judged = replayed(toy, recorded, {"aspo": aspo(), "cispo": cispo(), "reinforce": reinforce()})
    for sign in ("positive", "negative"):
        quartiles = judged.objectives["cispo"].weights[sign]
        assert len(quartiles) == 4
        for q in quartiles:  # its weight is the ratio
            assert q.lowest - 1e-5 <= q.q10 <= q.q50 <= q.q90 <= q.highest + 1e-5
            assert q.masked == 0
        assert [q.highest for q in quartiles[:-1]] <= [q.lowest for q in quartiles[1:]]
        assert {q.mean for q in judged.objectives["reinforce"].weights[sign]} == {1.0}
    assert judged.objectives["aspo"].weights["positive"][-1].masked > 0
    tokens = sum(q.tokens for of in judged.objectives["aspo"].weights.values() for q in of)
    assert tokens == judged.distance.tokens


def test_the_weights_that_sampled_are_at_no_distance(toy, recorded):
    found = replayed(toy, recorded, {"aspo": aspo(), "ppo_clip": ppo_clip()}, params=toy[2])
    assert found.distance.abs_log_ratio_max < 1e-5 and found.distance.ratio_kl < 1e-9
    assert found.objectives["ppo_clip"].cosine == pytest.approx(1, abs=1e-5)


def test_coupled_rules_see_their_mini_batch(toy, recorded):
    seen = []

    def prepare(tokens, state):
        seen.append(int(tokens.is_response_BT.sum()))
        return seen[-1]

    def coefficient(tokens, state, stats):
        ones = jax.numpy.ones_like(tokens.logp_BT)
        return Coefficient(ones * stats, 0 * ones, {})

    found = replayed(toy, recorded, {"one": reinforce(), "count": Objective(coefficient, prepare)})
    assert sum(seen) == found.distance.tokens and len(seen) == 2


def test_what_cannot_be_replayed_is_said(toy, recorded):
    with pytest.raises(ReplayError, match="'kl' reads Tokens.ref_logp_BT, which the run did not"):
        replayed(toy, recorded, {"kl": kl_penalty()})
    with pytest.raises(ReplayError, match="no group of this rollout had a signal"):
        replayed(toy, [{**row, "minibatch": None} for row in recorded], {"aspo": aspo()})
