"""The application: routes, who may use them, and errors as objects."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aspo_jax.serving import admin, small
from aspo_jax.serving.chat import chat
from aspo_jax.serving.completions import completions
from aspo_jax.serving.errors import ApiError, error_response, json_response
from aspo_jax.serving.generate import generate
from aspo_jax.serving.running import Gone
from aspo_jax.serving.seam import Served
from aspo_jax.serving.site import Settings, Site

_ROUTES = [
    Route("/", small.page),
    Route("/health", small.health),
    Route("/version", small.version),
    Route("/v1/models", small.models),
    Route("/tokenizer_info", small.tokenizer_info),
    Route("/tokenize", small.tokenize, methods=["POST"]),
    Route("/detokenize", small.detokenize, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/inference/v1/generate", generate, methods=["POST"]),
]
_ENDING = ApiError("the server ends; try again once it is back", status=503)
_GUARDED = ("/v1", "/v2", "/inference", *(route.path for route in admin.ROUTES))


def create_app(models: Mapping[str, Served], settings: Settings | None = None) -> Starlette:
    """The application that serves these models by their names; the first is the default."""
    settings = settings or Settings()
    app = Starlette(
        routes=[*_ROUTES, *(admin.ROUTES if settings.is_admin else [])],
        middleware=[Middleware(_Guard, api_key=settings.api_key)],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            Gone: _on_gone,
            ClientDisconnect: _on_gone,
            Exception: _on_mistake,
        },
    )
    app.router.redirect_slashes = False
    app.state.site = Site(models, settings)
    return app


class _Guard:
    """Keeps out who lacks the key, and pages of other sites that a browser shows.

    A request that the server cancels, for it ends, is told so where nothing was sent yet.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http":
            app = self._refusal(scope["path"], Headers(scope=scope)) or app
        is_started = False

        async def watched(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await app(scope, receive, watched)
        except asyncio.CancelledError:
            if not is_started:
                await error_response(_ENDING)(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        is_guarded = any(path == p or path.startswith(f"{p}/") for p in _GUARDED)
        if self._key is not None and is_guarded and not self._has_key(headers):
            return json_response({"error": "Unauthorized"}, 401, {"www-authenticate": "Bearer"})
        origin, host = headers.get("origin"), headers.get("host")
        if origin is not None and urlsplit(origin).netloc != host:
            return error_response(
                ApiError(
                    f"a page of {origin} may not use this server; open the page at /, or call "
                    "from a program",
                    status=403,
                )
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(
            key.encode(), (self._key or "").encode()
        )


async def _on_api_error(request: Request, error: Any) -> Response:
    return error_response(error)


async def _on_http_error(request: Request, error: Any) -> Response:
    """No such route, or not by that method."""
    said = {
        404: f"there is no route {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = said.get(error.status_code) or str(error.detail)
    response = error_response(ApiError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _on_gone(request: Request, error: Exception) -> Response:
    """Nobody reads it; 499 is what logs call this."""
    return Response(status_code=499)


async def _on_mistake(request: Request, error: Exception) -> Response:
    """A mistake of the program's; the server logs its traceback."""
    return error_response(ApiError(f"{type(error).__name__}: {error}", status=500))
