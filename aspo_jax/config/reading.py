"""From files and flags to a checked Config."""

import argparse
import dataclasses
import os
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aspo_jax.config import gin
from aspo_jax.config.checks import argument_problems, cross_checks, factory_problems
from aspo_jax.config.factories import Factories, Factory, arguments, factory_table, used_table, uses
from aspo_jax.config.gin import Binding, ConfigError, config_folder, nearest
from aspo_jax.config.schema import adapter, describe, help_text, value_problem
from aspo_jax.config.sections import SECTIONS, Config, attribute, fields
from aspo_jax.errors import CommandParser
from aspo_jax.paths import PathError, page, shorten, shown, user_path

DEFAULT = "countdown_cpu"


def read_config(argv: Sequence[str], factories: Factories) -> Config:
    """The config named by the training command's arguments; ``--help`` and the like exit.

    factories: kind -> name -> factory; its keyword arguments are a section of its name.

    Raises ConfigError for every mistake in a file or a ``--set``.
    """
    factory_table(factories)
    parser = CommandParser(
        "train",
        "Train a language model on verifiable rewards.",
        epilog=f"Files: {page('config.md')} says how they are written.",
        add_help=False,
    )
    parser.add_argument(
        *("-h", "--help"),
        nargs="?",
        const="",
        metavar="SECTION",
        help="show every setting and exit; or those of one section or factory, such as Sampler",
    )
    config_flags(parser)
    found = parser.parse_args(argv)
    if found.help is not None:
        text = help_text(factories, found.help or None)
        print(text if found.help else f"{parser.format_help()}\n{text}")
        raise SystemExit(0)
    return read(found, factories)


