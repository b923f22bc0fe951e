"""The Qwen2 transformer: one declared block, a scanned stack, a cache that goes in and comes out.

Parameters are a plain nested dict; every array of ``params["layers"]`` has a leading layer axis Y.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from aspo_jax.model.cache import Cache, empty_cache
from aspo_jax.model.sharding import partition_spec

REMAT = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# Standard deviation 1/sqrt(fan in): 0.025 at width 1,536, where others say 0.02, but right for
# small models too.
INIT = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the network, as `config.json` of a Hugging Face folder gives it."""

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


class Model(NamedTuple):
    """A network as pure functions.

    init: key -> params (float32).
    apply: (params, token_BT, position_BT, segment_BT, cache=None) -> (hidden_BTD, cache). Hidden
        states are after the final norm; `aspo_jax.head` turns them into a distribution. A token
        attends to earlier tokens of its own segment; segment 0 is padding. With a cache, the new
        tokens are written behind the slots filled so far.
    empty_cache: (rows, slots) -> Cache.
    unembedding: params -> weight_VD of the vocabulary projection (the embedding where tied).
    partition_specs: () -> tree of PartitionSpecs shaped as the params.
    """

    config: ModelConfig
    init: Callable[[Array], Any]
    apply: Callable[..., tuple[Array, Any]]
    empty_cache: Callable[[int, int], Cache]
    unembedding: Callable[[Any], Array]
    partition_specs: Callable[[], Any]


