"""The code grader: right programs pass in every tier, wrong ones fail, each with its reason."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from aspo_jax.rewards import RewardError, Rules, Scorer, Submission, Verdict
from aspo_jax.rewards.code.code_tests import BadTests, CallTest, CheckTest, StdioTest, read_tests
from aspo_jax.rewards.code.equality import plain
from aspo_jax.rewards.code.programs import assemble, draw_tests, last_program
from aspo_jax.rewards.code.values import encode

linux = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux")
SUM = {"inputs": ["3 4", "10 -1"], "outputs": ["7", "9\n"]}
ADD = {"inputs": ["3\n4"], "outputs": ["7"], "fn_name": "add"}
CHECK = {
    "test": "def check(candidate):\n    for x in range(5):\n"
    "        assert abs(candidate(x) - half(x) * 3) < 1e-6\n",
    "entry_point": "scale",
    "prompt": 'def half(x):\n    return x / 2\n\ndef scale(x):\n    """One and a half x."""\n',
}
NO_DOCSTRING = {**CHECK, "prompt": "def half(x):\n    return x / 2\n\ndef scale(x):\n"}
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
    "functional": ({"functional": "def check(f):\n  assert f(1) == 2\n  assert f(x=2) == 3\n\ncheck(inc)"}, "def inc(x): return x + 1"),
    "functional method": ({"functional": "def check(f):\n  assert f(1) == 2\ncheck(Solution().inc)"}, "class Solution:\n  def inc(self, x): return x + 1"),
    "functional method, not split": (
        {"functional": "def check(f):\n  for x in range(3):\n    assert f(x) == x + 1\ncheck(Solution().inc)"},
        "class Solution:\n  def inc(self, x): return x + 1",
    ),
    "functional code": ({"functional": "import math\nfor x in range(3):\n  assert inc(x) == math.ceil(x + 1)"}, "def inc(x): return x + 1"),
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
    "no docstring": (NO_DOCSTRING, "def scale(x): return 1.5 * x"),
    "no docstring, completion only": (NO_DOCSTRING, "    return half(x) * 3"),
    "no docstring, split": (
        {"test": "def check(f):\n  assert f(1) == 2", "entry_point": "inc", "prompt": "def inc(x):"},
        "def inc(x): return x + 1",
    ),
    "future": (CHECK, "from __future__ import annotations\ndef scale(x): return half(x) * 3"),
    "coding": (SUM, "# -*- coding: latin-1 -*-\nprint(sum(map(int, input().split())))"),
    "word coding": (SUM, "# coding=this is fun\nprint(sum(map(int, input().split())))".replace("=", " ")),
    "large integer": ({"asserts": [f"assert f() == {7**3000}"]}, "def f(): return 7**3000"),
    "object for truth": ({"asserts": ["assert f(1)"]}, "import re\ndef f(x): return re.match('', '')"),
    "keys of JSON": ({"inputs": ["1"], "outputs": ['{"1": "a", "true": 1}'], "fn_name": "f"}, "def f(x): return {True: 1, '1': 'a'}"),
    "completion only": (CHECK, "    return half(x) * 3"),
    "split check": (
        {"test": "def check(f):\n  assert f(1) == 2\n  assert f(2) == 3, 'no'\n  assert True", "entry_point": "inc"},
        "def inc(x): return x + 1",
    ),
}  # fmt: skip

WRONG = {
    "other value": ("mismatch", SUM, "print(8)"),
    "functional": (
        "mismatch",
        {"functional": "def check(f):\n  assert f(1) == 2\ncheck(inc)"},
        "def inc(x): return x",
    ),
    "functional method": (
        "mismatch",
        {"functional": "def check(f):\n  for x in [1]: assert f(x) == 2\ncheck(Solution().inc)"},
        "class Solution:\n  def inc(self, x): return x",
    ),
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
    "two keys of one name": (
        "mismatch",
        {"inputs": ["1"], "outputs": ['{"1": "a"}'], "fn_name": "f"},
        "def f(x): return {1: 'b', '1': 'a'}",
    ),
    "beyond all floats": ("mismatch", {"inputs": [""], "outputs": ["1e999"]}, "print(5)"),
    "unknown codec": (
        "error",
        SUM,
        "# -*- coding: foo -*-\nprint(sum(map(int, input().split())))",
    ),
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
        scorer = Scorer(1, rules, kinds=("code",))
    except RewardError as error:
        pytest.skip(f"this machine does not offer the tier: {error}")
    with scorer:
        assert scorer.sandbox is not None
        assert scorer.sandbox.startswith(request.param) and "\n" not in scorer.sandbox
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


HOSTILE = [
    *(
        "10**400",
        "-10**400",
        "10**10000",
        "10**10**6",
        "float('nan')",
        "float('inf')",
        "1e308 * 10",
    ),
    *(
        "complex('nan')",
        "range(10**400)",
        "b'x'",
        "'\\ud800'",
        "'x' * 10**5",
        "'\\0'",
        "None",
        "...",
    ),
    *("{1: 2, '1': 3}", "{None: 1, 1: 2, 'a': (), (): {}}", "{frozenset(): {1}}", "NotImplemented"),
    *(
        "Fraction(3, 2)",
        "Decimal('1.5')",
        "(i for i in [1])",
        "nested(90)",
        "nested(900)",
        "cyclic()",
    ),
    *(
        "Odd()",
        "OddInt(3)",
        "OddStr('a')",
        "OddList([1])",
        "OddDict({1: 2})",
        "Odd",
        "[Odd()]",
        "type",
    ),
    *(
        "{Odd(): 1}",
        "Meta('int', (), {})",
        "Meta('list', (list,), {})([7])",
        "OddInt",
        "exit()",
        "1/0",
    ),
]
HOSTILE_MODULE = """
from fractions import Fraction
from decimal import Decimal
def trap(*a, **k): raise BaseException
def yes(*a, **k): return True
class Meta(type):
    __eq__ = yes
    __hash__ = lambda s: 0
    __name__ = property(trap)
