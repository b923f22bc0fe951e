"""Files of one's own: what is read, and a message for everything that is not."""

import gzip
import json
import os

import pytest

from aspo_jax.data import DataError, read_rows

GOOD = {"id": "p1", "prompt": "2+2", "answer": "4", "kind": "exact"}


def write(path, *lines):
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    data = b"\n".join(encoded) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_rows(tmp_path, name):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "né 😀"}]
    without_id = {"messages": chat, "answer": {"x": [1]}, "kind": "code", "level": 3}
    path = write(tmp_path / name, GOOD, without_id, GOOD | {"id": 7})
    assert read_rows(path, kinds={"exact", "code"}) == [
        {
            "id": "p1",
            "question": "2+2",
            "messages": [{"role": "user", "content": "2+2"}],
            "answer": "4",
            "kind": "exact",
            "where": f"{path}:1",
            "columns": {},
        },
        {
            "id": "2",
            "question": "né 😀",
            "messages": chat,
            "answer": {"x": [1]},
            "kind": "code",
            "where": f"{path}:2",
            "columns": {"level": 3},
        },
        {
            "id": "7",
            "question": "2+2",
            "messages": [{"role": "user", "content": "2+2"}],
            "answer": "4",
            "kind": "exact",
            "where": f"{path}:3",
            "columns": {},
        },
    ]


def test_windows_line_ends_and_no_last_newline(tmp_path):
    path = tmp_path / "mine.jsonl"
    line = json.dumps({k: v for k, v in GOOD.items() if k != "id"})
    path.write_bytes(f"{line}\r\n{line}".encode())
    assert [row["id"] for row in read_rows(path)] == ["1", "2"]


def without(name):
    return {k: v for k, v in GOOD.items() if k != name}


def chat(*messages):
    return without("prompt") | {"messages": list(messages)}


BAD = {
    b'{"prompt": "a"': "found bad JSON .*, expected a JSON object; write one whole object",
    b"{'prompt': 'a'}": "bad JSON",
    b'{"a": 1}{"b": 2}': "bad JSON",
    b"[" * 100_000: "bad JSON",
    b'{"prompt":"a","answer":' + b"9" * 5000 + b',"kind":"exact"}': "bad JSON",
    b'{"prompt":"a","answer":NaN,"kind":"exact"}': "bad JSON .NaN is no JSON value",
    b'{"prompt":"a","answer":-Infinity,"kind":"exact"}': "-Infinity",
    b"[1, 2]": "found a JSON list, expected a JSON object",
    b'"text"': "found a JSON str",
    b"null": "found a JSON NoneType",
    b"": "found an empty line, expected a JSON object; delete the line",
    b"  \t": "found an empty line",
    b"\xef\xbb\xbf{}": "found a byte-order mark, expected plain UTF-8; save the file as",
    b'{"prompt": "\xff"}': "bytes that are not UTF-8",
    b'{"prompt":"\\ud800","answer":"4","kind":"exact"}': "half a surrogate pair in '",
    b'{"prompt":"a","answer":{"x":["\\udfff"]},"kind":"exact"}': "half a surrogate pair in '",
    b'{"prompt":"a","answer":"4","\\udfff":1,"kind":"exact"}': "pair in a field's name",
    b'{"prompt":"a","answer":"4","answer":"5","kind":"exact"}': "the key 'answer' is given twice",
    b'{"prompt":"a","answer":{"x":1,"x":2},"kind":"exact"}': "the key 'x' is given twice",
    b'{"prompt":"a","answer":1e999,"kind":"exact"}': "the number 1e999 is too large",
    b'{"prompt": "a" "b"}': "bad JSON .Expecting ',' delimiter at column 16",
}
BAD_ROWS = [
    (without("answer"), r"no field 'answer' \(there are \['id', 'kind', 'prompt'\]\)"),
    (without("kind"), "no field 'kind'"),
    (without("prompt"), "found neither of 'prompt' and 'messages'"),
    (GOOD | {"messages": []}, "found both of 'prompt' and 'messages'"),
    (GOOD | {"prompt": ""}, "found an empty 'prompt', expected some text"),
    (GOOD | {"prompt": " \n"}, "found an empty 'prompt'"),
    (GOOD | {"prompt": 4}, "found 'prompt' of type int, expected a string; put it in quotes"),
    (GOOD | {"prompt": None}, "found null for 'prompt', expected some text; fill it in"),
    (GOOD | {"answer": None}, "found null for 'answer'"),
    (GOOD | {"answer": " "}, "found an empty string for 'answer'"),
    (GOOD | {"kind": "math"}, r"found kind 'math', expected one of \['exact'\]"),
    (GOOD | {"kind": 3}, "'kind' of type int"),
    (GOOD | {"id": ""}, "found an empty 'id'"),
    (GOOD | {"id": None}, "found null for 'id', expected a string; .* leave the field out"),
    (GOOD | {"id": True}, "'id' of type bool"),
    (GOOD | {"id": "first"}, r"found id 'first' again \(first at .*mine.jsonl:1\)"),
    (chat(), r"found 'messages' = \[\]"),
    (without("prompt") | {"messages": "hi"}, "found 'messages' = 'hi'"),
    (chat("hi"), "found a message 'hi', expected an object"),
    (chat({"content": "hi"}), "no field 'role'"),
    (chat({"role": "user"}), "no field 'content'"),
    (chat({"role": "robot", "content": "hi"}), "found role 'robot', expected one of"),
    (chat({"role": "user", "content": ""}), "found an empty 'content'"),
    (chat({"role": "user", "content": ["hi"]}), "'content' of type list"),
    (chat({"role": "assistant", "content": "hi"}), "a last message of role 'assistant'"),
]


