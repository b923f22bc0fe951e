"""Sections and factories as the user meets them: names, types in words, and the help page."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from aspo_jax.config.sections import SECTIONS, fields

Factories = Mapping[str, Mapping[str, Callable[..., Any]]]  # kind -> name -> factory


def factory_table(factories: Factories) -> dict[str, Callable[..., Any]]:
    """All factories by name. Raises ValueError if two of them share one."""
    table: dict[str, Callable[..., Any]] = {}
    for kind, named in factories.items():
        for name, factory in named.items():
            if name in table or name in SECTIONS:
                raise ValueError(f"the {kind} factory {name!r} has the name of another section")
            table[name] = factory
    return table


def arguments(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a factory that a config can give: those with a plain type."""
    parameters = inspect.signature(factory, eval_str=True).parameters
    return {k: p for k, p in parameters.items() if _is_plain(p.annotation)}


def _is_plain(annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(_is_plain(a) for a in arguments if a is not Ellipsis)
    return origin is Literal or annotation in (int, float, str, bool, type(None))


def adapter(annotation: Any, bounds: tuple[Any, ...] = ()) -> TypeAdapter[Any]:
    checked: Any = typing.Annotated[annotation, *bounds] if bounds else annotation
    return TypeAdapter(checked, config=ConfigDict(strict=True, allow_inf_nan=False))


_WORDS = {int: "a whole number", float: "a number", str: "quoted text", bool: "True or False"}
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
    if origin is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "quoted texts"}
        return f"a list of {plural.get(arguments[0], 'values')}"
    words = _WORDS.get(annotation, str(annotation))
    return f"{words} {' and '.join(limits)}" if limits else words


def help_text(factories: Factories) -> str:
    """Every section and field with type, default, unit and meaning, then the factories'."""
    blocks = ["settings (in a file: Section.field = value):"]
    for name, cls in SECTIONS.items():
        rows = [f"  {name}: {inspect.getdoc(cls)}"]
        for field, info in fields(name).items():
            default = "required" if info.is_required() else f"default {info.default!r}"
            unit = info.json_schema_extra["unit"]
            rows.append(f"    {name}.{field}  ({_short(info.annotation)}, {default})")
            rows.append(f"        {f'[{unit}] ' if unit else ''}{info.description}")
        blocks.append("\n".join(rows))
    for kind, named in factories.items():
        blocks.append(f"{kind} factories and their arguments:")
        for name, factory in named.items():
            first = (inspect.getdoc(factory) or "").partition("\n")[0]
            rows = [f"  {name}: {first}" if first else f"  {name}"]
            for argument, parameter in arguments(factory).items():
                has_default = parameter.default is not parameter.empty
                default = f"default {parameter.default!r}" if has_default else "required"
                rows.append(f"    {name}.{argument}  ({_short(parameter.annotation)}, {default})")
            blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def _short(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
