"""The programs of a run as functions and shapes: no weights, no tokenizer, no data, no devices.

What `aspo_jax.plan` compiles and the tests lower is what `aspo_jax.train` runs: network, goal,
optimizer and sizes come from the builders of `aspo_jax.build`. Only head and sampler are made here,
for those need a tokenizer: every id may be drawn and one ends a response, which changes no shape.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax import hub, losses
from aspo_jax.build import build_shape, check_shares
from aspo_jax.compiler import Options
from aspo_jax.config import Config, ConfigError
from aspo_jax.config.reading import config_folder
from aspo_jax.data import CHARACTERS, build_character_tokenizer
from aspo_jax.head import Head
from aspo_jax.learner import Learner, Teacher, build_learner
from aspo_jax.model import (
    Attention,
    Model,
    ModelConfig,
    batch_sharding,
    parse_model_config,
    read_model_config,
    trained_part,
)
from aspo_jax.model.lora import attach, detach
from aspo_jax.model.quantised import int8_shapes
from aspo_jax.model.sharding import placed
from aspo_jax.origin import locate, locate_teacher
from aspo_jax.parts import (
    build_gate,
    build_goal,
    build_limits,
    build_optimizer,
    build_sampling_network,
    has_teacher,
)
from aspo_jax.policy import build_lora, build_network, fewest_sequences, new_shape
from aspo_jax.rows import BatchShape, fill
from aspo_jax.sampler import Limits, PagedSampler, make_publish
from aspo_jax.structs import Minibatch, OldPolicy, TrainState

UPDATE, SCORE, PREFILL, DECODE = "update", "old and reference log-probs", "prefill", "decode"


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments, with their shardings."""

    function: Any
    arguments: tuple[Any, ...]

    def lower(self, platform: str | None = None) -> Any:
        """The program in StableHLO, for the devices of its mesh or for a platform by name."""
        traced = self.function.trace(*self.arguments)
        if platform is None:
            return traced.lower()
        # "gpu" stands for those of them that are here; CUDA's lowering needs none.
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))


class Shape(NamedTuple):
    """A network's shape and where it was read."""

    config: ModelConfig
    source: str


class Programs(NamedTuple):
    """What a run executes, the config it comes from, and the shapes of what it is given.

    mesh, local: devices of the update, and of one host, on which it samples.
    platform: of the devices. batch: micro-batches of an update.
    state, frozen, reference, minibatch: of the update. The frozen weights are None where all are
        trained; the reference, which may be them, is None where no rule reads it.
    teacher, teacher_shape: its weights and network; None where no rule reads it.
    options: of the compiler, for the update.
    weights, cache, limits: of one host's sampler.
    """

    by_name: dict[str, Program]
    config: Config
    shape: ModelConfig
    mesh: Any
    local: Any
    platform: str
    attention: Attention
    batch: BatchShape
    state: TrainState
    frozen: Any
    reference: Any
    teacher: Any
    teacher_shape: ModelConfig | None
    minibatch: Minibatch
    options: Options
    weights: Any
    cache: Any
    limits: Limits

    @property
    def hosts(self) -> int:
        """Hosts that share ``Sampler.slots``."""
        return self.mesh.size // self.local.size

    @property
    def shares_weights(self) -> bool:
        """Whether the sampler runs on the trainer's own frozen weights; see `make_publish`."""
        is_own = self.mesh.shape == self.local.shape and self.platform != "cpu"
        c = self.config
        return (
            is_own
            and self.frozen is not None
            and not c.lora.is_merged
            and self.frozen["embed"].dtype == c.model.dtype
        )

    @property
    def has_reference(self) -> bool:
        """Whether a rule reads the frozen reference policy."""
        return self.reference is not None


def read_shape(config: Config) -> Shape:
    """The shape of ``Model.path``: from its folder or the hub, else the packaged one of its name.

    Raises:
        ConfigError: none of them has it; lists the packaged ones.
        ModelFolderError: a config.json that asks for what we lack.
    """
    if config.model.path is None:
        vocabulary = len(build_character_tokenizer(CHARACTERS))
        return Shape(new_shape(config, vocabulary), "the config's own sizes")

    def ask() -> tuple[str, str]:
        found = locate(config, config.run_folder)
        return str(found.model_folder), found.policy_source()

    return _shape("Model.path", config.model.path, ask)