def rotary_BTC(position_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, float32 (bfloat16 rounds position 257 to 256)."""
    exponent_c = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle_BTc = position_BT.astype(jnp.float32)[..., None] / theta**exponent_c
    angle_BTC = jnp.concatenate([angle_BTc, angle_BTc], axis=-1)
    return jnp.cos(angle_BTC), jnp.sin(angle_BTC)


def rotate(x_BTHC: Array, cosine_BTC: Array, sine_BTC: Array) -> Array:
    """Rotary position embedding (arXiv 2104.09864), the half-split layout of Qwen and Llama."""
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    out = x_BTHC * cosine_BTC[:, :, None] + turned * sine_BTC[:, :, None]
    return out.astype(x_BTHC.dtype)


def attention(q_BTHC: Array, k_BSKC: Array, v_BSKC: Array, mask_BTS: Array) -> Array:
    """Grouped-query attention; softmax in float32. A query that sees no key gets finite values."""
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKgC = q_BTHC.reshape(B, T, K, H // K, C) * C**-0.5
    score = jnp.einsum("btkgc,bskc->bkgts", q_BTKgC, k_BSKC, preferred_element_type=jnp.float32)
    score = jnp.where(mask_BTS[:, None, None], score, -1e30)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BSKC.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weight, v_BSKC).reshape(B, T, H, C)


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
    """One Qwen2 layer: RMSNorm, grouped-query attention with biases on q, k, v, SwiGLU.

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
        q_BTHC = self.project("q", ("embed", "heads", "head_dim"), bias=True)(x)
        k_BTKC = self.project("k", ("embed", "kv_heads", "head_dim"), bias=True)(x)
        v_BTKC = self.project("v", ("embed", "kv_heads", "head_dim"), bias=True)(x)
        mixed_BTHC = attend(rotate(q_BTHC, *rotary), rotate(k_BTKC, *rotary), v_BTKC)
        o_axes = ("heads", "head_dim", "embed")
        hidden_BTD = hidden_BTD + self.dense("o", c.hidden_size, o_axes, (-2, -1))(mixed_BTHC)
        x = RMSNorm(c.rms_norm_eps, name="mlp_norm")(hidden_BTD)
        gate_BTF = self.dense("gate", c.intermediate_size, ("embed", "mlp"))(x)
        up_BTF = self.dense("up", c.intermediate_size, ("embed", "mlp"))(x)
        down = self.dense("down", c.hidden_size, ("mlp", "embed"))
        return hidden_BTD + down(nn.silu(gate_BTF) * up_BTF)


def _declared(config: ModelConfig, dtype: Any) -> tuple[Callable[[Array], Any], Any]:
    """Initialiser of all parameters and their logical axes, from one declaration of the block."""
    block = Block(config, dtype)
    hidden = jnp.zeros((1, 1, config.hidden_size), dtype)
    rotary = rotary_BTC(jnp.zeros((1, 1), jnp.int32), config.head_dim, config.rope_theta)

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
        return params

    boxed = jax.eval_shape(init_block, jax.random.key(0))
    layer_axes = jax.tree.map(
        lambda spec: ("layers", *spec),
        nn.get_partition_spec(boxed),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    axes = {"embed": ("vocab", "embed"), "layers": layer_axes, "norm": ("norm",)}
    if not config.tie_embeddings:
        axes["head"] = ("vocab", "embed")
    return init, axes


def build_model(config: ModelConfig, *, dtype: Any = jnp.float32, remat: str = "dots") -> Model:
    """Make the network's functions; parameters stay float32, activations run in ``dtype``.

    remat: what the backward pass computes again: "dots" everything but matrix products, "full"
        each layer. Both keep the forward pass the same program with and without a gradient
        (residuals of element-wise operations would change how it is fused, hence how it rounds),
        so that the first importance ratio of an iteration is exactly 1.
    """
    init, axes = _declared(config, dtype)
    block = Block(config, dtype)
    norm = RMSNorm(config.rms_norm_eps)

    def final_norm(scale_D, hidden_BTD):
        return norm.apply({"params": {"scale": scale_D}}, hidden_BTD)

    # Short stacks run unrolled: on a CPU, slicing stacked layers costs more than a loop saves.
    unroll = config.layers if config.layers <= 4 else 1

    def apply(params, token_BT, position_BT, segment_BT, cache: Cache | None = None):
        hidden_BTD = params["embed"].astype(dtype)[token_BT]
        rotary = rotary_BTC(position_BT, config.head_dim, config.rope_theta)
        mask_BTS, cache = _visible(segment_BT, cache)

        def layer(carry, xs):
            hidden_BTD, key_YNSKC, value_YNSKC = carry
            layer_params, y = xs

            def attend(q, k, v):
                nonlocal key_YNSKC, value_YNSKC
                if cache is None:
                    return attention(q, k, v, mask_BTS)
                start = (y, 0, cache.filled - token_BT.shape[1], 0, 0)
                key_YNSKC = jax.lax.dynamic_update_slice(key_YNSKC, k[None], start)
                value_YNSKC = jax.lax.dynamic_update_slice(value_YNSKC, v[None], start)
                return attention(q, key_YNSKC[y], value_YNSKC[y], mask_BTS)

            hidden_BTD = block.apply({"params": layer_params}, hidden_BTD, rotary, attend)
            return (hidden_BTD, key_YNSKC, value_YNSKC), None

        keys_values = (None, None) if cache is None else (cache.key_YNSKC, cache.value_YNSKC)
        (hidden_BTD, *keys_values), _ = jax.lax.scan(
            jax.checkpoint(layer, policy=REMAT[remat]),
            (hidden_BTD, *keys_values),
            (params["layers"], jnp.arange(config.layers)),
            unroll=unroll,
        )
        hidden_BTD = jax.checkpoint(final_norm)(params["norm"], hidden_BTD)
        if cache is not None:
            key_YNSKC, value_YNSKC = keys_values
            cache = dataclasses.replace(cache, key_YNSKC=key_YNSKC, value_YNSKC=value_YNSKC)
        return hidden_BTD, cache

    return Model(
        config=config,
        init=init,
        apply=apply,
        empty_cache=lambda rows, slots: empty_cache(
            config.layers, rows, slots, config.kv_heads, config.head_dim, dtype
        ),
        unembedding=lambda params: params["embed" if config.tie_embeddings else "head"],
        partition_specs=lambda: jax.tree.map(
            partition_spec, axes, is_leaf=lambda x: isinstance(x, tuple)
        ),
    )


def _visible(segment_BT: Array, cache: Cache | None) -> tuple[Array, Cache | None]:
    """Which keys each new token may attend to, and the cache with the new tokens' slots claimed."""
    T = segment_BT.shape[1]
    if cache is None:
        key_segment_BS, first = segment_BT, 0
    else:
        first = cache.filled
        key_segment_BS = jax.lax.dynamic_update_slice(cache.segment_NS, segment_BT, (0, first))
        cache = dataclasses.replace(cache, segment_NS=key_segment_BS, filled=first + T)
    query_slot_T = first + jnp.arange(T)
    is_causal_TS = query_slot_T[:, None] >= jnp.arange(key_segment_BS.shape[1])
    is_same_BTS = segment_BT[:, :, None] == key_segment_BS[:, None, :]
    return is_causal_TS & is_same_BTS, cache
