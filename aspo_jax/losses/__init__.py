"""The equations: objectives, advantages, aggregates. Needs jax alone; import it in a notebook.

`objective` says what an objective is; `aspo.py`, `ppo.py`, `cispo.py`, `gspo.py`, `kl.py` and
`entropy.py` hold one family of rules each; `report.py` names the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aspo_jax.losses.advantages import Advantage as Advantage
from aspo_jax.losses.advantages import group_mean as group_mean
from aspo_jax.losses.advantages import group_zscore as group_zscore
from aspo_jax.losses.advantages import leave_one_out as leave_one_out
from aspo_jax.losses.aggregate import Aggregate as Aggregate
from aspo_jax.losses.aggregate import Totals as Totals
from aspo_jax.losses.aggregate import count_totals as count_totals
from aspo_jax.losses.aggregate import fixed_length as fixed_length
from aspo_jax.losses.aggregate import sequence_mean as sequence_mean
from aspo_jax.losses.aggregate import sequence_sum as sequence_sum
from aspo_jax.losses.aggregate import token_mean as token_mean
from aspo_jax.losses.aspo import archer2 as archer2
from aspo_jax.losses.aspo import aspo as aspo
from aspo_jax.losses.aspo import is_low_entropy as is_low_entropy
from aspo_jax.losses.cispo import cispo as cispo
from aspo_jax.losses.entropy import entropy_bonus as entropy_bonus
from aspo_jax.losses.gspo import gspo as gspo
from aspo_jax.losses.kl import kl_penalty as kl_penalty
from aspo_jax.losses.kl import low_entropy_kl as low_entropy_kl
from aspo_jax.losses.objective import Coefficient as Coefficient
from aspo_jax.losses.objective import Objective as Objective
from aspo_jax.losses.objective import Predicate as Predicate
from aspo_jax.losses.objective import chain as chain
from aspo_jax.losses.objective import policy_loss as policy_loss
from aspo_jax.losses.objective import reads as reads
from aspo_jax.losses.objective import response_only as response_only
from aspo_jax.losses.objective import select as select
from aspo_jax.losses.objective import trace as trace
from aspo_jax.losses.ppo import dapo as dapo
from aspo_jax.losses.ppo import grpo as grpo
from aspo_jax.losses.ppo import grpo_without_is as grpo_without_is
from aspo_jax.losses.ppo import positive_response_mean as positive_response_mean
from aspo_jax.losses.ppo import ppo_clip as ppo_clip
from aspo_jax.losses.ppo import reinforce as reinforce
from aspo_jax.losses.report import WEIGHT_BIN_EDGES as WEIGHT_BIN_EDGES
from aspo_jax.losses.report import histogram_quantile as histogram_quantile
from aspo_jax.structs import Tokens as Tokens


def _token_mean() -> Aggregate:
    return token_mean


def _sequence_mean() -> Aggregate:
    return sequence_mean


def _sequence_sum() -> Aggregate:
    return sequence_sum


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
    "sequence_mean": _sequence_mean,
    "sequence_sum": _sequence_sum,
    "token_mean": _token_mean,
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
    "low_entropy_kl",
    "policy_loss",
    "positive_response_mean",
    "ppo_clip",
    "reads",
    "reinforce",
    "response_only",
    "select",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
    "trace",
]
