"""The sampler by hand: requests come and go while others run, each drawn as it wants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import (
    CONFIG,
    EOS,
    HEAD,
    IS_ALLOWED_V,
    VOCAB,
    assert_same,
    on,
    random_params,
    toy_mesh,
    toy_model,
)

from aspo_jax.head import logits
from aspo_jax.sampler import (
    EVERYTHING,
    LENGTH,
    SERVE,
    STOP,
    Choice,
    Completion,
    Drawing,
    Limits,
    PagedSampler,
    Request,
    Serving,
    Session,
    truncate,
)
from aspo_jax.sampler.choice import Drawings, choose, choose_each, identity_keys

WINDOW = 32
LIMITS = Limits(
    max_prompt_tokens=WINDOW - 1,
    max_response_tokens=WINDOW - 1,
    slots=4,
    stop_ids=(EOS,),
    prompts=4,
    page=2,
    read=4,
    block=3,
    window=WINDOW,
    chunk=4,
)
MODEL = toy_model()
LONG = (5, 6, 7, 3, 4, 8, 9, 5, 6, 7, 3, 11, 12, 5, 6, 4, 3, 9, 8)
PROMPTS = [(5,), (7, 8, 9), LONG[:4], LONG[:5], LONG[:6], LONG]
HOW = [
    Drawing(),
    Drawing(temperature=0.0),
    Drawing(temperature=0.7, top_k=3, top=2),
    Drawing(top_p=0.6, ignores_stops=True),
    Drawing(temperature=1.5, min_p=0.1, top=4),
]
REQUESTS = [
    Request(prompt, (SERVE, n, 0, g), 12, HOW[(n + g) % len(HOW)])
    for n, prompt in enumerate(PROMPTS)
    for g in range(2)
]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, scale=0.25)


def build(params, limits=LIMITS, mesh=None, *, is_raw=False) -> PagedSampler:
    mesh = mesh or toy_mesh()
    sampler = PagedSampler(MODEL, HEAD, limits, mesh, seed=3, choice=Serving(is_raw, listed=4))
    sampler.start(on(mesh, MODEL, params))
    return sampler


@pytest.fixture(scope="module")
def sampler(params):
    return build(params)


def by_identity(sampler, requests=REQUESTS) -> dict[tuple, Completion]:
    return {requests[c.request].identity: c for c in sampler.sample(requests)}


@pytest.fixture(scope="module")
def alone(sampler) -> dict[tuple, Completion]:
    """Each request with the sampler for itself."""
    return {r.identity: next(iter(sampler.sample([r]))) for r in REQUESTS}


# --- identity -----------------------------------------------------------------------------------


def test_load_and_order_of_arrival_change_no_bit(sampler, alone):
    """All at once, backwards, and one by one while others run: the bytes of being alone."""
    assert {c.ending for c in alone.values()} == {STOP, LENGTH}
    for requests in (REQUESTS, REQUESTS[::-1]):
        got = by_identity(sampler, requests)
        assert got.keys() == alone.keys()
        assert_same(got, alone)
    session, got, waiting = sampler.open(), {}, list(REQUESTS)
    numbers: dict[int, Request] = {}
    while waiting or not session.is_idle:
        if waiting:
            request = waiting.pop(len(waiting) // 2)
            numbers[session.submit(request)] = request
        got |= {numbers[c.request].identity: c for c in session.step().completions}
    assert got.keys() == alone.keys()
    assert_same(got, alone)


@pytest.mark.parametrize("sizes", [{"data": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_devices_change_no_token(params, alone, sizes):
    assert_same(by_identity(build(params, mesh=toy_mesh(**sizes))), alone, 1e-5)


def test_pages_that_run_out_change_no_bit(params, alone):
    """Prompts that are half read are put back too."""
    limits = LIMITS._replace(cache_tokens=(LIMITS.row_pages + 1) * LIMITS.page)
    sampler = build(params, limits)
    assert_same(by_identity(sampler), alone)
    assert sampler.stats.preempted > 0


def test_a_response_may_fill_the_window_and_no_more(sampler):
    ignoring = Drawing(ignores_stops=True)
    requests = [Request(p, (SERVE, n, 1, 0), None, ignoring) for n, p in enumerate(PROMPTS)]
    for c in sampler.sample(requests):
        assert len(c.tokens_T) == WINDOW - len(PROMPTS[c.request]) and c.ending == LENGTH


def test_what_was_written_before_goes_on_with_the_same_draws(sampler, alone):
    """A request that is cut and goes on draws at each position the number it would have drawn."""
    for request in REQUESTS:
        whole = alone[request.identity].tokens_T.tolist()
        cut = len(whole) // 2
        again = request._replace(
            tokens=(*request.tokens, *whole[:cut]), written=cut, max_tokens=12 - cut
        )
        (rest,) = sampler.sample([again])
        assert rest.tokens_T.tolist() == whole[cut:], request


# --- one truth ----------------------------------------------------------------------------------


@jax.jit
def _logits(params, token_1T):
    L = token_1T.shape[1]
    hidden, _ = MODEL.apply(params, token_1T, jnp.arange(L)[None], jnp.ones((1, L), jnp.int32))
    return logits(HEAD, MODEL.unembedding(params), hidden[0])


def logits_after(params, tokens) -> np.ndarray:
    row = np.zeros((1, WINDOW), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_logits(params, row))[: len(tokens) - 1]


def expected_logp(z_TV: np.ndarray, how: Drawing, is_raw: bool) -> np.ndarray:
    """Log-probabilities of all ids; -inf where a row would never draw them."""
    if is_raw or how.temperature == 0:
        return np.asarray(jax.nn.log_softmax(z_TV))
    logp_TV = jax.nn.log_softmax(jnp.asarray(z_TV) / how.temperature)
    kept = np.asarray(truncate(logp_TV, Choice(how.top_k, how.top_p, how.min_p))) > -1e29
    return np.asarray(jax.nn.log_softmax(np.where(kept, logp_TV, -np.inf)))


@pytest.mark.parametrize("is_raw", [False, True])
def test_log_probabilities_are_of_the_distribution_that_was_asked_for(params, is_raw):
    """With prompts read in pieces, beside a full forward pass of the trainer's network."""
    session = build(params, is_raw=is_raw).open()
    numbers = {session.submit(r): r for r in REQUESTS}
    deltas: dict[int, list] = {n: [] for n in numbers}
    tokens: dict[int, np.ndarray] = {}
    while not session.is_idle:
        step = session.step()
        for delta in step.deltas:
            deltas[delta.request].append(delta)
        tokens |= {c.request: c.tokens_T for c in step.completions}
    for number, request in numbers.items():
        how, drawn = request.drawing, tokens[number]
        assert how is not None
        z_TV = logits_after(params, (*request.tokens, *drawn))[-len(drawn) :]
        logp_TV = expected_logp(z_TV, how, is_raw)
        at = (np.arange(len(drawn)), drawn)
        assert [t for d in deltas[number] for t in d.tokens] == drawn.tolist()
        got = [x for d in deltas[number] for x in d.logp]
        np.testing.assert_allclose(got, logp_TV[at], atol=1e-4)
        assert [d.start for d in deltas[number]] == np.cumsum(
            [0, *(len(d.tokens) for d in deltas[number])]
        )[:-1].tolist()
        top = [x for d in deltas[number] for x in d.top]
        assert len(top) == (len(drawn) if how.top else 0)
        for t, pairs in enumerate(top):
            assert len(pairs) == how.top
            best = np.sort(logp_TV[t])[::-1][: how.top]
            np.testing.assert_allclose([x for _, x in pairs], best, atol=1e-4)
            np.testing.assert_allclose(
                [x for _, x in pairs], [logp_TV[t, i] for i, _ in pairs], atol=1e-4
            )
            assert dict(pairs).get(drawn[t], got[t]) == got[t], "one token, two numbers"
        if how.temperature == 0:
            np.testing.assert_array_equal(drawn, z_TV.argmax(axis=-1))


