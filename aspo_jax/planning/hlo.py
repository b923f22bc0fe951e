"""What a compiled program does: bytes it moves and FLOP, read from the text of its optimized HLO.

XLA's own analysis counts the body of a loop once and a kernel not at all. Here a body counts as
often as it runs, a fusion moves what crosses its boundary, a slice, gather or update in place moves
what it touches, and what lies in a chip's own fast memory, ``S(1)`` and up, moves nothing.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Kernel = Callable[["Instruction", list["Array"]], tuple[float, float] | None]


class Array(NamedTuple):
    """One array of an instruction's result; is_main: it lies in the main memory."""

    kind: str
    dims: tuple[int, ...]
    is_main: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """In whatever memory."""
        return self.size * _BITS.get(self.kind, 0) / 8

    @property
    def moved(self) -> float:
        return self.bytes if self.is_main else 0.0


class Instruction(NamedTuple):
    """A line of a computation. arrays: of its result, a tuple's side by side."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str  # of the parentheses
    attributes: str

    def named(self, attribute: str) -> str:
        """The computation that an attribute names; empty: none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def source(self) -> str:
        """Where it comes from in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    by_name: dict[str, Instruction]
    root: str

    def arrays(self, instruction: Instruction) -> list[Array]:
        """Of the operands, one each; a tuple's first."""
        found = (self.by_name[name].arrays for name in instruction.operands)
        return [(arrays or _NOTHING)[0] for arrays in found]

    def parameter(self, number: int) -> Instruction:
        return next(
            each
            for each in self.by_name.values()
            if each.opcode == "parameter" and each.inside == str(number)
        )


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class Item(NamedTuple):
    """An instruction that moves or computes something, and how often it runs.

    read, written: bytes of the main memory; flops: of products; all of one time.
    """

    instruction: Instruction
    computation: str
    times: float
    read: float
    written: float
    flops: float

    @property
    def bytes(self) -> float:
        """In all."""
        return self.times * (self.read + self.written)


_BITS = {"pred": 8, "s4": 4, "u4": 4, "f64": 64, "s64": 64, "u64": 64, "c64": 64, "c128": 128}
_BITS |= {f"{kind}{bits}": bits for kind in ("s", "u", "f") for bits in (8, 16, 32)}
_BITS |= {"bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_NOTHING = (Array("token", ()),)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


# --- reading the text -------------------------------------------------------------------------


def parse(text: str) -> Module:
    """The computations of a module, as ``compiled.as_text()`` prints them."""
    computations, entry = {}, ""
    by_name: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            by_name = {}
            computations[head[2]] = Computation(by_name, "")
            entry = head[2] if head[1] else entry
            current = head[2]
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], found[3])
            by_name[instruction.name] = instruction
            if found[1]:
                computations[current] = Computation(by_name, instruction.name)
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closed(rest, start)
    arrays = tuple(
        Array(kind, tuple(map(int, filter(None, dims.split(",")))), not re.search(r"S\([1-9]", at))
        for kind, dims, at in _ARRAY.findall(kind)
    )
    inside = rest[start + 1 : stop - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, rest[:start], arrays, operands, inside, rest[stop:])


