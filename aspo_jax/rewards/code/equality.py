"""Whether what a program printed or returned is what its test expects.

This runs outside the sandbox on whatever a program sent, so nothing here may raise, and nothing may
take more than about linear time: a value is read as lists to be compared, never as a set or a dict,
for keys can be made to collide; and integers are of any size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from aspo_jax.rewards.code import values

_TOLERANCE = 1e-6  # absolute, and relative above 1
_DEEPEST = 100  # levels of a value: below Python's own limit wherever this is called from


# --- printed text ---------------------------------------------------------------------------------

_DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)


def same_output(expected: str, printed: str) -> bool:
    """Line by line without surrounding white space; lines of numbers by value.

    Whole numbers are compared exactly, others within 1e-6, absolute or relative.
    """
    wanted, got = (
        [line.strip() for line in text.strip().splitlines()] for text in (expected, printed)
    )
    return len(wanted) == len(got) and all(map(_same_line, wanted, got))


def _same_line(wanted: str, got: str) -> bool:
    if wanted == got:
        return True
    words, found = wanted.split(), got.split()
    return len(words) == len(found) > 0 and all(map(_same_number, words, found))


def _same_number(wanted: str, got: str) -> bool:
    if not (_DECIMAL.fullmatch(wanted) and _DECIMAL.fullmatch(got)):
        return False
    if Decimal(wanted) == Decimal(got):
        return True
    is_whole = Decimal(wanted) == Decimal(wanted).to_integral_value()
    if is_whole and not set(".eE") & set(wanted):
        return False
    return _is_close(float(wanted), float(got))


def _is_close(wanted: float, got: float) -> bool:
    """Within the tolerance; what is beyond all floats is close to nothing."""
    if not (math.isfinite(wanted) and math.isfinite(got)):
        return False
    return abs(wanted - got) <= _TOLERANCE * max(1.0, abs(wanted))


# --- returned values ------------------------------------------------------------------------------


class Plain(NamedTuple):
    """A value made of builtins, in a form that can be compared and sorted with any other.

    kind: none, number, complex, text, bytes, range, list, tuple, set, dict.
    content: a number, a string, bytes, or a list: of items, sorted for a set, of sorted
        ``[key, value]`` for a dict.
    """

    kind: str
    content: Any


def plain(value: Any) -> Plain:
    """A value of one's own.

    Raises:
        ValueError, TypeError: not made of plain builtins, or deeper than 100 levels.
    """
    return _untag(values.tag(value), 0)


def read_value(line: bytes) -> Plain:
    """The value that a program sent.

    Raises:
        ValueError: not what `values.encode` writes, or deeper than 100 levels.
    """
    try:
        return _untag(json.loads(line), 0)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"no plain value: {error}") from error


def _untag(tagged: Any, depth: int) -> Plain:
    if depth > _DEEPEST:
        raise ValueError(f"a value of more than {_DEEPEST} levels")
    if tagged is None:
        return Plain("none", 0)
    if isinstance(tagged, str):
        return Plain("text", tagged)
    if isinstance(tagged, bool | int | float):
        return Plain("number", tagged)
    if not isinstance(tagged, dict) or len(tagged) != 1:
        raise ValueError("a JSON list, or an object without exactly one kind")
    ((kind, content),) = tagged.items()
    if kind not in _READERS:
        raise ValueError(f"unknown kind of value {kind!r:.40}")
    return _READERS[kind](content, depth + 1)


def _items(content: Any, depth: int) -> list[Plain]:
    if not isinstance(content, list):
        raise ValueError("a collection that is no list")
    return [_untag(item, depth) for item in content]


def _pairs(content: Any, depth: int) -> list[list[Plain]]:
    pairs = [_items(pair, depth) for pair in content]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("an item of a dict is a key and a value")
    return sorted(pairs)


def _numbers(content: Any, depth: int) -> list[Any]:
    items = _items(content, depth)
    if any(item.kind != "number" for item in items):
        raise ValueError("not a number")
    return [item.content for item in items]


def _complex(content: Any, depth: int) -> Plain:
    real, imaginary = _numbers(content, depth)
    return Plain("complex", [real, imaginary]) if imaginary else Plain("number", real)


_READERS: dict[str, Callable[[Any, int], Plain]] = {
    "list": lambda content, depth: Plain("list", _items(content, depth)),
    "tuple": lambda content, depth: Plain("tuple", _items(content, depth)),
    "set": lambda content, depth: Plain("set", sorted(_items(content, depth))),
    "frozenset": lambda content, depth: Plain("set", sorted(_items(content, depth))),
    "dict": lambda content, depth: Plain("dict", _pairs(content, depth)),
    "int": lambda content, _: Plain("number", int(content, 16)),
    "complex": _complex,
    "range": lambda content, depth: Plain("range", _numbers(content, depth)),
    "bytes": lambda content, _: Plain("bytes", bytes.fromhex(content)),
}


def same_value(expected: Plain, got: Plain, is_json: bool) -> bool:
    """Python's equality of values; from JSON a tuple is a list and a float has a tolerance."""
    return _same_json(expected, got) if is_json else expected == got


def _same_json(expected: Plain, got: Plain) -> bool:
    if expected.kind == "list":
        return (
            got.kind in ("list", "tuple")
            and len(expected.content) == len(got.content)
            and all(map(_same_json, expected.content, got.content))
        )
    if expected.kind == "dict" == got.kind:
        return _same_object(expected, got)
    if expected.kind == "number" == got.kind:
        return _same_json_number(expected.content, got.content)
    return expected == got


def _same_object(expected: Plain, got: Plain) -> bool:
    """An object of JSON against a dict with keys of any kind; two keys of one name are not one."""
    names = [_json_name(key) for key, _ in got.content]
    order = sorted(range(len(names)), key=lambda i: names[i] or "")
    return [key.content for key, _ in expected.content] == [names[i] for i in order] and all(
        _same_json(value, got.content[i][1])
        for (_, value), i in zip(expected.content, order, strict=True)
    )


def _json_name(key: Plain) -> str | None:
    """The key as JSON writes it; None where JSON cannot, or nobody would."""
    if key.kind == "none":
        return "null"
    if key.kind == "number":
        return json.dumps(key.content) if abs(key.content) < 2**64 else None
    return key.content if key.kind == "text" else None


def _same_json_number(expected: float, got: float) -> bool:
    if isinstance(expected, bool) != isinstance(got, bool):
        return False
    if expected == got:
        return True
    is_near = isinstance(expected, float) and abs(got) < 2**1023  # an int may be beyond all floats
    return is_near and _is_close(expected, float(got))
