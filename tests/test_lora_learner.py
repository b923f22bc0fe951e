"""The update of an adapter: the full update's gradient, and none of its memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
import toy

from aspo_jax.learner import Goal
from aspo_jax.losses import aspo, chain, kl_penalty, reinforce, sequence_mean, token_mean
from aspo_jax.model import Lora, map_axes, merge, partition_spec, shardings, trained_part
from aspo_jax.model.lora import frozen_axes
from aspo_jax.rows import answered
from aspo_jax.structs import OldPolicy

MODEL = toy.toy_model(layers=1)
GOAL = Goal(chain(aspo(), kl_penalty(beta=0.1)), sequence_mean, entropy_bonus=0.02)
LORA = Lora(rank=3, alpha=5.0)
INT8_LORA = LORA._replace(is_int8=True)
PART = trained_part(MODEL, LORA)
ADAPTER = toy.random_adapter(LORA, MODEL.config)
FROZEN = toy.random_params(MODEL)
BEHAVIOUR = toy.random_adapter(LORA, MODEL.config, seed=9)
INT8 = toy.in_int8(FROZEN, MODEL.config)
both_types = pytest.mark.parametrize("frozen", [FROZEN, INT8], ids=["float32", "int8"])


@pytest.fixture(scope="module")
def learner():
    return toy.toy_learner(MODEL, GOAL, optax.sgd(1.0), lora=LORA)


def placed(mesh, tree=ADAPTER) -> Any:
    """An adapter on a mesh; copies, for an update donates them."""
    return jax.tree.map(lambda x: x.copy(), jax.device_put(tree, PART.shardings(mesh)))


def frozen_on(mesh, frozen) -> Any:
    axes = frozen_axes(MODEL.config, INT8_LORA if frozen is INT8 else LORA)
    return jax.device_put(frozen, shardings(mesh, map_axes(partition_spec, axes)))


def scored(learner, mesh, layout, adapter, frozen=FROZEN):
    """A mini-batch with the old policy of an adapter and the frozen model as reference."""
    frozen = frozen_on(mesh, frozen)
    params = PART.whole(placed(mesh, adapter), frozen)
    return toy.with_old(learner, params, toy.minibatch(toy.examples(), *layout), frozen), frozen


def change(learner, mesh, layout, frozen=FROZEN) -> tuple[Any, dict]:
    """What one update does to the adapter, and its figures."""
    part, frozen = scored(learner, mesh, layout, BEHAVIOUR, frozen)
    state, report = toy.quickly(learner.step, learner.init(placed(mesh)), part, frozen)
    return jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, ADAPTER), toy.figures(report)


def assert_near(got, expected, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        gap = np.abs(np.asarray(x) - y).max()
        assert gap <= tolerance * np.abs(y).max(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def alone(learner):
    return change(learner, toy.toy_mesh(), (1, 8, 32))


@both_types
def test_the_first_ratio_is_exactly_one_and_nothing_frozen_is_given_away(learner, frozen):
    mesh, given = toy.toy_mesh(), frozen
    part, frozen = scored(learner, mesh, (3, 2, 32), ADAPTER, given)
    state = learner.init(placed(mesh))
    _, report = learner.step(state, part, frozen)
    figures = toy.figures(report)
    assert figures["abs_log_ratio_max"] == 0 and figures["ratio_kl"] == 0
    assert figures["entropy"] == figures["old_entropy"] and figures["grad_norm"] > 0
    assert figures["ref_kl"] > 1e-3  # the reference is the model without its adapter
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert toy.bits(frozen) == toy.bits(given)


def test_the_gradient_is_the_full_one_through_the_product(alone):
    """With G the gradient of W: that of a is scale G b^T, that of b is scale a^T G."""
    mesh, full = toy.toy_mesh(), toy.toy_learner(MODEL, GOAL, optax.sgd(1.0))
    params = merge(PART.whole(ADAPTER, FROZEN))
    behaviour = toy.on(mesh, MODEL, merge(PART.whole(BEHAVIOUR, FROZEN)))
    rows = toy.minibatch(toy.examples(), 1, 8, 32)
    part = toy.with_old(full, behaviour, rows, toy.on(mesh, MODEL, FROZEN))
    state, report = toy.quickly(full.step, full.init(toy.on(mesh, MODEL, params)), part)
    moved, figures = alone
    assert figures["surrogate"] == pytest.approx(toy.figures(report)["surrogate"], rel=1e-5)
    for name, pair in ADAPTER["layers"].items():
        new, old = state.params["layers"][name]["kernel"][0], params["layers"][name]["kernel"][0]
        a, b = pair["a"][0].reshape(-1, LORA.rank), pair["b"][0].reshape(LORA.rank, -1)
        step = np.asarray(new - old).reshape(len(a), -1)
        expected = {"a": LORA.scale * step @ b.T, "b": LORA.scale * a.T @ step}
        got = {k: x[0].reshape(expected[k].shape) for k, x in moved["layers"][name].items()}
        assert_near(got, expected, 2e-4)


@pytest.mark.parametrize(
    ("sizes", "layout"), [((1, 1, 1), (3, 2, 32)), ((1, 4, 1), (2, 4, 32)), ((2, 1, 2), (1, 8, 32))]
)
def test_the_split_and_the_mesh_change_nothing(learner, alone, sizes, layout):
    mesh = toy.toy_mesh(*sizes)
    here = (
        learner if mesh.size == 1 else toy.toy_learner(MODEL, GOAL, optax.sgd(1.0), mesh, lora=LORA)
    )
    moved, figures = change(here, mesh, layout)
    assert_near(moved, alone[0], 1e-5)
    assert figures["grad_norm"] == pytest.approx(alone[1]["grad_norm"], rel=1e-5)


def test_beside_int8_the_split_the_mesh_and_multiplying_out_change_nothing(learner):
    """Of the gradient; the last: an update beside the matrices that the integers stand for."""
    moved, figures = change(learner, toy.toy_mesh(), (1, 8, 32), INT8)
    mesh = toy.toy_mesh(1, 2, 2)
    others = [
        change(learner, toy.toy_mesh(), (3, 2, 32), merge(INT8)),
        change(
            toy.toy_learner(MODEL, GOAL, optax.sgd(1.0), mesh, lora=LORA), mesh, (2, 4, 32), INT8
        ),
    ]
    for other, said in others:
        assert_near(other, moved, 1e-5)
        assert said["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-5)


def test_the_state_is_the_adapters_alone():
    adam = toy.toy_learner(MODEL, GOAL, optax.adamw(1e-3), lora=LORA)
    shapes = sorted(x.shape for x in jax.tree.leaves(ADAPTER))
    assert sorted(x.shape for x in jax.tree.leaves(adam.state.params)) == shapes
    moments = [x.shape for x in jax.tree.leaves(adam.state.opt_state) if x.ndim]
    assert sorted(moments) == sorted([*shapes, *shapes])


def test_an_update_has_no_room_for_gradients_of_frozen_weights():
    wide = toy.toy_model(layers=6, hidden_size=128, intermediate_size=512, vocab_size=toy.VOCAB)
    part = trained_part(wide, LORA)
    rows = toy.minibatch(toy.examples(1), 1, 1, 16)
    sizes = {}
    for lora in (LORA, INT8_LORA, None):
        learner = toy.toy_learner(wide, GOAL, optax.sgd(1.0), lora=lora)
        frozen = toy.on(toy.toy_mesh(), wide, toy.random_params(wide))
        weights = sum(x.nbytes for x in jax.tree.leaves(frozen))
        if lora is INT8_LORA:
            frozen = jax.device_put(toy.in_int8(toy.random_params(wide), wide.config))
        adapter = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), learner.state.params)
        params = part.whole(adapter, frozen) if lora else frozen
        scored = toy.with_old(learner, params, rows, frozen)
        given = (frozen,) if lora else ()
        compiled = toy.compiled_quickly(learner.step, learner.state, scored, *given)
        sizes[lora] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[LORA] < 0.5 * weights < weights < sizes[None]
    assert sizes[INT8_LORA] < 0.5 * weights  # nor are all layers multiplied out at once


WIDE = toy.toy_model(
    layers=1, hidden_size=96, intermediate_size=192, heads=4, kv_heads=2, head_dim=24
)


def recited(lora, rate: float, seeds: int, updates: int = 20) -> list[float]:
    """Nats per token of 16 random texts, after updates on them, of models of several seeds."""
    rng = np.random.RandomState(0)
    texts = [
        answered([3 + i], rng.randint(toy.EOS, toy.TOKENIZER, 15), 0.0, 1.0, 0) for i in range(16)
    ]
    part = toy.minibatch(texts, 1, 16, 16)
    zeros: Any = np.zeros(part.rows.target_BT.shape, np.float32)
    part = dataclasses.replace(part, old=OldPolicy(zeros, zeros))
    learner = toy.toy_learner(WIDE, Goal(reinforce(), token_mean), optax.adam(rate), lora=lora)
    trained, rows = trained_part(WIDE, lora), learner.place(part)
    step, found = None, []
    for seed in range(seeds):
        given = () if lora is None else (WIDE.init(jax.random.key(seed)),)
        own = jax.random.key(seed if lora is None else 100 + seed)
        state, report = learner.init(trained.init(own)), {}
        step = step or toy.compiled_quickly(learner.step, state, rows, *given)
        for _ in range(updates):
            state, report = step(state, rows, *given)
        found.append(toy.figures(report)["surrogate"])
    return found


def test_rank_64_learns_as_all_weights_do_within_the_noise_of_seeds():
    """From the same four models, adapters in all matrices at about three times the rate."""
    full = np.array(recited(None, 3e-3, seeds=4))
    adapters = np.array(recited(Lora(64, 32.0), 1e-2, seeds=4))
    assert full.max() < 0.1 and full.std() < 0.01  # of 3 nats at first, hence no wide noise
    assert abs(adapters.mean() - full.mean()) < 2 * full.std()
    assert recited(Lora(1, 32.0), 1e-2, seeds=1)[0] > 0.5  # which a single rank cannot hold
