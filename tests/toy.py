"""A tiny policy and made-up completions, for the tests of everything that runs on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from aspo_jax.head import Head
from aspo_jax.learner import Goal, Learner, build_learner
from aspo_jax.model import Lora, Model, ModelConfig, build_model, choose_attention
from aspo_jax.model.lora import init_adapter
from aspo_jax.model.parameters import Parameter, parameters
from aspo_jax.model.quantised import quantise
from aspo_jax.model.sharding import MESH_AXES
from aspo_jax.rows import BatchShape, Example, answered, fill
from aspo_jax.sampler import Completion
from aspo_jax.structs import Histogram, Max, Mean, Metrics, Minibatch

PAD, BOS, EOS = 0, 1, 2
VOCAB, TOKENIZER = 24, 22  # the last rows of the embedding belong to no token

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
)
# Lines of a config: the embedded task and its network, as small as they get.
TINY_CONFIG = """
Countdown.numbers = 2
Model.hidden_size = 32
Model.layers = 1
Model.heads = 2
Model.kv_heads = 1
Model.intermediate_size = 64
Sampler.slots = 16
Sampler.max_prompt_tokens = 8
Sampler.max_response_tokens = 8
Train.samples_per_prompt = 4
Train.row_tokens = 16
Train.rows_per_microbatch = 4
"""
IS_ALLOWED_V = np.isin(np.arange(VOCAB), [PAD, BOS, *range(TOKENIZER, VOCAB)], invert=True)
HEAD = Head(temperature=1.0, is_allowed_V=IS_ALLOWED_V, chunk=32)


def toy_model(**changes: Any) -> Model:
    """The tiny network; ``changes`` are fields of its config."""
    return build_model(dataclasses.replace(CONFIG, **changes))


def random_params(model: Model, seed: int = 0, scale: float = 0.3) -> Any:
    """Every leaf random, biases and norms too, so that no term is hidden by a zero or a one."""
    # RandomState, not Generator: its stream never changes, and golden numbers rest on it.
    rng = np.random.RandomState(seed)

    def leaf(path, x):
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (centre + scale * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0)))


def random_adapter(lora: Lora, config: ModelConfig, seed: int = 1) -> Any:
    """Neither ``a`` nor ``b`` is zero."""
    rng = np.random.RandomState(seed)
    shapes = jax.eval_shape(lambda key: init_adapter(config, lora, key), jax.random.key(0))
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def in_int8(params: Any, config: ModelConfig) -> Any:
    """The params as frozen weights in int8."""

    def of(entry: Parameter, stack: np.ndarray) -> dict[str, np.ndarray]:
        layers = [quantise(matrix, entry.reads) for matrix in stack]
        return {part: np.stack([layer[part] for layer in layers]) for part in ("kernel", "step")}

    rest = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    layers = dict(rest["layers"])
    for name, each in parameters(config)["layers"].items():
        if "kernel" in each:
            stack = params["layers"][name]["kernel"]
            layers[name] = layers[name] | of(each["kernel"], stack)
    return rest | {"layers": layers}


def assert_same(
    got: Mapping[Any, Completion], expected: Mapping[Any, Completion], logp_tolerance: float = 0.0
) -> None:
    """Completions, by the identity of their requests, are those that were expected."""
    for identity, completion in got.items():
        wanted = expected[identity]
        assert completion.tokens_T.tolist() == wanted.tokens_T.tolist(), identity
        assert completion.ending == wanted.ending, identity
        np.testing.assert_allclose(
            completion.logp_T, wanted.logp_T, rtol=0, atol=logp_tolerance, err_msg=str(identity)
        )


def toy_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first devices only, so that one session has meshes of several sizes."""
    sizes = (data, fsdp, tensor)
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def toy_learner(
    model: Model,
    goal: Goal,
    optimizer: Any,
    mesh: Mesh | None = None,
    remat: str = "dots",
    lora: Lora | None = None,
) -> Learner:
    """The update of a network on a mesh, with the attention and constraints that it has there."""
    mesh = mesh or toy_mesh()
    config = model.config
    attention = choose_attention(
        "cpu",
        head_dim=config.head_dim,
        row_tokens=32,
        packed=True,
        dtype=jnp.float32,
        mesh=mesh,
        name="dense" if mesh.size == 1 else "chunked",
    )
    on_mesh = build_model(config, remat=remat, attention=attention, mesh=mesh)
    return build_learner(on_mesh, HEAD._replace(mesh=mesh), goal, optimizer, mesh, lora=lora)


def on(mesh: Mesh, model: Model, params: Any) -> Any:
    """Parameters placed as the model wants them; copies, so that a donation costs no one else."""
    placed = jax.device_put(params, model.shardings(mesh))
    return jax.tree.map(lambda x: x.copy(), placed)


def examples(count: int = 10, seed: int = 0, longest: int = 15) -> list[Example]:
    """Made-up samples of two per prompt; lengths, advantages and sampler log-probs all differ."""
    rng = np.random.RandomState(seed)
    made = []
    for index in range(count):
        length = rng.randint(4, longest + 1)
        prompt = rng.randint(1, length - 1)
        tokens = rng.randint(EOS, TOKENIZER, length)
        advantage = float(rng.uniform(0.3, 2.0)) * (-1) ** index
        logp_T = -rng.exponential(1.0, length - prompt).astype(np.float32)
        made.append(
            answered(tokens[:prompt].tolist(), tokens[prompt:], logp_T, advantage, index // 2)
        )
    return made


def minibatch(made: list[Example], microbatches: int, rows: int, row_tokens: int) -> Minibatch:
    return fill(made, BatchShape(1, microbatches, rows, row_tokens))


def with_old(learner: Learner, params: Any, part: Minibatch, reference: Any = None) -> Minibatch:
    """The placed mini-batch together with what the update compares itself with."""
    return learner.with_old(params, reference, learner.place(part))


def quickly(function: Any, *arguments: Any) -> Any:
    """Call a jitted function, compiled without LLVM's optimisations: its results may round anew.

    For laws with a tolerance: what runs once costs its compilation.
    """
    return compiled_quickly(function, *arguments)(*arguments)


def compiled_quickly(function: Any, *arguments: Any) -> Any:
    """What `quickly` calls, for more than one call."""
    options: Any = {"xla_backend_optimization_level": 0}
    return function.lower(*arguments).compile(options)


def figures(report: Metrics) -> dict[str, Any]:
    """Metrics as they are reported: means, maxima and counts."""

    def value(metric):
        match metric:
            case Mean(total, count):
                return float(total) / max(float(count), 1e-30)
            case Max(x):
                return float(x)
            case Histogram(counts):
                return np.asarray(counts)

    return {name: value(metric) for name, metric in report.items()}


def bits(tree: Any) -> list[tuple[str, bytes]]:
    """Dtype and bytes of every leaf; two trees with equal bits hold the same, NaNs included."""
    return [(str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]
