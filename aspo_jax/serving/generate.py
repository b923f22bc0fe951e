"""`POST /inference/v1/generate`: token ids in; token ids, log-probabilities and versions out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aspo_jax.serving.answers import Piece, spans
from aspo_jax.serving.asking import Asked, answers, check_asked, scored_prompts, usage
from aspo_jax.serving.errors import json_response, unsupported
from aspo_jax.serving.fields import GenerateFields, TokenSampling, parse
from aspo_jax.serving.logprobs import generate_logprobs, prompt_logprobs
from aspo_jax.serving.prompts import Prompt, check_ids
from aspo_jax.serving.running import names_of, while_connected
from aspo_jax.serving.site import site_of


async def generate(request: Request) -> Response:
    """The route."""
    site = site_of(request)
    body = await site.body(request)
    fields = parse(GenerateFields, body)
    _check(fields, body)
    sampling = parse(TokenSampling, fields.sampling_params, "sampling_params.")
    model = site.model(fields.model)
    prompt = Prompt(check_ids(model, fields.token_ids, "token_ids"))
    names = names_of("generate-tokens", request, fields.request_id)
    asked = Asked(site, model, names, [prompt], sampling, _top(sampling), has_texts=False)
    asked = check_asked(asked, "token_ids")
    pieces = await while_connected(request, lambda: answers(asked))
    scored = await while_connected(request, lambda: _prompt_logprobs(asked, sampling))
    return json_response(_whole(asked, sampling, pieces) | {"prompt_logprobs": scored})


def _top(sampling: TokenSampling) -> int:
    """Likeliest ids to report; 0 and 1 mean the drawn id alone, all that trainers read."""
    count = sampling.logprobs or 0
    return count if count > 1 else 0


def _check(fields: GenerateFields, body: Mapping[str, Any]) -> None:
    if fields.stream:
        raise unsupported("stream", True, "false", "use /v1/completions for streams")
    if fields.output_mode != "tokens":
        raise unsupported(
            "output_mode", fields.output_mode, '"tokens"', "use /v1/completions for texts"
        )
    for name in ("content_parts", "features"):
        if body.get(name):
            raise unsupported(name, body[name], "null", "send token ids only, no images")


async def _prompt_logprobs(asked: Asked, sampling: TokenSampling) -> list[Any] | None:
    if sampling.prompt_logprobs is None:
        return None
    (scored,) = await scored_prompts(asked, sampling.prompt_logprobs)
    return prompt_logprobs(scored, sampling.prompt_logprobs, asked.model.vocabulary)


def _whole(asked: Asked, sampling: TokenSampling, pieces: list[Piece]) -> dict[str, Any]:
    drawn = sum(len(piece.tokens) for piece in pieces)
    return {
        "request_id": asked.names.shown,
        "model": asked.model.name,
        "created": asked.created,
        "usage": usage(asked, drawn),
        "output_mode": "tokens",
        "prompt_token_ids": None,
        "choices": [_choice(sampling, index, piece) for index, piece in enumerate(pieces)],
    }


def _choice(sampling: TokenSampling, index: int, piece: Piece) -> dict[str, Any]:
    asks = sampling.logprobs is not None
    return {
        "index": index,
        "token_ids": piece.tokens,
        "finish_reason": piece.finish,
        "stop_reason": piece.reason,
        "logprobs": generate_logprobs(piece.tokens, piece.logp, piece.top) if asks else None,
        "weight_versions": [span._asdict() for span in spans(piece.versions)],
    }
