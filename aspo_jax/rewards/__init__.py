"""Rewards: what an answer is worth, with a reason and never an exception.

    with build_scorer(workers=2, timeout_s=5.0, shape=overlong_ramp(24, 4, 1.0)) as scorer:
        verdicts = scorer.score(submissions)     # one Verdict per Submission, in their order

Graders run in worker processes that can be killed, so that no text a policy writes can stall or
end the trainer. Nothing here imports jax or numpy: a worker starts in some 50 ms.
"""

from aspo_jax.rewards.graders import GRADERS
from aspo_jax.rewards.pool import Scorer, build_scorer
from aspo_jax.rewards.shaping import overlong_ramp, repetition, unshaped
from aspo_jax.rewards.verdict import REASONS, Submission, Verdict

__all__ = [
    "GRADERS",
    "REASONS",
    "Scorer",
    "Submission",
    "Verdict",
    "build_scorer",
    "overlong_ramp",
    "repetition",
    "unshaped",
]
