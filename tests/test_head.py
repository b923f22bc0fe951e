"""The head against plain formulas; gradients; what must never exist in memory."""

from __future__ import annotations

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from toy import toy_mesh

from aspo_jax.head import Head, _chunks, _Shard, logits, logp_and_entropy, square_mass
from aspo_jax.model import shardings

B, T, D, V = 3, 7, 5, 11
FORBIDDEN_IDS = [0, 9, 10]
IS_ALLOWED_V = np.isin(np.arange(V), FORBIDDEN_IDS, invert=True)
RNG = np.random.RandomState(0)
WEIGHT_VD = jnp.asarray(RNG.standard_normal((V, D)), jnp.float32)
HIDDEN_BTD = jnp.asarray(RNG.standard_normal((B, T, D)), jnp.float32)
TARGET_BT = jnp.asarray(RNG.randint(1, 9, (B, T)))
LOGP_PULL_BT, ENTROPY_PULL_BT = jnp.asarray(RNG.standard_normal((2, B, T)), jnp.float32)


def reference(head: Head, weight_VD, hidden_BTD, target_BT):
    """The definition, over the allowed ids alone."""
    allowed = np.flatnonzero(head.is_allowed_V)
    z = hidden_BTD @ weight_VD[allowed].T / head.temperature
    p = jax.nn.softmax(z, axis=-1)
    index_BT = jnp.searchsorted(allowed, target_BT)
    logp = jnp.log(jnp.take_along_axis(p, index_BT[..., None], axis=-1)[..., 0])
    return logp, -jnp.sum(p * jnp.log(p), axis=-1)


def pulled(function, head):
    """Scalar through which both outputs are differentiated at once."""

    def scalar(weight_VD, hidden_BTD):
        logp_BT, entropy_BT = function(head, weight_VD, hidden_BTD, TARGET_BT)
        return jnp.sum(logp_BT * LOGP_PULL_BT) + jnp.sum(entropy_BT * ENTROPY_PULL_BT)

    # Compiling is all that takes long.
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.grad(scalar, argnums=(0, 1)), compiler_options=quickly)


@pytest.mark.parametrize(
    ("temperature", "chunk"), [(1.0, 7), *((0.7, chunk) for chunk in (1, 4, 7, 20, 21, 1024))]
)
def test_values_and_gradients_are_those_of_the_definition(temperature, chunk):
    head = Head(temperature, IS_ALLOWED_V, chunk)
    got = logp_and_entropy(head, WEIGHT_VD, HIDDEN_BTD, TARGET_BT)
    expected = reference(head, WEIGHT_VD, HIDDEN_BTD, TARGET_BT)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=2e-6)
    got = pulled(logp_and_entropy, head)(WEIGHT_VD, HIDDEN_BTD)
    expected = pulled(reference, head)(WEIGHT_VD, HIDDEN_BTD)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_forbidden_ids_have_no_probability_and_no_gradient():
    head = Head(0.9, IS_ALLOWED_V, 4)
    p_NV = jax.nn.softmax(logits(head, WEIGHT_VD, HIDDEN_BTD.reshape(-1, D)))
    assert (p_NV[:, FORBIDDEN_IDS] == 0).all()
    np.testing.assert_allclose(p_NV.sum(axis=-1), 1, rtol=1e-5)
    forbidden = jnp.full((B, T), 9)
    assert (logp_and_entropy(head, WEIGHT_VD, HIDDEN_BTD, forbidden)[0] < -1e29).all()
    weight_grad_VD, _ = pulled(logp_and_entropy, head)(WEIGHT_VD, HIDDEN_BTD)
    assert (weight_grad_VD[jnp.array(FORBIDDEN_IDS)] == 0).all()
    assert (weight_grad_VD[IS_ALLOWED_V] != 0).all()


def test_their_weights_do_not_matter():
    head = Head(1.0, IS_ALLOWED_V, 4)
    loud_VD = WEIGHT_VD.at[jnp.array(FORBIDDEN_IDS)].set(1e4)
    got = logp_and_entropy(head, loud_VD, HIDDEN_BTD, TARGET_BT)
    for x, y in zip(got, logp_and_entropy(head, WEIGHT_VD, HIDDEN_BTD, TARGET_BT), strict=True):
        np.testing.assert_array_equal(x, y)
    hidden_grad = pulled(logp_and_entropy, head)(loud_VD, HIDDEN_BTD)[1]
    expected = pulled(logp_and_entropy, head)(WEIGHT_VD, HIDDEN_BTD)[1]
    np.testing.assert_array_equal(hidden_grad, expected)


