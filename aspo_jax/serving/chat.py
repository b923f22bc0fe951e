"""`POST /v1/chat/completions`: the next message of a conversation, with calls of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from aspo_jax.sampler import STOP
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
from aspo_jax.serving.errors import ApiError, json_response, unsupported
from aspo_jax.serving.fields import ChatFields, parse
from aspo_jax.serving.logprobs import Spelling, chat_logprobs, prompt_logprobs
from aspo_jax.serving.prompts import read_chat
from aspo_jax.serving.running import Running, names_of, while_connected
from aspo_jax.serving.site import site_of
from aspo_jax.serving.streams import EventStream, check_streaming
from aspo_jax.serving.tools import Parsed, Withheld, parse_calls

_KIND, _CHUNK = "chat.completion", "chat.completion.chunk"


class Plan(NamedTuple):
    """A request of this route, checked."""

    asked: Asked
    fields: ChatFields

    @property
    def has_tools(self) -> bool:
        """Whether calls are looked for in the texts."""
        return self.fields.tools is not None and self.fields.tool_choice != "none"

    @property
    def prompt(self) -> list[int]:
        """The conversation's ids."""
        return self.asked.prompts[0].tokens

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The object ``logprobs`` of some tokens, if that is asked for."""
        if not self.fields.logprobs:
            return None
        spelling = Spelling(self.asked.model.vocabulary, self.fields.return_tokens_as_token_ids)
        return chat_logprobs(piece.tokens, piece.logp, piece.top, spelling)


async def chat(request: Request) -> Response:
    """The route."""
    site = site_of(request)
    fields = _longest(parse(ChatFields, await site.body(request)))
    _check(fields)
    model = site.model(fields.model)
    prompt = await read_chat(site, model, fields)
    names = names_of("chatcmpl", request, fields.request_id)
    asked = Asked(site, model, names, [prompt], fields, fields.top_logprobs)
    plan = Plan(check_asked(asked, "messages"), fields)
    if fields.stream:
        return _stream(plan)
    pieces = await while_connected(request, lambda: answers(plan.asked))
    scored = await while_connected(request, lambda: _prompt_logprobs(plan))
    return json_response(_whole(plan, pieces) | {"prompt_logprobs": scored})


def _longest(fields: ChatFields) -> ChatFields:
    """The same, the longest answer under one name; the newer counts."""
    newer = fields.max_completion_tokens
    return fields if newer is None else fields.model_copy(update={"max_tokens": newer})


def _check(fields: ChatFields) -> None:
    check_streaming(fields, fields.prompt_logprobs)
    if fields.top_logprobs and not fields.logprobs:
        raise ApiError(
            f"top_logprobs = {fields.top_logprobs} and logprobs is false; send logprobs = true",
            param="top_logprobs",
        )
    if fields.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", fields.tool_choice, '"none" and "auto"')
    if fields.tool_choice == "auto" and fields.tools is None:
        raise ApiError(
            'tool_choice = "auto" and there are no tools; send tools, or leave it out',
            param="tool_choice",
        )


async def _prompt_logprobs(plan: Plan) -> list[Any] | None:
    count = plan.fields.prompt_logprobs
    if count is None:
        return None
    (scored,) = await scored_prompts(plan.asked, count)
    return prompt_logprobs(scored, count, plan.asked.model.vocabulary)


def _whole(plan: Plan, pieces: list[Piece]) -> dict[str, Any]:
    has_ids = plan.fields.return_token_ids
    drawn = sum(len(piece.tokens) for piece in pieces)
    return {
        **plan.asked.head(_KIND),
        "choices": [_choice(plan, index, piece) for index, piece in enumerate(pieces)],
        "usage": usage(plan.asked, drawn),
        "system_fingerprint": None,
        "prompt_token_ids": plan.prompt if has_ids else None,
    }


def _choice(plan: Plan, index: int, piece: Piece) -> dict[str, Any]:
    parsed = _parse(plan, piece.text)
    message = {
        "role": "assistant",
        "content": parsed.content if parsed.content or not parsed.calls else None,
        "tool_calls": parsed.calls,
    }
    return {
        "index": index,
        "message": message,
        "logprobs": plan.logprobs(piece),
        "finish_reason": _finish(piece.finish, parsed.calls),
        "stop_reason": piece.reason,
        "token_ids": piece.tokens if plan.fields.return_token_ids else None,
    }


def _parse(plan: Plan, text: str) -> Parsed:
    """The text without calls, and the calls; all of it text where there are no tools."""
    if not plan.has_tools:
        return Parsed(text, [])
    return parse_calls(text, plan.fields.parallel_tool_calls)


def _finish(finish: str | None, calls: list[dict[str, Any]]) -> str | None:
    return "tool_calls" if calls and finish == STOP else finish


def _stream(plan: Plan) -> Response:
    patience = plan.asked.site.settings.patience
    return EventStream(run(plan.asked), lambda running: _events(plan, running), patience)


async def _events(plan: Plan, running: Running) -> AsyncIterator[dict[str, Any]]:
    """The role, an event per piece, a last one per choice, the usage."""
    count, drawn = plan.asked.count, 0
    withheld = [Withheld() if plan.has_tools else None for _ in range(count)]
    for index in range(count):
        yield _opening(plan, index)
    if asks_nothing(plan.asked):
        for index, piece in enumerate(await answers(plan.asked)):
            yield _chunk(plan, _piece_choice(plan, index, piece, withheld[index]), 0)
    async for index, piece in running:
        drawn += len(piece.tokens)
        yield _chunk(plan, _piece_choice(plan, index, piece, withheld[index]), drawn)
    if plan.fields.usage.include_usage:
        yield {**plan.asked.head(_CHUNK), "choices": [], "usage": usage(plan.asked, drawn)}


def _opening(plan: Plan, index: int) -> dict[str, Any]:
    """The first event of a choice."""
    delta = {"role": "assistant", "content": ""}
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    event = _chunk(plan, choice, 0)
    if plan.fields.return_token_ids:
        event["prompt_token_ids"] = plan.prompt
    return event


def _piece_choice(plan: Plan, index: int, piece: Piece, held: Withheld | None) -> dict[str, Any]:
    """The choice of one event; the calls come with the last one."""
    text, calls = piece.text, []
    if held is not None:
        text = held.add(text)
        if piece.finish:
            parsed = _parse(plan, held.rest)
            text, calls = text + parsed.content, parsed.calls
    delta: dict[str, Any] = {"content": text} if text or not piece.finish else {}
    if calls:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": plan.logprobs(piece),
        "finish_reason": _finish(piece.finish, calls),
        "stop_reason": piece.reason,
    }
    if plan.fields.return_token_ids:
        choice["token_ids"] = piece.tokens
    return choice


def _chunk(plan: Plan, choice: dict[str, Any], drawn: int) -> dict[str, Any]:
    event = {**plan.asked.head(_CHUNK), "choices": [choice]}
    if plan.fields.usage.continuous_usage_stats:
        event["usage"] = usage(plan.asked, drawn)
    return event
