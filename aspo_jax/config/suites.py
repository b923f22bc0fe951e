"""Suites: sets of held-out problems and how they are asked, as data in `configs/eval/*.gin`.

    Suite.sets = ('gsm8k', 'mine')
    Suite.temperature = 0.8              # of every set that does not say otherwise
    gsm8k.paths = ('gsm8k/test.jsonl', 'hub:openai/gsm8k/main/test')
    gsm8k.prompt = 'question'

A ``--set`` of Suite is of all sets, whatever their files say. Settings of the model, the sampler
and the graders are those of a training config, as far as they mean something here (`ENGINE`).
"""

import ast
import dataclasses
import datetime
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from aspo_jax.config import gin
from aspo_jax.config.checks import pattern_problem
from aspo_jax.config.gin import Binding, ConfigError, config_folder, nearest
from aspo_jax.config.schema import adapter, describe, value_problem
from aspo_jax.config.sections import SECTIONS, section, setting
from aspo_jax.paths import PathError, shorten, user_path

# Sections of a training config that an evaluation has too, without what has no meaning in it.
ENGINE: Mapping[str, tuple[str, ...]] = {
    "Model": ("dtype", "attention"),
    "Sampler": (
        *("slots", "stop_ids", "stop_strings", "page", "cache_tokens", "cache_type"),
        "paged_kernel",
    ),
    "Reward": tuple(
        name
        for name in SECTIONS["Reward"].__dataclass_fields__
        if not re.match("shapes|overlong|max_failures", name)
    ),
    "Runtime": tuple(SECTIONS["Runtime"].__dataclass_fields__),
    "Run": ("seed",),
}
Flags = Sequence[tuple[str, str]]  # where it is written, and 'Section.field=value'
_MEANT = {
    "Sampler.temperature": "Suite.temperature",
    "Sampler.top_k": "Suite.top_k",
    "Sampler.top_p": "Suite.top_p",
    "Sampler.max_response_tokens": "Suite.max_response_tokens",
    "Train.samples_per_prompt": "Suite.samples",
    "Evaluate.samples": "Suite.samples",
    "Evaluate.prompts": "Suite.limit",
    "Evaluate.seed": "Suite.seed",
    "Evaluate.temperature": "Suite.temperature",
    "Evaluate.top_k": "Suite.top_k",
    "Evaluate.top_p": "Suite.top_p",
    "Evaluate.min_p": "Suite.min_p",
}


@section
class EvaluationSet:
    """One set of problems; what its section leaves out is as ``Suite`` says."""

    paths: tuple[str, ...] = setting(
        ..., "", "files below the data folder, or 'hub:owner/name/subset/split'; the first there is"
    )
    layout: Literal["plain", "verl"] = setting("plain", "", "whose names the fields have")
    id: str | None = setting(None, "field", "a row's name; rows without it are numbered")
    prompt: str | None = setting(
        None, "field", "the question, a text or a chat; None: 'prompt' or 'messages'"
    )
    answer: str | None = setting(
        None, "field", "what the grader needs, 'answer' if None; '*': the whole record"
    )
    answer_pattern: str | None = setting(
        None, "", "regular expression; its first group in the answer is taken"
    )
    grader: str | None = setting(None, "", "judges every row; None: the row's field 'kind' says")
    template: str | None = setting(
        None, "", "the user's message: '{prompt}' is the question, '{other}' another field"
    )
    system: str | None = setting(None, "", "a message of the system before the question")
    window: str | None = setting(None, "field", "a date or number of which only a span is asked")
    since: str | None = setting(None, "", "first date ('2024-08-01') or number ('11') of the span")
    until: str | None = setting(None, "", "last date or number of the span, itself included")
    size: int | None = setting(
        None, "prompts", "of the published set; the score of fewer is not comparable", ge=1
    )
    limit: int | None = setting(None, "prompts", "only the first so many; None: all", ge=1)
    samples: int = setting(1, "samples", "answers per prompt: the k of avg@k", ge=1)
    temperature: float = setting(0.0, "", "sampling temperature; 0: always the likeliest", ge=0)
    top_k: int = setting(0, "tokens", "draw from the k likeliest; 0 = off", ge=0)
    top_p: float = setting(1.0, "share", "draw from the likeliest mass p; 1 = off", gt=0, le=1)
    min_p: float = setting(
        0.0, "share", "draw from tokens this share as likely as the likeliest; 0 = off", ge=0, le=1
    )
    max_response_tokens: int = setting(2048, "tokens", "longest response", ge=1)


