"""Will it fit, without the hardware: compile every program of a run for a named topology.

    python -m aspo_jax.plan --config configs/aspo_math_1p5b.gin --topology v5e:4x4

Topologies: v4, v5e, v5p and v6e with a torus (`v5e:4x4`; needs libtpu, `pip install
'jax[tpu]'`), a100, h100 and h200 with a count (`h100:8`; needs jax-cuda12-plugin), `cpu:8` for
simulated devices. ``--lower-only`` stops before the compilers and needs neither. ``--advise``
searches mesh, rows, remat policy, chunk and slots, and prints those of the fastest run that fits.

Exit status: 0 fits, 1 does not, 2 a mistake in the arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from aspo_jax.config import Config, config_flags, read
from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.model.sharding import abstract_mesh, device_mesh, local_sizes, mesh_sizes
from aspo_jax.parts import FACTORIES
from aspo_jax.planning.advice import Candidate, Search, changed
from aspo_jax.planning.budget import (
    PUBLISHED,
    Budget,
    Capacity,
    Part,
    budgets,
    cache_bytes,
    offloaded_bytes,
)
from aspo_jax.planning.programs import (
    DECODE,
    PREFILL,
    Program,
    Programs,
    programs,
    read_shape,
    read_teacher_shape,
)
from aspo_jax.planning.topology import GIB, GPU_NOTE, Chip, Topology, open_devices, parse_topology

ADVISED = 3  # settings that are compiled until some fit
OFFLOAD_NOTES = {
    "cpu": "Optim.offload saves nothing on a CPU, whose memory is the host's",
    "gpu": "no GPU has tried Optim.offload, and without one the CUDA compiler counts the optimizer "
    "state as the device's all through the update, which may need that much less",
}
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
    memory: None unless compiled.
    own: bytes that the program takes by itself, if the compiler said so.
    """

    program: str
    state: str
    budget: Budget
    chip: Chip
    memory: Memory | None = None
    own: float = 0.0

    @property
    def needed(self) -> float:
        """Bytes with all that lies beside the program; a lower bound unless compiled."""
        return max(self.own + self.budget.beside, self.budget.least)

    @property
    def fits(self) -> bool:
        """Whether that is there, and the compiler does not refuse."""
        return self.state != "refused" and self.needed <= self.chip.memory

    @property
    def parts(self) -> list[Part]:
        """What the bytes are, largest first."""
        known = [part for part in (*self.budget.held, *self.budget.added) if part.bytes]
        rest = self.needed - sum(part.bytes for part in known)
        known.append(Part("other temporaries", rest, self.budget.remedy))
        return sorted(known, key=lambda part: -part.bytes)

    @property
    def seconds(self) -> float:
        """Time of one call, no faster than the chip's arithmetic and memory."""
        return max(self.budget.work.times(self.chip).values())

    @property
    def bound(self) -> str:
        """Which of the two takes longer: "compute", or "memory" for weights, activations, cache."""
        times = self.budget.work.times(self.chip)
        return max(times, key=lambda kind: times[kind])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Whether a config's run fits a topology, and why.

    programs: their config is the run's but for an attention that needs the hardware to compile.
    source: where the model's shape, and the teacher's, was read.
    rows: one per program.
    """

    topology: Topology
    programs: Programs
    source: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def worst(self) -> Row:
        """The program that needs most memory, or does not fit."""
        return max(self.rows, key=lambda row: (not row.fits, row.needed))

    @property
    def fits(self) -> bool:
        """Whether every program fits, as far as it was compiled."""
        return self.worst.fits

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
        name = row.program + (", refused by the compiler," if row.state == "refused" else "")
        limit = gib(row.chip.memory)
        need = f"{name} needs {bound}{gib(row.needed)} of {limit} GiB per chip"
        largest = f"largest: {part.name}, {gib(part.bytes)} GiB"
        if not self.fits:
            return f"does not fit: {need}; {largest}; {part.remedy}"
        return f"{'fits' if self.is_certain else 'may fit'}: {need}; {largest}"

    @property
    def capacity(self) -> Capacity:
        """Sequences that could decode at once in what the rest leaves of the memory, less headroom.

        Temporaries of the compiled decode program are taken to grow with the sequences.

        Raises:
            ValueError: an engine decodes elsewhere.
        """
        decode = next((row for row in self.rows if row.program == DECODE), None)
        if decode is None:
            raise ValueError("the plan has no decode program, for an engine samples")
        s, share = self.programs.config.sampler, self.programs.local.shape["tensor"]
        chips = self.topology.size
        size = cache_bytes(self.programs)
        if decode.memory:
            size += decode.memory.temporaries * chips / (s.slots * share)
        held = sum(part.bytes for part in decode.budget.held)
        free = decode.chip.memory * (1 - HEADROOM) - held
        sequences = max(int(free / size), 0) * chips // share
        return Capacity(sequences, s.max_prompt_tokens + s.max_response_tokens, size)


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
        TopologyError: an unknown topology, or one without its compiler.
        ConfigError, MeshError, AttentionError, ModelFolderError: the config cannot run there.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    platform = topology.chip.platform
    devices = () if lower_only else open_devices(topology)
    config, notes = _for_compiler(config, platform)
    if config.optim.offload and platform in OFFLOAD_NOTES:
        notes = (OFFLOAD_NOTES[platform], *notes)
    if platform == "gpu" and devices:
        notes = (GPU_NOTE, *notes)
    shape, r = read_shape(config), config.runtime
    sizes = mesh_sizes(topology.size, data=r.data, fsdp=r.fsdp, tensor=r.tensor)
    own = local_sizes(topology.host().size, sizes[-1])
    teacher = read_teacher_shape(config)
    meshes = abstract_mesh(sizes), abstract_mesh(own)
    of = programs(config, shape.config, *meshes, platform, teacher and teacher.config)
    # An engine samples in memory of its own.
    left_out = (PREFILL, DECODE) if config.sampler.engine else ()
    rows = [
        Row(name, "estimated", it, topology.chip)
        for name, it in budgets(of).items()
        if name not in left_out
    ]
    if all(row.fits for row in rows):
        of = of if lower_only else _on_devices(of, devices, topology)
        attempt = functools.partial(_lowered if lower_only else _compiled, of)
        rows = _tried(rows, attempt, on_row)
    source = f"{shape.source}; teacher: {teacher.source}" if teacher else shape.source
    return Plan(topology, of, source, tuple(rows), notes)


class Advice(NamedTuple):
    """The fastest settings whose run fits, their plan, and how many were searched."""

    best: Candidate
    plan: Plan
    tried: int


def advise(
    config: Config,
    topology: str | Topology,
    *,
    lower_only: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Advice:
    """Search a run's settings by formula, and compile the best, `ADVISED` of them until one fits.

    See `aspo_jax.planning.advice`, and `plan` for the arguments. The plan of the last does not fit
    where none did.

    Raises:
        UserError: no speed is known of the chips, or nothing fits by formula.
        TopologyError, ConfigError, ModelFolderError: see `plan`.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    teacher = read_teacher_shape(config)
    compiled, _ = _for_compiler(config, topology.chip.platform)
    shape = read_shape(config).config
    search = Search(compiled, shape, topology, teacher and teacher.config)
    found = None
    for best in itertools.islice(search, ADVISED):
        it = changed(config, best.settings)
        it = plan(it, topology, lower_only=lower_only, on_row=on_row)
        found = Advice(best, it, search.tried)
        if found.plan.fits:
            break
        worst = found.plan.worst
        search.refuse(best, worst.program, worst.needed)
    if found is None:
        raise UserError(
            f"--advise: none of {search.tried:,} settings fits {topology.name} by formula; take "
            "more chips, train adapters alone (Lora.rank), or lower Train.row_tokens and "
            "Sampler.max_response_tokens"
        )
    return found


