"""How the next id is chosen: truncation, one random number by identity, log-probabilities.

    p_v = softmax(z)_v, tail dropped and renormalised;   y = first v with p_1 + ... + p_v > u

One uniform number u per position, not one per id: random bits for a whole vocabulary cost more than
the softmax. u is made of seed, identity and position by `fold_in`: a draw depends on nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.head import FORBIDDEN
from aspo_jax.structs import struct

_CHUNK = 128  # ids whose masses are added up before one of them is looked for


class Choice(NamedTuple):
    """Restrict each draw to likely ids.

    top_k: the k likeliest ids (0: all). top_p: the likeliest mass p of what top_k left.
    min_p: ids at least this share as likely as the likeliest.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


EVERYTHING = Choice()  # ids are drawn from the whole softmax


class Chosen(NamedTuple):
    """The next id of each row.

    logp_N: its log-probability under the distribution that is drawn from, truncation included;
        also where the likeliest id was taken without a draw.
    full_logp_N: its log-probability under the whole softmax.
    is_finite_N: False where the distribution is not finite; the row's other entries are then
        meaningless.
    """

    token_N: Array
    logp_N: Array
    full_logp_N: Array
    is_finite_N: Array


def truncate(logp_NV: Array, choice: Choice) -> Array:
    """Log-probabilities with the tail of the distribution forbidden; not renormalised."""
    if choice.top_k > 0:
        kth_N1 = jax.lax.top_k(logp_NV, choice.top_k)[0][:, -1:]
        logp_NV = jnp.where(logp_NV < kth_N1, FORBIDDEN, logp_NV)
    if choice.top_p < 1.0:
        sorted_NV = jnp.flip(jnp.sort(logp_NV, axis=-1), axis=-1)
        p_NV = jax.nn.softmax(sorted_NV, axis=-1)
        mass_before_NV = jnp.cumsum(p_NV, axis=-1) - p_NV
        is_kept_NV = mass_before_NV < choice.top_p
        floor_N1 = jnp.min(jnp.where(is_kept_NV, sorted_NV, jnp.inf), axis=-1, keepdims=True)
        logp_NV = jnp.where(logp_NV < floor_N1, FORBIDDEN, logp_NV)
    if choice.min_p > 0.0:
        floor_N1 = jnp.max(logp_NV, axis=-1, keepdims=True) + jnp.log(choice.min_p)
        logp_NV = jnp.where(logp_NV < floor_N1, FORBIDDEN, logp_NV)
    return logp_NV


def choose(z_NV: Array, key_N: Array, choice: Choice, is_greedy: Array | bool = False) -> Chosen:
    """The next id of each row from its logits and its own key; the likeliest if ``is_greedy``."""
    top_N = jnp.max(z_NV, axis=-1)
    e_NV = jnp.exp(z_NV - top_N[:, None])
    lse_N = top_N + jnp.log(jnp.sum(e_NV, axis=-1))
    kept_lse_N = lse_N
    if choice != EVERYTHING:
        is_kept_NV = truncate(z_NV - lse_N[:, None], choice) > FORBIDDEN / 2
        e_NV = jnp.where(is_kept_NV, e_NV, 0.0)
        kept_lse_N = top_N + jnp.log(jnp.sum(e_NV, axis=-1))
    token_N = jax.lax.cond(
        is_greedy,
        lambda: jnp.argmax(z_NV, axis=-1).astype(jnp.int32),
        lambda: jax.vmap(_draw)(e_NV, jax.vmap(jax.random.uniform)(key_N)).astype(jnp.int32),
    )
    z_N = jnp.take_along_axis(z_NV, token_N[:, None], axis=-1)[:, 0]
    return Chosen(token_N, z_N - kept_lse_N, z_N - lse_N, jnp.isfinite(lse_N))


@struct
class Drawings:
    """How each row draws: `Drawing`, row by row."""

    temperature_N: Any
    top_k_N: Any
    top_p_N: Any
    min_p_N: Any
    ignores_stops_N: Any
    top_N: Any
    written_N: Any


class Listed(NamedTuple):
    """The likeliest ids of each row and their log-probabilities, likeliest first."""

    token_Nk: Array
    logp_Nk: Array


