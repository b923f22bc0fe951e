"""The tests of a problem of kind ``code``, in the forms of the field:

    {"inputs": ["1 2", ...], "outputs": ["3", ...]}                 standard input and output
    {"inputs": [...], "outputs": [...], "fn_name": "add"}           LiveCodeBench: JSON arguments,
                                                                    one a line, and a JSON result
    {"tests": [{"input": ..., "output": ..., "testtype": ...}], "fn_name": ...}     the same
    {"asserts": ["assert f(2) == 4", ...], "setup": "..."}          MBPP (or test_list,
                                                                    test_setup_code)
    {"test": "def check(candidate): ...", "entry_point": "f", "prompt": "..."}      HumanEval
    {"functional": "def check(candidate): ...\ncheck(f)"}           the same, as Archer has it

An assert is split into a call and a literal where that is possible; the rest is kept as code.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from aspo_jax.rewards.code import values
from aspo_jax.rewards.code.equality import Plain, plain


class StdioTest(NamedTuple):
    """What to write to a program and what it must print."""

    input: str
    output: str


class CallTest(NamedTuple):
    """A call, as an expression or a function with arguments, and its value.

    is_json: the value came as JSON: tuples are lists, decimals have a tolerance.
    """

    order: dict[str, Any]
    expected: Plain
    is_json: bool = False


class CheckTest(NamedTuple):
    """Test code that calls ``names``, functions of the program."""

    source: str
    names: list[str]


Test = StdioTest | CallTest | CheckTest


class BadTests(ValueError):
    """The tests of a problem cannot be used: which field, what was found and what was expected."""


_WORDS = {str: "a string", list: "a list", dict: "an object"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expect(value: Any, kind: type, field: str) -> Any:
    if not isinstance(value, kind):
        raise BadTests(f"{field} is {_short(value)}, expected {_WORDS[kind]}")
    return value


def _field(row: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
    if name not in row:
        raise BadTests(f"{where}{name} is missing, expected {_WORDS[kind]}")
    return _expect(row[name], kind, where + name)


def _parse(source: Any, field: str) -> ast.Module:
    try:
        return ast.parse(_expect(source, str, field))
    except (SyntaxError, ValueError, MemoryError) as error:
        raise BadTests(f"{field} is not Python ({error}): {_short(source)}") from error


def find_problem(answer: Any) -> str | None:
    """What is wrong with the tests of a problem; None if they can be used."""
    try:
        read_tests(answer)
    except BadTests as error:
        return (
            f"found tests that cannot be used ({error}), expected one of the forms that "
            "docs/rewards.md lists"
        )
    return None


def read_tests(answer: Any) -> list[Test]:
    """The tests of a problem; see the module for their forms.

    Raises:
        BadTests: none of the forms, or no test in it.
    """
    row = _row(answer)
    try:
        whole_prompt(read_prompt(row))
        tests = _read(row)
    except RecursionError:
        raise BadTests("nested too deeply") from None
    if not tests:
        raise BadTests(f"no test in an object with the fields {sorted(row)}")
    return tests


def read_prompt(answer: Any) -> str:
    """HumanEval's prompt, which precedes the program; empty in all other forms.

    Raises:
        BadTests: not an object with a string for it.
    """
    row = _row(answer)
    return _expect(row.get("prompt") or "", str, "prompt") if "entry_point" in row else ""


def _row(answer: Any) -> dict[str, Any]:
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError):
            raise BadTests(f"a string that is not JSON: {answer:.60}") from None
    if isinstance(answer, list):
        is_rows = answer and isinstance(answer[0], dict)
        answer = {"tests" if is_rows else "asserts": answer}
    return _expect(answer, dict, "the answer")


def _read(answer: dict[str, Any]) -> list[Test]:
    name = _function_name(answer, "")
    if "tests" in answer:
        rows = _field(answer, "tests", list)
        return [_one_test(row, name, f"tests[{i}]") for i, row in enumerate(rows)]
    if "inputs" in answer:
        return _read_pairs(answer, name)
    for asserts, setup in (("asserts", "setup"), ("test_list", "test_setup_code")):
        if asserts in answer:
            texts, before = _field(answer, asserts, list), answer.get(setup) or ""
            _parse(before, setup)
            bodies = [_parse(text, f"{asserts}[{i}]").body for i, text in enumerate(texts)]
            return [_assertion(body, before) for body in bodies]
    if "test" in answer:
        return _check(answer)
    if "functional" in answer:
        return _functional(_field(answer, "functional", str))
    raise BadTests(
        f"an object with the fields {sorted(answer)}, expected 'inputs' and 'outputs', 'tests', "
        "'asserts', 'test' and 'entry_point', or 'functional'"
    )


def _function_name(row: dict[str, Any], where: str) -> str | None:
    name = row.get("fn_name") or row.get("func_name")
    return None if name is None else _expect(name, str, f"{where}fn_name")


def _read_pairs(answer: dict[str, Any], name: str | None) -> list[Test]:
    inputs, outputs = _field(answer, "inputs", list), _field(answer, "outputs", list)
    if len(inputs) != len(outputs):
        raise BadTests(
            f"inputs has {len(inputs)} entries and outputs {len(outputs)}, expected one output for "
            "each input"
        )
    return [
        _pair(name, given, wanted, (f"inputs[{i}]", f"outputs[{i}]"))
        for i, (given, wanted) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _one_test(row: Any, name: str | None, where: str) -> Test:
    _expect(row, dict, where)
    name = _function_name(row, f"{where}.") or name
    kind = row.get("testtype", "functional" if name else "stdin")
    if kind not in ("functional", "stdin"):
        raise BadTests(f"{where}.testtype is {_short(kind)}, expected 'functional' or 'stdin'")
    if kind == "functional" and not name:
        raise BadTests(f"{where} is a functional test without fn_name, expected a function's name")
    for field in ("input", "output"):
        if field not in row:
            raise BadTests(f"{where}.{field} is missing")
    name = name if kind == "functional" else None
    return _pair(name, row["input"], row["output"], (f"{where}.input", f"{where}.output"))


def _pair(name: str | None, given: Any, wanted: Any, fields: tuple[str, str]) -> Test:
    if name:
        return _call(name, given, wanted, fields)
    return StdioTest(_text(given, fields[0]), _text(wanted, fields[1]))


def _text(value: Any, field: str) -> str:
    """Of a stdio test: a string, or its lines."""
    text = "\n".join(map(str, value)) if isinstance(value, list) else _expect(value, str, field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadTests(f"{field} holds half a surrogate pair ({error}), expected text") from None
    return text


def _call(name: str, arguments: Any, expected: Any, fields: tuple[str, str]) -> CallTest:
    """LiveCodeBench: arguments and result as JSON texts, or as JSON values."""
    if isinstance(arguments, str):
        lines = [line for line in arguments.split("\n") if line.strip()]
        arguments = [_json(line, fields[0]) for line in lines]
    if isinstance(expected, str):
        with contextlib.suppress(ValueError):  # a plain string
            expected = json.loads(expected)
    order = {"function": name, "arguments": values.encode(_expect(arguments, list, fields[0]))}
    return CallTest(order, _plain(expected, fields[1]), is_json=True)


def _json(line: str, field: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadTests(
            f"{field} has a line that is not JSON ({error}): {_short(line)}; expected one argument "
            "of the function a line"
        ) from None


def _plain(value: Any, field: str) -> Plain:
    try:
        return plain(value)
    except ValueError as error:
        raise BadTests(f"{field} is {error}, expected fewer") from None


def _check(answer: dict[str, Any], called: str | None = None) -> list[Test]:
    """HumanEval: one test per assert where all of them can be split, else the code as a whole.

    called: how an assert that is split calls the entry point; None: by its name.
    """
    source, entry_point = _field(answer, "test", str), _field(answer, "entry_point", str)
    _parse(entry_point, "entry_point")
    functions = [n for n in _parse(source, "test").body if isinstance(n, ast.FunctionDef)]
    checks = [node for node in functions if node.name == "check" and node.args.args]
    if not checks:
        raise BadTests("test has no function 'check(candidate)'")
    for node in ast.walk(checks[0]):
        if isinstance(node, ast.Name) and node.id == checks[0].args.args[0].arg:
            node.id = called or entry_point
    steps = [node for node in checks[0].body if not _is_remark(node)]
    split = [_split([node]) for node in steps]
    if steps and None not in split:
        return [test for test in split if test is not None]
    head = whole_prompt(read_prompt(answer))
    return [CheckTest(f"{head}\n\n{source}\n\ncheck({entry_point})\n", [entry_point])]


def _functional(source: str) -> list[Test]:
    """Test code that ends in ``check(f)`` or ``check(Solution().f)`` is HumanEval's."""
    *before, last = _parse(source, "functional").body or [ast.Pass()]
    test = "\n".join(map(ast.unparse, before))
    match last:
        case ast.Expr(ast.Call(ast.Name("check"), [ast.Name(name)])):
            return _check({"test": test, "entry_point": name})
        case ast.Expr(ast.Call(ast.Name("check"), [ast.Attribute(owner, name)])):
            return _check({"test": test, "entry_point": name}, f"{ast.unparse(owner)}.{name}")
    return [CheckTest(source, _free_functions(source))]


