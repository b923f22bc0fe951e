"""Factories that a setting names: ours by a word, anyone's as 'package.module:factory'.

A factory's keyword arguments are the section of its name. One that is used twice gets a label:
``Objective.penalties = ('kl_penalty', 'kl_penalty.b')`` reads ``kl_penalty.beta`` and
``kl_penalty.b.beta``; the metrics of the second are named ``ref_kl_b`` and so on.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from aspo_jax.config.gin import ConfigError, nearest
from aspo_jax.config.sections import SECTIONS, fields, section_of
from aspo_jax.errors import UserError
from aspo_jax.imports import NotFound, load_callable, raised_at

Factory = Callable[..., Any]
Factories = Mapping[str, Mapping[str, Factory]]  # kind -> name -> factory

# Modules that the names of factories may be short for.
_ALIASES = {"reasoning_gym": "aspo_jax.data.reasoning"}
_NAME = re.compile(r"(?P<factory>([\w.]+:)?[A-Za-z_]\w*)(\.[A-Za-z_]\w*)?")


class Use(NamedTuple):
    """A factory as a setting names it.

    kind: which table of `Factories` ours are in.
    key: the setting.
    text: what it says: 'aspo', 'kl_penalty.b' or 'my_rules:mine'.
    """

    kind: str
    key: str
    text: str

    @property
    def section(self) -> str:
        """Where its arguments are set."""
        return section_of(self.text)


def uses(sections: Iterable[str], named: Callable[[str, str], Iterable[str]]) -> Iterator[Use]:
    """Every factory that the settings name; named: (section, field) -> those that one names."""
    for section in sections:
        for field, info in fields(section).items():
            if kind := info.json_schema_extra["factory"]:
                yield from (Use(kind, f"{section}.{field}", text) for text in named(section, field))


def find_factory(factories: Factories, kind: str, text: str) -> Factory:
    """The factory that a setting names.

    Raises:
        ConfigError: there is none of that name, or it is no name.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"expected one of {', '.join(sorted(factories[kind]))}, or "
            "'package.module:factory', either with a label behind a dot"
        )
    name = match["factory"]
    if ":" not in name:
        if name in factories[kind]:
            return factories[kind][name]
        raise ConfigError(
            f"unknown {kind} {name!r}{nearest(name, factories[kind])}; expected one of"
            f" {', '.join(sorted(factories[kind]))}, or 'package.module:factory'"
        )
    module, _, attribute = name.partition(":")
    try:
        factory = load_callable(f"{_ALIASES.get(module, module)}:{attribute}")
        arguments(factory)
    except NotFound as problem:
        raise ConfigError(str(problem)) from problem
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"its signature cannot be read ({error})") from error
    return factory


def make(
    factories: Factories,
    kind: str,
    text: str,
    settings: Mapping[str, Mapping[str, Any]],
    *given: Any,
    **shared: Any,
) -> Any:
    """What a factory makes of its section of the settings, and of what else it is given.

    Raises:
        ConfigError: it refuses its arguments or fails.
    """
    factory, section = find_factory(factories, kind, text), section_of(text)
    try:
        return factory(*given, **shared, **settings.get(section, {}))
    except UserError:
        raise
    except ValueError as error:
        is_named = section.partition(".")[0] in str(error)
        raise ConfigError(f"{'' if is_named else f'{text}: '}{error}") from error
    except Exception as error:
        raise ConfigError(f"the {kind} {text!r} fails: {raised_at(error)}") from error


def factory_table(factories: Factories) -> dict[str, Factory]:
    """Our factories by name. Raises ValueError if two of them share one."""
    table: dict[str, Factory] = {}
    for kind, named in factories.items():
        for name, factory in named.items():
            if name in table or name in SECTIONS:
                raise ValueError(f"the {kind} factory {name!r} has the name of another section")
            table[name] = factory
    return table


def used_table(
    factories: Factories, used: list[Use], places: Mapping[str, str]
) -> tuple[dict[str, Factory], list[str]]:
    """Every section of a factory that a config may set, and what is wrong with the names."""
    table, problems, named = factory_table(factories), [], {}
    for use in used:
        where = f"{places[use.key]}: " if use.key in places else ""
        try:
            factory = find_factory(factories, use.kind, use.text)
        except ConfigError as error:
            is_ours = _NAME.fullmatch(use.text) and ":" not in use.text
            problems.append(f"{where}{'' if is_ours else f'{use.key} = {use.text!r}: '}{error}")
            continue
        other = named.setdefault(use.section, factory)
        if use.section in SECTIONS or other is not factory:
            problems.append(
                f"{where}{use.key}: {use.text!r} has the name of another section,"
                f" {use.section}; give it a label: '{use.text}.b'"
            )
        table[use.section] = factory
    return table, problems


def arguments(factory: Factory) -> dict[str, inspect.Parameter]:
    """The arguments of a factory that a config can give: those with a plain type.

    Without an annotation the type is that of the default.
    """
    parameters = inspect.signature(factory, eval_str=True).parameters
    typed = {name: _with_type(parameter) for name, parameter in parameters.items()}
    return {name: p for name, p in typed.items() if _is_plain(p.annotation)}


def _with_type(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.annotation is not parameter.empty or parameter.default in (None, parameter.empty):
        return parameter
    return parameter.replace(annotation=type(parameter.default))


def _is_plain(annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(_is_plain(a) for a in inner if a is not Ellipsis)
    return origin is Literal or annotation in (int, float, str, bool, type(None))
