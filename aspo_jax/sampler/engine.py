"""The engine: finished rows are filled again from the queue, prompts are read once per group.

A call draws up to ``block`` tokens for every row, and returns sooner when enough rows have ended
while requests wait.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax.head import Head
from aspo_jax.model import Cache, Model, batch_sharding, cache_specs, shardings
from aspo_jax.model.sharding import placed, row_shards
from aspo_jax.sampler.choice import EVERYTHING, Choice
from aspo_jax.sampler.device import Programs, Serving
from aspo_jax.sampler.limits import Limits
from aspo_jax.sampler.publish import Publish
from aspo_jax.sampler.seam import Completion, Request
from aspo_jax.sampler.session import Session, Stats
from aspo_jax.sampler.widths import STEPS, Widths, made_up_rows

CLASSES = 4  # of rows by length: each reads as many pages as its longest row


class PagedSampler:
    """Continuous batching over a paged cache; see `Sampler` for the seam.

    ``publish`` turns the params given to `start` into those that this model computes with; None:
    they are.
    ``stops(tokens) -> length or None``: how many of the tokens complete a stop string, if any do.
    ``head.temperature`` may be 0: the likeliest id. `drawing` makes a sampler that draws otherwise.
    ``choice``: for all requests; `Serving`: each says itself how it is drawn, in another program.
    ``prefill``, ``extend`` and ``decode`` are the jitted programs, ``row_shardings`` those of the
    rows they are given; ``stats`` is of the latest `sample`.
    """

    def __init__(
        self,
        model: Model,
        head: Head,
        limits: Limits,
        mesh: Mesh,
        *,
        seed: int,
        choice: Choice | Serving = EVERYTHING,
        stops: Callable[[list[int]], int | None] | None = None,
        publish: Publish | None = None,
    ):
        self.limits, self.stats, self.stops, self._publish = limits, Stats(), stops, publish
        self.params: Any = None
        self.temperature, self.choice = head.temperature, choice
        self.is_serving = isinstance(choice, Serving)
        self.shard_count = row_shards(mesh)
        shard_rows = limits.slots // self.shard_count
        class_rows = shard_rows // math.gcd(shard_rows, CLASSES)
        self.widths = Widths.of(limits, class_rows, mesh)
        self._programs = programs = Programs(
            *(model, head, choice, limits.stop_ids, seed, limits.block),
            class_rows=class_rows,
            pages_per_read=max(limits.read // limits.page, 1),
        )
        kind = {} if limits.cache_type is None else {"kind": limits.cache_type}

        def empty() -> Cache:
            pages = limits.pool_pages(self.shard_count)
            return model.empty_cache(self.shard_count, pages, limits.page, **kind)

        self._cache = cache = shardings(mesh, cache_specs(jax.eval_shape(empty)))
        self._weights = weights = publish.shardings if publish else model.shardings(mesh)
        rows = batch_sharding(mesh)
        of_pages = batch_sharding(mesh, leading=1)
        self.row_shardings = dataclasses.replace(
            jax.tree.map(lambda _: rows, limits.no_rows(limits.slots, self.is_serving)),
            table_JN=of_pages,
        )
        self.empty = jax.jit(empty, out_shardings=cache)
        self.prefill: Any = jax.jit(
            programs.prefill,
            donate_argnums=1,
            in_shardings=(weights, cache, rows, rows, rows),
            out_shardings=cache,
        )
        self.extend: Any = jax.jit(
            programs.extend,
            donate_argnums=1,
            in_shardings=(weights, cache, rows, rows, rows, of_pages),
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

        Raises:
            ValueError: each request says that itself.
        """
        if self.is_serving:
            raise ValueError("a sampler made with `Serving` draws as `Request.drawing` says")
        other = copy.copy(self)
        other.temperature, other.choice = temperature, choice
        other.params, other.stats = None, Stats()
        if choice != self.choice:
            other.decode = self._jit_decode(self._programs._replace(choice=choice))
            other.widths = self.widths.unknown()
        return other

    def shapes(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Shapes and shardings of what `prefill` and `decode` are given after the weights."""
        limits, shape = self.limits, jax.ShapeDtypeStruct
        T = limits.buckets[-1]
        A = limits.together(T, self.shard_count)
        rows = placed(limits.no_rows(limits.slots, self.is_serving), self.row_shardings)
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
        self.params = self._publish.of(params) if self._publish else params

    def release(self) -> None:
        """Forget them: until the next `start` their memory is the update's."""
        self.params = None

    def compare_widths(self) -> None:
        """Find out whether decode calls of fewer rows round alike; see `Widths`."""

        def draw(count: int) -> Any:
            rows = made_up_rows(self.limits, count, self.is_serving)
            scalars = (np.int32(STEPS), np.int32(0), np.float32(self.temperature))
            rows = jax.device_put(rows, self.row_shardings)
            return jax.device_get(self.decode(self.params, self.empty(), rows, *scalars)[1])

        self.widths.compare(draw)

    def open(self) -> Session:
        """Begin with no request: its `submit`, `cancel` and `step` are this sampler, by hand."""
        return Session(self)

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they finish.

        Raises:
            ValueError: a prompt is empty or longer than ``max_prompt_tokens``.
        """
        session = self.open()
        self.stats = session.stats
        for request in requests:
            session.submit(request)
        while not session.is_idle:
            yield from session.step().completions
