"""What a run needs of a chip, all weights trained or adapters: `python benchmarks/lora_memory.py`.

By formula, as `aspo_jax.plan --lower-only` does: lower bounds, of every model and topology the
program that needs most, on the mesh of fsdp and tensor axes where that is least. The sizes are
those of `own_data` but for what is printed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aspo_jax.config import read_config
from aspo_jax.model.sharding import abstract_mesh, local_sizes
from aspo_jax.parts import FACTORIES
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


class Need(NamedTuple):
    """Bytes per chip of the program that needs most, its name, and ``Runtime.tensor``."""

    bytes: float
    program: str
    tensor: int


def needed(model: str, place: Topology, settings: Sequence[str], tensor: int) -> Need:
    own = (f"Model.path={model}", f"Runtime.fsdp={place.size // tensor}", "Runtime.data=1")
    words = (*SIZES, *own, f"Runtime.tensor={tensor}", *settings)
    flags = [word for setting in words for word in ("--set", setting)]
    config = read_config(["--config", "own_data", *flags], FACTORIES)
    meshes = (1, place.size // tensor, tensor), local_sizes(place.host().size, tensor)
    shape = read_shape(config).config
    mesh, local = map(abstract_mesh, meshes)
    of = programs(config, shape, mesh, local, place.chip.platform)
    least = {name: budget.least for name, budget in budgets(of).items()}
    worst = max(least, key=lambda name: least[name])
    return Need(least[worst], worst, tensor)


def cell(model: str, topology: str, settings: Sequence[str]) -> str:
    place = parse_topology(topology)
    heads = read_shape(read_config(["--set", f"Model.path={model}"], FACTORIES)).config.kv_heads
    tensors = [n for n in (1, 2, 4) if not (place.host().size % n or heads % n)]
    best = min(needed(model, place, settings, tensor) for tensor in tensors)
    mesh = f", tensor {best.tensor}" if best.tensor > 1 else ""
    shown = f"{best.bytes / GIB:.1f} {best.program}{mesh}"
    return shown if best.bytes <= place.chip.memory else f"({shown})"


def main() -> None:
    print("sizes:", ", ".join((*SIZES, *LORA)))
    print("GiB per chip at least, and of which program; in brackets: does not fit\n")
    print(f"| model | trained | {' | '.join(TOPOLOGIES)} |")
    print("|---|---|" + "---|" * len(TOPOLOGIES))
    for model in MODELS:
        for name, settings in (("all", ()), ("adapters", LORA)):
            cells = [cell(model, topology, settings) for topology in TOPOLOGIES]
            print(f"| {model} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
