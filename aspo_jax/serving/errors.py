"""What is answered when a request cannot be: an HTTP status and an error object."""

from __future__ import annotations

import itertools
import json
from typing import Any

from starlette.responses import Response

_KINDS = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is answered with an error.

    param: the field at fault. code: what programs look at, the status where nothing is finer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        kind: str | None = None,
        code: str | int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {
            "message": message,
            "type": kind or _KINDS.get(status, _KINDS[400]),
            "param": param,
            "code": status if code is None else code,
        }


def unsupported(field: str, found: Any, supported: str, remedy: str = "leave it out") -> ApiError:
    """A value that is known to others and not served here."""
    return ApiError(
        f"{field} = {shown(found)} is not supported, only {supported}; {remedy}", param=field
    )


def shown(value: Any, longest: int = 80) -> str:
    """A value of a request, short enough for a message; the rest of it is not written out."""
    parts = json.JSONEncoder(default=repr).iterencode(value)
    text = "".join(itertools.islice(parts, longest))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def dumps(value: Any) -> str:
    """JSON on one line in ASCII: no client takes a character of it for the end of a line.

    Raises:
        ValueError: a number that JSON does not have.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(dumps(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The response that says an error."""
    headers = {"retry-after": "1"} if error.status == 503 else {}
    if error.status == 413:  # the rest of the body is not read
        headers["connection"] = "close"
    return json_response({"error": error.body}, error.status, headers)
