"""The update's laws: exact first ratio, one gradient however the batch lies, skips, goldens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from aspo_jax.learner import (
    Goal,
    clipped_adamw,
    learning_rate_schedule,
    matrices_only,
    warmup_by_iteration,
)
from aspo_jax.losses import (
    Coefficient,
    Objective,
    aspo,
    chain,
    kl_penalty,
    reads,
    sequence_mean,
    token_mean,
)
from aspo_jax.structs import Max, Minibatch, TrainState, merge_metrics

MODEL = toy.toy_model(layers=1)
GOAL = Goal(chain(aspo(), kl_penalty(beta=0.1)), sequence_mean, entropy_bonus=0.02)
EXAMPLES = toy.examples()


@pytest.fixture(scope="module")
def params():
    return toy.random_params(MODEL)


@pytest.fixture(scope="module")
def behaviour(params):
    """The policy before: near enough that ratios are neither 1 nor all clipped."""
    noise = toy.random_params(MODEL, seed=5, scale=0.02)
    return jax.tree.map(lambda x, y: x + y - np.round(y), params, noise)


@pytest.fixture(scope="module")
def reference():
    return toy.random_params(MODEL, seed=2)


@pytest.fixture(scope="module")
def learner():
    return toy.toy_learner(MODEL, GOAL, optax.sgd(1.0))


def state_of(learner, params, mesh=None) -> TrainState:
    return learner.init(toy.on(mesh or toy.toy_mesh(), MODEL, params))


def update(learner, params, part: Minibatch):
    """(change of the parameters, figures) of one update from a fresh state."""
    state, report = learner.step(state_of(learner, params), part)
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    return change, toy.figures(report)


def assert_relative(got, expected, tolerance: float) -> None:
    """Every leaf within a tolerance relative to that leaf's largest entry."""

    def check(path, x, y):
        gap, size = np.abs(np.asarray(x) - y).max(), np.abs(y).max()
        assert gap <= tolerance * size, f"{jax.tree_util.keystr(path)}: {gap} of {size}"

    jax.tree_util.tree_map_with_path(check, got, expected)


# --- the first ratio ----------------------------------------------------------------------------


def test_the_first_importance_ratio_is_exactly_one(learner, params, reference):
    part = toy.minibatch(EXAMPLES, 3, 2, 32)
    part = toy.with_old(learner, toy.on(toy.toy_mesh(), MODEL, params), part, reference)
    _, got = update(learner, params, part)
    assert got["abs_log_ratio_max"] == 0 and got["ratio_kl"] == 0
    assert got["clip_share"] == 0 and got["entropy"] == got["old_entropy"]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_so_it_is_in_bfloat16_on_a_cpu(remat):
    tests = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # the flag that makes it so is set by `runtime.start`
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PROGRAMS": jax.config.values["jax_compilation_cache_dir"],
    }
    done = subprocess.run(
        [sys.executable, tests / "learner_toy.py", remat], env=env, capture_output=True, text=True
    )
    assert done.stdout == "0.0 True\n", done.stderr


# --- one gradient -------------------------------------------------------------------------------

LAYOUTS = {
    "one row per micro-batch": (8, 1, 32),
    "one sequence per row": (5, 2, 15),
    "much padding": (3, 4, 64),
}


def on_layout(learner, params, behaviour, reference, layout, made=EXAMPLES):
    part = toy.with_old(learner, behaviour, toy.minibatch(made, *layout), reference)
    return update(learner, params, part)


@pytest.fixture(scope="module")
def at_once(learner, params, behaviour, reference):
    """The whole mini-batch in one micro-batch."""
    change, figures = on_layout(learner, params, behaviour, reference, (1, 8, 32))
    assert 0 < figures["clip_share"] < 1 and figures["grad_norm"] > 0.1
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(change))
    return change, figures


