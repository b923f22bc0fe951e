"""Objectives by their names, for commands that compare several outside a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aspo_jax.config import Config, ConfigError
from aspo_jax.config.factories import arguments, find_factory
from aspo_jax.config.gin import read_flag
from aspo_jax.config.reading import changed_config
from aspo_jax.config.sections import section_of
from aspo_jax.config.suites import bound
from aspo_jax.losses import Objective
from aspo_jax.parts import FACTORIES, make


class Rule(NamedTuple):
    """An objective and the settings that it was made with, by its arguments."""

    objective: Objective
    settings: Mapping[str, Any]


NO_SETTINGS: Mapping[str, Mapping[str, Any]] = {}


def named_objectives(
    names: Sequence[str],
    flag: str,
    settings: Sequence[str] = (),
    known: Mapping[str, Mapping[str, Any]] = NO_SETTINGS,
) -> dict[str, Rule]:
    """The rules by their names; one that is named twice has a label: ``aspo``, ``aspo.wide``.

    flag: of the command line, that names them; for messages.
    settings: ``rule.argument=value`` each, as ``--set`` has them.
    known: settings that hold where none is given here: section -> argument -> value.

    Raises:
        ConfigError: an unknown rule or argument, a value that the rule refuses, a setting of a
            rule that is not named.
    """
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"{flag} names {repeated[0]} twice; give one a label, such as {repeated[0]}.b"
        )
    config = _config_of(names, flag, settings, known)
    return {name: Rule(make(config, "objective", name), _settings(config, name)) for name in names}


def _settings(config: Config, name: str) -> dict[str, Any]:
    known = arguments(find_factory(FACTORIES, "objective", name))
    defaults = {k: p.default for k, p in known.items() if p.default is not p.empty}
    return defaults | dict(config.factories.get(section_of(name), {}))


def _config_of(
    names: Sequence[str],
    flag: str,
    settings: Sequence[str],
    known: Mapping[str, Mapping[str, Any]],
) -> Config:
    """A config that has the rules as its objective and penalties: it checks their settings."""
    for name in names:
        try:
            find_factory(FACTORIES, "objective", name)
        except ConfigError as error:
            raise ConfigError(f"{flag}: {error}") from error
    sections = {section_of(name) for name in names}
    given = {
        f"{section}.{argument}": bound(value, "the run's config")
        for section in sections & set(known)
        for argument, value in known[section].items()
    }
    for number, text in enumerate(settings, start=1):
        for key, binding in read_flag(text, f"--set #{number}").items():
            if (section := key.rpartition(".")[0]) not in sections:
                expected = ", ".join(sorted(sections))
                raise ConfigError(
                    f"--set #{number}: {section} is not among {flag}; expected {expected}"
                )
            given[key] = binding
    first, *rest = names
    named = {"Objective.name": bound(first, flag), "Objective.penalties": bound(tuple(rest), flag)}
    return changed_config(named | given, FACTORIES)
