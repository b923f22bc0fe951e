"""Data files in every format, for tests."""

import csv
import gzip
import io
import json

import pyarrow
from pyarrow import parquet

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")


def encoded(rows, end):
    """The bytes of a file with these records; ``end``: of its name, 'jsonl' or 'jsonl.gz'."""
    kind, _, packed = end.partition(".")
    data = {
        "jsonl": lambda: "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
        "json": lambda: json.dumps(rows, indent=1).encode(),
        "csv": lambda: table(rows, ","),
        "tsv": lambda: table(rows, "\t"),
        "parquet": lambda: parquet_bytes(pyarrow.Table.from_pylist(rows)),
    }[kind]()
    return gzip.compress(data) if packed else data


def table(rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_bytes(made):
    sink = io.BytesIO()
    parquet.write_table(made, sink)
    return sink.getvalue()


def parquet_of(**columns):
    """A Parquet file of columns, each a list or an array."""
    return parquet_bytes(pyarrow.table(columns))


def write(path, rows):
    path.write_bytes(encoded(rows, path.name.partition(".")[2]))
    return path
