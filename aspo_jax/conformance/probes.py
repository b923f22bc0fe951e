"""Everything that is asked of a loss, in the order in which a verdict needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aspo_jax.conformance.asking import ZERO, Witness
from aspo_jax.conformance.calling import Loss
from aspo_jax.conformance.several import (
    Aggregation,
    Coupling,
    Split,
    aggregation,
    coupling,
    masked,
    split,
)
from aspo_jax.conformance.single import (
    Bias,
    Side,
    bias,
    extremes,
    moved,
    side,
    zero_advantage,
)


class Measured(NamedTuple):
    """All that was found. scale: weight at r = 1, A > 0, without its sign; 1 if there is none.

    zero_advantage: largest |c - b| at A = 0. curved, moved, masked, not_finite: the tokens that
    show a coefficient which is not linear in A, a weight that depends on the probability, a mask
    that is not kept, a gradient that is no number; empty if none does.
    aggregation: None where the mean is not the loss's own. split: None without an entropy.
    extremes: (log-ratio, A) -> weight at log pi = -40.
    """

    scale: float
    positive: Side
    negative: Side
    bias: Bias | None
    zero_advantage: float
    curved: str
    moved: str
    masked: str
    not_finite: str
    coupling: tuple[Coupling, Coupling]
    aggregation: Aggregation | None
    split: Split | None
    extremes: Mapping[tuple[float, int], float]


def measure(loss: Loss) -> Measured:
    """Ask the loss everything."""
    witness = Witness(loss)
    with np.errstate(all="ignore"):
        scale = abs(witness.token(0.0, 1)[0])
        scale = scale if math.isfinite(scale) and scale > ZERO**2 else 1.0
        positive, bias_positive, curved_positive = side(witness, 1, scale)
        negative, _, curved_negative = side(witness, -1, scale)
        return Measured(
            scale,
            positive,
            negative,
            bias(witness, bias_positive, scale),
            zero_advantage(witness, bias_positive),
            curved_positive or curved_negative,
            moved(witness, scale),
            masked(witness),
            coupling=(coupling(witness, 1, positive), coupling(witness, -1, negative)),
            aggregation=None if loss.is_mean_ours else aggregation(witness, scale),
            split=split(witness) if loss.takes_entropy else None,
            extremes=extremes(witness, scale),
            not_finite=witness.not_finite,
        )
