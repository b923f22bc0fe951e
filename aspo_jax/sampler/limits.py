"""Shapes of a sampler: rows, pages, and how prompts are cut into what is read at once."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from aspo_jax.sampler.choice import Drawings
from aspo_jax.sampler.device import Rows


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
    window: most tokens of prompt and response together; None: the two limits say all.
    chunk: prompts are read by so many tokens at once, each piece behind the earlier ones, by one
        program for all lengths; None: at once, padded to one of `buckets`.
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
    window: int | None = None
    chunk: int | None = None

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
        if self.window is not None:  # the prompt's last page and the response's may both be begun
            return self.pages(self.window) + 1
        return self.pages(self.max_prompt_tokens - 1) + self.pages(self.max_response_tokens)

    def response_room(self, prompt: int) -> int:
        """The longest response to a prompt of so many tokens."""
        if self.window is None:
            return self.max_response_tokens
        return min(self.max_response_tokens, self.window - prompt)

    def no_rows(self, N: int, is_serving: bool = False) -> Rows:
        """Arrays for N rows without a sequence, which read and write page 0.

        is_serving: each row draws as its request wants.
        """
        number, share = (functools.partial(np.zeros, N, dtype) for dtype in ("int32", "float32"))
        return Rows(
            *(number() for _ in range(4)),
            is_running_N=np.zeros(N, bool),
            identity_N4=np.zeros((N, 4), np.uint32),
            table_JN=np.zeros((self.row_pages, N), np.int32),
            drawings=Drawings(
                temperature_N=share(),
                top_k_N=number(),
                top_p_N=share() + 1,
                min_p_N=share(),
                ignores_stops_N=np.zeros(N, bool),
                top_N=number(),
                written_N=number(),
            )
            if is_serving
            else None,
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
