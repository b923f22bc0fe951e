"""Malformed inputs: each error names file, place and remedy, and nothing of it reaches training.

Every case stands between two good rows of a training file. A broken row stops the start, or is left
out and counted (``Data.bad_rows``); a broken file always stops it.
"""

import gzip
import json
import os

import pyarrow
import pytest
from data_files import encoded, parquet_of
from pyarrow import parquet

from aspo_jax.config import read_config
from aspo_jax.data import CHARACTERS, DataError, build_character_tokenizer
from aspo_jax.inputs import build_prompts, train_source
from aspo_jax.parts import FACTORIES

GOOD = {"id": "first", "prompt": "1+1", "answer": "2", "kind": "exact"}
LAST = GOOD | {"id": "last"}
HUGE = "9" * 10_000_000
LONGEST_MESSAGE = 1200  # characters: a message never repeats what it was given


@pytest.fixture(scope="module")
def tokenizer():
    return build_character_tokenizer(CHARACTERS)


def config_of(path, *settings):
    data = ["Model.path=unread", "Data.source=files", f"Data.train_path={path}"]
    data += [f"Data.eval_path={path}", "Train.prompts_per_step=2", "Train.prompts_per_minibatch=2"]
    flags = [word for setting in (*data, *settings) for word in ("--set", setting)]
    return read_config(["--config", "countdown_cpu", *flags], FACTORIES)


