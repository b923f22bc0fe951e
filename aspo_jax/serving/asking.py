"""What a route asks of the engine: requests for n samples of some prompts, scores of prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from aspo_jax.sampler import LENGTH, Request
from aspo_jax.serving.answers import Answer, Ends, Piece
from aspo_jax.serving.errors import ApiError
from aspo_jax.serving.fields import Sampling, identity, seed_of
from aspo_jax.serving.logprobs import Scored, scored_prompt
from aspo_jax.serving.prompts import Prompt, check_ids, room
from aspo_jax.serving.running import Names, Running, api_error, collect
from aspo_jax.serving.seam import PromptScore
from aspo_jax.serving.site import Model, Site


class Asked(NamedTuple):
    """One HTTP request for samples, checked.

    Sample g of prompt p is number ``p * n + g``, here and in the answer.

    top: likeliest ids wanted at each position. has_texts: whether the answer has texts.
    limits: longest answer to each prompt. created: when it came, seconds since 1970.
    """

    site: Site
    model: Model
    names: Names
    prompts: list[Prompt]
    sampling: Sampling
    top: int
    has_texts: bool = True
    limits: tuple[int, ...] = ()
    created: int = 0

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.prompts) * self.sampling.n

    def prompt_of(self, index: int) -> int:
        """The number of a sequence's prompt."""
        return index // self.sampling.n

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every event begins with. kind: its ``object``."""
        return {
            "id": self.names.shown,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
        }


def check_asked(asked: Asked, param: str) -> Asked:
    """The same, with its limits, which are ``max_tokens`` within the window, and its time.

    param: field of the prompts.

    Raises:
        ApiError: too many sequences, a prompt too long, a stop id that is no token.
    """
    n, most = asked.sampling.n, asked.site.settings.most_sequences
    if asked.count > most:
        raise ApiError(
            f"n = {n} for {len(asked.prompts)} prompts asks for {asked.count} answers, expected at "
            f"most {most} in a request; send several",
            param="n",
        )
    if asked.sampling.stop_token_ids:
        check_ids(asked.model, asked.sampling.stop_token_ids, "stop_token_ids")
    longest = asked.sampling.max_tokens
    limits = (room(asked.model, p.tokens, longest, param) for p in asked.prompts)
    return asked._replace(limits=tuple(limits), created=int(time.time()))


def run(asked: Asked, offsets: Sequence[int] | None = None) -> Running:
    """The sequences, ready to be entered.

    offsets: characters that each prompt puts before its answers; None: none.
    """
    offsets = offsets or [0] * len(asked.prompts)
    if asks_nothing(asked):
        return Running(asked.model.engine, [], [], asked.names, asked.site.registry)
    answers = [
        _answer(asked, prompt, offset)
        for prompt, offset in zip(asked.prompts, offsets, strict=True)
        for _ in range(asked.sampling.n)
    ]
    return Running(
        asked.model.engine, requests_of(asked), answers, asked.names, asked.site.registry
    )


def _answer(asked: Asked, prompt: Prompt, offset: int) -> Answer:
    sampling = asked.sampling
    ends = Ends(
        frozenset(sampling.stop_token_ids),
        tuple(sampling.stop),
        sampling.include_stop_str_in_output,
    )
    reads = asked.has_texts or bool(sampling.stop)
    vocabulary, shows = asked.model.vocabulary, not sampling.skip_special_tokens
    return Answer(ends, vocabulary.detokenizer(prompt.tokens, shows) if reads else None, offset)


def requests_of(asked: Asked) -> list[Request]:
    """What the engine is asked for, in the order of the answer."""
    seed, drawing = seed_of(asked.sampling.seed), asked.sampling.drawing(asked.top)
    return [
        Request(prompt.tokens, identity(seed, p, g), limit, drawing)
        for p, (prompt, limit) in enumerate(zip(asked.prompts, asked.limits, strict=True))
        for g in range(asked.sampling.n)
    ]


async def answers(asked: Asked, offsets: Sequence[int] | None = None) -> list[Piece]:
    """The whole answers, in order."""
    if asks_nothing(asked):
        return [Piece("", [], [], [], [], [], LENGTH)] * asked.count
    return await collect(run(asked, offsets), asked.count)


def asks_nothing(asked: Asked) -> bool:
    """Whether not one token is wanted."""
    return asked.sampling.max_tokens == 0


async def scores(asked: Asked, top: int) -> list[PromptScore]:
    """The score of each prompt; equal prompts are scored once.

    Raises:
        ApiError: the engine is overloaded or fails.
    """
    found: dict[tuple[int, ...], PromptScore] = {}
    try:
        for prompt in asked.prompts:  # in turn: many at once would fill the engine's queue
            key = tuple(prompt.tokens)
            if key not in found:
                found[key] = await asked.model.engine.score(prompt.tokens, top)
    except Exception as error:
        raise api_error(error) from error
    return [found[tuple(prompt.tokens)] for prompt in asked.prompts]


async def scored_prompts(asked: Asked, top: int) -> list[Scored]:
    """The prompts with log-probabilities and where each token lies in the text."""
    return [
        scored_prompt(prompt.tokens, score, offsets_of(asked, prompt))
        for prompt, score in zip(asked.prompts, await scores(asked, top), strict=True)
    ]


def offsets_of(asked: Asked, prompt: Prompt) -> list[int]:
    """Characters of a prompt's text before each of its tokens."""
    texts = asked.model.vocabulary.detokenizer((), not asked.sampling.skip_special_tokens)
    offsets, at = [], 0
    for token in prompt.tokens:
        offsets.append(at)
        at += len(texts.add(token))
    return offsets


def usage(asked: Asked, drawn: int) -> dict[str, int]:
    """The object ``usage``. drawn: tokens in all answers."""
    prompt = sum(len(prompt.tokens) for prompt in asked.prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
    }
