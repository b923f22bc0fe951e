"""What a run needs of a chip: all weights trained, adapters, adapters beside int8 weights.

    python benchmarks/lora_memory.py [--compile] [--model NAME]... [--topology v5e:2x2]...

Every number is that of the program that needs most, on the mesh of fsdp and tensor axes where that
is least by formula. The sizes are those of `own_data` but for what is printed first. By itself all
is by formula, as `aspo_jax.plan --lower-only` does: lower bounds, in seconds. ``--compile`` has the
programs of TPUs compiled (libtpu, no TPU; minutes a row), and GPUs by formula all the same.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
from machine import header, table

from aspo_jax.config import Config, read_config
from aspo_jax.model.sharding import abstract_mesh, local_sizes
from aspo_jax.parts import FACTORIES
from aspo_jax.plan import plan
from aspo_jax.planning.budget import budgets
from aspo_jax.planning.programs import programs, read_shape
from aspo_jax.planning.topology import GIB, Topology, parse_topology

MODELS = ("Qwen2.5-1.5B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B")
TOPOLOGIES = ("h100:1", "h100:8", "v5e:2x2", "v5e:2x4", "v5e:4x4")
SIZES = (
    "Objective.penalties=['kl_penalty']",
    "Sampler.max_prompt_tokens=1024",
    "Sampler.max_response_tokens=3072",
    "Train.row_tokens=4096",
    "Train.rows_per_microbatch=16",
    "Train.head_chunk=512",
    "Sampler.slots=16",
)
LORA = ("Lora.rank=32", "Lora.alpha=32.0", "Lora.is_merged=False")
TRAINED = {"all": (), "adapters": LORA, "beside int8": (*LORA, "Lora.weights='int8'")}


class Need(NamedTuple):
    """Bytes per chip of the program that needs most, its name, and ``Runtime.tensor``."""

    bytes: float
    program: str
    tensor: int
    is_compiled: bool = False

    def cell(self, place: Topology) -> str:
        mesh = f", tensor {self.tensor}" if self.tensor > 1 else ""
        at_least = "" if self.is_compiled else ">= "
        shown = f"{at_least}{self.bytes / GIB:.1f} {self.program}{mesh}"
        return shown if self.bytes <= place.chip.memory else f"({shown})"


def read(model: str, place: Topology, settings: Sequence[str], tensor: int = 1) -> Config:
    own = (f"Model.path={model}", f"Runtime.fsdp={place.size // tensor}", "Runtime.data=1")
    words = (*SIZES, *own, f"Runtime.tensor={tensor}", *settings)
    flags = [word for setting in words for word in ("--set", setting)]
    return read_config(["--config", "own_data", *flags], FACTORIES)


def by_formula(model: str, place: Topology, settings: Sequence[str], tensor: int) -> Need:
    config = read(model, place, settings, tensor)
    meshes = (1, place.size // tensor, tensor), local_sizes(place.host().size, tensor)
    mesh, local = map(abstract_mesh, meshes)
    of = programs(config, read_shape(config).config, mesh, local, place.chip.platform)
    least = {name: budget.least for name, budget in budgets(of).items()}
    worst = max(least, key=lambda name: least[name])
    return Need(least[worst], worst, tensor)


def needed(model: str, place: Topology, settings: Sequence[str], is_compiled: bool) -> Need:
    """On the mesh that needs least by formula; what is too much by that is not compiled."""
    heads = read_shape(read(model, place, settings)).config.kv_heads
    tensors = [n for n in (1, 2, 4) if not (place.host().size % n or heads % n)]
    best = min(by_formula(model, place, settings, tensor) for tensor in tensors)
    if not is_compiled or best.bytes > place.chip.memory:
        return best
    worst = plan(read(model, place, settings, best.tensor), place).worst
    return Need(worst.needed, worst.program, best.tensor, worst.state == "compiled")


def row(model: str, topology: str, is_asked: bool) -> list[str]:
    place = parse_topology(topology)
    is_compiled = is_asked and place.chip.platform == "tpu"
    cells = [needed(model, place, x, is_compiled).cell(place) for x in TRAINED.values()]
    return [topology, model, *cells, "compiled" if is_compiled else "formula"]


def main() -> int:
    parser = argparse.ArgumentParser(description="What a run needs of a chip, full and adapters.")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--topology", action="append", default=[])
    a = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    command = f"python benchmarks/lora_memory.py {shlex.join(sys.argv[1:])}".strip()
    print(header("Adapters: memory", command, ("jax", "jaxlib", "libtpu")))
    print("sizes:", ", ".join((*SIZES, *LORA)), flush=True)
    rows = []
    for topology in a.topology or TOPOLOGIES:
        for model in a.model or MODELS:
            rows.append(row(model, topology, a.compile))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print("GiB per chip, and of which program; in brackets: does not fit, >=: by formula, at least")
    print(table(("topology", "model", *TRAINED, "how"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
