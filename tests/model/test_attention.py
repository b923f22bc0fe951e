"""Every program for attention computes the definition; who chooses gives reasons."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from toy import CONFIG, random_params, toy_mesh

from aspo_jax.model import AttentionError, build_model, choose_attention
from aspo_jax.model import attention as programs
from aspo_jax.model.attention import (
    BLOCK,
    SEQUENCES,
    Attention,
    chunked,
    cudnn,
    dense,
    over_mesh,
    starts_and_lengths,
)
from aspo_jax.model.decoder import REMAT
from aspo_jax.model.sharding import MESH_AXES


def inputs(T: int, H: int, K: int, C: int, segments: list[list[int]]):
    """Random q, k, v and gradient, and segments given as the lengths of each row's sequences."""
    rng = np.random.RandomState(0)
    B = len(segments)
    arrays = [
        jnp.asarray(rng.standard_normal((B, T, heads, C)), jnp.float32) for heads in (H, K, K, H)
    ]
    segment_BT = np.zeros((B, T), np.int32)
    for row, lengths in enumerate(segments):
        start = 0
        for number, length in enumerate(lengths, start=1):
            segment_BT[row, start : start + length] = number if length > 0 else 0
            start += abs(length)
    return arrays, jnp.asarray(segment_BT)


def outputs_and_gradients(attend, arrays, segment_BT):
    """Output at real tokens, and gradients of its product with the given gradient."""
    q, k, v, grad = arrays
    is_real = (segment_BT > 0)[:, :, None, None]

    def scalar(q, k, v):
        out = jnp.where(is_real, attend(q, k, v, segment_BT), 0.0)
        return jnp.sum(out * grad), out

    grads, out = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [out, *grads]


PACKED = [[100, 250, 200], [BLOCK, 17], [550]]
CASES = {
    "grouped, packed, odd length": (inputs, 600, 4, 2, 16, PACKED),
    "one key head each": (inputs, 600, 2, 2, 8, PACKED),
    "one key head for all": (inputs, 600, 3, 1, 8, PACKED),
    "shorter than a block": (inputs, 40, 4, 2, 8, [[40], [10, 20]]),
    "exactly two blocks, a row of nothing": (inputs, 2 * BLOCK, 2, 1, 8, [[2 * BLOCK], []]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked_is_the_definition(case):
    make, *shape = case
    arrays, segment_BT = make(*shape)
    expected = outputs_and_gradients(dense, arrays, segment_BT)
    got = outputs_and_gradients(chunked, arrays, segment_BT)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_chunked_takes_prompts_padded_on_the_left():
    arrays, _ = inputs(600, 4, 2, 8, [[], []])
    segment_BT = (jnp.arange(600) >= jnp.array([[0], [311]])).astype(jnp.int32)
    expected = outputs_and_gradients(dense, arrays, segment_BT)
    for x, y in zip(outputs_and_gradients(chunked, arrays, segment_BT), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_chunked_keeps_padding_finite_and_other_sequences_out():
    arrays, segment_BT = inputs(600, 2, 1, 8, [[300, 200]])
    out = jax.jit(chunked)(*arrays[:3], segment_BT)
    assert np.isfinite(out).all()
    changed = [x.at[:, :300].add(1.0) for x in arrays[:3]]
    again = jax.jit(chunked)(*changed, segment_BT)
    np.testing.assert_array_equal(out[:, 300:500], again[:, 300:500])


def temporary_bytes(attend, T: int) -> int:
    q, k = jnp.zeros((1, T, 2, 8)), jnp.zeros((1, T, 1, 8))
    segment_BT = jnp.ones((1, T), jnp.int32)
    grad = jax.grad(lambda *qkv: jnp.sum(attend(*qkv, segment_BT) ** 2), argnums=(0, 1, 2))
    stats: Any = jax.jit(grad).lower(q, k, k).compile().memory_analysis()
    return stats.temp_size_in_bytes


def test_memory_of_chunked_grows_with_the_row_not_with_its_square():
    small, large = 4 * BLOCK, 16 * BLOCK
    assert temporary_bytes(chunked, large) < 5 * temporary_bytes(chunked, small)
    assert temporary_bytes(dense, large) > 12 * temporary_bytes(dense, small)


@pytest.mark.parametrize("kernel", [programs._splash, programs._pallas], ids=["splash", "pallas"])
def test_the_kernels_compute_the_definition(kernel):
    """Interpreted: what they do, not how fast. Their real programs are lowered below."""
    arrays, segment_BT = inputs(256, 2, 1, 128, [[100, 156]])
    expected = outputs_and_gradients(dense, arrays, segment_BT)
    attend: Any = partial(kernel, True)
    got = outputs_and_gradients(attend, arrays, segment_BT)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_splash_lowers_for_a_tpu():
    arrays, segment_BT = inputs(256, 4, 2, 128, [[100, 156]] * 4)
    mesh = toy_mesh(data=2, tensor=2)
    attend: Any = over_mesh(partial(programs._splash, False), mesh)
    grad: Any = jax.grad(lambda *qkv: jnp.sum(attend(*qkv, segment_BT)), argnums=(0, 1, 2))
    lowered = jax.jit(grad).trace(*arrays[:3]).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2)], ids=["rows", "rows and heads"])
