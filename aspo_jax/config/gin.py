"""gin syntax, read as Python with `ast`: text -> bindings -> literals. Nothing is executed."""

import ast
import os
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aspo_jax.errors import UserError, nearest
from aspo_jax.paths import PathError, decode, read_bytes, shorten, shown, user_path

# A run may be moved, also to other processes, and the permission to change it is no change.
LAUNCH = ("Runtime.coordinator", "Runtime.num_processes", "Runtime.process_id")
NOT_COMPARED = ("Run.folder", "Run.accept_changes", *LAUNCH)


class ConfigError(UserError):
    """A mistake in a config file or on the command line; the message is for the user."""


class Binding(NamedTuple):
    place: str  # file:line, or the number of the --set
    value: ast.expr

    @property
    def found(self) -> str:
        return shorten(ast.unparse(self.value).replace("_macro_.", "%"))


# Strings and comments are matched first so that a % inside them is left alone.
_MACRO = re.compile(
    r"""('''(?:.|\n)*?'''|\"""(?:.|\n)*?\"""|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|\#[^\n]*)"""
    r"""|%([A-Za-z_]\w*)"""
)
_DEEPEST = 50  # brackets or operators inside each other, macros of macros, files that include files
_DIGITS = 400  # of a whole number; the largest float has 309
_KEY = re.compile(r"(?=.{1,100}$)[^\W\d]\w*(\.\w+){0,2}")
_INCLUDE = re.compile(r"""^include[ \t]+(['"][^'"\n]*['"])""", re.MULTILINE)


def config_folder() -> Path:
    """The config files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_file(path: Path, parents: tuple[Path, ...]) -> dict[str, Binding]:
    """The bindings of a file and of those it includes, later ones winning."""
    real = Path(os.path.realpath(path))
    if real in parents:
        chain = " -> ".join(p.name for p in (*parents[parents.index(real) :], real))
        raise ConfigError(f"{shown(parents[-1])}: files include each other in a circle: {chain}")
    if len(parents) == _DEEPEST:
        raise ConfigError(f"{shown(path)}: more than {_DEEPEST} files include each other")
    try:
        text = decode(read_bytes(path), path)
    except PathError as error:
        raise ConfigError(str(error)) from error
    return read_text(text, shown(path), path.parent, (*parents, real))


def read_text(
    text: str, source: str, folder: Path | None, parents: tuple[Path, ...]
) -> dict[str, Binding]:
    """The bindings (``Section.field``) and macros (no dot) of one text."""
    included: dict[str, Binding] = {}
    own: dict[str, Binding] = {}
    for statement in _statements(text, source):
        place = f"{source}:{statement.lineno}"
        target = _include_target(statement)
        if target is None:
            key, value = _assignment(statement, place)
            if key in own:
                raise ConfigError(f"{place}: {key} is set twice, first at {own[key].place}")
            own[key] = Binding(place, value)
        elif own:
            raise ConfigError(f"{place}: include must come before the first setting of the file")
        elif folder is None:
            raise ConfigError(f"{place}: include is only possible in a file")
        else:
            included |= read_file(_find_included(target, folder, place), parents)
    return included | own


def _statements(text: str, source: str) -> list[ast.stmt]:
    """The statements of a text, none of which is too deep to be walked or too long to be shown."""
    python = _INCLUDE.sub(r"include(\1)", text)
    python = _MACRO.sub(lambda m: m[1] or f"_macro_.{m[2]}", python)
    try:
        statements = ast.parse(python).body
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(
            f"{source}:{line}: cannot read {_line(text, line)}; expected Section.field = literal"
        ) from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{source}: {_TOO_DEEP}") from error
    for statement in statements:
        place = f"{source}:{statement.lineno}"
        if _depth(statement) > _DEEPEST:
            raise ConfigError(f"{place}: {_line(text, statement.lineno)}: {_TOO_DEEP}")
        if any(_is_huge(node) for node in ast.walk(statement)):
            raise ConfigError(
                f"{place}: {_line(text, statement.lineno)}: found a number of more than {_DIGITS}"
                " digits, expected one that a setting can hold"
            )
    return statements


_TOO_DEEP = (
    f"brackets or operators are more than {_DEEPEST} deep inside each other; expected"
    " Section.field = literal"
)


def _line(text: str, number: int) -> str:
    lines = text.splitlines() or [""]
    return repr(shorten(lines[min(number, len(lines)) - 1].strip()))


def _depth(statement: ast.AST) -> int:
    """How deep the syntax tree is; level by level, for recursion has a limit of its own."""
    depth, level = 0, [statement]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _is_huge(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, int) and abs(value).bit_length() > _DIGITS * 3.3


def _find_included(target: str, folder: Path, place: str) -> Path:
    """The file of an include: beside the file that names it, else a packaged one."""
    try:
        path = user_path(target, f"{place}: include")
    except PathError as error:
        raise ConfigError(str(error)) from error
    looked_in = list(dict.fromkeys((folder / path, config_folder() / path)))
    for candidate in looked_in:
        if os.path.lexists(candidate) and not candidate.is_dir():
            return candidate
    places = " and no ".join(shown(candidate) for candidate in looked_in)
    raise ConfigError(
        f"{place}: the included file {str(target)!r} does not exist: there is no {places}; an"
        " include is looked up beside the file that names it, then among the packaged configs"
    )


def _include_target(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Expr(ast.Call(ast.Name("include"), [ast.Constant(str(target))], [])):
            return target
    return None


def _assignment(statement: ast.stmt, place: str) -> tuple[str, ast.expr]:
    match statement:
        case ast.Assign([target], value) if _KEY.fullmatch(ast.unparse(target)):
            return ast.unparse(target), value
    found = shorten(ast.unparse(statement).splitlines()[0])
    raise ConfigError(f"{place}: found {found!r}; expected Section.field = literal")


def read_flag(text: str, place: str) -> dict[str, Binding]:
    """One ``--set``; a shell strips quotes, so a plain word or path there stands for text."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{place}: found {shorten(text)!r}; expected Section.field=value")
    if not value.startswith("%") and not re.search(r"""['"()\[\]{}\s]""", value):
        try:
            ast.literal_eval(value)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            value = repr(value)
    found = read_text(f"{key} = {value}", place, None, ())
    return {key: binding._replace(place=place) for key, binding in found.items()}


