"""Held-out scores of a policy: the figures of `aspo_jax.outcomes.EVALUATE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aspo_jax import outcomes
from aspo_jax.config import ConfigError
from aspo_jax.rollout import ALONE, Collector, Peers, Rollout, collect, gather, unwatched
from aspo_jax.sampler import EVALUATE
from aspo_jax.structs import Prompt

Scores = dict[str, float]  # by the names of `outcomes.EVALUATE`
# (params, phase of `collect`) -> the scores, and this process's share of the rollout they count
Evaluate = Callable[..., tuple[Scores, Rollout]]


def evaluator(
    collector: Collector,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    seed: int = 0,
    peers: Peers = ALONE,
) -> Evaluate:
    """Held-out evaluation with paired sampling keys: every call draws with the same randomness.

    Each process samples and grades its share of the prompts; the scores are those of all.

    Raises:
        ConfigError: fewer prompts than processes.
    """
    if len(prompts) < peers.count:
        raise ConfigError(
            f"found {len(prompts)} held-out prompts (Evaluate.prompts) for {peers.count} "
            f"processes; expected at least {peers.count}"
        )
    own, k = prompts[peers.index :: peers.count], samples_per_prompt

    def evaluate(params: Any, phase: Callable[..., Any] = unwatched) -> tuple[Scores, Rollout]:
        rollout = collect(collector, params, own, k, domain=EVALUATE, retry=seed, phase=phase)
        counted = gather(rollout, outcomes.EVALUATE, peers, len(prompts))
        return outcomes.figures(outcomes.EVALUATE, counted), rollout

    return evaluate