def test_devices_change_nothing(sizes):
    arrays, segment_BT = inputs(300, 4, 2, 8, [[100, 150], [300], [20], []])
    expected = outputs_and_gradients(chunked, arrays, segment_BT)
    attend = over_mesh(chunked, toy_mesh(*sizes))
    for x, y in zip(outputs_and_gradients(attend, arrays, segment_BT), expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_network_computes_the_same_with_either():
    T = 300
    tokens = np.random.RandomState(0).randint(3, 20, (1, T))
    position, segment = np.arange(T)[None], np.ones((1, T), np.int32)
    hidden = []
    for attention in (dense, chunked):
        model = build_model(CONFIG, attention=Attention("", "", attention))
        hidden.append(jax.jit(model.apply)(random_params(model), tokens, position, segment)[0])
    np.testing.assert_allclose(*hidden, atol=1e-5)


# --- cuDNN: traced anywhere, run on a GPU ------------------------------------------------------


def test_starts_and_lengths_of_a_row():
    start_M, length_M = starts_and_lengths(jnp.asarray([1, 1, 2, 2, 2, 5, 0, 0]))
    np.testing.assert_array_equal(start_M[:4], [0, 2, 5, -1])
    np.testing.assert_array_equal(length_M[:4], [2, 3, 1, -1])
    assert start_M.shape == length_M.shape == (SEQUENCES,) and np.all(start_M[3:] == -1)


@pytest.mark.parametrize(("remat", "passes"), [("dots", 1), ("attention", 1), ("full", 2)])
@pytest.mark.usefixtures("has_cudnn")
def test_what_a_remat_policy_keeps_of_cudnn_is_not_computed_again(remat, passes):
    q_BTHC, k_BTKC = (jnp.ones((1, 128, heads, 16), jnp.bfloat16) for heads in (2, 1))
    segment_BT = jnp.ones((1, 128), jnp.int32)

    @partial(jax.checkpoint, policy=REMAT[remat].policy)
    def layer(q_BTHC):
        return cudnn(2 * q_BTHC, k_BTKC, k_BTKC, segment_BT)

    text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(layer(q).astype(jnp.float32))))(q_BTHC))
    assert text.count("dot_product_attention_fwd_wrapper[") == passes
    assert text.count("dot_product_attention_bwd_wrapper[") == 1


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="kernels of a GPU")
@pytest.mark.parametrize("name", ["cudnn", "pallas"])
def test_a_gpus_kernels_are_the_definition(name):
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(2, 1024, heads, 128)) for heads in (12, 2, 2, 12)]
    q, k, v, weight = (jnp.asarray(x, jnp.bfloat16) for x in drawn)
    segment_BT = np.repeat([[1, 2, 3, 4, 0]], [300, 5, 421, 200, 98], axis=1).repeat(2, axis=0)
    is_token_BT11 = (segment_BT > 0)[..., None, None]

    def results(attend, *qkv):
        def total(*qkv):
            out = jnp.where(is_token_BT11, attend(*qkv, jnp.asarray(segment_BT)), 0)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        grads, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv)
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    got = results(choose("gpu", name).attend, q, k, v)
    with jax.default_matmul_precision("highest"):
        wide = results(dense, *(x.astype(jnp.float32) for x in (q, k, v)))
    for x, y in zip(got, wide, strict=True):
        assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(y)


