"""Prompts of one's own: the records of a file, each made a row.

    {"id": "p1", "prompt": "What is 2+2?", "answer": "4", "kind": "exact"}
    {"messages": [{"role": "user", "content": "..."}], "answer": "4", "kind": "exact"}

So a record looks by itself: ``prompt`` or ``messages``, ``answer`` (whatever its grader needs),
``kind`` (which grader), and optionally ``id`` (else its number). `Fields` says what has other
names; `LAYOUTS` are maps for records that others made. What else a record holds is kept as
``columns``, for graders that ask for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from aspo_jax.data import verl
from aspo_jax.data.formats import records
from aspo_jax.data.rows import PLAIN, DataError, Fields, Place, checked_row
from aspo_jax.paths import PathError

LAYOUTS = {"plain": PLAIN, "verl": verl.FIELDS}


def read_rows(
    path: str | Path,
    kinds: Collection[str] | None = None,
    fields: Fields = PLAIN,
    skipped: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a file, of several or of a hub data set (`formats.data_files`), each a dict.

    id, where: its name and its place, 'FILE:LINE'.
    messages: the chat that is asked, template and system message included.
    question: the text of its last message before the template.
    answer, kind: what its grader needs, and which grader.
    columns: the other fields of its record.

    kinds: the graders there are; None accepts any.
    skipped: takes what is wrong with the rows that cannot be used, which are then left out; None:
        the first of them is an error.

    Raises:
        DataError: anything wrong with the file or one of its records.
    """
    try:
        return _rows(records(path), kinds, fields, skipped)
    except PathError as error:
        raise DataError(str(error)) from error


def made_rows(
    made: Iterable[Any],
    name: str,
    kinds: Collection[str] | None = None,
    fields: Fields = PLAIN,
    skipped: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of records that a function made, as `read_rows` gives them; ``name`` says whose.

    Raises:
        DataError: a record that a data file could not hold either.
    """
    places = (Place(f"{name} row {number}", number) for number in itertools.count(1))
    return _rows(zip(places, made, strict=False), kinds, fields, skipped)


def _rows(
    found: Iterable[tuple[Place, Any]],
    kinds: Collection[str] | None,
    fields: Fields,
    skipped: list[str] | None,
) -> list[dict[str, Any]]:
    """The rows of records, or of what is wrong with them."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    first_use: dict[str, str] = {}
    for place, value in found:
        try:
            row = checked_row(place, value, kinds, fields)
            if row["id"] in first_use and not fields.are_ids_loose:
                place.fail(
                    f"id {row['id']!r} again (first at {first_use[row['id']]})",
                    "an id of its own",
                    "rename one of the two or leave all ids out",
                )
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        first_use[row["id"]] = place.where
        rows.append(row)
        numbers.append(place.number)
    if len(first_use) < len(rows):
        return [row | {"id": str(number)} for row, number in zip(rows, numbers, strict=True)]
    return rows
