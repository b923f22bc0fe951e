"""Two hundred clients at once, of which half leave: the sampler's engine behind real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from test_device import LIMITS, MODEL, WINDOW
from toy import HEAD, TOKENIZER, on, random_params, toy_mesh

from aspo_jax.data.tokenizer import build_character_tokenizer
from aspo_jax.sampler import PagedSampler, Serving
from aspo_jax.serving.app import create_app
from aspo_jax.serving.engine import Device, DeviceEngine
from aspo_jax.serving.scoring import make_scorer
from aspo_jax.serving.seam import Served
from aspo_jax.serving.server import listen, make_server
from aspo_jax.serving.site import Settings

CLIENTS = 200


class Server:
    """A toy policy behind a port of loopback."""

    def __init__(self) -> None:
        self.device = Device()
        sampler = PagedSampler(MODEL, HEAD, LIMITS, toy_mesh(), seed=3, choice=Serving(listed=4))
        sampler.start(on(toy_mesh(), MODEL, random_params(MODEL, scale=0.25)))
        score = make_scorer(MODEL, HEAD, WINDOW, 4)
        self.engine = DeviceEngine(self.device, sampler, score=score, read=lambda folder: folder)
        letters = "abcdefghijklmnopqrstuvwxyz"
        spare = len(build_character_tokenizer(letters)) - TOKENIZER
        policy: Any = type("Policy", (), {"source": None})()
        policy.tokenizer = build_character_tokenizer(letters[: len(letters) - spare])
        self.app = create_app({"toy": Served(self.engine, policy)}, Settings())
        self.port, bound = 0, threading.Event()

        def on_bound(host: str, port: int) -> None:
            self.port = port
            bound.set()

        self.server = make_server(self.app, 30, on_bound)
        self.thread = threading.Thread(target=self.server.run, args=([listen("127.0.0.1", 0)],))
        self.thread.start()
        assert bound.wait(30)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.device.close()
        assert not self.thread.is_alive()

    def left(self) -> tuple[Any, ...]:
        """What is in use: pages and rows, sequences, requests, connections."""
        session = self.engine._session
        pages = [sorted(shard._free_pages) for shard in session.shards]
        registry = self.app.state.site.registry
        return pages, session.is_idle, self.engine._count, len(self.engine._running), len(registry)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def request_of(number: int) -> dict[str, Any]:
    """Prompts of 1 to 30 tokens, responses of 1 to 17, streamed or whole."""
    return {
        "prompt": [3 + (number * 7 + t) % 15 for t in range(1 + number % 30)],
        "max_tokens": 1 + number % 17,
        "seed": number,
        "temperature": (0.0, 0.7, 1.0)[number % 3],
        "logprobs": number % 3,
        "stream": number % 4 == 0,
        "return_token_ids": True,
        "ignore_eos": number % 5 == 0,
    }


async def ask(port: int, number: int, leaves: float | None = None, pause: float = 0) -> bytes:
    """The body of the answer; leaves: seconds after which the client goes away instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=256 if pause else 2**16)
    content = json.dumps(request_of(number)).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    try:
        writer.write(head.encode() + content)
        if leaves is not None:
            await asyncio.sleep(leaves)
            return b""
        parts = []
        while part := await reader.read(64 if pause else 2**16):
            parts.append(part)
            await asyncio.sleep(pause)
        return b"".join(parts).partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


def drawn(body: bytes) -> list[Any]:
    """Tokens and log-probabilities of an answer, whole or in events."""
    if b"data: " in body:
        texts = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
    else:
        texts = [body]
    choices = [choice for text in texts for choice in json.loads(text)["choices"]]
    tokens = [token for choice in choices for token in choice["token_ids"]]
    found = [c["logprobs"]["token_logprobs"] for c in choices if c["logprobs"] is not None]
    return [tokens, [x for each in found for x in each], choices[-1]["finish_reason"]]


async def crowd(port: int, seed: int) -> dict[int, list[Any]]:
    """What those get who stay; every second client leaves, every tenth reads slowly."""
    rng = random.Random(seed)

    async def one(number: int) -> None:
        await asyncio.sleep(rng.random() * 0.5)
        if number % 2:
            await ask(port, number, leaves=rng.random() * 0.5)
        else:
            got[number] = drawn(await ask(port, number, pause=0.002 * (number % 10 == 0)))

    got: dict[int, list[Any]] = {}
    await asyncio.wait_for(asyncio.gather(*map(one, range(CLIENTS))), 120)
    return got


def test_nothing_hangs_nothing_leaks_and_who_stays_gets_the_same(server):
    async def alone() -> dict[int, list[Any]]:
        return {n: drawn(await ask(server.port, n)) for n in range(0, CLIENTS, 2)}

    async def idle() -> None:
        while server.left()[1:] != (True, 0, 0, 0):
            await asyncio.sleep(0.01)

    before = server.left()
    expected = asyncio.run(alone())
    assert len({str(answer) for answer in expected.values()}) > 60
    sizes = []
    for seed in range(4):
        assert asyncio.run(crowd(server.port, seed)) == expected
        asyncio.run(asyncio.wait_for(idle(), 30))
        assert server.left() == before
        gc.collect()
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert sizes[-1] - sizes[0] < 16, f"MiB at most after each round: {sizes}"