def trained_on(config, tokenizer):
    """The ids of the prompts of an epoch."""
    steps = max(len(train_source(config, tokenizer).rows) // 2, 1)
    stream = build_prompts(config, tokenizer)
    return sorted(prompt.id for _ in range(steps) for prompt in next(stream))


def check_file(path, tokenizer, message, *settings):
    """A file of which nothing is used, whatever the switch says."""
    for switch in ("stop", "skip"):
        with pytest.raises(DataError, match=message) as error:
            train_source(config_of(path, f"Data.bad_rows={switch}", *settings), tokenizer)
        text = str(error.value)
        assert "found " in text or "cannot be read" in text
        assert ";" in text and len(text) < LONGEST_MESSAGE


def check_row(path, tokenizer, place, message, *settings, bad=1):
    """A file between whose good rows stand ``bad`` broken ones, the first at ``place``."""
    with pytest.raises(DataError, match=message) as error:
        train_source(config_of(path, *settings), tokenizer)
    text = str(error.value)
    assert text.startswith(f"{path}:{place}"), text
    assert "found " in text and ("expected " in text or ", which no" in text) and ";" in text
    assert len(text) < LONGEST_MESSAGE
    config = config_of(path, "Data.bad_rows=skip", *settings)
    source = train_source(config, tokenizer)
    assert source.bad == bad and source.left_out == f"{bad} bad"
    assert trained_on(config, tokenizer) == ["first", "last"]


# --- broken rows of JSON lines --------------------------------------------------------------------


def but(**changes):
    """A row with other values; ... takes a field out."""
    row = GOOD | {"id": "bad"} | changes
    return json.dumps({k: v for k, v in row.items() if v is not ...}).encode()


def chat(*messages):
    return but(prompt=..., messages=list(messages))


LINES = {
    "null": (b"null", "found a JSON NoneType"),
    "a number": (b"7", "found a JSON int"),
    "a text": (b'"text"', "found a JSON str"),
    "a list": (b"[1, 2]", "found a JSON list.*end in .json"),
    "an empty line": (b"", "found an empty line.*delete the line"),
    "blanks": (b" \t ", "found an empty line"),
    "half an object": (but()[:-10], "bad JSON"),
    "two objects": (but() + but(), "bad JSON .Extra data"),
    "single quotes": (b"{'prompt': '1'}", "bad JSON"),
    "a comment": (b"// more", "bad JSON"),
    "nested too deeply": (b"[" * 100_000, "bad JSON"),
    "NaN": (but(answer=float("nan")), "NaN is no JSON value"),
    "Infinity": (but(answer=[float("inf")]), "Infinity is no JSON value"),
    "a float that is none": (but(answer=0).replace(b"0", b"1e999"), "1e999 is too large"),
    "a number without end": (but(answer=0).replace(b"0", b"9" * 5000), "bad JSON"),
    "a key twice": (but()[:-1] + b', "answer": "3"}', "the key 'answer' is given twice"),
    "a key inside twice": (but(answer=7).replace(b"7", b'{"x":1,"x":2}'), "'x' is given twice"),
    "a byte-order mark": (b"\xef\xbb\xbf" + but(), "found a byte-order mark"),
    "bad UTF-8": (but().replace(b"1+1", b"1\xff1"), "bytes that are not UTF-8"),
    "latin-1": (but(prompt="\u00e9").replace(b"\\u00e9", b"\xe9"), "bytes that are not UTF-8"),
    "half a surrogate pair": (but(answer="\ud800"), "half a surrogate pair in 'answer'"),
    "no prompt": (but(prompt=...), "neither of 'prompt' and 'messages'.*Data.prompt"),
    "no answer": (but(answer=...), "no field 'answer' .there are .'id', 'kind', 'prompt'"),
    "no kind": (but(kind=...), "no field 'kind'"),
    "a wrong field name": (but(prompt=..., promt="1+1"), "neither of 'prompt' and 'messages'"),
    "two prompts": (but(messages=[]), "both of 'prompt' and 'messages'"),
    "a null prompt": (but(prompt=None), "null for 'prompt'"),
    "an empty prompt": (but(prompt=""), "an empty 'prompt'"),
    "a blank prompt": (but(prompt=" \n"), "an empty 'prompt'"),
    "a number for a prompt": (but(prompt=4), "'prompt' of type int"),
    "an object for a prompt": (but(prompt={"a": 1}), "'prompt' of type dict"),
    "a null answer": (but(answer=None), "null for 'answer'"),
    "an empty answer": (but(answer=""), "an empty string for 'answer'"),
    "a wrong kind": (but(kind="maths"), "found kind 'maths', expected one of"),
    "a null kind": (but(kind=None), "null for 'kind'"),
    "a null id": (but(id=None), "null for 'id'"),
    "a float for an id": (but(id=1.5), "'id' of type float"),
    "an id again": (but(id="first"), "id 'first' again .first at .*:1"),
    "no message": (chat(), "'messages' = ..,"),
    "messages that are a text": (but(prompt=..., messages="hi"), "'messages' = 'hi'"),
    "a message that is a text": (chat("hi"), "a message 'hi', expected an object"),
    "a message without role": (chat({"content": "1"}), "no field 'role'"),
    "a message of nobody": (chat({"role": "robot", "content": "1"}), "role 'robot'"),
    "an empty message": (chat({"role": "user", "content": ""}), "an empty 'content'"),
    "the last word": (chat({"role": "assistant", "content": "1"}), "role 'assistant', expected"),
}
HUGE_LINES = {
    "id": (but(id=HUGE), "an id of 10,000,000 characters"),
    "kind": (but(kind=HUGE), "found kind '999"),
    "role": (chat({"role": HUGE, "content": "1"}), "found role '999"),
    "a field's name": (but(prompt=..., **{HUGE: 1}), "neither of 'prompt' and"),
    "answer": (but(kind="countdown", answer=HUGE), "found the answer '999"),
    "line that is no JSON": (but(id=HUGE)[:-1], "bad JSON"),
}
GOLDS = {
    "math: braces": (but(kind="math", answer="\\frac{1}{2"), "which no response can match"),
    "math: a boolean": (but(kind="math", answer=True), "expected a string, a number"),
    "math: no answer in a list": (but(kind="math", answer=[]), "an empty list of answers"),
    "math: an object": (but(kind="math", answer={"a": 1}), "expected a string, a number"),
    "exact: a decimal": (but(answer=0.5), "of type float, expected a string or a whole number"),
    "countdown: out of reach": (
        but(kind="countdown", answer={"numbers": [2, 2], "target": 9, "operations": "+"}),
        "found the target 9, which no steps .* reach",
    ),
    "countdown: texts": (but(kind="countdown", answer="2,2"), "found the answer '2,2'"),
    "code: no tests": (but(kind="code", answer={"inputs": [], "outputs": []}), "no test in"),
    "code: one output less": (but(kind="code", answer={"inputs": ["1"], "outputs": []}), "inputs"),
    "code: no Python": (but(kind="code", answer={"asserts": ["f(1 =="]}), "is not Python"),
    "code: no form": (but(kind="code", answer={"x": 1}), "tests that cannot be used"),
}


def lines_of(folder, line, end="\n"):
    path = folder / "mine.jsonl"
    rows = (json.dumps(GOOD).encode(), line, json.dumps(LAST).encode())
    path.write_bytes(b"".join(row + end.encode() for row in rows))
    return path


@pytest.mark.parametrize("case", LINES)
def test_a_line(tmp_path, tokenizer, case):
    line, message = LINES[case]
    check_row(lines_of(tmp_path, line), tokenizer, "2: found ", message)


@pytest.mark.parametrize("case", LINES)
def test_a_line_of_a_file_from_windows(tmp_path, tokenizer, case):
    line, message = LINES[case]
    check_row(lines_of(tmp_path, line, end="\r\n"), tokenizer, "2: found ", message)


@pytest.mark.parametrize("case", HUGE_LINES)
def test_a_line_with_a_huge(tmp_path, tokenizer, case):
    line, message = HUGE_LINES[case]
    check_row(lines_of(tmp_path, line), tokenizer, "2", message)


@pytest.mark.parametrize("case", GOLDS)
def test_an_answer(tmp_path, tokenizer, case):
    line, message = GOLDS[case]
    check_row(lines_of(tmp_path, line), tokenizer, "2 (id bad): found ", message)


def test_several_bad_rows_are_counted(tmp_path, tokenizer):
    path = lines_of(tmp_path, b"\n".join(line for line, _ in LINES.values()))
    check_row(path, tokenizer, "2: found ", "a JSON NoneType", bad=len(LINES))


def test_a_huge_prompt_is_too_long(tmp_path, tokenizer):
    path = lines_of(tmp_path, but(prompt="9" * 300_000))
    with pytest.raises(DataError, match=r"mine.jsonl:2 .id bad.: found a prompt of 300,?002") as e:
        train_source(config_of(path), tokenizer)
    assert len(str(e.value)) < LONGEST_MESSAGE
    config = config_of(path, "Data.too_long=skip")
    assert train_source(config, tokenizer).left_out == "1 too long"
    assert trained_on(config, tokenizer) == ["first", "last"]


# --- broken rows of other formats -----------------------------------------------------------------

ELEMENTS = {
    "null": ("null", "found a JSON NoneType"),
    "a list": ("[]", "found a JSON list"),
    "NaN": ('{"prompt": NaN}', "NaN is no JSON value"),
    "a key twice": ('{"prompt": "1", "prompt": "2"}', "'prompt' is given twice"),
    "a large float": ('{"prompt": "1", "answer": [1e999]}', "1e999 is too large"),
    "no answer": ('{"prompt": "1", "kind": "exact"}', "no field 'answer'"),
    "an id again": (json.dumps(GOOD), "id 'first' again .first at .*element 1"),
}


@pytest.mark.parametrize("case", ELEMENTS)
def test_an_element(tmp_path, tokenizer, case):
    element, message = ELEMENTS[case]
    path = tmp_path / "mine.json"
    path.write_text(f"[\n{json.dumps(GOOD)},\n {element},\n{json.dumps(LAST)}\n]\n")
    check_row(path, tokenizer, "3 (element 2): found ", message)


CSV_ROWS = {
    "a value less": ("bad,1+1,2", "found 3 values, expected 4, one for each of .'id', 'prompt'"),
    "a value more": ("bad,1+1,2,exact,5", "found 5 values, expected 4"),
    "an empty line": ("", "found an empty line"),
    "a quote inside": ('bad,"1"+1,2,exact', "a quote that is not closed, or not before"),
    "a NUL": ("bad,1\0+1,2,exact", "found a NUL in 'prompt'"),
    "an empty answer": ("bad,1+1,,exact", "an empty string for 'answer'"),
    "a blank prompt": ('bad,"\n ",2,exact', "an empty 'prompt'"),
    "a wrong kind": ("bad,1+1,2,maths", "found kind 'maths'"),
    "an id again": ("first,1+1,2,exact", "id 'first' again"),
}


@pytest.mark.parametrize("end", ["csv", "tsv"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("case", CSV_ROWS)
def test_a_row_of_a_table(tmp_path, tokenizer, case, newline, end):
    row, message = CSV_ROWS[case]
    path = tmp_path / f"mine.{end}"
    filler = "9" * 5000  # what is read as a sample of the file must not be all of it
    rows = ["id,prompt,answer,kind", f"first,1+1,{filler},exact", row, f"last,1+1,{filler},exact"]
    text = "".join(row + newline for row in rows)
    path.write_bytes((text if end == "csv" else text.replace(",", "\t")).encode())
    check_row(path, tokenizer, "3: found ", message)


def column(bad, kind=None):
    return pyarrow.array(["2", bad, "2"], kind)


def columns(**changes):
    found = {name: [GOOD[name], GOOD[name], LAST[name]] for name in GOOD}
    return found | {"id": ["first", "bad", "last"]} | changes


PARQUET_ROWS = {
    "a null answer": ({"answer": column(None)}, "null for 'answer'"),
    "a NaN answer": ({"kind": ["math"] * 3, "answer": [2.0, float("nan"), 2.0]}, "null for 'answ"),
    "an infinite answer": (
        {"kind": ["math"] * 3, "answer": [2.0, float("inf"), 2.0]},
        "a value that JSON does not hold in 'answer'",
    ),
    "an infinite other": (
        {"score": [[2.0], [float("-inf")], []]},
        "a value that JSON does not hold in 'score'",
    ),
    "bytes": ({"raw": [b"a", b"\xff", b"c"]}, "codec can't decode .* in 'raw'"),
    "a duration": (
        {"took": pyarrow.array([None, 1, None], pyarrow.duration("s"))},
        "a timedelta in 'took'",
    ),
    "a year that is none": (
        {"moment": pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))},
        "in 'moment'",
    ),
    "no chat": (
        {"prompt": [[{"role": "user", "content": "1"}], [], [{"role": "user", "content": "1"}]]},
        "'prompt' = ..,",
    ),
    "a null in a chat": (
        {"prompt": [[{"role": "user", "content": c}] for c in ("1", None, "1")]},
        "null for 'content'",
    ),
    "an id again": ({"id": ["first", "first", "last"]}, "id 'first' again .first at .*:row 1"),
}


@pytest.mark.parametrize("case", PARQUET_ROWS)
def test_a_row_of_parquet(tmp_path, tokenizer, case):
    changes, message = PARQUET_ROWS[case]
    path = tmp_path / "mine.parquet"
    path.write_bytes(parquet_of(**columns(**changes)))
    check_row(path, tokenizer, "row 2: found ", message)


# --- rows that the settings do not fit ------------------------------------------------------------

SETTINGS = {
    "Data.answer_pattern='#### (.*)'": "1: found 'answer' = '2', expected something that the patt",
    "Data.template='{prompt} {level}'": "1: found no field 'level' .*name the right one",
    "Data.template='{prompt}{note}'": "2: found null for 'note', expected .* of the template",
    "Data.prompt=question": "1: found no field 'question'",
    "Data.prompt=extra.question": "1: found no field 'extra.question'",
    "Data.answer=reward_model.truth": "1: found no field 'reward_model.truth'",
    "Data.grader=maths": "1: found kind 'maths', expected one of",
    "Data.layout=verl": "1: found no field 'data_source'",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_a_row_does_not_fit(tmp_path, tokenizer, setting):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(encoded([GOOD | {"note": "+"}, LAST | {"note": None}], "jsonl"))
    with pytest.raises(DataError, match=f"mine.jsonl:{SETTINGS[setting]}"):
        train_source(config_of(path, setting), tokenizer)
    config = config_of(path, setting, "Data.bad_rows=skip")
    if SETTINGS[setting].startswith("2"):
        assert train_source(config, tokenizer).bad == 1
    else:
        with pytest.raises(DataError, match="no row that can be used, expected .*: .*mine.jsonl:1"):
            train_source(config, tokenizer)


def test_an_unknown_data_source_of_verl(tmp_path, tokenizer):
    row = {
        "data_source": "aime2024",
        "prompt": [{"role": "user", "content": "1+1"}],
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": "first"},
    }
    unknown = row | {"data_source": "my_riddles", "extra_info": {"index": "bad"}}
    path = tmp_path / "mine.parquet"
    path.write_bytes(encoded([row, unknown, row | {"extra_info": {"index": "last"}}], "parquet"))
    message = "data_source = 'my_riddles', for which no grader is known.* Data.grader = "
    check_row(path, tokenizer, "row 2: found ", message, "Data.layout=verl")


# --- broken files ---------------------------------------------------------------------------------

ROWS = encoded([GOOD, LAST], "jsonl")
PACKED = gzip.compress(ROWS * 50)
ARRAY = encoded([GOOD, LAST], "json")
TABLE = encoded([GOOD, LAST], "csv")
PARQUET = encoded([GOOD, LAST], "parquet")
MIDDLE = len(PARQUET) // 2
FILES = {
    "a.jsonl: empty": (b"", "a.jsonl: found an empty file"),
    "a.jsonl: blank lines": (b"\n\n", "a.jsonl: found an empty file"),
    "a.jsonl: packed": (PACKED, "a.jsonl:1: found gzip.*end in .gz"),
    "a.jsonl: Parquet": (PARQUET, "a.jsonl:1: found Parquet.*end in .parquet"),
    "a.jsonl: zipped": (b"PK\x03\x04" + ROWS, "a.jsonl:1: found a zip archive.*unzip"),
    "a.jsonl: UTF-16": (ROWS.decode().encode("utf-16"), "a.jsonl:1: found UTF-16.*iconv"),
    "a.jsonl: UTF-16 without mark": (ROWS.decode().encode("utf-16-le"), "a.jsonl: found NUL bytes"),
    "a.jsonl: a NUL": (ROWS.replace(b"1+1", b"1\0001"), "a.jsonl: found NUL bytes"),
    "a.jsonl: mark": (b"\xef\xbb\xbf" + ROWS, "a.jsonl:1: found a byte-order mark.*without BOM"),
    "a.jsonl: an object on many lines": (json.dumps(GOOD, indent=1).encode(), "a.jsonl:1: .*jq"),
    "a.jsonl: an array": (ARRAY, r"a.jsonl:1: found '\[' alone on a line.*end in .json"),
    "a.jsonl: a web page": (b"<!DOCTYPE html><html>", "a.jsonl:1: found a web page"),
    "a.jsonl: git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    "a.jsonl.gz: cut off": (PACKED[:-9], "a.jsonl.gz: cannot be read as gzip.*copied whole"),
    "a.jsonl.gz: damaged": (PACKED[:20] + b"\0\xff\0" + PACKED[23:], "cannot be read as gzip"),
    "a.jsonl.gz: not packed": (ROWS, "a.jsonl.gz: cannot be read as gzip"),
    "a.jsonl.gz: nothing in it": (gzip.compress(b""), "a.jsonl.gz: found an empty file"),
    "a.json: empty": (b"", "a.json: found an empty file"),
    "a.json: cut off": (
        ARRAY[:-20],
        r"a.json:8 \(element 2\): found bad JSON.*copy the file again",
    ),
    "a.json: not closed": (ARRAY[:-2], r"a.json:8 \(element 2\): found '' behind the element"),
    "a.json: no comma": (ARRAY.replace(b"},", b"}"), r"a.json:2 \(element 1\): found '{"),
    "a.json: a comma more": (ARRAY[:-2] + b",]", "a comma behind the last element"),
    "a.json: no row": (b"[ ]", "a.json.*found an empty array"),
    "a.json: more behind it": (ARRAY + b"[]", "behind the array"),
    "a.json: bad UTF-8": (ARRAY.replace(b"1+1", b"\xff"), "a.json:4: found bytes that are not"),
    "a.json: Parquet": (PARQUET, "a.json:1: found Parquet"),
    "a.csv: empty": (b"", "a.csv:1: found no row"),
    "a.csv: names alone": (b"id,prompt\n", "a.csv:1: found no row"),
    "a.csv: a name twice": (b"id,prompt,id\n1,2,3\n", "a.csv:1: found two columns 'id'"),
    "a.csv: no name": (b"id,,kind\n1,2,3\n", "a.csv:1: found a column without a name"),
    "a.csv: a quote not closed": (TABLE + b'"b,1+1,2,exact\n' + TABLE, "a.csv:4: found a quote"),
    "a.csv: a quote in the names": (b'"id,prompt\n1,2\n', "a.csv:1: found a quote"),
    "a.csv: tabs": (TABLE.replace(b",", b"\t"), r"a.csv:1: found '\\t' between.*end in .tsv"),
    "a.csv: semicolons": (TABLE.replace(b",", b";"), "a.csv:1: found ';' between the names"),
    "a.tsv: commas": (TABLE, "a.tsv:1: found ',' between the names.*end in .csv"),
    "a.csv: JSON": (ROWS, "a.csv:1: found JSON.*end in .jsonl"),
    "a.csv: bad UTF-8": (TABLE.replace(b"1+1", b"\xff"), "a.csv:2: found bytes that are not UTF-8"),
    "a.csv: mark": (b"\xef\xbb\xbf" + TABLE, "a.csv:1: found a byte-order mark"),
    "a.csv: UTF-16": (TABLE.decode().encode("utf-16"), "a.csv:1: found UTF-16"),
    "a.csv: Parquet": (PARQUET, "a.csv:1: found Parquet"),
    "a.parquet: empty": (b"", "a.parquet: found an empty file"),
    "a.parquet: cut off": (PARQUET[:-9], "a.parquet: found Parquet without its end.*cut off"),
    "a.parquet: damaged": (
        PARQUET[:MIDDLE] + b"\xff" * 40 + PARQUET[MIDDLE + 40 :],
        "a.parquet: cannot be read as Parquet",
    ),
    "a.parquet: its ends alone": (b"PAR1" * 3, "a.parquet: cannot be read as Parquet"),
    "a.parquet: JSON": (ROWS, "a.parquet: found something else, expected Parquet"),
    "a.parquet: packed": (gzip.compress(PARQUET), "a.parquet: found gzip, expected Parquet"),
    "a.parquet: git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a.parquet: no row": (parquet_of(prompt=pyarrow.array([], "string")), "found no row"),
    "a.parquet: another schema": (parquet_of(text=["a"]), r"row 1: found no field 'kind' .*'text'"),
    "a.parquet.gz: cut off": (gzip.compress(PARQUET)[:-9], "cannot be read as gzip"),
    "a.txt: rows": (ROWS, "a.txt: found a name that does not say the format.*rename"),
    "a: rows": (ROWS, "a: found a name that does not say the format"),
    "a.jsonl.bz2: rows": (ROWS, "a.jsonl.bz2: found a name that does not say the format"),
    "a.gz: rows": (PACKED, "a.gz: found a name that does not say the format"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file(tmp_path, tokenizer, case):
    content, message = FILES[case]
    path = tmp_path / case.partition(":")[0]
    path.write_bytes(content)
    check_file(path, tokenizer, message)


def test_two_columns_of_one_name(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    made = pyarrow.table([["1"], ["2"]], names=["prompt", "prompt"])
    parquet.write_table(made, path)
    check_file(path, tokenizer, "a.parquet: found two columns 'prompt'")


def test_no_file(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in {
        "no.jsonl": "no.jsonl: cannot be read: No such file.*check the path",
        "no/train.jsonl": "cannot be read: No such file",
        "empty": "empty: found no data file, expected names that end in .jsonl",
        "*.parquet": "found no data file, expected at least one that the pattern matches",
        "pipe.jsonl": "pipe.jsonl: cannot be read: a pipe or a device",
    }.items():
        check_file(tmp_path / name, tokenizer, message)


def test_as_many_as_promised():
    tables = (LINES, HUGE_LINES, GOLDS, ELEMENTS, CSV_ROWS, PARQUET_ROWS, SETTINGS, FILES)
    assert sum(map(len, tables)) >= 150
