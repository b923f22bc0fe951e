"""The engine: finished rows are filled again from the queue, prompts are read once per group.

The host keeps the books (which sequence runs in which row, which pages it reads, what was drawn)
and sends the devices a few small arrays per call; the cache stays on the devices. A call draws up
to ``block`` tokens for every row, and returns sooner when enough rows have ended while requests
wait.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax.head import Head
from aspo_jax.model import Cache, Model, batch_sharding, cache_specs, shardings
from aspo_jax.model.sharding import placed, row_shards
from aspo_jax.sampler.choice import EVERYTHING, Choice
from aspo_jax.sampler.device import BROKEN, CUT, STOPPED, Drawn, Programs, Rows
from aspo_jax.sampler.scheduler import Group, Queue, Sequence, Shard
from aspo_jax.sampler.seam import LENGTH, NONFINITE, STOP, Completion, Request

ENDINGS = {STOPPED: STOP, CUT: LENGTH, BROKEN: NONFINITE}
CLASSES = 4  # of rows by length: each reads as many pages as its longest row


class Limits(NamedTuple):
    """Shapes and stopping.

    max_prompt_tokens, max_response_tokens: longest prompt and response.
    slots: rows decoded at once. prompts: prompts read at once, both on all devices together.
    prefill: with it no more prompts are read at once than are so many tokens: a CPU, whose products
        are no faster with more, then reads little padding in the place of prompts that are not
        there.
    stop_ids: ids that end a response.
    page: positions in a page of the cache. cache_tokens: positions in all pages; None: room for
        every row at full length. With fewer, sequences that find no page are drawn again later.
    cache_type: of the cached numbers, such as "int8"; None: that of the activations.
    read: cached positions of a row that are read at once, in whole pages. Reading few saves a CPU
        work beyond a row's end, reading many saves an accelerator launches.
    block: most tokens of a row that one decode call draws.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    slots: int
    stop_ids: tuple[int, ...]
    prompts: int = 8
    prefill: int | None = None
    page: int = 64
    cache_tokens: int | None = None
    cache_type: str | None = None
    read: int = 64
    block: int = 64

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths to which prompts are padded: a quarter, a half and all of the longest.

        Whole pages; long ones in multiples of 128 too, as the attention kernels of a TPU want them.
        """
        longest = self.max_prompt_tokens - 1  # the last token is the first to be decoded
        unit = self.page if longest <= 128 else math.lcm(self.page, 128)
        sizes = (longest // 4, longest // 2, longest)
        return tuple(sorted({max(-(-size // unit), 1) * unit for size in sizes}))

    def together(self, bucket: int, shards: int) -> int:
        """Prompts of a bucket that are read at once, the same number on each shard."""
        if self.prefill is None:
            return self.prompts
        return min(self.prompts, max(self.prefill // bucket // shards, 1) * shards)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    @property
    def row_pages(self) -> int:
        """Pages that the longest sequence needs."""
        return self.pages(self.max_prompt_tokens - 1) + self.pages(self.max_response_tokens)

    def no_rows(self) -> Rows:
        """Arrays for `slots` rows without a sequence, which read and write page 0."""
        N = self.slots
        return Rows(
            *(np.zeros(N, np.int32) for _ in range(4)),
            is_running_N=np.zeros(N, bool),
            identity_N4=np.zeros((N, 4), np.uint32),
            table_JN=np.zeros((self.row_pages, N), np.int32),
        )

    def pool_pages(self, shards: int) -> int:
        """Pages of each shard of the devices.

        Raises:
            ValueError: the cache cannot hold one sequence on each shard.
        """
        if self.cache_tokens is None:
            return self.slots // shards * self.row_pages
        pages = self.cache_tokens // self.page // shards
        # One page more than the longest sequence needs: `Shard.admit` leaves its sample one.
        if pages < self.row_pages + 1:
            least = (self.row_pages + 1) * self.page * shards
            raise ValueError(
                f"Sampler.cache_tokens = {self.cache_tokens} cannot hold a sequence of full length "
                f"on each of {shards} shard(s) of the devices; set it to at least {least}"
            )
        return pages


@dataclasses.dataclass
class Stats:
    """What one `sample` did.

    calls, steps: decode calls and the positions that they decoded. tokens: drawn in all rows, those
    drawn again included. busy_steps, busy_tokens: the same while requests were waiting.
    prefills, prefilled: calls of the prefill program and the prompt tokens that they read.
    preempted: sequences that lost their row for want of pages.
    """

    calls: int = 0
    steps: int = 0
    tokens: int = 0
    busy_steps: int = 0
    busy_tokens: int = 0
    prefills: int = 0
    prefilled: int = 0
    preempted: int = 0

    def add(self, steps: int, tokens: int, is_busy: bool) -> None:
        """Count a decode call."""
        self.calls += 1
        self.steps += steps
        self.tokens += tokens
        self.busy_steps += steps * is_busy
        self.busy_tokens += tokens * is_busy


class PagedSampler:
    """Continuous batching over a paged cache; see `Sampler` for the seam.

    ``publish`` turns the params given to `start` into those that this model computes with.
    ``stops(tokens) -> length or None``: how many of the tokens complete a stop string, if any do.
    ``head.temperature`` may be 0: the likeliest id. `drawing` makes a sampler that draws otherwise.
    ``prefill`` and ``decode`` are the jitted programs, ``row_shardings`` those of the rows they are
    given; ``stats`` is of the latest `sample`.
    """

    def __init__(
        self,
        model: Model,
        head: Head,
        limits: Limits,
        mesh: Mesh,
        *,
        seed: int,
        choice: Choice = EVERYTHING,
        stops: Callable[[list[int]], int | None] | None = None,
        publish: Callable[[Any], Any] = lambda params: params,
    ):
        self.limits, self.stats, self.stops, self._publish = limits, Stats(), stops, publish
        self.params: Any = None
        self.temperature, self.choice = head.temperature, choice
        self.shard_count = row_shards(mesh)
        self._programs = programs = Programs(
            *(model, head, choice, limits.stop_ids, seed, limits.block),
            classes=math.gcd(limits.slots // self.shard_count, CLASSES),
            pages_per_read=max(limits.read // limits.page, 1),
        )
        kind = {} if limits.cache_type is None else {"kind": limits.cache_type}

        def empty() -> Cache:
            pages = limits.pool_pages(self.shard_count)
            return model.empty_cache(self.shard_count, pages, limits.page, **kind)

        self._cache = cache = shardings(mesh, cache_specs(jax.eval_shape(empty)))
        self._weights = weights = model.shardings(mesh)
        rows = batch_sharding(mesh)
        of_pages = batch_sharding(mesh, leading=1)
        self.row_shardings = dataclasses.replace(Rows(*[rows] * 7), table_JN=of_pages)
        self.empty = jax.jit(empty, out_shardings=cache)
        self.prefill: Any = jax.jit(
            programs.prefill,
            donate_argnums=1,
            in_shardings=(weights, cache, rows, rows, rows),
            out_shardings=cache,
        )
        self.decode: Any = self._jit_decode(programs)

    def _jit_decode(self, programs: Programs) -> Any:
        return jax.jit(
            programs.decode,
            donate_argnums=1,
            in_shardings=(self._weights, self._cache, self.row_shardings, None, None, None),
            out_shardings=(self._cache, None),
        )

    def drawing(self, temperature: float, choice: Choice) -> PagedSampler:
        """A sampler that shares the programs of this one but draws otherwise.

        temperature: 0: the likeliest id. choice: if it is another, `decode` is compiled again.
        """
        other = copy.copy(self)
        other.temperature, other.choice = temperature, choice
        other.params, other.stats = None, Stats()
        if choice != self.choice:
            other.decode = self._jit_decode(self._programs._replace(choice=choice))
        return other

    def shapes(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Shapes and shardings of what `prefill` and `decode` are given after the weights."""
        limits, shape = self.limits, jax.ShapeDtypeStruct
        T = limits.buckets[-1]
        A = limits.together(T, self.shard_count)
        rows = placed(limits.no_rows(), self.row_shardings)
        cache = placed(jax.eval_shape(self.empty), self._cache)
        prompts = [
            shape(size, "int32", sharding=self.row_shardings.token_N)
            for size in ((A, T), (A,), (A, limits.pages(T)))
        ]
        number = shape((), "int32")
        scalars = (number, number, shape((), "float32"))
        return (cache, *prompts), (cache, rows, *scalars)

    def start(self, params: Any) -> None:
        """Use these parameters from now on."""
        self.params = self._publish(params)

    def release(self) -> None:
        """Forget them: until the next `start` their memory is the update's."""
        self.params = None

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish.

        Raises:
            ValueError: a prompt is empty or longer than ``max_prompt_tokens``.
        """
        self.stats = Stats()
        return _Session(self, requests).run()


class _Session:
    """One `sample`: its queue, its shards and its cache."""

    def __init__(self, sampler: PagedSampler, requests: Iterable[Request]):
        self.sampler, self.limits, self.stats = sampler, sampler.limits, sampler.stats
        self.queue = Queue(requests, self.limits.max_prompt_tokens, self.limits.buckets)
        self.shard_rows = self.limits.slots // sampler.shard_count
        pages = self.limits.pool_pages(sampler.shard_count)
        counts = (self.shard_rows, self.limits.page, pages)
        self.shards = [Shard(*counts) for _ in range(sampler.shard_count)]
        self.cache: Any = None

    def run(self) -> Iterator[Completion]:
        """Fill free rows, draw, hand out what has ended; until nothing is left."""
        self.cache = self.sampler.empty()
        while True:
            yield from self._fill()
            if not any(shard.running for shard in self.shards):
                return
            yield from self._advance()

    @property
    def has_waiting(self) -> bool:
        return bool(self.queue) or any(shard.has_waiting for shard in self.shards)

    # --- prompts ------------------------------------------------------------------------------

    def _together(self, bucket: int) -> int:
        """Prompts of a bucket that one call reads."""
        return self.limits.together(bucket, len(self.shards))

    def _fill(self) -> Iterator[Completion]:
        """Fill the free rows; yields the completions of requests for no token at all."""
        while True:
            admitted = self._admit()
            if admitted:
                self._prefill(admitted)
            for shard in self.shards:
                for number in shard.run_waiting(self.limits.max_response_tokens):
                    nothing = np.zeros(0, np.float32)
                    yield Completion(number, nothing.astype(np.int32), nothing, LENGTH)
            if not admitted:
                return

    def _admit(self) -> list[tuple[int, Group]]:
        """Take prompts of one bucket for which there are free rows and pages; with their shards."""
        admitted: list[tuple[int, Group]] = []
        for count in range(self.limits.prompts // len(self.shards)):
            if admitted and count == self._together(admitted[0][1].bucket) // len(self.shards):
                break
            for e, shard in enumerate(self.shards):
                bucket = admitted[0][1].bucket if admitted else None
                group = self.queue.take(bucket) if shard.unclaimed_rows > 0 else None
                if group is not None and shard.admit(group):
                    admitted.append((e, group))
                elif group is not None:
                    self.queue.put_back(group)
        return admitted

    def _prefill(self, admitted: list[tuple[int, Group]]) -> None:
        T = admitted[0][1].bucket
        A = self._together(T)
        token_AT = np.zeros((A, T), np.int32)
        length_A = np.zeros(A, np.int32)
        page_AJ = np.zeros((A, T // self.limits.page), np.int32)
        places = [iter(range(e * A // len(self.shards), A)) for e in range(len(self.shards))]
        for e, group in admitted:
            row, read = next(places[e]), group.tokens[:-1]
            token_AT[row, : len(read)] = read
            length_A[row] = len(read)
            page_AJ[row, : len(group.pages)] = group.pages
        # One of several processes has to say where its arrays go.
        prompts = jax.device_put((token_AT, length_A, page_AJ), self.sampler.row_shardings.token_N)
        self.cache = self.sampler.prefill(self.sampler.params, self.cache, *prompts)
        self.stats.prefills += 1
        self.stats.prefilled += int(length_A.sum())

    # --- rows ---------------------------------------------------------------------------------

    def _advance(self) -> Iterator[Completion]:
        """One decode call and the completions that came out of it."""
        limits, stats = self.limits, self.stats
        for shard in self.shards:
            evicted, preempted = shard.reserve(limits.block)
            for group in evicted:
                self.queue.put_back(group)
            stats.preempted += preempted
        running = {
            row: sequence
            for e, shard in enumerate(self.shards)
            for row, sequence in enumerate(shard.longest_first(), e * self.shard_rows)
        }
        is_busy = self.has_waiting
        # Return to refill rows once a few have ended: each return costs time, each idle row too.
        enough = max(len(running) - max(limits.slots // 16, 1), 0) if is_busy else 0
        before = {row: sequence.drawn for row, sequence in running.items()}
        rows = jax.device_put(self._rows(running), self.sampler.row_shardings)
        self.cache, drawn = self.sampler.decode(
            *(self.sampler.params, self.cache, rows),
            *(np.int32(limits.block), np.int32(enough), np.float32(self.sampler.temperature)),
        )
        yield from self._hand_out(running, jax.device_get(drawn))
        tokens = sum(sequence.drawn - before[row] for row, sequence in running.items())
        stats.add(int(drawn.steps), tokens, is_busy)

    def _rows(self, running: dict[int, Sequence]) -> Rows:
        """The running sequences as arrays."""
        rows = self.limits.no_rows()
        for row, sequence in running.items():
            prompt = sequence.group.tokens
            rows.token_N[row] = sequence.token_T[-1] if sequence.token_T else prompt[-1]
            rows.drawn_N[row], rows.limit_N[row] = sequence.drawn, sequence.limit
            rows.prompt_N[row] = len(prompt) - 1
            rows.is_running_N[row] = True
            rows.identity_N4[row] = sequence.request.identity
            pages = [*sequence.group.pages, *sequence.pages]
            rows.table_JN[: len(pages), row] = pages
        return rows

    def _hand_out(self, running: dict[int, Sequence], drawn: Drawn) -> Iterator[Completion]:
        """Note what was drawn; rows that have ended leave as completions."""
        full_NT = drawn.full_logp_NT
        for row, sequence in running.items():
            new = int(drawn.drawn_N[row]) - sequence.drawn
            sequence.token_T += drawn.token_NT[row, :new].tolist()
            sequence.logp_T += drawn.logp_NT[row, :new].tolist()
            sequence.full_logp_T += [] if full_NT is None else full_NT[row, :new].tolist()
            ending = ENDINGS.get(int(drawn.ending_N[row]))
            length = self.sampler.stops(sequence.token_T) if self.sampler.stops else None
            if length is not None:
                ending = STOP
            if ending is not None:
                self.shards[row // self.shard_rows].finish(sequence)
                yield _completion(sequence, ending, length, self.sampler.temperature == 0)


def _completion(sequence: Sequence, ending: str, length: int | None, is_greedy: bool) -> Completion:
    def array(x_T: list, dtype: Any) -> np.ndarray:
        return np.array(x_T[:length], dtype)

    token_T, logp_T = array(sequence.token_T, np.int32), array(sequence.logp_T, np.float32)
    full_logp_T = array(sequence.full_logp_T, np.float32) if sequence.full_logp_T else None
    if is_greedy:  # the token was certain: probability 1
        full_logp_T = logp_T if full_logp_T is None else full_logp_T
        logp_T = np.zeros_like(logp_T)
    return Completion(sequence.number, token_T, logp_T, ending, full_logp_T)