def choose_each(
    z_NV: Array, key_N: Array, how: Drawings, *, is_raw: bool, listed: int
) -> tuple[Chosen, Listed]:
    """The next id of each row, drawn as that row wants, and the ``listed`` likeliest ids.

    z_NV: logits at temperature 1. is_raw: log-probabilities are those of the whole softmax at
        temperature 1; else of the distribution that the row draws from. A row at temperature 0
        draws nothing, and reports the former in both cases.

    A row's numbers do not depend on how its neighbours draw: what is left out where no row needs it
    is a bound that would exclude nothing.
    """
    is_greedy_N = how.temperature_N == 0
    scaled_NV = z_NV / jnp.where(is_greedy_N, 1.0, how.temperature_N)[:, None]
    top_N = jnp.max(scaled_NV, axis=-1)
    e_NV = jnp.exp(scaled_NV - top_N[:, None])
    lse_N = top_N + jnp.log(jnp.sum(e_NV, axis=-1))
    floor_N = jnp.where(is_greedy_N, -jnp.inf, _floor(scaled_NV, top_N, how))
    is_kept_NV = scaled_NV >= floor_N[:, None]
    e_NV = jnp.where(is_kept_NV, e_NV, 0.0)
    kept_lse_N = top_N + jnp.log(jnp.sum(e_NV, axis=-1))
    drawn_N = jax.vmap(_draw)(e_NV, jax.vmap(jax.random.uniform)(key_N))
    token_N = jnp.where(is_greedy_N, jnp.argmax(z_NV, axis=-1), drawn_N).astype(jnp.int32)
    if is_raw:
        shown_NV, normaliser_N = z_NV, jax.nn.logsumexp(z_NV, axis=-1)
    else:
        shown_NV, normaliser_N = jnp.where(is_kept_NV, scaled_NV, -jnp.inf), kept_lse_N

    def of(x_NV: Array) -> Array:
        return jnp.take_along_axis(x_NV, token_N[:, None], axis=-1)[:, 0]

    listed_Nk = Listed(
        jnp.zeros((z_NV.shape[0], listed), jnp.int32), jnp.zeros((z_NV.shape[0], listed))
    )
    if listed:
        listed_Nk = jax.lax.cond(
            jnp.any(how.top_N > 0),
            lambda: _listed(shown_NV, normaliser_N, listed),
            lambda: listed_Nk,
        )
    chosen = Chosen(
        token_N, of(shown_NV) - normaliser_N, of(scaled_NV) - lse_N, jnp.isfinite(lse_N)
    )
    return chosen, listed_Nk


def _listed(z_NV: Array, normaliser_N: Array, count: int) -> Listed:
    z_Nk, token_Nk = jax.lax.top_k(z_NV, count)
    return Listed(token_Nk, z_Nk - normaliser_N[:, None])


def _floor(z_NV: Array, top_N: Array, how: Drawings) -> Array:
    """The least logit that each row keeps, -inf where it keeps all; `truncate` row by row."""

    def of_sorted() -> Array:
        sorted_NV = jnp.flip(jnp.sort(z_NV, axis=-1), axis=-1)
        rank_V = jnp.arange(z_NV.shape[-1])
        is_kept_NV = (how.top_k_N[:, None] == 0) | (rank_V < how.top_k_N[:, None])
        p_NV = jax.nn.softmax(jnp.where(is_kept_NV, sorted_NV, -jnp.inf), axis=-1)
        is_nucleus_NV = jnp.cumsum(p_NV, axis=-1) - p_NV < how.top_p_N[:, None]
        is_kept_NV &= is_nucleus_NV | (how.top_p_N >= 1)[:, None]
        return jnp.min(jnp.where(is_kept_NV, sorted_NV, jnp.inf), axis=-1)

    nothing_N = jnp.full_like(top_N, -jnp.inf)
    is_cut = jnp.any((how.top_k_N > 0) | (how.top_p_N < 1))
    floor_N = jax.lax.cond(is_cut, of_sorted, lambda: nothing_N)
    # A row that cuts nothing must not depend on the sort of its neighbours.
    floor_N = jnp.where((how.top_k_N > 0) | (how.top_p_N < 1), floor_N, nothing_N)
    return jnp.maximum(floor_N, top_N + jnp.log(how.min_p_N))


def _draw(weight_V: Array, u: Array) -> Array:
    """The first id at which the summed mass exceeds the share u of all; never one without mass."""
    V = weight_V.shape[0]
    weight_cv = jnp.pad(weight_V, (0, -V % _CHUNK)).reshape(-1, _CHUNK)
    mass_c = jnp.sum(weight_cv, axis=-1)
    sum_c = jnp.cumsum(mass_c)
    at = u * sum_c[-1]
    chunk = _first_beyond(sum_c, mass_c, at)
    weight_v = weight_cv[chunk]
    before = sum_c[chunk] - mass_c[chunk]
    return chunk * _CHUNK + _first_beyond(before + jnp.cumsum(weight_v), weight_v, at)


def _first_beyond(sum_n: Array, mass_n: Array, at: Array) -> Array:
    """The first place with mass whose sum is beyond ``at``; the last with mass if none is.

    The sum of all may be rounded to ``at`` itself.
    """
    number_n = jnp.arange(mass_n.shape[0])
    last = jnp.max(jnp.where(mass_n > 0, number_n, 0))
    return jnp.min(jnp.where((sum_n > at) & (mass_n > 0), number_n, last))


def identity_keys(seed: int, identity_N4: Array) -> Array:
    """One key per request from the run's seed and the request's identity."""

    def fold(key, identity_4):
        for number in identity_4:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(fold, in_axes=(None, 0))(jax.random.key(seed), identity_N4)
