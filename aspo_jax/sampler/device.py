"""The two programs on the devices: read prompts into pages, and draw tokens for every row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.head import Head, logits
from aspo_jax.model import Cache, Decode, Model, Prefill
from aspo_jax.sampler.choice import EVERYTHING, Choice, choose, identity_keys
from aspo_jax.structs import struct

RUNNING, STOPPED, CUT, BROKEN = range(4)  # what `Drawn.ending_N` says of a row


@struct
class Rows:
    """The rows of a decode call: made on the host, which keeps all of it, and sent to the devices.

    token_N: the last token of each row, not yet in its pages. drawn_N: response tokens so far.
    prompt_N: prompt tokens in the prompt's pages, all but the last. limit_N: longest response.
    is_running_N: False for rows without a sequence. identity_N4: of the request.
    table_JN: page numbers, see `Decode`.
    """

    token_N: Any
    drawn_N: Any
    prompt_N: Any
    limit_N: Any
    is_running_N: Any
    identity_N4: Any
    table_JN: Any


@struct
class Drawn:
    """What a call drew.

    token_NT, logp_NT, full_logp_NT: of each row as many entries count as its ``drawn_N`` grew;
    what follows them means nothing. full_logp_NT is None where it would equal ``logp_NT``.
    drawn_N: response tokens so far. ending_N: why the row ended, or `RUNNING`.
    steps: positions decoded, [].
    """

    token_NT: Array
    logp_NT: Array
    full_logp_NT: Array | None
    drawn_N: Array
    ending_N: Array
    steps: Array


class Programs(NamedTuple):
    """The two programs and what they close over.

    block: most tokens that a decode call can draw for a row. classes: how many of rows, and
    pages_per_read: see `Decode`.
    """

    model: Model
    head: Head
    choice: Choice
    stop_ids: tuple[int, ...]
    seed: int
    block: int
    classes: int
    pages_per_read: int

    def prefill(self, params, cache: Cache, token_AT: Array, length_A: Array, page_AJ: Array):
        """Fill pages with the first ``length_A`` tokens of prompts; returns the cache."""
        A, T = token_AT.shape
        position_AT = jnp.broadcast_to(jnp.arange(T), (A, T))
        segment_AT = (position_AT < length_A[:, None]).astype(jnp.int32)
        prompts = Prefill(cache, page_AJ)
        return self.model.apply(params, token_AT, position_AT, segment_AT, prompts)[1].cache

    def decode(
        self, params, cache: Cache, rows: Rows, steps: Array, enough: Array, temperature: Array
    ) -> tuple[Cache, Drawn]:
        """Draw up to ``steps`` tokens for each running row; stop when no more than ``enough`` run.

        temperature: divides the logits; 0: the likeliest id, no draw. An argument, so that training
            and evaluation are one program.
        """
        is_greedy = temperature == 0
        head = self.head._replace(temperature=jnp.where(is_greedy, 1.0, temperature))
        key_N = identity_keys(self.seed, rows.identity_N4)
        empty_NT = jnp.zeros((rows.token_N.shape[0], self.block), jnp.float32)
        drawn = Drawn(
            token_NT=empty_NT.astype(jnp.int32),
            logp_NT=empty_NT,
            full_logp_NT=None if self.choice == EVERYTHING else empty_NT,
            drawn_N=rows.drawn_N,
            ending_N=jnp.zeros_like(rows.drawn_N),
            steps=jnp.zeros((), jnp.int32),
        )

        def is_running_N(drawn: Drawn) -> Array:
            return rows.is_running_N & (drawn.ending_N == RUNNING)

        def is_unfinished(carry):
            running = jnp.sum(is_running_N(carry[2]), dtype=jnp.int32)
            return (carry[2].steps < steps) & (running > enough)

        def position_N1(drawn: Drawn) -> Array:
            return (rows.prompt_N + drawn.drawn_N)[:, None]

        def advance(carry):
            cache, token_N, drawn, rotary = carry
            growing = self._growing(cache, rows, drawn.drawn_N, is_running_N(drawn))
            segment_N1 = jnp.ones_like(token_N)[:, None]
            hidden_N1D, growing = self.model.apply(
                params, token_N[:, None], position_N1(drawn), segment_N1, growing, rotary
            )
            z_NV = logits(head, self.model.unembedding(params), hidden_N1D[:, 0])
            key_now_N = jax.vmap(jax.random.fold_in)(key_N, drawn.drawn_N)
            chosen = choose(z_NV, key_now_N, self.choice, is_greedy)
            now_N = is_running_N(drawn) & chosen.is_finite_N
            token_N = jnp.where(now_N, chosen.token_N, token_N)
            drawn = self._note(drawn, chosen, is_running_N(drawn), rows.limit_N)
            # The rotary table of the next step is carried: made in the step that uses it, it would
            # be fused into every use by XLA on a CPU, and made again for every head.
            return growing.cache, token_N, drawn, self.model.rotary(position_N1(drawn))

        start = (cache, rows.token_N, drawn, self.model.rotary(position_N1(drawn)))
        cache, _, drawn, _ = jax.lax.while_loop(is_unfinished, advance, start)
        return cache, drawn

    def _growing(self, cache: Cache, rows: Rows, drawn_N: Array, is_running_N: Array) -> Decode:
        """The rows, ready to take one more token each."""
        S = cache.key_EKYXSC.shape[4]
        # A row that has ended may have no page for another token: it overwrites its own first one.
        own_N = jnp.where(is_running_N, drawn_N, 0)
        pages_N = jnp.where(is_running_N, -(-rows.prompt_N // S) + own_N // S + 1, 0)
        E = cache.key_EKYXSC.shape[0]
        pages_c = jnp.max(pages_N.reshape(E, self.classes, -1), axis=(0, 2))
        return Decode(
            cache=cache,
            table_JN=rows.table_JN,
            prompt_N=rows.prompt_N,
            own_N=own_N,
            reads_c=-(-pages_c // self.pages_per_read),
            pages_per_read=self.pages_per_read,
        )

    def _note(self, drawn: Drawn, chosen: Any, is_running_N: Array, limit_N: Array) -> Drawn:
        """The call's record with one more token of each running row."""
        is_drawn_N = is_running_N & chosen.is_finite_N
        drawn_N = drawn.drawn_N + is_drawn_N
        is_stop_N = jnp.isin(chosen.token_N, jnp.asarray(self.stop_ids, jnp.int32))
        ending_N = jnp.select(
            [~is_running_N, ~chosen.is_finite_N, is_stop_N, drawn_N >= limit_N],
            [drawn.ending_N, BROKEN, STOPPED, CUT],
            RUNNING,
        )

        def write(x_NT: Array, x_N: Array) -> Array:
            return jax.lax.dynamic_update_slice(x_NT, x_N[:, None], (0, drawn.steps))

        full = drawn.full_logp_NT
        return Drawn(
            write(drawn.token_NT, chosen.token_N),
            write(drawn.logp_NT, chosen.logp_N),
            None if full is None else write(full, chosen.full_logp_N),
            *(drawn_N, ending_N, drawn.steps + 1),
        )
