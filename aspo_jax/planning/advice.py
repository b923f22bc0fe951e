"""Which mesh, rows, remat policy, chunk and slots make an iteration shortest on a topology.

By roofline: of each program the longest of its arithmetic, its memory's traffic and what fsdp and
data axes exchange, which overlap, and after it what the tensor axis exchanges, which does not:

    seconds = max(FLOP / peak, bytes / bandwidth, gathered / links) + reduced / links + collectives

Nothing here is compiled: `aspo_jax.plan` compiles what is best and tells `Search` what did not fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from aspo_jax.config import Config, ConfigError
from aspo_jax.errors import UserError
from aspo_jax.model import ModelConfig
from aspo_jax.model.decoder import REMAT
from aspo_jax.model.sharding import MeshError, abstract_mesh, local_sizes, row_shards
from aspo_jax.planning.budget import CACHE, Budget, Work, budgets, chip_tokens, one_pass
from aspo_jax.planning.flops import layer_weights
from aspo_jax.planning.programs import DECODE, PREFILL, SCORE, UPDATE, Programs, programs
from aspo_jax.planning.topology import Topology

TRAINING, SAMPLING = (UPDATE, SCORE), (PREFILL, DECODE)
ROWS = (1, 2, 4, 8, 16)  # of a micro-batch, on each share of the devices
CHUNKS = (512, 1024, 2048, 4096)
RESERVE = 2.0  # what an update adds to memory, as compiled, over what the formulas know of
COLLECTIVE_S = 1e-5  # of one exchange, however small


class Half(NamedTuple):
    """Settings of training or of sampling on one mesh: seconds of an iteration, bytes per chip."""

    settings: Mapping[str, Any]
    seconds: float
    needed: float


class Candidate(NamedTuple):
    """Settings of a whole run."""

    training: Half
    sampling: Half

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.training.settings, **self.sampling.settings}

    @property
    def seconds(self) -> float:
        """Of an iteration whose answers are all of full length, at least."""
        return self.training.seconds + self.sampling.seconds


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with ``Section.field`` set to other values."""
    for name, value in settings.items():
        section, _, field = name.partition(".")
        part = dataclasses.replace(getattr(config, section.lower()), **{field: value})
        config = dataclasses.replace(config, **{section.lower(): part})
    return config


