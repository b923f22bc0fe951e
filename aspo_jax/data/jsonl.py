"""Prompts of one's own: a JSON-lines file, plain or gzipped.

    {"id": "p1", "prompt": "What is 2+2?", "answer": "4", "kind": "exact"}
    {"messages": [{"role": "user", "content": "..."}], "answer": "4", "kind": "exact"}

One object per line: ``prompt`` or ``messages``, ``answer`` (whatever its grader needs),
``kind`` (which grader), and optionally ``id`` (else the line number). Other fields are ignored.
Every line is checked when the file is read; a bad one is a `DataError` that names it.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from aspo_jax.errors import UserError
from aspo_jax.paths import PathError, check_format, read_bytes, shorten, shown, user_path

_ROLES = ("system", "user", "assistant")
_BOM = b"\xef\xbb\xbf"
_OPENINGS = {b"{", b"[", b"[{"}  # the first line of JSON that is spread over several


class DataError(UserError):
    """A data file that cannot be used: file and line, found, expected, remedy."""


class Place(NamedTuple):
    """A row's place, ``where`` in words, for the error message; its ``number`` is its id without
    another."""

    where: str
    number: int

    def fail(self, found: str, expected: str, remedy: str) -> NoReturn:
        raise DataError(f"{self.where}: found {found}, expected {expected}; {remedy}")


def read_jsonl(path: str | Path, kinds: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file, each with ``id``, ``messages``, ``answer``, ``kind`` and ``where``.

    kinds: the graders there are; None accepts any.

    Raises:
        DataError: anything wrong with the file or one of its lines.
    """
    try:
        path = user_path(path)
        lines = _read_lines(path)
    except PathError as error:
        raise DataError(str(error)) from error
    rows: list[dict[str, Any]] = []
    first_use: dict[str, int] = {}
    for number, data in enumerate(lines, start=1):
        line = Place(f"{shown(path)}:{number}", number)
        row = read_row(line, _parse(line, data), kinds)
        if row["id"] in first_use:
            line.fail(
                f"id {row['id']!r} again (first on line {first_use[row['id']]})",
                "an id of its own",
                "rename one of the two or leave all ids out",
            )
        first_use[row["id"]] = number
        rows.append(row)
    return rows


def _read_lines(path: Path) -> list[bytes]:
    data = read_bytes(path)
    if path.suffix == ".gz":
        data = _unpack(data, path)
    check_format(data, path)
    if not data.strip():
        raise DataError(
            f"{shown(path)}: found an empty file, expected at least one line; "
            "write one JSON object per line"
        )
    lines = data.removesuffix(b"\n").split(b"\n")
    if lines[0].strip() in _OPENINGS:
        each = "'.[]'" if lines[0].startswith(b"[") else "."
        raise DataError(
            f"{shown(path)}:1: found {lines[0].strip().decode()!r} alone on a line, expected one "
            f"whole JSON object per line; rewrite it with jq -c {each} OLD > NEW"
        )
    return lines


def _unpack(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{shown(path)}: cannot be read as gzip ({error}), expected what its name says; "
            "rename the file or check that it was copied whole"
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text)} is too large for a float")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; of a key given twice JSON readers would keep the last in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shorten(twice)!r} is given twice in one object; keep one")
    return value


def _parse(line: Place, data: bytes) -> dict[str, Any]:
    """The object on a line."""
    if data.startswith(_BOM):
        line.fail("a byte-order mark", "plain UTF-8", "save the file as UTF-8 without BOM")
    if not data.strip():
        line.fail("an empty line", "a JSON object", "delete the line")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_twins,
        )
    except UnicodeDecodeError as error:
        line.fail(
            f"bytes that are not UTF-8 ({error.reason} at byte {error.start} of the line)",
            "UTF-8",
            "convert the file to UTF-8",
        )
    except json.JSONDecodeError as error:
        found = f"bad JSON ({error.msg} at column {error.colno})"
        line.fail(found, "a JSON object", "write one whole object per line")
    except (ValueError, RecursionError) as error:
        line.fail(f"bad JSON ({error})", "a JSON object", "write one whole object per line")
    if not isinstance(value, dict):
        line.fail(
            f"a JSON {type(value).__name__}",
            "a JSON object",
            'write {"prompt": ..., "answer": ..., "kind": ...}; jq -c \'.[]\' OLD > NEW takes a '
            "list apart",
        )
    check_values(line, value)
    return value


