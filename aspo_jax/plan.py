"""Will it fit, without the hardware: compile every program of a run for a named topology.

    python -m aspo_jax.plan --config configs/aspo_math_1p5b.gin --topology v5e:4x4

Topologies: v4, v5e, v5p and v6e with a torus (`v5e:4x4`; needs libtpu, `pip install
'jax[tpu]'`), a100, h100 and h200 with a count (`h100:8`; needs jax-cuda12-plugin), `cpu:8` for
simulated devices. ``--lower-only`` stops before the compilers and needs neither.

Exit status: 0 fits, 1 does not, 2 a mistake in the arguments.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Sequence

import jax

from aspo_jax.build import FACTORIES
from aspo_jax.config import Config, config_flags, read
from aspo_jax.errors import CommandParser, run_command
from aspo_jax.planning.budget import PUBLISHED, Budget, Capacity, Part, budgets, cache_bytes
from aspo_jax.planning.programs import DECODE, Program, Programs, programs, read_shape
from aspo_jax.planning.topology import (
    GIB,
    Target,
    Topology,
    abstract_mesh,
    device_mesh,
    mesh_sizes,
    open_target,
    parse_topology,
)

HEADROOM = 0.1  # of the memory, kept free for fragmentation and what the runtime itself needs


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the compiler says of one program, bytes per chip.

    peak: at the worst moment, with arguments and output.
    """

    arguments: int
    temporaries: int
    output: int
    peak: int
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One program of the run, per chip.

    state: "compiled", "lowered", "estimated" (by formula alone) or "refused" by the compiler.
    memory: None unless compiled. needed: bytes of the chip, with all that lies beside the program;
        a lower bound unless compiled.
    parts: what the bytes are, largest first.
    flops, seconds: of one call; the time in which the chip could do the arithmetic or move the
        weights, activations and cache, whichever is longer (``bound``).
    calls: per iteration.
    """

    program: str
    state: str
    memory: Memory | None
    beside: float
    needed: float
    parts: tuple[Part, ...]
    flops: float
    seconds: float
    bound: str
    calls: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Whether a config's run fits a topology, and why. ``rows``: one per program."""

    name: str
    topology: Topology
    mesh: dict[str, int]
    hosts: int
    model: str
    attention: str
    limit: float
    rows: tuple[Row, ...]
    capacity: Capacity | None
    slots: int
    notes: tuple[str, ...]

    @property
    def worst(self) -> Row:
        """The program that needs most memory."""
        return max(self.rows, key=lambda row: row.needed)

    @property
    def fits(self) -> bool:
        """Whether every program fits, as far as it was compiled."""
        return self.worst.needed <= self.limit

    @property
    def is_certain(self) -> bool:
        """Whether the verdict rests on compiled programs, or on a lower bound that is too much."""
        return not self.fits or all(row.state == "compiled" for row in self.rows)

    @property
    def verdict(self) -> str:
        """Fits or not, the largest consumer and, where it does not fit, what to change."""
        row = self.worst
        part = next(part for part in row.parts if part.remedy)
        bound = "" if row.state == "compiled" else "at least "
        need = f"{row.program} needs {bound}{gib(row.needed)} of {gib(self.limit)} GiB per chip"
        largest = f"largest: {part.name}, {gib(part.bytes)} GiB"
        if not self.fits:
            return f"does not fit: {need}; {largest}; {part.remedy}"
        return f"{'fits' if self.is_certain else 'may fit'}: {need}; {largest}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def plan(
    config: Config,
    topology: str | Topology,
    *,
    lower_only: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Plan:
    """Compile the run's programs for the topology, likely worst first, until one does not fit.

    What by formula alone is too much is not compiled at all.

    Args:
        topology: its name, or one with a chip of one's own.
        lower_only: lower the programs for the topology's platform without compiling them; memory
            is by formula then, and needs no compiler.
        on_row: called with each row as it is known.

    Raises:
        TopologyError: an unknown topology, one without its compiler, or a mesh that does not fit.
        ConfigError, MeshError, AttentionError, ModelFolderError: the config cannot run there.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    target = Target((), topology.chip.platform) if lower_only else open_target(topology)
    host, shape, r = topology.host(), read_shape(config), config.runtime
    sizes = mesh_sizes(topology.size, data=r.data, fsdp=r.fsdp, tensor=r.tensor)
    own = mesh_sizes(host.size, data=-1, fsdp=1, tensor=r.tensor)
    hosts = topology.size // host.size
    config, notes = _for_compiler(config, target.platform)
    of = programs(
        config, shape.config, abstract_mesh(sizes), abstract_mesh(own), target.platform, hosts
    )
    budget = budgets(config, shape.config, of)
    chip = topology.chip
    estimated = [_row(name, topology, budget[name], "estimated") for name in of.by_name]
    if all(row.needed <= chip.memory for row in estimated):
        if not lower_only:
            mesh = device_mesh(target.devices, sizes)
            devices = target.devices if host == topology else open_target(host).devices
            local = device_mesh(devices, own)
            of = programs(config, shape.config, mesh, local, target.platform, hosts)
        rows = _compiled(of, topology, budget, estimated, target if lower_only else None, on_row)
    else:
        rows = estimated
    return Plan(
        name=config.name,
        topology=topology,
        mesh=dict(of.mesh.shape),
        hosts=hosts,
        model=shape.source,
        attention=f"{of.attention.name} ({of.attention.reason})",
        limit=chip.memory,
        rows=tuple(rows),
        capacity=_capacity(config, of, topology, budget, rows),
        slots=config.sampler.slots,
        notes=(*target.notes, *notes),
    )


def _for_compiler(config: Config, platform: str) -> tuple[Config, tuple[str, ...]]:
    """The config with an attention that can be compiled without the hardware."""
    if platform != "gpu" or (config.train.pack and config.model.attention != "cudnn"):
        return config, ()
    model = dataclasses.replace(config.model, attention="pallas")
    note = "the run would use cuDNN's attention, which needs a GPU to compile: pallas stands for it"
    return dataclasses.replace(config, model=model), (note,)


def _row(
    name: str,
    topology: Topology,
    budget: Budget,
    state: str,
    memory: Memory | None = None,
    needed: float | None = None,
) -> Row:
    chip, work = topology.chip, budget.work
    times = {"compute": work.flops / chip.flops, "memory": work.traffic / chip.bandwidth}
    bound = max(times, key=lambda kind: times[kind])
    known = [part for part in (*budget.held, *budget.added) if part.bytes]
    needed = budget.least if needed is None else max(needed, budget.least)
    rest = needed - sum(part.bytes for part in known)
    known.append(Part("other temporaries", rest, OTHERS[name]))
    return Row(
        program=name,
        state=state,
        memory=memory,
        beside=budget.beside,
        needed=needed,
        parts=tuple(sorted(known, key=lambda part: -part.bytes)),
        flops=work.flops,
        seconds=times[bound],
        bound=bound,
        calls=work.calls,
    )


def _compiled(
    of: Programs,
    topology: Topology,
    budget: dict[str, Budget],
    estimated: Sequence[Row],
    lowered_for: Target | None,
    on_row: Callable[[Row], None],
) -> list[Row]:
    """The rows, compiled in the order of their need until one does not fit; or only lowered."""
    rows = {row.program: row for row in estimated}
    for name in sorted(rows, key=lambda name: -rows[name].needed):
        if lowered_for:
            of.by_name[name].lower(lowered_for.platform)
            rows[name] = dataclasses.replace(rows[name], state="lowered")
        else:
            rows[name] = _compile(name, of.by_name[name], topology, budget[name])
        on_row(rows[name])
        if rows[name].needed > topology.chip.memory:
            break
    return list(rows.values())


def _compile(name: str, program: Program, topology: Topology, budget: Budget) -> Row:
    begin = time.monotonic()
    try:
        stats = program.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        asked = parse_exhausted(str(error))
        if asked is None:
            raise
        return _row(name, topology, budget, "refused", needed=asked + budget.beside)
    # The compilers' own peak leaves temporaries out on a CPU; elsewhere it is this sum.
    own = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    peak = max(stats.peak_memory_in_bytes, stats.argument_size_in_bytes + own)
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes,
        peak=peak,
        compile_seconds=time.monotonic() - begin,
    )
    return _row(name, topology, budget, "compiled", memory, peak + budget.beside)


_SIZE = r"([\d.]+)\s?([KMGT]?)i?B?"
_EXHAUSTED = (
    rf"\({_SIZE}\) exceeds available HBM",
    rf"Used {_SIZE} of",
    rf"(?:allocate|allocating) {_SIZE}",
)


def parse_exhausted(message: str) -> float | None:
    """Bytes that a program asked for, from the compiler's error; None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _EXHAUSTED:
        if found := re.search(pattern, message):
            return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
    return 0.0


