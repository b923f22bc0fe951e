"""The engine: finished rows are filled again from the queue, prompts are read once per group.

The host keeps the books (who sits where, which pages are whose, what was drawn) and sends the
devices a few small arrays per call; the cache is theirs. A call draws up to ``block`` tokens for
every row and comes back sooner when enough rows have ended while others wait.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax.head import Head
from aspo_jax.model import Cache, Model, batch_sharding, cache_specs, shardings
from aspo_jax.sampler.choice import EVERYTHING, Choice
from aspo_jax.sampler.device import BROKEN, CUT, STOPPED, Device, Drawn, Rows
from aspo_jax.sampler.seam import LENGTH, NONFINITE, STOP, Completion, Request
from aspo_jax.sampler.seats import Group, Part, Queue, Seat

ENDINGS = {STOPPED: STOP, CUT: LENGTH, BROKEN: NONFINITE}
CLASSES = 4  # of rows by length: each reads as many pages as its longest row


class Limits(NamedTuple):
    """Shapes and stopping.

    max_prompt_tokens, max_response_tokens: longest prompt and response.
    slots: rows decoded at once. prompts: prompts read at once, both on all devices together.
    stop_ids: ids that end a response.
    page: positions in a page of the cache. cache_tokens: positions in all pages; None: room for
        every row at full length. With fewer, rows that find no page are drawn again later.
    cache_type: of the cached numbers, such as "int8"; None: that of the activations.
    read: cached positions of a row that are read at once, in whole pages. Few spare a CPU work,
        many spare an accelerator launches.
    block: positions drawn per device call at most.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    slots: int
    stop_ids: tuple[int, ...]
    prompts: int = 8
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

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    @property
    def row_pages(self) -> int:
        """Pages that the longest sequence needs."""
        return self.pages(self.max_prompt_tokens - 1) + self.pages(self.max_response_tokens)

    def pool_pages(self, parts: int) -> int:
        """Pages of each part of the devices.

        Raises:
            ValueError: the cache cannot hold one sequence on each part.
        """
        if self.cache_tokens is None:
            return self.slots // parts * self.row_pages
        pages = self.cache_tokens // self.page // parts
        # One page more than the longest needs, so that a prompt finds room beside no one.
        if pages < self.row_pages + 1:
            least = (self.row_pages + 1) * self.page * parts
            raise ValueError(
                f"Sampler.cache_tokens = {self.cache_tokens} cannot hold a sequence of full length "
                f"on each of {parts} part(s) of the devices; set it to at least {least}"
            )
        return pages


@dataclasses.dataclass
class Stats:
    """What one `sample` did.

    calls, steps: decode calls and the positions that they decoded. live: rows with a sequence,
    summed over the steps; busy_steps, busy_live: the same while requests were waiting.
    prefills, prefilled: calls of the prefill program and the prompt tokens that they read.
    evicted: rows put back for want of pages.
    """

    calls: int = 0
    steps: int = 0
    live: int = 0
    busy_steps: int = 0
    busy_live: int = 0
    prefills: int = 0
    prefilled: int = 0
    evicted: int = 0

    def add(self, steps: int, live: int, is_busy: bool) -> None:
        """Count a decode call."""
        self.calls += 1
        self.steps += steps
        self.live += live
        self.busy_steps += steps * is_busy
        self.busy_live += live * is_busy


