"""The seam between what wants completions and what makes them: every engine fits behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from aspo_jax.sampler.choice import Choice

TRAIN, EVALUATE, SERVE = range(3)  # domains of random draws
STOP, LENGTH, NONFINITE = "stop", "length", "nonfinite"  # why a completion ended
ABORTED = "abort"  # it was cancelled from outside


class Drawing(NamedTuple):
    """How the ids of one request are drawn, where the sampler takes that from each request.

    temperature: divides the logits; 0: the likeliest id.
    top_k, top_p, min_p: see `Choice`.
    ignores_stops: the sampler's stop ids do not end the response.
    top: how many of the likeliest ids are reported at each position; at most what the sampler has
        room for.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    ignores_stops: bool = False
    top: int = 0


class Request(NamedTuple):
    """One completion to sample.

    tokens: prompt token ids.
    identity: (domain, draw index, retry round, sample index), each a non-negative 32-bit integer.
    max_tokens: longest response; None: the sampler's own limit. 0 asks for nothing and gets it.
    drawing: None: as the sampler draws.
    written: so many of the last ``tokens`` were drawn for this identity before; the draws go on
        behind them.
    """

    tokens: Sequence[int]
    identity: tuple[int, int, int, int]
    max_tokens: int | None = None
    drawing: Drawing | None = None
    written: int = 0


class Completion(NamedTuple):
    """What the policy wrote.

    request: position of its request among those given to `sample`.
    tokens_T: ids, the one that ended the text included.
    logp_T: log-probability of each id under the distribution it was drawn from.
    ending: `STOP`: the policy ended the text itself, with a stop id or a stop string; `LENGTH`: it
        was cut at the limit; `NONFINITE`: the next distribution was not finite.
    full_logp_T: log-probability of each id under the whole softmax at the head's temperature, which
        is what the trainer computes; None where it is ``logp_T``, nothing being truncated.
    """

    request: int
    tokens_T: np.ndarray
    logp_T: np.ndarray
    ending: str
    full_logp_T: np.ndarray | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the policy ended the text itself."""
        return self.ending == STOP

    @property
    def policy_logp_T(self) -> np.ndarray:
        """Log-probabilities to compare with the trainer's: those of the whole softmax."""
        return self.logp_T if self.full_logp_T is None else self.full_logp_T


class Delta(NamedTuple):
    """What a running request grew by in one step.

    request: its number. start: tokens that it had before; a request that was preempted begins again
        at 0, with the same tokens.
    tokens, logp: see `Completion`.
    top: at each position the likeliest (id, log-probability), as many as the request asked for.
    """

    request: int
    start: int
    tokens: list[int]
    logp: list[float]
    top: list[list[tuple[int, float]]]


class Step(NamedTuple):
    """What came of one `step`: the requests that ended, and what every running one grew by."""

    completions: list[Completion]
    deltas: list[Delta]


class Sampler(Protocol):
    """An engine that samples from a policy; it knows tokens, not texts or rewards."""

    def start(self, params: Any) -> None:
        """Use these parameters from now on."""
        ...

    def release(self) -> None:
        """Forget them: until the next `start` their memory is the update's."""
        ...

    def drawing(self, temperature: float, choice: Choice) -> Sampler:
        """A sampler that draws otherwise: at another temperature (0: the likeliest), truncated."""
        ...

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish.

        Whoever wants no more of them drops the iterator.
        """
        ...
