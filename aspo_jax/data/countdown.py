"""Countdown: reach a target from a few numbers, each used once, every step written out.

    prompt  3 3 6 7:7        answer  7-3=4,6-3=3,4+3=7

A problem is drawn by walking a random chain of steps over random numbers and taking where it ends
for the target, so it has a solution and one is known. It is a pure function of (spec, seed,
split, index). Which split a prompt belongs to is decided by a digest of its text: no prompt can
be in two splits, however often it is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from aspo_jax.data.rows import DataError

Split = Literal["train", "held_out"]

CHARACTERS = "0123456789+-*=, :>"  # of prompts, answers and the chat template

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_HELD_OUT_SHARE = 5  # one prompt in so many is held out
_MAX_DRAWS = 20_000


class Step(NamedTuple):
    a: int
    operation: str
    b: int
    result: int


@dataclasses.dataclass(frozen=True)
class CountdownSpec:
    """Which problems there are.

    numbers: how many are given.    low, high: their range, inclusive.
    operations: a subset of ``+-*``.    max_intermediate: the largest result of any step.

    Raises:
        DataError: an impossible value or combination, by the name of its field.
    """

    numbers: int = 4
    low: int = 1
    high: int = 9
    operations: str = "+-"
    max_intermediate: int = 99

    def __post_init__(self) -> None:
        _expect("numbers", self.numbers, 2 <= self.numbers <= 16, "2 to 16")
        _expect("low", self.low, self.low >= 0, "0 or more")
        _expect("high", self.high, self.low <= self.high < 10**6, f"{self.low} (low) to 999999")
        known = bool(self.operations) and set(self.operations) <= _OPERATIONS.keys()
        is_set = len(set(self.operations)) == len(self.operations)
        _expect("operations", self.operations, known and is_set, "one or more of + - *, each once")
        fits = 1 <= self.max_intermediate < 10**12
        _expect("max_intermediate", self.max_intermediate, fits, "1 to 999999999999")
        _draw_until(self, random.Random("possible?"), lambda drawn: True, "at all")


def _expect(field: str, found: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise DataError(f"Countdown.{field} is {found!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """``numbers`` in ascending order, ``target``, and the ``steps`` of one solution."""

    numbers: tuple[int, ...]
    target: int
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The prompt: ``3 3 6 7:7``."""
        return f"{' '.join(map(str, self.numbers))}:{self.target}"


def split_of(text: str) -> Split:
    """The split that a prompt belongs to, by a digest of its text."""
    digest = hashlib.sha256(text.encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % _HELD_OUT_SHARE else "held_out"


def _draw(spec: CountdownSpec, rng: random.Random) -> Problem | None:
    """A random chain over random numbers; None if it leaves the spec."""
    numbers = [rng.randint(spec.low, spec.high) for _ in range(spec.numbers)]
    values, steps = list(numbers), []
    while len(values) > 1:
        a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
        operation = rng.choice(spec.operations)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        result = _OPERATIONS[operation](a, b)
        if result > spec.max_intermediate:
            return None
        steps.append(Step(a, operation, b, result))
        values.append(result)
    return Problem(tuple(sorted(numbers)), values[0], tuple(steps)) if values[0] >= 1 else None


def _draw_until(
    spec: CountdownSpec, rng: random.Random, is_wanted: Callable[[Problem], bool], which: str
) -> Problem:
    for _ in range(_MAX_DRAWS):
        drawn = _draw(spec, rng)
        if drawn is not None and is_wanted(drawn):
            return drawn
    raise DataError(
        f"Countdown: {_MAX_DRAWS} draws gave no problem {which} for {spec}; expected at least one "
        "in that many: widen low..high, raise max_intermediate or allow more operations"
    )


def problem(spec: CountdownSpec, seed: int, index: int, split: Split) -> Problem:
    """Problem ``index`` of a split; the same at every call, on every machine.

    Raises:
        DataError: the spec is so narrow that the split has no problems.
    """
    rng = random.Random(f"countdown {split} {seed} {index}")
    return _draw_until(spec, rng, lambda drawn: split_of(drawn.text) == split, f"in {split!r}")


def demonstration(problem: Problem, rng: random.Random) -> str:
    """A worked solution, ``7-3=4,6-3=3,4+3=7``: the known steps, each sum or product with its
    operands in an order drawn by ``rng``."""

    def write(step: Step) -> str:
        a, b = step.a, step.b
        if step.operation != "-" and rng.random() < 0.5:
            a, b = b, a
        return f"{a}{step.operation}{b}={step.result}"

    return ",".join(map(write, problem.steps))


# --- lengths in character tokens ------------------------------------------------------------------


def _largest(spec: CountdownSpec, count: int) -> int:
    """A bound on what ``count`` of the numbers can be combined to."""
    # From 2 on a product is never below the sum; (1+1)*(1+1+1) is why the base is at least 2.
    reach = {"+": count * spec.high, "-": spec.high, "*": max(spec.high, 2) ** count}
    return min(spec.max_intermediate, max(map(reach.__getitem__, spec.operations)))


def max_prompt_tokens(spec: CountdownSpec) -> int:
    """A bound on the tokens of a prompt: <bos>, the numbers, ``:``, the target, ``>``."""
    numbers = spec.numbers * (len(str(spec.high)) + 1)
    return 1 + numbers + len(str(_largest(spec, spec.numbers))) + 1


def max_response_tokens(spec: CountdownSpec) -> int:
    """A bound on the tokens of a worked solution, <eos> included."""

    def digits(count: int) -> int:
        return len(str(spec.high if count == 1 else _largest(spec, count)))

    @functools.cache
    def steps(count: int) -> int:
        """Characters of the steps that combine ``count`` numbers, a comma behind each."""
        if count == 1:
            return 0
        parts = ((i, count - i) for i in range(1, count // 2 + 1))
        return digits(count) + 3 + max(sum(steps(i) + digits(i) for i in part) for part in parts)

    return steps(spec.numbers) - 1 + 1  # no comma behind the last step, but <eos>


class CountdownSource:
    """The problems of one split as a sequence of rows, each made when it is asked for.

    Rows hold ``id``, ``prompt``, ``answer`` and ``kind``, as those of a file do (`read_rows`).
    """

    def __init__(self, spec: CountdownSpec, seed: int, split: Split, size: int = 2**31 - 1):
        self._spec = spec
        self._seed = seed
        self._split: Split = split
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        drawn = problem(self._spec, self._seed, index, self._split)
        answer = {
            "numbers": list(drawn.numbers),
            "target": drawn.target,
            "operations": self._spec.operations,
        }
        return {
            "id": f"countdown/{self._split}/{self._seed}/{index}",
            "prompt": drawn.text,
            "answer": answer,
            "kind": "countdown",
        }

    @property
    def longest(self) -> list[dict[str, Any]]:
        """A row at least as long as any of this source, for the check of prompt lengths."""
        target = _largest(self._spec, self._spec.numbers)
        text = Problem((self._spec.high,) * self._spec.numbers, target, ()).text
        return [self[0] | {"id": f"countdown/{self._split}/longest", "prompt": text}]
