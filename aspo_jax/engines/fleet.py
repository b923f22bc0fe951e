"""Several engines as one: groups spread over them, what fails is sent anew, what died replaced.

All have the weights of one version. An engine in trouble is looked after by whoever first meets it:
one that is well but has lost its weights, because somebody started it again, is given them; one of
our own that died is started again; one of the user's that died is done without while others are
there, and waited for when it is the last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aspo_jax.engines.client import AGAIN, Counts, Engine, LoadFailed
from aspo_jax.engines.owned import Owned
from aspo_jax.engines.weights import Version, probe_problem
from aspo_jax.engines.wire import Answer, EngineError, Failed, Group, How

_logger = logging.getLogger(__name__)


class NotStarted(EngineError):
    """The command of an engine of our own does not make one that answers."""


class Patience(NamedTuple):
    """start_s: for an engine to become ready. pause_s: before the first retry, then doubled."""

    start_s: float
    pause_s: float = 0.2


class Member:
    """An engine of a fleet.

    process: what runs it, where the run does. in_flight: groups that it is at work on.
    problem: why it is not used; "": it is. uncertain: the label that it went by when it failed to
    take weights: as long as it does, it was not restarted and may hold a part of them.
    version, heard_T: whose weights it has, and what it said of the probe with them.
    """

    def __init__(self, engine: Engine, process: Owned | None = None):
        self.engine, self.process = engine, process
        self.lock = asyncio.Lock()
        self.in_flight = 0
        self.problem = ""
        self.uncertain: str | None = None
        self.version: Version | None = None
        self.heard_T: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.engine.address or "the engine of Sampler.command"


class Fleet:
    """Engines with the weights of one version; its methods belong to one event loop.

    probe: the tokens that an engine scores to show which weights it has. max_gap: see
    `probe_problem`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        probe: Sequence[int],
        max_gap: float,
        patience: Patience,
    ):
        self.members, self.counts = list(members), Counts()
        self._probe, self._max_gap, self._patience = probe, max_gap, patience
        self._version: Version | None = None

    @property
    def in_use(self) -> set[Path]:
        """Folders that engines of our own were started on."""
        return {m.process.model for m in self.members if m.process and m.process.model}

    @property
    def _current(self) -> Version:
        """The version that all engines are to have."""
        if self._version is None:
            raise ValueError("no weights have been loaded yet")
        return self._version

    # --- weights ------------------------------------------------------------------------------

    async def load(self, version: Version) -> None:
        """Give all engines the weights of a version; those that cannot take them are left out.

        Raises:
            EngineError: none could.
        """
        is_first, self._version = self._version is None, version
        wait_s = self._patience.start_s if is_first or len(self.members) == 1 else 0.0
        await asyncio.gather(*(self._renew(member, wait_s) for member in self.members))
        self._usable()

    async def _renew(self, member: Member, wait_s: float) -> None:
        async with member.lock:
            if member.uncertain and await member.engine.label() in (None, member.uncertain):
                return
            member.problem, member.uncertain = "", None
            await self._attempt(member, lambda: self._give(member, wait_s))

    async def _attempt(self, member: Member, give: Callable[[], Awaitable[None]]) -> None:
        """Give it the weights; it is left out if that fails, unless we can start it again."""
        try:
            try:
                await give()
            except NotStarted:
                raise
            except EngineError as error:
                if member.process is None:
                    raise
                _logger.warning("%s: %s; starting it again", member.name, error)
                self.counts.restarts += 1
                await self._start(member)
        except EngineError as error:
            member.problem = str(error)
            member.version = member.heard_T = None
            if isinstance(error, LoadFailed):
                member.uncertain = await member.engine.label()
            _logger.warning("%s is left out: %s", member.name, error)

    async def _give(self, member: Member, wait_s: float) -> None:
        """The weights of the current version, by a reload or by a start on them."""
        engine, version = member.engine, self._current
        if member.process is not None and not member.process.is_running:
            await self._start(member)
            return
        if wait_s and not await engine.is_healthy():
            _logger.warning("%s does not answer; waiting up to %g s", member.name, wait_s)
        if not await engine.until_ready(wait_s):
            raise Failed(f"{member.name} does not answer")
        before, before_T = member.version, member.heard_T
        await engine.load(str(version.folder), version.label)
        await self._see(member, before, before_T)

    async def _start(self, member: Member) -> None:
        """Start our own engine on the current weights and wait until it is ready."""
        process, version = member.process, self._current
        if process is None:
            raise ValueError(f"{member.name} is none of our own")
        await asyncio.to_thread(process.stop)
        member.engine.address = process.start(version.folder)
        _logger.warning("starting the engine of Sampler.command; its words are in %s", process.log)
        is_ready = await member.engine.until_ready(
            self._patience.start_s, lambda: process.is_running
        )
        if not is_ready:
            said = process.state()
            await asyncio.to_thread(process.stop)
            raise NotStarted(said)
        await member.engine.rename(version.label)
        await self._see(member, None, None)

    async def _see(self, member: Member, before: Version | None, before_T: np.ndarray | None):
        """Look at the probe.

        Raises:
            LoadFailed: it has not the weights that it should have.
        """
        version = self._current
        heard_T = await member.engine.score(self._probe)
        problem = probe_problem(heard_T, version, before_T, before, self._max_gap)
        if problem:
            raise LoadFailed(f"{member.name} took weights, but {problem}; restart it")
        member.version, member.heard_T = version, heard_T

    # --- completions --------------------------------------------------------------------------

    async def ask(self, group: Group, how: How) -> list[Answer]:
        """The completions of a group, from whichever engine.

        Raises:
            EngineError: it was refused, failed too often, or no engine is left.
        """
        for attempt in range(AGAIN + 1):
            member = min(self._usable(), key=lambda each: each.in_flight)
            try:
                return await self._ask(member, group, how)
            except Failed as error:
                if attempt == AGAIN:
                    raise EngineError(f"{error}; sent {AGAIN + 1} times") from error
                _logger.warning("%s; sent again (%d of %d)", error, attempt + 1, AGAIN)
                self.counts.retries += 1
            await self._look_after(member)
            await asyncio.sleep(self._patience.pause_s * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def _ask(self, member: Member, group: Group, how: How) -> list[Answer]:
        member.in_flight += 1
        try:
            read = await member.engine.ask(group, how)
        finally:
            member.in_flight -= 1
        if read.label not in (None, self._current.label):
            raise Failed(f"{member.name} drew from weights {read.label!r}, not the current ones")
        self.counts.duplicates += read.duplicates
        return read.answers

    def _usable(self) -> list[Member]:
        found = [member for member in self.members if not member.problem]
        if not found:
            reasons = "\n".join(f"{m.name}: {m.problem}" for m in self.members)
            raise EngineError(f"no engine is left to sample from:\n{reasons}")
        return found

    async def _look_after(self, member: Member) -> None:
        """After a failure: leave a well engine alone, mend or leave out another."""
        async with member.lock:
            if member.problem or await self._is_well(member):
                return
            others = [m for m in self.members if m is not member and not m.problem]
            wait_s = 0.0 if others else self._patience.start_s
            await self._attempt(member, lambda: self._mend(member, wait_s))

    async def _is_well(self, member: Member) -> bool:
        engine = member.engine
        return await engine.is_healthy() and await engine.label() == self._current.label

    async def _mend(self, member: Member, wait_s: float) -> None:
        """Bring back an engine that is not well, or has other weights than it was given."""
        member.version = member.heard_T = None
        if member.process is not None and not await member.engine.is_healthy():
            await asyncio.to_thread(member.process.stop)
            self.counts.restarts += 1
        else:
            self.counts.reloads += 1
        await self._give(member, wait_s)

    # --- the end ------------------------------------------------------------------------------

    async def close(self) -> None:
        """Drop all connections and end the engines that we started."""
        for member in self.members:
            await member.engine.close()
            if member.process is not None:
                await asyncio.to_thread(member.process.stop)
