"""The programs on the devices: read prompts into pages, and draw tokens for every row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.head import Head, logits
from aspo_jax.model import Cache, Decode, Extend, Model, Prefill
from aspo_jax.sampler.choice import (
    EVERYTHING,
    Choice,
    Chosen,
    Listed,
    choose,
    choose_each,
    identity_keys,
)
from aspo_jax.structs import struct

RUNNING, STOPPED, CUT, BROKEN = range(4)  # what `Drawn.ending_N` says of a row


@struct
class Rows:
    """The rows of a decode call: made on the host, which keeps all of it, and sent to the devices.

    token_N: the last token of each row, not yet in its pages. drawn_N: response tokens so far.
    prompt_N: prompt tokens in the prompt's pages, all but the last. limit_N: longest response.
    is_running_N: False for rows without a sequence. identity_N4: of the request.
    table_JN: page numbers, see `Decode`.
    drawings: where each row draws as its request wants; else None.
    """

    token_N: Any
    drawn_N: Any
    prompt_N: Any
    limit_N: Any
    is_running_N: Any
    identity_N4: Any
    table_JN: Any
    drawings: Any = None


@struct
class Drawn:
    """What a call drew.

    token_NT, logp_NT, full_logp_NT: of each row as many entries count as its ``drawn_N`` grew;
    what follows them means nothing. full_logp_NT is None where it would equal ``logp_NT``.
    drawn_N: response tokens so far. ending_N: why the row ended, or `RUNNING`.
    steps: positions decoded, [].
    listed_NTk: the likeliest ids at each position, where rows draw as their requests want.
    """

    token_NT: Array
    logp_NT: Array
    full_logp_NT: Array | None
    drawn_N: Array
    ending_N: Array
    steps: Array
    listed_NTk: Listed | None = None


class Serving(NamedTuple):
    """A sampler for requests that say how they are drawn.

    is_raw: see `choose_each`. listed: most likeliest ids that a request may ask for.
    """

    is_raw: bool = False
    listed: int = 20


class Programs(NamedTuple):
    """The programs and what they close over.

    block: most tokens that a decode call can draw for a row. class_rows: rows of a class on each
    shard, and pages_per_read: see `Decode`.
    choice: of every row, or `Serving`: as the requests want.
    """

    model: Model
    head: Head
    choice: Choice | Serving
    stop_ids: tuple[int, ...]
    seed: int
    block: int
    class_rows: int
    pages_per_read: int

    def prefill(self, params, cache: Cache, token_AT: Array, length_A: Array, page_AJ: Array):
        """Fill pages with the first ``length_A`` tokens of prompts; returns the cache."""
        A, T = token_AT.shape
        position_AT = jnp.broadcast_to(jnp.arange(T), (A, T))
        segment_AT = (position_AT < length_A[:, None]).astype(jnp.int32)
        prompts = Prefill(cache, page_AJ)
        return self.model.apply(params, token_AT, position_AT, segment_AT, prompts)[1].cache

    def extend(
        self,
        params,
        cache: Cache,
        token_AT: Array,
        start_A: Array,
        length_A: Array,
        table_JA: Array,
    ) -> Cache:
        """Read the next ``length_A`` tokens of prompts whose first ``start_A`` are in their pages.

        start_A: multiples of T, which is one of the page. table_JA: see `Decode`.
        """
        T = token_AT.shape[1]
        position_AT = start_A[:, None] + jnp.arange(T)
        segment_AT = (jnp.arange(T) < length_A[:, None]).astype(jnp.int32)
        prompts = Extend(cache, table_JA, start_A, length_A, self.pages_per_read)
        return self.model.apply(params, token_AT, position_AT, segment_AT, prompts)[1].cache

    def decode(
        self, params, cache: Cache, rows: Rows, steps: Array, enough: Array, temperature: Array
    ) -> tuple[Cache, Drawn]:
        """Draw up to ``steps`` tokens for each running row; stop when no more than ``enough`` run.

        temperature: divides the logits; 0: the likeliest id, no draw. An argument, so that training
            and evaluation are one program. Where rows draw as their requests want, it is not read.
        """
        key_N = identity_keys(self.seed, rows.identity_N4)
        empty_NT = jnp.zeros((rows.token_N.shape[0], self.block), jnp.float32)
        drawn = Drawn(
            token_NT=empty_NT.astype(jnp.int32),
            logp_NT=empty_NT,
            full_logp_NT=empty_NT if self._is_truncated else None,
            drawn_N=rows.drawn_N,
            ending_N=jnp.zeros_like(rows.drawn_N),
            steps=jnp.zeros((), jnp.int32),
            listed_NTk=self._nothing_listed(rows),
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
            hidden_ND, weight_VD = hidden_N1D[:, 0], self.model.unembedding(params)
            chosen, listed = self._choose(weight_VD, hidden_ND, key_N, drawn, rows, temperature)
            now_N = is_running_N(drawn) & chosen.is_finite_N
            token_N = jnp.where(now_N, chosen.token_N, token_N)
            drawn = self._note(drawn, chosen, listed, is_running_N(drawn), rows)
            # The rotary table of the next step is carried: made in the step that uses it, it would
            # be fused into every use by XLA on a CPU, and made again for every head.
            return growing.cache, token_N, drawn, self.model.rotary(position_N1(drawn))

        start = (cache, rows.token_N, drawn, self.model.rotary(position_N1(drawn)))
        cache, _, drawn, _ = jax.lax.while_loop(is_unfinished, advance, start)
        return cache, drawn

    def _choose(
        self,
        weight_VD: Array,
        hidden_ND: Array,
        key_N: Array,
        drawn: Drawn,
        rows: Rows,
        temperature: Array,
    ) -> tuple[Chosen, Listed | None]:
        """The next id of every row."""
        if isinstance(self.choice, Choice):
            is_greedy = temperature == 0
            head = self.head._replace(temperature=jnp.where(is_greedy, 1.0, temperature))
            z_NV = logits(head, weight_VD, hidden_ND)
            key_now_N = jax.vmap(jax.random.fold_in)(key_N, drawn.drawn_N)
            return choose(z_NV, key_now_N, self.choice, is_greedy), None
        z_NV = logits(self.head._replace(temperature=1.0), weight_VD, hidden_ND)
        number_N = rows.drawings.written_N + drawn.drawn_N
        key_now_N = jax.vmap(jax.random.fold_in)(key_N, number_N)
        return choose_each(z_NV, key_now_N, rows.drawings, **self.choice._asdict())

    @property
    def _is_truncated(self) -> bool:
        """Whether ids have another log-probability under the whole softmax."""
        return isinstance(self.choice, Choice) and self.choice != EVERYTHING

    def _nothing_listed(self, rows: Rows) -> Listed | None:
        if isinstance(self.choice, Choice):
            return None
        shape = (rows.token_N.shape[0], self.block, self.choice.listed)
        return Listed(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    def _growing(self, cache: Cache, rows: Rows, drawn_N: Array, is_running_N: Array) -> Decode:
        """The rows, ready to take one more token each."""
        S = cache.key_EKYXSC.shape[4]
        # A row that has ended may have no page for another token: it overwrites its own first one.
        own_N = jnp.where(is_running_N, drawn_N, 0)
        pages_N = jnp.where(is_running_N, -(-rows.prompt_N // S) + own_N // S + 1, 0)
        E = cache.key_EKYXSC.shape[0]
        pages_c = jnp.max(pages_N.reshape(E, -1, self.class_rows), axis=(0, 2))
        return Decode(
            cache=cache,
            table_JN=rows.table_JN,
            prompt_N=rows.prompt_N,
            own_N=own_N,
            reads_c=-(-pages_c // self.pages_per_read),
            pages_per_read=self.pages_per_read,
            in_place=self.model.in_place,
        )

    def _note(
        self,
        drawn: Drawn,
        chosen: Chosen,
        listed: Listed | None,
        is_running_N: Array,
        rows: Rows,
    ) -> Drawn:
        """The call's record with one more token of each running row."""
        is_drawn_N = is_running_N & chosen.is_finite_N
        drawn_N = drawn.drawn_N + is_drawn_N
        is_stop_N = jnp.isin(chosen.token_N, jnp.asarray(self.stop_ids, jnp.int32))
        if rows.drawings is not None:
            is_stop_N &= ~rows.drawings.ignores_stops_N
        ending_N = jnp.select(
            [~is_running_N, ~chosen.is_finite_N, is_stop_N, drawn_N >= rows.limit_N],
            [drawn.ending_N, BROKEN, STOPPED, CUT],
            RUNNING,
        )

        def write(x_NT: Array, x_N: Array) -> Array:
            at = (0, drawn.steps, *[0] * (x_NT.ndim - 2))
            return jax.lax.dynamic_update_slice(x_NT, x_N[:, None], at)

        full = drawn.full_logp_NT
        return Drawn(
            write(drawn.token_NT, chosen.token_N),
            write(drawn.logp_NT, chosen.logp_N),
            None if full is None else write(full, chosen.full_logp_N),
            *(drawn_N, ending_N, drawn.steps + 1),
            jax.tree.map(write, drawn.listed_NTk, listed),
        )