def _for_compiler(config: Config, platform: str) -> tuple[Config, tuple[str, ...]]:
    """The config with an attention that can be compiled without the hardware."""
    if platform != "gpu" or config.model.attention != "cudnn":
        return config, ()
    model = dataclasses.replace(config.model, attention="pallas")
    note = "the run would use cuDNN's attention, which needs a GPU to compile: pallas stands for it"
    return dataclasses.replace(config, model=model), (note,)


def _on_devices(of: Programs, devices: Sequence[Any], topology: Topology) -> Programs:
    """The same programs on devices that they can be compiled for."""
    host = topology.host()
    own = devices if host == topology else open_devices(host)
    mesh = device_mesh(devices, tuple(of.mesh.shape.values()))
    local = device_mesh(own, tuple(of.local.shape.values()))
    return programs(of.config, of.shape, mesh, local, of.platform, of.teacher_shape)


def _tried(
    rows: Sequence[Row], attempt: Callable[[Row], Row], on_row: Callable[[Row], None]
) -> list[Row]:
    """The rows, attempted in the order of their need until one does not fit."""
    found = {row.program: row for row in rows}
    for row in sorted(rows, key=lambda row: -row.needed):
        found[row.program] = row = attempt(row)
        on_row(row)
        if not row.fits:
            break
    return list(found.values())


