"""Sampling: prefill the prompts, decode with a cache, yield completions as they finish.

A sampler knows tokens, not texts or rewards. Its seam is small; other engines fit behind it:

    sampler.start(params)              # once per policy
    for completion in sampler.sample(requests): ...

Randomness is by identity: the draw at a position is `fold_in` of the seed, the request's identity
(domain, draw index, retry round, sample index) and the position, so a completion does not depend on
its batch neighbours, its slot or the order of requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from aspo_jax.head import FORBIDDEN, Head, logits
from aspo_jax.model import RULES, Cache, Model, batch_sharding, shardings
from aspo_jax.structs import struct

TRAIN, EVALUATE, WARM_START = range(3)  # domains of random draws


class Request(NamedTuple):
    """One completion to sample.

    tokens: prompt token ids.
    identity: (domain, draw index, retry round, sample index), each a non-negative 32-bit integer.
    """

    tokens: Sequence[int]
    identity: tuple[int, int, int, int]


class Completion(NamedTuple):
    """What the policy wrote.

    request: position of its request among those given to `sample`.
    tokens_T: ids, the end-of-sequence token included where ``is_finished``.
    logp_T: log-probability of each id at the head's temperature, before top-k and top-p.
    is_finished: the policy ended the text itself; otherwise it was cut at the length limit.
    """

    request: int
    tokens_T: np.ndarray
    logp_T: np.ndarray
    is_finished: bool


class Sampler(Protocol):
    """The seam: every engine that can sample from a policy."""

    def start(self, params: Any) -> None:
        """Use these parameters from now on."""
        ...

    def release(self) -> None:
        """Forget them: until the next `start` their memory is the update's."""
        ...

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish."""
        ...


class Limits(NamedTuple):
    """Shapes and stopping: prompt bucket P, longest response R, rows N at once, stop id."""

    max_prompt_tokens: int
    max_response_tokens: int
    slots: int
    eos_id: int
    block: int = 256  # positions decoded per device call, after which finished rows are yielded


class Truncation(NamedTuple):
    """Restrict each draw to the ``top_k`` likeliest ids (0: all) within mass ``top_p``."""

    top_k: int = 0
    top_p: float = 1.0


EVERYTHING = Truncation()


@struct
class _Decoding:
    """A batch of rows in mid-air. ``time`` counts the response positions drawn so far."""

    cache: Cache
    key_N: Array
    prompt_length_N: Array
    token_N: Array
    is_done_N: Array
    token_NT: Array
    logp_NT: Array
    time: Array


def truncate(logp_NV: Array, truncation: Truncation) -> Array:
    """Log-probabilities with the tail of the distribution forbidden; not renormalised."""
    if truncation.top_k > 0:
        kth_N1 = jax.lax.top_k(logp_NV, truncation.top_k)[0][:, -1:]
        logp_NV = jnp.where(logp_NV < kth_N1, FORBIDDEN, logp_NV)
    if truncation.top_p < 1.0:
        sorted_NV = jnp.flip(jnp.sort(logp_NV, axis=-1), axis=-1)
        p_NV = jax.nn.softmax(sorted_NV, axis=-1)
        mass_before_NV = jnp.cumsum(p_NV, axis=-1) - p_NV
        is_kept_NV = mass_before_NV < truncation.top_p
        floor_N1 = jnp.min(jnp.where(is_kept_NV, sorted_NV, jnp.inf), axis=-1, keepdims=True)
        logp_NV = jnp.where(logp_NV < floor_N1, FORBIDDEN, logp_NV)
    return logp_NV


def identity_keys(seed: int, identity_N4: Array) -> Array:
    """One key per request from the run's seed and the request's identity."""

    def fold(key, identity_4):
        for part in identity_4:
            key = jax.random.fold_in(key, part)
        return key

    return jax.vmap(fold, in_axes=(None, 0))(jax.random.key(seed), identity_N4)


def make_publish(model: Model, mesh: Mesh, local: Mesh, dtype: Any) -> Callable[[Any], Any]:
    """The learner's params on ``mesh`` -> the sampler's on ``local``, this process's own devices.

    Matrices are cast to ``dtype`` (as the forward pass would; norms stay float32) and gathered over
    the fsdp axis, so that no collective is left in decoding but those of tensor parallelism. Where
    type and layout agree already, the arrays are the learner's own.
    """
    specs = model.partition_specs()
    whole = shardings(mesh, jax.tree.map(_unsharded, specs, is_leaf=_is_spec))
    at_home = shardings(local, specs)

    def cast(path, x):
        is_matrix = "norm" not in jax.tree_util.keystr(path)
        return x.astype(dtype) if is_matrix else x

    gather = jax.jit(partial(jax.tree_util.tree_map_with_path, cast), out_shardings=whole)

    def publish(params: Any) -> Any:
        if jax.process_count() == 1 and mesh == local and jnp.dtype(dtype) == jnp.float32:
            return params
        return jax.tree.map(_on_own_devices, gather(params), at_home)

    return publish


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _unsharded(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == RULES["embed"] else axis for axis in spec))


def _on_own_devices(x: Array, sharding: Any) -> Array:
    """This process's shards of an array that it holds whole, as an array of its own."""
    own = {shard.device: shard.data for shard in x.addressable_shards}
    parts = [own[device] for device in sharding.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


class BatchSampler:
    """Decode whole batches of ``slots`` rows; stop early when every row has ended.

    ``publish`` makes of the params given to `start` those that the model here computes with.
    ``prefill`` and ``decode`` are the jitted programs.
    """

    def __init__(
        self,
        model: Model,
        head: Head,
        limits: Limits,
        mesh: Mesh,
        *,
        seed: int,
        truncation: Truncation = EVERYTHING,
        publish: Callable[[Any], Any] = lambda params: params,
    ):
        self.limits, self.seed, self._publish = limits, seed, publish
        self._params = None
        rows = batch_sharding(mesh)
        weights = shardings(mesh, model.partition_specs())
        program = _Program(model, head, limits, truncation)
        self.prefill = jax.jit(program.prefill, in_shardings=(weights, rows, rows, rows))
        self.decode = jax.jit(program.decode, donate_argnums=1)

    def start(self, params: Any) -> None:
        """Use these parameters from now on."""
        self._params = self._publish(params)

    def release(self) -> None:
        """Forget them: until the next `start` their memory is the update's."""
        self._params = None

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish.

        Raises:
            ValueError: a prompt is empty or longer than ``max_prompt_tokens``.
        """
        numbered = enumerate(requests)
        while batch := list(itertools.islice(numbered, self.limits.slots)):
            yield from self._sample_batch(batch)

    def _sample_batch(self, batch: Sequence[tuple[int, Request]]) -> Iterator[Completion]:
        decoding = self.prefill(self._params, *self._pad_left(batch))
        is_waiting_N = np.arange(self.limits.slots) < len(batch)
        while is_waiting_N.any():
            decoding = self.decode(self._params, decoding)
            time = int(decoding.time)
            is_over = time >= self.limits.max_response_tokens
            is_done_N = np.asarray(decoding.is_done_N)
            token_NT, logp_NT = np.asarray(decoding.token_NT), np.asarray(decoding.logp_NT)
            for row in map(int, np.flatnonzero(is_waiting_N & (is_done_N | is_over))):
                yield self._completion(
                    batch[row][0], token_NT[row, :time], logp_NT[row], bool(is_done_N[row])
                )
                is_waiting_N[row] = False

    def _completion(self, request: int, token_T, logp_T, is_finished: bool) -> Completion:
        # The mask comes from here: a row's length is where it ended, whatever ids it holds.
        ends = np.flatnonzero(token_T == self.limits.eos_id)
        length = int(ends[0]) + 1 if is_finished else len(token_T)
        return Completion(request, token_T[:length].copy(), logp_T[:length].copy(), is_finished)

    def _pad_left(self, batch: Sequence[tuple[int, Request]]):
        N, P = self.limits.slots, self.limits.max_prompt_tokens
        token_NP = np.zeros((N, P), np.int32)
        length_N = np.zeros(N, np.int32)  # a row without a request starts out as done
        identity_N4 = np.zeros((N, 4), np.uint32)
        for row, (number, request) in enumerate(batch):
            length = len(request.tokens)
            if not 0 < length <= P:
                raise ValueError(
                    f"request {number} (identity {request.identity}): its prompt has {length} "
                    f"tokens, expected 1 to {P}; raise Sampler.max_prompt_tokens or shorten it"
                )
            token_NP[row, P - length :] = request.tokens
            length_N[row] = length
            identity_N4[row] = request.identity
        keys = identity_keys(self.seed, jnp.asarray(identity_N4))
        return jnp.asarray(token_NP), jnp.asarray(length_N), keys


class _Program:
    """The two device programs: prefill draws the first token, decode draws the others."""

    def __init__(self, model: Model, head: Head, limits: Limits, truncation: Truncation):
        self.model, self.head, self.limits, self.truncation = model, head, limits, truncation

    def prefill(self, params, token_NP: Array, length_N: Array, key_N: Array) -> _Decoding:
        N, P = token_NP.shape
        R = self.limits.max_response_tokens
        position_NP = jnp.arange(P) - (P - length_N)[:, None]
        segment_NP = (position_NP >= 0).astype(jnp.int32)
        cache = self.model.empty_cache(N, P + R)
        hidden_NPD, cache = self.model.apply(
            params, token_NP, jnp.maximum(position_NP, 0), segment_NP, cache, fresh=True
        )
        decoding = _Decoding(
            cache=cache,
            key_N=key_N,
            prompt_length_N=length_N,
            token_N=jnp.zeros(N, jnp.int32),
            is_done_N=length_N == 0,
            token_NT=jnp.zeros((N, R), jnp.int32),
            logp_NT=jnp.zeros((N, R), jnp.float32),
            time=jnp.zeros((), jnp.int32),
        )
        return self.draw(params, decoding, hidden_NPD[:, -1], cache)

    def decode(self, params, decoding: _Decoding) -> _Decoding:
        stop = jnp.minimum(decoding.time + self.limits.block, self.limits.max_response_tokens)

        def is_running(decoding: _Decoding):
            return (decoding.time < stop) & ~jnp.all(decoding.is_done_N)

        def advance(decoding: _Decoding) -> _Decoding:
            position_N = decoding.prompt_length_N + decoding.time - 1
            hidden_N1D, cache = self.model.apply(
                params,
                decoding.token_N[:, None],
                position_N[:, None],
                jnp.ones((decoding.token_N.shape[0], 1), jnp.int32),
                decoding.cache,
            )
            return self.draw(params, decoding, hidden_N1D[:, 0], cache)

        return jax.lax.while_loop(is_running, advance, decoding)

    def draw(self, params, decoding: _Decoding, hidden_ND: Array, cache: Cache) -> _Decoding:
        """Draw the next token of each row; rows that have ended stay as they are."""
        z_NV = logits(self.head, self.model.unembedding(params), hidden_ND)
        logp_NV = jax.nn.log_softmax(z_NV, axis=-1)
        key_N = jax.vmap(jax.random.fold_in, in_axes=(0, None))(decoding.key_N, decoding.time)
        token_N = jax.vmap(jax.random.categorical)(key_N, truncate(logp_NV, self.truncation))
        logp_N = jnp.take_along_axis(logp_NV, token_N[:, None], axis=-1)[:, 0]
        is_live_N = ~decoding.is_done_N
        token_N = jnp.where(is_live_N, token_N, 0).astype(jnp.int32)

        def write(x_NT: Array, x_N: Array) -> Array:
            return jax.lax.dynamic_update_slice(x_NT, x_N[:, None], (0, decoding.time))

        return _Decoding(
            cache=cache,
            key_N=decoding.key_N,
            prompt_length_N=decoding.prompt_length_N,
            token_N=token_N,
            is_done_N=decoding.is_done_N | (token_N == self.limits.eos_id),
            token_NT=write(decoding.token_NT, token_N),
            logp_NT=write(decoding.logp_NT, jnp.where(is_live_N, logp_N, 0.0)),
            time=decoding.time + 1,
        )