class Search:
    """The settings that fit by formula, fastest first; `refuse` leaves out what does not after all.

    Iteration gives the same settings again until they are refused.

    Raises:
        UserError: of the topology's chips no speed is known.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelConfig,
        topology: Topology,
        teacher: ModelConfig | None = None,
    ):
        if math.isnan(topology.chip.flops):
            raise UserError(
                f"--advise: no speed is known of {topology.name}; name another topology"
            )
        self.tried = 0
        self._run = config, shape, topology, teacher
        self._halves = {sizes: self._on(sizes) for sizes in _meshes(topology)}

    def __iter__(self) -> Iterator[Candidate]:
        while found := [
            Candidate(min(training, key=_order), min(sampling, key=_order))
            for training, sampling in self._halves.values()
            if training and sampling
        ]:
            yield min(found, key=lambda it: (it.seconds, it.training.needed + it.sampling.needed))

    def refuse(self, it: Candidate, program: str, needed: float) -> None:
        """Leave out a candidate, one of whose programs needs so many bytes per chip as compiled.

        And what would not fit if the formulas were as far off for it.
        """
        sizes = tuple(it.settings[f"Runtime.{axis}"] for axis in ("data", "fsdp", "tensor"))
        which = int(program in SAMPLING)
        limit = it[which].needed * min(self._run[2].chip.memory / needed, 1.0)
        halves = list(self._halves[sizes])
        halves[which] = [half for half in halves[which] if half.needed < limit]
        self._halves[sizes] = halves[0], halves[1]

    def _on(self, sizes: tuple[int, int, int]) -> tuple[list[Half], list[Half]]:
        """What fits on one mesh."""
        config, *_ = self._run
        mesh = dict(zip(("Runtime.data", "Runtime.fsdp", "Runtime.tensor"), sizes, strict=True))
        training = (
            {"Train.rows_per_microbatch": rows, "Train.head_chunk": chunk, "Model.remat": remat}
            for rows in _rows(config, math.prod(sizes[:2]))
            for chunk, remat in itertools.product(CHUNKS, REMAT)
        )
        halves = [self._half({**mesh, **each}, TRAINING) for each in training]
        if config.sampler.engine:  # it samples elsewhere
            return [half for half in halves if half], [Half({}, 0.0, 0.0)]
        slots = [self._half({**mesh, "Sampler.slots": n}, SAMPLING) for n in _slots(config)]
        return [half for half in halves if half], [half for half in slots if half]

    def _half(self, settings: Mapping[str, Any], names: tuple[str, ...]) -> Half | None:
        config, shape, topology, teacher = self._run
        self.tried += 1
        of = _programs(changed(config, settings), shape, topology, teacher)
        if of is None:
            return None
        found = {name: budget for name, budget in budgets(of).items() if name in names}
        needed = max(map(_needed, found.values()))
        if needed > topology.chip.memory:
            return None
        seconds = sum(_seconds(of, name, it.work, topology) for name, it in found.items())
        return Half(settings, seconds, needed)


def _order(half: Half) -> tuple[float, float, float]:
    """Of equally fast settings those first that make fewer pieces, then those that need less."""
    return half.seconds, -half.settings.get("Train.head_chunk", 0), half.needed


def _meshes(topology: Topology) -> Iterator[tuple[int, int, int]]:
    """Sizes of data, fsdp and tensor axes; a tensor group lies within one machine."""
    host = topology.host().size
    for tensor in (n for n in range(1, host + 1) if host % n == 0):
        rest = topology.size // tensor
        for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield rest // fsdp, fsdp, tensor


def _rows(config: Config, shares: int) -> list[int]:
    """Of a micro-batch; no more than an update can fill."""
    t = config.train
    most = t.prompts_per_minibatch * t.samples_per_prompt
    return [shares * n for n in ROWS if n == 1 or shares * n <= most]


def _slots(config: Config) -> list[int]:
    """All sequences of an iteration at once, half of them, and so on."""
    count = config.train.prompts_per_step * config.train.samples_per_prompt
    return sorted({math.ceil(count / 2**n) for n in range(8)} | {config.sampler.slots})


def _programs(
    config: Config, shape: ModelConfig, topology: Topology, teacher: ModelConfig | None
) -> Programs | None:
    """The programs of a run; None where devices and sizes do not split."""
    r = config.runtime
    try:
        own = local_sizes(topology.host().size, r.tensor)
        meshes = abstract_mesh((r.data, r.fsdp, r.tensor)), abstract_mesh(own)
        return programs(config, shape, *meshes, topology.chip.platform, teacher)
    except (ConfigError, MeshError):
        return None


def _needed(it: Budget) -> float:
    """Bytes per chip, about: of the cache alone there is no more than the formula says."""
    grows = sum(part.bytes for part in it.added if part.name != CACHE)
    return it.least + (RESERVE - 1) * grows


def _seconds(of: Programs, name: str, work: Work, topology: Topology) -> float:
    gathered, reduced, collectives = exchanged(of, name)
    links = topology.links
    overlapped = max(*work.times(topology.chip).values(), gathered / links)
    return work.calls * (overlapped + reduced / links + collectives * COLLECTIVE_S)


def exchanged(of: Programs, name: str) -> tuple[float, float, int]:
    """What one call of a program exchanges with other chips, by formula.

    Returns:
        Bytes per chip that fsdp and data axes exchange: weights in the type of computation, once
        forward and once backward, and gradients in float32; those of the tensor axis: sums of
        hidden states, two a layer in each direction; and how often the latter.
    """
    shape, mesh = of.shape, of.mesh.shape
    data, fsdp, tensor = (mesh[axis] for axis in ("data", "fsdp", "tensor"))
    size = jnp.dtype(of.config.model.dtype).itemsize
    gathers, sums = {UPDATE: (2, 4), SCORE: (1, 2)}.get(name, (0, 2))
    if name in TRAINING:
        tokens, times = chip_tokens(of), of.batch.microbatches
    elif name == DECODE:
        tokens, times = of.limits.slots / row_shards(of.local), 1
    else:
        shards, bucket = row_shards(of.local), of.limits.buckets[-1]
        tokens, times = of.limits.together(bucket, shards) / shards * bucket, 1
    if name == UPDATE and not REMAT[of.config.model.remat].keeps_products:
        sums += 2
    gathered = gathers * one_pass(of, shape) * _others(fsdp)
    if name == UPDATE and of.frozen is None:
        gradients = 4 * (layer_weights(shape) + shape.vocab_size * shape.hidden_size) / tensor
        gathered += gradients * (_others(fsdp) + 2 * _others(data) / fsdp)
    reduced = 2 * sums * shape.layers * tokens * shape.hidden_size * size * _others(tensor)
    return times * gathered, times * reduced, times * sums * shape.layers * (tensor > 1)


def _others(axis: int) -> float:
    """The share that lies on other chips of an axis."""
    return (axis - 1) / axis
