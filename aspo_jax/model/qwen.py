"""Qwen2 and Qwen3 (dense): one declared block, a scanned stack, a cache that goes in and comes out.

Parameters are a plain nested dict; every array of ``params["layers"]`` has a leading layer axis Y,
or, for a sampler on a CPU, ``params["layers"]`` is a list of layers (`unstack`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from aspo_jax.model.attention import DENSE, SAVED, Attention
from aspo_jax.model.cache import Cache, Decode, Prefill, empty_cache
from aspo_jax.model.sharding import batch_sharding, partition_spec

_POLICIES = jax.checkpoint_policies
REMAT = {
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_saveable, _POLICIES.save_only_these_names(SAVED)
    ),
    "attention": _POLICIES.save_only_these_names(SAVED),
    "full": _POLICIES.nothing_saveable,
}
# Standard deviation 1/sqrt(fan in): 0.025 at width 1,536, where others say 0.02, but right for
# small models too.
INIT = nn.initializers.lecun_normal()


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
class ModelConfig:
    """Shape of the network, as `config.json` of a Hugging Face folder gives it.

    What tells the families apart: Qwen2 has biases on q, k and v (``qkv_bias``), Qwen3 has none
    and normalises each head of q and k (``qk_norm``).
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
    yarn: Yarn | None = None


class Model(NamedTuple):
    """A network as pure functions.

    init: key -> params (float32).
    apply: (params, token_BT, position_BT, segment_BT, cache=None, rotary=None) -> (hidden_BTD,
        cache). Hidden states are after the final norm; `aspo_jax.head` turns them into a
        distribution. A token attends to earlier tokens of its own segment; segment 0 is padding. A
        cache stores the new tokens: as `Prefill` their prompt, as `Decode` one more token of each
        row, which attends to all that the cache holds of its row instead.
    rotary: position_BT -> cosine and sine of the rotary angles; `apply` makes them of its
        positions where it is not given them.
    empty_cache: (parts of the devices, pages, slots of a page, type=that of the activations) ->
        Cache.
    unembedding: params -> weight_VD of the vocabulary projection (the embedding where tied).
    partition_specs: () -> tree of PartitionSpecs shaped as the params.
    is_stacked: whether the layers of its params are stacked.
    """

    config: ModelConfig
    attention: Attention
    init: Callable[[Array], Any]
    apply: Callable[..., tuple[Array, Any]]
    rotary: Callable[[Array], tuple[Array, Array]]
    empty_cache: Callable[..., Cache]
    unembedding: Callable[[Any], Array]
    partition_specs: Callable[[], Any]
    is_stacked: bool


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of features, [C / 2] float32, and the scale of cos and sin.

    theta^(-2 i / C); with YaRN a blend of that and its ``factor``-th part (arXiv 2309.00071, §3.2).
    """
    C, theta, yarn = config.head_dim, config.rope_theta, config.yarn
    frequency_c = 1.0 / theta ** (np.arange(0, C, 2, dtype=np.float32) / C)
    if yarn is None:
        return frequency_c.astype(np.float32), 1.0

    def pair_with_turns(turns: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return C * np.log(yarn.original_max_position / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low, high = pair_with_turns(yarn.beta_fast), pair_with_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, C - 1.0)
    ramp_c = np.clip((np.arange(C // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    frequency_c = frequency_c * (1.0 - ramp_c) + frequency_c / yarn.factor * ramp_c
    scale = yarn.attention_factor
    if scale is None:
        scale = 0.1 * np.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return frequency_c.astype(np.float32), float(scale)


def rotary_BTC(position_BT: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, float32 (bfloat16 rounds position 257 to 256)."""
    frequency_c, scale = rotary_frequencies(config)
    angle_BTc = position_BT.astype(jnp.float32)[..., None] * frequency_c
    angle_BTC = jnp.concatenate([angle_BTc, angle_BTc], axis=-1)
    return jnp.cos(angle_BTC) * scale, jnp.sin(angle_BTC) * scale


