"""Python values as JSON and back: the only thing that leaves a sandbox besides text.

Exact builtin types only. An object that lies about its equality cannot be written, and what is read
is made of builtins whatever was sent. Subclasses of dict (Counter, defaultdict) are dicts.

`decode` is for use inside a sandbox. Outside, `aspo_jax.rewards.code.equality` reads what was sent:
it builds no set or dict, which keys made to collide would slow down.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False  # typing is slow to import, and this runs once per test
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PLAIN = (type(None), bool, float, str)
_COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MAKERS: dict[str, Callable[[Any], Any]] = _COLLECTIONS | {
    "dict": dict,
    "int": lambda content: int(content, 16),
    "range": lambda content: range(*content),
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
}


def tag(value: Any) -> Any:
    """The value in JSON's types: a collection is ``{kind: items}``, so is what JSON cannot hold.

    Raises:
        TypeError, RecursionError: not a plain value, or one without end.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:  # a long one as hexadecimal: Python refuses to write more than 4300 digits
        return value if value.bit_length() <= 64 else {"int": hex(value)}
    if _COLLECTIONS.get(kind.__name__) is kind:
        return {kind.__name__: [tag(item) for item in value]}
    if dict in kind.__mro__:
        return {"dict": [[tag(k), tag(v)] for k, v in dict.items(value)]}
    if kind is range:
        return {"range": [tag(n) for n in (value.start, value.stop, value.step)]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is bytes:
        return {"bytes": value.hex()}
    raise TypeError(f"a {kind.__name__} is no plain value")


def _untag(value: Any) -> Any:
    if isinstance(value, list):
        return [_untag(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind of value {kind!r}")
    return _MAKERS[kind](_untag(content))


def encode(value: Any) -> str:
    """One line of JSON.

    Raises:
        TypeError, RecursionError: not a plain value, or one without end.
    """
    return json.dumps(tag(value))


def decode(line: str | bytes) -> Any:
    """The value of a line.

    Raises:
        ValueError, TypeError, RecursionError: not what `encode` writes.
    """
    return _untag(json.loads(line))
