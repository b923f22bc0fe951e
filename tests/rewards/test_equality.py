"""Comparing what a program sent: always an answer, soon, and only what is equal is equal."""

import itertools
import json
import random
import time

import pytest

from aspo_jax.rewards.code.equality import plain, read_value, same_output, same_value
from aspo_jax.rewards.code.values import decode, encode

M61 = 2**61 - 1  # hash(n) is n % M61
HUGE = 10**400
EXPECTED = [None, True, 0, 7, -1.5, 1e300, 1e999, "7", "", [], [1, 2.5], {"1": "a"}, {"a": [0.5]}]
EXPECTED += [(1, 2), {1, 2}, {1: 2}, {(1, 2): {3}}, frozenset({1}), b"x", 1j, HUGE, [[1.5]] * 3]


def same(expected, value, is_json=False):
    """As `same_value`, with a value that came out of a sandbox."""
    return same_value(plain(expected), read_value(encode(value).encode()), is_json)


def nested(depth, make=lambda x: [x]):
    value = 1
    for _ in range(depth):
        value = make(value)
    return value


@pytest.mark.parametrize(
    ("expected", "printed", "is_same"),
    [
        ("1 2\n3", " 1 2 \r\n3\n\n", True),
        ("1.50", "1.5", True),
        ("1", "1.0", True),
        ("0.333333", "0.33333333", True),
        ("1e-9", "0.000000001", True),
        ("100000000.5", "100000000.6", True),
        ("100", "100.00001", False),
        ("1 2", "12", False),
        ("nan", "nan", True),
        ("inf", "1e999", False),
        ("1e999", "5", False),
        ("1e999", "1e998", False),
        ("1e999", "10e998", True),
        ("0.5", "1e999", False),
        ("0.5", "9" * 10**5, False),
        ("a", "", False),
        ("", "", True),
        ("1_0", "10", False),
        ("1", "١", False),
    ],
)
def test_outputs_are_compared_by_line_and_value(expected, printed, is_same):
    assert same_output(expected, printed) is is_same


def test_values_are_compared_exactly_or_as_json():
    assert same((1, 2), (1, 2)) and not same((1, 2), [1, 2])
    assert same(1, True) and same(0, 0.0) and same(False, 0) and same(1, 1 + 0j)
    assert same({1, 2}, frozenset({2, 1})) and not same({1, 2}, {1}) and not same({1}, [1])
    assert same({1: [2], "1": 3}, {"1": 3, 1: [2]}) and not same({1: 2}, {"1": 2})
    assert not same(float("nan"), float("nan")) and not same(0.3, 0.1 + 0.2)
    assert same([1, [2]], (1, (2,)), True) and same(0.3, 0.1 + 0.2, True)
    assert not same(1, True, True) and not same([1], 1, True) and not same(1.5, HUGE, True)
    assert same(float("inf"), float("inf"), True) and not same(float("inf"), HUGE, True)


def test_two_keys_of_one_name_are_not_one():
    assert same({"1": 2}, {1: 2}, True) and not same({"1": 2}, {1: 3}, True)
    assert not same({"1": "a"}, {1: "b", "1": "a"}, True)
    assert not same({"1": "a"}, {"1": "a", 1: "a"}, True)
    assert not same({"1": "a", "2": "b"}, {1: "a", "1": "a"}, True)
    assert same({"true": 1, "null": 2, "1.5": 3}, {True: 1, None: 2, 1.5: 3}, True)
    assert not same({"(1, 2)": 1}, {(1, 2): 1}, True) and not same({"": 1}, {(): 1}, True)
    assert not same({str(HUGE): 1}, {HUGE: 1}, True)


@pytest.mark.parametrize("line", ["[1, 1]", '{"set": [1, 1]}', '{"dict": [[1, 2], [1, 2]]}'])
def test_what_no_set_or_dict_can_hold_equals_none(line):
    for expected in ({1}, {1: 2}, [1], [1, 1], {1, 2}):
        try:
            assert not same_value(plain(expected), read_value(line.encode()), False)
        except ValueError:
            assert line == "[1, 1]"  # a list is written {"list": [1, 1]}


VALUES = [None, True, 0, -1.5, 10**40, "a\ud800", [1, (2, [3])], {1: "a", (1, 2): {3}}, set()]
VALUES += [frozenset({1}), 1j, b"\0a", range(3), range(HUGE), float("inf"), {"list": [1]}, HUGE]
VALUES += [-(10**5000), {HUGE: HUGE}, "x" * 10**6, {"": [b""]}, list(range(1000)), nested(99)]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_survive_the_way_out(value):
    assert decode(encode(value)) == value and type(decode(encode(value))) is type(value)
    assert same(value, value) and not same((value,), value) and not same(value, (value,))


@pytest.mark.parametrize("line", ["", "1 2", '{"evil": 1}', '{"list": 1, "set": 2}', "[" * 10**5])
def test_other_lines_are_no_values(line):
    with pytest.raises((ValueError, TypeError, RecursionError)):
        decode(line)