def read_teacher_shape(config: Config) -> Shape | None:
    """The shape of ``Teacher.path``, as `read_shape` finds it; None: no rule reads a teacher.

    Raises:
        ConfigError, ModelFolderError: as `read_shape`; see `aspo_jax.parts.has_teacher`.
    """
    if not has_teacher(config, build_goal(config)):
        return None

    def ask() -> tuple[str, str]:
        found = locate_teacher(config, config.run_folder)
        return str(found.teacher_folder), found.teacher_source()

    return _shape("Teacher.path", str(config.teacher.path), ask)


def _shape(setting: str, path: str, ask: Callable[[], tuple[str, str]]) -> Shape:
    """The shape of a model; ask: the hub for its folder, and what to call it."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return Shape(read_model_config(folder), str(folder / "config.json"))
    name = None if folder.exists() else hub.parse_name(path, setting)
    doubt = f"{folder} has no config.json"
    if name:
        try:
            place, source = ask()
            return Shape(read_model_config(place), f"{source} of the hub")
        except hub.HubError as error:
            doubt = str(error)
    stem = name.repo.partition("/")[2] if name else folder.name
    shapes = config_folder() / "shapes"
    for like in (stem, stem.removesuffix("-Instruct")):  # tuned, not reshaped
        if (packaged := shapes / f"{like}.json").is_file():
            shape = parse_model_config(json.loads(packaged.read_text()), str(packaged))
            return Shape(shape, f"the packaged shape {packaged.name}, since {doubt}")
    known = ", ".join(sorted(path.stem for path in shapes.glob("*.json")))
    raise ConfigError(
        f"{setting} = {path!r}: no config.json there, and no packaged shape is named {stem!r}; "
        "set it to a model folder, to a name on the hub, or to a folder named as one of "
        f"{known}{f'. {doubt}' if name else ''}"
    )


def programs(
    config: Config,
    shape: ModelConfig,
    mesh: Any,
    local: Any,
    platform: str,
    teacher_shape: ModelConfig | None = None,
) -> Programs:
    """Every program of a run.

    Args:
        shape: of the network.
        mesh: the training mesh; real, described or abstract devices.
        local: the mesh of one host's devices, on which it samples its share of ``Sampler.slots``.
        platform: of the devices: cpu, gpu or tpu.
        teacher_shape: of the teacher; None: no rule reads one.

    Raises:
        ConfigError: prompts, rows or slots do not split over hosts or devices.
        MeshError, AttentionError: as `aspo_jax.build.build_network`.
    """
    hosts = mesh.size // local.size
    check_shares(config, mesh, hosts)
    model = build_network(config, shape, mesh, config.train.row_tokens, platform)
    goal, lora = build_goal(config), build_lora(config)
    optimizer = build_optimizer(config, trained_part(model, lora).axes)[0]
    teacher, teacher_weights = _teacher(config, teacher_shape, mesh, platform)
    batch = build_shape(config, fewest_sequences(model, teacher and teacher.model), hosts)
    head = _head(config, shape, mesh)
    gate = build_gate(config, goal)
    learner = build_learner(model, head, goal, optimizer, mesh, teacher, lora, gate)
    frozen = _frozen(config, model, mesh)
    minibatch, has_reference = _minibatch(batch, mesh), losses.reads(goal.objective, "ref_logp_BT")
    reference = (frozen or _weights(model, "bfloat16", mesh)) if has_reference else None
    like = minibatch.rows.advantage_BT
    old = OldPolicy(
        like,
        None if gate else like,
        ref_logp_BT=like if has_reference else None,
        teacher_logp_BT=like if teacher else None,
        old_square_BT=like if losses.reads(goal.objective, "old_square_BT") else None,
    )
    scored = dataclasses.replace(minibatch, old=old)
    is_scored = not gate or has_reference or teacher is not None
    score = _score(learner, frozen, reference, minibatch, teacher_weights)
    sampler, weights = _sampler(config, model, local, platform, hosts)
    prefill, decode = sampler.shapes()
    return Programs(
        by_name={
            UPDATE: Program(learner.step, (learner.state, scored, frozen)),
            **({SCORE: score} if is_scored else {}),
            PREFILL: Program(sampler.prefill, (weights, *prefill)),
            DECODE: Program(sampler.decode, (weights, *decode)),
        },
        config=config,
        shape=shape,
        mesh=mesh,
        local=local,
        platform=platform,
        attention=model.attention,
        batch=batch,
        state=learner.state,
        frozen=frozen,
        reference=reference,
        teacher=teacher_weights,
        teacher_shape=teacher_shape,
        minibatch=scored,
        options=learner.options,
        weights=weights,
        cache=decode[0],
        limits=sampler.limits,
    )


def _weights(model: Model, dtype: str, mesh: Any) -> Any:
    """Shapes of a network's weights in a type."""
    shapes = placed(jax.eval_shape(model.init, jax.random.key(0)), model.shardings(mesh))
    return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), shapes)


