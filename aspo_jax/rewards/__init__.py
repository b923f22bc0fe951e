"""Rewards: what an answer is worth, with a reason and never an exception.

    with Scorer(workers=2, rules=Rules(timeout_s=5.0), kinds=("math", "code")) as scorer:
        verdicts = scorer.score(submissions)     # one Verdict per Submission, in their order

Graders run in worker processes that can be killed, so that no text a policy writes can stall or
end the trainer; programs run in sandboxes below them. Nothing here imports jax or numpy.
docs/rewards.md says what is covered and what is not.
"""

from aspo_jax.rewards.graders import KINDS, find_problem
from aspo_jax.rewards.pool.scorer import Grading, Scorer
from aspo_jax.rewards.shaping import (
    SHAPES,
    Shape,
    chain,
    curriculum_budget,
    format_reward,
    grpo_lambda,
    mask_truncated,
    overlong_ramp,
    repetition,
    unshaped,
)
from aspo_jax.rewards.verdict import REASONS, RewardError, Rules, Submission, Verdict

__all__ = [
    "KINDS",
    "REASONS",
    "SHAPES",
    "Grading",
    "RewardError",
    "Rules",
    "Scorer",
    "Shape",
    "Submission",
    "Verdict",
    "chain",
    "curriculum_budget",
    "find_problem",
    "format_reward",
    "grpo_lambda",
    "mask_truncated",
    "overlong_ramp",
    "repetition",
    "unshaped",
]
