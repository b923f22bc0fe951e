"""What objectives would do with a rollout that a run recorded, without an update.

The old policy's log-probabilities are those of the record; pi_theta is a later checkpoint, since
the rules differ only once ratios have left 1. Of each mini-batch every objective gets its
coefficients ``a (w A + b)`` and its gradient, ``- sum_t a_t c_t grad log pi(y_t)``: the forward
pass is the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from aspo_jax import losses
from aspo_jax.errors import UserError
from aspo_jax.learner import forward, place, scored, tokens_of
from aspo_jax.losses.objective import MissingField
from aspo_jax.policy import Policy
from aspo_jax.recording import COMPARED, Row, examples, trained_on
from aspo_jax.rows import BatchShape, fill
from aspo_jax.structs import Minibatch, OldPolicy, Tokens

SIGNS = {"positive": 1, "negative": -1}
QUARTILES = 4


class ReplayError(UserError):
    """A rollout that cannot be replayed with what is asked for."""


class Spread(NamedTuple):
    """The weights of the tokens of one sign in one quartile of their ratios.

    lowest, highest: ratios. masked: share of weights that are 0. q10, q50, q90, mean: weights.
    """

    tokens: int
    lowest: float
    highest: float
    masked: float
    q10: float
    q50: float
    q90: float
    mean: float


class Judged(NamedTuple):
    """What an objective would do; means over the mini-batches.

    grad_norm: of the gradient.
    cosine: to the reference objective's gradient, over the mini-batches where neither is 0; None
        where there is none.
    clip_share: sign -> share of its tokens whose weight is 0.
    weights: sign -> the spread of weights in each quartile of the ratio, from the lowest ratios.
    """

    grad_norm: float
    cosine: float | None
    clip_share: dict[str, float]
    weights: dict[str, list[Spread]]


class Distance(NamedTuple):
    """How far pi_theta is from the policy that sampled; over response tokens, nats.

    ratio_kl: mean of r - 1 - log r.
    """

    tokens: int
    responses: int
    minibatches: int
    abs_log_ratio_mean: float
    abs_log_ratio_max: float
    ratio_kl: float


class Replay(NamedTuple):
    """A replayed rollout; objectives by name, the first is the one that others are compared to."""

    distance: Distance
    objectives: dict[str, Judged]


def replay(
    policy: Policy,
    params: Any,
    rows: Sequence[Row],
    shape: BatchShape,
    objectives: Mapping[str, losses.Objective],
    aggregate: losses.Aggregate,
    mesh: Mesh,
) -> Replay:
    """Replay a recorded rollout.

    params: pi_theta. rows: of `aspo_jax.recording.read_rollout`. shape: of the run's mini-batches.
    objectives: the first is the reference of the cosines.

    Raises:
        ReplayError: nothing of the rollout was trained on, or a rule reads what was not recorded.
    """
    numbers = trained_on(rows)
    if not numbers:
        raise ReplayError(
            "no group of this rollout had a signal, so that it has no mini-batch to replay; choose "
            "another --iteration"
        )
    score = jax.jit(functools.partial(scored, policy.model, policy.head))
    gradient = _make_gradient(policy)
    compared: dict[str, list[tuple[float, float]]] = {name: [] for name in objectives}
    seen: list[tuple[Tokens, dict[str, np.ndarray]]] = []
    for number in numbers:
        part = _laid_out([row for row in rows if row["minibatch"] == number], shape, mesh)
        tokens = _flat_tokens(part, score(params, part))
        weights, reference = {}, None
        for name, objective in objectives.items():
            weight_BT, c_BT = _coefficients(name, objective, tokens, aggregate)
            grads = gradient(params, part, np.reshape(c_BT, part.rows.target_BT.shape))
            reference = grads if reference is None else reference
            norm, cosine = _norm_and_cosine(grads, reference)
            compared[name].append((float(norm), float(cosine)))
            weights[name] = np.asarray(weight_BT)
        seen.append((jax.tree.map(np.asarray, tokens), weights))
    return Replay(
        _distance(seen, len(numbers)),
        {name: _judged(pairs, _gathered(seen, name)) for name, pairs in compared.items()},
    )


def _laid_out(rows: Sequence[Row], shape: BatchShape, mesh: Mesh) -> Minibatch:
    """The recorded mini-batch on the devices, with what its update compared itself with."""
    part = fill(examples(rows), shape)
    known = [name for name in COMPARED if rows[0].get(name) is not None]
    old: dict[str, Any] = {
        f"{name}_BT": fill(examples(rows, name), shape).rows.sampler_logp_BT for name in known
    }
    return place(mesh, dataclasses.replace(part, old=OldPolicy(**old)))


def _flat_tokens(part: Minibatch, new: tuple[Array, Array]) -> Tokens:
    """All tokens of a mini-batch as rules see them, ``[M B, T]``, on one device."""
    rows, old, new = jax.device_get((part.rows, part.old, new))
    tokens = tokens_of(rows, old, *new)
    flat = jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, x.shape[-1])), tokens)
    return losses.response_only(flat)


def _coefficients(
    name: str, objective: losses.Objective, tokens: Tokens, aggregate: losses.Aggregate
) -> tuple[Array, Array]:
    """w and a (w A + b) of a whole mini-batch, with a fresh state."""
    try:
        made = losses.coefficient_of(objective, tokens)
    except MissingField as missing:
        raise ReplayError(
            f"the objective {name!r} reads Tokens.{missing.field}, which the run did not record, "
            "its own rules not reading it; leave the objective out"
        ) from missing
    a_BT = aggregate(tokens, losses.count_totals(tokens))
    c_BT = a_BT * (made.weight_BT * tokens.advantage_BT + made.bias_BT)
    return made.weight_BT, jnp.where(tokens.is_response_BT, c_BT, 0)


def _make_gradient(policy: Policy) -> Callable[[Any, Minibatch, Any], Any]:
    """(params, minibatch, c_MBT) -> the gradient of ``- sum c log pi``, by micro-batches.

    With respect to what the run trained.
    """
    part = policy.trained

    def of_microbatch(trained, frozen, rows, c_BT):
        params = part.whole(trained, frozen)
        return -jnp.sum(c_BT * forward(policy.model, policy.head, params, rows)[0])

    def gradient(params, minibatch: Minibatch, c_MBT):
        trained, frozen = part.split(params)

        def add(m, grads):
            rows, c_BT = jax.tree.map(lambda x: x[m], (minibatch.rows, c_MBT))
            return jax.tree.map(
                jnp.add, grads, jax.grad(of_microbatch)(trained, frozen, rows, c_BT)
            )

        zeros = jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.fori_loop(0, minibatch.count, add, zeros)

    return jax.jit(gradient)


@jax.jit
def _norm_and_cosine(x: Any, reference: Any) -> tuple[Array, Array]:
    """The cosine is NaN where one is 0."""
    norm, other = optax.tree.norm(x), optax.tree.norm(reference)
    return norm, jnp.asarray(optax.tree.vdot(x, reference) / (norm * other))


# --- figures ------------------------------------------------------------------------------------


class _Chosen(NamedTuple):
    """Response tokens of all mini-batches."""

    log_ratio_N: np.ndarray
    advantage_N: np.ndarray
    weight_N: np.ndarray


def _gathered(seen: Sequence[tuple[Tokens, dict[str, np.ndarray]]], name: str) -> _Chosen:
    columns = []
    for tokens, weights in seen:
        chosen = tokens.is_response_BT
        log_ratio = np.asarray(tokens.logp_BT)[chosen] - np.asarray(tokens.old_logp_BT)[chosen]
        columns.append((log_ratio, np.asarray(tokens.advantage_BT)[chosen], weights[name][chosen]))
    return _Chosen(*(np.concatenate(x).astype(np.float64) for x in zip(*columns, strict=True)))


def _judged(pairs: Sequence[tuple[float, float]], chosen: _Chosen) -> Judged:
    norms, cosines = np.array(pairs).T
    clip_share, weights = {}, {}
    for name, sign in SIGNS.items():
        is_own = np.sign(chosen.advantage_N) == sign
        log_ratio_N, weight_N = chosen.log_ratio_N[is_own], chosen.weight_N[is_own]
        clip_share[name] = float(np.mean(weight_N == 0)) if is_own.any() else 0.0
        by_ratio = np.array_split(np.argsort(log_ratio_N, kind="stable"), QUARTILES)
        weights[name] = [_spread(log_ratio_N[i], weight_N[i]) for i in by_ratio if len(i)]
    known = cosines[np.isfinite(cosines)]
    cosine = float(known.mean()) if len(known) else None
    return Judged(float(np.mean(norms)), cosine, clip_share, weights)


def _spread(log_ratio_N: np.ndarray, weight_N: np.ndarray) -> Spread:
    q10, q50, q90 = np.quantile(weight_N, (0.1, 0.5, 0.9))
    return Spread(
        tokens=len(weight_N),
        lowest=float(np.exp(log_ratio_N.min())),
        highest=float(np.exp(log_ratio_N.max())),
        masked=float(np.mean(weight_N == 0)),
        q10=float(q10),
        q50=float(q50),
        q90=float(q90),
        mean=float(weight_N.mean()),
    )


def _distance(seen: Sequence[tuple[Tokens, dict[str, np.ndarray]]], minibatches: int) -> Distance:
    log_ratio_N = _gathered(seen, next(iter(seen[0][1]))).log_ratio_N
    responses = sum(int(losses.count_totals(tokens).sequences) for tokens, _ in seen)
    return Distance(
        tokens=len(log_ratio_N),
        responses=responses,
        minibatches=minibatches,
        abs_log_ratio_mean=float(np.abs(log_ratio_N).mean()),
        abs_log_ratio_max=float(np.abs(log_ratio_N).max()),
        ratio_kl=float((np.expm1(log_ratio_N) - log_ratio_N).mean()),
    )
