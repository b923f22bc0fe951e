"""Formats by the ends of their names: the same rows from each, and from several files."""

import datetime
import decimal
import json
import subprocess
import sys

import pyarrow
import pytest
from data_files import FORMATS, encoded, parquet_of, write

from aspo_jax.data import DataError, Fields, read_rows
from aspo_jax.data.formats import READERS

ROWS = [
    {"id": "a", "prompt": "2+2", "answer": "4", "kind": "exact", "level": "1"},
    {
        "id": "b",
        "prompt": 'say "x, y"\r\nor\tz\n',
        "answer": "né 😀",
        "kind": "exact",
        "level": "2",
    },
    {"id": "c", "prompt": "1" * 200_000, "answer": "5", "kind": "math", "level": "3"},
]
MATH = Fields(grader="math")


def seen(rows):
    return [{k: row[k] for k in ("id", "question", "answer", "kind", "columns")} for row in rows]


def test_every_format_is_written_here():
    assert {f".{end}" for end in FORMATS} == READERS.keys()


@pytest.mark.parametrize(
    "end", [*FORMATS, *(f"{end}.gz" for end in FORMATS), "JSONL", "Parquet.GZ"]
)
def test_the_same_rows_in_every_format(tmp_path, end):
    path = tmp_path / f"mine.{end}"
    path.write_bytes(encoded(ROWS, end.lower()))
    rows = read_rows(path)
    assert seen(rows) == [
        {
            "id": row["id"],
            "question": row["prompt"],
            "answer": row["answer"],
            "kind": row["kind"],
            "columns": {"level": row["level"]},
        }
        for row in ROWS
    ]
    assert all(row["where"].startswith(f"{path}:") for row in rows)


@pytest.mark.parametrize(
    ("end", "places"),
    [
        ("jsonl", [":1", ":2", ":3"]),
        ("json", [":2 (element 1)", ":9 (element 2)", ":16 (element 3)"]),
        ("csv", [":2", ":3", ":6"]),  # the second row is on three lines
        ("tsv", [":2", ":3", ":6"]),
        ("parquet", [":row 1", ":row 2", ":row 3"]),
    ],
)
def test_a_row_is_named_by_its_place(tmp_path, end, places):
    rows = read_rows(write(tmp_path / f"mine.{end}", ROWS))
    assert [row["where"].removeprefix(f"{tmp_path}/mine.{end}") for row in rows] == places


def test_json_may_hold_lines(tmp_path):
    (tmp_path / "mine.json").write_bytes(encoded(ROWS, "jsonl"))
    (tmp_path / "mine.jsonl").write_bytes(encoded(ROWS, "jsonl"))
    assert seen(read_rows(tmp_path / "mine.json")) == seen(read_rows(tmp_path / "mine.jsonl"))


def test_values_of_parquet_become_those_of_json(tmp_path):
    day = datetime.date(2024, 2, 29)
    path = tmp_path / "mine.parquet"
    path.write_bytes(
        parquet_of(
            prompt=[[{"role": "user", "content": "hi"}]],
            answer=[{"ground_truth": "34", "tests": [["1", "2"], []]}],
            decimals=pyarrow.array([decimal.Decimal("27.10")]),
            day=[day],
            time=[datetime.time(1, 2, 3)],
            moment=pyarrow.array([datetime.datetime(2024, 1, 2, 3, 4)], pyarrow.timestamp("us")),
            zone=pyarrow.array([0], pyarrow.timestamp("s", "UTC")),
            raw=pyarrow.array(["né".encode()], pyarrow.binary()),
            missing=[float("nan")],
            null=pyarrow.nulls(1),
            half=pyarrow.array([0.5], pyarrow.float32()),
            whole=pyarrow.array([2**63], pyarrow.uint64()),
            flag=[True],
            words=pyarrow.array(["x"]).dictionary_encode(),
        )
    )
    (row,) = read_rows(path, fields=MATH)
    assert row["messages"] == [{"role": "user", "content": "hi"}]
    assert row["answer"] == {"ground_truth": "34", "tests": [["1", "2"], []]}
    assert row["columns"] == {
        "decimals": "27.10",
        "day": "2024-02-29",
        "time": "01:02:03",
        "moment": "2024-01-02T03:04:00",
        "zone": "1970-01-01T00:00:00+00:00",
        "raw": "né",
        "missing": None,
        "null": None,
        "half": 0.5,
        "whole": 2**63,
        "flag": True,
        "words": "x",
    }
    json.dumps(row, allow_nan=False)


def test_all_row_groups_of_parquet_are_read(tmp_path):
    count = 3000  # above one batch
    path = tmp_path / "mine.parquet"
    path.write_bytes(parquet_of(prompt=["a"] * count, answer=list(range(count))))
    rows = read_rows(path, fields=MATH)
    assert [row["answer"] for row in rows] == list(range(count))
    assert rows[-1]["where"] == f"{path}:row {count}" and rows[-1]["id"] == str(count)


# --- several files --------------------------------------------------------------------------------


def numbered(*answers):
    return [{"prompt": "a", "answer": str(answer)} for answer in answers]


@pytest.fixture
def shards(tmp_path):
    """Three files with seven rows, beside what is none of them."""
    write(tmp_path / "train-00001-of-00003.parquet", numbered(3, 4))
    write(tmp_path / "train-00000-of-00003.jsonl.gz", numbered(0, 1, 2))
    write(tmp_path / "train-00002-of-00003.json", numbered(5, 6))
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "more.jsonl").mkdir()
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "train-*", "train-0000[0-2]-of-?????.*", "**/train-*"])
def test_several_files_are_one_source(shards, pattern):
    rows = read_rows(shards / pattern, fields=MATH)
    assert [row["answer"] for row in rows] == list("0123456")
    assert [row["id"] for row in rows] == list("1234567")  # numbered over all files
    assert [row["where"].rpartition("/")[2] for row in rows[2:4]] == [
        "train-00000-of-00003.jsonl.gz:3",
        "train-00001-of-00003.parquet:row 1",
    ]


def test_ids_are_unique_over_all_files(shards):
    write(shards / "train-1.jsonl", [{"id": "x", "prompt": "a", "answer": "1"}])
    write(shards / "train-2.jsonl", [{"id": "x", "prompt": "a", "answer": "1"}])
    with pytest.raises(DataError, match=r"train-2.jsonl:1: found id 'x' again \(first at .*-1.js"):
        read_rows(shards, fields=MATH)


def test_a_name_with_brackets_is_a_name_if_there_is_such_a_file(tmp_path):
    write(tmp_path / "mine[1].jsonl", numbered(1))
    write(tmp_path / "mine1.jsonl", numbered(2))
    assert [r["answer"] for r in read_rows(tmp_path / "mine[1].jsonl", fields=MATH)] == ["1"]


@pytest.mark.parametrize("pattern", ["empty", "*.csv", "empty/*"])
def test_no_file_at_all(shards, pattern):
    (shards / "empty").mkdir()
    (shards / "empty" / ".hidden").touch()
    with pytest.raises(DataError, match="found no data file, expected .*; check the path"):
        read_rows(shards / pattern)


def test_pyarrow_is_loaded_for_parquet_alone(tmp_path):
    write(tmp_path / "mine.csv", ROWS)
    code = (
        "import sys; from aspo_jax.data import read_rows; read_rows(sys.argv[1]);"
        "print([m for m in ('pyarrow', 'huggingface_hub', 'jax') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mine.csv")]
    assert subprocess.check_output(command, text=True).strip() == "[]"