@section
class SuiteSettings:
    """Which sets there are; beside these, Suite has every setting of a set but ``paths``."""

    sets: tuple[str, ...] = setting(..., "", "names of the sets, each a section with ``paths``")
    seed: int = setting(1, "", "names the random draws: the same seed draws the same", ge=0)


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is evaluated.

    sets: name -> its settings, in their order.
    changed: what flags set otherwise than the file has it, one line each.
    engine: bindings of the sections of `ENGINE`.
    """

    name: str
    seed: int
    sets: Mapping[str, EvaluationSet]
    changed: tuple[str, ...] = ()
    engine: Mapping[str, Binding] = dataclasses.field(default_factory=dict)


_OF_SETS = typing.cast(Any, EvaluationSet).__pydantic_fields__
_OF_SUITE = {
    **typing.cast(Any, SuiteSettings).__pydantic_fields__,
    **{name: info for name, info in _OF_SETS.items() if name != "paths"},
}


def bound(value: Any, place: str) -> Binding:
    """A literal as a binding."""
    return Binding(place, ast.parse(repr(value), mode="eval").body)


def suites() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in (config_folder() / "eval").glob("*.gin"))


def read_suite(name: str, flags: Flags = (), what: str = "--suite") -> Suite:
    """A packaged suite, or that of a file, with settings of the command line.

    what: where the name was written, for the message.

    Raises:
        ConfigError: every mistake in the file or a flag.
    """
    path = _find_suite(name, what)
    return suite_of(gin.read_file(path, ()), path.stem, flags)


def file_suite(path: str | Path, flags: Flags = ()) -> Suite:
    """The suite of one file of problems.

    Raises:
        ConfigError: a mistake in a flag.
    """
    name = re.sub(r"\W|^(?=\d)", "_", Path(path).name.partition(".")[0]) or "file"
    name = f"{name}_set" if name in (*SECTIONS, "Suite") else name
    text = f"Suite.sets = ({name!r},)\n{name}.paths = ({str(Path(path).absolute())!r},)\n"
    return suite_of(gin.read_text(text, "--data", None, ()), name, flags)


def suite_of(found: Mapping[str, Binding], name: str, flags: Flags = ()) -> Suite:
    """The suite of some bindings, with flags; see `read_suite`."""
    plain = _resolved(found, name)
    changed = dict(found)
    for place, text in flags:
        for key, binding in gin.read_flag(text, place).items():
            owner, _, field = key.rpartition(".")
            if owner == "Suite" and field in _OF_SETS:
                changed = {k: b for k, b in changed.items() if not k.endswith(f".{field}")}
            changed[key] = binding
    suite = _resolved(changed, name, found) if flags else plain
    return dataclasses.replace(suite, changed=tuple(_changes(plain, suite)))


def _find_suite(name: str, what: str) -> Path:
    try:
        path = user_path(name, what)
    except PathError as error:
        raise ConfigError(str(error)) from error
    packaged = config_folder() / "eval" / f"{path.stem}.gin"
    for candidate in (path, packaged) if path.name == name else (path,):
        if os.path.lexists(candidate) and not candidate.is_dir():
            return candidate
    raise ConfigError(
        f"{what}: no suite {shorten(name)!r}; expected a .gin file or one of "
        f"{', '.join(suites())}{nearest(path.stem, suites())}"
    )


def _resolved(
    found: Mapping[str, Binding], name: str, file: Mapping[str, Binding] | None = None
) -> Suite:
    """Check every binding, then every set, then what its settings say of each other.

    file: the bindings before flags; a macro that only these use is used.
    """
    values, problems = _values(found, file or {})
    listed = values.get("Suite.sets", ())
    names = [s for s in listed if isinstance(s, str)] if isinstance(listed, tuple) else []
    described = [key.removesuffix(".paths") for key in values if key.endswith(".paths")]
    owners = dict.fromkeys(["Suite", *names, *described, *ENGINE])
    for key, value in values.items():
        if problem := _binding_problem(key, value, owners):
            problems.append(f"{found[key].place}: {key} = {found[key].found}: {problem}")
    _raise(problems)
    if "Suite.sets" not in values:
        raise ConfigError(f"{name}: Suite.sets is missing, expected the names of its sets")
    _raise(_name_problems(names, values, found["Suite.sets"].place))
    shared = {key.removeprefix("Suite."): v for key, v in values.items() if key[:6] == "Suite."}
    sets = {each: _set_of(each, values, shared) for each in names}
    _raise([p for each, made in sets.items() for p in _set_problems(each, made, found)])
    engine = {
        key: bound(value, found[key].place)
        for key, value in values.items()
        if key.partition(".")[0] in ENGINE
    }
    seed = shared.get("seed", _OF_SUITE["seed"].default)
    return Suite(name, seed, types.MappingProxyType(sets), engine=engine)


def _values(
    found: Mapping[str, Binding], file: Mapping[str, Binding]
) -> tuple[dict[str, Any], list[str]]:
    """The literals of all bindings, and what is wrong with those that have none."""
    macros = {key: binding for key, binding in found.items() if "." not in key}
    used = {**found, **{f"{key} (file)": binding for key, binding in file.items()}}
    values, problems = {}, gin.unused_macros(macros, used, [f"Suite.{n}" for n in _OF_SUITE])
    for key, binding in found.items():
        if "." in key:
            try:
                values[key] = gin.evaluate(binding, macros, ())
            except ConfigError as error:
                problems.append(str(error))
    return values, problems


def _binding_problem(key: str, value: Any, owners: Iterable[str]) -> str | None:
    """What is wrong with a binding by itself; of the engine's only its name is looked at here."""
    owner, _, field = key.rpartition(".")
    if key in _MEANT:
        return f"has no meaning in an evaluation; set {_MEANT[key]}"
    if owner in ENGINE:
        known: Any = ENGINE[owner]
        if field in known:
            return None
        if field in SECTIONS[owner].__dataclass_fields__:
            return f"has no meaning in an evaluation; of {owner} there are {', '.join(known)}"
        return f"{owner} has no field {field}{nearest(field, known)}"
    if owner not in owners:
        if owner in SECTIONS:
            return f"has no meaning in an evaluation; leave {owner} out"
        return f"there is no set or section {owner}{nearest(owner, owners)}"
    known = _OF_SUITE if owner == "Suite" else _OF_SETS
    if field not in known:
        return f"{owner} has no field {field}{nearest(field, known)}"
    info = known[field]
    annotation, bounds = info.annotation, tuple(info.metadata)
    try:
        return value_problem(adapter(annotation, bounds).validate_python(value))
    except ValidationError:
        return f"expected {describe(annotation, bounds)}, found {shorten(repr(value))}"