def config_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags that name a config; `read` reads them."""
    parser.add_argument(
        "--config",
        default=DEFAULT,
        metavar="PATH",
        help=f"a .gin file, or one of: {', '.join(packaged())} (default: {DEFAULT})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="Section.field=value",
        help="override one setting; may be repeated",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the config with all settings and exit"
    )


def read(flags: argparse.Namespace, factories: Factories) -> Config:
    """The config that `config_flags` name; printed, and the command ended, if that was asked for.

    Raises ConfigError for every mistake in a file or a ``--set``.
    """
    path = find_config(flags.config)
    found = gin.read_file(path, ())
    for number, text in enumerate(flags.set, start=1):
        found |= gin.read_flag(text, f"--set #{number}")
    config = _build(found, factories, shown(path), path.stem)
    if flags.print_config:
        print(config.text(), end="")
        raise SystemExit(0)
    source = "" if flags.config == DEFAULT else flags.config
    return dataclasses.replace(config, source=source, settings=tuple(flags.set))


def parse_config(text: str, factories: Factories, name: str = "text") -> Config:
    """The config written in ``text``, which may not include other files."""
    return _build(gin.read_text(text, name, None, ()), factories, name, name)


def changed_config(changes: Mapping[str, Binding], factories: Factories) -> Config:
    """The default config with other bindings, of which a message names the places."""
    path = find_config(DEFAULT)
    return _build({**gin.read_file(path, ()), **changes}, factories, shown(path), path.stem)


def packaged() -> list[str]:
    """Names of the config files that come with the package."""
    return sorted(path.stem for path in config_folder().glob("*.gin"))


def find_config(name: str) -> Path:
    """The file of a config given by path, or by the bare name of a packaged one."""
    try:
        path = user_path(name, "--config")
    except PathError as error:
        raise ConfigError(str(error)) from error
    is_bare = path.name == name
    for candidate in (path, config_folder() / f"{path.stem}.gin")[: 2 if is_bare else 1]:
        if os.path.lexists(candidate):  # never raises; what it is, its reader will say
            return candidate
    raise ConfigError(
        f"--config: no config file {shorten(name)!r}; expected a path or one of"
        f" {', '.join(packaged())}{nearest(path.stem, packaged())}"
    )


def _build(found: Mapping[str, Binding], factories: Factories, source: str, name: str) -> Config:
    """Check every binding, then every section, then what the sections say of each other."""
    macros = {key: binding for key, binding in found.items() if "." not in key}
    bindings = {key: binding for key, binding in found.items() if "." in key}
    places = {key: binding.place for key, binding in bindings.items()}
    known = [f"{name}.{field}" for name in SECTIONS for field in fields(name)]
    problems = gin.unused_macros(macros, found, known)
    values = {}
    for key, binding in bindings.items():
        try:
            values[key] = gin.evaluate(binding, macros, ())
        except ConfigError as error:
            problems.append(str(error))
    labelled = _labelled(values)
    used = list(uses((*SECTIONS, *labelled), lambda *key: _named(values, *key)))
    table, wrong_names = used_table(factories, used, places)
    given: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        owner, _, field = key.rpartition(".")
        known = (*SECTIONS, *labelled, *table)
        problem = _unknown(owner, field, known, table) or _wrong_type(owner, field, value, table)
        if problem:
            problems.append(f"{places[key]}: {key} = {bindings[key].found}: {problem}")
        else:
            given.setdefault(owner, {})[field] = value
    _raise([*problems, *wrong_names])
    _raise(missing(given, bindings, source))
    sections = {attribute(n): cls(**given.get(n, {})) for n, cls in SECTIONS.items()}
    arguments = {
        n: types.MappingProxyType(_coerced(n, given[n], table)) for n in table if n in given
    }
    config = Config(
        **sections,
        factories=types.MappingProxyType(arguments),
        mixture=_mixture(given, labelled),
        name=name,
    )
    _raise([*factory_problems(config, table, used, places), *cross_checks(config, places)])
    _raise([*argument_problems(config, table, places)])
    return config


def _labelled(values: Mapping[str, Any]) -> dict[str, str]:
    """The sections of the sources that a mixture names, and their labels."""
    labels = values.get("Data.mixture", ())
    listed = labels if isinstance(labels, tuple) else ()
    return {f"Data.{label}": label for label in listed if isinstance(label, str)}


def _mixture(
    given: Mapping[str, Mapping[str, Any]], labelled: Mapping[str, str]
) -> Mapping[str, Any]:
    """Label -> its source; what its section leaves out is as Data says."""
    shared = {k: v for k, v in given.get("Data", {}).items() if k != "mixture"}
    parts = {
        label: SECTIONS["Data"](**{**shared, **given.get(section, {})})
        for section, label in labelled.items()
    }
    return types.MappingProxyType(parts)


def _named(values: Mapping[str, Any], section: str, field: str) -> list[str]:
    """The factories that a setting names; what is no text is said elsewhere."""
    info = fields(section)[field]
    shared = values.get(f"{section.partition('.')[0]}.{field}")
    default = () if info.is_required() else info.default
    value = values.get(f"{section}.{field}", default if shared is None else shared)
    listed = value if isinstance(value, tuple) else (value,)
    return [text for text in listed if isinstance(text, str) and text.strip()]


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown(
    owner: str, field: str, owners: Collection[str], table: Mapping[str, Factory]
) -> str | None:
    """What is wrong with the name of a binding; owners: the sections there are."""
    if owner not in owners:
        return f"unknown section {owner}{nearest(owner, owners)}"
    known = arguments(table[owner]) if owner in table else fields(owner)
    if field not in known:
        kind = "argument" if owner in table else "field"
        return f"{owner} has no {kind} {field}{nearest(field, known)}"
    return None


def _wrong_type(owner: str, field: str, value: Any, table: Mapping[str, Factory]) -> str | None:
    """What is wrong with a value by itself."""
    unit, bounds = "", ()
    if owner in table:
        annotation = arguments(table[owner])[field].annotation
    else:
        info = fields(owner)[field]
        unit, bounds = info.json_schema_extra["unit"], tuple(info.metadata)
        annotation = info.annotation
    try:
        return value_problem(adapter(annotation, bounds).validate_python(value), unit)
    except ValidationError:
        return f"expected {describe(annotation, bounds)}, found {shorten(repr(value))}"


def _coerced(name: str, given: Mapping[str, Any], table: Mapping[str, Factory]) -> dict[str, Any]:
    """A factory's arguments as their annotated types (3 for a float becomes 3.0)."""
    known = arguments(table[name])
    return {k: adapter(known[k].annotation).validate_python(v) for k, v in given.items()}


def missing(
    given: Mapping[str, Mapping[str, Any]], bindings: Mapping[str, Binding], source: str
) -> list[str]:
    required = [
        f"  {name}.{field}: {describe(info.annotation, info.metadata)}; {info.description}"
        for name in SECTIONS
        for field, info in fields(name).items()
        if info.is_required() and field not in given.get(name, {})
    ]
    if not required:
        return []
    return [f"{source}: {len(required)} required settings are missing:", *required]