def _lowered(of: Programs, row: Row) -> Row:
    of.by_name[row.program].lower(of.platform)
    return dataclasses.replace(row, state="lowered")


def _compiled(of: Programs, row: Row) -> Row:
    try:
        memory = _compile(of.by_name[row.program])
    except jax.errors.JaxRuntimeError as error:
        asked = parse_exhausted(str(error))
        if asked is None:
            raise
        return dataclasses.replace(row, state="refused", own=asked)
    return dataclasses.replace(row, state="compiled", memory=memory, own=memory.peak)


def _compile(program: Program) -> Memory:
    begin = time.monotonic()
    stats = program.lower().compile().memory_analysis()
    # The compilers' own peak leaves temporaries out on a CPU; elsewhere it is this sum, but that
    # it counts the host's memory too.
    own = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
    counted = 0 if stats.host_argument_size_in_bytes else stats.peak_memory_in_bytes
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes,
        peak=max(counted, stats.argument_size_in_bytes + own),
        compile_seconds=time.monotonic() - begin,
    )


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


# --- what is printed --------------------------------------------------------------------------

_HEADER = (
    *("program", "arguments", "temporaries", "output", "peak", "beside it", "in all"),
    *("TFLOP", "seconds", "bound by", "calls"),
)


def table(found: Plan) -> str:
    """The rows as a Markdown table; sizes in GiB, all per chip."""
    lines = [_HEADER, ("---", *["---:"] * (len(_HEADER) - 1)), *map(_cells, found.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    m = row.memory
    sizes = (m.arguments, m.temporaries, m.output, m.peak) if m else ()
    shown = [gib(size) for size in sizes] or ["-"] * 4
    at_least = "" if m else ">= "
    return (
        row.program,
        *shown,
        gib(row.budget.beside),
        f"{at_least}{gib(row.needed)}",
        f"{row.budget.work.flops / 1e12:,.4g}",
        *(("-", "-") if math.isnan(row.seconds) else (f"{row.seconds:.3g}", row.bound)),
        f"{row.budget.work.calls:,}",
    )


def report(found: Plan) -> str:
    """Everything that a user wants to know, as text."""
    of, topology = found.programs, found.topology
    said = of.options.said
    mesh = " ".join(f"{axis}={size}" for axis, size in of.mesh.shape.items())
    held = {part.name: part.bytes for row in found.rows for part in row.parts}
    shown = ", ".join(f"{name} {gib(size)}" for name, size in held.items() if size > GIB / 1000)
    return "\n".join(
        [
            f"{of.config.name} on {topology.name}: {topology.size} x {gib(topology.chip.memory)} "
            f"GiB, mesh {mesh}, sampling on {of.hosts} host(s) of {of.local.size}",
            f"model: {found.source}",
            f"attention: {of.attention.name} ({of.attention.reason})",
            *(["compiler options of the update: " + said] if said else []),
            *(f"note: {note}" for note in found.notes),
            "",
            table(found),
            "",
            "GiB per chip; 'beside it': what else lies in memory then; one call with every row "
            "full, and for decode one position with the cache full; seconds: no faster than the "
            "chip's arithmetic and memory, communication left out.",
            f"parts: {shown}",
            *_offloaded(of),
            _sampler(found, held.get(PUBLISHED, 0.0)),
            *_duration(found),
            found.verdict,
        ]
    )


def _offloaded(of: Programs) -> list[str]:
    """What lies in the host's memory; nothing where all is the devices'."""
    size = offloaded_bytes(of)
    if not size:
        return []
    shares = f"{gib(size)} GiB per chip, {gib(size * of.local.size)} per host"
    moved = "each update brings it to the chip and back, which 'seconds' leaves out"
    return [f"host memory: optimizer state {shares}; {moved}"]


def _sampler(found: Plan, weights: float) -> str:
    settings = found.programs.config.sampler
    if settings.engine:
        return f"sampler: {settings.engine}, an engine whose memory and time are not counted here"
    room = found.capacity
    return (
        f"sampler: room for {room.sequences:,} sequences of {room.tokens:,} tokens at once, "
        f"{gib(room.bytes_per_sequence)} GiB each, beside weights for sampling of "
        f"{gib(weights)} GiB and {HEADROOM:.0%} headroom; Sampler.slots = {settings.slots:,}"
    )


def _duration(found: Plan) -> list[str]:
    """How long an iteration takes; nothing for a CPU, of which no speed is known."""
    seconds = {row.program: row.seconds * row.budget.work.calls for row in found.rows}
    total, more = sum(seconds.values()), found.programs.config.train.refill_rounds
    if math.isnan(total):
        return [f"refill: an iteration may sample {1 + more} times as much"] if more else []
    line = f"an iteration: at least {total / 3600:.2f} h if every answer is of full length"
    if not more:
        return [line]
    total += more * (seconds.get(PREFILL, 0.0) + seconds.get(DECODE, 0.0))
    return [line, f"refill: {total / 3600:.2f} h where all {more} more rounds are sampled"]


def advised(advice: Advice) -> str:
    """The settings as lines of a config."""
    best, state = advice.best, "fit" if advice.plan.is_certain else "may fit"
    if not advice.plan.fits:
        state = "do not fit, nor did any others that were tried"
    return "\n".join(
        [
            "",
            f"# The fastest of {advice.tried:,} settings by formula, exchanges between chips "
            f"included: at least {best.seconds / 3600:.2f} h an iteration. They {state}.",
            *(f"{name} = {value!r}" for name, value in best.settings.items()),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser("plan", __doc__)
    config_flags(parser)
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:4x4, h100:8")
    parser.add_argument(
        "--lower-only", action="store_true", help="no compiler: lower, and reckon by formula"
    )
    parser.add_argument(
        "--advise",
        action="store_true",
        help="search mesh, rows, remat, chunk and slots for the shortest iteration that fits",
    )
    a = parser.parse_args(argv)
    # The machine's own accelerator, if there is one, is left alone.
    jax.config.update("jax_platforms", "cpu")

    def command() -> int:
        config, how = read(a, FACTORIES), {"lower_only": a.lower_only, "on_row": _progress}
        advice = advise(config, a.topology, **how) if a.advise else None
        found = advice.plan if advice else plan(config, a.topology, **how)
        print(report(found))
        if advice:
            print(advised(advice))
        return 0 if found.fits else 1

    return run_command(command)


def _progress(row: Row) -> None:
    seconds = f" in {row.memory.compile_seconds:.0f} s" if row.memory else ""
    print(f"{row.program}: {row.state}{seconds}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
