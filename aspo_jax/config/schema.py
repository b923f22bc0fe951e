"""Sections and factories as the user meets them: names, types in words, and the help page."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter

from aspo_jax.config.factories import Factories, arguments, factory_table, find_factory
from aspo_jax.config.gin import ConfigError, nearest
from aspo_jax.config.sections import SECTIONS, fields, section_of
from aspo_jax.paths import path_problem, shorten


def adapter(annotation: Any, bounds: tuple[Any, ...] = ()) -> TypeAdapter[Any]:
    checked: Any = typing.Annotated[annotation, *bounds] if bounds else annotation
    return TypeAdapter(checked, config=ConfigDict(strict=True, allow_inf_nan=False))


_WORDS = {int: "a whole number", float: "a number", str: "quoted text", bool: "True or False"}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "quoted text": "quoted texts"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe(annotation: Any, bounds: Iterable[Any] = ()) -> str:
    """A type in words, with its bounds."""
    limits = [
        f"{sign} {getattr(bound, name)}"
        for bound in bounds
        for name, sign in _SIGNS.items()
        if hasattr(bound, name)
    ]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return f"{describe(arguments[0], bounds)} or None"
    if origin is Annotated:
        return describe(arguments[0], (*bounds, *arguments[1:]))
    if origin is tuple:
        item, sign, bound = describe(arguments[0]).partition(" >")
        return f"a list of {_PLURALS.get(item, 'values')}{sign}{bound}"
    words = _WORDS.get(annotation, str(annotation))
    return f"{words} {' and '.join(limits)}" if limits else words


_INT_MAX = 2**31 - 1  # seeds, counts and ids are 32-bit integers on the devices
_FLOAT_MIN, _FLOAT_MAX = 1.2e-38, 3.4e38  # what float32 holds


def value_problem(value: Any, unit: str = "") -> str | None:
    """What is wrong with a value of the right type, whatever the setting; None if nothing.

    unit: the setting's; the text of a "path" must be one.
    """
    if isinstance(value, tuple):
        return next(filter(None, (_item_problem(item) for item in value)), None)
    if isinstance(value, str) and not value.strip():
        empty = "leave it out or write None" if unit == "path" else "fill it in or leave it out"
        return f"found a blank text {value!r}; {empty}"
    if isinstance(value, str) and unit == "path":
        return path_problem(value)
    return _item_problem(value)


def _item_problem(value: Any) -> str | None:
    if isinstance(value, str):
        return _text_problem(value)
    if isinstance(value, int) and abs(value) > _INT_MAX:
        return (
            f"expected a whole number of 32 bits, at most {_INT_MAX}, found {shorten(repr(value))}"
        )
    if isinstance(value, float) and value and not _FLOAT_MIN <= abs(value) <= _FLOAT_MAX:
        return (
            f"expected 0 or a number from {_FLOAT_MIN} to {_FLOAT_MAX} in size, for float32 holds"
            f" no other, found {value!r}"
        )
    return None


def _text_problem(value: str) -> str | None:
    if not value:
        return "found an empty text ''; fill it in or leave it out"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "found half a surrogate pair, expected Unicode text; write the character in full"
    return "found a NUL in the text; leave it out" if "\0" in value else None


# --- the help pages ---------------------------------------------------------------------------


def help_text(factories: Factories, topic: str | None = None) -> str:
    """Every section and field with type, default, unit and meaning, then the factories'.

    topic: one section, field or factory to show alone.

    Raises:
        ConfigError: there is none of that name.
    """
    if topic is not None:
        return _help_topic(factories, topic)
    blocks = ["settings (in a file: Section.field = value):"]
    blocks += [_section_help(name) for name in SECTIONS]
    for kind, named in factories.items():
        blocks.append(f"{kind} factories and their arguments:")
        blocks += [_factory_help(name, factory, is_brief=True) for name, factory in named.items()]
    return "\n\n".join(blocks)


def _help_topic(factories: Factories, topic: str) -> str:
    if ":" in topic:  # of any kind: what is not ours is found by its module alone
        return _factory_help(section_of(topic), find_factory(factories, "objective", topic))
    table = factory_table(factories)
    by_folded = {name.lower(): name for name in (*SECTIONS, *table)}
    name = by_folded.get(topic.partition(".")[0].lower())
    if name in SECTIONS:
        return _section_help(name)
    if name is not None:
        return _factory_help(name, table[name])
    raise ConfigError(
        f"--help {shorten(topic)}: unknown section or factory{nearest(topic, by_folded.values())};"
        f" expected one of {', '.join((*SECTIONS, *table))}"
    )


def _section_help(name: str) -> str:
    rows = [f"  {name}: {inspect.getdoc(SECTIONS[name])}"]
    for field, info in fields(name).items():
        default = "required" if info.is_required() else f"default {info.default!r}"
        unit = info.json_schema_extra["unit"]
        rows.append(f"    {name}.{field}  ({_short(info.annotation)}, {default})")
        rows.append(f"        {f'[{unit}] ' if unit else ''}{info.description}{_bounds(info)}")
    return "\n".join(rows)


def _bounds(info: Any) -> str:
    words = describe(int, info.metadata).removeprefix("a whole number").strip()
    return f" ({words})" if words else ""


def _factory_help(name: str, factory: Callable[..., Any], *, is_brief: bool = False) -> str:
    """A factory's arguments with their meanings; its whole docstring too unless brief."""
    doc = inspect.getdoc(factory) or ""
    lines = doc.splitlines()[: 1 if is_brief else None]
    rows = [f"  {name}: {lines[0]}" if lines else f"  {name}"]
    meaning = meanings(factory)
    for argument, parameter in arguments(factory).items():
        has_default = parameter.default is not parameter.empty
        default = f"default {parameter.default!r}" if has_default else "required"
        rows.append(f"    {name}.{argument}  ({_short(parameter.annotation)}, {default})")
        rows += [f"        {meaning[argument]}"] if argument in meaning else []
    return "\n".join([*rows, *(f"  {line}".rstrip() for line in lines[1:])])


_MEANING = re.compile(r"^( *)(\w+(?:, \w+)*): (.+(?:\n\1 +\S.*)*)", re.MULTILINE)


def meanings(factory: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says of each argument: ``name: meaning`` or ``one, other: meaning``."""
    found = _MEANING.findall(inspect.getdoc(factory) or "")
    return {name: " ".join(text.split()) for _, names, text in found for name in names.split(", ")}


def _short(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return f"tuple[{_short(getattr(item, '__origin__', item))}, ...]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