CONTENTS = ["null", "1", '"x"', '"0x"', "{}", "[[]]", "[[1]]", "[1, 2, 3]", "[null]", "[0.5]"]
CONTENTS += ['["1"]', "[1, 2, 0]", "[1e999]", "[[1, 2], [3]]", "[NaN, NaN]", f"[{HUGE}, 1]"]
KINDS = ["evil", "list", "set", "dict", "int", "complex", "range", "bytes", "frozenset", "tuple"]
FORGED = ["", "1 2", "[1]", "{}", "[" * 10**5, '{"list":' * 10**5, '{"list": [' * 300 + "]}" * 300]
FORGED += [f'{{"{kind}": {content}}}' for kind in KINDS for content in CONTENTS]
FORGED += ["9" * 10**6, "-1e999", "NaN", "1" * 4000, '{"list": 1, "set": 2}', "\ud800", '"\\ud800"']
FORGED += ["\0", "nul", "\xff", '{"set": [NaN, NaN, 1, "a", null, {"list": []}, {"set": []}]}']
FORGED += ['{"dict": [[{"dict": []}, 1], [{"set": []}, {"list": []}], [1, 1]]}']


def test_every_line_is_read_or_refused():
    for line in FORGED:
        data = line.encode("utf-8", "surrogatepass")
        for damaged in (data, data + b"\n", data[:-1], data + b"\xff", data * 2):
            try:
                value = read_value(damaged)
            except ValueError:
                continue
            for expected, is_json in itertools.product(EXPECTED, (False, True)):
                assert isinstance(same_value(plain(expected), value, is_json), bool)


def random_value(rng, depth):
    """Any plain value, often a strange one."""
    leaves = [None, True, 0, -0.0, 1, 7, M61, HUGE, -HUGE, 1e308, float("inf"), float("nan"), "1"]
    leaves += ["", "\ud800", "x" * 50, b"", b"\xff", 1j, complex("nan+infj"), range(0), range(HUGE)]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(leaves)
    parts = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    kind = rng.choice([list, tuple, set, frozenset, dict])
    if kind in (list, tuple):
        return kind(parts)
    keys = [part for part in parts if is_hashable(part)]
    return dict.fromkeys(keys, parts) if kind is dict else kind(keys)


def is_hashable(value):
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_nan_there(value):
    """Where NaN equals itself only by being the same object."""
    return (
        value != value
        or (isinstance(value, list | tuple | set | frozenset) and any(map(is_nan_there, value)))
        or (isinstance(value, dict) and any(is_nan_there(list(pair)) for pair in value.items()))
    )


def test_random_values_compare_as_python_does():
    rng = random.Random(7)
    drawn = [random_value(rng, 3) for _ in range(400)]
    for a, b in itertools.product(drawn[:60], drawn):
        assert same(a, b) == (a == b) or is_nan_there([a, b])
        assert isinstance(same(a, b, True), bool)
    for value in drawn:
        assert same(value, value) or is_nan_there(value)


COLLIDING = [n * M61 for n in range(1, 40_000)]
ATTACKS = {
    "colliding set": {"set": COLLIDING},
    "colliding frozensets": {"set": [{"frozenset": COLLIDING}, {"frozenset": COLLIDING}]},
    "colliding keys": {"dict": [[n, 1] for n in COLLIDING]},
    "colliding tuples": {"set": [{"tuple": [n]} for n in COLLIDING]},
    "colliding floats": {"dict": [[float(n), n] for n in COLLIDING]},
    "one key": {"dict": [[1, n] for n in COLLIDING]},
    "equal names": {"dict": [[1, 1], ["1", 1]] * 20_000},
    "equal sets": {"set": [{"set": [1, 2, 3]}] * 30_000},
    "a large integer": {"int": "0x" + "f" * 10**6},
    "a long string": "\\" * 10**6,
    "a long list": {"list": [0] * 300_000},
    "a long range": {"range": [0, {"int": hex(HUGE)}, 1]},
    "sets in sets": nested(99, lambda x: {"set": [x, {"list": [1] * 1000}]}),
    "sets like sets": nested(13, lambda x: {"set": [x, x]}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_value_takes_long(name):
    """About a megabyte, the most that is read: to hash colliding integers takes minutes."""
    line = json.dumps(ATTACKS[name]).encode()
    begin = time.process_time()
    value = read_value(line)
    for expected, is_json in itertools.product(({"1": 1}, {1}, [1, 2], 1.5), (False, True)):
        assert not same_value(plain(expected), value, is_json)
    assert time.process_time() - begin < 3.0  # 0.3 on an idle machine


@pytest.mark.parametrize("expected", ["1", "0.5", "1.5 2.5", "a"])
@pytest.mark.parametrize(
    "unit", ["1", "1.", ".", "-", "1e", "1 ", "\n", "1\n", " ", "\r", "x", "\x85"]
)
def test_no_output_takes_long(unit, expected):
    for printed in (unit * 10**6, unit * 10**6 + "x", "0." + unit * 10**6, "\x1c" + unit * 10**6):
        begin = time.process_time()
        same_output(expected, printed)
        assert time.process_time() - begin < 3.0
