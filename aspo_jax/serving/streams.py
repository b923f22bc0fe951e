"""Server-sent events: an answer while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aspo_jax.serving.errors import ApiError, dumps, error_response, unsupported
from aspo_jax.serving.fields import Streamed
from aspo_jax.serving.running import Running, cancel, disconnected

Events = Callable[[Running], AsyncIterator[dict[str, Any]]]
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx keeps events until it has many
]
_DONE = b"data: [DONE]\n\n"


def check_streaming(fields: Streamed, prompt_logprobs: int | None) -> None:
    """What is asked for fits a stream, or no stream is wanted.

    Raises:
        ApiError: it does not.
    """
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(
            "stream_options are given and stream is false; leave them out, or send stream = true",
            param="stream_options",
        )
    if fields.stream and prompt_logprobs is not None:
        raise unsupported("prompt_logprobs", prompt_logprobs, "null in a stream")


class EventStream(Response):
    """One event per piece of the answer, then ``[DONE]``; ends early when the client goes away.

    What fails before the first byte is an error response, later an event with the error object.

    patience: seconds in which a client must take an event.
    """

    def __init__(self, running: Running, events: Events, patience: float):
        super().__init__()
        self._running, self._events, self._patience = running, events, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._answer(scope, receive, send))
        watch = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await cancel(work, watch)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._running:
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await self._stream(send)
        except TimeoutError:
            return  # nobody reads: the connection is closed behind this
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        try:
            async for event in self._events(self._running):
                await self._send(send, encode_event(event))
        except ApiError as error:
            await self._send(send, encode_event({"error": error.body}))
        await self._send(send, _DONE, is_last=True)

    async def _send(self, send: Send, body: bytes, is_last: bool = False) -> None:
        async with asyncio.timeout(self._patience):
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def encode_event(event: dict[str, Any]) -> bytes:
    """The bytes of one event."""
    return f"data: {dumps(event)}\n\n".encode()
