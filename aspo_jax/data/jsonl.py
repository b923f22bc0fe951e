"""JSON, plain or gzipped: one object a line, or one array of objects; each is checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from aspo_jax.data.rows import DataError, Found, Place
from aspo_jax.paths import check_format, decode, shorten

_BOM = b"\xef\xbb\xbf"
_OPENINGS = {b"{", b"[", b"[{"}  # the first line of JSON that is spread over several


def lines(data: bytes, where: str) -> Iterator[Found]:
    """The objects of a file with one a line.

    Raises:
        DataError, PathError: the file cannot be read at all.
    """
    for number, line in enumerate(_split(data, where), start=1):
        place = Place(f"{where}:{number}", number)
        try:
            yield place, _parse_line(place, line)
        except DataError as error:
            yield place, error


def array(data: bytes, where: str) -> Iterator[Found]:
    """The objects of a file that is one array of them, or has one a line.

    Raises:
        DataError, PathError: the file cannot be read at all.
    """
    check_format(data, Path(where))
    if not data.lstrip().startswith(b"["):
        yield from lines(data, where)
        return
    for number, element in enumerate(_elements(decode(data, Path(where)), where), start=1):
        place = Place(f"{where}:{element.line} (element {number})", number)
        try:
            yield place, _parse(place, element.text)
        except DataError as error:
            yield place, error


# --- lines ----------------------------------------------------------------------------------------


def _split(data: bytes, where: str) -> list[bytes]:
    check_format(data, Path(where))
    if not data.strip():
        raise DataError(
            f"{where}: found an empty file, expected at least one line; write one JSON object per "
            "line"
        )
    found = data.removesuffix(b"\n").split(b"\n")
    first = found[0].strip()
    if first in _OPENINGS:
        is_array = first.startswith(b"[")
        remedy = "let the file's name end in .json" if is_array else "rewrite it: jq -c . OLD > NEW"
        raise DataError(
            f"{where}:1: found {first.decode()!r} alone on a line, expected one whole JSON object "
            f"per line; {remedy}"
        )
    return found


def _parse_line(line: Place, data: bytes) -> dict[str, Any]:
    if data.startswith(_BOM):
        line.fail("a byte-order mark", "plain UTF-8", "save the file as UTF-8 without BOM")
    if not data.strip():
        line.fail("an empty line", "a JSON object", "delete the line")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line.fail(
            f"bytes that are not UTF-8 ({error.reason} at byte {error.start} of the line)",
            "UTF-8",
            "convert the file to UTF-8",
        )
    return _parse(line, text)


# --- one array ------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")
_EXTENT = json.JSONDecoder(parse_int=str, parse_float=str)  # finds where a value ends


class _Element(NamedTuple):
    line: int  # on which it begins
    text: str


def _elements(text: str, where: str) -> Iterator[_Element]:
    """The texts of an array's elements. One that is no JSON hides where the next begins."""
    position, line, number = 0, 1, 0

    def skip(start: int) -> int:
        match = _SPACE.match(text, start)
        return match.end() if match else start

    def fail(found: str) -> NoReturn:
        raise DataError(
            f"{where}:{line} (element {number}): found {found}, expected one JSON array of "
            "objects; correct it, or copy the file again if it was cut off"
        )

    start = skip(skip(0) + 1)
    while text[start : start + 1] != "]":
        line, number = line + text.count("\n", position, start), number + 1
        try:
            _, end = _EXTENT.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            fail(f"bad JSON ({getattr(error, 'msg', error)})")
        yield _Element(line, text[start:end])
        position, start = start, skip(end)
        if text[start : start + 1] == ",":
            start = skip(start + 1)
            if text[start : start + 1] == "]":
                fail("a comma behind the last element")
        elif text[start : start + 1] != "]":
            fail(f"{shorten(text[start : start + 20])!r} behind the element")
    if number == 0:
        fail("an empty array")
    if skip(start + 1) < len(text):
        fail(f"{shorten(text[start + 1 : start + 21])!r} behind the array")


# --- one object -----------------------------------------------------------------------------------


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


def _parse(place: Place, text: str) -> dict[str, Any]:
    """The object that a text is."""
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_twins,
        )
    except json.JSONDecodeError as error:
        found = f"bad JSON ({error.msg} at column {error.colno})"
        place.fail(found, "a JSON object", "write one whole object per line")
    except (ValueError, RecursionError) as error:
        place.fail(f"bad JSON ({error})", "a JSON object", "correct the value")
    if not isinstance(value, dict):
        remedy = 'write {"prompt": ..., "answer": ..., "kind": ...}'
        if isinstance(value, list):
            remedy += ", or let the name of a file that is one array end in .json"
        place.fail(f"a JSON {type(value).__name__}", "a JSON object", remedy)
    return value