def _name_problems(names: Sequence[str], values: Mapping[str, Any], place: str) -> list[str]:
    """What is wrong with the names of the sets."""
    problems = [] if names else ["expected at least one set"]
    described = [key.removesuffix(".paths") for key in values if key.endswith(".paths")]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"names {name!r} {names.count(name)} times, expected it once")
        if not name.isidentifier() or name in (*SECTIONS, "Suite", "reward"):
            problems.append(f"{name!r} cannot be the name of a set; take another word")
        elif f"{name}.paths" not in values:
            hint = nearest(name, described)
            problems.append(f"there is no set {name!r}{hint}; a set has {name}.paths")
    return [f"{place}: Suite.sets: {problem}" for problem in problems]


def _set_of(name: str, values: Mapping[str, Any], shared: Mapping[str, Any]) -> EvaluationSet:
    own = {k.rpartition(".")[2]: v for k, v in values.items() if k.rpartition(".")[0] == name}
    given = {**{k: v for k, v in shared.items() if k in _OF_SETS}, **own}
    return EvaluationSet(**given)


def _set_problems(name: str, s: EvaluationSet, found: Mapping[str, Binding]) -> Iterable[str]:
    """Settings of a set that contradict each other."""

    def at(field: str) -> str:
        keys = [key for key in (f"{name}.{field}", f"Suite.{field}") if key in found]
        return f"{found[keys[0]].place}: {keys[0]}" if keys else f"{name}.{field}"

    yield from _window_problems(name, s, at)
    if not s.paths:
        yield f"{at('paths')}: expected at least one file"
    for field, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        if s.temperature == 0 and getattr(s, field) != off:
            yield (
                f"{at(field)} means nothing where the temperature is 0 and the likeliest token is "
                f"always taken; set it to {off}, or the temperature above 0"
            )
    if s.temperature == 0 and s.samples > 1:
        yield (
            f"{at('samples')} = {s.samples}: at temperature 0 all samples are one text; set it to "
            f"1, or {name}.temperature above 0"
        )
    if s.answer_pattern is not None and (problem := pattern_problem(s.answer_pattern)):
        yield f"{at('answer_pattern')} = {s.answer_pattern!r}{problem}"


def _window_problems(name: str, s: EvaluationSet, at: Callable[[str], str]) -> Iterable[str]:
    if s.window is None and (s.since or s.until):
        yield f"{name}.since and until need {name}.window, the field that they speak of"
    if s.window is not None and not (s.since or s.until):
        yield f"{at('window')} = {s.window!r}: expected {name}.since or {name}.until too"
    for field in ("since", "until"):
        text = getattr(s, field)
        if text is not None and point(text) is None:
            yield f"{at(field)} = {text!r}: expected a date such as '2024-08-01', or a number"


def point(value: Any) -> float | None:
    """A date (its time of day left out) or a number, to be compared; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, datetime.date):
        return float(value.toordinal())
    if not isinstance(value, str):
        return None
    try:
        return float(datetime.datetime.fromisoformat(value.strip()).toordinal())
    except ValueError:
        return float(value) if re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value) else None


def _changes(before: Suite, after: Suite) -> Iterable[str]:
    """What flags set otherwise; the grading and the engine are not the protocol's."""
    if before.seed != after.seed:
        yield f"Suite.seed: {before.seed} -> {after.seed}"
    if list(before.sets) != list(after.sets):
        yield f"Suite.sets: {', '.join(before.sets)} -> {', '.join(after.sets)}"
    for name, new in after.sets.items():
        old = before.sets.get(name)
        for field in _OF_SETS:
            if old is not None and getattr(old, field) != getattr(new, field):
                yield f"{name}.{field}: {getattr(old, field)!r} -> {getattr(new, field)!r}"


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
