"""An external engine as a `Sampler`: one request for each group, weights published per policy."""

from __future__ import annotations

import atexit
import contextlib
import copy
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from aspo_jax.agreement import SamplingError
from aspo_jax.engines.client import Counts
from aspo_jax.engines.fleet import Fleet
from aspo_jax.engines.loop import Loop
from aspo_jax.engines.weights import Publisher, Version
from aspo_jax.engines.wire import BROKEN, STOP, Answer, EngineError, Group, How
from aspo_jax.errors import WriteError
from aspo_jax.sampler import seam
from aspo_jax.sampler.choice import EVERYTHING, Choice
from aspo_jax.sampler.seam import Completion, Request


class ExternalSampler:
    """Draws from the engines of a fleet; see `Sampler` for the seam.

    Draws are named by identity as far as an engine keeps to its seeds. What it draws with other
    temperatures or truncated shares the weights: `drawing`. To be closed, which ends engines of our
    own and removes the weights; at the end of the process that happens by itself.

    how: see `How`; its temperature and truncation are those of `drawing`.
    max_prompt_tokens, max_response_tokens: longest prompt and response.
    at_once: groups that are asked for at the same time.
    stops(tokens) -> length or None: how many of the tokens complete a stop string, if any do.
    """

    def __init__(
        self,
        fleet: Fleet,
        publisher: Publisher,
        how: How,
        *,
        seed: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        at_once: int,
        stops: Callable[[list[int]], int | None] | None = None,
    ):
        self._engines = _Engines(fleet, publisher)
        self._how, self._seed, self._stops = how, seed, stops
        self._longest = (max_prompt_tokens, max_response_tokens)
        self._at_once = at_once

    @property
    def counts(self) -> Counts:
        """What went wrong with the engines so far, and was mended."""
        return self._engines.fleet.counts

    def drawing(self, temperature: float, choice: Choice) -> ExternalSampler:
        """A sampler with the same engines and weights that draws otherwise."""
        other = copy.copy(self)
        other._how = self._how._replace(
            temperature=temperature, top_k=choice.top_k, top_p=choice.top_p, min_p=choice.min_p
        )
        return other

    def start(self, params: Any) -> None:
        """Give the engines these parameters, unless they have them.

        Raises:
            SamplingError: no engine has taken them.
        """
        with _as_sampling_errors():
            self._engines.start(params)

    def release(self) -> None:
        """Nothing: the engines' memory is not the update's."""

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which their groups finish.

        Raises:
            SamplingError: an engine refuses a group, or none of them gives what was asked.
            ValueError: a prompt is empty or longer than ``max_prompt_tokens``.
        """
        asked = list(requests)
        groups, nothing = self._groups(asked)
        for number in nothing:
            empty = np.zeros(0, np.float32)
            yield Completion(number, empty.astype(np.int32), empty, seam.LENGTH)

        async def ask(numbered: tuple[Group, list[int]]) -> list[Answer]:
            return await self._engines.fleet.ask(numbered[0], self._how)

        with _as_sampling_errors():
            for (_, numbers), answers in self._engines.loop.each(ask, groups, self._at_once):
                for number, answer in zip(numbers, answers, strict=True):
                    yield self._completion(number, answer)

    def _groups(self, asked: Sequence[Request]) -> tuple[list[tuple[Group, list[int]]], list[int]]:
        """Requests of one prompt with consecutive samples together; those that want no token."""
        longest_prompt, longest_response = self._longest
        wanted, nothing = [], []
        for number, request in enumerate(asked):
            if request.drawing is not None or request.written:
                raise ValueError("an engine draws all requests alike, each from its beginning")
            if not 0 < len(request.tokens) <= longest_prompt:
                raise ValueError(
                    f"found a prompt of {len(request.tokens)} tokens, expected 1 to "
                    f"{longest_prompt}"
                )
            limit = longest_response if request.max_tokens is None else request.max_tokens
            limit = min(limit, longest_response)
            if limit:
                wanted.append((number, request, limit))
            else:
                nothing.append(number)

        def alike(entry: tuple[int, tuple[int, Request, int]]) -> Any:
            place, (_, request, limit) = entry
            *named, sample = request.identity
            return tuple(named), limit, sample - place, tuple(request.tokens)

        groups = []
        for _, entries in itertools.groupby(enumerate(wanted), alike):
            members = [entry for _, entry in entries]
            _, request, limit = members[0]
            seed = group_seed(self._seed, request.identity)
            group = Group(request.tokens, len(members), limit, seed)
            groups.append((group, [number for number, _, _ in members]))
        return groups, nothing

    def _completion(self, number: int, answer: Answer) -> Completion:
        """Cut by our own rule, as the in-process sampler is."""
        length = self._stops(answer.tokens_T.tolist()) if self._stops else None
        ending = {BROKEN: seam.NONFINITE, STOP: seam.STOP}.get(answer.finish, seam.LENGTH)
        if length is not None:
            ending = seam.STOP
        tokens_T, logp_T = answer.tokens_T[:length], answer.logp_T[:length]
        full_logp_T = None
        if self._how.temperature == 0:  # the token was certain: probability 1
            logp_T, full_logp_T = np.zeros_like(logp_T), logp_T
        elif (self._how.top_k, self._how.top_p, self._how.min_p) != tuple(EVERYTHING):
            full_logp_T = np.full_like(logp_T, np.nan)  # one of the two is on the wire
        return Completion(number, tokens_T, logp_T, ending, full_logp_T)

    def close(self) -> None:
        """End the engines that were started, drop connections, remove the weights."""
        self._engines.close()


class _Engines:
    """What samplers that draw differently share: the fleet, its loop, and whose weights it has."""

    def __init__(self, fleet: Fleet, publisher: Publisher):
        self.fleet, self._publisher = fleet, publisher
        self._loop: Loop | None = None
        self._leaves: list[weakref.ref] = []
        self._version: Version | None = None

    @property
    def loop(self) -> Loop:
        if self._loop is None:
            self._loop = Loop()
            atexit.register(self.close)
        return self._loop

    def start(self, params: Any) -> None:
        leaves = jax.tree.leaves(params)
        # Arrays do not change: the same objects are the same weights.
        is_same = len(leaves) == len(self._leaves) and all(
            known() is leaf for known, leaf in zip(self._leaves, leaves, strict=True)
        )
        if is_same and self._leaves:
            return
        self._leaves = []
        version = self._publisher.publish(params, self.fleet.in_use)
        self.loop.run(self.fleet.load(version))
        self._leaves = [weakref.ref(leaf) for leaf in leaves]

    def close(self) -> None:
        loop, self._loop = self._loop, None
        self._leaves = []
        if loop is not None:
            atexit.unregister(self.close)
            loop.run(self.fleet.close())
            loop.close()
        self._publisher.close()


def group_seed(seed: int, identity: Sequence[int]) -> int:
    """31 bits of the run's seed, a group's identity and the number of its first sample.

    The engine's seed of the i-th sample is this plus i.
    """
    *group, first = identity
    text = " ".join(map(str, (seed, *group)))
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1) + first


@contextlib.contextmanager
def _as_sampling_errors() -> Iterator[None]:
    """What an engine cannot do, or no room for its weights, stops the run and leaves it intact."""
    try:
        yield
    except (EngineError, WriteError) as error:
        raise SamplingError(str(error)) from error
