"""Held-out answers of a policy and their scores, in training, in a notebook, by command.

All of them draw by the same names: domain, number of the prompt in its set, seed, number of the
sample. So live weights, the checkpoint and its export give the same texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from aspo_jax import outcomes
from aspo_jax.config import ConfigError
from aspo_jax.config.suites import EvaluationSet
from aspo_jax.rewards import unshaped
from aspo_jax.rollout import ALONE, Collector, Peers, Rollout, collect, gather, unwatched
from aspo_jax.sampler import EVALUATE, Choice, Completion, Request, Sampler
from aspo_jax.structs import Prompt

# By the names of `outcomes.EVALUATE`; where a reward is made of parts, also reward/<part>.
Scores = dict[str, float]
# (params, phase of `collect`) -> the scores, and this process's share of the rollout they count
Evaluate = Callable[..., tuple[Scores, Rollout]]


def answers(
    collector: Collector,
    params: Any,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    seed: int = 0,
    peers: Peers = ALONE,
    phase: Callable[..., Any] = unwatched,
) -> Rollout:
    """Sample and grade this process's share of some prompts."""
    own = prompts[peers.index :: peers.count]
    return collect(
        collector, params, own, samples_per_prompt, domain=EVALUATE, retry=seed, phase=phase
    )


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

    def evaluate(params: Any, phase: Callable[..., Any] = unwatched) -> tuple[Scores, Rollout]:
        rollout = answers(
            collector, params, prompts, samples_per_prompt, seed=seed, peers=peers, phase=phase
        )
        parts = outcomes.part_figures(rollout.parts)
        rewards = {f"reward/{name}": part for name, part in parts.items()}
        table = {**outcomes.EVALUATE, **rewards}
        counted = gather(rollout, table, peers, len(prompts))
        return outcomes.figures(table, counted), rollout

    return evaluate


class Limited:
    """A sampler whose responses are shorter than it has room for."""

    def __init__(self, sampler: Sampler, max_tokens: int):
        self._sampler, self._max_tokens = sampler, max_tokens

    def start(self, params: Any) -> None:
        self._sampler.start(params)

    def release(self) -> None:
        self._sampler.release()

    def drawing(self, temperature: float, choice: Choice) -> Limited:
        return Limited(self._sampler.drawing(temperature, choice), self._max_tokens)

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return self._sampler.sample(r._replace(max_tokens=self._max_tokens) for r in requests)


def set_collectors(
    collector: Collector, max_response_tokens: int
) -> Callable[[EvaluationSet], Collector]:
    """(settings of a set) -> what answers it; sets that draw alike share their programs.

    max_response_tokens: what the sampler has room for; sets that want more are cut there.
    """
    drawing = functools.cache(collector.sampler.drawing)

    def collector_of(s: EvaluationSet) -> Collector:
        sampler: Sampler = drawing(s.temperature, Choice(s.top_k, s.top_p, s.min_p))
        if s.max_response_tokens < max_response_tokens:
            sampler = Limited(sampler, s.max_response_tokens)
        return collector._replace(sampler=sampler, shape=unshaped)

    return collector_of