# --- who chooses ------------------------------------------------------------------------------


def choose(platform: str, name: str = "auto", mesh: Mesh | None = None, **changes) -> Attention:
    usual = {"head_dim": 128, "row_tokens": 4096, "packed": True, "dtype": jnp.bfloat16}
    return choose_attention(platform, mesh=mesh or toy_mesh(), name=name, **usual | changes)


@pytest.mark.parametrize(
    ("platform", "changes", "chosen", "reason"),
    [
        ("cpu", {}, "chunked", "memory on cpu"),
        ("cpu", {"row_tokens": 35}, "dense", "one block"),
        ("tpu", {}, "splash", "kernel for tpu"),
        ("tpu", {"head_dim": 64}, "chunked", "not splash: .* head width 64"),
        ("tpu", {"row_tokens": 100}, "chunked", "not splash: .* Train.row_tokens = 100"),
        ("gpu", {"packed": False}, "cudnn", "kernel for gpu"),
        ("gpu", {}, "cudnn", "kernel for gpu"),
        ("gpu", {"dtype": jnp.float32, "packed": False}, "pallas", "not cudnn: .* bfloat16"),
        ("gpu", {"head_dim": 320}, "chunked", "not cudnn: .* 320; not pallas: .* 320"),
    ],
)
@pytest.mark.usefixtures("has_cudnn")
def test_the_choice_and_its_reason(platform, changes, chosen, reason):
    got = choose(platform, **changes)
    assert got.name == chosen
    assert re.search(reason, got.reason), got.reason


@pytest.mark.parametrize(
    ("platform", "name", "changes", "problem"),
    [
        ("cpu", "splash", {}, "'splash': it runs on tpu, not on cpu"),
        ("tpu", "cudnn", {}, "'cudnn': it runs on gpu, not on tpu"),
        ("tpu", "splash", {"head_dim": 64}, "multiples of 128, found head width 64"),
    ],
)
def test_what_the_hardware_cannot_do_is_refused_with_the_reason(platform, name, changes, problem):
    with pytest.raises(AttentionError, match=problem):
        choose(platform, name, **changes)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="it has cuDNN")
def test_without_cudnn_a_gpu_is_planned_with_another():
    got = choose("gpu")
    assert got.name == "pallas" and "not cudnn: it needs cuDNN, which is not" in got.reason


@pytest.mark.usefixtures("has_cudnn")
def test_before_hopper_cudnn_knows_no_packed_rows():
    gpu = type("Gpu", (), {"compute_capability": "8.0"})()
    mesh = Mesh(np.array([[[gpu]]]), MESH_AXES)
    got = choose("gpu", mesh=mesh)
    assert got.name == "pallas" and "needs compute capability 9.0, found 8.0" in got.reason
    assert choose("gpu", mesh=mesh, packed=False).name == "cudnn"


@pytest.mark.usefixtures("has_cudnn")
def test_the_sequences_that_may_share_a_row():
    assert choose("cpu").sequences is None and choose("cpu", packed=False).sequences == 1
    assert choose("gpu").sequences == SEQUENCES and choose("gpu", packed=False).sequences == 1


def test_what_was_asked_for_is_taken():
    assert choose("cpu", "dense").attend is dense
