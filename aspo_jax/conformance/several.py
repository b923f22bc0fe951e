"""Several tokens: whose ratio a weight is taken of, how tokens are averaged, what a mask does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aspo_jax.conformance.asking import ZERO, Witness, close, find_edge, rows
from aspo_jax.conformance.single import LAWS, Side


class Coupling(NamedTuple):
    """Which ratio a token's weight is taken of, and which one its gate looks at.

    ratio: "token", or of its sequence "geometric" or "arithmetic" mean, "product", or "other".
    """

    ratio: str
    gate: Literal["token", "sequence", "none"]


class Aggregation(NamedTuple):
    """How tokens are averaged. number: the length of "fixed_length", a factor for the others."""

    name: str
    number: float
    shares: str  # of the tokens of two sequences, 3 and 1 long


class Split(NamedTuple):
    """Clip widths (low, high) of the tokens of lowest and of highest entropy of five."""

    lowest: tuple[float, float]
    highest: tuple[float, float]


def coupling(witness: Witness, sign: int, side: Side) -> Coupling:
    """What two tokens of a sequence get when the ratio of the first moves inwards, off its gate."""
    if side.law not in ("r", "1/r"):
        return Coupling("token", "none")

    def weights(*log_ratio: float) -> NDArray:
        return witness.line(np.array([log_ratio]), sign).w[0]

    def law(x: float) -> NDArray:
        return LAWS[side.law or ""](np.array(x))

    step, at_one = -0.1 * sign, weights(0.0, 0.0)
    found = weights(step, 0.0) / at_one
    expected = {
        "token": (law(math.exp(step)), 1.0),
        "geometric": (law(math.exp(step / 2)),) * 2,
        "product": (law(math.exp(step)),) * 2,
        "arithmetic": (law((math.exp(step) + 1) / 2),) * 2,
    }
    ratio = next((n for n, w in expected.items() if close(found, np.array(w)).all()), "other")
    outward = side.up if sign > 0 else side.down
    if outward.kind != "zero":
        return Coupling(ratio, "none")
    beyond = 2 * math.log(outward.edge)
    is_dropped = abs(weights(beyond, -beyond)[0]) <= ZERO * abs(at_one[0])
    return Coupling(ratio, "token" if is_dropped else "sequence")


# Sequences of 3 and 1 tokens, with a hole and padding; and of 2, 1 and 4, in a wider batch.
RAGGED = (
    np.array([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]),
    np.array([[0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0]]),
)

# name -> the share of every response token, from the mask
AVERAGES: Mapping[str, Callable[[NDArray], NDArray]] = {
    "token_mean": lambda m: m / m.sum(),
    "sequence_mean": lambda m: m / (len(m) * m.sum(1, keepdims=True)),
    "sequence_sum": lambda m: m / len(m),
    "sum": lambda m: m,
    "mean over all slots, padding included": lambda m: m / m.size,
    "sum of sequence means": lambda m: m / m.sum(1, keepdims=True),
}


def _ragged(mask: NDArray, masked_ratio: float, masked_logp: float) -> tuple[NDArray, NDArray]:
    """Log-ratios and log-probabilities: ratio 1 on the response, anything where it is masked."""
    return np.where(mask, 0.0, masked_ratio), np.where(mask, -2.0, masked_logp)


def aggregation(witness: Witness, scale: float) -> Aggregation:
    """How tokens are averaged, from the shares that they have of the loss at ratio 1."""
    shares, alone = [], math.copysign(scale, witness.token(0.0, 1)[0])
    for mask in RAGGED:
        log_ratio, logp = _ragged(mask, 0.5, -3.0)
        shares.append(witness.line(log_ratio, 1, mask, logp).w[mask > 0] / alone)
    shown = " and ".join(f"{share:.4g}" for share in shares[0][[0, -1]] * scale)
    for name, average in AVERAGES.items():
        expected = [average(mask)[mask > 0] for mask in RAGGED]
        if all(close(a, b).all() for a, b in zip(shares, expected, strict=True)):
            is_fixed = name == "sequence_sum" and not close(scale, 1)
            return Aggregation(*(("fixed_length", 1 / scale) if is_fixed else (name, scale)), shown)
    return Aggregation("other", math.nan, shown)


def masked(witness: Witness) -> str:
    """A masked token that has a gradient, or changes that of others."""
    mask = RAGGED[0]
    for sign in (1, -1):
        first, other = (
            witness.ask(rows(log_ratio, mask, sign, logp, np.where(mask, 1.0, entropy)))
            for (log_ratio, logp), entropy in (
                (_ragged(mask, 0.5, -3.0), 0.5),
                (_ragged(mask, -1.0, -9.0), 2.0),
            )
        )
        for c in (first, other):
            if not (c[mask == 0] == 0).all():
                place, value = np.argwhere((mask == 0) & (c != 0))[0], c[mask == 0]
                return f"masked token {tuple(map(int, place))} has {value[value != 0][0]:.4g}"
        if not close(first, other).all():
            place = np.argwhere(~close(first, other))[0]
            return f"what is masked changes the response token {tuple(map(int, place))}"
    return ""


def split(witness: Witness) -> Split:
    """Edges of the tokens of lowest and highest entropy of five, the others at ratio 1."""
    entropy = np.array([[0.3, 0.1, 0.2, 0.9, 0.4]])

    def width(token: int, sign: int) -> float:
        def weight(r: float) -> float:
            log_ratio = np.zeros((1, 5))
            log_ratio[0, token] = math.log(r)
            return witness.line(log_ratio, sign, entropy=entropy).w[0, token]

        return abs(find_edge(weight, 1.0, 10.0**sign) - 1)

    lowest, highest = ((width(token, -1), width(token, 1)) for token in (1, 3))
    return Split(lowest, highest)
