"""Tables: comma- or tab-separated text, and Parquet."""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import io
import math
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aspo_jax.data.rows import DataError, Found, Place
from aspo_jax.paths import decode, format_of, shorten

_DELIMITERS = {",": ".csv", "\t": ".tsv", ";": ""}  # which end of a name stands for it


def delimited(data: bytes, where: str, *, delimiter: str) -> Iterator[Found]:
    """The rows below a line of names; every value is a text.

    Raises:
        DataError, PathError: the file cannot be read at all.
    """
    text = decode(data, Path(where))
    if text.lstrip().startswith("{"):
        raise DataError(
            f"{where}:1: found JSON, expected a line of names, then rows of values; let the file's "
            "name end in .jsonl"
        )
    with _any_width():
        found = list(_parsed(text, where, delimiter))
    if not found:
        raise DataError(f"{where}:1: found no row, expected some below the names; fill the file")
    return iter(found)


@contextlib.contextmanager
def _any_width() -> Iterator[None]:
    """Fields of any length: the module's own limit is that of the whole process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parsed(text: str, where: str, delimiter: str) -> Iterator[Found]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        place = Place(f"{where}:{rows.line_num + 1}", number)
        try:
            values = next(rows)
            if header is None:
                header = _checked_header(place, values, delimiter)
            else:
                yield place, _row(place, header, values)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _csv_problem(place, error)
            if header is None or "unexpected end" in str(error):  # it swallowed the rest
                raise problem from error
            yield place, problem
        except DataError as error:
            if header is None:
                raise
            yield place, error
        number += 1


def _csv_problem(place: Place, error: csv.Error) -> DataError:
    return DataError(
        f"{place.where}: found a quote that is not closed, or not before a separator ({error}), "
        'expected values in whole quotes; close it, and double it ("") where it is part of the '
        "value"
    )


def _checked_header(place: Place, names: list[str], delimiter: str) -> list[str]:
    """The names of the columns."""
    others = [(d, end) for d, end in _DELIMITERS.items() if d != delimiter and d in "".join(names)]
    if len(names) == 1 and others:
        other, end = others[0]
        remedy = f"let the file's name end in {end}" if end else "write commas"
        place.fail(f"{other!r} between the names", f"{delimiter!r}", remedy)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        place.fail(f"two columns {shorten(twice[0])!r}", "names that differ", "rename one")
    if not names or not all(name.strip() for name in names):
        place.fail("a column without a name", "a line with the names of all columns", "add them")
    return names


def _row(place: Place, header: list[str], values: list[str]) -> dict[str, Any]:
    if not values:
        place.fail("an empty line", f"{len(header)} values", "delete the line")
    if len(values) != len(header):
        place.fail(
            f"{len(values)} values",
            f"{len(header)}, one for each of {[shorten(n, 40) for n in header[:20]]}",
            "put a value that holds the separator in quotes, or fill the row",
        )
    row = dict(zip(header, values, strict=True))
    for name, value in row.items():
        if "\0" in value:
            place.fail(f"a NUL in {shorten(name)!r}", "text", "take it out")
    return row


# --- Parquet --------------------------------------------------------------------------------------

_MAGIC = b"PAR1"  # the first and the last bytes of a file


def parquet(data: bytes, where: str) -> Iterator[Found]:
    """The rows of a Parquet file: structs are objects; what JSON lacks is told by `_plain`.

    Raises:
        DataError: the file cannot be read at all.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    _check_magic(data, where)
    try:
        file = ParquetFile(pyarrow.BufferReader(data))
        _check_columns(file.schema_arrow.names, where)
        yield from _rows(file, where)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{where}: cannot be read as Parquet ({shorten(str(error), 200)}), expected what its "
            "name says; copy the file again, it is damaged"
        ) from error


def _check_magic(data: bytes, where: str) -> None:
    if not data.startswith(_MAGIC):
        what, remedy = format_of(data) or ("something else", "let the name say what the file is")
        found = what if data else "an empty file"
        raise DataError(f"{where}: found {found}, expected Parquet; {remedy}")
    if not data.endswith(_MAGIC) or len(data) <= 2 * len(_MAGIC):
        raise DataError(
            f"{where}: found Parquet without its end, expected a whole file; copy it again, it was "
            "cut off"
        )


def _check_columns(names: list[str], where: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{where}: found two columns {shorten(twice[0])!r}, expected names that differ; "
            "rename one"
        )


def _rows(file: Any, where: str) -> Iterator[Found]:
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        columns = [_cells(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            number += 1
            place = Place(f"{where}:row {number}", number)
            try:
                yield place, _record(place, batch.schema.names, values)
            except DataError as error:
                yield place, error
    if number == 0:
        raise DataError(f"{where}: found no row, expected at least one; fill the file")


def _cells(column: Any) -> list[Any]:
    """The values of a column; for one that cannot be had, the reason."""
    try:
        return column.to_pylist()
    except (ValueError, ArithmeticError):  # in one of them: find out which
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, ArithmeticError) as error:
        return error


def _record(place: Place, names: list[str], values: tuple[Any, ...]) -> dict[str, Any]:
    record = {}
    for name, value in zip(names, values, strict=True):
        try:
            record[name] = _plain(value)
        except ValueError as error:
            place.fail(
                f"{shorten(str(error), 120)} in {shorten(name)!r}",
                "texts, finite numbers, lists and structs of them",
                "convert the column",
            )
    return record


def _plain(value: Any) -> Any:
    """A value as JSON has it. Times and decimals are texts, bytes are UTF-8, NaN (a missing number,
    as pandas writes it) is null.

    Raises:
        ValueError: there is no such.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return None if math.isnan(value) else value
        case dict():
            return {name: _plain(inside) for name, inside in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case bytes():
            return value.decode()
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case Exception():
            raise ValueError(str(value)) from value
    raise ValueError(f"a {type(value).__name__}")
