"""Do the runs fit? Every program, compiled for TPU slices of 16 chips.

    python benchmarks/plan_table.py [--config NAME]... [--topology v5e:4x4]... [--tokens T]...

By default aspo_math_1p5b at three row lengths; another config at its own, unless ``--tokens`` says.

Needs libtpu (`pip install 'aspo_jax[tpu]'`) and no TPU. One plan takes one to four minutes on two
cores. A row of T tokens holds one sequence: a prompt of 2,048 and a response of T - 2,047 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys

import jax
from machine import header, table

from aspo_jax.config import read_config
from aspo_jax.parts import FACTORIES
from aspo_jax.plan import Plan, gib, plan, report

DEFAULT = "aspo_math_1p5b"
TOPOLOGIES = ("v5e:4x4", "v6e:4x4", "v5p:2x2x4", "v4:2x2x4")
TOKENS = (8192, 16384, 34816)


def planned(config_name: str, topology: str, tokens: int | None) -> Plan:
    """The plan of the config with rows of so many tokens; None: of the config's."""
    argv = ["--config", config_name]
    if tokens is not None:
        prompt = 2048
        for name, value in {
            "Train.row_tokens": tokens,
            "Sampler.max_prompt_tokens": prompt,
            "Sampler.max_response_tokens": tokens - prompt,
        }.items():
            argv += ["--set", f"{name}={value}"]
    return plan(read_config(argv, FACTORIES), topology)


def summary(plans: list[Plan]) -> str:
    """One line a plan; memory of each program with all that lies beside it, GiB per chip."""
    lines = []
    for found in plans:
        update = found.rows[0]
        seconds = sum(row.memory.compile_seconds for row in found.rows if row.memory)
        lines.append(
            [
                found.programs.config.name,
                found.topology.name,
                f"{found.capacity.tokens:,}",
                gib(found.topology.chip.memory),
                *(f"{'' if row.memory else '>= '}{gib(row.needed)}" for row in found.rows),
                f"{found.capacity.sequences:,}",
                f"{update.seconds:.1f}",
                f"{seconds:.0f}",
                "fits" if found.fits else "does not fit",
            ]
        )
    names = [row.program for row in plans[0].rows]
    titles = ["config", "topology", "row tokens", "memory", *names]
    titles += ["room for sequences", "update, s at least", "compiling, s", "verdict"]
    return table(titles, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plans as one table.")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--topology", action="append", default=[])
    parser.add_argument("--tokens", action="append", type=int, default=[])
    a = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    command = f"python benchmarks/plan_table.py {shlex.join(sys.argv[1:])}".strip()
    print(header("Plans", command, ("jax", "jaxlib", "libtpu", "optax")), flush=True)
    plans = []
    for config in a.config or [DEFAULT]:
        lengths = a.tokens or (TOKENS if config == DEFAULT else [None])
        for topology, tokens in itertools.product(a.topology or TOPOLOGIES, lengths):
            plans.append(planned(config, topology, tokens))
            print(f"```\n{report(plans[-1])}\n```\n", flush=True)
    print(summary(plans))
    return 0


if __name__ == "__main__":
    sys.exit(main())
