"""Rules in which a response is held against the others of its prompt.

They read sums per prompt over the whole mini-batch, in which no prompt's responses are missing, and
cost one more forward pass for them.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.clip import ratio_weight
from aspo_jax.losses.objective import (
    Coefficient,
    Objective,
    accurate,
    log_ratio,
    ratio_bounds,
    require,
    require_non_negative,
    require_positive,
    weight_only,
)
from aspo_jax.losses.segment import (
    of_group,
    segment_count,
    segment_quantile,
    sums_per_group,
    sums_per_sequence,
    to_tokens,
)
from aspo_jax.structs import Tokens


def _sums_over_responses(x_BT: Array, tokens: Tokens, rule: str) -> Array:
    """Sum per prompt of what the responses' first tokens have, ``[B T + 1]``."""
    group_id_BT = require(tokens, "group_id_BT", rule)
    x_BT = jnp.where(require(tokens, "position_BT", rule) == 0, x_BT, 0)
    return sums_per_group(x_BT, group_id_BT, tokens)


def _of_group(x_K: Array, tokens: Tokens, rule: str) -> Array:
    return of_group(x_K, require(tokens, "group_id_BT", rule))


def _response_log_ratio(logp_BT: Array, other_logp_BT: Array, tokens: Tokens) -> Array:
    """Sum of log pi - log other over the token's response, ``[B, T]``."""
    gap_BT = accurate(logp_BT) - accurate(other_logp_BT)
    return to_tokens(sums_per_sequence(gap_BT, tokens), tokens)


def copg(*, beta: float) -> Objective:
    """CoPG, contrastive policy gradient: leave-one-out with the current KL in the reward.

        rho_i = sum_t (log pi - log pi_ref) over response i
        w = 1        b = -beta (rho_i - mean of the others' rho in its group)

    Published loss, a pair (i, j) of a group: ``-(D_i - D_j) (rho_i - rho_j)`` with
    ``D = R - beta/2 rho``, both factors differentiated. Goes with ``leave_one_out`` and
    ``sequence_sum``; the advantages alone carry R.

    beta: weight of the KL, in reward per nat, 0 or more; no published value was found.

    No ratio to pi_old and no clip: any responses will do, whoever wrote them. A response alone in
    its group has no others: its b is 0. The loss as sometimes printed lacks the 1/2.
    Needs ``ref_logp_BT``, ``group_id_BT`` and ``position_BT``. Costs a forward pass.
    Source: arXiv 2406.19185.
    Confidence: medium: the paper's structure; the constants were derived.
    """
    require_non_negative("copg", beta=beta)

    def rho(tokens: Tokens) -> Array:
        ref_logp_BT = require(tokens, "ref_logp_BT", "copg")
        return _response_log_ratio(tokens.logp_BT, ref_logp_BT, tokens)

    def prepare(tokens, state):
        rho_BT = rho(tokens)
        parts = (rho_BT, jnp.ones_like(rho_BT))
        return tuple(_sums_over_responses(x_BT, tokens, "copg") for x_BT in parts)

    def coefficient(tokens, state, stats):
        rho_BT = rho(tokens)
        sum_BT, count_BT = (_of_group(x_K, tokens, "copg") for x_K in stats)
        others_BT = (sum_BT - rho_BT) / jnp.maximum(count_BT - 1, 1)
        bias_BT = jnp.where(count_BT > 1, -beta * (rho_BT - others_BT), 0)
        gap_BT = accurate(tokens.logp_BT) - accurate(tokens.ref_logp_BT)
        value_BT = -(tokens.advantage_BT + bias_BT / 2) * gap_BT
        return Coefficient(jnp.ones_like(rho_BT), bias_BT, {}, value_BT)

    return Objective(coefficient, prepare)


