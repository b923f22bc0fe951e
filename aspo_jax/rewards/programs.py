"""Grader ``code``: a program is right if it passes every test, each run in a sandbox of its own.

The program is the last fenced Python block of the conclusion. Tests come in the forms of the field:

    {"inputs": ["1 2", ...], "outputs": ["3", ...]}                 standard input and output
    {"inputs": [...], "outputs": [...], "fn_name": "add"}           LiveCodeBench: JSON arguments,
                                                                    one a line, and a JSON result
    {"tests": [{"input": ..., "output": ..., "testtype": ...}], "fn_name": ...}     the same
    {"asserts": ["assert f(2) == 4", ...], "setup": "..."}          MBPP (or test_list,
                                                                    test_setup_code)
    {"test": "def check(candidate): ...", "entry_point": "f", "prompt": "..."}      HumanEval

What a test expects stays outside: an assert is split into a call, which is run, and a literal, with
which the plain value that comes back is compared here. Test code that cannot be split runs in a
second sandbox and calls the program's functions from there.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import random
import re
import time
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

from aspo_jax.rewards import values
from aspo_jax.rewards.answers import conclusion
from aspo_jax.rewards.sandbox import Limits, Outcome, Sandbox
from aspo_jax.rewards.verdict import Reason, Submission, Verdict

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.S | re.M)
_PYTHON = frozenset({"", "python", "python3", "py", "py3"})


def last_program(text: str) -> str | None:
    """The last closed block of the conclusion fenced as Python, or fenced without a language."""
    blocks = _FENCE.findall(conclusion(text))
    programs = [body for language, body in blocks if language.lower() in _PYTHON]
    return programs[-1] if programs else None


# --- tests ----------------------------------------------------------------------------------------


class StdioTest(NamedTuple):
    """What to write to a program and what it must print."""

    input: str
    output: str


class CallTest(NamedTuple):
    """A call, as an expression or a function with arguments, and its value.

    is_json: the value came as JSON: tuples are lists, decimals have a tolerance.
    is_truth: only the value's truth is asked for.
    """

    order: dict[str, Any]
    expected: Any
    is_json: bool = False
    is_truth: bool = False


class CheckTest(NamedTuple):
    """Test code that calls ``names``, functions of the program."""

    source: str
    names: list[str]


Test = StdioTest | CallTest | CheckTest


class BadTests(ValueError):
    """The tests of a problem cannot be used."""


def read_tests(answer: Any) -> list[Test]:
    """The tests of a problem; see the module for their forms.

    Raises:
        BadTests: none of the forms, or no test in it.
    """
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            raise BadTests("a string that is not JSON") from None
    if isinstance(answer, list):
        answer = (
            {"tests": answer} if answer and isinstance(answer[0], dict) else {"asserts": answer}
        )
    if not isinstance(answer, dict):
        raise BadTests(f"a JSON {type(answer).__name__}, expected an object")
    try:
        tests = _read(answer)
    except (KeyError, TypeError, ValueError, SyntaxError, RecursionError) as error:
        raise BadTests(f"{type(error).__name__}: {error}") from error
    if not tests:
        raise BadTests(f"no tests in an object with the fields {sorted(answer)}")
    return tests


def _read(answer: dict[str, Any]) -> list[Test]:
    name = answer.get("fn_name") or answer.get("func_name")
    if isinstance(answer.get("tests"), list):
        return [_one_test(test, name) for test in answer["tests"]]
    if "inputs" in answer:
        pairs = zip(answer["inputs"], answer["outputs"], strict=True)
        return [_call(name, i, o) if name else StdioTest(_text(i), _text(o)) for i, o in pairs]
    asserts = answer.get("asserts", answer.get("test_list"))
    if asserts is not None:
        setup = answer.get("setup", answer.get("test_setup_code", "")) or ""
        return [_assertion(ast.parse(text).body, setup, None) for text in asserts]
    if "test" in answer:
        return _check(answer["test"], answer["entry_point"], answer.get("prompt", ""))
    return []


def _one_test(test: dict[str, Any], name: str | None) -> Test:
    name = test.get("fn_name") or test.get("func_name") or name
    if test.get("testtype", "functional" if name else "stdin") == "functional":
        if not name:
            raise BadTests("a functional test without fn_name")
        return _call(name, test["input"], test["output"])
    return StdioTest(_text(test["input"]), _text(test["output"]))


def _text(value: Any) -> str:
    """Of a stdio test: a string, or its lines."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise BadTests(f"input or output is a {type(value).__name__}, expected a string")
    return value


def _call(name: str, arguments: Any, expected: Any) -> CallTest:
    """LiveCodeBench: arguments and result as JSON texts, or as JSON values."""
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.split("\n") if line.strip()]
    if isinstance(expected, str):
        with contextlib.suppress(ValueError):  # a plain string
            expected = json.loads(expected)
    order = {"function": name, "arguments": values.encode(list(arguments))}
    return CallTest(order, expected, is_json=True)


