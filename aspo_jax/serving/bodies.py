"""The JSON object that a request carries: read within limits, and free of what only hurts later."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import Request

from aspo_jax.serving.errors import ApiError, shown

DEPTH = 64  # of objects and lists within one another


async def read_object(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    limit: longest body, bytes.

    Raises:
        ApiError: no JSON, no object, too long or too deep, another media type.
    """
    media = request.headers.get("content-type", "")
    if media.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            f"Content-Type is {media!r}, expected application/json; send that header and a JSON "
            "object as the body",
            status=415,
        )
    value = _parse(await _read(request, limit))
    if not isinstance(value, dict):
        raise ApiError(f"the body is {shown(value)}, expected a JSON object such as {{}}")
    _check(value)
    return value


async def _read(request: Request, limit: int) -> bytes:
    """The body; a longer one is not read to its end."""
    said = request.headers.get("content-length", "")
    _check_length(int(said) if said.isascii() and said.isdigit() else 0, limit)
    parts, length = [], 0
    async for part in request.stream():
        parts.append(part)
        length += len(part)
        _check_length(length, limit)
    return b"".join(parts)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ApiError(
            f"the body has at least {length:,} bytes, expected at most {limit:,}; send fewer "
            "prompts at once",
            status=413,
        )


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # also of UTF-8 and of numbers with too many digits
        raise ApiError(
            f"the body is not JSON in UTF-8 ({error}); expected an object such as {{}}"
        ) from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _too_deep() -> ApiError:
    return ApiError(f"the body nests deeper than {DEPTH}; expected flatter objects and lists")


def _check(value: Any) -> None:
    """Nothing nests too deeply, and every text can be written in UTF-8."""
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise _too_deep()
        for text in (x for x in level if isinstance(x, str)):
            _check_text(text)
        level = [x for inner in level for x in _children(inner)]
        depth += 1


def _children(value: Any) -> list[Any]:
    """What is in a list or an object, numbers left out."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return [x for x in value if isinstance(x, (str, list, dict))] if isinstance(value, list) else []


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            f"a text of the body holds half a character ({error}); expected whole ones, a pair of "
            "\\u escapes for what is beyond U+FFFF"
        ) from error