def _frozen(config: Config, model: Model, mesh: Any) -> Any:
    """Shapes of the weights that adapters are trained beside; None: there are none."""
    if (lora := build_lora(config)) is None:
        return None
    if lora.is_int8:
        return int8_shapes(model.config, mesh)
    return _weights(model, config.frozen_dtype, mesh)


def _score(
    learner: Learner, frozen: Any, reference: Any, minibatch: Minibatch, teacher: Any
) -> Program:
    """The program of the old policy; a reference that is part of the policy is given once."""
    if frozen is None:
        given = (learner.state.params, reference, minibatch, teacher)
        return Program(learner.old_policy, given)

    def score(params, minibatch, teacher):
        own = None if reference is None else detach(params)
        return learner.old_policy(params, own, minibatch, teacher)

    return Program(jax.jit(score), (attach(learner.state.params, frozen, 1.0), minibatch, teacher))


def _teacher(
    config: Config, shape: ModelConfig | None, mesh: Any, platform: str
) -> tuple[Teacher | None, Any]:
    """The network of a teacher and the shapes of its weights."""
    if shape is None:
        return None, None
    model = build_network(config, shape, mesh, config.train.row_tokens, platform)
    weights = _weights(model, config.teacher.dtype, mesh)
    return Teacher(model, _head(config, shape, mesh)), weights


def _head(config: Config, shape: ModelConfig, mesh: Any) -> Head:
    allowed_V = np.ones(shape.vocab_size, bool)
    return Head(config.sampler.temperature, allowed_V, config.train.head_chunk, mesh)


def _minibatch(batch: BatchShape, mesh: Any) -> Minibatch:
    """Shapes of one update's rows, of the types that `aspo_jax.rows` writes."""
    rows = batch_sharding(mesh, leading=1)
    size = (batch.microbatches, batch.rows, batch.row_tokens)

    def of(x: Any) -> jax.ShapeDtypeStruct:
        if x.ndim < 3:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ShapeDtypeStruct(size, x.dtype, sharding=rows)

    return jax.tree.map(of, fill([], batch._replace(minibatches=1, microbatches=1, rows=1)))


def _sampler(
    config: Config, network: Model, local: Any, platform: str, hosts: int
) -> tuple[PagedSampler, Any]:
    """The sampler of one host and the shapes of the weights that are published to it.

    network: of the update.
    """
    shape, lora = network.config, None if config.lora.is_merged else build_lora(config)
    model = build_sampling_network(config, shape, local, platform)
    limits = build_limits(config, local, hosts, (0,), platform)
    publish = make_publish(model, local, local, config.model.dtype, lora)
    head, seed = _head(config, shape, local), config.run.seed
    sampler = PagedSampler(model, head, limits, local, seed=seed, publish=publish)
    part = trained_part(network, lora)
    trained = jax.eval_shape(part.init, jax.random.key(0))
    frozen = None if lora is None else _frozen(config, network, local)
    published = jax.eval_shape(lambda *both: publish.arrange(part.whole(*both)), trained, frozen)
    return sampler, placed(published, publish.shardings)