CHOICES = [EVERYTHING, Choice(top_k=3), Choice(top_p=0.5), Choice(min_p=0.2), Choice(4, 0.8, 0.1)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_rows_that_draw_differently_draw_what_a_batch_of_their_kind_draws(temperature):
    rng = np.random.RandomState(0)
    z_NV = jnp.asarray(3 * rng.standard_normal((10 * len(CHOICES), VOCAB)), jnp.float32)
    z_NV = jnp.where(IS_ALLOWED_V, z_NV, -1e30)
    N = z_NV.shape[0]
    key_N = identity_keys(0, jnp.arange(4 * N, dtype=jnp.uint32).reshape(N, 4))
    own = [CHOICES[n % len(CHOICES)] for n in range(N)]

    def field(values, dtype):
        return jnp.asarray(values, dtype)

    how = Drawings(
        temperature_N=jnp.full(N, temperature),
        top_k_N=field([c.top_k for c in own], jnp.int32),
        top_p_N=field([c.top_p for c in own], jnp.float32),
        min_p_N=field([c.min_p for c in own], jnp.float32),
        ignores_stops_N=jnp.zeros(N, bool),
        top_N=jnp.zeros(N, jnp.int32),
        written_N=jnp.zeros(N, jnp.int32),
    )
    got = jax.jit(lambda: choose_each(z_NV, key_N, how, is_raw=False, listed=0))()[0]
    for number, choice in enumerate(CHOICES):
        scaled_NV = z_NV / (temperature or 1.0)
        of_kind = slice(number, None, len(CHOICES))
        wanted = choose(scaled_NV, key_N, choice, temperature == 0)
        np.testing.assert_array_equal(got.token_N[of_kind], wanted.token_N[of_kind])
        logp_N = wanted.full_logp_N if temperature == 0 else wanted.logp_N
        np.testing.assert_allclose(got.logp_N[of_kind], logp_N[of_kind], atol=2e-6)


# --- come and go --------------------------------------------------------------------------------


def books(session: Session) -> tuple:
    return tuple((sorted(s._free_pages), len(s.running), len(s._groups)) for s in session.shards)


def test_a_cancelled_request_frees_what_it_had_and_changes_no_other(sampler, alone):
    """Cancelled while it waits, while its prompt is half read, and while it runs."""
    session = sampler.open()
    free = books(session)
    for after in range(6):
        numbers = {session.submit(r): r for r in REQUESTS}
        for _ in range(after):
            step = session.step()
            gone = {c.request for c in step.completions}
            numbers = {n: r for n, r in numbers.items() if n not in gone}
        for number in list(numbers)[::2]:
            session.cancel(number)
            del numbers[number]
        got = {}
        while not session.is_idle:
            got |= {numbers[c.request].identity: c for c in session.step().completions}
        assert got.keys() == {r.identity for r in numbers.values()}
        assert_same(got, alone)
        assert books(session) == free
    session.cancel(10**6)  # one that never was, or has ended


def test_a_long_prompt_does_not_hold_up_those_who_write(sampler):
    """Its pieces are read between the others' steps."""
    session = sampler.open()
    first = session.submit(Request((5,), (SERVE, 0, 0, 0), 20, Drawing(ignores_stops=True)))
    session.step()
    session.submit(Request(LONG, (SERVE, 1, 0, 0), 2, Drawing()))
    pieces = -(-(len(LONG) - 1) // 4)
    for _ in range(pieces - 1):
        assert [d.request for d in session.step().deltas] == [first]
    assert len(session.step().deltas) == 2


def test_a_prompt_is_read_once_for_neighbours_and_few_programs_are_compiled(params):
    traced = []

    def apply(params, token_BT, *arrays):
        traced.append(token_BT.shape)
        return MODEL.apply(params, token_BT, *arrays)

    model = MODEL._replace(apply=apply)
    sampler = PagedSampler(model, HEAD, LIMITS, toy_mesh(), seed=3, choice=Serving(listed=4))
    sampler.start(params)
    list(sampler.sample(REQUESTS))
    assert set(traced) == {(LIMITS.slots, 1), (LIMITS.prompts, LIMITS.chunk)}
    assert sampler.stats.prefilled == sum(len(p) - 1 for p in PROMPTS)


def test_what_cannot_be_is_said(sampler, params):
    session = sampler.open()
    with pytest.raises(ValueError, match="32 tokens, expected 1 to 31"):
        session.submit(Request((3,) * WINDOW, (SERVE, 0, 0, 0)))
    with pytest.raises(ValueError, match="draws as `Request.drawing` says"):
        sampler.drawing(0.5, EVERYTHING)
    plain = PagedSampler(MODEL, HEAD, LIMITS, toy_mesh(), seed=3)
    with pytest.raises(ValueError, match="draws all rows alike"):
        plain.open().submit(REQUESTS[0])
    assert CONFIG.layers == 2 and session.is_idle