def test_the_sampler_sees_the_same_distribution():
    head = Head(0.6, IS_ALLOWED_V, 4)
    logp_NV = jax.nn.log_softmax(logits(head, WEIGHT_VD, HIDDEN_BTD.reshape(-1, D)))
    p_NV = jnp.exp(logp_NV)
    logp_BT, entropy_BT = logp_and_entropy(head, WEIGHT_VD, HIDDEN_BTD, TARGET_BT)
    picked = logp_NV[jnp.arange(B * T), TARGET_BT.reshape(-1)]
    np.testing.assert_allclose(logp_BT.reshape(-1), picked, atol=1e-6)
    np.testing.assert_allclose(
        entropy_BT.reshape(-1), -jnp.sum(p_NV * jnp.where(p_NV > 0, logp_NV, 0), -1), atol=1e-5
    )


def test_one_allowed_id_is_certain():
    head = Head(1.0, np.arange(V) == 3, 4)
    logp_BT, entropy_BT = logp_and_entropy(head, WEIGHT_VD, HIDDEN_BTD, jnp.full((B, T), 3))
    assert (logp_BT == 0).all() and (entropy_BT == 0).all()


def test_temperature_flattens():
    entropies = [
        logp_and_entropy(Head(x, IS_ALLOWED_V, 8), WEIGHT_VD, HIDDEN_BTD, TARGET_BT)[1]
        for x in (0.5, 1.0, 2.0, 1e4)
    ]
    for colder, warmer in itertools.pairwise(entropies):
        assert (colder < warmer).all()
    np.testing.assert_allclose(entropies[-1], np.log(IS_ALLOWED_V.sum()), atol=1e-5)


def test_bfloat16_hidden_states_give_float32_values_and_bfloat16_gradients():
    head = Head(1.0, IS_ALLOWED_V, 4)
    half_BTD = HIDDEN_BTD.astype(jnp.bfloat16)
    got = logp_and_entropy(head, WEIGHT_VD, half_BTD, TARGET_BT)
    rounded_VD = WEIGHT_VD.astype(jnp.bfloat16).astype(jnp.float32)
    exact = reference(head, rounded_VD, half_BTD.astype(jnp.float32), TARGET_BT)
    for x, y in zip(got, exact, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=2e-6)
    weight_grad, hidden_grad = pulled(logp_and_entropy, head)(WEIGHT_VD, half_BTD)
    assert weight_grad.dtype == jnp.float32 and hidden_grad.dtype == jnp.bfloat16


@pytest.mark.parametrize("chunk", [4, 1024])
def test_squared_probabilities_are_those_of_the_definition(chunk):
    head = Head(0.7, IS_ALLOWED_V, chunk)
    p_BTV = jax.nn.softmax(HIDDEN_BTD @ WEIGHT_VD[IS_ALLOWED_V].T / 0.7)
    found_BT = square_mass(head, WEIGHT_VD, HIDDEN_BTD)
    np.testing.assert_allclose(found_BT, jnp.square(p_BTV).sum(-1), rtol=1e-5)
    certain = Head(1.0, np.arange(V) == 3, chunk)
    np.testing.assert_array_equal(square_mass(certain, WEIGHT_VD, HIDDEN_BTD), np.ones((B, T)))


# --- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("read", ["some", "none", "one", "all"])
def test_what_nobody_reads_is_zero_and_changes_nothing(chunk, read):
    is_read_BT = {
        "some": RNG.uniform(size=(B, T)) < 0.4,
        "none": np.zeros((B, T), bool),
        "one": np.arange(B * T).reshape(B, T) == B * T - 1,
        "all": np.ones((B, T), bool),
    }[read]
    head = Head(0.7, IS_ALLOWED_V, chunk)
    spoilt_BTD = jnp.where(is_read_BT[..., None], HIDDEN_BTD, jnp.nan)

    def reading(head, weight_VD, hidden_BTD, target_BT):
        return logp_and_entropy(head, weight_VD, hidden_BTD, target_BT, is_read_BT)

    def masked(head, weight_VD, hidden_BTD, target_BT):
        found = reference(head, weight_VD, hidden_BTD, target_BT)
        return tuple(jnp.where(is_read_BT, x, 0) for x in found)

    got = reading(head, WEIGHT_VD, spoilt_BTD, TARGET_BT)
    expected = masked(head, WEIGHT_VD, HIDDEN_BTD, TARGET_BT)
    got += pulled(reading, head)(WEIGHT_VD, spoilt_BTD)
    expected += pulled(masked, head)(WEIGHT_VD, HIDDEN_BTD)
    got += (square_mass(head, WEIGHT_VD, spoilt_BTD, is_read_BT),)
    expected += (jnp.where(is_read_BT, square_mass(head, WEIGHT_VD, HIDDEN_BTD), 0),)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert (np.asarray(got[3])[~is_read_BT] == 0).all()  # of the hidden states, to the last bit


