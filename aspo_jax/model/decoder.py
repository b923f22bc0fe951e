"""A dense decoder (Qwen2, Qwen3, Llama): one block, a scanned stack, a cache in and out.

Parameters are a plain nested dict; every array of ``params["layers"]`` has a leading layer axis Y,
or, for a sampler on a CPU or GPU, ``params["layers"]`` is a list of layers (`unstack`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from aspo_jax.model import narrow
from aspo_jax.model.attention import DENSE, SAVED, Attention, is_cudnn_forward
from aspo_jax.model.cache import Cache, Decode, Prefill, empty_cache
from aspo_jax.model.paged import InPlace
from aspo_jax.model.parameters import Llama3, ModelConfig, Yarn, init_params, parameter_axes
from aspo_jax.model.sharding import batch_sharding, map_axes, partition_spec, shardings

_POLICIES = jax.checkpoint_policies


class Remat(NamedTuple):
    """What is kept of a layer for the backward pass beside its input; the rest is made again."""

    policy: Callable[..., Any]
    keeps_attention: bool
    keeps_products: bool


_BOTH = _POLICIES.save_from_both_policies
_ATTENTION = _BOTH(_POLICIES.save_only_these_names(SAVED), is_cudnn_forward)
REMAT = {
    "dots": Remat(_BOTH(_POLICIES.dots_saveable, _ATTENTION), True, True),
    "attention": Remat(_ATTENTION, True, False),
    "full": Remat(_POLICIES.nothing_saveable, False, False),
}


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
    empty_cache: (shards of the devices, pages, slots of a page, type=that of the activations) ->
        Cache.
    unembedding: params -> weight_VD of the vocabulary projection (the embedding where tied).
    is_stacked: whether the layers of its params are stacked.
    in_place: what reads pages where they lie, see `Decode`.
    """

    config: ModelConfig
    attention: Attention
    init: Callable[[Array], Any]
    apply: Callable[..., tuple[Array, Any]]
    rotary: Callable[[Array], tuple[Array, Array]]
    empty_cache: Callable[..., Cache]
    unembedding: Callable[[Any], Array]
    is_stacked: bool
    in_place: InPlace | None = None

    def axes(self) -> Any:
        """Tree of logical axes shaped as the params, see `parameter_axes`."""
        return parameter_axes(self.config, self.is_stacked)

    def shardings(self, mesh: Mesh) -> Any:
        """Tree of NamedShardings shaped as the params."""
        return shardings(mesh, self.partition_specs())

    def partition_specs(self) -> Any:
        """Tree of PartitionSpecs shaped as the params."""
        return map_axes(partition_spec, self.axes())


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of features, [C / 2] float32, and the scale of cos and sin.

    theta^(-2 i / C); where angles are stretched, a blend of that and its ``factor``-th part.
    """
    C, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    frequency_c = 1.0 / theta ** (np.arange(0, C, 2, dtype=np.float32) / C)
    if scaling is None:
        return frequency_c.astype(np.float32), 1.0
    if isinstance(scaling, Yarn):
        kept_c, scale = 1.0 - _yarn_ramp(scaling, C, theta), _yarn_scale(scaling)
    else:
        kept_c, scale = _llama3_ramp(scaling, frequency_c), 1.0
    frequency_c = (1.0 - kept_c) * frequency_c / scaling.factor + kept_c * frequency_c
    return frequency_c.astype(np.float32), scale


def _yarn_ramp(yarn: Yarn, C: int, theta: float) -> np.ndarray:
    """How far each pair is stretched, 0 to 1 (arXiv 2309.00071, §3.2)."""

    def pair_with_turns(turns: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return C * np.log(yarn.original_max_position / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low, high = pair_with_turns(yarn.beta_fast), pair_with_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, C - 1.0)
    return np.clip((np.arange(C // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)


def _yarn_scale(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return float(0.1 * np.log(yarn.factor) + 1.0) if yarn.factor > 1 else 1.0


def _llama3_ramp(llama3: Llama3, frequency_c: np.ndarray) -> np.ndarray:
    """How much of each pair's angle stays as it is, 0 to 1."""
    turns_c = llama3.original_max_position / (2 * np.pi / frequency_c)
    low, high = llama3.low_turns, llama3.high_turns
    return np.clip((turns_c - low) / (high - low), 0.0, 1.0)


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
    out = _rounded(x_BTHC * cosine_BTC[:, :, None]) + _rounded(turned * sine_BTC[:, :, None])
    return out.astype(x_BTHC.dtype)


