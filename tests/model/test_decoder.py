"""The network's laws: causality, segments, cache, positions, rematerialisation, dtypes."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import CONFIG, VOCAB, random_params, toy_model

from aspo_jax.model import Decode, ModelConfig, Prefill, build_model
from aspo_jax.model.decoder import REMAT, rotary_BTC, rotate
from aspo_jax.model.parameters import parameters

T = 10
TOKEN_1T = np.random.RandomState(0).permutation(VOCAB)[None, :T]  # each id once


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def full(model):
    return jax.jit(lambda *args: model.apply(*args)[0])


def segments_and_positions(text: str):
    """``"11122."``: segment numbers and positions of one row; "." is padding."""
    segment_T = np.array([0 if c == "." else int(c) for c in text])
    starts = {s: int(np.flatnonzero(segment_T == s)[0]) for s in segment_T}
    position_T = np.array([t - starts[s] for t, s in enumerate(segment_T)])
    return segment_T[None].astype(np.int32), position_T[None].astype(np.int32)


@pytest.fixture(scope="module")
def influence(model, params):
    """(position, segment) -> largest |d hidden_t / d embed_s| as an array [T, T]."""

    @jax.jit
    def jacobian(position_1T, segment_1T):
        def hidden(embed_VD):
            out = model.apply(params | {"embed": embed_VD}, TOKEN_1T, position_1T, segment_1T)[0]
            return out[0] @ np.random.RandomState(1).standard_normal(CONFIG.hidden_size)

        return jax.jacrev(hidden)(jnp.asarray(params["embed"]))

    def of(position_1T, segment_1T):
        d_TVD = np.asarray(jacobian(position_1T, segment_1T))
        return np.abs(d_TVD[:, TOKEN_1T[0]]).max(axis=-1)

    return of


@pytest.mark.parametrize("text", ["1111111111", "1112222333", "..11112222", "11122222.."])
def test_a_token_sees_its_own_segment_up_to_itself_and_nothing_else(influence, text):
    segment_1T, position_1T = segments_and_positions(text)
    seen_TT = influence(position_1T, segment_1T)
    is_same = segment_1T[0][:, None] == segment_1T[0][None]
    is_visible = is_same & np.tri(T, dtype=bool)
    assert (seen_TT[~is_visible] == 0).all()
    assert (seen_TT[is_visible] > 0).all()


def test_other_segments_and_padding_change_no_bit(full, params):
    segment_1T, position_1T = segments_and_positions("111222233.")
    own = segment_1T[0] == 2
    changed_1T = np.where(own, TOKEN_1T, (TOKEN_1T + 5) % VOCAB)
    before = full(params, TOKEN_1T, position_1T, segment_1T)[0, own]
    after = full(params, changed_1T, position_1T, segment_1T)[0, own]
    np.testing.assert_array_equal(before, after)


def test_padding_on_either_side_and_packing_change_nothing(full, params):
    tokens = TOKEN_1T[0, :4]
    hiddens = []
    for text in ("1111......", "..1111....", "......1111", "2221111333"):
        segment_1T, position_1T = segments_and_positions(text)
        own = segment_1T[0] == 1
        row = np.full((1, T), 7)
        row[0, own] = tokens
        hiddens.append(np.asarray(full(params, row, position_1T, segment_1T))[0, own])
    for hidden in hiddens[1:]:
        np.testing.assert_allclose(hidden, hiddens[0], atol=1e-5)


@pytest.mark.parametrize(
    "reads", [([5], 1), ([5, 5, 5], 1), ([3], 2)], ids=["", "classes", "pages"]
)
@pytest.mark.parametrize("layers", [2, 5], ids=["unrolled", "scanned"])
def test_prefill_and_decode_are_the_full_forward(layers, reads):
    """Two samples of one prompt and one of another, their pages all over the pool."""
    model = toy_model(layers=layers)
    params = random_params(model)
    reads_c, pages_per_read = jnp.array(reads[0]), reads[1]
    token_NT = np.random.RandomState(2).randint(VOCAB, size=(3, T))
    length_N = np.array([5, 5, 2])  # of the prompts; the last token of each is decoded
    token_NT[1, :5] = token_NT[0, :5]
    ones_NT = np.ones((3, T), np.int32)
    position_NT = np.tile(np.arange(T), (3, 1))
    apply = jax.jit(model.apply)
    whole_NTD, _ = apply(params, token_NT, position_NT, ones_NT)

    cache = model.empty_cache(1, 12, 3)
    cache = jax.tree.map(lambda x: x.at[:].set(7.0), cache)  # what pages held before is no matter
    page_AJ = jnp.array([[4, 9], [2, 0]])
    segment_AT = (np.arange(6) < (length_N[[0, 2]] - 1)[:, None]).astype(np.int32)
    prompts = Prefill(cache, page_AJ)
    cache = apply(params, token_NT[[0, 2], :6], position_NT[:2, :6], segment_AT, prompts)[1].cache
    table_JN = jnp.array([[4, 4, 2], [9, 9, 1], [3, 10, 5], [8, 11, 7], [0, 0, 6]])
    for drawn in range(T - 5):
        at_N = length_N - 1 + drawn
        prompt_N, own_N = jnp.asarray(length_N - 1), jnp.full(3, drawn)
        rows = Decode(cache, table_JN, prompt_N, own_N, reads_c, pages_per_read)
        token_N1 = token_NT[np.arange(3), at_N][:, None]
        hidden, rows = apply(params, token_N1, at_N[:, None], ones_NT[:, :1], rows)
        cache = rows.cache
        np.testing.assert_allclose(hidden[:, 0], whole_NTD[np.arange(3), at_N], atol=1e-5)


def test_what_is_not_finite_reaches_those_who_read_it_only():
    """0 * NaN is NaN: a page that one row broke must not break the row that gets it next."""
    model = toy_model()
    params = random_params(model)
    is_bad_V1 = np.arange(VOCAB)[:, None] == 5
    broken = params | {"embed": np.where(is_bad_V1, np.nan, params["embed"])}
    apply = jax.jit(model.apply)

    def decode(params, tokens, pages, own, cache):
        table_JN = jnp.array([pages])
        rows = Decode(cache, table_JN, jnp.zeros(2, int), jnp.full(2, own), jnp.array([1]))
        token_N1, one = np.array(tokens)[:, None], np.ones((2, 1), np.int32)
        out, rows = apply(params, token_N1, own * one, one, rows)
        return np.asarray(out[:, 0]), rows.cache

    empty = model.empty_cache(1, 2, 4)
    clean, _ = decode(params, [6, 6], [2, 1], 0, empty)
    out, cache = decode(broken, [5, 6], [1, 2], 1, empty)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    reread, _ = decode(params, [6, 6], [1, 2], 2, cache)
    assert np.isnan(reread[0]).all() and np.isfinite(reread[1]).all()
    swapped, _ = decode(params, [6, 6], [2, 1], 0, cache)
    np.testing.assert_array_equal(swapped, clean)


def rotary(width: int, theta: float) -> ModelConfig:
    return dataclasses.replace(CONFIG, head_dim=width, rope_theta=theta)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary_angles_at_long_positions(theta):
    position, width = 100_000, 8
    exact_c = position / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    cosine, sine = rotary_BTC(jnp.full((1, 1), position), rotary(width, theta))
    # A float32 angle is off by some units in its last place; one in bfloat16 would be off by 350.
    allowed = 4 * np.spacing(exact_c.astype(np.float32)) + 1e-6
    for got_BTC, expected_c in ((cosine, np.cos(exact_c)), (sine, np.sin(exact_c))):
        error = np.abs(np.asarray(got_BTC, np.float64)[0, 0] - np.tile(expected_c, 2))
        assert (error <= np.tile(allowed, 2)).all(), error


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_is_a_complex_product(dtype):
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, 3, 2, 8)), dtype)
    position = jnp.array([[0, 1, 257]])
    got = np.asarray(rotate(x, *rotary_BTC(position, rotary(8, 1e4))).astype(jnp.float32))
    angle_Tc = np.array([0, 1, 257])[:, None] / 1e4 ** (np.arange(0, 8, 2) / 8)
    wide = np.asarray(x, np.float64)
    turned = (wide[..., :4] + 1j * wide[..., 4:]) * np.exp(1j * angle_Tc)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got, expected, atol=1e-5 if dtype == jnp.float32 else 0.02)


def loss_of(model, params):
    segment_1T, position_1T = segments_and_positions("1111222222")
    hidden = model.apply(params, TOKEN_1T, position_1T, segment_1T)[0]
    return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))


def test_rematerialisation_changes_no_gradient(params):
    models = [build_model(CONFIG, remat=remat) for remat in REMAT]
    first, *others = [jax.jit(jax.grad(partial(loss_of, model)))(params) for model in models]
    assert len(others) == 2
    for other in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other, first)


def test_bfloat16_computes_what_float32_does_roughly_and_keeps_float32_gradients(full, params):
    half = build_model(CONFIG, dtype=jnp.bfloat16)
    segment_1T, position_1T = segments_and_positions("1111111111")
    prompts = Prefill(half.empty_cache(1, 1, T), jnp.ones((1, 1), jnp.int32))
    hidden_1TD, prompts = jax.jit(half.apply)(params, TOKEN_1T, position_1T, segment_1T, prompts)
    assert hidden_1TD.dtype == prompts.cache.key_EKYXSC.dtype == jnp.bfloat16
    exact_1TD = full(params, TOKEN_1T, position_1T, segment_1T)
    error = np.abs(np.asarray(hidden_1TD, np.float32) - exact_1TD)
    assert 0 < error.mean() < 0.05
    grads = jax.jit(jax.grad(partial(loss_of, half)))(params)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_initial_parameters_have_the_declared_shapes_and_keep_the_scale_of_what_they_read():
    model = toy_model(tie_embeddings=False, hidden_size=32)
    c = model.config
    fan_in = {"o": c.heads * c.head_dim, "down": c.intermediate_size}
    params = jax.jit(model.init)(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    declared = jax.tree.map(lambda entry, leaf: (entry, leaf), parameters(c), params)
    pairs = jax.tree_util.tree_leaves_with_path(declared, is_leaf=lambda x: isinstance(x, tuple))
    for keys, (entry, leaf) in pairs:
        path = [key.key for key in keys]
        assert (leaf.shape[1:] if "{y}" in entry.name else leaf.shape) == entry.ours
        is_norm = any("norm" in part for part in path)
        if is_norm or path[-1] == "bias":
            assert (leaf == (1 if is_norm else 0)).all(), path
        else:
            width = fan_in.get(path[-2] if len(path) > 1 else "", c.hidden_size)
            assert float(leaf.std()) == pytest.approx(width**-0.5, rel=0.15), path
    kernel = params["layers"]["q"]["kernel"]
    assert (kernel[0] != kernel[1]).all()
    assert model.unembedding(params) is params["head"]
    tied = jax.eval_shape(toy_model().init, jax.random.key(0))
    assert set(tied) == {"embed", "layers", "norm"}
    assert toy_model().unembedding(tied) is tied["embed"]


def test_config_is_hashable_and_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.layers = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(CONFIG) == hash(dataclasses.replace(CONFIG))
