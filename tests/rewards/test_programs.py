"""The code grader: right programs pass in every tier, wrong ones fail, each with its reason."""

import json
import shutil
import subprocess
import sys

import pytest

from aspo_jax.rewards import RewardError, Rules, Scorer, Submission, Verdict, choose_sandbox
from aspo_jax.rewards.programs import (
    BadTests,
    CallTest,
    CheckTest,
    StdioTest,
    draw_tests,
    last_program,
    read_tests,
    same_output,
    same_value,
)
from aspo_jax.rewards.values import decode, encode

linux = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux")
SUM = {"inputs": ["3 4", "10 -1"], "outputs": ["7", "9\n"]}
ADD = {"inputs": ["3\n4"], "outputs": ["7"], "fn_name": "add"}
CHECK = {
    "test": "def check(candidate):\n    for x in range(5):\n"
    "        assert abs(candidate(x) - half(x) * 3) < 1e-6\n",
    "entry_point": "scale",
    "prompt": 'def half(x):\n    return x / 2\n\ndef scale(x):\n    """One and a half x."""\n',
}
ECHO = {"inputs": ["a b\nc\n"], "outputs": ["a b\nc"]}

RIGHT = {
    "input": (SUM, "print(sum(map(int, input().split())))"),
    "stdin": (SUM, "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))"),
    "stdin.buffer": (SUM, "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))"),
    "open(0)": (SUM, "print(sum(map(int, open(0).read().split())))"),
    "/dev/stdin": (SUM, "print(sum(map(int, open('/dev/stdin').read().split())))"),
    "main": (SUM, "def main():\n  print(sum(map(int, input().split())))\nif __name__ == '__main__':\n  main()"),
    "exit": (SUM, "print(sum(map(int, input().split())))\nexit()"),
    "sys.exit(0)": (SUM, "import sys\nprint(sum(map(int, input().split())))\nsys.exit(0)"),
    "thread": (
        SUM,
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "def main():\n  print(sum(map(int, input().split())))\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()",
    ),
    "file": (SUM, "open('x', 'w').write(input())\nprint(sum(map(int, open('x').read().split())))"),
    "child": (
        SUM,
        "import os\nr, w = os.pipe()\nif os.fork() == 0:\n"
        "  os.write(w, str(sum(map(int, input().split()))).encode())\n  os._exit(0)\n"
        "os.wait()\nprint(os.read(r, 99).decode())",
    ),
    "os functions": (SUM, "import os\nos.getcwd(); os.makedirs('a/b'); os.remove\nos.chdir('a')\nprint(sum(map(int, input().split())))"),
    "unicode": ({"inputs": ["é"], "outputs": ["é→"]}, "print(input() + '→')"),
    "many lines": ({"inputs": ["200000"], "outputs": ["\n".join(map(str, range(200000)))]}, "for i in range(int(input())): print(i)"),
    "decimals": ({"inputs": ["1 3"], "outputs": ["0.3333333333"]}, "a, b = map(int, input().split())\nprint(a / b)"),
    "numpy-free imports": (SUM, "import array, bisect, collections, dataclasses, decimal, fractions, functools, heapq, itertools, math, re, statistics, typing\nprint(sum(map(int, input().split())))"),
    "no input": ({"inputs": [""], "outputs": ["hi"]}, "print('hi')"),
    "function": (ADD, "def add(a, b): return a + b"),
    "method": (ADD, "class Solution:\n  def add(self, a: int, b: int) -> int:\n    return a + b"),
    "method without imports": (
        {"inputs": ["[3, 1, 2]"], "outputs": ["[1, 2, 3]"], "fn_name": "order"},
        "class Solution:\n  def order(self, xs: List[int]) -> List[int]:\n    return list(accumulate([1] * len(xs)))",
    ),
    "tuple for a list": ({"inputs": ["1"], "outputs": ["[1, [2]]"], "fn_name": "f"}, "def f(x): return (1, (2,))"),
    "printing function": (ADD, "def add(a, b):\n  print('debugging')\n  return a + b"),
    "guarded main": (ADD, "def add(a, b): return a + b\nif __name__ == '__main__': print(add(*map(int, input().split())))"),
    "asserts": ({"asserts": ["assert add(3, 4) == 7", "assert 0 == add(1, -1)"]}, "def add(a, b): return a + b"),
    "own class": (
        {"asserts": ["assert f([P(1), P(2)]) == 3"]},
        "class P:\n  def __init__(self, x): self.x = x\ndef f(ps): return sum(p.x for p in ps)",
    ),
    "counter": ({"asserts": ["assert f('aab') == {'a': 2, 'b': 1}"]}, "from collections import Counter\ndef f(s): return Counter(s)"),
    "zero for False": ({"asserts": ["assert f(1) == False"]}, "def f(x): return 0"),
    "sets and tuples": ({"asserts": ["assert set(f()) == {(1, 2)}", "assert f() == [(1, 2)]"]}, "def f(): return [(1, 2)]"),
    "truth": ({"asserts": ["assert even(2)", "assert not even(3)"]}, "def even(n): return n % 2 == 0"),
    "setup": (
        {"asserts": ["assert f(data) == 6"], "setup": "data = [1, 2, 3]"},
        "def f(xs): return sum(xs)",
    ),
    "check": (CHECK, "def scale(x): return 1.5 * x"),
    "completion only": (CHECK, "    return half(x) * 3"),
    "split check": (
        {"test": "def check(f):\n  assert f(1) == 2\n  assert f(2) == 3, 'no'\n  assert True", "entry_point": "inc"},
        "def inc(x): return x + 1",
    ),
}  # fmt: skip