def reg_grpo(*, sigma_floor: float) -> Objective:
    """Experimental: Reg-GRPO (DeepVideo-R1), which regresses advantages on z-scored log-ratios.

        rho_i = sum_t log r over response i        z = (rho - mean) / sigma, over its group
        w = 2 / sigma        b = -(2 / sigma) (mean A + z mean(A z))
        sigma: the group's standard deviation of rho, at least sigma_floor; on the floor it is a
            constant, and b = -(2 / sigma) (mean A + z)

    Published loss, of a response: ``(A - z)^2``, mean and sigma differentiated; goes with
    ``sequence_sum``, advantages from ``group_zscore``, whose mean A is 0.

    sigma_floor: least sigma, in nats of a whole response, above 0. On-policy sigma is 0 and the
        published formula 0/0; near it the weight is 2 / sigma: 100 at 0.02, 2000 at 0.001.

    In a group of two z is +-1 whatever the policy does: above the floor it has no gradient.
    Needs ``group_id_BT`` and ``position_BT``. Costs a forward pass.
    Unverified: whether the authors have a floor, whether they differentiate sigma, their KL weight.
    Source: arXiv 2506.07464.
    Confidence: low: the text, whose formulas are missing in the copy that was read.
    """
    require_positive("reg_grpo", sigma_floor=sigma_floor)

    def rho(tokens: Tokens) -> Array:
        return _response_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens)

    def prepare(tokens, state):
        rho_BT = rho(tokens)
        count_K = _sums_over_responses(jnp.ones_like(rho_BT), tokens, "reg_grpo")

        def mean(x_BT: Array) -> Array:
            return _sums_over_responses(x_BT, tokens, "reg_grpo") / jnp.maximum(count_K, 1)

        mean_K = mean(rho_BT)
        gap_BT = rho_BT - _of_group(mean_K, tokens, "reg_grpo")
        spread_K = jnp.sqrt(mean(jnp.square(gap_BT)))
        sigma_K = jnp.maximum(spread_K, sigma_floor)
        match_K = mean(tokens.advantage_BT * gap_BT) / sigma_K
        match_K = jnp.where(spread_K > sigma_floor, match_K, 1)
        return mean_K, sigma_K, match_K, mean(tokens.advantage_BT)

    def coefficient(tokens, state, stats):
        mean_BT, sigma_BT, match_BT, advantage_BT = (
            _of_group(x_K, tokens, "reg_grpo") for x_K in stats
        )
        z_BT = (rho(tokens) - mean_BT) / sigma_BT
        weight_BT = 2 / sigma_BT
        bias_BT = -weight_BT * (advantage_BT + z_BT * match_BT)
        value_BT = jnp.square(tokens.advantage_BT - z_BT) / segment_count(tokens)
        return Coefficient(weight_BT, bias_BT, {}, value_BT)

    return Objective(coefficient, prepare)


def _median_per_group(x_BT: Array, group_id_BT: Array, tokens: Tokens) -> Array:
    """Median of what the responses' first tokens have, at the prompt's number: ``[B T + 1]``.

    The mini-batch as one row in which the prompts are the sequences, the responses their tokens.
    """
    is_first_BT = tokens.is_response_BT & (require(tokens, "position_BT", "gbpo") == 0)
    group_1K = group_id_BT.reshape(1, -1)
    row = dataclasses.replace(
        tokens, is_response_BT=is_first_BT.reshape(1, -1), sequence_id_BT=group_1K + 1
    )
    median_1K = segment_quantile(x_BT.reshape(1, -1), row, 0.5)
    return jnp.zeros(x_BT.size + 1, x_BT.dtype).at[group_1K].set(median_1K)


def gbpo(*, clip_low: float = 0.2, clip_high: float = 0.2, temperature: float = 1.0) -> Objective:
    """GBPO, bounded ratio RL: each token's ratio is drawn to a target, from either side.

        target = 1 - clip_low + (clip_low + clip_high) sigmoid((A - median A) / temperature)
        w = r sign(A) sign(target - r)

    Published surrogate: ``|A| |r - target|``, the median over the group. PPO's weight before the
    bound, its negative beyond it. Goes with ``group_zscore`` and ``token_mean``.

    clip_low, clip_high: how far the target may lie from 1, widths; 0 to 1 and 0 or more.
    temperature: of the target, in standard deviations of the reward, above 0. Their scripts have
        1e-4, with widths of 0.3 and 10 epochs: then the target of a 0/1 reward is a bound, or the
        middle for answers of the group's majority, which are only held there.

    At the target itself w is 0. With equal widths that is where the majority starts, so on the
    first mini-batch it has no gradient; where half of the answers are right, both halves move.
    The median is taken of A itself: A must be a z-score over the group's responses, per response.
    Needs ``group_id_BT`` and ``position_BT``. Costs a forward pass.
    Source: arXiv 2604.18578.
    Confidence: high: the authors' code.
    """
    ratio_bounds("gbpo", clip_low, clip_high)
    require_positive("gbpo", temperature=temperature)
    middle, reach = (clip_high - clip_low) / 2, (clip_high + clip_low) / 2

    def prepare(tokens, state):
        group_id_BT = require(tokens, "group_id_BT", "gbpo")
        return _median_per_group(tokens.advantage_BT, group_id_BT, tokens)

    def coefficient(tokens, state, median_K):
        advantage_BT, log_ratio_BT = tokens.advantage_BT, log_ratio(tokens)
        lead_BT = advantage_BT - _of_group(median_K, tokens, "gbpo")
        # about 1, and with tanh for the sigmoid, so that equal widths have a target of exactly 1
        gap_BT = middle + reach * jnp.tanh(lead_BT / (2 * temperature)) - jnp.expm1(log_ratio_BT)
        side_BT = jnp.sign(advantage_BT) * jnp.sign(gap_BT)
        weight_BT = ratio_weight(jnp.exp(log_ratio_BT)) * side_BT
        return weight_only(weight_BT, jnp.abs(advantage_BT * gap_BT))

    return Objective(coefficient, prepare)
