"""One token: its weight near ratio 1 and further out, and terms that do not see the advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aspo_jax.conformance.asking import LOGP, TOLERANCE, ZERO, Witness, close, find_edge, rows

DEEP = -40.0  # for ratios around the +-20 nats at which many codes clamp
# No ratio that is likely to be somebody's bound: there torch halves the gradient.
UP = (1.03, 1.09, 1.18, 1.22, 1.31, 1.52, 2.05, 2.9, 3.2, 5.1, 10.2, 400.0)
DOWN = (0.97, 0.91, 0.82, 0.78, 0.71, 0.51, 0.31, 0.26, 0.11, 0.021, 0.0025)
FLOAT32_NOISE = 2e-6  # of a bias, where the weight is 1
NEAR = (0.97, 1.0, 1.03)  # the law is read off here, and held against all the others

LAWS: Mapping[str, Callable[[NDArray], NDArray]] = {
    "1/r": lambda r: 1 / r,
    "r": lambda r: r,
    "1": np.ones_like,
    "-1/r": lambda r: -1 / r,
    "-r": lambda r: -r,
    "-1": lambda r: -np.ones_like(r),
}


class Direction(NamedTuple):
    """How the weight goes on from ratio 1 upwards or downwards.

    kind: "law" as near 1; "zero" from an edge on; "level" at a constant from an edge on.
    edge: that ratio. value: the level, or the last weight before the zeros.
    """

    kind: Literal["law", "zero", "level", "other"]
    edge: float = math.nan
    value: float = math.nan


class Side(NamedTuple):
    """What one sign of the advantage gets; weights are divided by `Measured.scale`."""

    law: str | None
    up: Direction
    down: Direction
    weights: Mapping[float, float]  # ratio -> w


class Bias(NamedTuple):
    """A term that does not see the advantage. coefficient: of the loss, NaN where nothing fits."""

    kind: str
    coefficient: float


def side(witness: Witness, sign: int, scale: float) -> tuple[Side, Mapping[float, float], str]:
    """The side, the bias at each ratio, and a token that shows a curved coefficient."""
    weights, biases, curved = {}, {}, ""
    for r in (*reversed(DOWN), 1.0, *UP):
        w, biases[r], curvature = witness.token(math.log(r), sign)
        weights[r] = w / scale
        if curvature > TOLERANCE and not curved:
            curved = f"r = {r:g}, A from {sign / 2:g} to {2 * sign}: off a line by {curvature:.1%}"
    law = _law(weights)

    def direction(ratios: tuple[float, ...]) -> Direction:
        def weight(r: float) -> float:
            return witness.token(math.log(r), sign)[0] / scale

        w = np.array([weights[r] for r in ratios])
        return _direction(LAWS[law], np.array(ratios), w, weight) if law else Direction("other")

    return Side(law, direction(UP), direction(DOWN), weights), biases, curved


def _law(weights: Mapping[float, float]) -> str | None:
    """The law of the tokens near ratio 1 that have a weight; None if none fits or but r = 1 has."""
    kept = np.array([r for r in NEAR if abs(weights[r]) > ZERO])
    found = np.array([weights[r] for r in kept])
    if not len(kept) or (kept == 1).all():
        return None
    return next((name for name, law in LAWS.items() if close(found, law(kept)).all()), None)


def _direction(
    law: Callable[[NDArray], NDArray],
    ratios: NDArray,
    weights: NDArray,
    weight: Callable[[float], float],
) -> Direction:
    """How the law goes on along the ratios, which are given from 1 outwards."""
    expected = law(ratios)
    if close(weights, expected).all():
        return Direction("law")
    is_zero = np.abs(weights) <= ZERO
    if is_zero[-2:].all():
        first = int(np.argmax(is_zero))
        edge = find_edge(weight, ratios[first - 1] if first else 1.0, ratios[first])
        as_law = close(weights[:first], expected[:first]).all() and is_zero[first:].all()
        return Direction("zero" if as_law else "other", edge, float(law(np.array(edge))))
    value = weights[-1]
    clip = np.minimum if expected[-1] > expected[0] else np.maximum
    if close(weights[-2], value) and close(weights, clip(expected, value)).all():
        edge = value if close(law(np.array(2.0)), 2) else 1 / value
        return Direction("level", float(edge), float(value))
    return Direction("other")


# --- what does not see the advantage, or sees too much --------------------------------------------

# estimator of a KL divergence to the old policy -> b / coefficient, by the log-ratio l
TO_OLD: Mapping[str, Callable[[NDArray], NDArray]] = {
    "k3": lambda l: np.expm1(-l),
    "k2": lambda l: -l,
    "k1": lambda l: -np.ones_like(l),
    "k3 times the ratio": lambda l: -l * np.exp(l),
}
# the same to a fixed reference -> what b is a line over
TO_FIXED: Mapping[str, Callable[[NDArray], NDArray]] = {
    "k3": lambda logp: np.exp(-logp),
    "k2": lambda logp: logp,
}


def bias(witness: Witness, biases: Mapping[float, float], scale: float) -> Bias | None:
    """The bias by its shape over the ratio, or else over log pi at ratio 1."""
    r = np.array([r for r in biases if 0.2 < r < 6])
    b = np.array([biases[x] for x in r]) / scale
    logp = np.array([LOGP, LOGP + 0.5, LOGP + 1])
    over_logp = np.array([witness.token(0.0, 1, x)[1] for x in logp]) / scale
    if np.abs([*b, *over_logp]).max() <= FLOAT32_NOISE:
        return None
    if _fits(over_logp, over_logp[0], np.abs(b).max()):
        for name, shape in TO_OLD.items():
            l = np.log(r)
            k = float(b @ shape(l) / (shape(l) @ shape(l)))
            if _fits(b, k * shape(l)):
                return Bias(f"KL to the old policy, {name}", k)
    for name, shape in TO_FIXED.items():
        slope, intercept = np.polyfit(shape(logp), over_logp, 1)
        k = float(-intercept if name == "k3" else -slope)
        if not _fits(over_logp, slope * shape(logp) + intercept):
            continue
        if _fits(b, over_logp[0]):
            return Bias(f"KL to a fixed reference, {name}", k)
        if name == "k2" and _fits(b, over_logp[0] * r):
            return Bias("KL to a fixed reference, k3 times the ratio", k)
    return Bias("a term without the advantage, of no known shape", math.nan)


def _fits(found: NDArray, expected: NDArray | float, size: float | None = None) -> bool:
    """Within a share of the size, which is that of the largest one found."""
    allowed = TOLERANCE * (float(np.abs(found).max()) if size is None else size)
    return bool(np.abs(found - expected).max() <= allowed)


def zero_advantage(witness: Witness, biases: Mapping[float, float]) -> float:
    """How far the coefficient at A = 0 is from the bias that the other advantages show."""

    def off(r: float) -> float:
        log_ratio, mask = np.full((1, 1), math.log(r)), np.ones((1, 1))
        c = witness.ask(rows(log_ratio, mask, 0.0, np.asarray(LOGP)))
        return abs(c.item() - biases[r])

    return max(off(r) for r in (0.51, 0.91, 1.0, 1.09, 2.05))


def moved(witness: Witness, scale: float) -> str:
    """A token whose weight another probability changes, with its ratio and advantage the same."""
    for r in (0.91, 1.0, 1.09, 0.71, 1.52, 2.9):
        for sign in (1, -1):
            usual, *_ = witness.token(math.log(r), sign)
            for logp in (-0.5, -2.0, -12.0):
                w, *_ = witness.token(math.log(r), sign, logp)
                if not close(w / scale, usual / scale):
                    return (
                        f"r = {r:g}, A = {sign:+d}: {usual / scale:.4g} at log pi = {LOGP:g}, "
                        f"{w / scale:.4g} at {logp:g}"
                    )
    return ""


def extremes(witness: Witness, scale: float) -> Mapping[tuple[float, int], float]:
    """Weights around the usual clamp; log-ratios of +-1000 nats only for `Witness.not_finite`."""
    for sign in (1, -1):
        witness.token(1000.0, sign, -1.0)
        witness.token(-1000.0, sign, -1001.0)
    return {
        (l, sign): witness.token(l, sign, DEEP)[0] / scale
        for l in (-21.0, -19.0, 19.0, 21.0)
        for sign in (1, -1)
    }
