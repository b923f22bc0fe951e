"""The sampler's laws: identity, one truth with the trainer, endings, truncation, devices."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import (
    BOS,
    CONFIG,
    EOS,
    HEAD,
    IS_ALLOWED_V,
    PAD,
    VOCAB,
    assert_same,
    in_int8,
    on,
    random_adapter,
    random_params,
    toy_mesh,
    toy_model,
)

from aspo_jax.head import logits
from aspo_jax.learner import forward
from aspo_jax.model import Lora, build_model, map_axes, partition_spec, shardings
from aspo_jax.model.lora import attach, detach, frozen_axes
from aspo_jax.rows import BatchShape, answered, fill
from aspo_jax.sampler import (
    EVALUATE,
    EVERYTHING,
    LENGTH,
    NONFINITE,
    STOP,
    TRAIN,
    Choice,
    Completion,
    Limits,
    PagedSampler,
    Request,
    make_publish,
    stop_length,
    truncate,
    widths,
)
from aspo_jax.sampler.widths import Widths

LIMITS = Limits(
    max_prompt_tokens=6,
    max_response_tokens=12,
    slots=4,
    stop_ids=(EOS,),
    prompts=4,
    page=3,
    block=8,
)
MODEL = toy_model()
PROMPTS = ((5,), (7, 8, 9), (3, 4, 3, 4, 3, 4))
REQUESTS = [Request(PROMPTS[d % 3], (TRAIN, d, 0, g)) for d in range(5) for g in range(2)]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, scale=0.25)


def build(params, limits=LIMITS, mesh=None, *, seed=3, **more) -> PagedSampler:
    mesh = mesh or toy_mesh()
    sampler = PagedSampler(MODEL, HEAD, limits, mesh, seed=seed, **more)
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


def test_prompts_are_read_together_as_far_as_their_tokens_go(params, completions):
    sampler = build(params, LIMITS._replace(prefill=7))
    read, shapes = sampler.prefill, set()

    def noted(params, cache, token_AT, *rest):
        shapes.add(token_AT.shape)
        return read(params, cache, token_AT, *rest)

    sampler.prefill = noted
    assert_same(by_identity(sampler), completions, 1e-5)
    assert shapes == {(2, 3), (1, 6)}


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


def test_what_is_given_up_in_the_middle_changes_nothing_that_comes_after(sampler, completions):
    begun = sampler.sample(REQUESTS)
    next(begun)
    del begun
    assert_same(by_identity(sampler), completions)


def test_start_uses_the_new_parameters(params, completions):
    sampler = build(random_params(MODEL, seed=9))
    assert by_identity(sampler).keys() == completions.keys()
    sampler.start(on(toy_mesh(), MODEL, params))
    assert_same(by_identity(sampler), completions)


# --- one truth ----------------------------------------------------------------------------------


def test_log_probabilities_are_the_trainers(params, completions):
    gap = trainer_gap(MODEL, params, completions)
    assert gap.size == sum(len(c.tokens_T) for c in completions.values())
    assert gap.max() <= 1e-4


def trainer_gap(model, params, completions) -> np.ndarray:
    """|log-probability of the sampler - that of the trainer| of every token."""
    made = [
        answered(PROMPTS[i[1] % 3], c.tokens_T, c.logp_T, 1.0, 0) for i, c in completions.items()
    ]
    rows = jax.tree.map(lambda x: x[0], fill(made, BatchShape(1, 1, 8, 34)).rows)
    logp_BT, _ = jax.jit(lambda p, r: forward(model, HEAD, p, r))(params, rows)
    return np.abs(np.asarray(logp_BT) - rows.sampler_logp_BT)[rows.is_response_BT]


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


# --- faults -------------------------------------------------------------------------------------


def test_a_request_for_nothing_gets_nothing_and_others_go_on(sampler, completions):
    nothing = Request(PROMPTS[0], (TRAIN, 7, 0, 0), max_tokens=0)
    got = list(sampler.sample([nothing, *REQUESTS[:3], nothing]))
    empty = [c for c in got if c.request in (0, 4)]
    assert [(len(c.tokens_T), len(c.logp_T), c.ending) for c in empty] == [(0, 0, LENGTH)] * 2
    others = {REQUESTS[c.request - 1].identity: c for c in got if c.request in (1, 2, 3)}
    assert_same(others, completions)


@pytest.mark.parametrize("longest", [1, 4])
def test_a_requests_own_limit_cuts_the_same_text(sampler, completions, longest):
    got = by_identity(sampler, [r._replace(max_tokens=longest) for r in REQUESTS])
    for identity, c in got.items():
        whole = completions[identity]
        assert c.tokens_T.tolist() == whole.tokens_T[:longest].tolist()
        is_whole = len(whole.tokens_T) <= longest and whole.ending == STOP
        assert c.ending == (STOP if is_whole else LENGTH)


def test_all_slots_stop_at_once_at_the_first_token(params):
    """Every id is a stop id: each row ends at once and is filled again, 10 requests in 4 rows."""
    sampler = build(params, LIMITS._replace(stop_ids=tuple(range(VOCAB))))
    got = by_identity(sampler)
    assert {(len(c.tokens_T), c.ending) for c in got.values()} == {(1, STOP)}
    assert sampler.stats.steps == 3


def test_a_distribution_that_is_not_finite_ends_its_row_and_no_other(params, completions):
    """Once a row draws the id whose embedding is broken, its next distribution is NaN."""
    drawn = [
        t for c in completions.values() for t in c.tokens_T[:-1] if t not in (3, 4, 5, 7, 8, 9)
    ]
    bad = max(set(drawn), key=drawn.count)
    model = toy_model(tie_embeddings=False)  # or the output layer would break for all
    is_bad_V1 = np.arange(VOCAB)[:, None] == bad
    embed = np.where(is_bad_V1, np.nan, params["embed"])
    sampler = PagedSampler(model, HEAD, LIMITS, toy_mesh(), seed=3)
    sampler.start(on(toy_mesh(), model, {**params, "embed": embed, "head": params["embed"]}))
    endings = set()
    for identity, c in by_identity(sampler).items():
        whole = completions[identity].tokens_T.tolist()
        endings.add(c.ending)
        assert (c.ending == NONFINITE) == (bad in whole[:-1])
        cut = whole.index(bad) + 1 if c.ending == NONFINITE else len(whole)
        assert c.tokens_T.tolist() == whole[:cut] and np.isfinite(c.logp_T).all()
    assert NONFINITE in endings and len(endings) > 1


def test_stop_strings_cut_where_they_are_complete_whatever_the_block(params, completions):
    """The text is the ids; it is over once the same id came twice in a row."""

    def stops(tokens):
        pairs = enumerate(itertools.pairwise(tokens), start=2)
        return next((count for count, (a, b) in pairs if a == b), None)

    for block in (1, 8):
        got = by_identity(build(params, LIMITS._replace(block=block), stops=stops))
        cut = 0
        for identity, c in got.items():
            whole = completions[identity]
            count = stops(whole.tokens_T.tolist())
            cut += count is not None
            assert c.tokens_T.tolist() == whole.tokens_T[:count].tolist()
            assert len(c.logp_T) == len(c.tokens_T)
            assert c.ending == (whole.ending if count is None else STOP)
        assert 0 < cut < len(got)


def test_a_stop_string_is_complete_after_the_shortest_text_that_holds_it():
    def decode(tokens) -> str:
        return "".join(map(chr, tokens))

    tokens = list(map(ord, "so long, long ago"))
    assert stop_length(decode, ("ago", "ong"), tokens) == len("so long")
    assert stop_length(decode, ("ago",), tokens) == len(tokens)
    assert stop_length(decode, ("never",), tokens) is None


# --- rows, pages, prompts -----------------------------------------------------------------------


def test_few_programs_few_calls_and_full_rows(params):
    """40 samples of uneven length in 4 rows: rows are refilled while others wait."""
    traced = []

    def apply(params, token_BT, *arrays):
        traced.append(token_BT.shape)
        return MODEL.apply(params, token_BT, *arrays)

    sampler = PagedSampler(MODEL._replace(apply=apply), HEAD, LIMITS, toy_mesh(), seed=3)
    sampler.start(params)
    requests = [Request(PROMPTS[d % 3], (TRAIN, d, 0, g)) for d in range(5) for g in range(8)]
    first = list(sampler.sample(requests))
    shapes = list(traced)
    decode, prefill = (LIMITS.slots, 1), {(LIMITS.prompts, size) for size in LIMITS.buckets}
    assert decode in shapes and set(shapes) <= {decode, *prefill}
    tokens = sum(len(c.tokens_T) for c in sampler.sample(requests))
    assert traced == shapes, "the second time compiled something"
    assert tokens == sum(len(c.tokens_T) for c in first)
    stats = sampler.stats
    assert stats.tokens == tokens and stats.calls < tokens / 4
    assert stats.busy_tokens >= 0.95 * stats.busy_steps * LIMITS.slots
    assert stats.preempted == 0


def test_a_prompt_is_read_once_for_its_whole_group(sampler):
    requests = [Request(PROMPTS[2], (TRAIN, d, 0, g)) for d in range(2) for g in range(16)]
    list(sampler.sample(requests))
    assert sampler.stats.prefilled == len(PROMPTS[2]) - 1  # 31 others read the same pages
    list(sampler.sample(requests[:1]))
    assert sampler.stats.prefilled == len(PROMPTS[2]) - 1


# Where the last of 16 rows was once rotated with another rounding than the others.
BROAD = dataclasses.replace(CONFIG, hidden_size=48, heads=4, kv_heads=2, head_dim=16)


@pytest.mark.parametrize(("config", "slots"), [(CONFIG, 5), (BROAD, 16)], ids=["5", "16"])
def test_the_place_of_a_row_changes_no_bit(config, slots):
    model = build_model(config, is_stacked=False)
    sampler = PagedSampler(model, HEAD, LIMITS._replace(slots=slots), toy_mesh(), seed=3)
    sampler.start(random_params(model, scale=0.25))
    drawn = list(sampler.sample([REQUESTS[4]] * slots))
    assert len({(*c.tokens_T.tolist(), *c.logp_T.tolist()) for c in drawn}) == 1


MANY = LIMITS._replace(slots=16, page=8)
LAST = REQUESTS + [Request(PROMPTS[1], (TRAIN, 9, 0, g)) for g in range(13)]


def few_rows(params, monkeypatch, spoil=lambda drawn: drawn) -> tuple[PagedSampler, set[int]]:
    """A sampler that has wasted enough on its last rows, and the numbers of rows of its calls.

    spoil: of what calls of fewer rows draw.
    """
    monkeypatch.setattr(widths, "WORTH", 1)
    sampler, rows = build(params, MANY), set()
    decode = sampler.decode

    def noted(params, cache, these, *rest):
        rows.add(len(these.token_N))
        cache, drawn = decode(params, cache, these, *rest)
        return cache, drawn if len(these.token_N) == MANY.slots else spoil(drawn)

    sampler.decode = noted
    return sampler, rows


def test_the_last_answers_decode_in_fewer_rows_and_change_no_bit(params, monkeypatch):
    sampler, rows = few_rows(params, monkeypatch)
    by_all = by_identity(sampler, LAST)
    assert rows == {16}
    again = by_identity(sampler, LAST)
    assert sampler.widths.known[0] == 16 and rows == set(sampler.widths.candidates)
    assert_same(again, by_all)


def test_a_program_that_rounds_otherwise_draws_nothing(params, monkeypatch):
    def spoil(drawn):
        return dataclasses.replace(drawn, logp_NT=drawn.logp_NT.at[0, 0].add(1e-6))

    sampler, rows = few_rows(params, monkeypatch, spoil)
    by_all = by_identity(sampler, LAST)
    rows.clear()
    assert_same(by_identity(sampler, LAST), by_all)
    assert rows == {16, 8} and sampler.widths.known == sampler.widths.candidates == (16,)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [(MANY, {"tensor": 2}), (LIMITS, {}), (MANY._replace(page=1, cache_tokens=100), {})],
    ids=["on devices", "few anyway", "no room to compare"],
)
def test_where_all_rows_are_always_decoded(limits, sizes):
    found = Widths.of(limits, limits.slots // 4, toy_mesh(**sizes))
    assert found.candidates == found.known == (limits.slots,)


def test_published_layers_and_pages_at_once_change_no_token(params, completions):
    """As a CPU wants the weights, layer by layer; as an accelerator wants the cache, by 4 pages."""
    apart = build_model(CONFIG, is_stacked=False)
    publish = make_publish(apart, toy_mesh(), toy_mesh(), "float32")
    one_by_one = PagedSampler(apart, HEAD, LIMITS, toy_mesh(), seed=3, publish=publish)
    one_by_one.start(params)
    assert len(one_by_one.params["layers"]) == CONFIG.layers
    for other in (one_by_one, build(params, LIMITS._replace(read=4 * LIMITS.page))):
        assert_same(by_identity(other), completions, 1e-5)


@pytest.mark.parametrize(("is_stacked", "is_int8"), [(True, False), (False, False), (False, True)])
def test_adapters_are_sampled_from_merged_or_beside(params, is_stacked, is_int8):
    lora = Lora(rank=3, alpha=5.0, is_int8=is_int8)
    model, mesh = build_model(CONFIG, is_stacked=is_stacked), toy_mesh()
    frozen = in_int8(params, CONFIG) if is_int8 else params
    frozen = jax.device_put(frozen, model.shardings(mesh) if is_stacked else None)
    adapted = attach(random_adapter(lora, CONFIG), frozen, lora.scale)
    requests = [Request(PROMPTS[d], (TRAIN, d, 0, 0)) for d in range(3)]
    found = []
    for kept in (None, lora):
        publish = make_publish(model, mesh, mesh, "float32", kept)
        sampler = PagedSampler(model, HEAD, LIMITS, mesh, seed=3, publish=publish)
        sampler.start(adapted)
        layer = sampler.params["layers"] if is_stacked else sampler.params["layers"][0]
        assert ("a" in layer["q"]) == (kept is not None)
        kinds = {part: str(x.dtype) for part, x in layer["q"].items()}
        assert (kinds["kernel"] == "int8") == ("step" in kinds) == (is_int8 and kept is not None)
        assert set(kinds.values()) <= {"int8", "float32"}
        pointers = [x["embed"].unsafe_buffer_pointer() for x in (sampler.params, adapted)]
        is_own = pointers[0] == pointers[1]
        assert is_own == (is_stacked and kept is not None)  # nothing is copied
        found.append(by_identity(sampler, requests))
    assert_same(found[1], found[0], 1e-5)


def test_int8_weights_of_the_trainer_are_sampled_where_they_lie(params):
    """In bfloat16 on one device: none of the frozen weights is copied, and the gate holds."""
    lora, mesh = Lora(rank=3, alpha=5.0, is_int8=True), toy_mesh()
    model = build_model(CONFIG, dtype=jnp.bfloat16)
    places = shardings(mesh, map_axes(partition_spec, frozen_axes(CONFIG, lora)))
    frozen = jax.device_put(in_int8(params, CONFIG), places)
    adapted = attach(random_adapter(lora, CONFIG), frozen, lora.scale)
    publish = make_publish(model, mesh, mesh, "bfloat16", lora)
    sampler = PagedSampler(model, HEAD, LIMITS, mesh, seed=3, publish=publish)
    sampler.start(adapted)
    ours, theirs = (
        [x.unsafe_buffer_pointer() for x in jax.tree.leaves(detach(tree))]
        for tree in (sampler.params, adapted)
    )
    assert ours == theirs
    found = by_identity(sampler, [Request(PROMPTS[d], (TRAIN, d, 0, 0)) for d in range(3)])
    gap = trainer_gap(model, adapted, found)
    assert gap.size > 10 and gap.mean() <= 0.03  # of 0.1, Sampler.max_gap


@pytest.mark.parametrize("is_stacked", [True, False])
def test_all_but_the_scales_of_norms_are_published_in_the_samplers_type(params, is_stacked):
    model = build_model(CONFIG, is_stacked=is_stacked)
    published = make_publish(model, toy_mesh(), toy_mesh(), "bfloat16").of(params)
    for path, x in jax.tree_util.tree_leaves_with_path(published):
        is_scale = path[-1].key in ("scale", "norm")
        assert x.dtype == ("float32" if is_scale else "bfloat16"), path


def test_rows_of_like_length_sit_together(params):
    """A class of rows reads as far as its longest: the order of the rows is that of the lengths."""
    sampler, orders = build(params, LIMITS._replace(block=3)), []
    real = sampler.decode

    def decode(params, cache, rows, *numbers):
        orders.append(np.asarray(-(-rows.prompt_N // LIMITS.page) + rows.drawn_N // LIMITS.page))
        return real(params, cache, rows, *numbers)

    sampler.decode = decode
    list(sampler.sample(REQUESTS))
    assert any(pages_N[0] != pages_N[-1] for pages_N in orders)
    assert all((np.diff(pages_N) <= 0).all() for pages_N in orders)


@pytest.mark.parametrize("slots", [4, 3])
def test_pages_that_run_out_change_no_bit(params, completions, slots):
    """Room for one long sequence and a bit: sequences are preempted and drawn again."""
    least = (LIMITS.row_pages + 1) * LIMITS.page
    limits = LIMITS._replace(cache_tokens=least, slots=slots, block=4)
    sampler = build(params, limits)
    assert_same(by_identity(sampler), completions, 0.0 if slots == LIMITS.slots else 1e-5)
    assert sampler.stats.preempted > 0
    with pytest.raises(ValueError, match=f"Sampler.cache_tokens = {least - 1} .* least {least}"):
        build(params, LIMITS._replace(cache_tokens=least - 1))


def test_prompts_of_mixed_lengths_and_interleaved_samples_change_no_bit(sampler, completions):
    by_sample = sorted(REQUESTS, key=lambda r: (r.identity[3], r.identity[1]))
    assert_same(by_identity(sampler, by_sample), completions)
    assert LIMITS.buckets == (3, 6)  # both are used: one prompt has 5 tokens to read, others fewer


def test_int8_pages_stay_near(params, completions):
    """One part in 254 of a head's largest number: log-probabilities move a little, not nothing."""
    got = by_identity(build(params, LIMITS._replace(cache_type="int8")))
    gaps = []
    for identity, c in got.items():
        whole = completions[identity]
        same = np.cumprod(c.tokens_T[:12] == np.resize(whole.tokens_T, len(c.tokens_T))[:12])
        count = min(int(same.sum()), len(whole.tokens_T))
        gaps += np.abs(c.logp_T[:count] - whole.logp_T[:count]).tolist()
    assert len(gaps) > 40 and 0 < np.mean(gaps) < 0.02 and max(gaps) < 0.2


