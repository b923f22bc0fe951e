"""The programs of a run as functions and shapes: no weights, no tokenizer, no data, no devices.

What `aspo_jax.plan` compiles and the tests lower is what `aspo_jax.train` runs, made by the same
builders of `aspo_jax.build`.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax import losses
from aspo_jax.build import (
    build_goal,
    build_limits,
    build_network,
    build_optimizer,
    build_sampling_network,
    build_shape,
    check_shares,
    new_shape,
)
from aspo_jax.config import Config, ConfigError
from aspo_jax.config.reading import config_folder
from aspo_jax.data import CHARACTERS, build_character_tokenizer
from aspo_jax.head import Head
from aspo_jax.learner import build_learner
from aspo_jax.model import (
    Attention,
    Model,
    ModelConfig,
    batch_sharding,
    parse_model_config,
    read_model_config,
    shardings,
)
from aspo_jax.rollout import BatchShape, fill
from aspo_jax.sampler import PagedSampler, cast_matrices
from aspo_jax.structs import Minibatch, OldPolicy

UPDATE, SCORE, PREFILL, DECODE = "update", "old and reference log-probs", "prefill", "decode"


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments, with their shardings."""

    function: Any
    arguments: tuple[Any, ...]

    def lower(self, platform: str | None = None) -> Any:
        """The program in StableHLO, for the devices of its mesh or for a platform by name."""
        traced = self.function.trace(*self.arguments)
        return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()


class Shape(NamedTuple):
    """A network's shape and where it was read."""

    config: ModelConfig
    source: str


class Programs(NamedTuple):
    """What a run executes, and what of it is needed to reckon with.

    mesh, local: devices of the update, and of one host's sampler.
    platform: of the devices. batch: micro-batches of an update.
    has_reference: a rule reads the frozen reference policy.
    """

    by_name: dict[str, Program]
    mesh: Any
    local: Any
    platform: str
    attention: Attention
    batch: BatchShape
    has_reference: bool


def read_shape(config: Config) -> Shape:
    """The shape of ``Model.path``: from its folder, else the packaged one of the same name.

    Raises:
        ConfigError: neither exists; lists the packaged ones.
        ModelFolderError: a config.json that asks for what we lack.
    """
    if config.model.path is None:
        vocabulary = len(build_character_tokenizer(CHARACTERS))
        return Shape(new_shape(config, vocabulary), "the config's own sizes")
    folder = Path(config.model.path).expanduser()
    if (folder / "config.json").is_file():
        return Shape(read_model_config(folder), str(folder / "config.json"))
    packaged = config_folder() / "shapes" / f"{folder.name}.json"
    if packaged.is_file():
        raw = json.loads(packaged.read_text())
        source = f"the packaged shape {packaged.name}, since {folder} has no config.json"
        return Shape(parse_model_config(raw, str(packaged)), source)
    known = ", ".join(sorted(path.stem for path in packaged.parent.glob("*.json")))
    raise ConfigError(
        f"Model.path = {config.model.path!r}: no config.json there, and no packaged shape is named "
        f"{folder.name!r}; set it to a model folder, or to a folder named as one of {known}"
    )


def programs(
    config: Config, shape: ModelConfig, mesh: Any, local: Any, platform: str, hosts: int = 1
) -> Programs:
    """Every program of a run.

    Args:
        shape: of the network.
        mesh: the training mesh; real, described or abstract devices.
        local: the mesh of one host's devices, on which it samples.
        platform: of the devices: cpu, gpu or tpu.
        hosts: hosts that share ``Sampler.slots``.

    Raises:
        ConfigError: prompts, rows or slots do not split over hosts or devices.
        MeshError, AttentionError: as `aspo_jax.build.build_network`.
    """
    check_shares(config, mesh, hosts)
    model = build_network(config, shape, mesh, config.train.row_tokens, platform)
    goal = build_goal(config)
    has_reference = losses.reads(goal.objective, "ref_logp_BT")
    batch = build_shape(config, hosts)
    learner = build_learner(
        model, _head(config, shape, mesh), goal, build_optimizer(config)[0], mesh
    )
    params = abstract_params(model, mesh)
    reference = _cast(params, jnp.bfloat16) if has_reference else None
    minibatch = _minibatch(batch, mesh)
    old = _old_policy(minibatch, has_reference)
    by_name = {
        UPDATE: Program(learner.step, (learner.state, dataclasses.replace(minibatch, old=old))),
        SCORE: Program(learner.old_policy, (params, reference, minibatch)),
        **_sampling(config, shape, local, platform, hosts),
    }
    return Programs(by_name, mesh, local, platform, model.attention, batch, has_reference)


def _head(config: Config, shape: ModelConfig, mesh: Any) -> Head:
    allowed_V = np.ones(shape.vocab_size, bool)
    return Head(config.sampler.temperature, allowed_V, config.train.head_chunk, mesh)


def abstract_params(model: Model, mesh: Any) -> Any:
    """Shapes and shardings of the float32 parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    placed = shardings(mesh, model.partition_specs())
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )


def _cast(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), params)


def _minibatch(batch: BatchShape, mesh: Any) -> Minibatch:
    """Shapes of one update's rows, of the types that `aspo_jax.rollout` writes."""
    rows = batch_sharding(mesh, leading=1)
    size = (batch.microbatches, batch.rows, batch.row_tokens)

    def of(x: Any) -> jax.ShapeDtypeStruct:
        if x.ndim < 3:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ShapeDtypeStruct(size, x.dtype, sharding=rows)

    return jax.tree.map(of, fill([], batch._replace(minibatches=1, microbatches=1, rows=1)))


def _old_policy(minibatch: Minibatch, has_reference: bool) -> OldPolicy:
    like = minibatch.rows.advantage_BT
    return OldPolicy(like, like, like if has_reference else None)


def _sampling(
    config: Config, shape: ModelConfig, local: Any, platform: str, hosts: int
) -> dict[str, Program]:
    """Prefill and decode of one host, with weights as they are published to its sampler."""
    model = build_sampling_network(config, shape, local, platform)
    sampler = PagedSampler(
        model,
        _head(config, shape, local),
        build_limits(config, local, hosts, (0,), platform),
        local,
        seed=config.run.seed,
    )
    weights = published(abstract_params(model, local), config.model.dtype)
    prefill, decode = sampler.shapes()
    return {
        PREFILL: Program(sampler.prefill, (weights, *prefill)),
        DECODE: Program(sampler.decode, (weights, *decode)),
    }


def published(params: Any, dtype: Any) -> Any:
    """Shapes of the weights that the sampler holds."""
    return jax.tree.map(
        lambda x, cast: jax.ShapeDtypeStruct(x.shape, cast.dtype, sharding=x.sharding),
        params,
        jax.eval_shape(partial(cast_matrices, dtype=dtype), params),
    )
