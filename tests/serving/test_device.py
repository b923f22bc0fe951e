"""The engine on its thread: what HTTP will ask of it, without HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import EOS, HEAD, on, random_params, toy_mesh, toy_model

from aspo_jax.errors import UserError
from aspo_jax.head import logits
from aspo_jax.sampler import SERVE, Drawing, Limits, PagedSampler, Request, Serving
from aspo_jax.serving.engine import Device, DeviceEngine, Weights
from aspo_jax.serving.scoring import make_scorer, padded
from aspo_jax.serving.seam import EngineError, Grown, Overloaded

WINDOW = 48
LIMITS = Limits(
    WINDOW - 1,
    WINDOW - 1,
    slots=4,
    stop_ids=(EOS,),
    prompts=4,
    page=4,
    block=2,
    window=WINDOW,
    chunk=4,
)
MODEL = toy_model()
ENDLESS = Drawing(ignores_stops=True)


@pytest.fixture(scope="module")
def old_params():
    return random_params(MODEL, scale=0.25)


@pytest.fixture(scope="module")
def new_params():
    return random_params(MODEL, seed=1, scale=0.25)


@pytest.fixture(scope="module")
def sampler():
    return PagedSampler(MODEL, HEAD, LIMITS, toy_mesh(), seed=3, choice=Serving(listed=4))


@pytest.fixture(scope="module")
def device():
    device = Device()
    yield device
    device.close()


@pytest.fixture
def engine(device, sampler, old_params, new_params):
    sampler.start(on(toy_mesh(), MODEL, old_params))

    def read(folder: str) -> Any:
        if folder != "new":
            raise UserError(f"{folder}: no weights there")
        return on(toy_mesh(), MODEL, new_params)

    score = make_scorer(MODEL, HEAD, WINDOW, 4)
    return DeviceEngine(device, sampler, score=score, read=read, limit=40)


def request(number: int, length: int = 3, most: int | None = 12, how=ENDLESS) -> Request:
    tokens = [3 + (number + t) % 15 for t in range(length)]
    return Request(tokens, (SERVE, number, 0, 0), most, how)


async def whole(engine, requests) -> dict[int, list[Grown]]:
    """Everything that comes of some requests, by index."""
    got: dict[int, list[Grown]] = {i: [] for i in range(len(requests))}
    async with engine.generate(requests) as growth:
        async for grown in growth:
            got[grown.index].append(grown)
    return got


def tokens_of(grown: list[Grown]) -> list[int]:
    return [token for each in grown for token in each.tokens]


def run(coroutine) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.005)


# --- growth -------------------------------------------------------------------------------------


def test_sequences_grow_as_the_sampler_draws_them(engine, sampler):
    requests = [request(n, 2 + n, how=Drawing(top=n % 3)) for n in range(6)]
    got = run(whole(engine, requests))
    for c in sampler.sample(requests):
        grown = got[c.request]
        assert tokens_of(grown) == c.tokens_T.tolist()
        np.testing.assert_array_equal([x for g in grown for x in g.logp], c.logp_T)
        assert [g.ending for g in grown[:-1]] == [None] * (len(grown) - 1)
        assert grown[-1].ending == c.ending
        top = requests[c.request].drawing.top  # pyright: ignore[reportOptionalMemberAccess]
        assert [len(pairs) for g in grown for pairs in g.top] == [top] * len(c.tokens_T)
    assert any(len(grown) > 2 for grown in got.values()), "it came in one piece"


def test_one_of_a_call_may_be_ended_and_the_others_go_on(engine):
    requests = [request(n) for n in range(5)]

    async def scenario():
        expected = await whole(engine, requests)
        got: dict[int, list[Grown]] = {i: [] for i in range(5)}
        async with engine.generate(requests) as growth:
            async for grown in growth:
                got[grown.index].append(grown)
                growth.cancel(1)
        assert not got[1] or got[1][-1].ending is None
        assert all(tokens_of(got[i]) == tokens_of(expected[i]) for i in (0, 2, 3, 4))
        assert engine._count == 0
        await until(lambda: not engine._running)

    run(scenario())


def test_a_hundred_who_come_and_go_leave_nothing_behind(engine):
    """Half of them leave at random; the others get the bytes that they get alone."""
    rng, session = random.Random(0), engine._session
    free = [sorted(shard._free_pages) for shard in session.shards]

    async def one(number: int, expected: dict[int, list[int]]) -> None:
        asked = request(number, 1 + number % 20)
        await asyncio.sleep(rng.random() * 0.2)
        leaves = rng.randrange(1, 4) if number % 2 else None
        got: list[Grown] = []
        while True:
            try:
                async with engine.generate([asked]) as growth:
                    async for grown in growth:
                        got.append(grown)
                        if len(got) == leaves:
                            return
                break
            except Overloaded:
                await asyncio.sleep(0.05)
        assert tokens_of(got) == expected[number]

    async def scenario():
        expected = {
            n: tokens_of((await whole(engine, [request(n, 1 + n % 20)]))[0])
            for n in range(0, 100, 2)
        }
        await asyncio.gather(*(one(n, expected) for n in range(100)))
        await until(lambda: session.is_idle)

    run(scenario())
    assert [sorted(shard._free_pages) for shard in session.shards] == free
    assert engine._count == 0 and not engine._running


def test_a_full_queue_takes_none_of_a_call(engine):
    async def scenario():
        with pytest.raises(Overloaded, match="0 sequences are under way, and 41 more"):
            await whole(engine, [request(n) for n in range(41)])
        assert engine._count == 0

    run(scenario())


# --- weights ------------------------------------------------------------------------------------


def spans(grown: list[Grown]) -> list[str]:
    versions = [g.version for g in grown if g.tokens]
    return [v for i, v in enumerate(versions) if i == 0 or versions[i - 1] != v]


def test_sequences_go_on_with_new_weights_behind_what_they_have(engine, sampler, new_params):
    """Each token is what its weights draw at its place, and says which weights those were."""
    requests = [request(n, 3, 30) for n in range(4)]

    async def scenario():
        got: dict[int, list[Grown]] = {i: [] for i in range(4)}
        async with engine.generate(requests) as growth:
            async for grown in growth:
                got[grown.index].append(grown)
                if engine.version == "default" and all(tokens_of(g) for g in got.values()):
                    await engine.pause("keep")  # or all might have ended before it is read
                    await engine.load("new", "7")
                    await engine.resume()
        return got

    got = run(scenario())
    assert any(spans(grown) == ["default", "7"] for grown in got.values())
    sampler.start(on(toy_mesh(), MODEL, new_params))
    for n, grown in got.items():
        before = [t for g in grown if g.version == "default" for t in g.tokens]
        after = [t for g in grown if g.version == "7" for t in g.tokens]
        assert len(before) + len(after) == 30
        rest = requests[n]._replace(
            tokens=(*requests[n].tokens, *before), written=len(before), max_tokens=len(after)
        )
        (completion,) = sampler.sample([rest])
        assert completion.tokens_T.tolist() == after


def test_weights_that_cannot_be_read_change_nothing(engine):
    async def scenario():
        before = await whole(engine, [request(0)])
        with pytest.raises(EngineError, match="nowhere: no weights there; the weights that were"):
            await engine.load("nowhere", "8")
        assert engine.version == "default"
        assert await whole(engine, [request(0)]) == before

    run(scenario())


def test_a_run_that_is_followed_is_taken_between_two_sequences(engine, new_params):
    weights = Weights(on(toy_mesh(), MODEL, new_params), "12")

    async def scenario():
        first = asyncio.ensure_future(whole(engine, [request(0, 3, 40)]))
        await until(lambda: bool(engine._running))
        following = asyncio.ensure_future(engine.follow(weights))
        await until(lambda: not engine._is_begun)
        second = await whole(engine, [request(1)])
        await following
        assert spans((await first)[0]) == ["default"] and spans(second[0]) == ["12"]
        assert engine.version == "12"

    run(scenario())


# --- pause --------------------------------------------------------------------------------------


def test_paused_engines_draw_nothing_and_lose_nothing(engine):
    async def scenario():
        expected = await whole(engine, [request(0, 3, 40)])
        running = asyncio.ensure_future(whole(engine, [request(0, 3, 40)]))
        await until(lambda: bool(engine._running))
        await engine.pause("keep")
        drawn = len(next(iter(engine._running.values())).tokens)
        late = asyncio.ensure_future(whole(engine, [request(1)]))
        await asyncio.sleep(0.1)
        assert engine.is_paused and not late.done() and not running.done()
        assert len(next(iter(engine._running.values())).tokens) == drawn < 40
        await engine.resume()
        assert tokens_of((await running)[0]) == tokens_of(expected[0])
        assert len(tokens_of((await late)[0])) == 12

    run(scenario())


def test_abort_ends_what_runs_and_wait_lets_it_end(engine):
    async def scenario():
        running = asyncio.ensure_future(whole(engine, [request(0, 3, 40), request(1, 3, 40)]))
        await until(lambda: len(engine._running) == 2)
        await engine.pause("abort")
        assert {g[-1].ending for g in (await running).values()} == {"abort"}
        await engine.resume()
        running = asyncio.ensure_future(whole(engine, [request(0, 3, 40)]))
        await until(lambda: bool(engine._running))
        await engine.pause("wait")
        assert running.done() or not engine._running
        assert (await running)[0][-1].ending == "length"
        late = asyncio.ensure_future(whole(engine, [request(1)]))
        await asyncio.sleep(0.05)
        assert not late.done()
        await engine.resume()
        await late

    run(scenario())


def test_a_sampler_that_fails_ends_its_calls_and_says_why(engine, sampler, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    async def scenario():
        running = asyncio.ensure_future(whole(engine, [request(0, 3, 40)]))
        await until(lambda: bool(engine._running))
        monkeypatch.setattr(engine._session, "step", broken)
        with pytest.raises(EngineError, match="the device is gone"):
            await running
        assert not engine.is_alive
        with pytest.raises(EngineError, match="has failed: the device is gone"):
            await whole(engine, [request(0)])
        with pytest.raises(EngineError, match="has failed"):
            await engine.score([3, 4], 0)

    run(scenario())


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, WINDOW])
def test_prompts_are_scored_by_the_whole_softmax(engine, old_params, length):
    tokens = [3 + t % 17 for t in range(length)]
    score = run(engine.score(tokens, 3))
    hidden, _ = MODEL.apply(
        old_params,
        jnp.asarray([tokens[:-1]]),
        jnp.arange(length - 1)[None],
        jnp.ones((1, length - 1), jnp.int32),
    )
    free = HEAD._replace(is_allowed_V=np.ones(MODEL.config.vocab_size, bool))
    logp_TV = np.asarray(jax.nn.log_softmax(logits(free, MODEL.unembedding(old_params), hidden[0])))
    np.testing.assert_allclose(score.logp, logp_TV[np.arange(length - 1), tokens[1:]], atol=1e-5)
    for t, pairs in enumerate(score.top):
        assert [i for i, _ in pairs] == np.argsort(-logp_TV[t])[:3].tolist()
        np.testing.assert_allclose([x for _, x in pairs], np.sort(logp_TV[t])[::-1][:3], atol=1e-5)
    assert run(engine.score(tokens, 0)).logp == score.logp


def test_few_lengths_are_compiled():
    assert {padded(n, 4096) for n in range(1, 4097)} == {128, 512, 2048, 4096}
    assert padded(50, 100) == 128
