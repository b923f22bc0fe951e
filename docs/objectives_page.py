"""`objectives.md`: what is published, what it is here, and every rule with its equation.

The rules speak for themselves in their docstrings; `catalogue.py` knows the published names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from catalogue import (
    ADVANTAGE,
    CHAINED,
    INTRODUCTION,
    KINDS,
    LEFT_OUT,
    MEASURED,
    POLICY,
    REWARD,
    Published,
)

from aspo_jax.config.factories import arguments
from aspo_jax.config.schema import meanings
from aspo_jax.losses import ADVANTAGES, AGGREGATES, OBJECTIVES
from aspo_jax.rewards import SHAPES

PICTURES = "atlas"  # folder beside the pages, a picture per objective
_LABEL = re.compile(r"^(Source|Confidence|Unverified|Needs): ?", re.MULTILINE)
_NAMED = re.compile(r"^(?:Objective|Reward)\.\w+ = (.*)$")


class Doc(NamedTuple):
    """A factory's docstring, taken apart.

    first: its first paragraph. equations: the indented blocks. labels: what stands behind
    ``Source:`` and the like. text: the paragraphs that are neither, nor meanings of arguments.
    """

    first: str
    equations: list[str]
    labels: dict[str, str]
    text: list[str]


def read_doc(factory: Callable[..., Any]) -> Doc:
    """The docstring of a factory in its parts."""
    doc = inspect.getdoc(factory) or inspect.getdoc(factory()) or ""
    head, *pieces = _LABEL.split(doc)
    labels = {
        name: " ".join(text.split()) for name, text in zip(pieces[::2], pieces[1::2], strict=True)
    }
    first, *paragraphs = head.strip().split("\n\n")
    given = set(arguments(factory))
    equations = [inspect.cleandoc(p) for p in paragraphs if p.startswith("    ")]
    text = [
        " ".join(p.split())
        for p in paragraphs
        if not p.startswith("    ") and not _is_meaning(p, given)
    ]
    return Doc(" ".join(first.split()), equations, labels, text)


def _is_meaning(paragraph: str, given: set[str]) -> bool:
    return bool(set(re.findall(r"\w+", paragraph.partition(":")[0])) & given)


# --- the page -----------------------------------------------------------------------------------

Inline = Callable[[str], str]
Table = Callable[[tuple[str, ...], list[tuple[str, ...]]], str]
TABLES = (
    ("Objectives", POLICY),
    ("Penalties, corrections and predicates", CHAINED),
    ("Advantages", ADVANTAGE),
    ("Rewards", REWARD),
)
FACTORIES = {"objective": OBJECTIVES, "advantage": ADVANTAGES, "aggregate": AGGREGATES}


def page(made: str, inline: Inline, table: Table) -> str:
    """The whole page.

    made: the line that says so. inline, table: how text and tables are written.
    """
    parts = ["# Objectives", made, INTRODUCTION]
    head = ("published", "here", "kind", "settings", "elsewhere -> here", "source", "confidence")
    for title, rows in TABLES:
        body = [_row(each, inline) for each in rows]
        parts += [f"## {title} by their published names", table(head, body)]
    for kind, named in FACTORIES.items():
        parts += [f"## Every {kind}", KINDS[kind]]
        for name, factory in named.items():
            parts += _rule(name, factory, kind, inline, table)
    parts += ["## Left out", table(("published", "why"), [*LEFT_OUT.items()]), MEASURED]
    return "\n\n".join(parts) + "\n"


def rules_of(each: Published) -> list[str]:
    """The factories that its settings name, the first of which says most."""
    named = (_NAMED.match(line) for line in each.lines)
    words = (word for found in named if found for word in re.findall(r"'([a-z_0-9]+)'", found[1]))
    return list(dict.fromkeys(words))


def known(name: str) -> Callable[..., Any]:
    """The factory of a name."""
    return {**OBJECTIVES, **ADVANTAGES, **AGGREGATES, **SHAPES}[name]


def _row(each: Published, inline: Inline) -> tuple[str, ...]:
    names = rules_of(each)
    said = read_doc(known(names[0])).labels.get("Confidence", "")
    links = [f"[`{n}`]({'reference.md' if n in SHAPES else ''}#{n})" for n in names]
    theirs = [f"`{a}` -> {b if ' ' in b else f'`{b}`'}" for a, b in each.theirs.items()]
    return (
        f"**{each.name}**" + (f" ({inline(each.note)})" if each.note else ""),
        " ".join(links),
        each.kind,
        "<br>".join(f"`{line}`" for line in each.lines),
        "<br>".join(theirs),
        each.paper,
        re.split("[:;,]", said)[0],
    )


def _theirs(name: str) -> dict[str, str]:
    """Argument -> what others call it."""
    found: dict[str, list[str]] = {}
    for each in (each for _, rows in TABLES for each in rows if rules_of(each)[:1] == [name]):
        for theirs, ours in each.theirs.items():
            found.setdefault(ours, []).append(f"`{theirs}`")
    return {ours: ", ".join(dict.fromkeys(names)) for ours, names in found.items()}


def _rule(
    name: str, factory: Callable[..., Any], kind: str, inline: Inline, table: Table
) -> Iterator[str]:
    doc, meaning, theirs = read_doc(factory), meanings(factory), _theirs(name)
    yield f"### {name}"
    yield inline(doc.first)
    yield from ("\n".join(f"    {line}" for line in e.splitlines()) for e in doc.equations)
    yield from map(inline, doc.text)
    rows = [
        (f"`{name}.{a}`", theirs.get(a, ""), _default(p), inline(meaning.get(a, "")))
        for a, p in arguments(factory).items()
    ]
    if rows:
        yield table(("setting", "elsewhere", "default", "meaning, unit, bounds"), rows)
    yield from (f"{label}: {inline(text)}" for label, text in doc.labels.items())
    if kind == "objective" and (Path(__file__).parent / PICTURES / f"{name}.png").exists():
        yield f"![Token weight of {name}]({PICTURES}/{name}.png)"


def _default(parameter: inspect.Parameter) -> str:
    return "**required**" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
