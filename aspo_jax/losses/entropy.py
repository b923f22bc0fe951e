"""The exact entropy bonus: a term of its own beside the policy loss.

It needs the gradient of the whole distribution, so it is no token coefficient: the caller's
forward pass computes ``entropy_BT`` differentiably, and this adds its aggregate to the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.aggregate import Aggregate, Totals, count_totals
from aspo_jax.losses.objective import require, response_only
from aspo_jax.losses.report import mean_over
from aspo_jax.structs import Metric, Tokens


def entropy_bonus(
    tokens: Tokens, *, scale: float, aggregate: Aggregate, totals: Totals | None = None
) -> tuple[Array, dict[str, Metric]]:
    """``- scale sum_t a_t H_t``, to be added to the policy loss, and the metric ``entropy``.

    tokens: ``entropy_BT`` (nats) carries the gradient; masked tokens change nothing.
    totals: as in `policy_loss`, so that parts of a mini-batch add up.

    Raises:
        ValueError: ``entropy_BT`` is None.
    """
    tokens = response_only(tokens)
    entropy_BT = require(tokens, "entropy_BT", "entropy_bonus")
    totals = count_totals(tokens) if totals is None else totals
    loss = -scale * jnp.sum(aggregate(tokens, totals) * entropy_BT)
    return loss, {"entropy": mean_over(jax.lax.stop_gradient(entropy_BT), tokens.is_response_BT)}
