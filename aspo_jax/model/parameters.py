"""The shape of a network, and every array of it declared once.

From this table follow the first values, logical axes (hence shardings, and what an optimizer takes
for a matrix), and what a Hugging Face folder calls and how it stores each array.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers

from aspo_jax.model.sharding import map_axes


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Rotary angles stretched for contexts beyond those of pre-training (arXiv 2309.00071, §3).

    factor: stretch of the slow angles.
    original_max_position: tokens of the longest context before the stretch.
    beta_fast, beta_slow: turns over that context above which an angle stays as it is, and below
        which it is divided by ``factor``; a linear ramp lies between.
    attention_factor: scale of cosine and sine; None: 0.1 ln(factor) + 1, the paper's.
    truncate: round the ramp's ends to whole angles, as published models do.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Rotary angles stretched as Llama 3.1 and later do (its published ``rope_type``).

    factor: stretch of the slow angles.
    low_turns, high_turns: turns over the original context up to which an angle is divided by
        ``factor``, and from which it stays as it is; linear in the turns between.
    original_max_position: tokens of the longest context before the stretch.
    """

    factor: float
    low_turns: float
    high_turns: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the network, as `config.json` of a Hugging Face folder gives it.

    What tells the families apart: Qwen2 has biases on q, k and v (``qkv_bias``), Qwen3 has none
    and normalises each head of q and k (``qk_norm``), Llama has neither.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_position: int = 32_768
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_scaling: Yarn | Llama3 | None = None


Dim = tuple[str, int]  # a logical axis and its size


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the params, without the layer axis, and its tensor in a Hugging Face folder.

    name: the tensor's, with ``{y}`` for the layer.
    dims: of the array: ``[what it reads, what it writes]``.
    init: first values, drawn in the `flat` shape.
    reads: how many of the dims a matrix or table reads; 0: a vector.
    """

    name: str
    dims: tuple[Dim, ...]
    init: initializers.Initializer
    reads: int = 0

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.dims)

    @property
    def ours(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(size for _, size in self.dims)

    @property
    def flat(self) -> tuple[int, ...]:
        """The same with heads and head width side by side."""
        both = (self.ours[: self.reads], self.ours[self.reads :])
        return tuple(map(math.prod, both if self.reads else both[1:]))

    @property
    def is_layered(self) -> bool:
        return "{y}" in self.name

    @property
    def is_transposed(self) -> bool:
        """Whether the tensor is ``[out, in]``, as those of all matrices of layers are."""
        return self.is_layered and self.reads > 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return self.flat[::-1] if self.is_transposed else self.flat

    def names(self, layers: int) -> list[str]:
        """The names of all its layers, or its one name."""
        return [self.name.format(y=y) for y in range(layers if self.is_layered else 1)]

    def draw(self, key: Any) -> Array:
        """First values of one layer."""
        return self.init(key, self.flat, jnp.float32).reshape(self.ours)


def parameters(config: ModelConfig) -> dict[str, Any]:
    """A tree shaped as the params, without the layer axis, whose leaves are `Parameter`."""
    c = config
    V, D, F = ("vocab", c.vocab_size), ("embed", c.hidden_size), ("mlp", c.intermediate_size)
    H, K, C = ("heads", c.heads), ("kv_heads", c.kv_heads), ("head_dim", c.head_dim)
    layer = "model.layers.{y}."

    def linear(name: str, reads: tuple[Dim, ...], writes: tuple[Dim, ...], has_bias: bool = False):
        # Standard deviation 1/sqrt(fan in): 0.025 at width 1,536, and right for small models too.
        init = initializers.lecun_normal()
        kernel = Parameter(f"{layer}{name}.weight", (*reads, *writes), init, len(reads))
        bias = Parameter(f"{layer}{name}.bias", writes, initializers.zeros)
        return {"kernel": kernel} | ({"bias": bias} if has_bias else {})

    def scale(name: str, width: int = c.hidden_size) -> Parameter:
        return Parameter(name, (("norm", width),), initializers.ones)

    def table(name: str) -> Parameter:
        return Parameter(name, (V, D), initializers.normal(c.hidden_size**-0.5), 1)

    inside = {
        "attention_norm": {"scale": scale(layer + "input_layernorm.weight")},
        "q": linear("self_attn.q_proj", (D,), (H, C), c.qkv_bias),
        "k": linear("self_attn.k_proj", (D,), (K, C), c.qkv_bias),
        "v": linear("self_attn.v_proj", (D,), (K, C), c.qkv_bias),
        "o": linear("self_attn.o_proj", (H, C), (D,)),
        "mlp_norm": {"scale": scale(layer + "post_attention_layernorm.weight")},
        "gate": linear("mlp.gate_proj", (D,), (F,)),
        "up": linear("mlp.up_proj", (D,), (F,)),
        "down": linear("mlp.down_proj", (F,), (D,)),
    }
    for name in ("q_norm", "k_norm") if c.qk_norm else ():
        inside[name] = {"scale": scale(f"{layer}self_attn.{name}.weight", c.head_dim)}
    tree = {
        "embed": table("model.embed_tokens.weight"),
        "layers": inside,
        "norm": scale("model.norm.weight"),
    }
    return tree if c.tie_embeddings else tree | {"head": table("lm_head.weight")}


def init_params(config: ModelConfig, is_stacked: bool, key: Array) -> Any:
    """The params of a new network, float32."""
    keys = dict(zip(("embed", "head", "layers"), jax.random.split(key, 3), strict=True))

    def draw(path: Any, parameter: Parameter) -> Array:
        if not parameter.is_layered:
            return parameter.draw(keys.get(path[0].key))
        return draw_layers(parameter, path[1].key, config.layers, keys["layers"])

    params = jax.tree_util.tree_map_with_path(draw, parameters(config))
    return params if is_stacked else unstack(params)


def draw_layers(parameter: Parameter, name: str, layers: int, key: Array) -> Array:
    """First values of all layers."""
    # By its name, so that one array more changes no other; the 1 is that of the first models.
    digest = hashlib.sha1(name.encode() + b"\x01").digest()
    number = np.uint32(int.from_bytes(digest[:4], "big"))
    of_layer = jax.random.split(key, layers)
    return jax.vmap(lambda key: parameter.draw(jax.random.fold_in(key, number)))(of_layer)


def unstack(params: Any) -> Any:
    """Params whose layers are a list in place of arrays with a leading layer axis."""
    stack = params["layers"]
    layers = range(jax.tree.leaves(stack)[0].shape[0])
    return params | {"layers": [jax.tree.map(lambda x: x[y], stack) for y in layers]}  # noqa: B023


def parameter_axes(config: ModelConfig, is_stacked: bool = True) -> Any:
    """Logical axes of every parameter: ``("layers", "embed", "heads", "head_dim")`` for q's matrix.

    A tree shaped as the params, whose leaves are tuples of names of `RULES`, one per dimension.
    Matrices are stored ``[what they read, what they write]``, and "embed", the width of the
    residual stream, is one of the two; biases have no "embed", scales of norms have "norm".
    """
    axes = table_axes(parameters(config))
    return axes if is_stacked else unstack_axes(axes, config.layers)


def table_axes(table: Any) -> Any:
    """Logical axes of the stacked arrays that a tree of `Parameter` tells of."""
    return jax.tree.map(lambda x: ("layers", *x.axes) if x.is_layered else x.axes, table)


def unstack_axes(axes: Any, layers: int) -> Any:
    """What `unstack` makes of logical axes."""
    return axes | {"layers": [map_axes(lambda names: names[1:], axes["layers"])] * layers}