def check_values(line: Place, value: dict[str, Any]) -> None:
    """Refuse what does not reach a grader in another process as it is.

    Raises:
        DataError: half a surrogate pair, or something that JSON does not hold.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        line.fail("half a surrogate pair", "Unicode text", "write the character in full")
    except (TypeError, ValueError, RecursionError) as error:
        line.fail(
            f"a value that JSON does not hold ({error})",
            "strings, finite numbers, lists and dicts of them",
            "convert it",
        )


def read_row(line: Place, value: dict[str, Any], kinds: Collection[str] | None) -> dict[str, Any]:
    """A row of plain values from its fields, as `read_jsonl` gives it.

    Raises:
        DataError: a field that is missing or cannot be used.
    """
    kind = _text(line, value, "kind")
    if kinds is not None and kind not in kinds:
        line.fail(f"kind {kind!r}", f"one of {sorted(kinds)}", "correct the name")
    return {
        "id": _read_id(line, value),
        "messages": _read_messages(line, value),
        "answer": _read_answer(line, value),
        "kind": kind,
        "where": line.where,
    }


def _field(line: Place, value: dict[str, Any], name: str) -> Any:
    if name not in value:
        line.fail(f"no field {name!r} (there are {sorted(value)})", f"{name!r}", "add the field")
    return value[name]


def _text(line: Place, value: dict[str, Any], name: str) -> str:
    """A field that must be a string with something in it."""
    text = _field(line, value, name)
    if text is None:
        line.fail(f"null for {name!r}", "some text", "fill it in or drop the row")
    if not isinstance(text, str):
        line.fail(f"{name!r} of type {type(text).__name__}", "a string", "put it in quotes")
    if not text.strip():
        line.fail(f"an empty {name!r}", "some text", "fill it in or drop the row")
    return text


def _read_id(line: Place, value: dict[str, Any]) -> str:
    if "id" not in value:
        return str(line.number)
    if isinstance(value["id"], int) and not isinstance(value["id"], bool):
        return str(value["id"])
    if value["id"] is None:
        line.fail("null for 'id'", "a string", "fill it in or leave the field out")
    return _text(line, value, "id")


def _read_answer(line: Place, value: dict[str, Any]) -> Any:
    answer = _field(line, value, "answer")
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        found = "null" if answer is None else "an empty string"
        line.fail(f"{found} for 'answer'", "what the grader needs", "fill it in or drop the row")
    return answer


def _read_messages(line: Place, value: dict[str, Any]) -> list[dict[str, str]]:
    """The chat; a plain prompt is one message of the user."""
    if ("prompt" in value) == ("messages" in value):
        both = "both" if "prompt" in value else "neither"
        line.fail(
            f"{both} of 'prompt' and 'messages' (there are {sorted(value)})",
            "one of them",
            "keep one",
        )
    if "prompt" in value:
        return [{"role": "user", "content": _text(line, value, "prompt")}]
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        line.fail(
            f"'messages' = {messages!r:.60}",
            "a list with at least one message",
            'write [{"role": "user", "content": "..."}]',
        )
    chat = [_read_message(line, message) for message in messages]
    if chat[-1]["role"] != "user":
        line.fail(
            f"a last message of role {chat[-1]['role']!r}",
            "'user'",
            "end with what the model shall answer",
        )
    return chat


def _read_message(line: Place, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        line.fail(
            f"a message {message!r:.60}", "an object", 'write {"role": "user", "content": "..."}'
        )
    role = _text(line, message, "role")
    if role not in _ROLES:
        line.fail(f"role {role!r}", f"one of {list(_ROLES)}", "correct the name")
    return {"role": role, "content": _text(line, message, "content")}
