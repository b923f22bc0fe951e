"""Causal attention within segments: one meaning, several programs, and who chooses between them.

    out_t = sum_s softmax_s(q_t . k_s / sqrt(C)) v_s    over s <= t of t's own segment

Every program is ``attend(q_BTHC, k_BTKC, v_BTKC, segment_BT) -> out_BTHC`` with H query heads in
groups that share one of K key/value heads. The tokens of a segment lie side by side in their row;
segment 0 is padding, whose outputs are finite and mean nothing. Scores and softmax are float32.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from aspo_jax.errors import UserError
from aspo_jax.model.sharding import RULES

SAVED = "attention"  # name of what rematerialisation may keep
MASKED = -1e30
BLOCK = 128  # tokens per block of `chunked`: its memory is T * BLOCK scores a head
DENSE_UP_TO = BLOCK  # tokens per row up to which `dense` needs no more memory than `chunked`
LANES = 128  # tile width of a TPU: splash takes rows and heads in multiples of it
SEQUENCES = 32  # of a row that cuDNN attends to: it keeps T statistics a head for each of them
HOPPER = 9.0  # compute capability from which cuDNN knows rows of several sequences

Attend = Callable[[Array, Array, Array, Array], Array]


class AttentionError(UserError):
    """The hardware, or the shape of the model, cannot do the attention asked for."""


class Attention(NamedTuple):
    """A program for attention: its name, why it was chosen, the function.

    sequences: the most that may share a row; None: any number.
    """

    name: str
    reason: str
    attend: Attend
    sequences: int | None = None


# --- every query against every key ------------------------------------------------------------


def dense(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array) -> Array:
    """The definition; memory O(T^2)."""
    B, T, H, C = q_BTHC.shape
    q_BTKgC = _heads(q_BTHC, k_BTKC)
    is_same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    is_visible_BTT = is_same_BTT & jnp.tri(T, dtype=bool)
    score = jnp.einsum("btkgc,bskc->bkgts", q_BTKgC, k_BTKC, preferred_element_type=jnp.float32)
    score = jnp.where(is_visible_BTT[:, None, None], score, MASKED)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BTKC.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weight, v_BTKC).reshape(B, T, H, C)


# --- block by block, exact, with O(T) memory --------------------------------------------------


def chunked(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array) -> Array:
    """Blocks of queries against the blocks of keys that they can see, with a running softmax.

    Memory O(T BLOCK) a head, forward and backward (FlashAttention-2, arXiv 2307.08691, as plain
    jnp). Blocks before the first segment of a query block and behind it are not computed, so packed
    short sequences cost what they cost alone.
    """
    T = q_BTHC.shape[1]
    padding = ((0, 0), (0, -T % BLOCK))
    widths = (*padding, (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, widths) for x in (q_BTHC, k_BTKC, v_BTKC))
    return _chunked(q, k, v, jnp.pad(segment_BT, padding))[:, :T]


@jax.custom_vjp
def _chunked(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array) -> Array:
    return _chunked_forward(q_BTHC, k_BTKC, v_BTKC, segment_BT)[0]


def _blocks(x_BTKhC: Array) -> Array:
    """[B, T, K, h, C] -> [blocks, B, K, h * BLOCK, C]: one matrix per row and key head."""
    B, T, K, h, C = x_BTKhC.shape
    x = x_BTKhC.reshape(B, T // BLOCK, BLOCK, K, h, C).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(T // BLOCK, B, K, h * BLOCK, C)


def _unblock(x_IBKmC: Array, h: int) -> Array:
    """The inverse of `_blocks`: [B, T, K * h, C]."""
    I, B, K, _, C = x_IBKmC.shape
    x = x_IBKmC.reshape(I, B, K, h, BLOCK, C).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, I * BLOCK, K * h, C)


def _heads(q_BTHC: Array, k_BTKC: Array) -> Array:
    """Queries by key head, scaled."""
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    return (q_BTHC * C**-0.5).reshape(B, T, K, H // K, C)


def _first_blocks(segment_BT: Array) -> Array:
    """For each query block the first key block that any row's query in it can see, [blocks].

    Behind the block itself where a block holds nothing but padding: nothing is computed for it.
    """
    B, T = segment_BT.shape
    index_T = jnp.arange(T)
    is_start_BT = jnp.diff(segment_BT, axis=1, prepend=-1) != 0
    start_BT = jax.lax.cummax(jnp.where(is_start_BT, index_T, 0), axis=1)
    has_tokens_BI = jnp.any(segment_BT.reshape(B, -1, BLOCK) > 0, axis=-1)
    first_BI = jnp.where(has_tokens_BI, start_BT[:, ::BLOCK] // BLOCK, T // BLOCK)
    return jnp.min(first_BI, axis=0)


def _score(q_BKmC: Array, k_BKnC: Array, i: Array, j: Array, segment_IBq: Array) -> Array:
    """Scores of query block i against key block j, MASKED where a key is not visible."""
    score = jnp.einsum("bkmc,bknc->bkmn", q_BKmC, k_BKnC, preferred_element_type=jnp.float32)
    slot = jnp.arange(BLOCK)
    is_same_Bqn = segment_IBq[i][:, :, None] == segment_IBq[j][:, None, :]
    is_visible = is_same_Bqn & (i * BLOCK + slot[:, None] >= j * BLOCK + slot)
    B, K, m, _ = score.shape
    grouped = score.reshape(B, K, m // BLOCK, BLOCK, BLOCK)
    return jnp.where(is_visible[:, None, None], grouped, MASKED).reshape(score.shape)


def _chunked_forward(q_BTHC, k_BTKC, v_BTKC, segment_BT):
    h = q_BTHC.shape[2] // k_BTKC.shape[2]
    q_IBKmC = _blocks(_heads(q_BTHC, k_BTKC))
    k_IBKnC, v_IBKnC = _blocks(k_BTKC[..., None, :]), _blocks(v_BTKC[..., None, :])
    B, T = segment_BT.shape
    segment_IBq = segment_BT.reshape(B, -1, BLOCK).transpose(1, 0, 2)

    def of_queries(_, xs):
        i, first, q_BKmC = xs

        def add(j, carry):
            top_BKm, mass_BKm, sum_BKmC = carry
            score = _score(q_BKmC, k_IBKnC[j], i, j, segment_IBq)
            new_top_BKm = jnp.maximum(top_BKm, jnp.max(score, axis=-1))
            p_BKmn = jnp.exp(score - new_top_BKm[..., None])
            shrink_BKm = jnp.exp(top_BKm - new_top_BKm)
            part = jnp.einsum(
                "bkmn,bknc->bkmc",
                p_BKmn.astype(v_BTKC.dtype),
                v_IBKnC[j],
                preferred_element_type=jnp.float32,
            )
            mass_BKm = mass_BKm * shrink_BKm + jnp.sum(p_BKmn, axis=-1)
            return new_top_BKm, mass_BKm, sum_BKmC * shrink_BKm[..., None] + part

        rows = q_BKmC.shape[:-1]
        empty = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_BKmC.shape, jnp.float32))
        top, mass, total = jax.lax.fori_loop(first, i + 1, add, empty)
        mass = jnp.where(mass > 0, mass, 1.0)
        return None, ((total / mass[..., None]).astype(v_BTKC.dtype), top + jnp.log(mass))

    xs = (jnp.arange(T // BLOCK), _first_blocks(segment_BT), q_IBKmC)
    out_IBKmC, lse_IBKm = jax.lax.scan(of_queries, None, xs)[1]
    out_BTHC = checkpoint_name(_unblock(out_IBKmC, h), SAVED)
    lse_IBKm = checkpoint_name(lse_IBKm, SAVED)
    return out_BTHC, (q_BTHC, k_BTKC, v_BTKC, segment_BT, out_BTHC, lse_IBKm)


def _chunked_backward(saved, grad_BTHC):
    q_BTHC, k_BTKC, v_BTKC, segment_BT, out_BTHC, lse_IBKm = saved
    h, C = q_BTHC.shape[2] // k_BTKC.shape[2], q_BTHC.shape[-1]
    q_IBKmC = _blocks(_heads(q_BTHC, k_BTKC))
    k_IBKnC, v_IBKnC = _blocks(k_BTKC[..., None, :]), _blocks(v_BTKC[..., None, :])
    grouped = (*k_BTKC.shape[:3], h, C)
    grad_IBKmC = _blocks(grad_BTHC.reshape(grouped))
    # sum_s p_s dp_s = out . grad: the softmax's own correction.
    dot_IBKm = jnp.sum(
        (_blocks(out_BTHC.reshape(grouped)) * grad_IBKmC).astype(jnp.float32), axis=-1
    )
    B, T = segment_BT.shape
    segment_IBq = segment_BT.reshape(B, -1, BLOCK).transpose(1, 0, 2)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_queries(key_value_grads, xs):
        i, first, q_BKmC, grad_BKmC, lse_BKm, dot_BKm = xs

        def add(j, carry):
            q_grad, k_grad_IBKnC, v_grad_IBKnC = carry
            k_BKnC, v_BKnC = k_IBKnC[j], v_IBKnC[j]
            p_BKmn = jnp.exp(_score(q_BKmC, k_BKnC, i, j, segment_IBq) - lse_BKm[..., None])
            p_grad_BKmn = product("bkmc,bknc->bkmn", grad_BKmC, v_BKnC)
            score_grad = (p_BKmn * (p_grad_BKmn - dot_BKm[..., None])).astype(q_BKmC.dtype)
            p_BKmn = p_BKmn.astype(q_BKmC.dtype)
            return (
                q_grad + product("bkmn,bknc->bkmc", score_grad, k_BKnC),
                k_grad_IBKnC.at[j].add(product("bkmn,bkmc->bknc", score_grad, q_BKmC)),
                v_grad_IBKnC.at[j].add(product("bkmn,bkmc->bknc", p_BKmn, grad_BKmC)),
            )

        nothing = jnp.zeros(q_BKmC.shape, jnp.float32)
        q_grad, *grads = jax.lax.fori_loop(first, i + 1, add, (nothing, *key_value_grads))
        return tuple(grads), q_grad * C**-0.5

    nothing = jnp.zeros(k_IBKnC.shape, jnp.float32)
    xs = (
        *(jnp.arange(T // BLOCK), _first_blocks(segment_BT)),
        *(q_IBKmC, grad_IBKmC, lse_IBKm, dot_IBKm),
    )
    (k_grad, v_grad), q_grad = jax.lax.scan(of_queries, (nothing, nothing), xs)
    return (
        _unblock(q_grad, h).astype(q_BTHC.dtype),
        _unblock(k_grad, 1).astype(k_BTKC.dtype),
        _unblock(v_grad, 1).astype(v_BTKC.dtype),
        None,
    )


_chunked.defvjp(_chunked_forward, _chunked_backward)


# --- kernels of the accelerators --------------------------------------------------------------


@functools.lru_cache
def _splash_kernel(T: int, group: int, is_interpreted: bool):
    """The splash kernel for ``group`` query heads that share one key head; costly to describe."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names = (*names, "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    # Not the fused backward kernel: it writes the queries' gradient once per block of keys, O(T^2).
    sizes = kernel.BlockSizes(**dict.fromkeys(names, math.gcd(T, 512)), use_fused_bwd_kernel=False)
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * group)
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mqa_single_device(
            mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=is_interpreted
        ), kernel.SegmentIds