def assert_same_figures(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_splitting_and_padding_change_neither_gradient_nor_metrics(
    learner, params, behaviour, reference, at_once, layout
):
    change, figures = on_layout(learner, params, behaviour, reference, layout)
    assert_relative(change, at_once[0], 1e-5)
    assert_same_figures(figures, at_once[1])


def test_nor_does_the_order_of_the_samples(learner, params, behaviour, reference, at_once):
    order = np.random.RandomState(1).permutation(len(EXAMPLES))
    shuffled = [EXAMPLES[i] for i in order]
    change, figures = on_layout(learner, params, behaviour, reference, (1, 8, 32), shuffled)
    assert_relative(change, at_once[0], 1e-5)
    assert_same_figures(figures, at_once[1])


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_nor_do_the_devices(params, behaviour, reference, at_once, sizes):
    mesh = toy.toy_mesh(**sizes)
    learner = toy.toy_learner(MODEL, GOAL, optax.sgd(1.0), mesh)
    part = toy.minibatch(EXAMPLES, 2, 4, 32)
    old, frozen = (toy.on(mesh, MODEL, p) for p in (behaviour, reference))
    part = toy.with_old(learner, old, part, frozen)
    before = state_of(learner, params, mesh)
    lies = jax.tree.map(lambda x: x.sharding, before)
    state, report = learner.step(before, part)
    assert jax.tree.map(lambda x: x.sharding, state) == lies
    assert len(state.params["embed"].sharding.device_set) == 4
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    assert_relative(change, at_once[0], 1e-5)
    assert_same_figures(toy.figures(report), at_once[1])


def factorisations(devices: int) -> list[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) mesh of so many devices."""
    sizes = [2**i for i in range(devices.bit_length())]
    return [s for s in itertools.product(sizes, repeat=3) if np.prod(s) == devices]


def on_eight_devices(meshes: list[tuple[int, int, int]]) -> None:
    """Meshes of eight against one device, and a move to fewer, in a process that has eight."""
    program = Path(__file__).with_name("mesh_toy.py")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [
            sys.executable,
            program,
            json.dumps(meshes),
            jax.config.values["jax_compilation_cache_dir"],
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["updates"]) == len(meshes)
    assert max(found["updates"]) < 1e-5
    assert found["moved"] < 1e-5


def test_eight_devices_make_the_same_update_and_hand_it_on_to_four_and_one():
    on_eight_devices([(2, 2, 2), (8, 1, 1), (1, 2, 4)])


@pytest.mark.slow
def test_eight_devices_in_any_factorisation_make_the_same_update():
    meshes = factorisations(8)
    assert len(meshes) == 10
    on_eight_devices(meshes)


def test_metrics_of_several_updates_merge(learner, params, behaviour, reference):
    """Two halves of a mini-batch: counts add, maxima are the larger, means are weighted."""
    halves = []
    for made in (EXAMPLES[:4], EXAMPLES[4:]):
        part = toy.with_old(learner, behaviour, toy.minibatch(made, 1, 8, 32), reference)
        halves.append(learner.step(state_of(learner, params), part)[1])
    whole = toy.with_old(learner, behaviour, toy.minibatch(EXAMPLES, 1, 8, 32), reference)
    _, expected = learner.step(state_of(learner, params), whole)
    merged, expected = toy.figures(reduce(merge_metrics, halves)), toy.figures(expected)
    per_update = {"surrogate", "grad_norm"}  # of a mini-batch, not of its tokens
    assert_same_figures(
        {k: v for k, v in merged.items() if k not in per_update},
        {k: v for k, v in expected.items() if k not in per_update},
    )


# --- updates that must not happen ---------------------------------------------------------------


def tally() -> Objective:
    """A stateful rule: sums count the mini-batch's tokens, the state counts those and updates."""

    def init():
        return {"tokens": jnp.zeros(()), "updates": jnp.zeros((), jnp.int32)}

    def prepare(tokens, state):
        return {"tokens": tokens.is_response_BT.sum().astype(jnp.float32)}

    def coefficient(tokens, state, sums):
        ones = jnp.ones_like(tokens.logp_BT)
        metrics = {"tally": Max(sums["tokens"]), "tally_before": Max(state["tokens"])}
        return Coefficient(ones, 0 * ones, metrics)

    def update(state, sums):
        return {"tokens": state["tokens"] + sums["tokens"], "updates": state["updates"] + 1}

    return Objective(coefficient, prepare, init, update)


@pytest.fixture(scope="module")
def adam():
    """AdamW and a stateful rule: everything that a skipped update could spoil."""
    optimizer = clipped_adamw(
        optax.constant_schedule(0.01), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, clip_norm=1.0
    )
    return toy.toy_learner(MODEL, Goal(chain(aspo(), tally()), token_mean), optimizer)


LAYOUT = (3, 2, 32)


@pytest.fixture
def good(adam, params):
    return toy.with_old(adam, params, toy.minibatch(EXAMPLES, *LAYOUT))


def spoil_advantage(params, part, value):
    made = [*EXAMPLES[:-1], EXAMPLES[-1]._replace(advantage=value)]
    return params, dataclasses.replace(part, rows=toy.minibatch(made, *LAYOUT).rows)


def spoil_weight(params, part, value):
    kernel = params["layers"]["up"]["kernel"].copy()
    kernel[0, 0, 0] = value
    up = params["layers"]["up"] | {"kernel": kernel}
    return params | {"layers": params["layers"] | {"up": up}}, part


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoil", [spoil_advantage, spoil_weight])
def test_a_gradient_that_is_not_finite_changes_no_bit_and_is_counted(
    adam, params, good, spoil, value
):
    params, part = spoil(params, good, value)
    state = state_of(adam, params)
    before = toy.bits(state)
    state, report = adam.step(state, adam.place(part))
    assert toy.bits(state) == before
    got = toy.figures(report)
    assert got["skipped_nonfinite"] == 1 and got["skipped_empty"] == 0
    assert report["grad_norm"].count == 0


def test_an_empty_minibatch_changes_no_bit_and_is_counted(adam, params, good):
    state, _ = adam.step(state_of(adam, params), good)  # moments and counts that are not zero
    before = toy.bits(state)
    empty = toy.with_old(adam, params, toy.minibatch([], *LAYOUT))
    state, report = adam.step(state, empty)
    assert toy.bits(state) == before
    got = toy.figures(report)
    assert got["skipped_empty"] == 1 and got["skipped_nonfinite"] == 0


def test_a_stateful_rule_is_driven_once_per_applied_update(adam, params, good):
    tokens = sum(len(e.response_tokens) for e in EXAMPLES)
    state = state_of(adam, params)
    assert state.objective_state[1] == {"tokens": 0, "updates": 0}
    empty = toy.with_old(adam, params, toy.minibatch([], *LAYOUT))
    broken = adam.place(spoil_advantage(params, good, np.nan)[1])
    applied = 0
    for part in (good, empty, broken, good):
        state, report = adam.step(state, part)
        if part is good:
            got = toy.figures(report)
            assert got["tally"] == tokens  # all micro-batches, in each of them
            assert got["tally_before"] == applied * tokens
            applied += 1
        assert state.step == applied
        assert state.objective_state[1] == {"tokens": applied * tokens, "updates": applied}


def test_the_moments_are_updated_where_they_lie(adam, params, good):
    """XLA on a CPU copies both before each update unless it is told what comes first."""
    state = state_of(adam, params)
    program = adam.step.lower(state, good).compile().as_text()
    assert "opt_state" in program
    copied = re.findall(r" copy\(%(\w*opt_state\w*(?:mu|nu)\w*)", program)
    assert not copied


def test_the_old_state_is_donated(adam, params, good):
    state = state_of(adam, params)
    new, _ = adam.step(state, good)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new, good)))