def rotate(x_BTHC: Array, cosine_BTC: Array, sine_BTC: Array) -> Array:
    """Rotary position embedding (arXiv 2104.09864), the half-split layout of Qwen and Llama."""
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    out = x_BTHC * cosine_BTC[:, :, None] + turned * sine_BTC[:, :, None]
    return out.astype(x_BTHC.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        width = x_BTD.shape[-1]
        ones = nn.with_partitioning(nn.initializers.ones, ("norm",))
        scale: Any = self.param("scale", ones, (width,))
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(x_BTD.dtype)


class Block(nn.Module):
    """One layer: RMSNorm, grouped-query attention, SwiGLU; two differences between the families.

    ``attend(q_BTHC, k_BTKC, v_BTKC) -> out_BTHC`` owns masks and cache.
    """

    config: ModelConfig
    dtype: Any

    def project(self, name: str, axes: tuple[str, str, str], bias: bool) -> nn.DenseGeneral:
        sizes = {
            "heads": (self.config.heads, self.config.head_dim),
            "kv_heads": (self.config.kv_heads, self.config.head_dim),
        }
        return nn.DenseGeneral(
            sizes[axes[1]],
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=nn.with_partitioning(INIT, axes),
            bias_init=nn.with_partitioning(nn.initializers.zeros, axes[1:]),
            name=name,
        )

    def dense(self, name: str, width: int, axes: tuple[str, ...], axis: Any = -1):
        return nn.DenseGeneral(
            width,
            axis=axis,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.with_partitioning(INIT, axes),
            name=name,
        )

    @nn.compact
    def __call__(self, hidden_BTD: Array, rotary: tuple[Array, Array], attend: Callable) -> Array:
        c = self.config
        x = RMSNorm(c.rms_norm_eps, name="attention_norm")(hidden_BTD)
        q_BTHC = self.project("q", ("embed", "heads", "head_dim"), bias=c.qkv_bias)(x)
        k_BTKC = self.project("k", ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias)(x)
        v_BTKC = self.project("v", ("embed", "kv_heads", "head_dim"), bias=c.qkv_bias)(x)
        if c.qk_norm:
            q_BTHC = RMSNorm(c.rms_norm_eps, name="q_norm")(q_BTHC)
            k_BTKC = RMSNorm(c.rms_norm_eps, name="k_norm")(k_BTKC)
        mixed_BTHC = attend(rotate(q_BTHC, *rotary), rotate(k_BTKC, *rotary), v_BTKC)
        o_axes = ("heads", "head_dim", "embed")
        hidden_BTD = hidden_BTD + self.dense("o", c.hidden_size, o_axes, (-2, -1))(mixed_BTHC)
        x = RMSNorm(c.rms_norm_eps, name="mlp_norm")(hidden_BTD)
        gate_BTF = self.dense("gate", c.intermediate_size, ("embed", "mlp"))(x)
        up_BTF = self.dense("up", c.intermediate_size, ("embed", "mlp"))(x)
        down = self.dense("down", c.hidden_size, ("mlp", "embed"))
        return hidden_BTD + down(nn.silu(gate_BTF) * up_BTF)


def unstack(params: Any) -> Any:
    """Params whose layers are a list in place of arrays with a leading layer axis."""
    stack = params["layers"]
    layers = range(jax.tree.leaves(stack)[0].shape[0])
    return params | {"layers": [jax.tree.map(lambda x: x[y], stack) for y in layers]}  # noqa: B023


def _declared(
    config: ModelConfig, dtype: Any, is_stacked: bool
) -> tuple[Callable[[Array], Any], Any]:
    """Initialiser of all parameters and their logical axes, from one declaration of the block."""
    block = Block(config, dtype)
    hidden = jnp.zeros((1, 1, config.hidden_size), dtype)
    rotary = rotary_BTC(jnp.zeros((1, 1), jnp.int32), config)

    table_init = nn.initializers.normal(config.hidden_size**-0.5)

    def init_block(key):
        # The declaration needs shapes only, so the layer's own queries stand in for attention.
        return block.init(key, hidden, rotary, lambda q, k, v: q)["params"]

    def init(key):
        embed_key, head_key, layer_key = jax.random.split(key, 3)
        table_shape = (config.vocab_size, config.hidden_size)
        params = {
            "embed": table_init(embed_key, table_shape),
            "layers": nn.unbox(jax.vmap(init_block)(jax.random.split(layer_key, config.layers))),
            "norm": jnp.ones((config.hidden_size,)),
        }
        if not config.tie_embeddings:
            params["head"] = table_init(head_key, table_shape)
        return params if is_stacked else unstack(params)

    boxed = jax.eval_shape(init_block, jax.random.key(0))
    layer_axes = jax.tree.map(
        lambda spec: ("layers", *spec) if is_stacked else tuple(spec),
        nn.get_partition_spec(boxed),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    layers = layer_axes if is_stacked else [layer_axes] * config.layers
    axes = {"embed": ("vocab", "embed"), "layers": layers, "norm": ("norm",)}
    if not config.tie_embeddings:
        axes["head"] = ("vocab", "embed")
    return init, axes


def _through(layer: Callable, carry: Any, layers: Any, unroll: int) -> Any:
    """What ``layer(carry, (params, number)) -> carry, None`` makes of it, layer after layer."""
    if isinstance(layers, list):
        for xs in zip(layers, range(len(layers)), strict=True):
            carry, _ = layer(carry, xs)
        return carry
    count = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(layer, carry, (layers, jnp.arange(count)), unroll=unroll)[0]


def build_model(
    config: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "dots",
    attention: Attention = DENSE,
    mesh: Mesh | None = None,
    is_stacked: bool = True,
) -> Model:
    """Make the network's functions; parameters stay float32, activations run in ``dtype``.

    remat: what the backward pass does not compute again: "dots" matrix products and attention,
        "attention" that alone, "full" nothing but the input of each layer. All keep the forward
        pass the same program with and without a gradient (residuals of element-wise operations
        would change how it is fused, hence how it rounds), so that the first importance ratio of
        an iteration is exactly 1.
    attention: the program for attention among new tokens.
    mesh: keep activations split by rows over its data axes; None: one device.
    is_stacked: scan over stacked layers; False: params are those of `unstack` and layers run one by
        one. A CPU copies a layer out of the stack before it multiplies with it, which is a third of
        the time of a step with few rows.
    """
    init, axes = _declared(config, dtype, is_stacked)
    block = Block(config, dtype)
    norm = RMSNorm(config.rms_norm_eps)

    def final_norm(scale_D, hidden_BTD):
        return norm.apply({"params": {"scale": scale_D}}, hidden_BTD)

    def by_rows(hidden_BTD):
        if mesh is None or mesh.size == 1:
            return hidden_BTD
        return jax.lax.with_sharding_constraint(hidden_BTD, batch_sharding(mesh))

    # Short stacks run unrolled: on a CPU, slicing stacked layers costs more than a loop saves.
    unroll = config.layers if config.layers <= 4 else 1

    def apply(
        params,
        token_BT,
        position_BT,
        segment_BT,
        cache: Prefill | Decode | None = None,
        rotary: tuple[Array, Array] | None = None,
    ):
        hidden_BTD = by_rows(params["embed"].astype(dtype)[token_BT])
        rotary = rotary_BTC(position_BT, config) if rotary is None else rotary

        def fresh(q, k, v):
            return attention.attend(q, k, v, segment_BT)

        def layer(carry, xs):
            hidden_BTD, cache = carry
            layer_params, y = xs

            def attend(q, k, v):
                nonlocal cache
                if cache is None:
                    return fresh(q, k, v)
                cache, out = cache.attend(y, q, k, v, fresh)
                return out

            hidden_BTD = block.apply({"params": layer_params}, hidden_BTD, rotary, attend)
            return (by_rows(hidden_BTD), cache), None

        hidden_BTD, cache = _through(
            jax.checkpoint(layer, policy=REMAT[remat]),
            (hidden_BTD, cache),
            params["layers"],
            unroll,
        )
        return jax.checkpoint(final_norm)(params["norm"], hidden_BTD), cache

    return Model(
        config=config,
        attention=attention,
        init=init,
        apply=apply,
        rotary=lambda position_BT: rotary_BTC(position_BT, config),
        empty_cache=lambda parts, pages, slots, kind=dtype: empty_cache(
            config.layers, parts, pages, config.kv_heads, slots, config.head_dim, kind
        ),
        unembedding=lambda params: params["embed" if config.tie_embeddings else "head"],
        partition_specs=lambda: jax.tree.map(
            partition_spec, axes, is_leaf=lambda x: isinstance(x, tuple)
        ),
        is_stacked=is_stacked,
    )
