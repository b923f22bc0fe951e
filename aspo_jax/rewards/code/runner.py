"""What runs inside the sandbox: ``python -s -P -S runner.py FD``, orders as JSON in that file.

It locks itself in (`jail`) and then runs one program in one of three ways.

    script  the program is ``__main__``: standard input in, standard output out
    calls   the program is a module, in which a head has run before it; each line of input is a
            call, each line of output its value
    check   trusted test code; the functions that it tests live in another sandbox and are called
            through standard output and input, so that only plain values reach the test

`calls` and `check` speak through copies of their pipes that were made before anything else ran. Of
the expected results this process knows nothing, except under `check`, where no program runs.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False  # typing is slow to import, and this runs once per test
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jail  # noqa: E402  # pyright: ignore[reportMissingImports]
import values  # noqa: E402  # pyright: ignore[reportMissingImports]

sys.path.pop(0)


def _lock(orders: dict[str, Any]) -> None:
    """From here on this process can do no harm. A lock that does not hold ends it."""
    if not orders["is_namespaced"]:
        jail.die_with_parent(orders["parent"])
    if orders["uid"] is not None:
        jail.drop_privileges(orders["uid"])
    jail.limit(**orders["limits"])
    if orders["readable"] is not None:
        jail.restrict_files(orders["readable"], os.getcwd())
    if orders["is_filtered"]:
        jail.restrict_calls()


def _give_exit() -> None:
    """``exit()`` and ``quit()``, which Python's site module defines elsewhere."""
    import builtins

    def leave(code: object = None) -> None:
        raise SystemExit(code)

    builtins.exit = builtins.quit = leave


def _module(name: str) -> dict[str, Any]:
    module = type(sys)(name)
    sys.modules[name] = module
    return vars(module)


def _compile(source: str) -> Any:
    """The code of a program. As in a file, an unknown codec in its first lines is an error."""
    lines = source.split("\n", 2)[:2]
    if any("coding" in line for line in lines):
        import tokenize  # slow, and rarely needed

        rest = iter([line.encode() + b"\n" for line in lines] + [b""])
        tokenize.detect_encoding(rest.__next__)
    return compile(source, "program.py", "exec")


def _claim_pipes() -> tuple[Any, Callable[[str], None]]:
    """(lines that come in, a function that sends one); standard input and output are empty now."""
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)

    def send(line: str) -> None:
        data = line.encode("utf-8", "surrogatepass") + b"\n"
        while data:
            data = data[os.write(outgoing, data) :]

    return incoming, send


def _find(namespace: dict[str, Any], before: dict[str, Any], name: str) -> Any:
    """A function of the program's own, or a method of its class Solution."""
    found = namespace.get(name)
    if found is not None and found is not before.get(name):
        return found
    return getattr(namespace["Solution"](), name)


def _run_calls(head: str, source: str) -> None:
    incoming, send = _claim_pipes()
    namespace = _module("program")
    exec(head, namespace)
    before = dict(namespace)
    exec(_compile(source), namespace)
    for line in incoming:
        try:
            order = json.loads(line)
            if "expression" in order:
                value = eval(order["expression"], namespace)
            else:
                function = _find(namespace, before, order["function"])
                value = function(*values.decode(order["arguments"]))
            send(values.encode(value))
        except Exception:
            send("null " * 2)  # no value: two words are no JSON


def _run_check(source: str, names: list[str]) -> None:
    import ast

    incoming, send = _claim_pipes()

    def remote(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            send(json.dumps({"function": name, "arguments": values.encode(arguments)}))
            return values.decode(incoming.readline())

        return call

    namespace = _module("check")
    proxies = {name: remote(name) for name in names}
    namespace.update(proxies)
    # A definition of a tested function in the test's own setup must not replace the program's.
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in proxies]
    exec(compile(tree, "check.py", "exec"), namespace)
    os.write(2, b"passed")


def main() -> None:
    descriptor = int(sys.argv[1])
    with open(descriptor, "rb", closefd=False) as file:
        orders = json.load(file)
    _lock(orders)
    os.ftruncate(descriptor, 0)  # all locks hold: from here on faults are the program's
    os.close(descriptor)
    _give_exit()
    if orders["mode"] == "script":
        sys.argv = ["program.py"]
        exec(_compile(orders["source"]), _module("__main__"))
    elif orders["mode"] == "calls":
        _run_calls(orders["head"], orders["source"])
    else:
        _run_check(orders["source"], orders["names"])


if __name__ == "__main__":
    main()