class Odd:
    __eq__ = __bool__ = yes
    __hash__ = __float__ = __int__ = __repr__ = __str__ = __iter__ = __len__ = trap
class OddInt(int): __eq__ = __ge__ = __le__ = yes; __hash__ = int.__hash__
class OddStr(str): __eq__ = yes; __hash__ = str.__hash__; __str__ = __repr__ = trap
class OddList(list): __eq__ = yes; __iter__ = __len__ = trap
class OddDict(dict): __eq__ = yes; __iter__ = __len__ = items = trap
def nested(n):
    x = 1
    for _ in range(n): x = [x]
    return x
def cyclic():
    x = []
    x.append((x, {1: x}))
    return x
"""


@linux
def test_no_value_masks_its_sample():
    """Wrong, whatever it is: a verdict that is not valid would take it out of the training."""
    tests = ["assert f() == 0.25", "assert f() == {'1': 0.25}", "assert f() == [[0.25]]"]
    rows = [{"asserts": [test]} for test in tests]
    rows += [{"inputs": [""], "outputs": [o], "fn_name": "f"} for o in ("0.25", '{"1": 0.25}')]
    said = [
        say(f"{HOSTILE_MODULE}\ndef f(): return {value}", rows[i % len(rows)])
        for i, value in enumerate(HOSTILE)
    ]
    with Scorer(1, Rules(sandbox="rlimits"), kinds=("code",)) as scorer:
        for submission, verdict in zip(said, scorer.score(said), strict=True):
            assert verdict.reason in ("mismatch", "error"), submission.text
            assert verdict.is_valid and verdict.reward == 0.0


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
from aspo_jax.rewards.code.sandbox import Limits, Sandbox, SandboxError
box = Sandbox("rlimits")
box.interpreter = {interpreter!r}
orders = {{"mode": "script", "source": "print(7)"}}
calls = {{"mode": "calls", "head": "", "source": ""}}
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
        ("1.  ok\n  ```python\n  if a:\n    b\n\n  ```", "if a:\n  b\n\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("```python\na\n```python\nb\n```", "a\n```python\nb\n"),
        ("```\n```python\na\n```", "```python\na\n"),
        ("say ```python\na\n```", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("<think>```python\na\n```</think>", None),
        ("```cpp\na\n```", None),
        ("a", None),
    ],
)
def test_the_last_program(said, program):
    assert last_program(said) == program


DELIMITERS = ["`", "```", "```\n", "```python\n", "```python", "~~~\n", "````\n", "\n", "\r\n", " "]
DELIMITERS += ["<think>", "</think>", "<think></think>", "    ", "\t```", " ```\n", "\\", "'", '"']
DELIMITERS += [
    '"""',
    '\n"""',
    "def ",
    "def f(x):\n",
    "import",
    "#",
    "# -*- coding: x -*-\n",
    "1",
    "1 ",
]
DELIMITERS += ["1.", "-", "1e", "(", "{", "\x0c", "\u2028", "a```b\n", "```a b\n"]