# --- where the gradient points ------------------------------------------------------------------


def test_the_entropy_bonus_raises_the_entropy(params):
    goal = Goal(aspo(), token_mean, entropy_bonus=1.0)
    learner = toy.toy_learner(MODEL, goal, optax.sgd(0.1))
    made = [e._replace(advantage=0.0) for e in EXAMPLES]
    part = toy.with_old(learner, params, toy.minibatch(made, *LAYOUT))
    state, entropies = state_of(learner, params), []
    for _ in range(5):
        state, report = learner.step(state, part)
        entropies.append(toy.figures(report)["entropy"])
    assert np.all(np.diff(entropies) > 0.005), entropies


def test_the_penalty_pulls_to_the_reference(params, reference):
    objective = kl_penalty(beta=1.0, estimator="k2")
    assert reads(objective, "ref_logp_BT") and reads(GOAL.objective, "ref_logp_BT")
    assert not reads(aspo(), "ref_logp_BT")
    learner = toy.toy_learner(MODEL, Goal(objective, token_mean), optax.sgd(0.05))
    made = [e._replace(advantage=0.0) for e in EXAMPLES]
    part = toy.with_old(learner, params, toy.minibatch(made, *LAYOUT), reference)
    state, kls = state_of(learner, params), []
    for _ in range(5):
        state, report = learner.step(state, part)
        kls.append(toy.figures(report)["ref_kl"])
    assert np.all(np.diff(kls) < 0) and kls[-1] < 0.8 * kls[0], kls
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), reference)
    assert toy.with_old(learner, params, part, half).old is not None


