"""Held-out scores by hand."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import pytest
from rollout_toy import (
    FAILED,
    RIGHT,
    WRONG,
    FakeSampler,
    FakeScorer,
    completion,
    decode,
    in_step,
    prompt,
)

from aspo_jax.config import ConfigError
from aspo_jax.evaluation import Scores, evaluator
from aspo_jax.outcomes import EVALUATE as TABLE
from aspo_jax.rewards import Verdict
from aspo_jax.rewards.verdict import weighted
from aspo_jax.rollout import ALONE, Collector, Peers
from aspo_jax.sampler import EVALUATE

HALF = Verdict(0.5, "mismatch")
ROWS = [  # of each prompt: verdict, text
    [(RIGHT, "a"), (RIGHT, "bb"), (RIGHT, "a"), (WRONG, "c")],
    [(HALF, "a"), (WRONG, "a"), (WRONG, "a"), (WRONG, "a")],
    [(RIGHT, "dddd"), (WRONG, "dddd"), (RIGHT, "dddd"), (WRONG, "")],
]
CUT = {6, 7, 11}  # samples that did not end themselves


def collector_of(index: int = 0, count: int = 1, rows=ROWS) -> Collector:
    """What one process of several collects by: it has the prompts ``index::count``."""
    own = [p * 4 + g for p in range(len(rows))[index::count] for g in range(4)]
    flat = [sample for row in rows for sample in row]
    answers = [completion(i, flat[n][1], n not in CUT) for i, n in enumerate(own)]
    scorer: Any = FakeScorer([flat[n][0] for n in own])
    return Collector(FakeSampler(answers), scorer, decode)


def scores_of(peers: Peers = ALONE, rows=ROWS) -> Scores:
    collector = collector_of(peers.index, peers.count, rows)
    prompts = [prompt(p) for p in range(len(rows))]
    return evaluator(collector, prompts, 4, seed=9, peers=peers)("params")[0]


def test_by_hand():
    assert scores_of() == pytest.approx(
        {
            "avg": (0.75 + 0.0 + 0.5) / 3,
            # sample variance of (9, 0, 6)/12 about 5/12: (16 + 25 + 1)/144 / 2, over 3 prompts
            "avg_stderr": math.sqrt(42 / 144 / 2 / 3),
            "reward_mean": 5.5 / 12,
            "reward_stderr": statistics.stdev([0.75, 0.125, 0.5]) / math.sqrt(3),
            "pass_any": 2 / 3,
            "distinct_right": (2 + 0 + 1) / 3,
            "truncated": 3 / 12,
            "response_length": (5 + 4 + 12) / 12,
            "samples": 4,
        }
    )
    assert all(type(x) is float for x in scores_of().values())
    assert list(scores_of()) == list(TABLE)


def test_what_is_neither_right_nor_wrong_has_a_mean_and_no_share():
    scored = [[(RIGHT, "a"), (Verdict(3.7, "scored"), "b")] * 2, *ROWS[1:]]
    got = scores_of(rows=scored)
    assert got["reward_mean"] == pytest.approx((2 * 4.7 + 0.5 + 2) / 12)
    assert got.keys() == set(TABLE) - {"avg", "avg_stderr", "pass_any", "distinct_right"}


def test_the_parts_of_a_reward_have_means(monkeypatch):
    def made_of(**parts: Verdict) -> Verdict:
        return weighted(parts, [1.0] * len(parts))

    rows = [[(made_of(exact=RIGHT, style=HALF), "a")] * 4, [(made_of(style=WRONG), "b")] * 4]
    rows[1][0] = (made_of(style=FAILED), "c")
    monkeypatch.setattr(FakeScorer, "parts", ("code", "exact", "style"))
    got = scores_of(rows=rows)
    assert got["reward/exact"] == 1.0 and got["reward/style"] == pytest.approx(2 / 7)
    assert "reward/code" not in got and got["avg"] == 0.5 and got["reward_mean"] == 0.75
    assert in_step([functools.partial(scores_of, rows=rows)] * 2) == [got] * 2


def test_one_prompt_has_no_error_estimate():
    got = scores_of(rows=ROWS[:1])
    assert got["avg"] == 0.75 and got["avg_stderr"] == 0.0


@pytest.mark.parametrize("processes", [2, 3])
def test_the_scores_are_those_of_all_processes(processes):
    assert in_step([scores_of] * processes) == [scores_of()] * processes


def test_fewer_prompts_than_processes_are_an_error():
    with pytest.raises(ConfigError, match=r"found 3 .*\(Evaluate.prompts\) for 4 .* at least 4"):
        scores_of(Peers(0, 4, lambda x: x))


def test_every_evaluation_draws_by_the_same_keys():
    collector: Any = collector_of()
    evaluate = evaluator(collector, [prompt(p) for p in range(3)], 4, seed=9)
    keys = [(EVALUATE, 100 + p, 9, g) for p in range(3) for g in range(4)]
    for _ in range(2):
        _, rollout = evaluate("params")
        assert [r.identity for r in collector.sampler.requests] == keys
        assert [s.text for s in rollout.samples] == [text for row in ROWS for _, text in row]