def whole_prompt(prompt: str) -> str:
    """HumanEval's prompt, the head of a function, as code that can stand alone.

    Its docstring is a body; a prompt without one is given another.

    Raises:
        BadTests: it is not Python.
    """
    lines = [line for line in prompt.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    margin = last[: len(last) - len(last.lstrip())]
    for whole in (prompt, f"{prompt.rstrip()}\n{margin}    pass\n"):
        with contextlib.suppress(BadTests):
            _parse(whole, "prompt")
            return whole
    raise BadTests(
        f"prompt is not Python: {_short(prompt)}; expected a function's head, with what it needs"
    )


def _is_remark(node: ast.stmt) -> bool:
    """A docstring, ``pass``, or an assert of a constant: nothing is tested."""
    match node:
        case ast.Pass() | ast.Expr(ast.Constant()) | ast.Assert(ast.Constant()):
            return True
    return False


def _assertion(body: list[ast.stmt], setup: str) -> Test:
    test = None if setup.strip() else _split(body)
    if test is not None:
        return test
    source = f"{setup}\n" + "\n".join(ast.unparse(node) for node in body)
    return CheckTest(source, _free_functions(source))


def _free_functions(source: str) -> list[str]:
    """Names that the code calls and does not define: those it expects of the program."""
    nodes = list(ast.walk(ast.parse(source)))
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return sorted(called - stored - defined - set(dir(builtins)))


def _split(body: Sequence[ast.stmt]) -> CallTest | None:
    """``assert call == literal`` and its like as a call and a value; None for other code."""
    match body:
        case [ast.Assert(ast.Compare(left, [ast.Eq() | ast.Is()], [right]))]:
            for call, literal in ((left, right), (right, left)):
                value = _literal(literal)
                if value is not None and any(isinstance(n, ast.Call) for n in ast.walk(call)):
                    return CallTest({"expression": ast.unparse(call)}, value)
        # Else only the truth of its value is asked for.
        case [ast.Assert(ast.Call() as call)]:
            return CallTest({"expression": f"not not {ast.unparse(call)}"}, plain(True))
        case [ast.Assert(ast.UnaryOp(ast.Not(), ast.Call() as call))]:
            return CallTest({"expression": f"not not {ast.unparse(call)}"}, plain(False))
    return None


_MAKERS = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "dict": dict}


def _literal(node: ast.expr) -> Plain | None:
    """Its value; None for an expression that must be worked out."""
    try:
        return plain(_value(node))
    except (ValueError, TypeError, OverflowError):
        return None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(ast.Name("float"), [argument], []):
            return float(_value(argument))
        case ast.Call(ast.Name(maker), parts, []) if maker in _MAKERS and len(parts) <= 1:
            return _MAKERS[maker](*map(_value, parts))
    return ast.literal_eval(node)
