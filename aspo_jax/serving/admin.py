"""The routes of whoever runs the server: pause, load weights, abort. Names as vLLM has them.

What fails here is ``{"error": "..."}``, as there. ``?model=`` or a field ``model`` names one of
several models.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aspo_jax.serving.errors import ApiError, json_response, shown
from aspo_jax.serving.running import api_error
from aspo_jax.serving.site import Model, site_of

_MODES = ("abort", "wait", "keep")
_TRUTHS = ("true", "false", "1", "0")
Act = Callable[[Request, Model, dict[str, Any]], Awaitable[dict[str, Any]]]


def _route(path: str, act: Act, method: str = "POST") -> Route:
    """A route whose failures are said in the way of these routes."""

    async def endpoint(request: Request) -> Response:
        try:
            body = await _body(request)
            name = request.query_params.get("model") or body.get("model")
            model = site_of(request).model(name)
            return json_response(await act(request, model, body))
        except Exception as error:
            found = api_error(error)
            return json_response({"error": str(found)}, found.status)

    return Route(path, endpoint, methods=[method])


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request; {} where there is no body."""
    has_body = request.headers.get("content-length", "0") != "0"
    chunked = "transfer-encoding" in request.headers
    return await site_of(request).body(request) if has_body or chunked else {}


async def _pause(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    mode = request.query_params.get("mode", "abort")
    if mode not in _MODES:
        raise ApiError(f"mode = {mode!r}: expected one of {', '.join(_MODES)}")
    clears = request.query_params.get("clear_cache", "true")
    if clears.lower() not in _TRUTHS:
        raise ApiError(f"clear_cache = {clears!r}: expected true or false")
    await model.engine.pause(mode)
    return {"status": "paused"}


async def _resume(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    await model.engine.resume()
    return {"status": "resumed"}


async def _is_paused(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    return {"is_paused": model.engine.is_paused}


async def _abort(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    names = body.get("request_ids")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ApiError(f"request_ids = {shown(names)}: expected a list of texts")
    return {"status": "aborted", "aborted": site_of(request).registry.abort(names)}


async def _update_weights(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    label = body.get("weight_version")
    if label is not None:
        label = _text(label, "weight_version")
    await model.engine.load(_text(body.get("weight_dir"), "weight_dir"), label)
    return {"status": "ok"}


async def _collective_rpc(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    if body.get("method") != "reload_weights":
        raise ApiError(
            f"method = {shown(body.get('method'))}: expected reload_weights, nothing else"
        )
    arguments = body.get("kwargs")
    if not isinstance(arguments, dict):
        raise ApiError(f'kwargs = {shown(arguments)}: expected {{"weights_path": "FOLDER"}}')
    await model.engine.load(_text(arguments.get("weights_path"), "kwargs.weights_path"), None)
    return {"results": [None]}


async def _reset_cache(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Nothing to do: a prompt's cache ends with its request, and `load` reads prompts anew."""
    return {"success": True}


async def _label(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    model.engine.version = _text(body.get("new_version"), "new_version")
    return {"success": True, "new_version": model.engine.version}


async def _weight_info(request: Request, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    return {"weight_version": model.engine.version}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ApiError(f"{name} = {shown(value)}: expected a text")
    return value


ROUTES = [
    _route("/pause", _pause),
    _route("/resume", _resume),
    _route("/is_paused", _is_paused, "GET"),
    _route("/abort_requests", _abort),
    _route("/update_weights", _update_weights),
    _route("/collective_rpc", _collective_rpc),
    _route("/reset_prefix_cache", _reset_cache),
    _route("/update_weight_version", _label),
    _route("/weight_info", _weight_info, "GET"),
]
