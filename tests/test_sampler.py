"""The sampler's laws: identity, one truth with the trainer, endings, truncation, devices."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import BOS, EOS, HEAD, IS_ALLOWED_V, PAD, VOCAB, on, random_params, toy_mesh, toy_model

from aspo_jax.head import logits
from aspo_jax.learner import forward
from aspo_jax.rollout import BatchShape, Example, fill
from aspo_jax.sampler import (
    EVALUATE,
    TRAIN,
    BatchSampler,
    Completion,
    Limits,
    Request,
    Truncation,
    truncate,
)

LIMITS = Limits(max_prompt_tokens=6, max_response_tokens=12, slots=4, eos_id=EOS)
MODEL = toy_model()
PROMPTS = ((5,), (7, 8, 9), (3, 4, 3, 4, 3, 4))
REQUESTS = [Request(PROMPTS[d % 3], (TRAIN, d, 0, g)) for d in range(5) for g in range(2)]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, scale=0.25)


def build(params, limits=LIMITS, mesh=None, *, seed=3, truncation=None) -> BatchSampler:
    mesh = mesh or toy_mesh()
    more = {"truncation": truncation} if truncation else {}
    sampler = BatchSampler(MODEL, HEAD, limits, mesh, seed=seed, **more)
    sampler.start(on(mesh, MODEL, params))
    return sampler


@pytest.fixture(scope="module")
def sampler(params):
    return build(params)


def by_identity(sampler, requests=REQUESTS) -> dict[tuple, Completion]:
    got = list(sampler.sample(requests))
    assert sorted(c.request for c in got) == list(range(len(requests)))
    return {requests[c.request].identity: c for c in got}


@pytest.fixture(scope="module")
def completions(sampler):
    return by_identity(sampler)


def assert_same(got: dict, expected: dict, logp_tolerance: float = 0.0) -> None:
    for identity, completion in got.items():
        wanted = expected[identity]
        assert completion.tokens_T.tolist() == wanted.tokens_T.tolist()
        assert completion.is_finished == wanted.is_finished
        np.testing.assert_allclose(
            completion.logp_T, wanted.logp_T, rtol=0, atol=logp_tolerance, err_msg=str(identity)
        )


# --- identity -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requests",
    [REQUESTS[::-1], REQUESTS[3:4], REQUESTS[1:4], REQUESTS[5:] + REQUESTS[:5], []],
    ids=["reversed", "alone", "batch not full", "rotated", "none"],
)
def test_slot_neighbours_and_order_change_no_bit(sampler, completions, requests):
    assert_same(by_identity(sampler, requests), completions)


def test_block_size_changes_no_bit_and_short_completions_come_first(params, completions):
    sampler = build(params, LIMITS._replace(block=1))
    assert_same(by_identity(sampler), completions)
    by_length = sorted(REQUESTS, key=lambda r: -len(completions[r.identity].tokens_T))
    # The first look at a batch is after two positions: prefill draws one, decode another.
    lengths = [max(2, len(c.tokens_T)) for c in sampler.sample(by_length[:2] + by_length[-2:])]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1


def test_number_of_slots_changes_no_token(params, completions):
    assert_same(by_identity(build(params, LIMITS._replace(slots=7))), completions, 1e-5)


@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_devices_change_no_token(params, completions, sizes):
    assert_same(by_identity(build(params, mesh=toy_mesh(**sizes))), completions, 1e-5)


def test_seed_and_every_part_of_the_identity_name_the_draw(params, sampler, completions):
    first = REQUESTS[0]
    identities = [(EVALUATE, 0, 0, 0), (TRAIN, 1, 0, 0), (TRAIN, 0, 1, 0), (TRAIN, 0, 0, 1)]
    got = by_identity(sampler, [Request(first.tokens, i) for i in [first.identity, *identities]])
    texts = {tuple(c.tokens_T.tolist()) for c in got.values()}
    assert len(texts) == 5
    other_seed = by_identity(build(params, seed=4))
    same = [other_seed[i].tokens_T.tolist() == c.tokens_T.tolist() for i, c in completions.items()]
    assert sum(same) <= 1  # two short answers may agree by chance


def test_start_uses_the_new_parameters(params, completions):
    sampler = build(random_params(MODEL, seed=9))
    assert by_identity(sampler).keys() == completions.keys()
    sampler.start(on(toy_mesh(), MODEL, params))
    assert_same(by_identity(sampler), completions)


# --- one truth ----------------------------------------------------------------------------------


def test_log_probabilities_are_the_trainers(params, completions):
    made = [
        Example(PROMPTS[i[1] % 3], c.tokens_T, 1.0, c.logp_T, 0) for i, c in completions.items()
    ]
    rows = jax.tree.map(lambda x: x[0], fill(made, BatchShape(1, 1, 8, 34)).rows)
    logp_BT, _ = jax.jit(lambda p, r: forward(MODEL, HEAD, p, r))(params, rows)
    gap = np.abs(np.asarray(logp_BT) - rows.sampler_logp_BT)[rows.is_response_BT]
    assert gap.size == sum(len(c.tokens_T) for c in completions.values())
    assert gap.max() <= 1e-4


# --- endings ------------------------------------------------------------------------------------


def test_a_completion_ends_with_eos_if_and_only_if_it_is_finished(completions):
    finished = [c.is_finished for c in completions.values()]
    assert any(finished) and not all(finished)  # both kinds are tested
    for c in completions.values():
        assert c.tokens_T.shape == c.logp_T.shape and c.logp_T.dtype == np.float32
        assert (c.tokens_T[:-1] != EOS).all()
        assert (c.tokens_T[-1] == EOS) == c.is_finished
        assert c.is_finished or len(c.tokens_T) == LIMITS.max_response_tokens
        assert (c.logp_T < 0).all()


def test_what_is_forbidden_is_never_drawn(completions):
    drawn = {int(t) for c in completions.values() for t in c.tokens_T}
    assert IS_ALLOWED_V[list(drawn)].all() and not drawn & {PAD, BOS}


@pytest.mark.parametrize(
    "tokens, found", [((), "has 0 tokens"), ((3,) * 7, "has 7 tokens")], ids=["empty", "long"]
)
def test_a_prompt_that_does_not_fit_is_named(sampler, tokens, found):
    requests = [REQUESTS[0], Request(tokens, (TRAIN, 8, 0, 1))]
    with pytest.raises(ValueError, match=rf"request 1 \(identity \(0, 8, 0, 1\)\): .* {found}"):
        list(sampler.sample(requests))


# --- truncation ---------------------------------------------------------------------------------

P_5 = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    "truncation, kept",
    [
        (Truncation(), [0, 1, 2, 3, 4]),
        (Truncation(top_k=2), [1, 3]),
        (Truncation(top_k=5), [0, 1, 2, 3, 4]),
        (Truncation(top_p=0.39), [1]),
        (Truncation(top_p=0.41), [1, 3]),
        (Truncation(top_p=0.84), [1, 3, 4]),
        (Truncation(top_p=0.0001), [1]),
        (Truncation(top_k=2, top_p=0.9), [1, 3]),
        (Truncation(top_k=3, top_p=0.48), [1, 3]),
        # The nucleus of what top-k left, renormalised: 0.4 of 0.65 is more than 0.6 of the mass.
        (Truncation(top_k=2, top_p=0.6), [1]),
    ],
    ids=str,
)
def test_truncate_keeps_the_head_of_the_distribution(truncation, kept):
    logp_NV = jnp.log(jnp.asarray([P_5, P_5[::-1]], jnp.float32))
    got = np.asarray(truncate(logp_NV, truncation))
    is_kept = np.isin(np.arange(5), kept)
    np.testing.assert_array_equal(got > -1e29, [is_kept, is_kept[::-1]])
    np.testing.assert_array_equal(got[0, is_kept], np.asarray(logp_NV)[0, is_kept])


def test_a_tighter_nucleus_is_a_subset():
    logp_NV = jax.nn.log_softmax(jnp.asarray(np.random.RandomState(0).randn(8, 20), jnp.float32))
    kept = [np.asarray(truncate(logp_NV, Truncation(top_p=p))) > -1e29 for p in (0.9, 0.6, 0.2)]
    for wider, tighter in itertools.pairwise(kept):
        assert (wider | ~tighter).all() and wider.sum() > tighter.sum()


@pytest.mark.parametrize("truncation", [Truncation(top_k=3), Truncation(top_p=0.5)], ids=str)
def test_draws_stay_inside_and_the_log_probability_is_of_the_whole(params, truncation):
    for identity, c in by_identity(build(params, truncation=truncation)).items():
        logp_TV = logp_after(params, (*PROMPTS[identity[1] % 3], *c.tokens_T))[-len(c.logp_T) :]
        np.testing.assert_allclose(
            c.logp_T, logp_TV[np.arange(len(c.tokens_T)), c.tokens_T], atol=1e-4
        )
        for token, logp_V in zip(c.tokens_T, logp_TV, strict=True):
            order_V = np.argsort(-logp_V)
            p_V = np.exp(logp_V[order_V])
            inside = truncation.top_k or int((np.cumsum(p_V) - p_V < truncation.top_p).sum())
            assert token in order_V[:inside]


LONGEST = LIMITS.max_prompt_tokens + LIMITS.max_response_tokens


@jax.jit
def _distribution(params, token_1T):
    hidden, _ = MODEL.apply(
        params, token_1T, jnp.arange(LONGEST)[None], jnp.ones((1, LONGEST), jnp.int32)
    )
    return jax.nn.log_softmax(logits(HEAD, MODEL.unembedding(params), hidden[0]))


def logp_after(params, tokens) -> np.ndarray:
    """Log-probabilities of every id at each predicted position of one sequence, [L - 1, V]."""
    row = np.zeros((1, LONGEST), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_distribution(params, row))[: len(tokens) - 1]


# --- frequencies --------------------------------------------------------------------------------


def test_draws_have_the_frequencies_of_the_distribution(params):
    """Pearson's chi-square at the first two positions, over independent identities."""
    count, prompt = 2048, (4, 5)
    sampler = build(params, Limits(2, 2, count, EOS))
    got = by_identity(sampler, [Request(prompt, (TRAIN, 0, 0, g)) for g in range(count)])
    first = np.array([c.tokens_T[0] for c in got.values()])
    assert chi_square(first, np.exp(logp_after(params, (*prompt, 3))[1])) < CHI_SQUARE_99_9
    common = int(np.bincount(first).argmax())
    rest = [c.tokens_T[1] for c in got.values() if c.tokens_T[0] == common and common != EOS]
    assert len(rest) > 150
    p_V = np.exp(logp_after(params, (*prompt, common, 3))[2])
    assert chi_square(np.array(rest), p_V) < CHI_SQUARE_99_9


CHI_SQUARE_99_9 = 43.8  # 19 degrees of freedom: 20 allowed ids


def chi_square(drawn: np.ndarray, p_V: np.ndarray) -> float:
    observed_V = np.bincount(drawn, minlength=VOCAB)
    assert (observed_V[~IS_ALLOWED_V] == 0).all()
    expected_V = len(drawn) * p_V[IS_ALLOWED_V]
    return float(np.sum((observed_V[IS_ALLOWED_V] - expected_V) ** 2 / expected_V))