def _capacity(
    config: Config,
    of: Programs,
    topology: Topology,
    budget: dict[str, Budget],
    rows: Sequence[Row],
) -> Capacity:
    """Sequences that could decode at once in what the rest leaves of the memory, less headroom.

    Temporaries of the compiled decode program are taken to grow with the sequences.
    """
    memory = next(row.memory for row in rows if row.program == DECODE)
    tensor, chips = of.local.shape["tensor"], topology.size
    per_chip = config.sampler.slots * tensor / chips
    size = cache_bytes(of, of.local)
    size += memory.temporaries / per_chip if memory else 0.0
    free = topology.chip.memory * (1 - HEADROOM) - sum(part.bytes for part in budget[DECODE].held)
    tokens = config.sampler.max_prompt_tokens + config.sampler.max_response_tokens
    return Capacity(max(int(free / size), 0) * chips // tensor, tokens, size)


OTHERS = {
    "update": "lower Train.row_tokens, Train.rows_per_microbatch or Train.head_chunk",
    "old and reference log-probs": "lower Train.rows_per_microbatch or Train.head_chunk",
    "prefill": "lower Sampler.slots or Sampler.max_prompt_tokens",
    "decode": "lower Sampler.slots",
}


# --- what is printed --------------------------------------------------------------------------

_HEADER = (
    *("program", "arguments", "temporaries", "output", "peak", "beside it", "in all"),
    *("TFLOP", "seconds", "bound by", "calls"),
)


def table(found: Plan) -> str:
    """The rows as a Markdown table; sizes in GiB, all per chip."""
    lines = [_HEADER, ("---", *["---:"] * (len(_HEADER) - 1)), *map(_cells, found.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _cells(row: Row) -> tuple[str, ...]:
    m = row.memory
    sizes = (m.arguments, m.temporaries, m.output, m.peak) if m else ()
    shown = [gib(size) for size in sizes] or ["-"] * 4
    at_least = "" if m else ">= "
    return (
        row.program,
        *shown,
        gib(row.beside),
        f"{at_least}{gib(row.needed)}",
        f"{row.flops / 1e12:,.4g}",
        *(("-", "-") if math.isnan(row.seconds) else (f"{row.seconds:.3g}", row.bound)),
        f"{row.calls:,}",
    )


def report(found: Plan) -> str:
    """Everything that a user wants to know, as text."""
    chips = found.topology.size
    mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    held = {part.name: part for row in found.rows for part in row.parts}
    lines = [
        f"{found.name} on {found.topology.name}: {chips} x {gib(found.limit)} GiB, mesh {mesh}, "
        f"sampling on {found.hosts} host(s) of {chips // found.hosts}",
        f"model: {found.model}",
        f"attention: {found.attention}",
        *(f"note: {note}" for note in found.notes),
        "",
        table(found),
        "",
        "GiB per chip; 'beside it': what else lies in memory then; one call with every row full, "
        "and for decode one position with the cache full; seconds: no faster than the chip's "
        "arithmetic and memory, communication left out.",
        "parts: "
        + ", ".join(f"{p.name} {gib(p.bytes)}" for p in held.values() if p.bytes > GIB / 1000),
    ]
    if found.capacity:
        c = found.capacity
        lines.append(
            f"sampler: room for {c.sequences:,} sequences of {c.tokens:,} tokens at once, "
            f"{gib(c.bytes_per_sequence)} GiB each, beside weights for sampling of "
            f"{gib(held[PUBLISHED].bytes)} GiB and {HEADROOM:.0%} headroom; "
            f"Sampler.slots = {found.slots:,}"
        )
    total = sum(row.seconds * row.calls for row in found.rows)
    if not math.isnan(total):  # how fast a CPU is, is not known here
        lines += [f"an iteration: at least {total / 3600:.2f} h if every answer is of full length"]
    return "\n".join([*lines, found.verdict])


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m aspo_jax.plan",
        description=(__doc__ or "").partition("\n")[0],
    )
    config_flags(parser)
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:4x4, h100:8")
    parser.add_argument(
        "--lower-only", action="store_true", help="no compiler: lower, and reckon by formula"
    )
    a = parser.parse_args(argv)
    # The machine's own accelerator, if there is one, is left alone.
    jax.config.update("jax_platforms", "cpu")

    def command() -> int:
        config = read(a, FACTORIES)
        found = plan(config, a.topology, lower_only=a.lower_only, on_row=_progress)
        print(report(found))
        return 0 if found.fits else 1

    return run_command(command)


def _progress(row: Row) -> None:
    seconds = f" in {row.memory.compile_seconds:.0f} s" if row.memory else ""
    print(f"{row.program}: {row.state}{seconds}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
