"""The equations: objectives, advantages, aggregates. Needs jax alone; import it in a notebook.

    >>> from math import log
    >>> import jax.numpy as jnp
    >>> tokens = Tokens(  # one response of two tokens; the second has become twice as likely
    ...     logp_BT=jnp.array([[log(0.5), log(0.5)]]),
    ...     old_logp_BT=jnp.array([[log(0.5), log(0.25)]]),
    ...     advantage_BT=jnp.ones((1, 2)),
    ...     is_response_BT=jnp.ones((1, 2), bool),
    ... )
    >>> loss, metrics = policy_loss(aspo(clip_high=1.0), tokens, aggregate=token_mean)
    >>> round(float(loss), 3)  # -(1 log 0.5 + 1/2 log 0.5) / 2: its weight is the inverse ratio
    0.52
    >>> clipped = metrics["clip_share"]  # a metric is a sum and a count, so that parts add up
    >>> float(clipped.total / clipped.count)
    0.0

`objective` says what an objective is; `aspo.py`, `ppo.py`, `cispo.py`, `gspo.py`, `kl.py` and
`entropy.py` hold one family of rules each; `report.py` names the metrics that every rule gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aspo_jax.losses.advantages import Advantage, group_mean, group_zscore, leave_one_out
from aspo_jax.losses.aggregate import (
    Aggregate,
    Totals,
    count_totals,
    fixed_length,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from aspo_jax.losses.aspo import archer2, aspo, is_low_entropy
from aspo_jax.losses.cispo import cispo
from aspo_jax.losses.entropy import entropy_bonus
from aspo_jax.losses.gspo import gspo
from aspo_jax.losses.kl import kl_penalty, low_entropy_kl
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    Predicate,
    chain,
    log_ratio,
    policy_loss,
    ratio,
    reads,
    response_only,
    select,
    trace,
)
from aspo_jax.losses.ppo import (
    dapo,
    grpo,
    grpo_without_is,
    positive_response_mean,
    ppo_clip,
    reinforce,
)
from aspo_jax.losses.report import WEIGHT_BIN_EDGES, histogram_quantile, mean_over, weight_histogram
from aspo_jax.structs import Tokens

# name -> factory; a factory's keyword arguments are its hyper-parameters
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "archer2": archer2,
    "aspo": aspo,
    "cispo": cispo,
    "dapo": dapo,
    "grpo": grpo,
    "grpo_without_is": grpo_without_is,
    "gspo": gspo,
    "kl_penalty": kl_penalty,
    "low_entropy_kl": low_entropy_kl,
    "positive_response_mean": positive_response_mean,
    "ppo_clip": ppo_clip,
    "reinforce": reinforce,
}
ADVANTAGES: Mapping[str, Callable[..., Advantage]] = {
    "group_mean": group_mean,
    "group_zscore": group_zscore,
    "leave_one_out": leave_one_out,
}
AGGREGATES: Mapping[str, Callable[..., Aggregate]] = {
    "fixed_length": fixed_length,
    "sequence_mean": lambda: sequence_mean,
    "sequence_sum": lambda: sequence_sum,
    "token_mean": lambda: token_mean,
}

__all__ = [
    "ADVANTAGES",
    "AGGREGATES",
    "OBJECTIVES",
    "WEIGHT_BIN_EDGES",
    "Advantage",
    "Aggregate",
    "Coefficient",
    "Objective",
    "Predicate",
    "Tokens",
    "Totals",
    "archer2",
    "aspo",
    "chain",
    "cispo",
    "count_totals",
    "dapo",
    "entropy_bonus",
    "fixed_length",
    "group_mean",
    "group_zscore",
    "grpo",
    "grpo_without_is",
    "gspo",
    "histogram_quantile",
    "is_low_entropy",
    "kl_penalty",
    "leave_one_out",
    "log_ratio",
    "low_entropy_kl",
    "mean_over",
    "policy_loss",
    "positive_response_mean",
    "ppo_clip",
    "ratio",
    "reads",
    "reinforce",
    "response_only",
    "select",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
    "trace",
    "weight_histogram",
]
