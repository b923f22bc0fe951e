"""Asking a loss about tokens whose ratio, advantage and probability are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aspo_jax.conformance.calling import Batch, Loss

LOGP = -6.0  # exp(6) = 403 is then the largest and the smallest ratio that a probability allows
ZERO = 1e-5  # of a weight: above the noise of a code that computes in float32
TOLERANCE = 1e-3


def close(x: NDArray | float, y: NDArray | float) -> NDArray:
    """Equal within what a float32 computation would leave, elementwise; NaN is close to nothing."""
    return np.abs(np.asarray(x) - y) <= ZERO + TOLERANCE * np.abs(y)


class Line(NamedTuple):
    """c as a function of A > 0 or of A < 0: c = w A + b; how far it is from being one."""

    w: NDArray
    b: NDArray
    curvature: float


def rows(
    log_ratio: NDArray,
    mask: NDArray,
    advantage: float,
    logp: NDArray,
    entropy: NDArray | None = None,
) -> Batch:
    """A batch [B, T] with one advantage."""
    shape = mask.shape
    return Batch(
        np.broadcast_to(logp, shape).astype(float),
        np.broadcast_to(logp - log_ratio, shape).astype(float),
        np.full(shape, float(advantage)),
        mask.astype(bool),
        np.ones(shape) if entropy is None else np.broadcast_to(entropy, shape).astype(float),
    )


class Witness:
    """Asks a loss, and keeps what is no number."""

    def __init__(self, loss: Loss):
        self.loss = loss
        self.not_finite = ""

    def ask(self, batch: Batch) -> NDArray:
        c_BT = self.loss.coefficient(batch)
        bad = np.argwhere(~np.isfinite(c_BT) & batch.is_response_BT)
        if len(bad) and not self.not_finite:
            i = tuple(bad[0])
            self.not_finite = (
                f"{c_BT[i]} at log pi = {batch.logp_BT[i]:g}, log pi_old = "
                f"{batch.old_logp_BT[i]:g}, A = {batch.advantage_BT[i]:g}"
            )
        return c_BT

    def line(
        self,
        log_ratio: NDArray,
        sign: int,
        mask: NDArray | None = None,
        logp: float | NDArray = LOGP,
        entropy: NDArray | None = None,
    ) -> Line:
        """w and b of a batch's tokens, from three advantages of one sign."""
        mask = np.ones(np.shape(log_ratio)) if mask is None else mask
        small, one, two = (
            self.ask(rows(log_ratio, mask, sign * size, np.asarray(logp), entropy))
            for size in (0.5, 1.0, 2.0)
        )
        w = (two - small) / (1.5 * sign)
        b = small - w * sign / 2
        found, expected = one[mask > 0], (w * sign + b)[mask > 0]
        return Line(w, b, float(np.max(np.abs(found - expected) / (ZERO + np.abs(expected)))))

    def token(self, log_ratio: float, sign: int, logp: float = LOGP) -> tuple[float, float, float]:
        """w, b and curvature of a single token."""
        line = self.line(np.full((1, 1), log_ratio), sign, logp=logp)
        return line.w.item(), line.b.item(), line.curvature


def find_edge(weight: Callable[[float], float], inside: float, outside: float) -> float:
    """The last ratio with a weight, by bisection of its logarithm."""
    a, b = math.log(inside), math.log(outside)
    for _ in range(20):
        middle = (a + b) / 2
        a, b = (middle, b) if abs(weight(math.exp(middle))) > ZERO else (a, middle)
    return math.exp(a)
