"""The small routes: what is served, whether it lives, and its tokenizer."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

import aspo_jax
from aspo_jax.serving.errors import ApiError, json_response
from aspo_jax.serving.fields import ChatTemplate, DetokenizeFields, TokenizeFields, parse
from aspo_jax.serving.prompts import check_ids, encode, read_chat
from aspo_jax.serving.site import Model, site_of

PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    # The page is one file: it asks this server and nobody else.
    "content-security-policy": "default-src 'self' 'unsafe-inline' data: blob:",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


async def page(request: Request) -> Response:
    """The chat page."""
    if not PAGE.is_file():
        raise ApiError("there is no page.html in this installation; install it anew", status=404)
    return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)


async def health(request: Request) -> Response:
    """200 while every engine lives."""
    alive = all(model.engine.is_alive for model in site_of(request).models.values())
    return Response(status_code=200 if alive else 503)


async def version(request: Request) -> Response:
    """The version of this package."""
    return json_response({"version": aspo_jax.__version__})


async def models(request: Request) -> Response:
    """What is served, the default first."""
    site = site_of(request)
    data = [
        {
            "id": model.name,
            "object": "model",
            "created": site.created,
            "owned_by": "aspo_jax",
            "root": model.served.root or model.name,
            "parent": None,
            "max_model_len": model.engine.window,
            "permission": [],
        }
        for model in site.models.values()
    ]
    return json_response({"object": "list", "data": data})


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's settings; ``?model=`` names one of several."""
    site = site_of(request)
    model = site.model(request.query_params.get("model"))
    return json_response(await site.in_thread(functools.partial(_tokenizer_info, model)))


def _tokenizer_info(model: Model) -> dict[str, Any]:
    """tokenizer_config.json of the model's folder, with what the tokenizer itself says."""
    tokenizer = model.vocabulary.tokenizer
    source = getattr(model.served.policy, "source", None)
    path = None if source is None else Path(source) / "tokenizer_config.json"
    raw = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    own = {name: getattr(tokenizer, name, None) for name in names}
    return {"tokenizer_class": type(tokenizer).__name__, **raw, **own}


async def tokenize(request: Request) -> Response:
    """The ids of a text, or of a conversation as the chat template writes it."""
    site = site_of(request)
    body = await site.body(request)
    if (body.get("messages") is None) == (body.get("prompt") is None):
        raise ApiError("expected one of the fields prompt and messages", param="prompt")
    model = site.model(body.get("model"))
    if body.get("prompt") is None:
        tokens = (await read_chat(site, model, parse(ChatTemplate, body))).tokens
    else:
        fields = parse(TokenizeFields, body)
        tokens = await site.in_thread(functools.partial(_tokenize, model, fields))
    wants_texts = body.get("return_token_strs") is True
    names = model.vocabulary.tokenizer.convert_ids_to_tokens(tokens) if wants_texts else None
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": model.engine.window,
            "tokens": tokens,
            "token_strs": names,
        }
    )


def _tokenize(model: Model, fields: TokenizeFields) -> list[int]:
    if not fields.prompt:
        return list(
            model.vocabulary.tokenizer.encode("", add_special_tokens=fields.add_special_tokens)
        )
    return encode(model, fields.prompt, fields.add_special_tokens, "prompt")


async def detokenize(request: Request) -> Response:
    """The text of some ids, special tokens shown."""
    site = site_of(request)
    fields = parse(DetokenizeFields, await site.body(request))
    model = site.model(fields.model)
    tokens = check_ids(model, fields.tokens, "tokens") if fields.tokens else []
    decode = functools.partial(model.vocabulary.decode, tokens, True)
    return json_response({"prompt": await site.in_thread(decode)})
