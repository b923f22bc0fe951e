"""Files of one's own: what is read, and a message for everything that is not."""

import gzip
import json

import pytest

from aspo_jax.data import DataError, read_jsonl

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
    assert read_jsonl(path, kinds={"exact", "code"}) == [
        {
            "id": "p1",
            "messages": [{"role": "user", "content": "2+2"}],
            "answer": "4",
            "kind": "exact",
            "where": f"{path}:1",
        },
        {"id": "2", "messages": chat, "answer": {"x": [1]}, "kind": "code", "where": f"{path}:2"},
        {
            "id": "7",
            "messages": [{"role": "user", "content": "2+2"}],
            "answer": "4",
            "kind": "exact",
            "where": f"{path}:3",
        },
    ]


def test_windows_line_ends_and_no_last_newline(tmp_path):
    path = tmp_path / "mine.jsonl"
    line = json.dumps({k: v for k, v in GOOD.items() if k != "id"})
    path.write_bytes(f"{line}\r\n{line}".encode())
    assert [row["id"] for row in read_jsonl(path)] == ["1", "2"]


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
    b'{"prompt":"\\ud800","answer":"4","kind":"exact"}': "half a surrogate pair in 'prompt'",
}
BAD_ROWS = [
    (without("answer"), r"no field 'answer' \(there are \['id', 'kind', 'prompt'\]\)"),
    (without("kind"), "no field 'kind'"),
    (without("prompt"), "found neither of 'prompt' and 'messages'"),
    (GOOD | {"messages": []}, "found both of 'prompt' and 'messages'"),
    (GOOD | {"prompt": ""}, "found an empty 'prompt', expected some text"),
    (GOOD | {"prompt": " \n"}, "found an empty 'prompt'"),
    (GOOD | {"prompt": 4}, "found 'prompt' of type int, expected a string; put it in quotes"),
    (GOOD | {"prompt": None}, "'prompt' of type NoneType"),
    (GOOD | {"answer": None}, "found null for 'answer'"),
    (GOOD | {"answer": " "}, "found an empty string for 'answer'"),
    (GOOD | {"kind": "math"}, r"found kind 'math', expected one of \['exact'\]"),
    (GOOD | {"kind": 3}, "'kind' of type int"),
    (GOOD | {"id": ""}, "found an empty 'id'"),
    (GOOD | {"id": None}, "'id' of type NoneType"),
    (GOOD | {"id": True}, "'id' of type bool"),
    (GOOD | {"id": "first"}, r"found id 'first' again \(first on line 1\)"),
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
        read_jsonl(path, kinds=["exact"])
    error.match(message)


def test_a_line_number_taken_as_an_id(tmp_path):
    path = write(tmp_path / "mine.jsonl", GOOD | {"id": "2"}, without("id"))
    with pytest.raises(DataError, match=r":2: found id '2' again \(first on line 1\)"):
        read_jsonl(path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: cannot be read .*; check the path"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)
    for content in (b"", b"\n\n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="empty.jsonl: found an empty file"):
            read_jsonl(tmp_path / "empty.jsonl")
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    for content in (b"plain", whole[:-9], whole[:15] + b"\0\xff\0" + whole[18:]):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match="bad.jsonl.gz: cannot be read"):
            read_jsonl(tmp_path / "bad.jsonl.gz")