@pytest.mark.parametrize(("read", "expected"), [(0, 0), (1, 1), (8, 1), (9, 2), (64, 8)])
def test_there_are_as_many_chunks_as_what_is_read_fills(read, expected):
    """Of eight tokens here: a large chunk is cut, so that few rows have several."""
    is_read_BT = np.random.RandomState(read).permutation(64).reshape(4, 16) < read
    chunks = _chunks(_Shard(Head(1.0, IS_ALLOWED_V), 0, *[lambda x: x] * 4), is_read_BT)
    assert int(chunks.count) == expected and chunks.place_nc.shape == (8, 8)
    place_N = np.asarray(chunks.place_nc).reshape(-1)
    np.testing.assert_array_equal(place_N[:read], np.flatnonzero(is_read_BT))
    assert (place_N[read:] >= 64).all() and (np.diff(place_N) > 0).all()


# --- memory -----------------------------------------------------------------------------------


def jaxprs_in(value):
    if hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif hasattr(value, "eqns"):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from jaxprs_in(item)


def largest_array(jaxpr) -> int:
    """Most elements of any intermediate, sub-programs included."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [var.aval.size for var in eqn.outvars if hasattr(var.aval, "size")]
        for value in eqn.params.values():
            sizes += [largest_array(inner) for inner in jaxprs_in(value)]
    return max(sizes)


def test_no_array_of_tokens_by_vocabulary_exists_forward_or_backward():
    chunk, tokens, V, D = 8, 32, 64, 4
    head = Head(1.0, np.arange(V) > 0, chunk)
    shapes = jnp.ones((V, D)), jnp.ones((1, tokens, D)), jnp.ones((1, tokens), jnp.int32)

    def largest(function):
        def scalar(weight_VD, hidden_BTD, target_BT):
            logp_BT, entropy_BT = function(head, weight_VD, hidden_BTD, target_BT)
            return jnp.sum(logp_BT + entropy_BT)

        program = jax.value_and_grad(scalar, argnums=(0, 1))
        both = jax.make_jaxpr(scalar)(*shapes), jax.make_jaxpr(program)(*shapes)
        return max(largest_array(closed.jaxpr) for closed in both)

    assert largest(reference) >= tokens * (V - 1)  # the search does find one
    assert largest(logp_and_entropy) <= chunk * V


# --- devices ----------------------------------------------------------------------------------


def on_mesh(sizes, function, *arrays):
    """The function's values and compiled text, rows and vocabulary split over a mesh."""
    mesh = toy_mesh(*sizes)
    specs = shardings(mesh, (PartitionSpec("tensor"), PartitionSpec(("data", "fsdp"))))
    program = jax.jit(partial(function, mesh), in_shardings=specs)
    return program(*arrays), program.lower(*arrays).compile().as_text() or ""


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 1, 4), (1, 2, 2)], ids=str)
def test_devices_change_nothing_and_only_statistics_of_tokens_cross_them(sizes):
    B, T, D, V, chunk = 4, 6, 8, 512, 3
    rng = np.random.RandomState(0)
    weight_VD = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    hidden_BTD = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    target_BT = jnp.asarray(rng.randint(1, V - 5, (B, T)))
    is_allowed_V = (np.arange(V) > 0) & (np.arange(V) < V - 5)

    is_read_BT = jnp.asarray(rng.uniform(size=(B, T)) < [[0.9], [0.1], [0.5], [0.0]])

    def scalar(mesh, weight_VD, hidden_BTD):
        head = Head(0.7, is_allowed_V, chunk, mesh)
        found = logp_and_entropy(head, weight_VD, hidden_BTD, target_BT, is_read_BT)
        logp_BT, entropy_BT = found
        return jnp.sum(jnp.sin(logp_BT) + entropy_BT**2), (logp_BT, entropy_BT)

    def squares(mesh, weight_VD, hidden_BTD):
        return square_mass(Head(0.7, is_allowed_V, chunk, mesh), weight_VD, hidden_BTD)

    found, _ = on_mesh(sizes, squares, weight_VD, hidden_BTD)
    np.testing.assert_allclose(found, squares(None, weight_VD, hidden_BTD), rtol=1e-5)

    program = jax.value_and_grad(scalar, argnums=(1, 2), has_aux=True)
    expected = jax.jit(partial(program, None))(weight_VD, hidden_BTD)
    got, text = on_mesh(sizes, program, weight_VD, hidden_BTD)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
    crossing = re.findall(r"= (.*?) all-\w+\(", text)
    dims = re.findall(r"\[([\d,]*)\]", " ".join(crossing))
    assert dims
    _, fsdp, tensor = sizes
    own_gradient = {f"{V // tensor},{D}", f"{V // tensor},{D // fsdp}"}  # of the projection
    for dim in set(dims) - own_gradient:
        elements = int(np.prod([int(n) for n in dim.split(",") if n]))
        assert elements <= B * T * D < chunk * V // tensor, dim
