"""Write what the documentation takes from the code: ``python docs/generate.py``.

`objectives.md` from `catalogue.py` and the factories' docstrings, `reference.md` from the sections
and factories, `api.md` from the public names and their docstrings,
`library.md` from the files of `examples/`. A test holds that all are fresh.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jax.typing import ArrayLike

from aspo_jax import losses
from aspo_jax.config.factories import arguments
from aspo_jax.config.schema import describe, meanings
from aspo_jax.config.sections import SECTIONS, fields
from aspo_jax.parts import FACTORIES

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))
import objectives_page  # noqa: E402

MADE = "<!-- Made by `python docs/generate.py`; edit the code that it speaks of instead. -->"
# Shown on a page of their own.
OF_OBJECTIVES = {name for named in objectives_page.FACTORIES.values() for name in named}
MODULES = tuple(
    f"aspo_jax.{room}"
    for room in ("losses", "library", "parts", "learner", "optimizers", "sampler", "rewards")
)


def pages() -> dict[Path, str]:
    """The text of every page that is made."""
    return {
        DOCS / "objectives.md": objectives_page.page(MADE, inline, _table),
        DOCS / "reference.md": reference(),
        DOCS / "api.md": api(),
        DOCS / "library.md": library(DOCS.parent / "examples"),
    }


# --- the settings -----------------------------------------------------------------------------


def reference() -> str:
    """Every setting and every factory's arguments."""
    parts = [
        "# Reference of the configuration",
        MADE,
        "Every setting, as `python -m aspo_jax.train --help` shows them. How they are written and"
        " overridden: [Configuration](config.md).",
        "## Sections",
        *map(_section, SECTIONS),
    ]
    for kind, named in FACTORIES.items():
        said = f"Named by {_named_by(kind)}; a factory's arguments are the section of its name."
        parts += [f"## Factories: {kind}", said]
        if kind in objectives_page.FACTORIES:
            parts.append(f"All, with their equations: [Objectives](objectives.md#every-{kind}).")
        else:
            parts += [_factory(name, factory) for name, factory in named.items()]
    return "\n\n".join(parts) + "\n"


def _named_by(kind: str) -> str:
    """The settings that name a factory of a kind."""
    return " and ".join(
        f"`{section}.{field}`"
        for section in SECTIONS
        for field, info in fields(section).items()
        if info.json_schema_extra["factory"] == kind
    )


def _section(name: str) -> str:
    rows = [
        (
            f"`{name}.{field}`",
            describe(info.annotation, info.metadata),
            _default(info.default, info.is_required()),
            info.json_schema_extra["unit"],
            inline(info.description),
        )
        for field, info in fields(name).items()
    ]
    table = _table(("setting", "value", "default", "unit", "meaning"), rows)
    return f"### {name}\n\n{inspect.getdoc(SECTIONS[name])}\n\n{table}"


def _factory(name: str, factory: Callable[..., Any]) -> str:
    meaning = meanings(factory)
    rows = [
        (
            f"`{name}.{argument}`",
            describe(parameter.annotation),
            _default(parameter.default, parameter.default is parameter.empty),
            inline(meaning.get(argument, "")),
        )
        for argument, parameter in arguments(factory).items()
    ]
    doc = inspect.getdoc(factory if rows or factory.__doc__ else factory()) or ""
    first = prose(doc.partition("\n\n")[0])
    table = _table(("argument", "value", "default", "meaning, unit, bounds"), rows)
    return "\n\n".join(filter(None, (f"### {name}", first, table if rows else "")))


def _default(value: Any, is_required: bool) -> str:
    return "**required**" if is_required else f"`{value!r}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# --- the Python names -------------------------------------------------------------------------


PUBLIC = """What is public in the modules that a program of yours uses. The objectives, advantages
and aggregates of `aspo_jax.losses` have [a page of their own](objectives.md)."""