def _closed(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


# --- what runs, and how often -----------------------------------------------------------------

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency"}
_BOOKKEEPING = {"AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
_BOOKKEEPING |= {"ConcatBitcast", "AsyncCollectiveDone"}


class Step(NamedTuple):
    """An instruction of a computation, in the order of its text, and what it sets going.

    item: what it does itself; None: nothing, or what ``inner`` does.
    inner: a loop's body, a computation that is called or the costlier branch.
    trips: how often it does ``inner``.
    """

    instruction: Instruction
    around: Computation
    item: Item | None = None
    inner: tuple[Step, ...] = ()
    trips: float = 1.0


def flat(found: Iterable[Step]) -> Iterator[Item]:
    """What the steps do, inner ones too."""
    for step in found:
        if step.item:
            yield step.item
        yield from flat(step.inner)


def steps(
    module: Module, dynamic: Sequence[float] = (), kernel: Kernel = lambda *_: None
) -> tuple[Step, ...]:
    """What a program does, in the order of its text: the schedule, once it is compiled.

    Args:
        dynamic: trips of the loops whose number only a run knows, the outermost first; loops
            deeper than that run once.
        kernel: (custom call, its operands) -> FLOP and bytes; None: what it was declared to do
            (`jax.experimental.pallas.CostEstimate`), else no FLOP and its operands and results.
    """
    return _steps(module, module.entry, 1.0, tuple(dynamic), kernel)


def _steps(
    module: Module, name: str, times: float, dynamic: tuple[float, ...], kernel: Kernel
) -> tuple[Step, ...]:
    computation = module.computations[name]

    def of(each: Instruction) -> Step:
        step = Step(each, computation)
        if each.opcode == "while":
            trips = _trips(module, computation, each)
            more, rest = (trips, dynamic) if trips else ((*dynamic, 1.0)[0], dynamic[1:])
            inner = _steps(module, each.named("body"), times * more, rest, kernel)
            return step._replace(inner=inner, trips=more)
        if each.opcode == "call" or (each.opcode == "async-start" and each.named("calls")):
            called = each.named("to_apply") or each.named("calls")
            return step._replace(inner=_steps(module, called, times, dynamic, kernel))
        if each.opcode == "conditional":
            branches = [_steps(module, b, times, dynamic, kernel) for b in _branches(each)]
            return step._replace(inner=max(branches, key=lambda b: sum(i.bytes for i in flat(b))))
        if _is_free(each):
            return step
        return step._replace(
            item=Item(each, name, times, *_work(module, computation, each, kernel))
        )

    return tuple(map(of, computation.by_name.values()))


def _is_free(each: Instruction) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    return (
        each.opcode in _FREE
        or each.opcode.endswith(("-done", "-update"))
        or (target is not None and target[1] in _BOOKKEEPING)
    )


def _branches(conditional: Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if several:
        return re.findall(r"%?([\w.\-]+)", several[1])
    return [conditional.named(f"{which}_computation") for which in ("true", "false")]


def _trips(module: Module, around: Computation, loop: Instruction) -> int | None:
    """How often a loop runs that counts from one constant up to another; None: unknown."""
    if known := re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(known[1])
    condition, body = (module.computations[loop.named(name)] for name in ("condition", "body"))
    test = condition.by_name[condition.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    ends = [_at_start(condition.by_name[name], condition, around, loop) for name in test.operands]
    counter = _place(condition.by_name[test.operands[0]])
    if counter is None or ends[0] is None or ends[1] is None:
        return None
    step = _added(body, body.by_name[body.root].operands[counter], counter)
    return -(-(ends[1] - ends[0]) // step) if step else None


def _place(element: Instruction) -> int | None:
    """Which element of its tuple an instruction gets."""
    if element.opcode != "get-tuple-element":
        return None
    return int(re.findall(r"index=(\d+)", element.attributes)[0])


def _whole(computation: Computation, each: Instruction) -> int | None:
    """The number that a constant, or a copy of one, is."""
    while each.opcode == "copy":
        each = computation.by_name[each.operands[0]]
    is_number = each.opcode == "constant" and re.fullmatch(r"-?\d+", each.inside)
    return int(each.inside) if is_number else None


def _at_start(
    each: Instruction, condition: Computation, around: Computation, loop: Instruction
) -> int | None:
    """A whole number in a loop's condition, where it is one when the loop begins."""
    place, start = _place(each), around.by_name[loop.operands[0]]
    if place is None:
        return _whole(condition, each)
    if start.opcode != "tuple":
        return None
    return _whole(around, around.by_name[start.operands[place]])


def _added(body: Computation, name: str, counter: int) -> int | None:
    """What a turn adds to the counter, perhaps in steps; None where that is not plain to see."""
    each, total = body.by_name[name], 0
    while each.opcode in ("add", "copy"):
        if each.opcode == "add":
            number = _whole(body, body.by_name[each.operands[1]])
            if number is None:
                return None
            total += number
        each = body.by_name[each.operands[0]]
    return total if _place(each) == counter else None


# --- one instruction --------------------------------------------------------------------------


def _work(
    module: Module, computation: Computation, each: Instruction, kernel: Kernel
) -> tuple[float, float, float]:
    """Bytes read, bytes written, FLOP."""
    arrays = computation.arrays(each)
    if each.opcode == "custom-call" and (found := kernel(each, arrays) or _declared(each)):
        return found[1], 0.0, found[0]
    read = sum(
        _read(module, each, number, array) * array.is_main for number, array in enumerate(arrays)
    )
    return read, _written(module, computation, each), _flops(module, computation, each)


def _declared(each: Instruction) -> tuple[float, float] | None:
    """FLOP and bytes of a kernel, as the program that made it estimates them."""
    found = re.search(r'"cost_estimate":\{([^}]*)\}', each.attributes)
    if found is None:
        return None
    values = dict(re.findall(r'"(\w+)":"?([\d.e+]+)', found[1]))
    return float(values.get("flops", 0)), float(values.get("bytes_accessed", 0))


_SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # number of the operand that is written
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}


def _read(module: Module, each: Instruction, number: int, array: Array) -> float:
    """Bytes that an instruction reads of an operand."""
    if number == 0 and each.opcode in _SLICES:
        return min(each.arrays[each.opcode == "slice-start"].bytes, array.bytes)
    if number == 0 and each.opcode in _UPDATES:
        return 0.0
    if each.opcode == "fusion":
        return _used(module, module.computations[each.named("calls")], number)
    return array.bytes


def _used(module: Module, fused: Computation, number: int) -> float:
    """Bytes that a fused computation reads of a parameter, no more than all of it."""
    parameter = fused.parameter(number)
    views, size = _views(module, fused, parameter), parameter.arrays[0].bytes
    if fused.root in views:
        return size
    total = sum(
        _read(module, each, place, fused.by_name[name].arrays[0])
        for each in fused.by_name.values()
        for place, name in enumerate(each.operands)
        if name in views and each.name not in views
    )
    return min(total, size)


def _views(module: Module, fused: Computation, parameter: Instruction) -> set[str]:
    """The instructions that are a parameter as it is, under another shape at most."""
    names = {parameter.name}
    for each in fused.by_name.values():  # operands come first
        for place, name in enumerate(each.operands):
            if name in names and _shows(module, each, place):
                names.add(each.name)
    return names


def _shows(module: Module, each: Instruction, place: int) -> bool:
    if each.opcode != "fusion":
        return each.opcode in _VIEWS
    inner = module.computations[each.named("calls")]
    return inner.root in _views(module, inner, inner.parameter(place))


def _written(module: Module, computation: Computation, each: Instruction) -> float:
    sizes = _results(module, computation, each)
    if each.opcode == "copy-start":
        return each.arrays[0].moved
    if each.opcode.endswith("-start") and each.opcode != "all-reduce-start":
        return each.arrays[1].moved
    return sum(size * array.is_main for size, array in zip(sizes, each.arrays, strict=False))


def _results(module: Module, computation: Computation, each: Instruction) -> list[float]:
    """Bytes written of every array of the result, in whatever memory."""
    if each.opcode in _UPDATES:
        return [computation.by_name[each.operands[_UPDATES[each.opcode]]].arrays[0].bytes]
    if each.opcode == "fusion":
        fused = module.computations[each.named("calls")]
        return _results(module, fused, fused.by_name[fused.root])
    if each.opcode in ("bitcast", "reshape") and each.operands:
        return _results(module, computation, computation.by_name[each.operands[0]])
    if each.opcode == "tuple":
        of = (computation.by_name[name] for name in each.operands)
        return list(itertools.chain(*(_results(module, computation, one) for one in of)))
    if "AsyncCollectiveStart" in each.attributes:  # (operand, result, ...)
        return [0.0, each.arrays[1].bytes]
    return [array.bytes for array in each.arrays]


def _flops(module: Module, computation: Computation, each: Instruction) -> float:
    if each.opcode == "fusion":
        fused = module.computations[each.named("calls")]
        return sum(_flops(module, fused, inner) for inner in fused.by_name.values())
    if each.opcode == "dot":
        left = computation.arrays(each)[0]
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        axes = map(int, filter(None, found[1].split(","))) if found else ()
        return 2.0 * each.arrays[0].size * math.prod(left.dims[axis] for axis in axes)
    if each.opcode == "convolution":
        return _convolution(each, *computation.arrays(each)[:2])
    return 0.0


def _convolution(each: Instruction, left: Array, right: Array) -> float:
    """FLOP of a convolution, as which a TPU's compiler writes products."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        raise ValueError(f"{each.name} has no dim_labels")
    arrays = (left, right, each.arrays[0])
    sizes = [
        dict(zip(label, array.dims, strict=True))
        for label, array in zip(labels.groups(), arrays, strict=True)
    ]
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    options = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
    total = 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for axis in sorted(set(sizes[1]) - {"i", "o"}):
        of_axis = {name: value.split("x")[int(axis)] for name, value in options.items()}
        left_size, right_size, out_size = (size[axis] for size in sizes)
        total *= _pairs(left_size, right_size, out_size, of_axis)
    return total


def _pairs(left: int, right: int, out: int, window: dict[str, str]) -> int:
    """How many (place of the output, place of the kernel) meet a value and no padding."""
    stride, dilation, spread = (
        int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(out)[:, None] * stride + np.arange(right) * spread - before
    is_met = (place >= 0) & (place <= (left - 1) * dilation) & (place % dilation == 0)
    return int(is_met.sum())
