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

`objective` says what an objective is and composes them, `advantages` what an advantage is; the
other files hold a family of rules each. `report` names the metrics that every rule gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aspo_jax.losses.advantages import (
    Advantage,
    Groups,
    Past,
    UnfitReward,
    advantages_of,
    asks,
    batch_zscore,
    group_mean,
    group_zscore,
    leave_one_out,
    maxrl,
    opo,
    shifted_mean,
    token_group_zscore,
    zero,
)
from aspo_jax.losses.aggregate import (
    Aggregate,
    Totals,
    count_totals,
    fixed_length,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from aspo_jax.losses.archer import archer
from aspo_jax.losses.aspo import archer2, aspo, is_low_entropy
from aspo_jax.losses.bounded import ce_gppo, dcpo, dispo, gppo, minirl, nll_bonus
from aspo_jax.losses.cispo import cispo
from aspo_jax.losses.corrections import (
    geometric_rejection,
    icepop,
    k3_rejection,
    mis,
    opsm,
    outlier_veto,
    seq_mask_tis,
    sequence_mask,
    tis,
)
from aspo_jax.losses.coupled import BAPO_PUBLISHED, bapo, hapo, p3o, real
from aspo_jax.losses.covariance import clip_cov, kl_cov
from aspo_jax.losses.distill import distill, with_teacher
from aspo_jax.losses.entropy import entropy_bonus
from aspo_jax.losses.gdpo import gdpo
from aspo_jax.losses.grouped import copg, gbpo, reg_grpo
from aspo_jax.losses.gspo import gspo
from aspo_jax.losses.kl import kl_penalty, low_entropy_kl
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    Predicate,
    chain,
    coefficient_of,
    log_ratio,
    per_microbatch,
    policy_loss,
    ratio,
    reads,
    response_only,
    select,
    trace,
)
from aspo_jax.losses.passk import grpo_passk, passk
from aspo_jax.losses.past import prompt_smooth, visited
from aspo_jax.losses.position import otb
from aspo_jax.losses.ppo import (
    dapo,
    grpo,
    grpo_without_is,
    positive_response_mean,
    ppo_clip,
    reinforce,
)
from aspo_jax.losses.prefix import ctpo, fipo, minpro
from aspo_jax.losses.regression import asymre, kimi_opmd, opmd, rec
from aspo_jax.losses.report import WEIGHT_BIN_EDGES, histogram_quantile, mean_over, weight_histogram
from aspo_jax.losses.sequence import apc, dhpo, fiberpo, gmpo, vespo
from aspo_jax.losses.smooth import delightful, mhpo, r2vpo, sapo
from aspo_jax.losses.trust import cppo, dis, dppo_kl, dppo_tv, drpo, ripo, up
from aspo_jax.structs import Tokens

