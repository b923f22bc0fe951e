"""Texts of tokens as they come: characters, spaces, stop strings, bytes, calls of tools."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from wire_toy import MERGES, SPECIAL, byte_tokenizer, piece_tokenizer

from aspo_jax.data import load_tokenizer
from aspo_jax.serving.answers import Answer, Ends, joined, spans
from aspo_jax.serving.seam import Grown
from aspo_jax.serving.texts import Detokenizer, StopScanner, Vocabulary, _byte_of, begun
from aspo_jax.serving.tools import Withheld, parse_calls

TEXTS = [
    "hello world",
    "wörld 你好吗!你",
    "👩‍👩‍👧 fam",
    "नमस्ते",
    " leading",
    "tail ",
    "a\n\nb",
    "\ufffd!",
    "x\ufffd",
]


@pytest.fixture(scope="module")
def bytewise():
    return Vocabulary(byte_tokenizer())


@pytest.fixture(scope="module")
def piecewise():
    return Vocabulary(piece_tokenizer())


def texts_of(vocabulary, tokens, context=()):
    """The pieces of text, one for each token and one at the end."""
    texts = vocabulary.detokenizer(context)
    return [*map(texts.add, tokens), texts.rest()]


def ids(vocabulary, text):
    return vocabulary.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_is_half_a_character(bytewise, text):
    pieces = texts_of(bytewise, ids(bytewise, text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_come_as_soon_as_they_are_whole(bytewise):
    assert texts_of(bytewise, ids(bytewise, "é!")) == ["", "é", "!", ""]
    assert texts_of(bytewise, ids(bytewise, "!你a")) == ["!", "", "你", "a", ""]
    assert texts_of(bytewise, ids(bytewise, "hello你")) == ["hello", "", "", "你", ""]


def test_any_bytes_give_what_decoding_all_at_once_gives(bytewise):
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.choice([*range(259 + len(MERGES)), 1, 2]) for _ in range(draw.randrange(60))]
        assert "".join(texts_of(bytewise, tokens)) == bytewise.decode(tokens)


def test_long_runs_of_broken_bytes_do_not_wait_for_their_end(bytewise):
    start = bytewise.tokenizer.convert_tokens_to_ids("ä")  # 0xE4: begins a character of three bytes
    tokens = [start] * 1000
    texts = bytewise.detokenizer(())
    given = [texts.add(token) for token in tokens]
    assert len("".join(given)) > 980 and len(texts._window) < 20
    assert "".join(given) + texts.rest() == bytewise.decode(tokens)


def test_special_tokens_are_no_text_and_cost_nothing(bytewise):
    tokens = [*ids(bytewise, "你")[:2], *[1, 2] * 500, *ids(bytewise, "你")[2:]]
    texts = bytewise.detokenizer(())
    assert "".join(map(texts.add, tokens)) == "你"
    shown = bytewise.detokenizer((), True)
    assert "".join(map(shown.add, [1, *ids(bytewise, "hi"), 2])) == "<|start|>hi<|end|>"


def test_a_character_that_the_prompt_began_is_shown_whole(bytewise):
    tokens = ids(bytewise, "ab你")
    assert "".join(texts_of(bytewise, tokens[-1:], tokens[:-1])) == "你"


def test_spaces_of_words_are_kept_behind_a_prompt_and_dropped_at_the_start(piecewise):
    hello, world = piecewise.tokenizer.convert_tokens_to_ids(["▁hello", "▁world"])
    assert texts_of(piecewise, [hello, world]) == ["hello", " world", ""]
    assert texts_of(piecewise, [world], [hello]) == [" world", ""]
    assert texts_of(piecewise, [world], [1]) == ["world", ""]  # <s> is no text
    assert texts_of(piecewise, [hello, 2, world]) == ["hello", "", " world", ""]


def test_byte_pieces_wait_for_their_character(piecewise):
    tokens = [3 + b for b in "你好".encode()]
    assert texts_of(piecewise, tokens) == ["", "", "你", "", "", "好", ""]


def test_what_was_given_stays_where_byte_pieces_break_off(piecewise):
    tokens = [3 + b for b in "你好".encode()[:4]]
    assert piecewise.decode(tokens) == "\ufffd" * 4  # all at once, the first character is lost
    assert texts_of(piecewise, tokens) == ["", "", "你", "", "\ufffd" * 3]


def test_random_pieces_give_what_decoding_all_at_once_gives(piecewise):
    draw, words = random.Random(1), list(range(259, 266))
    for _ in range(300):
        tokens = [3 + b for b in "é你".encode()] * draw.randrange(3)
        tokens += [draw.choice(words) for _ in range(draw.randrange(1, 40))]
        context = [draw.choice(words[1:]) for _ in range(3)]
        whole = piecewise.decode([*context, *tokens])
        assert (
            "".join(texts_of(piecewise, tokens, context)) == whole[len(piecewise.decode(context)) :]
        )


def test_a_decoder_is_asked_for_few_tokens_at_a_time(bytewise):
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return bytewise.decode(tokens)

    texts = Detokenizer(decode)
    for token in ids(bytewise, "hello world, 你好 " * 50):
        texts.add(token)
    assert longest <= 8


@pytest.mark.parametrize("piece", ["hello", " w", "<|end|>", "<tool_call>"])
def test_tokens_are_spelled_with_their_spaces(bytewise, piece):
    (token,) = ids(bytewise, piece)
    assert bytewise.spell(token) == piece
    assert bytes(bytewise.bytes_of(token)).decode() == piece


def test_bytes_of_tokens_make_the_text(bytewise, piecewise):
    for text in TEXTS:
        tokens = ids(bytewise, text)
        assert b"".join(bytes(bytewise.bytes_of(t)) for t in tokens).decode() == text
    tokens = [*(3 + b for b in "é".encode()), 261]
    assert b"".join(bytes(piecewise.bytes_of(t)) for t in tokens).decode() == "é world"


def test_the_byte_alphabet_is_that_of_the_tokenizers():
    assert _byte_of().keys() == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_byte_of().values()) == list(range(256))
    assert all(chr(b) == c for c, b in _byte_of().items() if 33 <= b <= 126)


@pytest.mark.parametrize(
    ("text", "strings", "length"),
    [("abc", ("cd",), 1), ("abc", ("abcd", "cd"), 3), ("abc", ("abc",), 0), ("", ("a",), 0)],
)
def test_what_may_begin_a_stop_string(text, strings, length):
    assert begun(text, strings) == length


def scan(strings, pieces, is_shown=False):
    scanner, given = StopScanner(strings, is_shown), []
    for piece in pieces:
        given.append(scanner.add(piece))
        if scanner.found is not None:
            return "".join(given), scanner.found
    return "".join(given) + scanner.rest(), None


@pytest.mark.parametrize(
    ("text", "strings", "is_shown", "expected"),
    [
        ("one STOP two", ("STOP",), False, ("one ", "STOP")),
        ("one STOP two", ("STOP",), True, ("one STOP", "STOP")),
        ("ababac", ("abac",), False, ("ab", "abac")),  # begins again within itself
        ("xxend", ("nd", "end"), False, ("xx", "end")),  # complete together: the longer
        ("a.b.c", ("b.c", ".b"), False, ("a", ".b")),  # the first that is complete
        ("abc", ("bcd",), False, ("abc", None)),
        ("abc", (), False, ("abc", None)),
    ],
)
def test_stop_strings_are_found_across_any_pieces(text, strings, is_shown, expected):
    assert scan(strings, list(text), is_shown) == expected
    draw = random.Random(0)
    for _ in range(30):
        cuts = sorted({0, len(text), *(draw.randrange(len(text) + 1) for _ in range(3))})
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        if not any(p.count(s) for p in pieces for s in strings if len(strings) > 1):
            assert scan(strings, pieces, is_shown) == expected


def grow(tokens, sizes, ending):
    """The tokens as the engine gives them, so many in each call."""
    at, calls = 0, []
    for size in sizes:
        part = tokens[at : at + size]
        at += size
        last = ending if at >= len(tokens) else None
        calls.append(Grown(0, part, [-t / 8 for t in part], [], last, "7"))
        if last:
            return calls
    return calls


def answer_of(vocabulary, ends, calls):
    answer, pieces = Answer(ends, vocabulary.detokenizer(())), []
    for grown in calls:
        pieces.append(answer.add(grown))
        if answer.finish:
            break
    return joined(pieces)


def test_any_split_into_decode_calls_gives_one_answer(bytewise):
    """Texts, ids, offsets, endings: also where stop strings, stop ids and characters are cut."""
    draw = random.Random(2)
    parts = ["hello", " wo", "你", "é", "ST", "OP", "STOP", "!", "\n", "好吗"]
    found = set()
    for _ in range(300):
        tokens = ids(bytewise, "".join(draw.choices(parts, k=draw.randrange(1, 12))))
        if draw.random() < 0.3:
            tokens.insert(draw.randrange(len(tokens) + 1), 2)
        ending = draw.choice(["stop", "length", "abort"])
        ends = Ends(
            draw.choice([frozenset(), frozenset({2}), frozenset({36})]),
            draw.choice([(), ("STOP",), ("OPS", "你好"), ("\ufffd",), ("é你",)]),
            draw.random() < 0.5,
        )
        whole = answer_of(bytewise, ends, grow(tokens, [len(tokens)], ending))
        for _ in range(4):
            sizes = [draw.randrange(1, 6) for _ in tokens]
            assert answer_of(bytewise, ends, grow(tokens, sizes, ending)) == whole
        assert len(whole.tokens) == len(whole.logp) == len(whole.offsets) == len(whole.versions)
        found.add((whole.finish, type(whole.reason)))
    assert found >= {("stop", str), ("stop", int), ("stop", type(None)), ("length", type(None))}


def test_an_answer_ends_at_the_token_that_completed_the_stop_string(bytewise):
    tokens = ids(bytewise, "hello STOP more")
    calls = grow(tokens, [len(tokens)], "length")
    piece = answer_of(bytewise, Ends(strings=("STOP",)), calls)
    assert piece.text == "hello " and piece.reason == "STOP" and piece.finish == "stop"
    assert bytewise.decode(piece.tokens) == "hello STOP"


def test_text_that_waited_for_more_can_hold_the_stop_string(bytewise):
    tokens = ids(bytewise, "a你")[:2]  # half a character at the limit
    piece = answer_of(bytewise, Ends(strings=("\ufffd",)), grow(tokens, [2], "length"))
    assert (piece.text, piece.finish, piece.reason) == ("a", "stop", "\ufffd")


def test_the_text_of_a_stop_id_is_shown_only_if_asked(bytewise):
    tokens = ids(bytewise, "ab!c")
    for is_shown, text in ((False, "ab"), (True, "ab!")):
        ends = Ends(frozenset(tokens[2:3]), (), is_shown)
        piece = answer_of(bytewise, ends, grow(tokens, [4], "length"))
        assert (piece.text, piece.tokens, piece.reason) == (text, tokens[:3], tokens[2])


def test_spans_of_versions_cover_the_tokens():
    found = spans(["1", "1", "2", "1"])
    assert [tuple(span) for span in found] == [("1", 0, 2), ("2", 2, 3), ("1", 3, 4)]
    assert spans([]) == []


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (CALL, "", ["add"]),
        (f"I add.\n{CALL}", "I add.\n", ["add"]),
        (f"{CALL}\n{CALL}", "", ["add", "add"]),
        (f"{CALL} done", " done", ["add"]),
        ('<tool_call>{"name": "add"}', "", ["add"]),  # the end came before the closing mark
        ("<tool_call>{nonsense}</tool_call>", "<tool_call>{nonsense}</tool_call>", []),
        ('<tool_call>["add"]</tool_call>', '<tool_call>["add"]</tool_call>', []),
        (f"<tool_call>{{no}}</tool_call>{CALL}", "<tool_call>{no}</tool_call>", ["add"]),
        ("no call", "no call", []),
        ("", "", []),
    ],
)
def test_calls_of_tools(text, content, names):
    parsed = parse_calls(text)
    assert parsed.content == content
    assert [call["function"]["name"] for call in parsed.calls] == names
    assert len({call["id"] for call in parsed.calls}) == len(names)


def test_arguments_are_json_in_a_text_and_one_call_can_be_asked_for():
    (call,) = parse_calls(f"{CALL}{CALL}", is_several=False).calls
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "ü"}
    assert call["type"] == "function" and call["id"].startswith("call_")


@pytest.mark.parametrize("text", [f"I add.\n{CALL}", CALL, "a < b, <tool", "<tool_call>", "x"])
def test_a_stream_shows_the_text_before_the_calls(text):
    withheld = Withheld()
    shown = "".join(withheld.add(character) for character in text)
    assert shown + withheld.rest == text
    assert "<tool_call>" not in shown
    if "<tool" not in text:
        assert shown == text


def test_special_tokens_of_the_toy_are_what_tests_take_them_for(bytewise):
    assert [bytewise.spell(i) for i in range(3)] == SPECIAL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen05"])
def test_texts_and_bytes_of_real_vocabularies(name):
    if "ASPO_MODELS" not in os.environ:
        pytest.skip("ASPO_MODELS names no folder of models")
    vocabulary = Vocabulary(load_tokenizer(Path(os.environ["ASPO_MODELS"]) / name))
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.randrange(vocabulary.size) for _ in range(draw.randrange(200))]
        assert "".join(texts_of(vocabulary, tokens)) == vocabulary.decode(tokens)
    for token in range(vocabulary.size):
        shown = bytes(vocabulary.bytes_of(token)).decode(errors="replace")
        assert shown == vocabulary.decode([token], True)