# --- truncation ---------------------------------------------------------------------------------

P_5 = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    "choice, kept",
    [
        (Choice(), [0, 1, 2, 3, 4]),
        (Choice(top_k=2), [1, 3]),
        (Choice(top_k=5), [0, 1, 2, 3, 4]),
        (Choice(top_p=0.39), [1]),
        (Choice(top_p=0.41), [1, 3]),
        (Choice(top_p=0.84), [1, 3, 4]),
        (Choice(top_p=0.0001), [1]),
        (Choice(top_k=2, top_p=0.9), [1, 3]),
        (Choice(top_k=3, top_p=0.48), [1, 3]),
        # The nucleus of what top-k left, renormalised: 0.4 of 0.65 is more than 0.6 of the mass.
        (Choice(top_k=2, top_p=0.6), [1]),
        (Choice(min_p=0.51), [1, 3]),
        (Choice(min_p=0.49), [1, 3, 4]),
        (Choice(min_p=1.0), [1]),
    ],
    ids=str,
)
def test_truncate_keeps_the_head_of_the_distribution(choice, kept):
    logp_NV = jnp.log(jnp.asarray([P_5, P_5[::-1]], jnp.float32))
    got = np.asarray(truncate(logp_NV, choice))
    is_kept = np.isin(np.arange(5), kept)
    np.testing.assert_array_equal(got > -1e29, [is_kept, is_kept[::-1]])
    np.testing.assert_array_equal(got[0, is_kept], np.asarray(logp_NV)[0, is_kept])


