"""Advantages from the rewards of a prompt's samples: what they share, and those of one group.

Each factory returns a rule ``(reward_PG, is_valid_PG) -> advantage_PG``, float32, for P prompts x G
samples. A rule that must know more says so by the names of its further parameters, which are
fields of `Groups`:

    opo()(reward_PG, is_valid_PG, length_PG)

Samples whose grader failed (not valid) get 0 and do not count in any statistic, whatever their
reward holds. A group of equal rewards gets exact zeros, but from `shifted_mean` and
`prompt_smooth`. A single valid sample has no baseline: mean 0 and std 1 are used in its place, so
its advantage is its reward; a rule that does otherwise says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from aspo_jax.losses.objective import require_non_negative, require_positive

# (reward_PG, is_valid_PG, fields of Groups) -> advantage_PG
Advantage = Callable[..., Any]


class UnfitReward(ValueError):
    """Rewards that an advantage can make nothing of: what was found and expected."""


class Past(NamedTuple):
    """What the rewards of each prompt were when it was visited before; 0 at the first visit.

    visits_P: how often it was. mean_P, std_P: of the rewards of all visits, see `visited`.
    """

    visits_P: Any
    mean_P: Any
    std_P: Any


class Groups(NamedTuple):
    """What there is to know of P prompts x G samples; an advantage gets what its parameters name.

    reward_PG, is_valid_PG: rewards as shaped, and which of them count. By position.
    length_PG: response tokens.
    parts: of a reward that is made of several, what each says, [P, G], by its name and not
        weighted; nan where a sample has no such part. None: it is made of one thing.
    weights: what each part is multiplied with in the reward, by its name.
    past: the earlier visits of each prompt.
    """

    reward_PG: Any
    is_valid_PG: Any
    length_PG: Any = None
    parts: Mapping[str, Any] | None = None
    weights: Mapping[str, float] | None = None
    past: Past | None = None

    def picked(self, numbers: np.ndarray, size: int) -> Groups:
        """Some of the groups, and behind them masked ones up to ``size``."""

        def pick(x_P: np.ndarray) -> np.ndarray:
            rest = [(0, 0)] * (np.ndim(x_P) - 1)
            return np.pad(np.asarray(x_P)[numbers], [(0, size - len(numbers)), *rest])

        return jax.tree.map(pick, self._replace(weights=None))._replace(weights=self.weights)


_GIVEN = Groups._fields[2:]
_REMEDIES = {"parts": ": the reward is made of one thing; add another to Reward.functions"}


def asks(rule: Advantage) -> dict[str, bool]:
    """The fields of `Groups` that a rule asks for, and whether it cannot do without.

    Raises:
        ValueError: it has a further parameter that nothing fills.
    """
    found = {}
    for p in list(inspect.signature(rule).parameters.values())[2:]:
        is_needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name in _GIVEN:
            found[p.name] = is_needed
        elif is_needed:
            raise ValueError(
                f"the rule has a parameter {p.name!r}, which nothing fills; behind rewards and "
                f"which are valid it may have {', '.join(_GIVEN)}, or give it a default"
            )
    return found


def advantages_of(rule: Advantage, groups: Groups) -> Any:
    """What a rule says of groups, given what it asks for.

    Raises:
        ValueError: it asks for what nothing fills.
        UnfitReward: it asks for what there is not, or is not defined for these rewards.
    """
    given = {}
    for name, is_needed in asks(rule).items():
        given[name] = getattr(groups, name)
        if is_needed and given[name] is None:
            raise UnfitReward(f"the rule needs {name}, which is None{_REMEDIES.get(name, '')}")
    return rule(groups.reward_PG, groups.is_valid_PG, **given)


# --- what rules share ---------------------------------------------------------------------------


class Centred(NamedTuple):
    """Rewards about their group's mean over valid samples, 0 elsewhere.

    mean_P1: 0 for a single valid sample. count_P1: how many are valid.
    """

    reward_PG: Array
    is_valid_PG: Array
    mean_P1: Array
    count_P1: Array

    def std_P1(self, ddof: int) -> Array:
        """Standard deviation over valid samples; 1 for a single one."""
        square_P1 = jnp.square(self.reward_PG).sum(axis=-1, keepdims=True)
        std_P1 = jnp.sqrt(square_P1 / jnp.maximum(self.count_P1 - ddof, 1))
        return jnp.where(self.count_P1 > 1, std_P1, 1)

    def over_std(self, ddof: int, eps: float) -> Array:
        """``reward / (std + eps)``."""
        return over(self.reward_PG, self.std_P1(ddof) + eps)


def centred(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Centred:
    """Rewards about the mean of their group."""
    is_valid_PG = jnp.asarray(is_valid_PG, bool)
    reward_PG = jnp.where(is_valid_PG, jnp.asarray(reward_PG, jnp.float32), 0)
    count_P1 = is_valid_PG.sum(axis=-1, keepdims=True).astype(jnp.float32)
    mean_P1 = reward_PG.sum(axis=-1, keepdims=True) / jnp.maximum(count_P1, 1)
    highest_P1 = jnp.where(is_valid_PG, reward_PG, -jnp.inf).max(axis=-1, keepdims=True)
    lowest_P1 = jnp.where(is_valid_PG, reward_PG, jnp.inf).min(axis=-1, keepdims=True)
    # The rounded mean of equal rewards need not equal them; a z-score would blow the rest up.
    mean_P1 = jnp.where(highest_P1 == lowest_P1, highest_P1, mean_P1)
    mean_P1 = jnp.where(count_P1 > 1, mean_P1, 0)
    reward_PG = jnp.where(is_valid_PG, reward_PG - mean_P1, 0)
    return Centred(reward_PG, is_valid_PG, mean_P1, count_P1)


def over(x: Array, divisor: Array) -> Array:
    """x / divisor; x where the divisor is not above 0."""
    return x / jnp.where(divisor > 0, divisor, 1)


def require_ddof(rule: str, ddof: int) -> None:
    """Raise a ValueError unless ddof is 0 or 1."""
    if ddof not in (0, 1):
        raise ValueError(f"{rule}.ddof = {ddof}; expected 0 or 1")


def require_rewards(
    rule: str, is_fine: Callable[[np.ndarray], Any], expected: str, groups: tuple[Any, Any]
) -> None:
    """Raise an UnfitReward that names a valid reward that is not fine.

    groups: rewards and which of them are valid. It looks at values: such a rule cannot be jitted.
    """
    reward_PG, is_valid_PG = np.asarray(groups[0], np.float32), np.asarray(groups[1], bool)
    wrong = reward_PG[is_valid_PG & ~is_fine(np.where(is_valid_PG, reward_PG, 0))]
    if wrong.size:
        raise UnfitReward(f"{rule} needs {expected}; found {wrong.size} others, such as {wrong[0]}")


def _about_token_mean(c: Centred, length_PG: ArrayLike) -> tuple[Array, Array]:
    """Rewards about their mean over all tokens of the group; the share of its tokens of each."""
    length_PG = jnp.where(c.is_valid_PG, jnp.asarray(length_PG, jnp.float32), 0)
    share_PG = over(length_PG, length_PG.sum(axis=-1, keepdims=True))
    mean_P1 = (share_PG * c.reward_PG).sum(axis=-1, keepdims=True)
    return jnp.where(c.is_valid_PG, c.reward_PG - mean_P1, 0), share_PG


# --- the rules ----------------------------------------------------------------------------------


def group_zscore(*, ddof: int = 1, eps: float = 1e-6) -> Advantage:
    """GRPO: rewards about their group's mean, in its standard deviations.

        A = (R - mean) / (std + eps)

    ddof: 1 divides the variance by n - 1, 0 by n.
    eps: added to the standard deviation, in reward, 0 or more.

    In use are eps 1e-6 (verl), 1e-4 (TRL) and 1e-8 (the Dr. GRPO code), all with ddof 1. Of two
    samples (2-GRPO, arXiv 2510.00977) a right and a wrong one get +-0.71 with ddof 1, +-1 with 0.
    Source: DeepSeekMath, arXiv 2402.03300 section 4.1.2; defaults as in verl.
    Confidence: high: many agreeing ports.
    """
    require_ddof("group_zscore", ddof)
    require_non_negative("group_zscore", eps=eps)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        return centred(reward_PG, is_valid_PG).over_std(ddof, eps)

    return advantage


def group_mean() -> Advantage:
    """Dr. GRPO: rewards about their group's mean, without a scale.

        A = R - mean

    With `reinforce` this is GPG (arXiv 2504.02546) too: its factor, all groups over those with a
    signal, is there already, for losses are averaged over the groups that train.
    Source: arXiv 2503.20783; the authors' code.
    Confidence: high: the authors' code.
    """

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        return centred(reward_PG, is_valid_PG).reward_PG

    return advantage


def leave_one_out(*, min_valid: int = 1) -> Advantage:
    """RLOO: rewards about the mean of the other samples.

        A = R - mean of the others = n / (n - 1) (R - mean)

    min_valid: groups with fewer valid samples get 0, at least 1. 2 leaves single samples out, which
        keep their reward otherwise, as in verl's plain version; its vectorised one gives 0.

    Samples that are not valid are no others: what a fork of SkyRL calls RLOO-N.
    Source: arXiv 2402.14740.
    Confidence: high: many agreeing ports; min_valid low: one fork.
    """
    require_positive("leave_one_out", min_valid=min_valid)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        c = centred(reward_PG, is_valid_PG)
        scale_P1 = jnp.where(c.count_P1 > 1, c.count_P1 / jnp.maximum(c.count_P1 - 1, 1), 1)
        return jnp.where(c.count_P1 >= min_valid, c.reward_PG * scale_P1, 0)

    return advantage


def shifted_mean(*, shift: float = -0.1) -> Advantage:
    """AsymRE: rewards about their group's mean and a shift.

        A = R - (mean + shift)

    shift: of the baseline, in reward. Below 0 every sample is pulled up, right or wrong; with
        `reinforce` that is a bias of -shift.

    No group is without a signal, so none is dropped, those of equal rewards either. The authors'
    code trains with it by a loss that halves everything (its OPMD with tau 1).
    Source: arXiv 2509.24203; Trinity-RFT `asymre_advantage.py`.
    Confidence: high: the authors' code.
    """
    if not np.isfinite(shift):
        raise ValueError(f"shifted_mean.shift = {shift}; expected a finite number")

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        c = centred(reward_PG, is_valid_PG)
        return jnp.where(c.is_valid_PG, c.reward_PG - shift, 0)

    return advantage


def maxrl() -> Advantage:
    """MaxRL: rewards about their group's mean, in means: 1 right of n weighs n - 1.

        A = (R - mean) / mean        0 where mean = 0

    Rewards below 0 are refused: the mean may then be near 0 or below, and A explode or turn its
    sign. The overlong ramp makes such rewards. A single valid sample gets 0; the authors' code
    divides it by 1e-6.
    Source: arXiv 2602.02710; the authors' `compute_maxrl_outcome_advantage`, without its eps 1e-6.
    Confidence: high: the authors' code, prime-rl and SkyRL.
    """

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        require_rewards("maxrl", lambda x: x >= 0, "rewards >= 0", (reward_PG, is_valid_PG))
        c = centred(reward_PG, is_valid_PG)
        return jnp.where(c.mean_P1 > 0, over(c.reward_PG, c.mean_P1), 0)

    return advantage


def opo() -> Advantage:
    """OPO: rewards about their mean over the group's tokens, the optimal baseline on policy.

        A = R - sum_i n_i R_i / sum_i n_i        n: response tokens

    Asks for ``length_PG``. The weighted sum of A is 0, the plain one is not.
    Source: arXiv 2505.23585; verl `compute_opo_outcome_advantage`.
    Confidence: medium: one port.
    """

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike, length_PG: ArrayLike) -> Array:
        c = centred(reward_PG, is_valid_PG)
        return jnp.where(c.count_P1 > 1, _about_token_mean(c, length_PG)[0], c.reward_PG)

    return advantage


def token_group_zscore(*, limit: float = 5.0, eps: float = 1e-6) -> Advantage:
    """HAPO's token-level group average: a z-score over all tokens of the group.

        A = (R - m) / (s + eps)        m, s: mean and standard deviation (ddof 0) over the tokens of
                                       all responses, each with the reward of its response
        `group_zscore` instead, for the whole group, if an |A| in it is limit or more

    limit: above 0, in standard deviations.
    eps: added to the standard deviation, in reward, 0 or more.

    Asks for ``length_PG``. A single valid sample gets 0.
    Source: arXiv 2509.16591; the authors' `compute_hapo_outcome_advantage`.
    Confidence: high: the authors' code.
    """
    require_positive("token_group_zscore", limit=limit)
    require_non_negative("token_group_zscore", eps=eps)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike, length_PG: ArrayLike) -> Array:
        c = centred(reward_PG, is_valid_PG)
        about_PG, share_PG = _about_token_mean(c, length_PG)
        std_P1 = jnp.sqrt((share_PG * jnp.square(about_PG)).sum(axis=-1, keepdims=True))
        score_PG = over(about_PG, std_P1 + eps)
        is_far_P1 = (jnp.abs(score_PG) >= limit).any(axis=-1, keepdims=True)
        score_PG = jnp.where(is_far_P1, c.over_std(1, eps), score_PG)
        return jnp.where(c.count_P1 > 1, score_PG, 0)

    return advantage


def batch_zscore(*, ddof: int = 1, eps: float = 1e-4) -> Advantage:
    """Lite-PPO, and `scale_rewards = "batch"` of TRL: the group's mean, the batch's deviation.

        A = (R - mean of the group) / (std + eps)        std: of R over all samples of the step

    ddof: 1 divides the variance by n - 1, 0 by n.
    eps: added to the standard deviation, in reward, 0 or more.

    The step's samples are those of the groups that an advantage sees: all that were drawn, or with
    `Train.refill_rounds` those that train.
    Source: arXiv 2508.08221; defaults as in TRL.
    Confidence: medium: one port.
    """
    require_ddof("batch_zscore", ddof)
    require_non_negative("batch_zscore", eps=eps)

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        c = centred(reward_PG, is_valid_PG)
        whole = (jnp.ravel(jnp.asarray(x))[None] for x in (reward_PG, is_valid_PG))
        return over(c.reward_PG, centred(*whole).std_P1(ddof) + eps)

    return advantage


def zero() -> Advantage:
    """``A = 0``: rewards are recorded and teach nothing, as where a policy is distilled alone."""

    def advantage(reward_PG: ArrayLike, is_valid_PG: ArrayLike) -> Array:
        return jnp.zeros(jnp.shape(reward_PG), jnp.float32)

    return advantage