def evaluate(binding: Binding, macros: Mapping[str, Binding], seen: tuple[str, ...]) -> Any:
    """The literal that a binding stands for, its macros filled in; lists become tuples."""

    def fill(node: ast.AST) -> Any:
        match node:
            case ast.Attribute(ast.Name("_macro_"), name):
                if name in seen:
                    raise ConfigError(f"{binding.place}: the macro %{name} stands for itself")
                if len(seen) == _DEEPEST:
                    raise ConfigError(f"{binding.place}: {_DEEPEST} macros stand for each other")
                if name not in macros:
                    raise ConfigError(
                        f"{binding.place}: unknown macro %{name}{nearest(name, macros, '%')}"
                    )
                return evaluate(macros[name], macros, (*seen, name))
            case ast.Tuple(items) | ast.List(items):
                return tuple(fill(item) for item in items)
            case ast.Name(name):
                hint = {"true": "True", "false": "False", "none": "None", "null": "None"}
                raise ConfigError(
                    f"{binding.place}: found the bare name {shorten(name)}; expected a literal"
                    f" (did you mean {hint.get(name.lower(), repr(shorten(name)))}?)"
                )
        try:
            return ast.literal_eval(typing.cast(ast.expr, node))
        except ValueError as error:
            raise ConfigError(
                f"{binding.place}: found {shorten(ast.unparse(node))!r}; expected a literal:"
                " a number, quoted text, True, False, None or a list of these"
            ) from error

    return fill(binding.value)


def unused_macros(
    macros: Mapping[str, Binding], found: Mapping[str, Binding], known: Iterable[str]
) -> list[str]:
    used = {
        node.attr
        for binding in found.values()
        for node in ast.walk(binding.value)
        if isinstance(node, ast.Attribute)
    }
    problems = []
    for name, binding in macros.items():
        if name not in used:
            homes = [key for key in known if key.endswith(f".{name}")]
            hint = f" (did you mean {' or '.join(homes)}?)" if homes else ""
            problems.append(
                f"{binding.place}: {name} = {binding.found}: the macro is never used;"
                f" a setting is written Section.field{hint}"
            )
    return problems


def diff_text(old: str, new: str, defaults: Mapping[str, Any] | None = None) -> str:
    """The settings that differ between two config texts, one readable line each.

    defaults: what a setting is that the old text does not know.
    Where a run is kept, by which processes, and `Run.accept_changes` are not compared.
    """
    before, after = (
        {key: binding.found for key, binding in read_text(text, place, None, ()).items()}
        for text, place in ((old, "old config"), (new, "new config"))
    )
    before = {key: repr(value) for key, value in (defaults or {}).items()} | before
    absent = "(default)"
    return "\n".join(
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in dict.fromkeys((*after, *before))
        if before.get(key, absent) != after.get(key, absent) and key not in NOT_COMPARED
    )