def test_a_tighter_nucleus_is_a_subset():
    logp_NV = jax.nn.log_softmax(jnp.asarray(np.random.RandomState(0).randn(8, 20), jnp.float32))
    kept = [np.asarray(truncate(logp_NV, Choice(top_p=p))) > -1e29 for p in (0.9, 0.6, 0.2)]
    for wider, tighter in itertools.pairwise(kept):
        assert (wider | ~tighter).all() and wider.sum() > tighter.sum()


TRUNCATED = [Choice(top_k=3), Choice(top_p=0.5), Choice(min_p=0.2)]


def drawing(params, temperature: float, choice: Choice, limits=LIMITS) -> PagedSampler:
    sampler = build(params, limits).drawing(temperature, choice)
    sampler.start(params)
    return sampler


def test_the_likeliest_ids_are_certain(params):
    for identity, c in by_identity(drawing(params, 0.0, EVERYTHING)).items():
        logp_TV = logp_after(params, (*PROMPTS[identity[1] % 3], *c.tokens_T))[-len(c.logp_T) :]
        np.testing.assert_array_equal(c.tokens_T, logp_TV.argmax(axis=-1))
        np.testing.assert_allclose(c.policy_logp_T, logp_TV.max(axis=-1), atol=1e-4)
        assert (c.logp_T == 0).all()