def _splash(is_interpreted: bool, q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array):
    """TPU: the splash kernel of jax, masks as segment ids; T a multiple of 128."""
    B, T, H, C = q_BTHC.shape
    one_key_head, segment_ids = _splash_kernel(T, H // k_BTKC.shape[2], is_interpreted)
    q_BKgTC = _heads(q_BTHC, k_BTKC).transpose(0, 2, 3, 1, 4)
    k_BKTC, v_BKTC = k_BTKC.transpose(0, 2, 1, 3), v_BTKC.transpose(0, 2, 1, 3)
    segments = segment_ids(q=segment_BT, kv=segment_BT)
    of_row: Any = jax.vmap(one_key_head, in_axes=(0, 0, 0, None))
    out_BKgTC = jax.vmap(of_row)(q_BKgTC, k_BKTC, v_BKTC, segments)
    return out_BKgTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def _pallas(is_interpreted: bool, q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array):
    """GPU: the Triton kernel of jax, which knows segment ids; keys repeated for each query head."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    T, H, C = q_BTHC.shape[1:]
    repeats = H // k_BTKC.shape[2]
    k_BTHC, v_BTHC = (jnp.repeat(x, repeats, axis=2) for x in (k_BTKC, v_BTKC))
    block = min(T, 64 if C > 64 else 128)
    names = ("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = BlockSizes(**dict.fromkeys(names, block))
    out_BTHC = mha(
        *(q_BTHC, k_BTHC, v_BTHC, segment_BT),
        sm_scale=C**-0.5,
        causal=True,
        block_sizes=sizes,
        interpret=is_interpreted,
    )
    return checkpoint_name(out_BTHC, SAVED)


def cudnn(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array) -> Array:
    """GPU: cuDNN's flash attention of up to `SEQUENCES` a row, each computed as if it were alone.

    jax.nn has it for one sequence a row only; what it calls takes several.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    is_token_BT11 = (segment_BT > 0)[..., None, None]
    # cuDNN writes nothing where no sequence is, in gradients too: what lies there may be NaN.
    q, k, v = (jnp.where(is_token_BT11, x, 0) for x in (q_BTHC, k_BTKC, v_BTKC))
    start_BM, length_BM = jax.vmap(starts_and_lengths)(segment_BT)
    offset_BM = jnp.pad(start_BM, ((0, 0), (0, 1)), constant_values=-1)
    out_BTHC: Any = dot_product_attention(
        *(q, k, v),
        q_seqlen=length_BM,
        kv_seqlen=length_BM,
        q_offsets=offset_BM,
        kv_offsets=offset_BM,
        scale=q_BTHC.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return jnp.where(is_token_BT11, out_BTHC, 0)


def _cudnn_of_one(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segment_BT: Array) -> Array:
    """GPU: the same of one sequence a row, then padding, also before Hopper."""
    length_B = jnp.sum(segment_BT > 0, axis=1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        *(q_BTHC, k_BTKC, v_BTKC),
        is_causal=True,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )


def starts_and_lengths(segment_T: Array) -> tuple[Array, Array]:
    """Of the sequences of one row, each [SEQUENCES] and -1 behind the last."""
    is_start_T = (jnp.diff(segment_T, prepend=0) != 0) & (segment_T > 0)
    start_M = jnp.nonzero(is_start_T, size=SEQUENCES, fill_value=-1)[0].astype(jnp.int32)
    number_T = jnp.where(segment_T > 0, jnp.cumsum(is_start_T) - 1, SEQUENCES)
    length_M = jnp.zeros(SEQUENCES, jnp.int32).at[number_T].add(1, mode="drop")
    return start_M, jnp.where(start_M >= 0, length_M, -1)


def is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy: keep cuDNN's output and the statistics that its gradient reads.

    They are kept by their primitive, since no one but jax could give these statistics a name.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def over_mesh(attend: Attend, mesh: Mesh) -> Attend:
    """Each device its own rows and heads: the compiler cannot split a kernel by itself."""
    rows, heads = RULES["batch"], RULES["heads"]
    wide = PartitionSpec(rows, None, heads, None)
    # check_vma would look for replication rules inside the kernels, which have none.
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(wide, wide, wide, PartitionSpec(rows, None)),
        out_specs=wide,
        check_vma=False,
    )


# --- who chooses ------------------------------------------------------------------------------


def _refusal(
    name: str, platform: str, head_dim: int, row_tokens: int, packed: bool, dtype: Any, mesh: Mesh
):
    """Why this program cannot run there, or None."""
    home = {"splash": "tpu", "pallas": "gpu", "cudnn": "gpu"}.get(name, platform)
    if home != platform:
        return f"it runs on {home}, not on {platform}"
    if name == "splash" and (head_dim % LANES or row_tokens % LANES):
        return (
            f"it needs heads and rows in multiples of {LANES}, found head width {head_dim} and "
            f"Train.row_tokens = {row_tokens}"
        )
    if name == "pallas" and (row_tokens % LANES or head_dim & (head_dim - 1)):
        return (
            f"it needs rows in multiples of {LANES} and a power of two as head width, found "
            f"Train.row_tokens = {row_tokens} and {head_dim}"
        )
    if name == "cudnn" and (head_dim % 8 or head_dim > 256):
        return f"it needs heads of at most 256 in multiples of 8, found {head_dim}"
    if name == "cudnn" and dtype != jnp.bfloat16:
        return f"it computes in bfloat16, found Model.dtype = {jnp.dtype(dtype).name}"
    return _lack_of_cudnn(mesh, packed) if name == "cudnn" else None


def _lack_of_cudnn(mesh: Mesh, packed: bool) -> str | None:
    """What is missing for cuDNN, or None; the GPUs of a mesh without devices are taken for new."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as stablehlo

        stablehlo.check_cudnn_version()
        known = inspect.signature(stablehlo.dot_product_attention).parameters
    except (ImportError, AttributeError, RuntimeError):
        return "it needs cuDNN, which is not installed here, also to be compiled"
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else None
    found = float(getattr(device, "compute_capability", HOPPER))
    if packed and found < HOPPER:
        return (
            f"for rows of several sequences it needs compute capability {HOPPER}, found {found}; "
            "set Train.pack = False"
        )
    if packed and "q_offsets" not in known:
        return f"jax {jax.__version__} does not tell it of several sequences in a row"
    return None


_PREFERENCE = {"tpu": ("splash",), "gpu": ("cudnn", "pallas"), "cpu": ()}
_PROGRAMS: dict[str, Attend] = {
    "dense": dense,
    "chunked": chunked,
    "splash": functools.partial(_splash, False),
    "pallas": functools.partial(_pallas, False),
    "cudnn": cudnn,
}


def choose_attention(
    platform: str,
    *,
    head_dim: int,
    row_tokens: int,
    packed: bool,
    dtype: Any,
    mesh: Mesh,
    name: str = "auto",
) -> Attention:
    """The program for attention within rows of ``row_tokens`` on ``platform`` (cpu, gpu, tpu).

    packed: several sequences may share a row.

    "auto" takes the platform's fastest kernel that can do it, else `chunked`; rows of up to
    `DENSE_UP_TO` tokens on a CPU take `dense`. The reason lists what was passed over and why.

    Raises:
        AttentionError: ``name`` cannot run there; the message says why.
    """

    def chosen(name: str, *reasons: str) -> Attention:
        is_whole = mesh.size == 1 or name == "dense"
        program = _cudnn_of_one if name == "cudnn" and not packed else _PROGRAMS[name]
        sequences = 1 if not packed else SEQUENCES if program is cudnn else None
        program = program if is_whole else over_mesh(program, mesh)
        return Attention(name, "; ".join(reasons), program, sequences)

    asked = (platform, head_dim, row_tokens, packed, dtype, mesh)
    if name != "auto":
        if problem := _refusal(name, *asked):
            raise AttentionError(f"Model.attention = {name!r}: {problem}, or set it to 'auto'")
        return chosen(name, "as asked for")
    passed_over = []
    for candidate in _PREFERENCE[platform]:
        problem = _refusal(candidate, *asked)
        if problem is None:
            return chosen(candidate, f"the kernel for {platform}", *passed_over)
        passed_over.append(f"not {candidate}: {problem}")
    if platform == "cpu" and row_tokens <= DENSE_UP_TO:
        return chosen("dense", f"rows of {row_tokens} tokens are one block")
    return chosen("chunked", f"exact in O(T) memory on {platform}", *passed_over)


DENSE = Attention("dense", "the definition", dense)
