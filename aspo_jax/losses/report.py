"""What every rule is measured by. A rule may add metrics of its own; its docstring names them.

    ratio_kl                 mean of r - 1 - log r, nats; estimates KL(old || new)
    abs_log_ratio_max        largest |log r|, nats, before any clamp
    clip_share               share of tokens with A != 0 whose weight is 0
    clip_share_positive      the same among tokens with A > 0
    clip_share_negative      the same among tokens with A < 0
    response_ratio_positive  mean over responses with A > 0 of the response's mean ratio
    response_ratio_negative  the same for A < 0
    weight_positive          histogram of the weight over `WEIGHT_BIN_EDGES`, tokens with A > 0
    weight_negative          the same for A < 0
    surrogate                published loss value; see `surrogate_metric`

with ``r = pi_theta / pi_old``. All of them add up over micro-batches and devices.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from aspo_jax.losses.segment import segment_count
from aspo_jax.structs import Histogram, Max, Mean, Metric, Tokens

# Log-spaced by 2.5 %, from e^-5 to e^5; the weight 1 of an on-policy token is the middle of a bin.
WEIGHT_BIN_EDGES = np.exp(0.025 * np.arange(-199.5, 200.0)).astype(np.float32)


def mean_over(x_BT: Array, mask_BT: Array) -> Mean:
    """Mean of x (numbers or booleans) over the tokens where the mask is True."""
    x_BT = x_BT.astype(jnp.promote_types(x_BT.dtype, jnp.float32))
    return Mean(jnp.where(mask_BT, x_BT, 0).sum(), mask_BT.sum().astype(jnp.float32))


def weight_histogram(weight_BT: Array, mask_BT: Array) -> Histogram:
    """Counts ``[len(edges) + 1]``: below the first edge (clipped tokens), the bins, above the last.

    Integers: a float32 count stops at 2^24, and most weights fall into one bin.
    """
    bins = len(WEIGHT_BIN_EDGES) + 1
    bin_BT = jnp.searchsorted(WEIGHT_BIN_EDGES, weight_BT.astype(jnp.float32), side="right")
    counts = jnp.zeros(bins, jnp.int32).at[bin_BT].add(mask_BT.astype(jnp.int32))
    return Histogram(counts)


def histogram_quantile(counts: np.ndarray, edges: np.ndarray, q: float) -> float:
    """The q-quantile of a `Histogram` over log-spaced edges, on the host; NaN when it is empty.

    Interpolated geometrically inside a bin. A quantile below the first edge is reported as 0
    (for weights: a clipped token), one above the last edge as that edge.
    """
    counts = np.asarray(counts, np.float64)
    if counts.sum() == 0:
        return float("nan")
    rank = q * counts.sum()
    cumulative = np.cumsum(counts)
    slot = int(np.searchsorted(cumulative, rank, side="left"))
    slot = max(slot, int(np.flatnonzero(counts)[0]))
    if slot == 0:
        return 0.0
    if slot >= len(edges):
        return float(edges[-1])
    share = (rank - cumulative[slot - 1]) / counts[slot]
    return float(edges[slot - 1] * (edges[slot] / edges[slot - 1]) ** np.clip(share, 0.0, 1.0))


def surrogate_metric(
    surrogate_BT: Array, aggregate_BT: Array, tokens: Tokens, totals_tokens: Array
) -> Mean:
    """The published loss value ``sum_t a_t value_t`` of the mini-batch.

    The count is this part's share of the mini-batch's response tokens: parts add up to a count
    of 1, so the merged mean is the mini-batch's value under every aggregate, and the mean over
    several mini-batches is the mean of their values.
    """
    total = jnp.sum(jnp.where(tokens.is_response_BT, aggregate_BT * surrogate_BT, 0))
    return Mean(total, tokens.is_response_BT.sum() / jnp.maximum(totals_tokens, 1))


def weight_metrics(weight_BT: Array, tokens: Tokens, log_ratio_BT: Array) -> dict[str, Metric]:
    """The rule-agnostic metrics of the table above, from the weight ``[B, T]`` and log r.

    log_ratio_BT is the clamped log-ratio that the rules see.
    """
    is_response_BT, advantage_BT = tokens.is_response_BT, tokens.advantage_BT
    is_positive_BT = is_response_BT & (advantage_BT > 0)
    is_negative_BT = is_response_BT & (advantage_BT < 0)
    is_clipped_BT = weight_BT == 0
    ratio_BT = jnp.exp(log_ratio_BT)
    share_BT = 1 / segment_count(tokens)  # of its sequence: shares count sequences

    def over_responses(mask_BT: Array) -> Mean:
        return Mean(
            jnp.where(mask_BT, ratio_BT * share_BT, 0).sum(), jnp.where(mask_BT, share_BT, 0).sum()
        )

    gap_BT = jnp.abs(tokens.logp_BT - tokens.old_logp_BT)
    return {
        "ratio_kl": mean_over(jnp.expm1(log_ratio_BT) - log_ratio_BT, is_response_BT),
        "abs_log_ratio_max": Max(jnp.where(is_response_BT, gap_BT, 0).max()),
        "clip_share": mean_over(is_clipped_BT, is_positive_BT | is_negative_BT),
        "clip_share_positive": mean_over(is_clipped_BT, is_positive_BT),
        "clip_share_negative": mean_over(is_clipped_BT, is_negative_BT),
        "response_ratio_positive": over_responses(is_positive_BT),
        "response_ratio_negative": over_responses(is_negative_BT),
        "weight_positive": weight_histogram(weight_BT, is_positive_BT),
        "weight_negative": weight_histogram(weight_BT, is_negative_BT),
    }
