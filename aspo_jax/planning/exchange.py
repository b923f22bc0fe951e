"""What chips exchange in a compiled program, and how much of that no chip waits for.

An optimized module is scheduled: the order of its text is the order in which a chip begins. So an
exchange that is begun by one line and awaited by a later one runs beside the arithmetic between
them. Its time is its bytes by the speed of the links, that of arithmetic its FLOP by the chip's
peak, and exchanges but for those between neighbours follow each other: an estimate, for real
products are slower and hide more, and real links have latencies.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from aspo_jax.planning.hlo import Computation, Instruction, Module, Step
from aspo_jax.planning.topology import Topology

# Bytes that a chip takes from n - 1 others, of each byte that it gives.
_TAKEN = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1,
    "collective-permute": lambda n: 1,
}


class Exchange(NamedTuple):
    """One collective operation, and how often it runs.

    kind: its opcode. element: its type, such as ``bf16``.
    bytes: that a chip takes from others; seconds: of that; exposed: of these, those in which a chip
        waits. All of one time.
    is_begun_early: it is begun by one instruction and awaited by another.
    """

    kind: str
    element: str
    bytes: float
    seconds: float
    exposed: float
    times: float
    is_begun_early: bool


def exchanges(module: Module, found: Iterable[Step], topology: Topology) -> list[Exchange]:
    """Every exchange of a scheduled module, whose steps are those of `hlo.steps`."""
    run = _Run(module, topology)
    run.follow(found, 1.0)
    run.exchanges += [each for each, _ in run.begun.values()]  # never awaited in the text: exposed
    return run.exchanges


def hidden_share(found: Iterable[Exchange]) -> float:
    """Of the seconds of all exchanges, those in which no chip waits; NaN: there are none."""
    found = list(found)
    seconds = sum(each.times * each.seconds for each in found)
    exposed = sum(each.times * each.exposed for each in found)
    return 1 - exposed / seconds if seconds else math.nan


@dataclasses.dataclass
class _Run:
    """A chip that goes through the schedule.

    now: its time, in seconds. free: when the links are. begun: what is under way, and its end.
    """

    module: Module
    topology: Topology
    now: float = 0.0
    free: float = 0.0
    begun: dict[str, tuple[Exchange, float]] = dataclasses.field(default_factory=dict)
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)

    def follow(self, found: Iterable[Step], times: float) -> None:
        for step in found:
            parts = list(_parts(self.module, step))
            for part in parts:
                if part.is_begin:
                    self._begin(part, times)
            if step.item:
                self.now += step.item.flops / self.topology.chip.flops
            if not parts:
                self._repeat(step, times)
            for part in parts:
                if part.is_end:
                    self._await(part.key)

    def _repeat(self, step: Step, times: float) -> None:
        """Follow a loop's body once, and let as much time pass as all its turns take."""
        before = self.now
        self.follow(step.inner, times * step.trips)
        more = (step.trips - 1) * (self.now - before)
        self.now += more
        if self.free > before:
            self.free += more

    def _begin(self, part: _Part, times: float) -> None:
        kind, given = part.kind, part.around.arrays(part.instruction)
        count = _group(part.instruction, self.topology.size)
        moved = sum(array.bytes for array in given) * _TAKEN[kind](count)
        seconds, start = moved / self._speed(kind), self.now
        if kind != "collective-permute":
            start = max(self.now, self.free)
            self.free = start + seconds
        is_begun_early = not part.is_end
        each = Exchange(kind, given[0].kind, moved, seconds, seconds, times, is_begun_early)
        self.begun[part.key] = each, start + seconds

    def _speed(self, kind: str) -> float:
        """B/s. A neighbour of a torus is behind one of its links."""
        sides = 2 * self.topology.chip.dimensions if kind == "collective-permute" else 0
        return self.topology.links / (sides or 1)

    def _await(self, key: str) -> None:
        if key not in self.begun:
            return
        each, end = self.begun.pop(key)
        exposed = min(max(end - self.now, 0.0), each.seconds)
        self.exchanges.append(each._replace(exposed=exposed))
        self.now = max(self.now, end)


class _Part(NamedTuple):
    """A beginning, an end or the whole of an exchange; key: of what is under way."""

    kind: str
    instruction: Instruction
    around: Computation
    key: str
    is_begin: bool
    is_end: bool


def _parts(module: Module, step: Step) -> Iterator[_Part]:
    """What an instruction has to do with exchanges."""
    each, around = step.instruction, step.around
    opcode, whole = each.opcode, each.opcode.removesuffix("-start").removesuffix("-done")
    if opcode == "fusion":
        yield from _fused(module, each.named("calls"))
    elif opcode == "async-start":
        for kind in (inner.instruction.opcode for inner in step.inner):
            if kind in _TAKEN:
                yield _Part(kind, each, around, each.name, is_begin=True, is_end=False)
    elif opcode == "async-done" or (whole in _TAKEN and opcode.endswith("-done")):
        yield _Part(opcode, each, around, _begin_of(around, each), is_begin=False, is_end=True)
    elif whole in _TAKEN:
        yield _Part(whole, each, around, each.name, is_begin=True, is_end=opcode == whole)


def _begin_of(around: Computation, each: Instruction) -> str:
    """The name of the instruction whose end this one is."""
    while each.opcode.endswith(("-done", "-update")):
        each = around.by_name[each.operands[0]]
    return each.name


def _fused(module: Module, name: str) -> Iterator[_Part]:
    """The exchanges of a fusion.

    A TPU's products carry on an exchange that an earlier fusion began and a later one ends; all of
    them repeat it, with its channel.
    """
    fused = module.computations[name]
    for each in fused.by_name.values():
        if each.opcode == "fusion":
            yield from _fused(module, each.named("calls"))
        if each.opcode not in _TAKEN:
            continue
        uses = [x for x in fused.by_name.values() if each.name in x.operands]
        is_begin, is_end = (
            any(f"AsyncCollective{which}" in x.attributes for x in uses)
            for which in ("Start", "Done")
        )
        if name.startswith("async_collective_fusion") and not is_begin and not is_end:
            continue
        if not is_begin and not is_end:
            is_begin = is_end = True
        channel = re.search(r"channel_id=(\d+)", each.attributes)
        key = f"channel {channel[1]}" if channel else each.name
        yield _Part(each.opcode, each, fused, key, is_begin, is_end)


def _group(each: Instruction, chips: int) -> int:
    """How many chips exchange among themselves, of the three ways to write it; else all."""
    text = each.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return chips