# name -> factory; a factory's keyword arguments are its hyper-parameters
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "apc": apc,
    "archer": archer,
    "archer2": archer2,
    "aspo": aspo,
    "asymre": asymre,
    "bapo": bapo,
    "ce_gppo": ce_gppo,
    "cispo": cispo,
    "clip_cov": clip_cov,
    "copg": copg,
    "cppo": cppo,
    "ctpo": ctpo,
    "dapo": dapo,
    "dcpo": dcpo,
    "delightful": delightful,
    "dhpo": dhpo,
    "dis": dis,
    "dispo": dispo,
    "distill": distill,
    "dppo_kl": dppo_kl,
    "dppo_tv": dppo_tv,
    "drpo": drpo,
    "fiberpo": fiberpo,
    "fipo": fipo,
    "gbpo": gbpo,
    "geometric_rejection": geometric_rejection,
    "gmpo": gmpo,
    "gppo": gppo,
    "grpo": grpo,
    "grpo_without_is": grpo_without_is,
    "gspo": gspo,
    "hapo": hapo,
    "icepop": icepop,
    "k3_rejection": k3_rejection,
    "kimi_opmd": kimi_opmd,
    "kl_cov": kl_cov,
    "kl_penalty": kl_penalty,
    "low_entropy_kl": low_entropy_kl,
    "mhpo": mhpo,
    "minirl": minirl,
    "minpro": minpro,
    "mis": mis,
    "nll_bonus": nll_bonus,
    "opmd": opmd,
    "opsm": opsm,
    "otb": otb,
    "outlier_veto": outlier_veto,
    "p3o": p3o,
    "positive_response_mean": positive_response_mean,
    "ppo_clip": ppo_clip,
    "r2vpo": r2vpo,
    "real": real,
    "rec": rec,
    "reg_grpo": reg_grpo,
    "reinforce": reinforce,
    "ripo": ripo,
    "sapo": sapo,
    "seq_mask_tis": seq_mask_tis,
    "sequence_mask": sequence_mask,
    "tis": tis,
    "up": up,
    "vespo": vespo,
}
ADVANTAGES: Mapping[str, Callable[..., Advantage]] = {
    "batch_zscore": batch_zscore,
    "gdpo": gdpo,
    "group_mean": group_mean,
    "group_zscore": group_zscore,
    "grpo_passk": grpo_passk,
    "leave_one_out": leave_one_out,
    "maxrl": maxrl,
    "none": zero,
    "opo": opo,
    "passk": passk,
    "prompt_smooth": prompt_smooth,
    "shifted_mean": shifted_mean,
    "token_group_zscore": token_group_zscore,
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
    "BAPO_PUBLISHED",
    "OBJECTIVES",
    "WEIGHT_BIN_EDGES",
    "Advantage",
    "Aggregate",
    "Coefficient",
    "Groups",
    "Objective",
    "Past",
    "Predicate",
    "Tokens",
    "Totals",
    "UnfitReward",
    "advantages_of",
    "apc",
    "archer",
    "archer2",
    "asks",
    "aspo",
    "asymre",
    "bapo",
    "batch_zscore",
    "ce_gppo",
    "chain",
    "cispo",
    "clip_cov",
    "coefficient_of",
    "copg",
    "count_totals",
    "cppo",
    "ctpo",
    "dapo",
    "dcpo",
    "delightful",
    "dhpo",
    "dis",
    "dispo",
    "distill",
    "dppo_kl",
    "dppo_tv",
    "drpo",
    "entropy_bonus",
    "fiberpo",
    "fipo",
    "fixed_length",
    "gbpo",
    "gdpo",
    "geometric_rejection",
    "gmpo",
    "gppo",
    "group_mean",
    "group_zscore",
    "grpo",
    "grpo_passk",
    "grpo_without_is",
    "gspo",
    "hapo",
    "histogram_quantile",
    "icepop",
    "is_low_entropy",
    "k3_rejection",
    "kimi_opmd",
    "kl_cov",
    "kl_penalty",
    "leave_one_out",
    "log_ratio",
    "low_entropy_kl",
    "maxrl",
    "mean_over",
    "mhpo",
    "minirl",
    "minpro",
    "mis",
    "nll_bonus",
    "opmd",
    "opo",
    "opsm",
    "otb",
    "outlier_veto",
    "p3o",
    "passk",
    "per_microbatch",
    "policy_loss",
    "positive_response_mean",
    "ppo_clip",
    "prompt_smooth",
    "r2vpo",
    "ratio",
    "reads",
    "real",
    "rec",
    "reg_grpo",
    "reinforce",
    "response_only",
    "ripo",
    "sapo",
    "select",
    "seq_mask_tis",
    "sequence_mask",
    "sequence_mean",
    "sequence_sum",
    "shifted_mean",
    "tis",
    "token_group_zscore",
    "token_mean",
    "trace",
    "up",
    "vespo",
    "visited",
    "weight_histogram",
    "with_teacher",
    "zero",
]