def _rounded(product: Array) -> Array:
    """A product on its way into a sum, rounded by itself in every row.

    LLVM may round it together with the sum, in some rows of a loop and not in others, and a
    sampled row's bits must not depend on its place. A bound that excludes nothing stands between.
    """
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(product < lowest, lowest, product)  # NaN stays, which max may lose on a CPU


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


def project(x: Array, layer: Any, reads: int = 1) -> Array:
    """The last ``reads`` axes of x times a layer's matrix, plus its bias if any, in x's type.

    Beside the matrix may lie its steps, if it is int8 (`aspo_jax.model.quantised`), whose integers
    every type of computation holds exactly, and an adapter (`aspo_jax.model.lora.attach`), whose
    product is never formed: ``x W + (factor x a) b``.
    """
    y = narrow.product(x, layer["kernel"], reads)
    if "step" in layer:
        y = (y * layer["step"]).astype(x.dtype)
    if "a" in layer:
        low = narrow.product(x, layer["a"], reads)
        y = y + narrow.product((low * layer["factor"]).astype(x.dtype), layer["b"], 1)
    return narrow.plus(y, layer["bias"]) if "bias" in layer else y


def block(
    c: ModelConfig, layer: Any, hidden_BTD: Array, rotary: tuple[Array, Array], attend: Callable
) -> Array:
    """One layer: RMSNorm, grouped-query attention, SwiGLU; three families in two switches.

    layer: its parameters. ``attend(q_BTHC, k_BTKC, v_BTKC) -> out_BTHC`` owns masks and cache.
    """

    def norm(name: str, x: Array) -> Array:
        return rms_norm(x, layer[name]["scale"], c.rms_norm_eps)

    x = norm("attention_norm", hidden_BTD)
    q_BTHC, k_BTKC, v_BTKC = (project(x, layer[name]) for name in "qkv")
    if c.qk_norm:
        q_BTHC, k_BTKC = norm("q_norm", q_BTHC), norm("k_norm", k_BTKC)
    mixed_BTHC = attend(rotate(q_BTHC, *rotary), rotate(k_BTKC, *rotary), v_BTKC)
    hidden_BTD = hidden_BTD + project(mixed_BTHC, layer["o"], 2)
    x = norm("mlp_norm", hidden_BTD)
    gate_BTF, up_BTF = (project(x, layer[name]) for name in ("gate", "up"))
    return hidden_BTD + project(jax.nn.silu(gate_BTF) * up_BTF, layer["down"])


def _through(layer: Callable, carry: Any, layers: Any, unroll: int) -> Any:
    """What ``layer(carry, (params, number)) -> carry, None`` makes of it, layer after layer."""
    if isinstance(layers, list):
        for xs in zip(layers, range(len(layers)), strict=True):
            carry, _ = layer(carry, xs)
        return carry
    count = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(layer, carry, (layers, jnp.arange(count)), unroll=unroll)[0]


def _make_apply(
    config: ModelConfig, dtype: Any, remat: str, attention: Attention, mesh: Mesh | None
) -> Callable[..., tuple[Array, Any]]:
    """The forward pass, `Model.apply`."""
    final_norm = jax.checkpoint(functools.partial(rms_norm, eps=config.rms_norm_eps))

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
        hidden_BTD = by_rows(narrow.rows(params["embed"], token_BT, dtype))
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

            hidden_BTD = block(config, layer_params, hidden_BTD, rotary, attend)
            return (by_rows(hidden_BTD), cache), None

        hidden_BTD, cache = _through(
            jax.checkpoint(layer, policy=REMAT[remat].policy),
            (hidden_BTD, cache),
            params["layers"],
            unroll,
        )
        return final_norm(hidden_BTD, params["norm"]), cache

    return apply


def build_model(
    config: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: str = "dots",
    attention: Attention = DENSE,
    mesh: Mesh | None = None,
    is_stacked: bool = True,
    in_place: InPlace | None = None,
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
        the time of a step with few rows; so does a GPU, and moves three times the weights' bytes. A
        TPU multiplies with a layer where it lies.
    in_place: what decoding reads pages with; None: they are gathered, see `Decode`.
    """
    return Model(
        config=config,
        attention=attention,
        init=functools.partial(init_params, config, is_stacked),
        apply=_make_apply(config, dtype, remat, attention, mesh),
        rotary=lambda position_BT: rotary_BTC(position_BT, config),
        empty_cache=lambda shards, pages, slots, kind=dtype: empty_cache(
            config.layers, shards, pages, config.kv_heads, slots, config.head_dim, kind
        ),
        unembedding=lambda params: params["embed" if config.tie_embeddings else "head"],
        is_stacked=is_stacked,
        in_place=in_place,
    )
