"""One conversation with the devices: requests come in, tokens and completions go out, step by step.

The host keeps the books (which sequence runs in which row, which pages it reads, what was drawn)
and sends the devices a few small arrays per call; the cache stays on the devices.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from aspo_jax.sampler.device import BROKEN, CUT, STOPPED, Drawn, Rows
from aspo_jax.sampler.scheduler import Group, Queue, Sequence, Shard
from aspo_jax.sampler.seam import (
    LENGTH,
    NONFINITE,
    STOP,
    Completion,
    Delta,
    Drawing,
    Request,
    Step,
)

if TYPE_CHECKING:
    from aspo_jax.sampler.engine import PagedSampler

ENDINGS = {STOPPED: STOP, CUT: LENGTH, BROKEN: NONFINITE}


@dataclasses.dataclass
class Stats:
    """What a session did.

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


class Session:
    """Requests under way on a sampler's devices, with the parameters that it was started with."""

    def __init__(self, sampler: PagedSampler):
        self.sampler, self.limits, self.stats = sampler, sampler.limits, Stats()
        self.queue = Queue(self.limits)
        self.shard_rows = self.limits.slots // sampler.shard_count
        pages = self.limits.pool_pages(sampler.shard_count)
        counts = (self.shard_rows, self.limits.page, pages)
        self.shards = [Shard(*counts) for _ in range(sampler.shard_count)]
        self.cache: Any = None

    def submit(self, request: Request) -> int:
        """Let a request wait for a row; returns its number, which is how many there were before.

        Requests of one prompt that are submitted one after the other read it once.

        Raises:
            ValueError: its prompt does not fit, or it wants to be drawn otherwise where all rows
                are drawn alike.
        """
        if request.drawing is not None and not self.sampler.is_serving:
            raise ValueError(
                f"found {request.drawing} in a request; expected None, for this sampler draws all "
                "rows alike; see `PagedSampler.drawing`"
            )
        return self.queue.submit(request)

    def cancel(self, number: int) -> None:
        """Forget a request, wherever it is; no completion comes of it."""
        if not self.queue.cancel(number):
            for shard in self.shards:
                shard.cancel(number)

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self.has_waiting or any(shard.running for shard in self.shards))

    @property
    def has_waiting(self) -> bool:
        return bool(self.queue) or any(shard.has_waiting for shard in self.shards)

    def step(self) -> Step:
        """Fill free rows, draw some tokens for each; what has ended leaves."""
        if self.cache is None:
            if self.sampler.widths.is_due:
                self.sampler.compare_widths()
            self.cache = self.sampler.empty()
        ended = self._fill()
        step = self._advance()
        return step._replace(completions=[*ended, *step.completions])

    # --- prompts ------------------------------------------------------------------------------

    def _together(self, bucket: int) -> int:
        """Prompts of a bucket that one call reads."""
        return self.limits.together(bucket, len(self.shards))

    def _fill(self) -> list[Completion]:
        """Fill the free rows; returns the completions of requests for no token at all."""
        ended: list[Completion] = []
        while True:
            admitted = self._admit()
            if admitted and self.limits.chunk is None:
                self._prefill(admitted)
            if self.limits.chunk is not None and not admitted:
                self._extend(self.limits.chunk)
            for shard in self.shards:
                for number in shard.run_waiting(self.limits.response_room):
                    nothing = np.zeros(0, np.float32)
                    ended.append(Completion(number, nothing.astype(np.int32), nothing, LENGTH))
            if not admitted:
                return ended

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
        """Read whole prompts of one bucket."""
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
            group.read = len(read)
        # One of several processes has to say where its arrays go.
        prompts = jax.device_put((token_AT, length_A, page_AJ), self.sampler.row_shardings.token_N)
        self.cache = self.sampler.prefill(self.sampler.params, self.cache, *prompts)
        self._note_read(length_A)

    def _extend(self, T: int) -> None:
        """Read the next T tokens of the prompts that are not read to their end, the first ones."""
        A = self._together(T)
        each = A // len(self.shards)
        token_AT = np.zeros((A, T), np.int32)
        start_A, length_A = np.zeros((2, A), np.int32)
        table_JA = np.zeros((self.limits.row_pages, A), np.int32)
        for e, shard in enumerate(self.shards):
            for row, group in enumerate(shard.unread(each), e * each):
                some = group.tokens[group.read : min(group.read + T, len(group.tokens) - 1)]
                token_AT[row, : len(some)] = some
                start_A[row], length_A[row] = group.read, len(some)
                table_JA[: len(group.pages), row] = group.pages
                group.read += len(some)
        if not length_A.any():
            return
        where = self.sampler.row_shardings
        rows = jax.device_put((token_AT, start_A, length_A), where.token_N)
        table = jax.device_put(table_JA, where.table_JN)
        self.cache = self.sampler.extend(self.sampler.params, self.cache, *rows, table)
        self._note_read(length_A)

    def _note_read(self, length_A: np.ndarray) -> None:
        self.stats.prefills += 1
        self.stats.prefilled += int(length_A.sum())

    # --- rows ---------------------------------------------------------------------------------

    def _advance(self) -> Step:
        """One decode call and what came of it."""
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
        if not running:
            return Step([], [])
        is_busy = self.has_waiting
        widths = self.sampler.widths
        count = limits.slots if is_busy else widths.fitting(len(running))
        # Return to refill rows once a few have ended: each return costs time, each idle row too.
        few = max(len(running) - max(limits.slots // 16, 1), 0)
        enough = few if is_busy else widths.below(count)
        rows = jax.device_put(self._rows(running, count), self.sampler.row_shardings)
        self.cache, drawn = self.sampler.decode(
            *(self.sampler.params, self.cache, rows),
            *(np.int32(limits.block), np.int32(enough), np.float32(self.sampler.temperature)),
        )
        step = self._hand_out(running, jax.device_get(drawn))
        lengths = [len(delta.tokens) for delta in step.deltas]
        if not is_busy:
            widths.note(lengths)
        stats.add(int(drawn.steps), sum(lengths), is_busy)
        return step

    def _rows(self, running: dict[int, Sequence], count: int) -> Rows:
        """The running sequences as arrays of ``count`` rows."""
        rows = self.limits.no_rows(count, self.sampler.is_serving)
        for row, sequence in running.items():
            prompt = sequence.group.tokens
            rows.token_N[row] = sequence.token_T[-1] if sequence.token_T else prompt[-1]
            rows.drawn_N[row], rows.limit_N[row] = sequence.drawn, sequence.limit
            rows.prompt_N[row] = len(prompt) - 1
            rows.is_running_N[row] = True
            rows.identity_N4[row] = sequence.request.identity
            pages = [*sequence.group.pages, *sequence.pages]
            rows.table_JN[: len(pages), row] = pages
            if rows.drawings is not None:
                self._note_drawing(rows.drawings, row, sequence.request)
        return rows

    def _note_drawing(self, drawings: Any, row: int, request: Request) -> None:
        drawing = request.drawing or Drawing(self.sampler.temperature)
        for name, value in {**drawing._asdict(), "written": request.written}.items():
            getattr(drawings, f"{name}_N")[row] = value

    def _hand_out(self, running: dict[int, Sequence], drawn: Drawn) -> Step:
        """Note what was drawn; rows that have ended leave as completions."""
        completions, deltas = [], []
        for row, sequence in running.items():
            delta = self._grow(sequence, row, drawn)
            deltas.append(delta)
            ending = ENDINGS.get(int(drawn.ending_N[row]))
            length = self.sampler.stops(sequence.token_T) if self.sampler.stops else None
            if length is not None:
                ending = STOP
            if ending is not None:
                self.shards[row // self.shard_rows].finish(sequence)
                is_certain = not self.sampler.is_serving and self.sampler.temperature == 0
                completions.append(_completion(sequence, ending, length, is_certain))
        return Step(completions, deltas)

    def _grow(self, sequence: Sequence, row: int, drawn: Drawn) -> Delta:
        start, full_NT = sequence.drawn, drawn.full_logp_NT
        new = slice(int(drawn.drawn_N[row]) - start)
        tokens, logp = drawn.token_NT[row, new].tolist(), drawn.logp_NT[row, new].tolist()
        sequence.token_T += tokens
        sequence.logp_T += logp
        sequence.full_logp_T += [] if full_NT is None else full_NT[row, new].tolist()
        drawing, top = sequence.request.drawing, []
        if drawing is not None and drawing.top and drawn.listed_NTk is not None:
            token_NTk, logp_NTk = drawn.listed_NTk
            ids, each = (x[row, new, : drawing.top].tolist() for x in (token_NTk, logp_NTk))
            top = [list(zip(*pair, strict=True)) for pair in zip(ids, each, strict=True)]
        return Delta(sequence.number, start, tokens, logp, top)


def _completion(
    sequence: Sequence, ending: str, length: int | None, is_certain: bool
) -> Completion:
    """is_certain: each token was the likeliest one and taken without a draw."""

    def array(x_T: list, dtype: Any) -> np.ndarray:
        return np.array(x_T[:length], dtype)

    token_T, logp_T = array(sequence.token_T, np.int32), array(sequence.logp_T, np.float32)
    full_logp_T = array(sequence.full_logp_T, np.float32) if sequence.full_logp_T else None
    if is_certain:  # probability 1
        full_logp_T = logp_T if full_logp_T is None else full_logp_T
        logp_T = np.zeros_like(logp_T)
    return Completion(sequence.number, token_T, logp_T, ending, full_logp_T)