class PagedSampler:
    """Continuous batching over a paged cache; see `Sampler` for the seam.

    ``publish`` makes of the params given to `start` those that the model here computes with.
    ``stops(tokens) -> length or None``: how many of the tokens complete a stop string, if any do.
    ``head.temperature`` may be 0: the likeliest id. See `drawing` for one that draws otherwise.
    ``prefill`` and ``decode`` are the jitted programs, ``rows`` the shardings of what each row
    gives them; ``stats`` is of the latest `sample`.
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
        stops: Callable[[Sequence[int]], int | None] | None = None,
        publish: Callable[[Any], Any] = lambda params: params,
    ):
        self.limits, self.stats, self.stops, self._publish = limits, Stats(), stops, publish
        self.params: Any = None
        self.temperature, self.choice = head.temperature, choice
        self.parts = mesh.shape["data"] * mesh.shape["fsdp"]
        self._device = device = Device(
            *(model, head, choice, limits.stop_ids, seed, limits.block),
            classes=math.gcd(limits.slots // self.parts, CLASSES),
            lot=max(limits.read // limits.page, 1),
        )
        kind = {} if limits.cache_type is None else {"kind": limits.cache_type}

        def empty() -> Cache:
            return model.empty_cache(self.parts, limits.pool_pages(self.parts), limits.page, **kind)

        self._cache = cache = shardings(mesh, cache_specs(jax.eval_shape(empty)))
        self._weights = weights = shardings(mesh, model.partition_specs())
        rows, pages = batch_sharding(mesh), batch_sharding(mesh, leading=1)
        self.rows = Rows(rows, rows, rows, rows, rows, rows, table_JN=pages)
        self.empty = jax.jit(empty, out_shardings=cache)
        self.prefill: Any = jax.jit(
            device.prefill,
            donate_argnums=1,
            in_shardings=(weights, cache, rows, rows, rows),
            out_shardings=cache,
        )
        self.decode: Any = self._jit_decode(device)

    def _jit_decode(self, device: Device) -> Any:
        return jax.jit(
            device.decode,
            donate_argnums=1,
            in_shardings=(self._weights, self._cache, self.rows, None, None, None),
            out_shardings=(self._cache, None),
        )

    def drawing(self, temperature: float, choice: Choice) -> PagedSampler:
        """A sampler that draws otherwise by the same programs, as far as they are the same.

        temperature: 0: the likeliest id. choice: where it truncates otherwise, `decode` is another.
        """
        other = copy.copy(self)
        other.temperature, other.choice = temperature, choice
        other.params, other.stats = None, Stats()
        if choice != self.choice:
            other.decode = self._jit_decode(self._device._replace(choice=choice))
        return other

    def shapes(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Shapes and shardings of what `prefill` and `decode` are given behind the weights."""
        limits, shape = self.limits, jax.ShapeDtypeStruct
        A, T, N = limits.prompts, limits.buckets[-1], limits.slots
        sizes = {"identity_N4": (N, 4), "table_JN": (limits.row_pages, N)}
        kinds = {"is_live_N": "bool", "identity_N4": "uint32"}
        of_rows = {
            name: shape(sizes.get(name, (N,)), kinds.get(name, "int32"), sharding=sharding)
            for name, sharding in vars(self.rows).items()
        }
        cache = jax.tree.map(
            lambda x, sharding: shape(x.shape, x.dtype, sharding=sharding),
            *(jax.eval_shape(self.empty), self._cache),
        )
        prompts = [
            shape(size, "int32", sharding=self.rows.token_N)
            for size in ((A, T), (A,), (A, limits.pages(T)))
        ]
        number = shape((), "int32")
        scalars = (number, number, shape((), "float32"))
        return (cache, *prompts), (cache, Rows(**of_rows), *scalars)

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
    """One `sample`: its queue, its seats and its cache."""

    def __init__(self, sampler: PagedSampler, requests: Iterable[Request]):
        self.sampler, self.limits, self.stats = sampler, sampler.limits, sampler.stats
        self.queue = Queue(requests, self.limits.max_prompt_tokens, self.limits.buckets)
        self.share = self.limits.slots // sampler.parts  # rows of a part
        pages = self.limits.pool_pages(sampler.parts)
        self.parts = [Part(self.share, self.limits.page, pages) for _ in range(sampler.parts)]
        self.cache: Any = None

    def run(self) -> Iterator[Completion]:
        """Fill free rows, draw, hand out what has ended; until nothing is left."""
        self.cache = self.sampler.empty()
        while True:
            yield from self._fill()
            if not any(part.seats for part in self.parts):
                return
            yield from self._advance()

    @property
    def is_anyone_waiting(self) -> bool:
        return bool(self.queue) or any(part.is_anyone_waiting for part in self.parts)

    # --- prompts ------------------------------------------------------------------------------

    def _fill(self) -> Iterator[Completion]:
        """Seat as many samples as there is room for; yields those that want no token."""
        while True:
            admitted = self._admit()
            if admitted:
                self._prefill(admitted)
            for part in self.parts:
                for number, _ in part.seat(self.limits.max_response_tokens):
                    nothing = np.zeros(0, np.float32)
                    yield Completion(number, nothing.astype(np.int32), nothing, LENGTH)
            if not admitted:
                return

    def _admit(self) -> list[tuple[int, Group]]:
        """Prompts of one bucket that rows want and pages have room for, with their parts."""
        admitted: list[tuple[int, Group]] = []
        for _ in range(self.limits.prompts // len(self.parts)):
            for e, part in enumerate(self.parts):
                group = None
                if part.wanting > 0:
                    group = self.queue.take(admitted[0][1].bucket if admitted else None)
                if group is None:
                    continue
                if not part.admit(group):
                    self.queue.put_back(group)
                    continue
                admitted.append((e, group))
        return admitted

    def _prefill(self, admitted: list[tuple[int, Group]]) -> None:
        A, T = self.limits.prompts, admitted[0][1].bucket
        token_AT = np.zeros((A, T), np.int32)
        length_A = np.zeros(A, np.int32)
        page_AJ = np.zeros((A, T // self.limits.page), np.int32)
        places = [iter(range(e * A // len(self.parts), A)) for e in range(len(self.parts))]
        for e, group in admitted:
            row, read = next(places[e]), group.tokens[:-1]
            token_AT[row, : len(read)] = read
            length_A[row] = len(read)
            page_AJ[row, : len(group.pages)] = group.pages
        # One of several processes has to say where its arrays go.
        prompts = jax.device_put((token_AT, length_A, page_AJ), self.sampler.rows.token_N)
        self.cache = self.sampler.prefill(self.sampler.params, self.cache, *prompts)
        self.stats.prefills += 1
        self.stats.prefilled += int(length_A.sum())

    # --- rows ---------------------------------------------------------------------------------

    def _advance(self) -> Iterator[Completion]:
        """One decode call and the completions that came out of it."""
        limits, stats = self.limits, self.stats
        for part in self.parts:
            homeless, evicted = part.reserve(limits.block)
            for group in homeless:
                self.queue.put_back(group)
            stats.evicted += evicted
        seats = {
            row: seat
            for e, part in enumerate(self.parts)
            for row, seat in enumerate(part.longest_first(), e * self.share)
        }
        is_busy = self.is_anyone_waiting
        # One row alone is not worth the way to the host and back, all of them would be a waste.
        enough = max(len(seats) - max(limits.slots // 16, 1), 0) if is_busy else 0
        before = {row: seat.drawn for row, seat in seats.items()}
        rows = jax.device_put(self._rows(seats), self.sampler.rows)
        self.cache, drawn = self.sampler.decode(
            *(self.sampler.params, self.cache, rows),
            *(np.int32(limits.block), np.int32(enough), np.float32(self.sampler.temperature)),
        )
        yield from self._hand_out(seats, jax.device_get(drawn))
        live = sum(seat.drawn - before[row] for row, seat in seats.items())
        stats.add(int(drawn.steps), live, is_busy)

    def _rows(self, seats: dict[int, Seat]) -> Rows:
        """The books as arrays; rows without a seat read and write page 0."""
        N = self.limits.slots
        token_N, drawn_N, prompt_N, limit_N = np.zeros((4, N), np.int32)
        identity_N4 = np.zeros((N, 4), np.uint32)
        table_JN = np.zeros((self.limits.row_pages, N), np.int32)
        is_live_N = np.zeros(N, bool)
        for row, seat in seats.items():
            token_N[row] = seat.token_T[-1] if seat.token_T else seat.group.tokens[-1]
            drawn_N[row], limit_N[row] = seat.drawn, seat.limit
            prompt_N[row] = len(seat.group.tokens) - 1
            identity_N4[row] = seat.request.identity
            pages = [*seat.group.pages, *seat.pages]
            table_JN[: len(pages), row] = pages
            is_live_N[row] = True
        return Rows(token_N, drawn_N, prompt_N, limit_N, is_live_N, identity_N4, table_JN)

    def _hand_out(self, seats: dict[int, Seat], drawn: Drawn) -> Iterator[Completion]:
        """Note what was drawn; rows that have ended leave as completions."""
        full_NT = drawn.full_logp_NT
        for row, seat in seats.items():
            new = int(drawn.drawn_N[row]) - seat.drawn
            seat.token_T += drawn.token_NT[row, :new].tolist()
            seat.logp_T += drawn.logp_NT[row, :new].tolist()
            seat.full_logp_T += [] if full_NT is None else full_NT[row, :new].tolist()
            ending = ENDINGS.get(int(drawn.ending_N[row]))
            length = self.sampler.stops(seat.token_T) if self.sampler.stops else None
            if length is not None:
                ending = STOP
            if ending is not None:
                self.parts[row // self.share].leave(seat)
                yield _completion(seat, ending, length, self.sampler.temperature == 0)


def _completion(seat: Seat, ending: str, length: int | None, is_greedy: bool) -> Completion:
    def array(x_T: list, dtype: Any) -> np.ndarray:
        return np.array(x_T[:length], dtype)

    token_T, logp_T = array(seat.token_T, np.int32), array(seat.logp_T, np.float32)
    full_logp_T = array(seat.full_logp_T, np.float32) if seat.full_logp_T else None
    if is_greedy:  # what was certain had probability 1
        full_logp_T = logp_T if full_logp_T is None else full_logp_T
        logp_T = np.zeros_like(logp_T)
    return Completion(seat.number, token_T, logp_T, ending, full_logp_T)