WRONG = {
    "other value": ("mismatch", SUM, "print(8)"),
    "second test": ("mismatch", SUM, "print(7)"),
    "other case": ("mismatch", {"inputs": [""], "outputs": ["YES"]}, "print('Yes')"),
    "one line less": ("mismatch", ECHO, "print(input())"),
    "one line more": ("mismatch", ECHO, "print(open(0).read() + 'x')"),
    "joined lines": ("mismatch", ECHO, "print(open(0).read().replace('\\n', ' '))"),
    "long integer": (
        "mismatch",
        {"inputs": [""], "outputs": ["12345678901234567891"]},
        "print(12345678901234567890)",
    ),
    "imprecise": ("mismatch", {"inputs": [""], "outputs": ["0.3333333333"]}, "print(0.3334)"),
    "exception": ("error", SUM, "raise ValueError"),
    "status": ("error", SUM, "print(sum(map(int, input().split())))\nraise SystemExit(1)"),
    "syntax": ("error", SUM, "print("),
    "no function": ("error", ADD, "def sub(a, b): return a - b"),
    "function raises": ("error", ADD, "def add(a, b): raise ValueError"),
    "no value": ("mismatch", ADD, "def add(a, b): pass"),
    "list for a tuple": (
        "mismatch",
        {"asserts": ["assert f() == (1, 2)"]},
        "def f(): return [1, 2]",
    ),
    "str for a number": ("mismatch", ADD, "def add(a, b): return '7'"),
    "bool for a number": (
        "mismatch",
        {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"},
        "def f(x): return True",
    ),
    "object": ("error", ADD, "def add(a, b): return object()"),
    "generator": ("error", {"asserts": ["assert f() == [1]"]}, "def f(): yield 1"),
    "check": ("mismatch", CHECK, "def scale(x): return 1.4 * x"),
    "setup": (
        "mismatch",
        {"asserts": ["assert f(data) == 6"], "setup": "data = [1, 2, 3]"},
        "def f(xs): return 5",
    ),
    "endless": ("timeout", SUM, "while True: pass"),
    "too much memory": ("error", SUM, "bytearray(3 * 2**30)"),
    "too much output": ("exhausted", SUM, "print('x' * 3 * 2**20)"),
}


def text(program):
    return f"<think>```python\nprint('a draft')\n```</think>So:\n```python\n{program}\n```\nDone."


def say(program, answer, **changes):
    return Submission("code", text(program), answer, True, 1, **changes)


@pytest.fixture(scope="module", params=["namespaces", "landlock", "rlimits"])
def scorer(request):
    if request.param == "namespaces" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    rules = Rules(sandbox=request.param, test_timeout_s=5.0, program_timeout_s=20.0)
    try:
        rules, report = choose_sandbox(rules)
    except RewardError as error:
        pytest.skip(f"this machine does not offer the tier: {error}")
    assert report.startswith(request.param) and "\n" not in report
    with Scorer(1, rules, kinds=("code",)) as scorer:
        yield scorer


@linux
@pytest.mark.parametrize("name", RIGHT)
def test_right_programs(scorer, name):
    answer, program = RIGHT[name]
    assert scorer.score([say(program, answer)]) == [Verdict(1.0, "match")]


@linux
@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs(scorer, name):
    reason, answer, program = WRONG[name]
    assert scorer.score([say(program, answer)]) == [Verdict(0.0, reason)]


@linux
def test_no_program_and_bad_tests(scorer):
    plain = Submission("code", "print(7)", SUM, True, 1)
    cut = Submission("code", "```python\nprint(7)", SUM, False, 1)
    bad = say("print(7)", {"inputs": ["1"], "outputs": []})
    reasons = [v.reason for v in scorer.score([plain, cut, bad])]
    assert reasons == ["no_answer", "truncated", "bad_gold"]


@linux
def test_sets_have_one_order(scorer):
    """Else a reward could differ from one run to the next."""
    program = "print(*{'a', 'b', 'c', 'd', 'e', 'f'})"
    answers = [{"inputs": [""], "outputs": [" ".join(order)]} for order in ("abcdef", "fedcba")]
    first = scorer.score([say(program, answer) for answer in answers])
    assert all(
        scorer.score([say(program, answer) for answer in answers]) == first for _ in range(3)
    )


@linux
def test_programs_do_not_meet(scorer):
    write = "open('shared', 'w').write('x')\nimport os\nprint(len(os.listdir('.')))"
    answer = {"inputs": [""], "outputs": ["1"]}
    assert scorer.score([say(write, answer)] * 4) == [Verdict(1.0, "match")] * 4


@linux
@pytest.mark.parametrize("interpreter", ["/bin/false", "/bin/true", "/no/such/python"])
def test_a_sandbox_that_fails_is_no_wrong_answer(interpreter):
    """In a process of its own, for a sandbox adopts orphans."""
    program = f"""
from aspo_jax.rewards.sandbox import Limits, Sandbox, SandboxError
box = Sandbox("rlimits")
box.interpreter = {interpreter!r}
orders = {{"mode": "script", "source": "print(7)"}}
calls = {{"mode": "calls", "source": "", "has_preamble": False}}
check = {{"mode": "check", "source": "", "names": []}}
for run in (lambda: box.run(orders, b"", Limits()), lambda: box.check(calls, check, Limits())):
    try:
        print(run())
    except SandboxError as error:
        print("refused:", error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["refused"] * 2


@linux
def test_a_test_that_fails_before_it_calls_anything_is_failed(scorer):
    answer = {"test": "def check(candidate):\n  assert 1 > 2", "entry_point": "f"}
    assert scorer.score([say("def f(): pass", answer)]) == [Verdict(0.0, "mismatch")]


# --- without a sandbox -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "program"),
    [
        ("```python\na\n```\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```Python3\na\n```\n```json\n{}\n```", "a\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("<think>```python\na\n```</think>", None),
        ("```cpp\na\n```", None),
        ("a", None),
    ],
)
def test_the_last_program(said, program):
    assert last_program(said) == program


def test_forms_of_tests():
    functional = [CallTest({"function": "f", "arguments": encode([1, [2]])}, [3], is_json=True)]
    assert read_tests(SUM) == [StdioTest("3 4", "7"), StdioTest("10 -1", "9\n")]
    assert read_tests({"inputs": ["1\n[2]"], "outputs": ["[3]"], "fn_name": "f"}) == functional
    assert read_tests({"inputs": [[1, [2]]], "outputs": [[3]], "fn_name": "f"}) == functional
    test = {"input": "1\n[2]", "output": "[3]", "testtype": "functional", "func_name": "f"}
    assert read_tests([test]) == read_tests({"tests": [test]}) == functional
    assert read_tests(json.dumps([{"input": "a", "output": "b", "testtype": "stdin"}])) == [
        StdioTest("a", "b")
    ]
    assert read_tests({"asserts": ["assert f(1) == {2}"]}) == [
        CallTest({"expression": "f(1)"}, {2})
    ]
    mbpp = {"test_list": ["assert f(1) == 2"], "test_setup_code": "", "text": "", "code": ""}
    assert read_tests(mbpp) == [CallTest({"expression": "f(1)"}, 2)]
    (check,) = read_tests(CHECK)
    assert isinstance(check, CheckTest) and check.names == ["scale"]


@pytest.mark.parametrize(
    "answer",
    [
        *(None, 7, "x", [], {}, {"inputs": [], "outputs": []}, {"asserts": []}),
        {"inputs": ["1"], "outputs": []},
        {"inputs": ["1"]},
        {"inputs": [1], "outputs": ["1"]},
        {"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"},
        {"asserts": ["assert f(1 == 2"]},
        {"test": "def test(): pass", "entry_point": "f"},
        {"test": "def check(candidate): assert candidate(1) == 1"},
        [{"input": "1", "output": "1", "testtype": "functional"}],
    ],
)
def test_bad_tests_are_named(answer):
    with pytest.raises(BadTests):
        read_tests(answer)


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
        ("a", "", False),
        ("", "", True),
        ("1_0", "10", False),
    ],
)
def test_outputs_are_compared_by_line_and_value(expected, printed, is_same):
    assert same_output(expected, printed) is is_same


def test_values_are_compared_exactly_or_as_json():
    assert same_value((1, 2), (1, 2), False) and not same_value((1, 2), [1, 2], False)
    assert same_value([1, [2]], (1, (2,)), True)
    assert same_value({"1": 2}, {1: 2}, True) and not same_value({"1": 2}, {1: 3}, True)
    assert same_value(0.3, 0.1 + 0.2, True) and not same_value(0.3, 0.1 + 0.2, False)
    assert not same_value(1, True, True) and not same_value([1], 1, True)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -1.5, 10**40, "a\ud800", [1, (2, [3])], {1: "a", (1, 2): {3}}, set()),
        *(frozenset({1}), 1j, b"\0a", range(3), float("inf"), {"list": [1]}),
    ],
)
def test_values_survive_the_way_out(value):
    assert decode(encode(value)) == value and type(decode(encode(value))) is type(value)


@pytest.mark.parametrize("line", ["", "1 2", '{"evil": 1}', '{"list": 1, "set": 2}', "[" * 10**5])
def test_other_lines_are_no_values(line):
    with pytest.raises((ValueError, TypeError, RecursionError)):
        decode(line)


def test_drawn_tests_depend_on_the_identity_alone():
    tests = [StdioTest(str(i), "") for i in range(50)]
    drawn = draw_tests(tests, 16, "0 train 7 3")
    assert drawn == draw_tests(tests, 16, "0 train 7 3") != draw_tests(tests, 16, "0 train 7 4")
    assert len(drawn) == 16 and drawn == [test for test in tests if test in drawn]
    assert draw_tests(tests, 0, "x") == draw_tests(tests, 50, "x") == tests