@pytest.mark.parametrize(
    ("temperature", "choice", "again"),
    [(0.0, EVERYTHING, set()), (0.5, EVERYTHING, set()), (1.0, Choice(top_k=2), {1})],
)
def test_what_draws_otherwise_shares_its_programs(params, temperature, choice, again):
    """Another temperature compiles nothing; another truncation, decode (one token wide) alone."""
    traced = []

    def apply(params, token_BT, *arrays):
        traced.append(token_BT.shape[1])
        return MODEL.apply(params, token_BT, *arrays)

    sampler = PagedSampler(MODEL._replace(apply=apply), HEAD, LIMITS, toy_mesh(), seed=3)
    sampler.start(params)
    as_before = by_identity(sampler)
    before = len(traced)
    other = sampler.drawing(temperature, choice)
    other.start(params)
    drawn = by_identity(other)
    assert set(traced[before:]) == again
    assert any(drawn[i].tokens_T.tolist() != c.tokens_T.tolist() for i, c in as_before.items())


def test_a_colder_draw_is_that_of_a_head_of_that_temperature(params):
    cold = PagedSampler(MODEL, HEAD._replace(temperature=0.5), LIMITS, toy_mesh(), seed=3)
    cold.start(params)
    expected = by_identity(cold)
    for identity, c in by_identity(drawing(params, 0.5, EVERYTHING)).items():
        np.testing.assert_array_equal(c.tokens_T, expected[identity].tokens_T)
        np.testing.assert_array_equal(c.logp_T, expected[identity].logp_T)


@pytest.mark.parametrize("choice", TRUNCATED, ids=str)
def test_log_probabilities_are_of_what_was_drawn_from_and_of_the_whole(params, choice):
    for identity, c in by_identity(drawing(params, 1.0, choice)).items():
        logp_TV = logp_after(params, (*PROMPTS[identity[1] % 3], *c.tokens_T))[-len(c.logp_T) :]
        at = (np.arange(len(c.tokens_T)), c.tokens_T)
        assert c.full_logp_T is not None and c.policy_logp_T is c.full_logp_T
        np.testing.assert_allclose(c.full_logp_T, logp_TV[at], atol=1e-4)
        kept_TV = np.asarray(truncate(jnp.asarray(logp_TV), choice)) > -1e29
        assert kept_TV[at].all() and (kept_TV.sum(axis=-1) < IS_ALLOWED_V.sum()).any()
        mass_T = np.where(kept_TV, np.exp(logp_TV), 0).sum(axis=-1)
        np.testing.assert_allclose(c.logp_T, logp_TV[at] - np.log(mass_T), atol=1e-4)


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
    sampler = build(params, Limits(2, 2, count, (EOS,), page=2))
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
