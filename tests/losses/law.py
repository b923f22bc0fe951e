"""What a rule is held to, and what the surrogates of the laws are written with.

A surrogate is written as its paper writes it, with min, max, clip and stop_gradient, and shares no
line with the library. A family of rules has its laws in a file ``law_<family>.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aspo_jax.losses import Objective

sg = jax.lax.stop_gradient


class Law(NamedTuple):
    """A rule and what is published of it.

    rule: with hyper-parameters that make the random cases reach every branch.
    surrogate: (logp_BT, tokens) -> the published loss of each token. Its sum over the response
        tokens is what is differentiated, so a term may stand on any one of them.
    at_one: weight of every token at ratio 1, a number or a function of the tokens; None: not one.
    bias_at_one: the same of the bias; None: not one, for it depends on more than the ratio.
    per_token: whether the law holds for advantages that differ within a sequence.
    """

    rule: Objective
    surrogate: Callable[[jax.Array, Any], jax.Array]
    at_one: Any = 1.0
    bias_at_one: Any = 0.0
    per_token: bool = True


def log_ratio_of(logp, t):
    """The log-ratio to the old policy, clamped to +-20 nats."""
    return jnp.clip(logp - t.old_logp_BT, -20, 20)


def ratio_of(logp, t):
    """The ratio to the old policy."""
    return jnp.exp(log_ratio_of(logp, t))


def row_sum(x, t):
    """Sum over the response tokens of each row, [B, 1]: the cases have one sequence a row."""
    return jnp.where(t.is_response_BT, x, 0).sum(-1, keepdims=True)


def row_mean(x, t):
    """Mean over the response tokens of each row, [B, 1]."""
    return row_sum(x, t) / t.is_response_BT.sum(-1, keepdims=True)
