"""Do the compiled programs move and compute what they must, and no more? No accelerator needed.

    python benchmarks/lean.py [--chip v5e]... [--model 4B]... [--only decode]... [--tokens 8192]...

Each program is compiled for a named chip, and its optimized HLO is read: bytes and FLOP with loops
counted by their trips (`aspo_jax.planning.hlo`), beside the least there is (`aspo_jax.planning.
budget`: weights once, each row's live pages once, activations as `Model.remat` says). All figures
are per chip and for one call: one token of 128 full rows, one prefill, one mini-batch.

What chips exchange with each other is read too (`aspo_jax.planning.exchange`): GB that each takes
from others, and of the time that takes the share that arithmetic of the schedule hides.

The slice is the smallest (of ``--chips`` and more) whose memory has room for the arguments, or for
the least that an update needs. Needs libtpu (`pip install 'aspo_jax[tpu]'`) for v5e and v6e, and
jax-cuda12-plugin for h100, whose programs are compiled with neither cuDNN nor cuBLAS for want of a
GPU. A kernel is counted by what it is written to do. ``--worst N`` lists what moves most without a
product, ``--exchanges`` each kind of exchange, ``--keep FOLDER`` keeps the programs' text.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from machine import header, table

from aspo_jax.config import read_config
from aspo_jax.head import chunk_tokens
from aspo_jax.model.sharding import abstract_mesh, device_mesh
from aspo_jax.parts import FACTORIES
from aspo_jax.planning.budget import budgets, chip_tokens, shard_bytes
from aspo_jax.planning.exchange import Exchange, exchanges, hidden_share
from aspo_jax.planning.flops import causal_pairs
from aspo_jax.planning.hlo import Array, Instruction, Item, Kernel, flat, parse, steps
from aspo_jax.planning.programs import (
    DECODE,
    PREFILL,
    SCORE,
    UPDATE,
    Programs,
    programs,
    read_shape,
)
from aspo_jax.planning.topology import Topology, open_devices, parse_topology

MODELS = {"1.5B": "Qwen2.5-1.5B", "4B": "Qwen3-4B"}
SLICES = {
    **dict.fromkeys(("v5e", "v6e"), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "h100": ("1", "2", "4", "8", "16", "32", "64"),
}
ONLY = {"decode": DECODE, "prefill": PREFILL, "score": SCORE, "update": UPDATE}
TOKENS = {DECODE: (2048, 8192, 32768), PREFILL: (2048,), SCORE: (8192, 34816)}
TOKENS[UPDATE] = TOKENS[SCORE]
ROWS = 128  # decoded at once, on all chips together
FULL = 0.85  # of the memory, that arguments may take
LARGE = 2**20  # bytes from which an array counts as one that should not be made
# Of each visible pair: scores and values; scores, their gradient and the queries'; these two again,
# the keys' and the values'.
PRODUCTS = {"splash_mqa_fwd": 2, "splash_mqa_dq": 3, "splash_mqa_dkv": 4}
PRODUCTS |= {"mha_forward": 2, "mha_backward": 7}


class Case(NamedTuple):
    """tokens: of a training row, of a sequence in the cache, or of a prompt."""

    chip: str
    model: str
    program: str
    tokens: int


class Lean(NamedTuple):
    """A program beside the least. wasted: GB of what should not be there, by name."""

    case: Case
    chips: int
    items: list[Item]
    exchanges: list[Exchange]
    least_bytes: float
    least_flops: float
    wasted: dict[str, float]
    seconds: float

    @property
    def bytes(self) -> float:
        return sum(item.bytes for item in self.items)

    @property
    def flops(self) -> float:
        return sum(item.times * item.flops for item in self.items)

    @property
    def exchanged(self) -> float:
        """Bytes that a chip takes from others."""
        return sum(each.times * each.bytes for each in self.exchanges)


def settings(case: Case, chips: int) -> list[str]:
    """The run of a case: `aspo_math_1p5b` but for the model and its sizes."""
    prompt = case.tokens if case.program == PREFILL else min(2048, case.tokens // 2)
    response = max(case.tokens - prompt, 64)
    return [
        f"Model.path='{MODELS[case.model]}'",
        f"Train.row_tokens={-(-(prompt + response) // 128) * 128}",
        f"Train.rows_per_microbatch={chips}",
        f"Runtime.fsdp={chips}",
        f"Sampler.max_prompt_tokens={prompt}",
        f"Sampler.max_response_tokens={response}",
        f"Sampler.slots={ROWS}",
    ]


def built(case: Case, fewest: int = 1) -> tuple[Programs, Topology]:
    """The programs of a case on the smallest slice that has room for it, and that slice."""
    for shape in SLICES[case.chip]:
        topology = parse_topology(f"{case.chip}:{shape}")
        if topology.size < fewest:
            continue
        chips, words = topology.size, ["--config", "aspo_math_1p5b"]
        for setting in settings(case, chips):
            words += ["--set", setting]
        config = read_config(words, FACTORIES)
        described = read_shape(config).config, *_meshes(abstract_mesh, chips)
        of = programs(config, *described, topology.chip.platform)
        if _held(of, case.program) <= FULL * topology.chip.memory:
            devices = open_devices(topology)
            meshes = _meshes(lambda sizes: device_mesh(devices, sizes), chips)  # noqa: B023
            return programs(config, described[0], *meshes, topology.chip.platform), topology
    raise SystemExit(f"{case}: it has no room on {case.chip}:{SLICES[case.chip][-1]}")


def _meshes(make: Callable[[tuple[int, ...]], Any], chips: int) -> tuple[Any, Any]:
    """Of the update, and of the sampler: all chips are one host's."""
    return make((1, chips, 1)), make((chips, 1, 1))


