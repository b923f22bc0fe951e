"""Who sits where: prompts, their samples, rows and pages. Host side, no arrays of the device.

A part of the devices has its own rows and its own pages. Samples of one prompt go to one part, for
they read the same pages.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from aspo_jax.sampler.seam import Request

Numbered = tuple[int, Request]


@dataclasses.dataclass(eq=False)
class Group:
    """A prompt and its samples still to be seated.

    pages: of the prompt, while it is in the cache. seated: samples that read them.
    """

    tokens: tuple[int, ...]
    bucket: int
    waiting: deque[Numbered]
    pages: list[int] = dataclasses.field(default_factory=list)
    seated: int = 0


@dataclasses.dataclass(eq=False)
class Seat:
    """A request in a row, with what was drawn for it so far."""

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
    """Requests to come, gathered by prompt where they follow each other; pulled as needed.

    buckets: lengths to which prompts are padded, ascending. A prompt's own length decides, so that
    it does not matter in whose company it comes.
    """

    AHEAD = 64  # prompts looked at for one of the same bucket

    def __init__(self, requests: Iterable[Request], max_prompt: int, buckets: tuple[int, ...]):
        self._max_prompt, self._buckets = max_prompt, buckets
        runs = itertools.groupby(enumerate(requests), key=lambda one: tuple(one[1].tokens))
        self._coming: Iterator[Group] = (self._group(tokens, run) for tokens, run in runs)
        self._seen: deque[Group] = deque()

    def _group(self, tokens: tuple[int, ...], run: Iterator[Numbered]) -> Group:
        waiting = deque(run)
        number, request = waiting[0]
        if not 0 < len(tokens) <= self._max_prompt:
            raise ValueError(
                f"request {number} (identity {request.identity}): its prompt has {len(tokens)} "
                f"tokens, expected 1 to {self._max_prompt}; raise Sampler.max_prompt_tokens or "
                "shorten it"
            )
        bucket = next(size for size in self._buckets if len(tokens) - 1 <= size)
        return Group(tokens, bucket, waiting)

    def __bool__(self) -> bool:
        self._look(1)
        return bool(self._seen)

    def _look(self, count: int) -> None:
        self._seen.extend(itertools.islice(self._coming, max(count - len(self._seen), 0)))

    def take(self, bucket: int | None = None) -> Group | None:
        """The next prompt; with a bucket the next of that size, if one is near."""
        self._look(self.AHEAD if bucket else 1)
        for group in self._seen:
            if bucket in (None, group.bucket):
                self._seen.remove(group)
                return group
        return None

    def put_back(self, group: Group) -> None:
        """A prompt that found no room comes first again."""
        self._seen.appendleft(group)


class Part:
    """Rows and pages of one part of the devices.

    rows: how many there are. page: slots of a page. pages: how many, numbered from 1.
    """

    def __init__(self, rows: int, page: int, pages: int):
        self.seats: dict[int, Seat] = {}  # by the request's number
        self._rows, self._page = rows, page
        self._free_pages = list(range(pages, 0, -1))
        self._open: deque[Group] = deque()  # in the cache, with samples waiting

    @property
    def wanting(self) -> int:
        """Free rows for which no prompt is in the cache."""
        return self._free_rows - sum(len(group.waiting) for group in self._open)

    @property
    def _free_rows(self) -> int:
        return self._rows - len(self.seats)

    @property
    def is_anyone_waiting(self) -> bool:
        return bool(self._open)

    def admit(self, group: Group) -> bool:
        """Give the prompt its pages if that leaves every row and a sample of it one to go on."""
        needed = self._pages(len(group.tokens) - 1)
        if needed + len(self.seats) + len(self._open) + 1 > len(self._free_pages):
            return False
        group.pages = self._take(needed)
        self._open.append(group)
        return True

    def seat(self, longest: int) -> Iterator[Numbered]:
        """Waiting samples into free rows; yields those that ask for no token at all."""
        while self._open and self._free_rows:
            group = self._open[0]
            if group.seated and len(self.seats) >= len(self._free_pages):
                return  # every row may need a page soon
            number, request = group.waiting.popleft()
            limit = longest if request.max_tokens is None else min(request.max_tokens, longest)
            if limit > 0:
                group.seated += 1
                self.seats[number] = Seat(group, number, request, limit)
            if not group.waiting:
                self._open.popleft()
                self._close(group)
            if limit <= 0:
                yield number, request

    def longest_first(self) -> list[Seat]:
        """Who sits here, in the order of the rows: those that read the most pages come first."""

        def pages(seat: Seat) -> int:
            return len(seat.group.pages) + seat.drawn // self._page

        return sorted(self.seats.values(), key=pages, reverse=True)

    def leave(self, seat: Seat) -> None:
        """The sample has ended."""
        self._stand_up(seat)
        self._close(seat.group)

    def _stand_up(self, seat: Seat) -> None:
        del self.seats[seat.number]
        self._free_pages += seat.pages
        seat.group.seated -= 1

    def _close(self, group: Group) -> None:
        """A prompt that no sample needs any more gives its pages back."""
        if not group.seated and not group.waiting:
            self._give_back(group)

    def _give_back(self, group: Group) -> None:
        self._free_pages += group.pages
        group.pages = []

    def reserve(self, steps: int) -> tuple[list[Group], int]:
        """Pages for the next ``steps`` tokens of every row, those furthest on first.

        Where they do not suffice, the row with the fewest tokens is put back into the queue: its
        randomness is by identity, so it will be drawn again, bit for bit. Returns prompts that
        left the cache with their last row, and the number of rows put back.
        """
        homeless, evicted = [], 0
        for seat in sorted(self.seats.values(), key=lambda seat: -seat.drawn):
            if seat.number not in self.seats:
                continue
            needed = self._pages(min(seat.drawn + steps, seat.limit)) - len(seat.pages)
            while needed > len(self._free_pages):
                unread = next((group for group in self._open if not group.seated), None)
                if unread is None:
                    unread = self._put_back(keep=seat)
                    evicted += 1
                if not unread.seated:
                    self._open.remove(unread)
                    self._give_back(unread)
                    homeless.append(unread)
            seat.pages += self._take(max(needed, 0))
        return homeless, evicted

    def _put_back(self, keep: Seat) -> Group:
        """The seat with the fewest tokens, another than ``keep``, is a waiting sample again."""
        others = (seat for seat in self.seats.values() if seat is not keep)
        seat = min(others, key=lambda seat: seat.drawn)
        self._stand_up(seat)
        if not seat.group.waiting:
            self._open.appendleft(seat.group)
        seat.group.waiting.appendleft((seat.number, seat.request))
        return seat.group

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _take(self, count: int) -> list[int]:
        return [self._free_pages.pop() for _ in range(count)]
