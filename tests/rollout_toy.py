"""Prompts, answers and verdicts that are known beforehand; no model and no grader involved."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aspo_jax.rewards import Verdict, unshaped
from aspo_jax.rollout import Collector, Peers, Rollout, collect
from aspo_jax.sampler import LENGTH, STOP, TRAIN, Completion
from aspo_jax.structs import Prompt

RIGHT, WRONG = Verdict(1.0, "match"), Verdict(0.0, "mismatch")
FAILED = Verdict(0.0, "crash", is_valid=False)


def encode(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def decode(ids) -> str:
    return "".join(map(chr, ids))


def prompt(number: int) -> Prompt:
    text = "q" * (number + 1)
    return Prompt(f"p{number}", 100 + number, text, encode(text), {"n": number}, "countdown")


def completion(request: int, text: str, is_finished: bool = True) -> Completion:
    logp = -0.25 * np.arange(1, len(text) + 1, dtype=np.float32)
    ending = STOP if is_finished else LENGTH
    return Completion(request, np.array(encode(text)), logp, ending)


class FakeSampler:
    """Gives the answers it was made with, the last first."""

    def __init__(self, answers: Sequence[Completion]):
        self.answers = answers
        self.calls: list[Any] = []

    def start(self, params):
        self.calls.append(("start", params))

    def release(self):
        self.calls.append("release")

    def drawing(self, temperature, choice):
        raise AssertionError("how to draw is settled before")

    def sample(self, requests):
        self.requests = list(requests)
        assert len(self.requests) == len(self.answers)
        self.calls.append("sample")
        yield from reversed(self.answers)


class FakeScorer:
    """Knows its verdicts beforehand; submissions may come in any order."""

    parts: Mapping[str, float] = {}

    def __init__(self, verdicts):
        self.verdicts = verdicts
        self.submissions = {}

    @contextlib.contextmanager
    def begin(self, group):
        yield self

    def submit(self, number, submission):
        self.submissions[number] = submission

    def verdict(self, number):
        return self.verdicts[number] if number in self.submissions else None

    def results(self):
        return [(s, self.verdict(n)) for n, s in sorted(self.submissions.items())]


def judged(verdicts, prompts, answers, shape=unshaped, **more) -> tuple[Rollout, FakeScorer]:
    """The rollout, and the scorer with what it saw."""
    scorer: Any = FakeScorer(verdicts)
    G = len(answers) // len(prompts)
    collector = Collector(FakeSampler(answers), scorer, decode, shape)
    return collect(collector, "params", prompts, G, domain=TRAIN, iteration=3, **more), scorer


def rollout_of(verdicts: list[list[Verdict]]) -> Rollout:
    """One row of verdicts per prompt; every answer has a text and a length of its own."""
    P, G = len(verdicts), len(verdicts[0])
    answers = [completion(i, "abcdefgh"[: 1 + i % 8], i != 0) for i in range(P * G)]
    return judged([v for row in verdicts for v in row], [prompt(p) for p in range(P)], answers)[0]


def in_step(processes: Sequence[Callable[[Peers], Any]]) -> list[Any]:
    """What each of several processes returns, called with peers that wait for each other."""
    count, slots = len(processes), {}
    barrier = threading.Barrier(count)

    def gather_of(index: int):
        def gather(own: np.ndarray) -> np.ndarray:
            slots[index] = own
            barrier.wait(timeout=30)
            stacked = np.stack([slots[i] for i in range(count)])
            barrier.wait(timeout=30)
            return stacked

        return gather

    with ThreadPoolExecutor(count) as pool:
        calls = [
            pool.submit(process, Peers(i, count, gather_of(i)))
            for i, process in enumerate(processes)
        ]
        return [call.result() for call in calls]