def _check(source: str, entry_point: str, prompt: str) -> list[Test]:
    """HumanEval: one test per assert where all of them can be split, else the code as a whole."""
    tree = ast.parse(source)
    checks = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    if not checks:
        raise BadTests("no function 'check' in the test code")
    parameter = checks[0].args.args[0].arg
    steps = [node for node in checks[0].body if not _is_remark(node)]
    split = [_split([node], {parameter: entry_point}) for node in steps]
    if steps and None not in split:
        return [test for test in split if test is not None]
    whole = f"{prompt}\n\n{source}\n\ncheck({entry_point})\n"
    ast.parse(whole)
    return [CheckTest(whole, [entry_point])]


def _is_remark(node: ast.stmt) -> bool:
    """A docstring, ``pass``, or an assert of a constant: nothing is tested."""
    return (
        (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or isinstance(node, ast.Pass)
        or (isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant))
    )


def _assertion(body: list[ast.stmt], setup: str, rename: dict[str, str] | None) -> Test:
    test = None if setup.strip() else _split(body, rename or {})
    if test is not None:
        return test
    source = f"{setup}\n" + "\n".join(ast.unparse(node) for node in body)
    return CheckTest(source, _free_functions(source))


def _free_functions(source: str) -> list[str]:
    """Names that the code calls and does not define: those it expects of the program."""
    tree = ast.parse(source)
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    stored = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    builtin = set(dir(__builtins__)) if not isinstance(__builtins__, dict) else set(__builtins__)
    return sorted(called - stored - defined - builtin)


def _split(body: Sequence[ast.stmt], rename: dict[str, str]) -> CallTest | None:
    """``assert call == literal`` and its like as a call and a value; None for other code."""
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        return None
    test = body[0].test
    if isinstance(test, ast.Constant):  # assert True
        return None
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        if not isinstance(test.ops[0], ast.Eq | ast.Is):
            return None
        sides = (test.left, test.comparators[0])
        for call, literal in (sides, sides[::-1]):
            with_value = _literal(literal)
            if with_value is not None and _has_call(call):
                return CallTest({"expression": _source(call, rename)}, with_value[0])
        return None
    is_negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    call = test.operand if isinstance(test, ast.UnaryOp) and is_negated else test
    if isinstance(call, ast.Call):
        order = {"expression": _source(call, rename)}
        return CallTest(order, not is_negated, is_truth=True)
    return None


def _has_call(node: ast.expr) -> bool:
    return any(isinstance(inner, ast.Call) for inner in ast.walk(node))


def _literal(node: ast.expr) -> tuple[Any] | None:
    """A value in a tuple of one; None for an expression that must be worked out."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        made = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "dict": dict}
        if node.func.id in made and len(node.args) <= 1:
            inner = _literal(node.args[0]) if node.args else ((),)
            return None if inner is None else (made[node.func.id](inner[0]),)
        if node.func.id == "float" and len(node.args) == 1:
            inner = _literal(node.args[0])
            return None if inner is None else (float(inner[0]),)
    try:
        return (ast.literal_eval(node),)
    except ValueError:
        return None


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]):
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._names.get(node.id, node.id), node.ctx)


def _source(node: ast.expr, rename: dict[str, str]) -> str:
    return ast.unparse(_Renamed(rename).visit(node))


def preamble(answer: Any) -> str:
    """What precedes every program of a problem: HumanEval's prompt, with its helpers."""
    prompt = answer.get("prompt") if isinstance(answer, dict) else None
    return prompt if isinstance(prompt, str) and "entry_point" in answer else ""


# --- comparing ------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_TOLERANCE = 1e-6  # absolute, and relative above 1


def same_output(expected: str, printed: str) -> bool:
    """Line by line without surrounding white space; lines of numbers by value.

    Whole numbers are compared exactly, others within 1e-6, absolute or relative.
    """
    wanted, got = (
        [line.strip() for line in text.strip().splitlines()] for text in (expected, printed)
    )
    return len(wanted) == len(got) and all(map(_same_line, wanted, got))


def _same_line(wanted: str, got: str) -> bool:
    if wanted == got:
        return True
    pairs = list(zip(wanted.split(), got.split(), strict=False))
    return len(wanted.split()) == len(got.split()) > 0 and all(_same_number(a, b) for a, b in pairs)


def _same_number(wanted: str, got: str) -> bool:
    if not (_DECIMAL.fullmatch(wanted) and _DECIMAL.fullmatch(got)):
        return False
    try:
        a, b = Decimal(wanted), Decimal(got)
    except InvalidOperation:
        return False
    if a == b:
        return True
    if a == a.to_integral_value() and not set(".eE") & set(wanted):
        return False
    return abs(float(a) - float(b)) <= _TOLERANCE * max(1.0, abs(float(a)))


