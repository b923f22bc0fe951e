"""Data files by the ends of their names, and the records in them.

    problems.jsonl        one JSON object a line
    problems.json         one JSON array of objects, or one object a line
    problems.csv, .tsv    a line of names, then one of texts for each record
    problems.parquet

Behind each may stand ``.gz``. Several files are one source: a folder, a pattern such as
``data/train-*.parquet``, or a data set of the hub (`aspo_jax.data.hub`).
"""

from __future__ import annotations

import functools
import glob
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from aspo_jax.data import hub, jsonl, tables
from aspo_jax.data.rows import DataError, Found
from aspo_jax.errors import UserError
from aspo_jax.paths import read_bytes, shown, user_path

# The content of a file and its name in messages -> its records. A reader raises where the whole
# file is of no use.
Reader = Callable[[bytes, str], Iterator[Found]]
READERS: dict[str, Reader] = {
    ".jsonl": jsonl.lines,
    ".json": jsonl.array,
    ".csv": functools.partial(tables.delimited, delimiter=","),
    ".tsv": functools.partial(tables.delimited, delimiter="\t"),
    ".parquet": tables.parquet,
}


class DataFile(NamedTuple):
    """A file, and how messages call it."""

    path: Path
    name: str


def records(path: str | Path) -> Iterator[Found]:
    """The records of all files that a path names, numbered from 1, or what is wrong with one.

    Raises:
        DataError, PathError: a file cannot be read at all.
    """
    number = 0
    for file in data_files(path):
        for place, value in _read(file):
            number += 1
            yield place._replace(number=number), value


def data_files(path: str | Path) -> list[DataFile]:
    """The files of a path, in the order of their names.

    A file; a folder, of which the files in it count whose format is known; a pattern with ``*``,
    ``?`` or ``[...]``; or 'hub:OWNER/NAME/SPLIT', which is downloaded.

    Raises:
        DataError, PathError: there are none.
    """
    if str(path).startswith(hub.PREFIX):
        return [DataFile(*file) for file in hub.download(str(path), tuple(READERS))]
    path = user_path(path)
    if path.is_dir():
        found = [f for f in path.iterdir() if _suffix(f) in READERS and f.name[0] != "."]
        expected = f"names that end in {', '.join(READERS)}"
    elif not path.exists() and glob.has_magic(str(path)):
        found = [Path(file) for file in glob.glob(str(path), recursive=True)]
        expected = "at least one that the pattern matches"
    else:
        return [DataFile(path, shown(path))]
    found = [file for file in found if file.is_file()]
    if not found:
        raise DataError(f"{shown(path)}: found no data file, expected {expected}; check the path")
    return [DataFile(file, shown(file)) for file in sorted(found)]


def file_stamps(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the local files of a path: other ones after they were changed."""
    if str(path).startswith(hub.PREFIX):
        return ()
    try:
        stats = [(file.name, file.path.stat()) for file in data_files(path)]
    except (UserError, OSError):  # reading them will say what is wrong
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _suffix(path: Path) -> str:
    return hub.format_end(path.name.lower())


def _read(file: DataFile) -> Iterator[Found]:
    data = read_bytes(file.path)
    reader = READERS.get(_suffix(file.path))
    if reader is None:
        raise DataError(
            f"{file.name}: found a name that does not say the format, expected an end of "
            f"{', '.join(READERS)}, or one of them and .gz; rename or convert the file"
        )
    if file.path.name.lower().endswith(".gz"):
        data = _unpack(data, file.name)
    return reader(data, file.name)


def _unpack(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{name}: cannot be read as gzip ({error}), expected what its name says; rename the "
            "file or check that it was copied whole"
        ) from error
