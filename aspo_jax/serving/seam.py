"""The seam between what speaks HTTP and what samples: any engine of this shape can be served."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from aspo_jax.sampler import Request

TopIds = list[tuple[int, float]]  # the likeliest ids of one position and their log-probabilities


class Overloaded(Exception):
    """The engine's queue is full; the message says how full, and that one may try again."""


class EngineError(Exception):
    """The engine could not do what it was asked; the message says why."""


class Grown(NamedTuple):
    """What one sequence grew by in one decode call.

    index: of its request in the list that was submitted.
    logp: log-probability of each drawn id, as the engine's ``logprobs_mode`` says.
    top: for each token the ``drawing.top`` likeliest ids, likeliest first; [] where none is asked.
    ending: None while it goes on; "stop": an own stop id, which is the last of ``tokens``;
        "length", "nonfinite", "abort".
    version: label of the weights that drew these tokens.
    """

    index: int
    tokens: list[int]
    logp: list[float]
    top: list[TopIds]
    ending: str | None
    version: str


class PromptScore(NamedTuple):
    """Log-probabilities of a prompt's L tokens but the first, L-1 entries, at temperature 1.

    top: for each of them the likeliest ids, likeliest first.
    """

    logp: list[float]
    top: list[TopIds]


class Growth(Protocol):
    """The sequences of one call of `Engine.generate` while they grow.

    It is entered, then iterated; the iteration ends when every sequence has its ending or was
    cancelled. What has not ended when it is left is cancelled. Not taking from it holds nothing up:
    what waits of a sequence is at most its own tokens.
    """

    async def __aenter__(self) -> Growth: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[Grown]: ...

    def cancel(self, index: int) -> None:
        """End one sequence; it may still give what was drawn already, and no ending."""
        ...


class Engine(Protocol):
    """Weights and what draws from them.

    version: label of the weights, "default" until one is set; may be assigned.
    """

    version: str

    @property
    def window(self) -> int:
        """Longest prompt and response together, in tokens."""
        ...

    @property
    def logprobs_mode(self) -> str:
        """Whose log-probabilities: "processed": of what was drawn from; "raw": of the
        whole softmax at temperature 1."""
        ...

    @property
    def is_alive(self) -> bool:
        """False for good once the engine has failed."""
        ...

    @property
    def is_paused(self) -> bool:
        """Whether nothing is drawn until `resume`."""
        ...

    def generate(self, requests: Sequence[Request]) -> Growth:
        """Sample the requests together.

        Raises:
            Overloaded: here or on entering; none of them was taken.
        """
        ...

    async def score(self, tokens: Sequence[int], top: int) -> PromptScore:
        """Score a prompt, with so many likeliest ids at each position.

        Raises:
            Overloaded: the queue is full.
        """
        ...

    async def load(self, folder: str, label: str | None) -> None:
        """Serve the weights of a folder, under this label where one is given.

        Raises:
            EngineError: it cannot be read or does not fit; the old weights go on serving.
        """
        ...

    async def pause(self, mode: str) -> None:
        """Draw nothing more.

        mode: "abort": what runs ends with "abort"; "wait": returns when what runs has ended;
            "keep": it goes on after `resume`. What is submitted meanwhile waits.
        """
        ...

    async def resume(self) -> None:
        """Draw again."""
        ...


class Served(NamedTuple):
    """A model that is served: what samples from it, and its `aspo_jax.policy.Policy`.

    policy: its tokenizer and source are used. root: where it comes from, as shown to clients.
    """

    engine: Engine
    policy: Any
    root: str = ""
