"""One engine at an address: requests in, checked answers out, weights loaded in the right order."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np

from aspo_jax.engines.wire import LOAD_S, Call, EngineError, Failed, Group, How, Read, Wire

QUICK_S = 30.0  # for what no engine takes long over
AGAIN = 3  # times that a request of ours is sent anew
_ADMIN = (
    "an engine takes weights where its admin routes are open: start vLLM with the environment "
    "variable VLLM_SERVER_DEV_MODE=1, aspo_jax.serve with --admin"
)
_TRANSIENT = (408, 425, 429)  # below 500, but worth another try


class LoadFailed(EngineError):
    """Weights were not taken, or in part: nothing may be drawn from this engine until a restart."""


@dataclasses.dataclass
class Counts:
    """What went wrong and was mended.

    retries: requests sent anew. duplicates: answers that were there more than once and dropped.
    restarts: engines started again. reloads: weights given anew to an engine that had lost them.
    """

    retries: int = 0
    duplicates: int = 0
    restarts: int = 0
    reloads: int = 0


class Engine:
    """A server of a wire. Its methods belong to one event loop.

    wire, model: how to speak with it, and the name that it serves the policy by.
    timeout_s: for a group's answers, waiting in the engine's queue included.
    """

    def __init__(self, wire: Wire, model: str, address: str = "", *, timeout_s: float = 600.0):
        self.wire, self.model, self.address = wire, model, address.rstrip("/")
        self.timeout_s = timeout_s
        self._client: httpx2.AsyncClient | None = None

    async def ask(self, group: Group, how: How) -> Read:
        """The completions of a group.

        Raises:
            Failed: not this time. EngineError: never.
        """
        answer = await self.send(self.wire.generate(self.model, group, how), self.timeout_s)
        return self.wire.read(answer, group, how)

    async def score(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities of all tokens but the first, at temperature 1, whole vocabulary."""
        answer = await self.send(self.wire.score(self.model, tokens), self.timeout_s)
        return self.wire.read_score(answer, tokens)

    async def load(self, folder: str, label: str) -> None:
        """Take the weights of a folder and go by their label.

        Raises:
            LoadFailed: it may hold a part of them, and nothing may be drawn from it; only a restart
                helps. After a failure of the load itself it stays paused.
        """
        await self._settled(self.wire.pause, remedy=_ADMIN)
        try:
            await self.send(self.wire.load(folder, label), LOAD_S + QUICK_S)
        except EngineError as error:
            raise LoadFailed(f"{error}; it may hold a part of the weights: restart it") from error
        try:
            for call in self.wire.settle(label):
                await self._settled(call)
        finally:
            await self._settled(self.wire.resume)

    async def rename(self, label: str) -> None:
        """Give the weights that it was started on a label."""
        await self._settled(self.wire.rename(label))

    async def _settled(self, call: Call, remedy: str = "restart it") -> None:
        """Send what may be sent twice, until it succeeds or has failed a few times.

        Raises:
            LoadFailed: it has.
        """
        for attempt in range(AGAIN + 1):
            try:
                await self.send(call, QUICK_S)
                return
            except EngineError as error:
                if attempt == AGAIN or not isinstance(error, Failed):
                    raise LoadFailed(f"{error}; {remedy}") from error
            await asyncio.sleep(0.1 * 2**attempt)

    # --- how it is ----------------------------------------------------------------------------

    async def is_healthy(self) -> bool:
        """Whether it answers and says that it works."""
        try:
            await self.send(Call("/health", method="GET"), QUICK_S)
        except EngineError:
            return False
        return True

    async def label(self) -> str | None:
        """The label of its weights; None if it does not say."""
        for path in self.wire.labels:
            try:
                found = await self.send(Call(path, method="GET"), QUICK_S)
            except EngineError:
                continue
            return found.get("weight_version") if isinstance(found, dict) else None
        return None

    async def until_ready(self, wait_s: float, is_running: Any = lambda: True) -> bool:
        """Wait until it works; whether it does. False too once ``is_running()`` is not.

        Raises:
            EngineError: it serves other models than ours.
        """
        end = time.monotonic() + wait_s
        while not await self.is_healthy():
            if time.monotonic() >= end or not is_running():
                return False
            await asyncio.sleep(0.2)
        answer = await self.send(Call("/v1/models", method="GET"), QUICK_S)
        listed = answer.get("data") if isinstance(answer, dict) else None
        names = [each.get("id") for each in listed or () if isinstance(each, dict)]
        if self.model not in names:
            raise EngineError(
                f"{self.address} serves {', '.join(map(repr, names)) or 'nothing'}, expected "
                f"Sampler.served_model = {self.model!r}; set it to what is served, or start the "
                f"engine with --served-model-name {self.model}"
            )
        return True

    # --- HTTP ---------------------------------------------------------------------------------

    async def send(self, call: Call, within_s: float) -> Any:
        """The JSON that a request is answered with; None where the answer is empty.

        Raises:
            Failed: no connection, not in time, an error of the server's, no JSON, or an answer
                that the call does not accept.
            EngineError: it was refused; with what the server says.
        """
        try:
            async with asyncio.timeout(within_s):
                answer = await self._http().request(
                    call.method, self.address + call.path, json=call.body
                )
        except TimeoutError:
            raise Failed(f"{self._at(call)}: no answer within {within_s:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            said = str(error) or type(error).__name__
            raise Failed(f"{self._at(call)}: {said}") from error
        if answer.status_code >= 400:
            said = f"{self._at(call)}: status {answer.status_code}, {_said(answer)}"
            is_final = answer.status_code < 500 and answer.status_code not in _TRANSIENT
            raise (EngineError if is_final else Failed)(said)
        return self._accepted(call, answer)

    def _accepted(self, call: Call, answer: httpx2.Response) -> Any:
        try:
            found = answer.json() if answer.content else None
        except ValueError as error:
            raise Failed(f"{self._at(call)}: no JSON ({error})") from error
        if problem := call.accept(found):
            raise Failed(f"{self._at(call)}: {problem}")
        return found

    def _at(self, call: Call) -> str:
        return f"{call.method} {self.address}{call.path}"

    def _http(self) -> httpx2.AsyncClient:
        if self._client is None:
            # Servers drop idle connections after 5 s: what is reused is younger. Addresses are
            # local or of one's own network, where no proxy of the environment is meant.
            limits = httpx2.Limits(max_connections=None, keepalive_expiry=3.0)
            timeout = httpx2.Timeout(None, connect=10.0)
            self._client = httpx2.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        return self._client

    async def close(self) -> None:
        """Drop its connections; it can be used again."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _said(answer: httpx2.Response) -> str:
    """The message of an error, of whichever form."""
    try:
        body = json.loads(answer.text)
    except ValueError:
        return answer.text[:300] or "no message"
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            found = body[key]
            return str(found.get("message", found) if isinstance(found, dict) else found)[:300]
    return str(body)[:300]
