"""`POST /v1/completions`: texts that go on from a prompt, and scores of prompts by ``echo``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from aspo_jax.sampler import LENGTH
from aspo_jax.serving.answers import Piece
from aspo_jax.serving.asking import (
    Asked,
    answers,
    asks_nothing,
    check_asked,
    run,
    scored_prompts,
    usage,
)
from aspo_jax.serving.errors import json_response
from aspo_jax.serving.fields import CompletionFields, parse
from aspo_jax.serving.logprobs import (
    Scored,
    Spelling,
    completion_logprobs,
    prompt_logprobs,
)
from aspo_jax.serving.prompts import read_prompts
from aspo_jax.serving.running import Running, names_of, while_connected
from aspo_jax.serving.site import site_of
from aspo_jax.serving.streams import EventStream, check_streaming

_KIND = "text_completion"


class Plan(NamedTuple):
    """A request of this route, with what of it the prompts alone decide.

    texts: of each prompt, before its answers; "" unless echoed. scored: None unless asked for.
    """

    asked: Asked
    fields: CompletionFields
    texts: list[str]
    scored: list[Scored] | None

    @property
    def offsets(self) -> list[int]:
        """Characters that each prompt puts before its answers."""
        return [len(text) for text in self.texts]

    @property
    def spelling(self) -> Spelling:
        """How tokens are named."""
        return Spelling(self.asked.model.vocabulary, self.fields.return_tokens_as_token_ids)


async def completions(request: Request) -> Response:
    """The route."""
    site = site_of(request)
    fields = parse(CompletionFields, await site.body(request))
    check_streaming(fields, fields.prompt_logprobs)
    model = site.model(fields.model)
    names = names_of("cmpl", request, fields.request_id)
    prompts = await read_prompts(site, model, fields.prompt, fields.add_special_tokens)
    asked = Asked(site, model, names, prompts, fields, fields.logprobs or 0)
    asked = check_asked(asked, "prompt")
    plan: Plan = await while_connected(request, lambda: _plan(asked, fields))
    if fields.stream:
        return _stream(plan)
    pieces = await while_connected(request, lambda: answers(asked, plan.offsets))
    return json_response(_whole(plan, pieces))


async def _plan(asked: Asked, fields: CompletionFields) -> Plan:
    """Score the prompts, if that is asked for."""
    tops = [fields.logprobs if fields.echo else None, fields.prompt_logprobs]
    wanted = [top for top in tops if top is not None]
    scored = await scored_prompts(asked, max(wanted)) if wanted else None
    shows = fields.echo and not fields.return_token_ids
    decode = asked.model.vocabulary.decode
    texts = [
        (p.text or decode(p.tokens, not fields.skip_special_tokens)) if shows else ""
        for p in asked.prompts
    ]
    return Plan(asked, fields, texts, scored)


def _whole(plan: Plan, pieces: list[Piece]) -> dict[str, Any]:
    choices = [_choice(plan, index, piece) for index, piece in enumerate(pieces)]
    drawn = sum(len(piece.tokens) for piece in pieces)
    return {
        **plan.asked.head(_KIND),
        "choices": choices,
        "usage": usage(plan.asked, drawn),
        "system_fingerprint": None,
    }


def _choice(plan: Plan, index: int, piece: Piece) -> dict[str, Any]:
    """One answer, the prompt before it where that is echoed."""
    fields, number = plan.fields, plan.asked.prompt_of(index)
    tokens = plan.asked.prompts[number].tokens
    scored = Scored(piece.tokens, piece.logp, piece.top, piece.offsets)
    if fields.echo and fields.logprobs is not None and plan.scored is not None:
        scored = plan.scored[number] + scored
    return {
        "index": index,
        "text": plan.texts[number] + piece.text,
        "logprobs": _logprobs(plan, scored),
        "finish_reason": piece.finish,
        "stop_reason": piece.reason,
        "token_ids": piece.tokens if fields.return_token_ids else None,
        "prompt_token_ids": tokens if fields.return_token_ids else None,
        "prompt_logprobs": _prompt_logprobs(plan, number),
    }


def _logprobs(plan: Plan, scored: Scored) -> dict[str, Any] | None:
    count = plan.fields.logprobs
    return None if count is None else completion_logprobs(scored, count, plan.spelling)


def _prompt_logprobs(plan: Plan, number: int) -> list[Any] | None:
    count = plan.fields.prompt_logprobs
    if count is None or plan.scored is None:
        return None
    return prompt_logprobs(plan.scored[number], count, plan.asked.model.vocabulary)


def _stream(plan: Plan) -> Response:
    running = run(plan.asked, plan.offsets)
    patience = plan.asked.site.settings.patience
    return EventStream(running, lambda running: _events(plan, running), patience)


async def _events(plan: Plan, running: Running) -> AsyncIterator[dict[str, Any]]:
    """An event per piece; before them the prompts where they are echoed, behind them the usage."""
    fields, drawn = plan.fields, 0
    if fields.echo or asks_nothing(plan.asked):
        for index in range(plan.asked.count):
            yield _echo(plan, index)
    is_first = [True] * plan.asked.count
    async for index, piece in running:
        drawn += len(piece.tokens)
        yield _event(plan, index, piece, drawn, is_first[index] and not fields.echo)
        is_first[index] = False
    if fields.usage.include_usage:
        yield {**plan.asked.head(_KIND), "choices": [], "usage": usage(plan.asked, drawn)}


def _echo(plan: Plan, index: int) -> dict[str, Any]:
    """The event that shows a prompt; it is the only one where nothing is to be drawn."""
    finish = LENGTH if asks_nothing(plan.asked) else None
    piece = Piece("", [], [], [], [], [], finish)
    choice = _choice(plan, index, piece)
    return _chunk(plan, choice, 0, is_first=True)


def _event(plan: Plan, index: int, piece: Piece, drawn: int, is_first: bool) -> dict[str, Any]:
    scored = Scored(piece.tokens, piece.logp, piece.top, piece.offsets)
    choice = {
        "index": index,
        "text": piece.text,
        "logprobs": _logprobs(plan, scored),
        "finish_reason": piece.finish,
        "stop_reason": piece.reason,
        "token_ids": piece.tokens,
        "prompt_token_ids": plan.asked.prompts[plan.asked.prompt_of(index)].tokens,
    }
    return _chunk(plan, choice, drawn, is_first)


def _chunk(plan: Plan, choice: dict[str, Any], drawn: int, is_first: bool) -> dict[str, Any]:
    """An event with one choice; fields that were not asked for are left out."""
    has_ids = plan.fields.return_token_ids
    dropped = {
        "prompt_logprobs",
        *(() if has_ids else ("token_ids",)),
        *(() if has_ids and is_first else ("prompt_token_ids",)),
    }
    choice = {name: value for name, value in choice.items() if name not in dropped}
    event = {**plan.asked.head(_KIND), "choices": [choice]}
    if plan.fields.usage.continuous_usage_stats:
        event["usage"] = usage(plan.asked, drawn)
    return event