@pytest.mark.parametrize("start", ["", "```python\n", "  ```\n", "x ", "</think>```python\n\\"])
@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_every_text_is_searched_in_linear_time(delimiter, start):
    """100,000 of anything that is searched for; the square of it would take minutes."""
    for end in ("", "\n```", "x"):
        text = start + 100_000 * delimiter + end
        begin = time.process_time()
        program = last_program(text)
        assemble(CHECK, program or text)
        assert time.process_time() - begin < 2.0  # 0.1 on an idle machine


def test_a_prompt_without_a_docstring_is_the_head_of_a_function():
    bare = {**CHECK, "prompt": "def half(x):\n    return x / 2\n\ndef scale(x):\n"}
    assert assemble(bare, "    return x\n").source == f"{bare['prompt']}\n    return x\n"
    assert assemble(bare, "# so\n\n  return x\n").head == ""
    whole = assemble(bare, "def scale(x): return x")
    assert whole.source == "def scale(x): return x"
    compile(whole.head, "head", "exec")
    assert assemble(json.dumps(bare), "x = 1") == assemble(bare, "x = 1")
    assert assemble(SUM, "x = 1").head == ""
    assert len(read_tests(bare)) == 1


def test_forms_of_tests():
    functional = [CallTest({"function": "f", "arguments": encode([1, [2]])}, plain([3]), True)]
    assert read_tests(SUM) == [StdioTest("3 4", "7"), StdioTest("10 -1", "9\n")]
    assert read_tests({"inputs": ["1\n[2]"], "outputs": ["[3]"], "fn_name": "f"}) == functional
    assert read_tests({"inputs": [[1, [2]]], "outputs": [[3]], "fn_name": "f"}) == functional
    test = {"input": "1\n[2]", "output": "[3]", "testtype": "functional", "func_name": "f"}
    assert read_tests([test]) == read_tests({"tests": [test]}) == functional
    assert read_tests(json.dumps([{"input": "a", "output": "b", "testtype": "stdin"}])) == [
        StdioTest("a", "b")
    ]
    assert read_tests({"asserts": ["assert f(1) == {2}"]}) == [
        CallTest({"expression": "f(1)"}, plain({2}))
    ]
    mbpp = {"test_list": ["assert f(1) == 2"], "test_setup_code": "", "text": "", "code": ""}
    assert read_tests(mbpp) == [CallTest({"expression": "f(1)"}, plain(2))]
    (check,) = read_tests(CHECK)
    assert isinstance(check, CheckTest) and check.names == ["scale"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "the answer is null, expected an object"),
        (7, "the answer is 7, expected an object"),
        ("x", "a string that is not JSON: x"),
        ([], "no test in an object"),
        ({}, "an object with the fields .., expected 'inputs' and 'outputs', 'tests'"),
        ({"input": []}, r"the fields \['input'\], expected 'inputs'"),
        ({"inputs": [], "outputs": []}, "no test in an object"),
        ({"asserts": []}, "no test in an object"),
        ({"inputs": None, "outputs": ["1"]}, "inputs is null, expected a list"),
        ({"inputs": "1", "outputs": ["1"]}, 'inputs is "1", expected a list'),
        ({"inputs": ["1"], "outputs": None}, "outputs is null, expected a list"),
        ({"inputs": ["1"]}, "outputs is missing, expected a list"),
        (
            {"inputs": ["1", "2"], "outputs": ["3"]},
            "inputs has 2 entries and outputs 1, expected one output for each input",
        ),
        ({"inputs": ["1", 1], "outputs": ["1", "1"]}, r"inputs\[1\] is 1, expected a string"),
        ({"inputs": ["\ud800"], "outputs": ["1"]}, r"inputs\[0\] holds half a surrogate pair"),
        (
            {"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"},
            r'inputs\[0\] has a line that is not JSON .*"x y"; expected one argument',
        ),
        ({"inputs": [1], "outputs": ["1"], "fn_name": "f"}, r"inputs\[0\] is 1, expected a list"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": 1}, "fn_name is 1, expected a string"),
        ({"tests": {}}, "tests is {}, expected a list"),
        ({"tests": [None]}, r"tests\[0\] is null, expected an object"),
        ({"tests": [{"input": "1"}]}, r"tests\[0\].output is missing"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], r"tests\[0\].*without fn_name"),
        ({"tests": [{"input": "", "output": "", "testtype": "x"}]}, r'testtype is "x", expected'),
        ({"asserts": None}, "asserts is null, expected a list"),
        ({"asserts": ["assert f(1 == 2"]}, r"asserts\[0\] is not Python \(.*never closed"),
        ({"asserts": [1]}, r"asserts\[0\] is 1, expected a string"),
        ({"asserts": ["assert f(1) == 2"], "setup": "x ="}, "setup is not Python"),
        ({"asserts": ["assert f(" + "(" * 5000]}, r"asserts\[0\] is not Python"),
        ({"test": "def test(): pass", "entry_point": "f"}, "no function 'check.candidate.'"),
        ({"test": "def check(): pass", "entry_point": "f"}, "no function 'check.candidate.'"),
        ({"test": "def check(c): assert c(1) == 1"}, "entry_point is missing, expected a string"),
        ({"functional": "def check(c"}, "functional is not Python"),
        ({"functional": ["check(f)"]}, "functional is ..check.f..., expected a string"),
        ({"functional": "check(f)"}, "no function 'check.candidate.'"),
        ({**CHECK, "prompt": "Write a function."}, "prompt is not Python.*a function's head"),
        ({**CHECK, "prompt": 7}, "prompt is 7, expected a string"),
    ],
)
def test_bad_tests_are_named(answer, message):
    with pytest.raises(BadTests, match=message):
        read_tests(answer)