def test_no_reference_no_reference_log_probs(adam, good):
    assert good.old.ref_logp_BT is None
    is_real = np.asarray(good.rows.sequence_id_BT) > 0
    assert (np.asarray(good.old.old_logp_BT)[is_real] < 0).all()


def test_good_tokens_become_likelier_and_bad_ones_less_so(adam, params, good):
    state = state_of(adam, params)
    for _ in range(2):
        state, _ = adam.step(state, good)
    new = adam.old_policy(state.params, None, good).old_logp_BT
    gain = np.asarray(new - good.old.old_logp_BT)
    is_response, advantage = np.asarray(good.rows.is_response_BT), good.rows.advantage_BT
    assert gain[is_response & (advantage > 0)].mean() > 0.01
    assert gain[is_response & (advantage < 0)].mean() < -0.01


def test_schedule_and_clip():
    def rates(*args):
        return [np.asarray(learning_rate_schedule(*args)(i)).item() for i in range(6)]

    np.testing.assert_allclose(rates(0.3, 3), [0.1, 0.2, 0.3, 0.3, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(rates(0.3, 0), 0.3, rtol=1e-6)
    np.testing.assert_allclose(rates(0.4, 2, 4), [0.2, 0.3, 0.2, 0.1, 0, 0], rtol=1e-6)
    warmed = warmup_by_iteration(learning_rate_schedule(0.4, 0), 2, updates_per_iteration=3)
    got = [np.asarray(warmed(i)).item() for i in range(9)]  # three iterations of three updates
    np.testing.assert_allclose(got, [0, 0, 0, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)
    optimizer = clipped_adamw(
        optax.constant_schedule(0.1), betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, clip_norm=2.0
    )
    w = jnp.zeros(4)
    # the gradient (8, 0, 0, 6) has norm 10 and is clipped to (1.6, 0, 0, 1.2); g / (|g| + 1)
    change, _ = optimizer.update(jnp.array([8.0, 0, 0, 6.0]), optimizer.init(w), w)
    np.testing.assert_allclose(
        np.asarray(change), [-0.1 * 1.6 / 2.6, 0, 0, -0.1 * 1.2 / 2.2], rtol=1e-5
    )


@pytest.mark.parametrize("decay", [None, matrices_only])
def test_what_decays(params, decay):
    optimizer = clipped_adamw(
        optax.constant_schedule(0.1),
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.5,
        clip_norm=1.0,
        decay=decay,
    )
    nothing = jax.tree.map(np.zeros_like, params)
    change = optimizer.update(nothing, optimizer.init(params), params)[0]
    for path, x in jax.tree_util.tree_leaves_with_path(change):
        is_matrix = jax.tree_util.keystr(path[-1:]) in ("['kernel']", "['embed']", "['head']")
        assert bool(np.abs(x).max() > 0) == (decay is None or is_matrix), path


# --- golden -------------------------------------------------------------------------------------

GOLDEN = {"surrogate": -0.1276843, "grad_norm": 3.494496, "delta_norm": 0.04816732}


def test_golden_first_training_step(params, behaviour, reference):
    optimizer = clipped_adamw(
        optax.constant_schedule(1e-3),
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    learner = toy.toy_learner(MODEL, GOAL, optimizer)
    part = toy.with_old(learner, behaviour, toy.minibatch(EXAMPLES, *LAYOUT), reference)
    change, got = update(learner, params, part)
    got["delta_norm"] = float(optax.tree.norm(change))
    assert {name: got[name] for name in GOLDEN} == pytest.approx(GOLDEN, rel=1e-4), (
        "the first training step changed. That is right only if the mathematics was meant to "
        "change (an equation, a default of aspo, kl_penalty, sequence_mean or AdamW): say so in "
        "CHANGELOG.md and put the new numbers here. A refactoring must leave them alone."
    )