def _held(of: Programs, program: str) -> float:
    """Bytes per chip that are there whatever the compiler does."""
    if program == UPDATE:
        return budgets(of)[program].least
    return shard_bytes(of.by_name[program].arguments)


def trips(of: Programs, program: str) -> tuple[float, ...]:
    """Of the loops whose trips only a run knows.

    Micro-batches, and the chunks of logits where every token is read; or tokens, and reads of one.
    """
    if program in (UPDATE, SCORE):
        tokens = chip_tokens(of)
        return of.batch.microbatches, math.ceil(
            tokens / chunk_tokens(of.config.train.head_chunk, tokens)
        )
    pages = of.limits.row_pages
    return of.limits.block, math.ceil(pages / (of.limits.read // of.limits.page))


def kernels(of: Programs) -> Kernel:
    """FLOP and bytes of the attention kernels, by what they are written to do."""

    def count(each: Instruction, arrays: list[Array]) -> tuple[float, float] | None:
        if "paged_attention" in each.source:
            return _in_place(of, arrays, each.arrays)
        of_pair = [n for name, n in PRODUCTS.items() if name in f"{each.name} {each.source}"]
        if not of_pair:
            return None
        # Blocks of keys that a query can see, or that are partly behind it.
        queries = next(array for array in arrays if len(array.dims) > 3)
        length = max(queries.dims[:-1])
        block = 64 if "mha" in each.source else math.gcd(length, 512)
        pairs = causal_pairs(length // block) * block**2
        moved = sum(array.moved for array in (*arrays, *each.arrays))
        return 2.0 * of_pair[0] * queries.size / length * pairs, moved

    return count


def _in_place(of: Programs, arrays: list[Array], out: Sequence[Array]) -> tuple[float, float]:
    """Every page of full rows once, as `aspo_jax.model.paged` reads them."""
    queries, keys, table = arrays[0], arrays[1], arrays[-2]
    rows, pages = table.dims
    positions = rows * pages * of.limits.page * keys.dims[0]
    width = queries.dims[-1]
    read = 2 * positions * width * keys.bytes / keys.size
    moved = sum(array.moved for array in (queries, table, *out))
    return 4.0 * positions * queries.dims[2] * width, read + moved


def wasted(found: list[Item], of: Programs) -> dict[str, float]:
    """GB of what should not be there, for programs of the sampler."""
    pool = shard_bytes(of.cache.key_EKYXSC)
    copied = gathered = sliced = 0.0
    for item in found:
        if item.written >= pool / 2:
            copied += item.bytes
        elif item.flops == 0 and item.written >= LARGE:
            gathered += item.bytes * ("gather" in item.instruction.source)
            sliced += item.bytes * ("dynamic_index_in_dim" in item.instruction.source)
    return {"cache copied": copied, "pages gathered": gathered, "weights sliced": sliced}


def measure(case: Case, fewest: int, keep: Path | None) -> Lean:
    """Compile the program of a case, and read it."""
    of, topology = built(case, fewest)
    begin = time.monotonic()
    text = of.by_name[case.program].lower().compile().as_text()
    seconds = time.monotonic() - begin
    if keep:
        name = f"{case.chip}_{case.model}_{case.program.partition(' ')[0]}_{case.tokens}.hlo"
        (keep / name).write_text(text)
    return read(case, of, topology, text, seconds)


def read(case: Case, of: Programs, topology: Topology, text: str, seconds: float) -> Lean:
    """What a compiled program does, beside the least."""
    module = parse(text)
    run = steps(module, trips(of, case.program), kernels(of))
    exchanged = exchanges(module, run, topology)
    found = list(flat(run))
    if case.program == DECODE:
        found = [item._replace(times=item.times / of.limits.block) for item in found]
        exchanged = [each._replace(times=each.times / of.limits.block) for each in exchanged]
    work = budgets(of)[case.program].work
    waste = wasted(found, of) if case.program in (DECODE, PREFILL) else {}
    sizes = work.traffic, work.flops
    return Lean(case, topology.size, found, exchanged, *sizes, waste, seconds)


def line(lean: Lean) -> list[str]:
    case, waste = lean.case, lean.wasted.values()
    return [
        f"{case.chip}, {case.model}, {case.program.partition(' ')[0]}",
        f"{case.tokens:,}",
        f"{lean.chips}",
        *(f"{x / 1e9:,.2f}" for x in (lean.bytes, lean.least_bytes)),
        f"{lean.bytes / lean.least_bytes:.2f}",
        *(f"{x / 1e12:,.2f}" for x in (lean.flops, lean.least_flops)),
        f"{lean.flops / lean.least_flops:.2f}",
        *(
            [f"{lean.exchanged / 1e9:,.2f}", f"{hidden_share(lean.exchanges):.0%}"]
            if lean.exchanges
            else ["-"] * 2
        ),
        *([f"{x / 1e9:.2f}" for x in waste] or ["-"] * 3),
        f"{lean.seconds:.0f}",
    ]


HEAD = (
    *("program", "tokens", "chips", "GB moved", "least", "ratio", "TFLOP", "least", "ratio"),
    *("exchanged, GB", "hidden"),
    *("cache copied, GB", "pages gathered, GB", "weights sliced, GB", "compiling, s"),
)


def worst(lean: Lean, count: int) -> str:
    """What moves most without a product: instructions of one origin and shape together."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in lean.items:
        if not item.flops:
            each = item.instruction
            shape = "x".join(map(str, each.arrays[0].dims))
            key = each.source[-60:] or each.name.rstrip(".0123456789"), each.opcode, shape
            groups.setdefault(key, []).append(item)
    ranked = sorted(groups.items(), key=lambda group: -sum(item.bytes for item in group[1]))
    rows = [
        [
            f"`{source}`",
            *(opcode, shape, f"{sum(item.times for item in found):g}"),
            *(
                f"{max(x) / 1e6:,.1f}"
                for x in zip(*((i.read, i.written) for i in found), strict=True)
            ),
            f"{sum(item.bytes for item in found) / 1e9:,.2f}",
        ]
        for (source, opcode, shape), found in ranked[:count]
    ]
    names = [
        "moves without a product",
        "what",
        "result",
        "times",
        "MB read",
        "written",
        "GB in all",
    ]
    return table(names, rows)


def exchange_table(lean: Lean) -> str:
    """Each kind of exchange: its bytes, the time they take, and what of it a chip waits for."""
    groups: dict[tuple[str, str, bool], list[Exchange]] = {}
    for each in lean.exchanges:
        groups.setdefault((each.kind, each.element, each.is_begun_early), []).append(each)

    def total(found: list[Exchange], of: Callable[[Exchange], float]) -> float:
        return sum(each.times * of(each) for each in found)

    rows = [
        [
            f"{kind}, {element}, {'begun early' if is_begun_early else 'at once'}",
            f"{total(found, lambda _: 1):g}",
            f"{total(found, lambda each: each.bytes) / 1e9:,.3f}",
            f"{total(found, lambda each: each.seconds) * 1e3:,.2f}",
            f"{total(found, lambda each: each.exposed) * 1e3:,.2f}",
        ]
        for (kind, element, is_begun_early), found in groups.items()
    ]
    return table(["exchange", "times", "GB", "ms", "ms exposed"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compiled programs beside the least.")
    parser.add_argument("--chip", action="append", choices=SLICES, default=[])
    parser.add_argument("--model", action="append", choices=MODELS, default=[])
    parser.add_argument("--only", action="append", choices=ONLY, default=[], help="a program")
    parser.add_argument("--tokens", action="append", type=int, default=[])
    parser.add_argument("--chips", type=int, default=1, help="no fewer than so many")
    parser.add_argument("--worst", type=int, default=0, help="how many instructions to list")
    parser.add_argument("--exchanges", action="store_true", help="list what chips exchange")
    parser.add_argument("--keep", type=Path, help="folder for the text of the programs")
    return parser.parse_args()


def cases(a: argparse.Namespace) -> Iterator[Case]:
    """What was asked for; by default everything."""
    for chip, model in itertools.product(a.chip or ("v5e", "v6e"), a.model or MODELS):
        for program in [ONLY[name] for name in a.only] or TOKENS:
            for tokens in TOKENS[program]:
                if not a.tokens or tokens in a.tokens:
                    yield Case(chip, model, program, tokens)


def main() -> None:
    a = arguments()
    jax.config.update("jax_platforms", "cpu")
    command = f"python benchmarks/lean.py {shlex.join(sys.argv[1:])}".strip()
    print(header("Lean programs", command, ("jax", "jaxlib", "libtpu")), flush=True)
    found = []
    for case in cases(a):
        found.append(measure(case, a.chips, a.keep))
        print(table(HEAD, [line(found[-1])]).splitlines()[-1], flush=True)
        if a.exchanges:
            print(f"\n{exchange_table(found[-1])}\n", flush=True)
        if a.worst:
            print(f"\n{worst(found[-1], a.worst)}\n", flush=True)
    print(f"\n{table(HEAD, [line(each) for each in found])}")


if __name__ == "__main__":
    main()