def _changed(value, odd):
    """The value with each of its parts replaced by something odd."""
    yield odd
    if isinstance(value, dict):
        for key, part in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: changed} for changed in _changed(part, odd))
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield value[:i] + value[i + 1 :]
            yield from (value[:i] + [changed] + value[i + 1 :] for changed in _changed(part, odd))


def test_no_answer_of_a_data_row_is_more_than_bad():
    """Whatever stands where: tests, or a message about it, and never another exception."""
    deep: object = 1
    for _ in range(400):
        deep = [deep]
    odd = [None, True, 7, -0.5, 1e999, "", "x", "1\n2", "[" * 5000, "\ud800", "\0", [], {}, [None]]
    odd += [{"a": 1}, {"inputs": 1}, deep, "assert " + "-" * 5000 + "f(1)", 10**30]
    forms = [SUM, ADD, CHECK, {"asserts": ["assert f(1) == 2"], "setup": "x = 1"}]
    forms += [{"functional": "def check(c): assert c(1) == 2\ncheck(f)"}]
    forms += [{"tests": [{"input": "1", "output": "2", "testtype": "stdin"}], "fn_name": "f"}]
    for answer in (changed for form in forms for o in odd for changed in _changed(form, o)):
        try:
            tests = read_tests(answer)
        except BadTests as error:
            assert not any(word in str(error) for word in ("NoneType", "object is not", "zip()"))
        else:
            assert tests
            assemble(answer, "x = 1")


def test_drawn_tests_depend_on_the_identity_alone():
    tests = [StdioTest(str(i), "") for i in range(50)]
    drawn = draw_tests(tests, 16, "0 train 7 3")
    assert drawn == draw_tests(tests, 16, "0 train 7 3") != draw_tests(tests, 16, "0 train 7 4")
    assert len(drawn) == 16 and drawn == [test for test in tests if test in drawn]
    assert draw_tests(tests, 0, "x") == draw_tests(tests, 50, "x") == tests