def api() -> str:
    """The public names of some modules with signature and docstring."""
    parts = ["# Python names", MADE, PUBLIC]
    for name in MODULES:
        module = importlib.import_module(name)
        found = {public: getattr(module, public) for public in public_names(module)}
        described = {n: x for n, x in found.items() if inspect.isclass(x) or inspect.isfunction(x)}
        values = [(f"`{n}`", f"`{_value(x)}`") for n, x in found.items() if n not in described]
        if module is losses:
            described = {n: x for n, x in described.items() if n not in OF_OBJECTIVES}
        parts += [f"## {name}", prose(inspect.getdoc(module) or "")]
        parts += [_table(("name", "value"), values)] if values else []
        parts += [_entry(*item) for item in described.items()]
    return "\n\n".join(parts) + "\n"


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what the module itself defines without an underscore."""
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", (n for n in own if n[0] != "_")))


def _value(found: Any) -> str:
    """A constant or an alias of a type in a few words."""
    if isinstance(found, Mapping):
        return ", ".join(found)
    if hasattr(found, "shape"):
        return f"{found.dtype}{list(found.shape)}, {found.flat[0]:.4g} to {found.flat[-1]:.4g}"
    short = repr(found).replace(repr(ArrayLike), "ArrayLike")
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z])", "", short)


def _entry(name: str, found: Any) -> str:
    if not inspect.isclass(found):
        return _function(name, found, "###")
    methods = [_function(n, f, "####") for n, f in _methods(found)]
    return "\n\n".join((f"### {name}", _code(f"class {_made(found)}"), *_doc(found), *methods))


def _made(found: type) -> str:
    """How one is made; the bare name where the class is not made to be."""
    is_made = hasattr(found, "_fields") or "__init__" in vars(found)
    if not is_made or getattr(found, "_is_protocol", False):
        return found.__name__
    return _signature(found.__name__, found).removesuffix(" -> None")


def _function(name: str, function: Callable[..., Any], level: str) -> str:
    return "\n\n".join((f"{level} {name}", _code(_signature(name, function)), *_doc(function)))


def _signature(name: str, function: Callable[..., Any]) -> str:
    """``name(parameters) -> result``, over several lines where it is long."""
    signature = inspect.signature(function)
    given = [_parameter(p) for p in signature.parameters.values()]
    kinds = [p.kind for p in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        given.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = signature.return_annotation
    name_of = result if isinstance(result, str) else inspect.formatannotation(result)
    end = "" if result is signature.empty else f" -> {name_of}"
    line = f"{name}({', '.join(given)}){end}"
    lines = "".join(f"    {parameter},\n" for parameter in given)
    return line if len(line) <= 88 else f"{name}(\n{lines}){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    """``name: type = default``; ``...`` for a default that says nothing on a page."""
    bare = str(parameter.replace(default=parameter.empty))
    bare = re.sub(r": (?:ForwardRef\()?'(.*?)'\)?$", r": \1", bare)
    if parameter.default is parameter.empty:
        return bare
    default = repr(parameter.default)
    return f"{bare} = {'...' if '<' in default or '/' in default else default}"


def _methods(found: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(found).items():
        if name[0] != "_" and inspect.isfunction(member) and member.__doc__:
            yield f"{found.__name__}.{name}", member


def _doc(found: Any) -> Iterator[str]:
    doc = inspect.getdoc(found) or ""
    if doc and not doc.startswith(f"{found.__name__}("):  # one that dataclasses write
        yield prose(doc)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


_ITEM = re.compile(r"^ *([a-z_]\w*(?:, \w+)*|[A-Z]\w*(?:Error|Changed)): (\S.*)$")
_LABEL = re.compile(r"^([A-Z][a-z]+): ")


def prose(doc: str) -> str:
    """A docstring as Markdown: ``name: meaning`` is an item of a list, indented blocks are code."""
    lines: list[str] = []
    under = ""  # what indented lines belong to: "item", "Raises:" or nothing
    for line in doc.splitlines():
        is_indented = line.startswith("    ")
        if line in ("Args:", "Raises:"):
            lines += ["", line, ""]
            under = line
        elif (item := _ITEM.match(line)) and (not is_indented or under):
            lines += [] if under == "item" else [""]
            lines.append(f"- {_names(item[1])}: {inline(item[2])}")
            under = "item"
        elif is_indented and under:
            lines.append(f"    {inline(line.strip())}")
        else:
            is_apart = (under and line) or (_LABEL.match(line) and lines)
            lines += ["", inline(line)] if is_apart else [line if is_indented else inline(line)]
            under = under if not line else ""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _names(words: str) -> str:
    return ", ".join(f"`{name}`" for name in words.split(", "))


def inline(text: str) -> str:
    """Double backticks made single; signs of HTML made plain where they are not code."""
    pieces = text.replace("``", "`").split("`")
    pieces[::2] = [p.replace("<", "&lt;").replace("*", r"\*") for p in pieces[::2]]
    return "`".join(pieces)


# --- the examples -----------------------------------------------------------------------------

LIBRARY = """The trainer's parts are values and functions; these programs use them without its
command line. Each is a file of `examples/` and runs as it stands. What the names mean:
[Python names](api.md). The notebook `examples/aspo_in_ten_minutes.ipynb` has the equation, the
weights as a picture and one small run; its outputs are kept in it.

Those that read a folder `model` take any Hugging Face folder, or name, of [these
families](models.md).
The embedded task leaves one:

    python -m aspo_jax.train --config countdown_tiny
    ln -s runs/countdown_tiny-aspo-seed0/model model"""


EXAMPLES = (
    "score_texts",
    "sample_chat",
    "evaluate_file",
    "own_objective",
    "own_reward",
    "own_loop",
)


def _place(path: Path) -> tuple[int, str]:
    """The simple ones first, those that are not named here last."""
    known = path.stem in EXAMPLES
    return EXAMPLES.index(path.stem) if known else len(EXAMPLES), path.stem


def library(folder: Path) -> str:
    """Every example, under the first line of its docstring."""
    parts = ["# As a library", MADE, LIBRARY]
    for path in sorted(folder.glob("*.py"), key=_place):
        text = path.read_text()
        title = (ast.get_docstring(ast.parse(text)) or path.stem).splitlines()[0]
        parts += [
            f"## {title.rstrip('.')}",
            f"    python examples/{path.name}",
            _code(text.strip()),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write every page that is not fresh."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
