"""From files and flags to a checked Config."""

import argparse
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aspo_jax.config import gin
from aspo_jax.config.checks import cross_checks, factory_problems
from aspo_jax.config.gin import Binding, ConfigError, nearest
from aspo_jax.config.schema import Factories, adapter, arguments, describe, factory_table, help_text
from aspo_jax.config.sections import SECTIONS, Config, attribute, fields

DEFAULT = "countdown_cpu"


def read_config(argv: Sequence[str], factories: Factories) -> Config:
    """The config named by command-line arguments; ``--help`` prints every field and exits.

    factories: 'objective', 'advantage' and 'aggregate', each a mapping from name to factory; the
        factories' keyword arguments are sections of their own.

    Raises ConfigError for every mistake in a file or a ``--set``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m aspo_jax.train",
        description="Train a language model on verifiable rewards.",
        epilog=help_text(factories),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    arguments = parser.parse_args(argv)
    path = find_config(arguments.config)
    found = gin.read_file(path, ())
    for number, text in enumerate(arguments.set, start=1):
        found |= gin.read_flag(text, f"--set #{number}")
    config = _build(found, factories, str(path), path.stem)
    source = "" if arguments.config == DEFAULT else arguments.config
    return dataclasses.replace(config, source=source, settings=tuple(arguments.set))


def parse_config(text: str, factories: Factories, name: str = "text") -> Config:
    """The config written in ``text``, which may not include other files."""
    return _build(gin.read_text(text, name, None, ()), factories, name, name)


def config_folder() -> Path:
    """The config files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def packaged() -> list[str]:
    """Names of the config files that come with the package."""
    return sorted(path.stem for path in config_folder().glob("*.gin"))


def find_config(name: str) -> Path:
    """The file of a config given by path, or by the bare name of a packaged one."""
    candidates = (Path(name).expanduser(), config_folder() / f"{Path(name).stem}.gin")
    is_bare = Path(name).name == name
    for path in candidates[: 2 if is_bare else 1]:
        if path.is_file():
            return path
    raise ConfigError(
        f"--config: no config file {name!r}; expected a path or one of"
        f" {', '.join(packaged())}{nearest(Path(name).stem, packaged())}"
    )


def _build(found: Mapping[str, Binding], factories: Factories, source: str, name: str) -> Config:
    """Check every binding, then every section, then what the sections say of each other."""
    table = factory_table(factories)
    macros = {key: binding for key, binding in found.items() if "." not in key}
    bindings = {key: binding for key, binding in found.items() if "." in key}
    known = [f"{name}.{field}" for name in SECTIONS for field in fields(name)]
    problems = gin.unused_macros(macros, found, known)
    given: dict[str, dict[str, Any]] = {}
    for key, binding in bindings.items():
        owner, _, field = key.partition(".")
        problem = _unknown(owner, field, table)
        try:
            value = gin.evaluate(binding, macros, ())
            problem = problem or _wrong_type(owner, field, value, table)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if problem:
            problems.append(f"{binding.place}: {key} = {binding.found}: {problem}")
        else:
            given.setdefault(owner, {})[field] = value
    _raise(problems)
    _raise(missing(given, bindings, source))
    sections = {attribute(n): cls(**given.get(n, {})) for n, cls in SECTIONS.items()}
    arguments = {
        n: types.MappingProxyType(_coerced(n, given[n], table)) for n in table if n in given
    }
    config = Config(**sections, factories=types.MappingProxyType(arguments), name=name)
    places = {key: binding.place for key, binding in bindings.items()}
    _raise([*factory_problems(config, factories, places), *cross_checks(config, places)])
    return config


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown(owner: str, field: str, table: Mapping[str, Callable[..., Any]]) -> str | None:
    """What is wrong with the name of a binding."""
    if owner not in SECTIONS and owner not in table:
        return f"unknown section {owner}{nearest(owner, (*SECTIONS, *table))}"
    known = fields(owner) if owner in SECTIONS else arguments(table[owner])
    if field not in known:
        kind = "field" if owner in SECTIONS else "argument"
        return f"{owner} has no {kind} {field}{nearest(field, known)}"
    return None


def _wrong_type(
    owner: str, field: str, value: Any, table: Mapping[str, Callable[..., Any]]
) -> str | None:
    """What is wrong with a value by itself."""
    if owner in SECTIONS:
        info = fields(owner)[field]
        bounds = tuple(info.metadata)
        annotation = info.annotation
    else:
        annotation, bounds = arguments(table[owner])[field].annotation, ()
    try:
        adapter(annotation, bounds).validate_python(value)
    except ValidationError:
        return f"expected {describe(annotation, bounds)}, found {value!r}"
    return None


def _coerced(
    name: str, given: Mapping[str, Any], table: Mapping[str, Callable[..., Any]]
) -> dict[str, Any]:
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
