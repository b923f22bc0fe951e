"""From prompts to rows, by hand and by law; no model involved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rollout_toy import (
    FAILED,
    RIGHT,
    WRONG,
    FakeSampler,
    FakeScorer,
    completion,
    in_step,
    judged,
    prompt,
    rollout_of,
)

from aspo_jax.history import History, key_of
from aspo_jax.losses import Past, count_totals, group_mean, group_zscore, maxrl, prompt_smooth, zero
from aspo_jax.rewards import RewardError, Submission, Verdict, mask_truncated
from aspo_jax.rewards.verdict import weighted
from aspo_jax.rollout import (
    Peers,
    Rollout,
    assemble,
    by_teacher,
    check_failures,
    draw,
    held_out_transcripts,
    training_transcripts,
)
from aspo_jax.rows import BatchShape, Example, answered, batch_shape, fill, own_groups
from aspo_jax.sampler import LENGTH, NONFINITE, STOP, TRAIN, Completion
from aspo_jax.structs import Rows


def shape_of(rollout: Rollout, minibatches: int, **changes) -> BatchShape:
    sizes: dict[str, Any] = {"row_tokens": 24, "rows": 2, "longest": 16} | changes
    prompts = len(rollout.samples) // rollout.samples_per_prompt
    return batch_shape(
        minibatches=minibatches,
        groups=math.ceil(prompts / minibatches),
        samples_per_prompt=rollout.samples_per_prompt,
        **sizes,
    )


def lengths_of(rollout: Rollout) -> np.ndarray:
    lengths = [len(s.completion.tokens_T) for s in rollout.samples]
    return np.reshape(lengths, (-1, rollout.samples_per_prompt))


# --- drawing and judging ------------------------------------------------------------------------


def test_every_prompt_is_drawn_by_its_identity_and_answers_come_back_in_order():
    sampler = FakeSampler([completion(i, f"answer {i}") for i in range(6)])
    prompts = [prompt(2), prompt(0)]
    seen: list[Completion] = []
    got = draw(sampler, "params", prompts, 3, domain=TRAIN, retry=7, finished=seen.append)
    assert [c.request for c in seen] == list(reversed(range(6)))  # as they finish
    assert [c.request for c in got] == list(range(6))
    assert [r.identity for r in sampler.requests] == [
        (TRAIN, p.draw, 7, g) for p in prompts for g in range(3)
    ]
    assert [r.tokens for r in sampler.requests] == [p.tokens for p in prompts for _ in range(3)]
    assert sampler.calls == [("start", "params"), "sample", "release"]


def test_a_sampler_that_loses_an_answer_is_an_error():
    answers = [completion(0, "one"), completion(1, "two"), completion(2, "x"), completion(3, "y")]
    with pytest.raises(ValueError, match="gave 3 completions for 4 requests, expected one"):
        judged([RIGHT] * 4, [prompt(0), prompt(1)], [*answers[:3], answers[2]])


def test_sampling_and_the_wait_for_graders_are_phases_and_every_answer_moves_the_bar():
    events: list[Any] = []

    @contextlib.contextmanager
    def phase(name, *size):
        events.append((name, *size))
        yield SimpleNamespace(advance=lambda tokens: events.append(tokens))
        events.append(f"end of {name}")

    answers = [
        completion(0, "one"),
        completion(1, "three"),
        completion(2, "x"),
        completion(3, "yy"),
    ]
    judged([RIGHT] * 4, [prompt(0), prompt(1)], answers, phase=phase)
    assert events == [
        *(("sample", 4, "samples"), 2, 1, 5, 3, "end of sample"),
        *(("grade",), "end of grade"),
    ]


def test_graders_see_the_text_the_answer_and_how_it_ended():
    answers = [completion(0, "one"), completion(1, "two!", False)]
    rollout, scorer = judged([RIGHT, WRONG], [prompt(1)], answers)
    assert scorer.submissions == {
        0: Submission("countdown", "one", {"n": 1}, True, 3, "qq", f"{TRAIN} 101 0", 3),
        1: Submission("countdown", "two!", {"n": 1}, False, 4, "qq", f"{TRAIN} 101 1", 3),
    }
    assert rollout.samples_per_prompt == 2
    assert [(s.prompt, s.completion, s.text, s.verdict) for s in rollout.samples] == [
        (prompt(1), answers[0], "one", RIGHT),
        (prompt(1), answers[1], "two!", WRONG),
    ]


def test_a_grader_sees_the_other_columns_of_the_row():
    asked = dataclasses.replace(prompt(0), columns={"source": "gsm8k", "level": 3})
    _, scorer = judged([RIGHT], [asked], [completion(0, "one")])
    assert scorer.submissions[0].row == {"source": "gsm8k", "level": 3}
    _, scorer = judged([RIGHT], [prompt(0)], [completion(0, "one")])
    assert json.loads(json.dumps(scorer.submissions[0].row)) == {}


def test_the_parts_of_a_reward_are_recorded_one_by_one(monkeypatch):
    monkeypatch.setattr(FakeScorer, "parts", ("countdown", "style"))
    parts = [{"countdown": v, "style": Verdict(r, "scored")} for v, r in ((RIGHT, 2.0), (WRONG, 7))]
    rollout = rollout_of([[weighted(part, [1.0, 0.5]) for part in parts]])
    _, made = assemble(rollout, group_mean(), shape_of(rollout, 1))
    assert made["reward/countdown"] == 0.5 and made["reward/style"] == 4.5
    assert made["rollout/reward_mean"] == 0.5 + 0.5 * 4.5 and made["rollout/solve_none"] == 0
    (shown,) = held_out_transcripts(rollout, 1)
    assert shown["reward"] == 2.0 and shown["parts"] == {"countdown": 1.0, "style": 2.0}


def test_what_is_neither_right_nor_wrong_solves_nothing():
    rollout = rollout_of([[RIGHT, Verdict(-3.0, "scored")], [WRONG, WRONG]])
    _, made = assemble(rollout, group_mean(), shape_of(rollout, 1))
    assert made["rollout/reward_mean"] == -0.5 and made["rollout/valid_groups"] == 0.5
    assert not {"rollout/solve_all", "rollout/solve_none"} & made.keys()


def test_a_shape_may_mask_a_sample_without_calling_its_grader_a_failure():
    answers = [completion(0, "one"), completion(1, "two!", False)]
    rollout, _ = judged([RIGHT, RIGHT], [prompt(1)], answers, mask_truncated())
    assert [s.is_valid for s in rollout.samples] == [True, False]
    _, figures = assemble(rollout, group_mean(), shape_of(rollout, 1))
    assert figures["rollout/grader_failures"] == 0 and figures["rollout/truncated"] == 0.5


@pytest.mark.parametrize("reason", ["crash", "bad_gold"])
def test_too_many_failed_graders_stop_the_run(reason):
    failed = Verdict(0.0, reason, is_valid=False)
    rollout = rollout_of([[RIGHT, failed], [WRONG, RIGHT]])
    check_failures(rollout, 0.25)
    with pytest.raises(RewardError, match="1 of 4 samples failed.*Reward.max_failures = 0.2"):
        check_failures(rollout, 0.2)
    others = np.array([[1, 4], [0, 4], [0, 4]], np.int32)  # failed, samples of three processes
    check_failures(rollout, 0.2, Peers(0, 3, lambda own: np.concatenate([own[None], others[1:]])))
    with pytest.raises(RewardError, match="1 of 12 samples failed"):
        check_failures(rollout, 0.05, Peers(1, 3, lambda own: others))


# --- rows ---------------------------------------------------------------------------------------


def test_fill_by_hand():
    """Two sequences share the first row, the longer one first; index t is the token predicted."""
    short = answered([10, 11], [12, 13], np.array([-0.1, -0.2]), -0.5, 4)
    long = answered([20], [21, 22, 23], np.array([-1.0, -2.0, -3.0]), 2.0, 5)
    alone = answered([30, 31, 32], [33, 34], np.array([-7.0, -8.0]), 1.0, 6)
    got = fill([short, long, alone], BatchShape(1, microbatches=2, rows=2, row_tokens=7))
    assert got.count == 1 and got.count.dtype == np.int32 and got.old is None
    expected = {
        "input_BT": [[30, 31, 32, 33, 10, 11, 12], [20, 21, 22, 0, 0, 0, 0]],
        "target_BT": [[31, 32, 33, 34, 11, 12, 13], [21, 22, 23, 0, 0, 0, 0]],
        "position_BT": [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]],
        "sequence_id_BT": [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]],
        "response_position_BT": [[0, 0, 0, 1, 0, 0, 1], [0, 1, 2, 0, 0, 0, 0]],
        "is_response_BT": [[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
        "advantage_BT": [[0, 0, 1, 1, 0, -0.5, -0.5], [2, 2, 2, 0, 0, 0, 0]],
        "sampler_logp_BT": [[0, 0, -7, -8, 0, -0.1, -0.2], [-1, -2, -3, 0, 0, 0, 0]],
        "group_id_BT": [[6, 6, 6, 6, 4, 4, 4], [5, 5, 5, 0, 0, 0, 0]],
    }
    assert set(expected) == {field.name for field in dataclasses.fields(Rows)}
    for name, values in expected.items():
        array = getattr(got.rows, name)
        assert array.shape == (2, 2, 7)
        np.testing.assert_array_equal(array[0], np.array(values, array.dtype), err_msg=name)
        assert not array[1].any()


def test_only_what_the_policy_chose_is_trained_wherever_it_stands():
    """A conversation: asked, called a tool, read its result, answered."""
    tokens_L, nan = np.array([50, 51, 52, 53, 54, 55, 56]), math.nan
    is_response_L = np.array([0, 0, 1, 1, 0, 1, 0], bool)  # what follows an answer is given too
    logp_L = np.array([nan, nan, -1.0, -2.0, nan, -3.0, nan])
    two_turns = Example(tokens_L, is_response_L, logp_L, -2.0, 3)
    got = fill([answered([8], [9], -5.0, 1.0, 7), two_turns], BatchShape(1, 1, 1, 8))
    expected = {
        "input_BT": [50, 51, 52, 53, 54, 55, 8, 0],
        "target_BT": [51, 52, 53, 54, 55, 56, 9, 0],
        "position_BT": [0, 1, 2, 3, 4, 5, 0, 0],
        "sequence_id_BT": [1, 1, 1, 1, 1, 1, 2, 0],
        "response_position_BT": [0, 0, 1, 0, 2, 0, 0, 0],
        "is_response_BT": [0, 1, 1, 0, 1, 0, 1, 0],
        "advantage_BT": [0, -2, -2, 0, -2, 0, 1, 0],
        "sampler_logp_BT": [0, -1, -2, 0, -3, 0, -5, 0],
        "group_id_BT": [3, 3, 3, 3, 3, 3, 7, 0],
    }
    for name, values in expected.items():
        assert getattr(got.rows, name).tolist() == [[values]], name
    totals = count_totals(got.rows)
    assert (int(totals.sequences), int(totals.tokens)) == (2, 4)


def test_a_first_token_cannot_be_trained():
    with pytest.raises(ValueError, match="3 tokens begins with one that the policy chose"):
        fill([answered([], [1, 2, 3], 0.0, 1.0, 0)], BatchShape(1, 1, 1, 8))


def test_no_examples_are_an_empty_minibatch_of_the_same_shape():
    got = fill([], BatchShape(1, 2, 3, 8))
    assert got.count == 0 and got.rows.input_BT.shape == (2, 3, 8)
    assert not got.rows.is_response_BT.any()


def test_each_process_fills_its_share_of_the_rows():
    shape = BatchShape(minibatches=1, microbatches=2, rows=4, row_tokens=8)
    made = [answered([1], [2, 3, 4, 5, 6], 0.0, 1.0, i) for i in range(3)]  # one a row
    got = fill(made, shape, processes=2)
    assert got.rows.input_BT.shape == (2, 2, 8) and got.count == 2


@pytest.mark.parametrize("seed", range(30))
def test_the_worst_case_fits_whatever_the_lengths(seed):
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(2, 30))
    per_minibatch, samples = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    shape = batch_shape(
        minibatches=3,
        groups=own_groups(3 * per_minibatch, 3),
        samples_per_prompt=samples,
        longest=longest,
        row_tokens=longest + int(rng.integers(0, 40)),
        rows=int(rng.integers(1, 5)),
        sequences=[None, 1, 2, 5][rng.integers(4)],
    )
    assert shape.minibatches == 3
    sequences = per_minibatch * samples
    for lengths in (np.full(sequences, longest), rng.integers(1, longest + 1, sequences)):
        made = [answered([1], np.ones(n, int), 0.0, 1.0, i) for i, n in enumerate(lengths)]
        got = fill(made, shape)
        assert got.count <= shape.microbatches
        assert got.rows.is_response_BT.sum() == lengths.sum()
        if (lengths == longest).all():
            assert got.count == shape.microbatches  # no room is reserved that nothing can fill
        rows = got.rows.is_response_BT[int(got.count) :]
        assert not rows.any()


# --- which groups train -------------------------------------------------------------------------


def groups_of(part) -> list[tuple[int, int]]:
    """(group number, prompt) of all sequences; prompt p is told by its p + 1 letters "q"."""
    T = part.rows.input_BT.shape[-1]
    names = ("sequence_id_BT", "group_id_BT", "input_BT")
    rows = zip(*(getattr(part.rows, name).reshape(-1, T) for name in names), strict=True)
    found = set()
    for id_T, group_T, input_T in rows:
        for s in range(1, id_T.max() + 1):
            letters = (input_T[id_T == s] == ord("q")).sum()
            found.add((int(group_T[id_T == s][0]), int(letters) - 1))
    return sorted(found)


def test_groups_without_a_signal_are_dropped_and_the_others_dealt_evenly_in_order():
    mixed, solved, failed = [RIGHT, WRONG], [RIGHT, RIGHT], [WRONG, WRONG]
    rollout = rollout_of([mixed, solved, mixed, mixed, failed, mixed, mixed, solved])
    parts, figures = assemble(rollout, group_mean(), shape_of(rollout, 2))
    assert [groups_of(part) for part in parts] == [[(0, 0), (1, 2), (2, 3)], [(0, 5), (1, 6)]]
    assert figures["rollout/valid_groups"] == 5 / 8
    # denominators count what was kept
    length_PG = lengths_of(rollout)
    totals = [count_totals(part.rows) for part in parts]
    assert [float(t.sequences) for t in totals] == [6, 4]
    assert [float(t.tokens) for t in totals] == [length_PG[[0, 2, 3]].sum(), length_PG[5:7].sum()]


def test_nothing_to_learn_from_is_empty_minibatches():
    rollout = rollout_of([[RIGHT, RIGHT], [WRONG, WRONG]])
    parts, figures = assemble(rollout, group_zscore(), shape_of(rollout, 2))
    assert [int(part.count) for part in parts] == [0, 0]
    assert "rollout/packing_waste" not in figures  # no row, no waste
    assert figures["rollout/valid_groups"] == 0 and figures["rollout/train_tokens"] == 0


def test_with_a_teacher_every_group_with_a_valid_sample_trains():
    rollout = rollout_of([[RIGHT, RIGHT], [FAILED, FAILED], [WRONG, FAILED], [RIGHT, WRONG]])
    (part,), figures = assemble(rollout, zero(), shape_of(rollout, 1), signal=by_teacher)
    assert groups_of(part) == [(0, 0), (1, 2), (2, 3)]
    assert count_totals(part.rows).sequences == 2 + 1 + 2
    assert figures["rollout/valid_groups"] == 3 / 4
    assert not part.rows.advantage_BT.any()
    (part,), _ = assemble(rollout, zero(), shape_of(rollout, 1))
    assert part.count == 0


def test_without_a_valid_sample_there_is_no_mean_reward():
    rollout = rollout_of([[FAILED, FAILED]])
    _, figures = assemble(rollout, group_zscore(), shape_of(rollout, 1))
    assert "rollout/reward_mean" not in figures
    assert not any(math.isnan(x) for x in figures.values())


def test_samples_whose_grader_failed_are_masked():
    rollout = rollout_of([[RIGHT, FAILED, WRONG], [FAILED, FAILED, FAILED], [WRONG, FAILED, WRONG]])
    (part,), figures = assemble(rollout, group_mean(), shape_of(rollout, 1))
    assert count_totals(part.rows).sequences == 2
    assert part.rows.is_response_BT.sum() == lengths_of(rollout)[0, [0, 2]].sum()
    advantages = part.rows.advantage_BT[part.rows.is_response_BT]
    assert set(advantages.tolist()) == {0.5, -0.5}
    assert figures["rollout/grader_failures"] == 5
    assert figures["rollout/reward_mean"] == pytest.approx(1 / 4)


def test_a_sample_at_its_groups_mean_still_counts():
    rollout = rollout_of([[Verdict(2.0, "match"), Verdict(1.0, "mismatch"), WRONG]])
    (part,), _ = assemble(rollout, group_mean(), shape_of(rollout, 1))
    assert count_totals(part.rows).sequences == 3


def test_advantages_that_are_not_finite_are_an_error():
    rollout = rollout_of([[RIGHT, WRONG]])
    with pytest.raises(ValueError, match="advantages are not finite"):
        assemble(rollout, lambda r, v: np.full(r.shape, np.nan), shape_of(rollout, 1))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_log_probability_that_is_not_finite_is_an_error_before_it_is_trained_on(value):
    answers = [completion(0, "ab"), completion(1, "abc")]
    answers[1].logp_T[2] = value
    rollout, _ = judged([RIGHT, WRONG], [prompt(0)], answers)
    message = rf"reported {value} as the log-probability of token 2 of an answer to prompt 'p0'"
    with pytest.raises(ValueError, match=message):
        assemble(rollout, group_zscore(), shape_of(rollout, 1))
    masked, _ = judged([RIGHT, FAILED], [prompt(0)], answers)  # as a sample that does not train
    assemble(masked, lambda r, v: np.ones(r.shape), shape_of(masked, 1))


def test_figures_by_hand():
    rollout = rollout_of([[RIGHT, WRONG], [WRONG, WRONG], [RIGHT, RIGHT]])
    parts, figures = assemble(rollout, group_mean(), shape_of(rollout, 1))
    # kept: prompt "q" with answers of 1 and 2 tokens, 1 + 2 slots in one micro-batch of 2 x 24
    assert {name.removeprefix("rollout/"): x for name, x in figures.items()} == pytest.approx(
        {
            "reward_mean": 0.5,
            "solve_none": 1 / 3,
            "solve_all": 1 / 3,
            "valid_groups": 1 / 3,
            "generation_multiplier": 1,
            "rounds": 1,
            "surplus_groups": 0,
            "response_length": 21 / 6,
            "truncated": 1 / 6,
            "repetition": 0.0,
            "distinct_answers": 2.0,
            "grader_failures": 0,
            "grader_timeouts": 0,
            "sampler_failures": 0,
            "train_tokens": 3,
            "packing_waste": 1 - 3 / 48,
        }
    )
    assert all(type(x) is float for x in figures.values())


def test_figures_of_what_went_wrong():
    """The graders of two samples failed, one hung, one distribution was not finite, one is cut."""
    late, unusable = Verdict(0.0, "timeout"), Verdict(0.0, "bad_gold", is_valid=False)
    answers = [completion(i, "same") for i in range(4)] + [completion(4, "other", False)]
    answers.append(completion(5, "other")._replace(ending=NONFINITE))
    verdicts = [RIGHT, FAILED, late, unusable, WRONG, RIGHT]
    rollout, _ = judged(verdicts, [prompt(0), prompt(1)], answers)
    _, figures = assemble(rollout, group_mean(), shape_of(rollout, 1))
    assert {name.removeprefix("rollout/"): x for name, x in figures.items()} == pytest.approx(
        {
            "reward_mean": 1 / 3,  # of RIGHT, late and WRONG
            "solve_none": 0,
            "solve_all": 0,
            "valid_groups": 1 / 2,
            "generation_multiplier": 1,
            "rounds": 1,
            "surplus_groups": 0,
            "response_length": (4 * 4 + 2 * 5) / 6,
            "truncated": 2 / 6,
            "repetition": 0,
            "distinct_answers": (1 + 2) / 2,
            "grader_failures": 2,
            "grader_timeouts": 1,
            "sampler_failures": 1,
            "train_tokens": 2 * 4,
            "packing_waste": 1 - 8 / 48,
        }
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_has_the_figures_and_advantages_of_all(processes):
    rows = [[RIGHT, WRONG], [WRONG, FAILED], [RIGHT, RIGHT], [WRONG, RIGHT], [RIGHT, WRONG]]
    rows.append([WRONG, WRONG])
    whole = rollout_of(rows)
    shape = shape_of(whole, 1)._replace(rows=6)
    parts, alone = assemble(whole, group_mean(), shape)
    shares = [
        Rollout([s for g in whole.groups[i::processes] for s in g], 2) for i in range(processes)
    ]
    found = in_step(
        [lambda peers, share=share: assemble(share, group_mean(), shape, peers) for share in shares]
    )
    for _, figures in found:
        assert figures == alone
    trained = [group for (part,), _ in found for group in groups_of(part)]
    assert sorted(trained) == groups_of(parts[0])


# --- what advantages ask for ----------------------------------------------------------------------


def test_a_rule_gets_the_lengths_and_the_parts_of_the_reward():
    """Of a sample of another kind there is no such part, and none of a part that failed."""
    style, late = Verdict(0.5, "scored"), Verdict(0.0, "timeout")
    parts = [{"math": RIGHT, "style": style}, {"code": late, "style": style}]
    parts.append({"math": FAILED, "style": style})
    verdicts = [weighted(p, (1.0, 0.2)) for p in parts] + [RIGHT]
    rollout = rollout_of([verdicts[:2], verdicts[2:]])._replace(
        parts={"math": 1.0, "code": 1.0, "style": 0.2}
    )
    given: dict[str, Any] = {}

    def rule(reward_PG, is_valid_PG, length_PG, weights, parts, past):
        given.update(length=length_PG, weights=weights, past=past, **parts)
        return reward_PG

    with pytest.raises(RewardError, match="needs past, which is None"):
        assemble(rollout, rule, shape_of(rollout, 1))
    assemble(rollout, rule, shape_of(rollout, 1), history=History())
    nan = np.nan
    np.testing.assert_array_equal(given["length"], lengths_of(rollout))
    np.testing.assert_array_equal(given["math"], [[1, nan], [nan, nan]])
    np.testing.assert_array_equal(given["code"], [[nan, 0], [nan, nan]])
    np.testing.assert_array_equal(given["style"], [[0.5, 0.5], [0.5, nan]])
    assert given["weights"] == rollout.parts
    np.testing.assert_array_equal(given["past"], np.zeros((3, 2)))


def test_a_reward_that_a_rule_is_not_defined_for_ends_a_run_in_plain_words():
    rollout = rollout_of([[RIGHT, Verdict(-1.0, "scored")]])
    with pytest.raises(RewardError, match=r"Objective.advantage: maxrl needs rewards >= 0; found"):
        assemble(rollout, maxrl(), shape_of(rollout, 1))


def same_prompts(rollout: Rollout, ids: list[str]) -> Rollout:
    """The rollout with other ids for its prompts."""
    samples = [
        s._replace(prompt=dataclasses.replace(s.prompt, id=name))
        for group, name in zip(rollout.groups, ids, strict=True)
        for s in group
    ]
    return rollout._replace(samples=samples)


STEPS = [
    ("abc", [[RIGHT, WRONG], [WRONG, WRONG], [RIGHT, RIGHT]]),
    ("bab", [[RIGHT, WRONG], [RIGHT, RIGHT], [RIGHT, RIGHT]]),  # b comes twice
    ("cda", [[FAILED, WRONG], [RIGHT, WRONG], [RIGHT, WRONG]]),
]


def test_the_past_of_a_prompt_is_that_of_its_earlier_visits():
    history, rule = History(), prompt_smooth()
    seen: list[Past] = []

    def watched(reward_PG, is_valid_PG, past):
        seen.append(past)
        return rule(reward_PG, is_valid_PG, past)

    for ids, rows in STEPS:
        rollout = same_prompts(rollout_of(rows), list(ids))
        assemble(rollout, watched, shape_of(rollout, 1), history=history)
    np.testing.assert_allclose(seen[0], np.zeros((3, 3)))
    half = 0.5**0.5  # the standard deviation of 1 and 0
    np.testing.assert_allclose(seen[1], [[1, 1, 1], [0, 0.5, 0], [0, half, 0]], rtol=1e-6)
    np.testing.assert_allclose(seen[2].visits_P, [1, 0, 2])
    np.testing.assert_allclose(seen[2].mean_P, [1, 0, 0.75])
    assert {key: visits for key, (visits, _, _) in history.state().items()} == {
        key_of(name).hex(): visits for name, visits in {"a": 3, "b": 3, "c": 1, "d": 1}.items()
    }  # c was not visited by one valid sample


def test_a_history_goes_on_from_what_was_saved():
    """Through JSON, bit for bit; and a rule that asks for no past has none kept."""
    whole, split = History(), History()
    for ids, rows in STEPS:
        rollout = same_prompts(rollout_of(rows), list(ids))
        assemble(rollout, prompt_smooth(), shape_of(rollout, 1), history=whole)
        assemble(rollout, prompt_smooth(), shape_of(rollout, 1), history=split)
        saved, split = json.dumps(split.state()), History()
        split.restore(json.loads(saved))
    assert split.state() == whole.state() != {}
    assemble(rollout, group_mean(), shape_of(rollout, 1), history=whole)
    assert split.state() == whole.state()


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_has_the_past_of_all(processes):
    """Prompts of which another process was given the earlier visits."""
    histories = [History() for _ in range(processes)]
    alone, shape = History(), None
    for ids, rows in STEPS:
        ids, rows = ids * 2, rows * 2
        whole = same_prompts(rollout_of(rows), list(ids))
        shape = shape_of(whole, 1)._replace(rows=6)
        (part,), _ = assemble(whole, prompt_smooth(), shape, history=alone)

        def process(peers: Peers, whole=whole, shape=shape):
            own = [s for g in whole.groups[peers.index :: processes] for s in g]
            share, history = Rollout(own, 2), histories[peers.index]
            return assemble(share, prompt_smooth(), shape, peers, history=history)[0]

        found = in_step([process] * processes)
        trained = [group for (own,) in found for group in groups_of(own)]
        assert sorted(trained) == groups_of(part)
    assert all(history.state() == alone.state() for history in histories)


def test_transcripts_say_what_was_asked_for_answered_and_expected():
    rollout = rollout_of([[WRONG, RIGHT], [RIGHT, WRONG], [FAILED, RIGHT]])
    shown = held_out_transcripts(rollout, 2)
    assert shown[0] == {
        "id": "p0",
        "draw": 100,
        "sample": 0,
        "prompt": "q",
        "response": "a",
        "answer": {"n": 0},
        "reward": 0.0,
        "reason": "mismatch",
        "tokens": 1,
        "ending": LENGTH,
    }
    assert [(s["id"], s["response"], s["ending"]) for s in shown[1:]] == [("p1", "abc", STOP)]
    assert len(held_out_transcripts(rollout, 9)) == 3 and held_out_transcripts(rollout, 0) == []


def test_transcripts_of_training_show_the_best_and_the_worst_of_a_prompt():
    rollout = rollout_of([[WRONG, WRONG, RIGHT], [RIGHT, RIGHT, RIGHT], [RIGHT, WRONG, FAILED]])
    shown = [(s["id"], s["sample"], s["reason"]) for s in training_transcripts(rollout, 9)]
    assert shown == [
        ("p0", 2, "match"),
        ("p0", 0, "mismatch"),
        ("p1", 0, "match"),
        ("p2", 0, "match"),
        ("p2", 1, "mismatch"),
    ]
    assert training_transcripts(rollout, 9)[:3] == training_transcripts(rollout, 3)
    assert training_transcripts(rollout, 0) == []