@pytest.mark.parametrize(("line", "message"), [*BAD.items(), *BAD_ROWS])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "mine.jsonl", GOOD | {"id": "first"}, line, GOOD | {"id": "last"})
    with pytest.raises(DataError, match="mine.jsonl:2: found .*, expected .*; .*") as error:
        read_rows(path, kinds=["exact"])
    error.match(message)


def test_a_line_number_taken_as_an_id(tmp_path):
    path = write(tmp_path / "mine.jsonl", GOOD | {"id": "2"}, without("id"))
    with pytest.raises(DataError, match=r":2: found id '2' again \(first at .*mine.jsonl:1\)"):
        read_rows(path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: cannot be read: No such file.*; check"):
        read_rows(tmp_path / "nowhere.jsonl")
    for content in (b"", b"\n\n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="empty.jsonl: found an empty file"):
            read_rows(tmp_path / "empty.jsonl")
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    for content in (b"plain", whole[:-9], whole[:15] + b"\0\xff\0" + whole[18:]):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match="bad.jsonl.gz: cannot be read as gzip"):
            read_rows(tmp_path / "bad.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), ":1: found gzip, expected plain UTF-8 text; .* end in .gz"),
        (b"PAR1\x15\x04", ":1: found Parquet, .* end in .parquet"),
        ('{"a": 1}'.encode("utf-16"), ":1: found UTF-16, .*; convert it: iconv"),
        ('{"a": 1}'.encode("utf-16-le"), ": found NUL bytes, .* UTF-16"),
        (b"\xef\xbb\xbf{}", ":1: found a byte-order mark, .*; save it as UTF-8 without BOM"),
        (b'{\n  "prompt": "a"\n}\n', r":1: found '{' alone on a line, .* jq -c \. OLD"),
        (b'[\n  {"prompt": "a"}\n]\n', r":1: found '\[' alone on a line, .* end in .json"),
        (b'[{"prompt": "a"}]', r":1: found a JSON list, expected a JSON object; .*end in .json"),
    ],
)
def test_other_formats_are_named_with_the_remedy(tmp_path, content, message):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"mine.jsonl{message}"):
        read_rows(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "found no path"),
        ("https://host/a.jsonl", "found an address, expected a path on this machine"),
        ("gs://bucket/a.jsonl", "found an address"),
        ("~nosuchuser/a.jsonl", "no home folder is known for ~nosuchuser"),
        ("a\0b", "found a NUL or half a surrogate pair"),
        ("\ud800", "found a NUL or half a surrogate pair"),
        ("x" * 300, "longer than a path can be"),
        ("/dev/null", "a pipe or a device, expected a file"),
    ],
)
def test_paths_that_are_none(path, message):
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: cannot be read: a pipe or a device"):
        read_rows(tmp_path / "pipe")


def test_a_file_in_the_current_folder_is_named_relative_to_it(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.jsonl", GOOD, b"{}")
    monkeypatch.chdir(tmp_path)
    for spelled in (path, "mine.jsonl", "./mine.jsonl", f"../{tmp_path.name}/mine.jsonl"):
        with pytest.raises(DataError, match=r"^mine\.jsonl:2: found no field 'kind'"):
            read_rows(spelled)
