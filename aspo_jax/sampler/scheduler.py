"""Which sequence runs in which row and reads which pages. On the host; no arrays of the device.

A prompt waits in the `Queue` until a shard has pages for it. Its samples then wait in the `Shard`
for free rows, run, and finish. When pages run out, running sequences are preempted: they wait
again. A shard is the devices that share rows and pages; all samples of a prompt go to one shard,
because they read the same pages.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator

from aspo_jax.sampler.limits import Limits
from aspo_jax.sampler.seam import Request

Numbered = tuple[int, Request]


@dataclasses.dataclass(eq=False)
class Group:
    """A prompt and those of its samples that wait.

    bucket: length to which the prompt is padded. pages: of the prompt, while it is in the cache.
    read: tokens that are in them. readers: running sequences that read them.
    """

    tokens: tuple[int, ...]
    bucket: int
    waiting: deque[Numbered]
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    readers: int = 0

    @property
    def is_read(self) -> bool:
        """The last token is the first to be decoded."""
        return self.read == len(self.tokens) - 1

    def drop(self, number: int) -> bool:
        """Forget a waiting sample; whether it was one of these."""
        kept = deque(one for one in self.waiting if one[0] != number)
        is_here = len(kept) < len(self.waiting)
        self.waiting = kept
        return is_here


@dataclasses.dataclass(eq=False)
class Sequence:
    """A running request with what was drawn for it so far.

    limit: longest response. pages: of the response.
    """

    group: Group
    number: int
    request: Request
    limit: int
    pages: list[int] = dataclasses.field(default_factory=list)
    token_T: list[int] = dataclasses.field(default_factory=list)
    logp_T: list[float] = dataclasses.field(default_factory=list)
    full_logp_T: list[float] = dataclasses.field(default_factory=list)

    @property
    def drawn(self) -> int:
        return len(self.token_T)


class Queue:
    """Requests that wait; neighbours with the same prompt are one group.

    A prompt's own length alone decides its bucket, so that it is read in the same way whatever
    other prompts are read with it.
    """

    AHEAD = 64  # prompts looked at for one of the same bucket

    def __init__(self, limits: Limits):
        self._limits, self._count = limits, 0
        self._groups: deque[Group] = deque()
        self._newest: Group | None = None  # to which the next request may belong

    def submit(self, request: Request) -> int:
        """Let a request wait; returns its number.

        Raises:
            ValueError: its prompt is empty or too long.
        """
        number, tokens = self._count, tuple(request.tokens)
        if self._newest is None or self._newest.tokens != tokens:
            self._newest = Group(tokens, self._bucket(number, request), deque())
            self._groups.append(self._newest)
        self._newest.waiting.append((number, request))
        self._count += 1
        return number

    def _bucket(self, number: int, request: Request) -> int:
        count, limits = len(request.tokens), self._limits
        if not 0 < count <= limits.max_prompt_tokens:
            raise ValueError(
                f"request {number} (identity {request.identity}): its prompt has {count} "
                f"tokens, expected 1 to {limits.max_prompt_tokens}; raise "
                "Sampler.max_prompt_tokens or shorten it"
            )
        if limits.chunk is not None:
            return limits.chunk
        return next(size for size in limits.buckets if count - 1 <= size)

    def cancel(self, number: int) -> bool:
        """Forget a request; whether it waited here."""
        for group in self._groups:
            if group.drop(number):
                if not group.waiting:
                    self._remove(group)
                return True
        return False

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, bucket: int | None = None) -> Group | None:
        """The next prompt; with a bucket the next of that size, if one is near."""
        for group in itertools.islice(self._groups, self.AHEAD):
            if bucket in (None, group.bucket):
                self._remove(group)
                return group
        return None

    def _remove(self, group: Group) -> None:
        self._groups.remove(group)
        if group is self._newest:
            self._newest = None

    def put_back(self, group: Group) -> None:
        """Let a prompt that is not in the cache come first again."""
        self._groups.appendleft(group)


class Shard:
    """Rows and pages of one shard of the devices.

    rows: how many there are. page: positions in a page. pages: how many, numbered from 1.
    """

    def __init__(self, rows: int, page: int, pages: int):
        self.running: dict[int, Sequence] = {}  # by the request's number
        self._rows, self._page = rows, page
        self._free_pages = list(range(pages, 0, -1))
        self._groups: deque[Group] = deque()  # in the cache, with samples that wait

    @property
    def unclaimed_rows(self) -> int:
        """Free rows beyond those that waiting samples will take."""
        return self._free_rows - sum(len(group.waiting) for group in self._groups)

    @property
    def _free_rows(self) -> int:
        return self._rows - len(self.running)

    @property
    def has_waiting(self) -> bool:
        return bool(self._groups)

    def admit(self, group: Group) -> bool:
        """Give the prompt its pages if one page is then left for every row and for its sample."""
        needed = self._pages(len(group.tokens) - 1)
        if needed + len(self.running) + len(self._groups) + 1 > len(self._free_pages):
            return False
        group.pages = self._take(needed)
        self._groups.append(group)
        return True

    def unread(self, count: int) -> list[Group]:
        """The first prompts of which not all is in their pages, at most so many."""
        return [group for group in self._groups if not group.is_read][:count]

    def run_waiting(self, longest: Callable[[int], int]) -> Iterator[int]:
        """Let waiting samples run in free rows; yields those, by number, that ask for no token.

        longest: (length of a prompt) -> the longest response that there is room for.
        """
        while self._free_rows:
            group = next((group for group in self._groups if group.is_read), None)
            if group is None:
                return
            if group.readers and len(self.running) >= len(self._free_pages):
                return  # every row may need a page soon
            number, request = group.waiting.popleft()
            room = longest(len(group.tokens))
            limit = room if request.max_tokens is None else min(request.max_tokens, room)
            if limit > 0:
                group.readers += 1
                self.running[number] = Sequence(group, number, request, limit)
            if not group.waiting:
                self._groups.remove(group)
                self._evict_if_done(group)
            if limit <= 0:
                yield number

    def longest_first(self) -> list[Sequence]:
        """The running sequences in the order of their rows: most pages to read first."""

        def pages(sequence: Sequence) -> int:
            return len(sequence.group.pages) + sequence.drawn // self._page

        return sorted(self.running.values(), key=pages, reverse=True)

    def finish(self, sequence: Sequence) -> None:
        """Free the row and the pages of a sequence that has ended."""
        self._stop(sequence)
        self._evict_if_done(sequence.group)

    def cancel(self, number: int) -> None:
        """Forget a request that waits or runs here."""
        if number in self.running:
            self.finish(self.running[number])
        for group in list(self._groups):
            if group.drop(number) and not group.waiting:
                self._groups.remove(group)
                self._evict_if_done(group)

    def _stop(self, sequence: Sequence) -> None:
        del self.running[sequence.number]
        self._free_pages += sequence.pages
        sequence.group.readers -= 1

    def _evict_if_done(self, group: Group) -> None:
        if not group.readers and not group.waiting:
            self._evict(group)

    def _evict(self, group: Group) -> None:
        """Take the prompt out of the cache."""
        self._free_pages += group.pages
        group.pages, group.read = [], 0

    def reserve(self, steps: int) -> tuple[list[Group], int]:
        """Give every running sequence the pages of its next ``steps`` tokens, most drawn first.

        Where pages run out, waiting prompts without a reader are evicted first; then the sequence
        with the fewest tokens is preempted. Its randomness is by identity, so it will be drawn
        again bit for bit. Returns the evicted prompts and the number of preempted sequences.
        """
        evicted, preempted = [], 0
        for sequence in sorted(self.running.values(), key=lambda sequence: -sequence.drawn):
            if sequence.number not in self.running:
                continue
            tokens = min(sequence.drawn + steps, sequence.limit)
            needed = self._pages(tokens) - len(sequence.pages)
            while needed > len(self._free_pages):
                unread = next((group for group in self._groups if not group.readers), None)
                if unread is None:
                    unread = self._preempt(keep=sequence)
                    preempted += 1
                if not unread.readers:
                    self._groups.remove(unread)
                    self._evict(unread)
                    evicted.append(unread)
            sequence.pages += self._take(max(needed, 0))
        return evicted, preempted

    def _preempt(self, keep: Sequence) -> Group:
        """Make the running sequence with the fewest tokens, other than ``keep``, wait again."""
        others = (sequence for sequence in self.running.values() if sequence is not keep)
        sequence = min(others, key=lambda sequence: sequence.drawn)
        self._stop(sequence)
        if not sequence.group.waiting:
            self._groups.appendleft(sequence.group)
        sequence.group.waiting.appendleft((sequence.number, sequence.request))
        return sequence.group

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _take(self, count: int) -> list[int]:
        return [self._free_pages.pop() for _ in range(count)]