def same_value(expected: Any, value: Any, is_json: bool) -> bool:
    """Equality of plain values; from JSON a tuple is a list and a float has a tolerance."""
    if not is_json:
        return expected == value
    if isinstance(expected, list | tuple) and isinstance(value, list | tuple):
        return len(expected) == len(value) and all(
            same_value(a, b, is_json) for a, b in zip(expected, value, strict=True)
        )
    if isinstance(expected, dict) and isinstance(value, dict):
        named = {str(k): v for k, v in value.items()}
        return expected.keys() == named.keys() and all(
            same_value(expected[k], named[k], is_json) for k in expected
        )
    if isinstance(expected, bool) != isinstance(value, bool):
        return False
    if isinstance(expected, float) and isinstance(value, int | float):
        return math.isclose(expected, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return expected == value


# --- grading --------------------------------------------------------------------------------------


class ProgramRules(NamedTuple):
    """How programs are tested.

    limits: of each test.
    total_s: seconds for all tests of a program.
    max_tests: tests drawn per program, by the seed and the submission's identity; 0 = all.
    """

    limits: Limits = Limits()
    total_s: float = 60.0
    max_tests: int = 0
    seed: int = 0


def draw_tests(tests: Sequence[Test], count: int, identity: str) -> list[Test]:
    """``count`` tests in their order, the same for the same identity; all if ``count`` is 0."""
    if not 0 < count < len(tests):
        return list(tests)
    drawn = random.Random(identity).sample(range(len(tests)), count)
    return [tests[i] for i in sorted(drawn)]


def grade(submission: Submission, box: Sandbox, rules: ProgramRules) -> Verdict:
    """1 if the program passes its tests, else 0 with the reason of the first that it fails.

    Raises:
        SandboxError: the sandbox failed, not the program.
    """
    try:
        tests = read_tests(submission.answer)
    except BadTests:
        return Verdict(0.0, "bad_gold", is_valid=False)
    program = last_program(submission.text)
    if program is None:
        return Verdict(0.0, "no_answer" if submission.is_finished else "truncated")
    source = _assemble(preamble(submission.answer), program)
    deadline = time.monotonic() + rules.total_s
    for test in draw_tests(tests, rules.max_tests, f"{rules.seed} {submission.identity}"):
        left = min(rules.limits.seconds, deadline - time.monotonic())
        if left <= 0:
            return Verdict(0.0, "timeout")
        reason = _run(test, source, box, rules.limits._replace(seconds=left))
        if reason != "match":
            return Verdict(0.0, reason)
    return Verdict(1.0, "match")


def _assemble(prompt: str, program: str) -> str:
    if not prompt or "from __future__" in program:
        return program
    return f"{prompt}\n{program}"


def _run(test: Test, source: str, box: Sandbox, limits: Limits) -> Reason:
    if isinstance(test, StdioTest):
        return _run_stdio(test, source, box, limits)
    if isinstance(test, CallTest):
        return _run_call(test, source, box, limits)
    calls = {"mode": "calls", "source": source, "has_preamble": False}
    check = {"mode": "check", "source": test.source, "names": test.names}
    ending = box.check(calls, check, limits)
    reasons: dict[str, Reason] = {"passed": "match", "failed": "mismatch"}
    return reasons.get(ending) or _named(ending)


def _named(ending: str) -> Literal["timeout", "exhausted", "error"]:
    return "timeout" if ending == "timeout" else "exhausted" if ending == "exhausted" else "error"


def _run_stdio(test: StdioTest, source: str, box: Sandbox, limits: Limits) -> Reason:
    room = limits.output_kib + 2 * len(test.output) // 1024
    orders = {"mode": "script", "source": source}
    outcome = box.run(orders, test.input.encode(), limits._replace(output_kib=room))
    if (fault := _fault(outcome)) is not None:
        return fault
    printed = outcome.output.decode("utf-8", "replace")
    return "match" if same_output(test.output, printed) else "mismatch"


def _run_call(test: CallTest, source: str, box: Sandbox, limits: Limits) -> Reason:
    orders = {"mode": "calls", "source": source, "has_preamble": test.is_json}
    outcome = box.run(orders, json.dumps(test.order).encode() + b"\n", limits)
    if outcome.ending != "exit":
        return _named(outcome.ending)
    try:  # the status says nothing: only a value counts
        value = values.decode(outcome.output)
        is_right = _is_expected(test, value)
    except (ValueError, TypeError, RecursionError):
        return "error"
    return "match" if is_right else "mismatch"


def _is_expected(test: CallTest, value: Any) -> bool:
    if test.is_truth:
        return bool(value) is test.expected
    return same_value(test.expected, value, test.is_json)


def _fault(outcome: Outcome) -> Reason | None:
    if outcome.ending != "exit":
        return _named(outcome.ending)
    return None if outcome.status == 0 else "error"
