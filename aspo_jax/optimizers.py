"""How gradients move the parameters: optimizers by name, the clip before them, their rates.

An optimizer is an ``optax.GradientTransformation``. A factory of one takes the schedule of its
learning rate and the logical axes of the parameters (`aspo_jax.model.parameter_axes`), which tell
a matrix from a bias, whatever the two are called:

    optimizer = clipped(adamw(learning_rate_schedule(1e-6), model.axes(), b2=0.99), clip_norm=1.0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from aspo_jax.losses.objective import choose, require_decay, require_non_negative, require_positive
from aspo_jax.model import map_axes

# --- learning rates ---------------------------------------------------------------------------


def learning_rate_schedule(
    peak: float, warmup_updates: int, decay_updates: int | None = None
) -> optax.Schedule:
    """Number of updates applied -> rate of the next one.

    The rate climbs linearly over ``warmup_updates``, the first update included, and stays; with
    ``decay_updates`` it also falls linearly from the first update on, to 0 after that many.
    """

    def rate(step):
        warmup = jnp.minimum(1.0, (step + 1) / max(warmup_updates, 1))
        left = 1.0 if decay_updates is None else jnp.maximum(0.0, 1.0 - step / decay_updates)
        return peak * warmup * left

    return rate


def warmup_by_iteration(
    rate: optax.Schedule, iterations: int, updates_per_iteration: int
) -> optax.Schedule:
    """``rate`` times min(1, i / iterations) in iteration i = 0, 1, ...

    The official run's warm-up: it starts at 0, so the first iteration changes nothing, and all
    updates of an iteration share it. Iterations are counted in applied updates.
    """

    def warmed(step):
        iteration = step // updates_per_iteration
        return rate(step) * jnp.minimum(1.0, iteration / iterations)

    return warmed


# --- optimizers -------------------------------------------------------------------------------


def adamw(
    learning_rate: optax.Schedule,
    axes: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Literal["all", "matrices"] = "all",
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        w = w - rate (m' / (sqrt(v') + eps) + weight_decay w)

    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t) in update t = 1, 2, ...

    b1: decay of the gradient average, from 0 to below 1.
    b2: decay of the squared-gradient average, from 0 to below 1.
    eps: added to the root of the squared-gradient average, above 0.
    weight_decay: share of a weight that goes per unit of learning rate, at least 0.
    decay: what decays: "all" parameters, or "matrices" and embeddings, but neither scales of norms
        nor biases.
    Source: arXiv 1711.05101, Algorithm 2.
    Raises ValueError for a number outside its range or an unknown ``decay``.
    """
    require_decay("adamw", b1=b1, b2=b2)
    require_positive("adamw", eps=eps)
    require_non_negative("adamw", weight_decay=weight_decay)
    masks = {"all": None, "matrices": map_axes(is_matrix, axes)}
    mask = choose(masks, decay, "adamw.decay")
    return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)


def muon(
    learning_rate: optax.Schedule,
    axes: Any,
    *,
    momentum: float = 0.95,
    rms: float = 0.2,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Momentum made orthogonal for the matrices of the layers, Adam for all else.

        M = momentum M + (1 - momentum) G
        W = W - rate (rms sqrt(max(m, n)) NS(M') + weight_decay W)        W is m x n

    M' is M without its bias to 0, one step ahead (Nesterov); NS, five Newton-Schulz steps, brings
    all its singular values near 1. Matrices are taken layer by layer, the heads of one side by
    side. The factor makes the root mean square of an update ``rms``, near AdamW's at 0.2: the one
    learning rate serves both. Embeddings, output head, biases and scales of norms are Adam's,
    which looks one step ahead too and has no weight decay.

    momentum: decay of the gradient average of the matrices, from 0 to below 1.
    rms: root mean square of an update of a matrix per unit of learning rate, above 0.
    weight_decay: share of a matrix that goes per unit of learning rate, at least 0.
    b1: Adam's decay of the gradient average, from 0 to below 1.
    b2: Adam's decay of the squared-gradient average, from 0 to below 1.
    eps: added to what is divided by: a norm of M', the root of Adam's average; above 0.
    Source: K. Jordan and others, github.com/KellerJordan/Muon, 2024; the factor is that of
    arXiv 2502.16982 §2.2.
    Raises ValueError for a number outside its range.
    """
    require_decay("muon", momentum=momentum, b1=b1, b2=b2)
    require_positive("muon", rms=rms, eps=eps)
    require_non_negative("muon", weight_decay=weight_decay)
    return optax_muon(
        learning_rate,
        beta=momentum,
        eps=eps,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=map_axes(muon_dimensions, axes),
        consistent_rms=rms,
    )


def sgd(
    learning_rate: optax.Schedule, axes: Any, *, momentum: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """Gradient descent, with a heavy ball where asked for.

        m = momentum m + g        w = w - rate m,  with nesterov  w - rate (momentum m + g)

    momentum: share of the last step that is kept, from 0 to below 1; 0 keeps no state.
    nesterov: look one step ahead; needs a momentum.
    Source: Sutskever and others, ICML 2013, "On the importance of initialization and momentum".
    Raises ValueError for a momentum outside its range, and for ``nesterov`` without one.
    """
    require_decay("sgd", momentum=momentum)
    if nesterov and not momentum:
        raise ValueError("sgd.nesterov = True without a momentum; set sgd.momentum above 0 too")
    return optax.sgd(learning_rate, momentum or None, nesterov)


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "sgd": sgd,
}


def clipped(
    optimizer: optax.GradientTransformation, clip_norm: float
) -> optax.GradientTransformation:
    """The optimizer behind a clip of the gradient's global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


class Offloaded(optax.GradientTransformation):
    """An optimizer whose large state lies in the host's memory between updates.

    `aspo_jax.learner.build_learner` sees to that. It is the outermost: what is chained around it,
    such as `clipped`, hides it.

        optimizer = Offloaded(*clipped(adamw(rate, axes), clip_norm=1.0))
    """


# --- what axes say ----------------------------------------------------------------------------


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether an array is one of the network or of an adapter: no bias, no scale.

    Those of the network read from the residual stream or write to it.
    """
    return "embed" in axes or "rank" in axes


def muon_dimensions(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """The axes that a matrix of a layer reads and writes; None: not Muon's.

    The axes in neither, those of layers, count matrices.
    """
    if not is_matrix(axes) or "vocab" in axes:
        return None
    own = tuple(i for i, name in enumerate(axes) if name != "layers")
    reads = 1 if axes[own[0]] in ("embed", "rank") else len(own) - 1
    return MuonDimensionNumbers(own[:reads], own[reads:])
