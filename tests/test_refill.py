"""A step filled from several rounds: by hand, at any speed, in any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    decode,
    in_step,
    prompt,
)

from aspo_jax.history import History, key_of
from aspo_jax.losses import count_totals, group_mean, group_zscore, prompt_smooth
from aspo_jax.refill import refill
from aspo_jax.rewards import Verdict, grpo_lambda, unshaped
from aspo_jax.rewards.verdict import weighted
from aspo_jax.rollout import (
    ALONE,
    Collector,
    Occasion,
    Peers,
    Rollout,
    Selection,
    Signal,
    assemble,
    by_reward,
    by_teacher,
    collect,
    judge,
)
from aspo_jax.rows import BatchShape, batch_shape, own_groups
from aspo_jax.sampler import TRAIN

MIXED, SOLVED, UNSOLVED = [RIGHT, WRONG], [RIGHT, RIGHT], [WRONG, WRONG]
FIRST_DRAW = prompt(0).draw


class Sampler(FakeSampler):
    """Answers in the order of a generator of random numbers; notes whose answers were taken."""

    def __init__(self, rng: np.random.Generator | None = None):
        super().__init__(())
        self._rng, self.taken = rng, []

    def sample(self, requests) -> Iterator[Any]:
        order = np.arange(len(requests))
        for number in self._rng.permutation(order) if self._rng else order:
            _, draw, _, g = requests[number].identity
            self.taken.append((draw - FIRST_DRAW, g))
            yield completion(int(number), f"{draw}.{g}")


class Scorer(FakeScorer):
    """Verdicts by prompt and sample, each known a number of answers after it was handed in."""

    def __init__(self, stream: Sequence[Sequence[Verdict]], lag: Any = lambda: 0):
        self._stream, self._lag = stream, lag

    def begin(self, group):
        self.submissions, self._due, self.is_given_up = {}, {}, False
        return super().begin(group)

    def submit(self, number, submission):
        super().submit(number, submission)
        self._due[number] = len(self._due) + self._lag()

    def verdict(self, number):
        if number not in self._due or self._due[number] >= len(self._due):
            return None
        draw, g = map(int, self.submissions[number].text.split("."))
        return self._stream[draw - FIRST_DRAW][g]

    def results(self):
        self._due = dict.fromkeys(self._due, -1)

    def give_up(self):
        self.is_given_up = True


class Stream:
    """Rounds of prompts, or one process's share of each; ``drawn``: how many were."""

    def __init__(self, size: int, peers: Peers = ALONE):
        self._size, self._peers, self.drawn = size, peers, 0

    def __call__(self):
        first, self.drawn = self.drawn * self._size, self.drawn + 1
        return [prompt(p) for p in range(first, first + self._size)][
            self._peers.index :: self._peers.count
        ]


def filled(
    stream: Sequence[Sequence[Verdict]],
    size: int,
    rounds: int,
    *,
    sampler: Sampler | None = None,
    lag: Any = lambda: 0,
    shape: Any = unshaped,
    peers: Peers = ALONE,
    signal: Signal = by_reward,
) -> tuple[Rollout, Selection, Stream]:
    """A step of ``size`` groups from a stream whose verdicts are known beforehand."""
    scorer: Any = Scorer(stream, lag)
    collector = Collector(sampler or Sampler(), scorer, decode, shape)
    prompts = Stream(size, peers)

    def ask(round_, enough):
        return judge(collector, "params", round_, len(stream[0]), Occasion(TRAIN), enough=enough)

    rollout, selection = refill(collector, ask, prompts, rounds, group_mean(), peers, signal=signal)
    return rollout, selection, prompts


def draws(rollout: Rollout) -> list[int]:
    return [group[0].prompt.draw - FIRST_DRAW for group in rollout.groups]


def sizes(selection: Selection) -> tuple[int, int, int]:
    return selection.asked, selection.drawn, selection.wanted


def test_the_first_groups_with_a_signal_train_in_the_order_of_the_stream():
    stream = [SOLVED, MIXED, UNSOLVED, SOLVED, MIXED, MIXED, MIXED, MIXED]
    rollout, selection, prompts = filled(stream, 4, 3)
    assert prompts.drawn == 2 and sizes(selection) == (8, 7, 4)
    assert draws(rollout) == list(range(7)) and selection.groups.tolist() == [1, 4, 5, 6]


def test_one_round_is_enough_where_every_group_has_a_signal():
    rollout, selection, prompts = filled([MIXED] * 8, 4, 3)
    assert prompts.drawn == 1 and sizes(selection) == (4, 4, 4)
    assert draws(rollout) == selection.groups.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_are_bounded_and_the_step_goes_on_with_what_there_is(rounds):
    stream = [SOLVED, UNSOLVED, MIXED, SOLVED] * 3
    rollout, selection, prompts = filled(stream, 4, rounds)
    assert prompts.drawn == rounds and sizes(selection) == (4 * rounds, 4 * rounds, 4)
    assert draws(rollout) == list(range(4 * rounds))
    assert selection.groups.tolist() == [2, 6, 10][:rounds]


def test_a_step_without_a_signal_is_empty_minibatches():
    rollout, selection, _ = filled([SOLVED] * 8, 4, 2)
    parts, figures = assemble(rollout, group_zscore(), shape_for(4, 2), ALONE, selection)
    assert [int(part.count) for part in parts] == [0, 0]
    assert figures["rollout/valid_groups"] == 0 and figures["rollout/solve_all"] == 1


def test_with_a_teacher_only_groups_without_a_valid_sample_are_drawn_again():
    stream = [SOLVED, [FAILED, FAILED], UNSOLVED, [RIGHT, FAILED]]
    rollout, selection, prompts = filled(stream, 2, 3, signal=by_teacher)
    assert prompts.drawn == 2 and sizes(selection) == (4, 3, 2)
    assert selection.groups.tolist() == [0, 2]
    how = (group_zscore(), shape_for(2, 1), ALONE, selection)
    (part,), _ = assemble(rollout, *how, signal=by_teacher)
    assert count_totals(part.rows).sequences == 4 and not part.rows.advantage_BT.any()


def test_samples_that_are_masked_give_no_signal():
    """By the valid ones alone: all equal is none, whatever the masked one would have earned."""
    stream = [[RIGHT, RIGHT, FAILED], [WRONG, FAILED, FAILED], [RIGHT, WRONG, FAILED]]
    stream += [[FAILED, FAILED, FAILED], [RIGHT, WRONG, WRONG], [RIGHT, WRONG, WRONG]]
    _, selection, _ = filled(stream, 2, 3)
    assert sizes(selection) == (6, 5, 2) and selection.groups.tolist() == [2, 4]


def test_a_broken_sample_gives_no_signal():
    class Broken(Sampler):
        def sample(self, requests):
            for number, made in enumerate(super().sample(requests)):
                yield made._replace(ending="nonfinite") if number == 1 else made

    _, selection, _ = filled([[RIGHT, RIGHT, WRONG], [RIGHT, WRONG, WRONG]], 1, 2, sampler=Broken())
    assert selection.groups.tolist() == [0]
    stream = [[RIGHT, WRONG, RIGHT], [RIGHT, WRONG, WRONG]]
    _, selection, _ = filled(stream, 1, 2, sampler=Broken())
    assert sizes(selection) == (2, 2, 1) and selection.groups.tolist() == [1]


def test_sampling_stops_once_the_rest_is_not_needed():
    """The second round needs one group, finds it third, and leaves five prompts unsampled."""
    stream = [*[MIXED] * 7, SOLVED, SOLVED, UNSOLVED, *[MIXED] * 6]
    sampler = Sampler()
    _, selection, prompts = filled(stream, 8, 4, sampler=sampler)
    assert prompts.drawn == 2 and sizes(selection) == (16, 11, 8)
    assert sampler.taken == [(p, g) for p in range(11) for g in range(2)]


def test_what_arrives_early_from_behind_does_not_end_the_wait():
    """The last prompts answer first, with a signal; the first ones in the stream train."""

    class LastFirst(Sampler):
        def sample(self, requests):
            for number in reversed(range(len(requests))):
                self.taken.append(number)
                yield completion(
                    number, ".".join(str(requests[number].identity[i]) for i in (1, 3))
                )

    sampler = LastFirst()
    _, selection, _ = filled([SOLVED, *[MIXED] * 7], 4, 2, sampler=sampler)
    assert sizes(selection) == (8, 5, 4) and selection.groups.tolist() == [1, 2, 3, 4]
    assert len(sampler.taken) == 2 * 8  # the decisive one came last


def random_stream(rng: np.random.Generator, groups: int) -> list[list[Verdict]]:
    share = rng.uniform(0.2, 0.9)
    kinds = ([RIGHT, WRONG, WRONG], [RIGHT] * 3, [WRONG] * 3, [FAILED, WRONG, WRONG])
    odds = [share, *[(1 - share) / 3] * 3]
    return [kinds[k] for k in rng.choice(4, groups, p=odds)]


def summary(rollout: Rollout, selection: Selection) -> tuple[Any, ...]:
    samples = [(s.prompt, s.text, s.verdict) for s in rollout.samples]
    return samples, sizes(selection), selection.groups.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_a_step_is_the_same_whatever_the_order_and_the_speed_of_answers_and_graders(seed):
    rng = np.random.default_rng(seed)
    stream = random_stream(rng, 24)
    expected = summary(*filled(stream, 6, 4)[:2])
    for _ in range(4):
        sampler, slowest = Sampler(rng), int(rng.integers(1, 30))
        found = filled(stream, 6, 4, sampler=sampler, lag=lambda s=slowest: int(rng.integers(s)))
        assert summary(*found[:2]) == expected


def shape_for(prompts: int, minibatches: int, processes: int = 1, rounds: int = 4) -> BatchShape:
    groups = own_groups(prompts, minibatches, processes, rounds)
    sizes = {"samples_per_prompt": 3, "longest": 64, "row_tokens": 64, "sequences": 1}
    return batch_shape(
        minibatches=minibatches, groups=groups, rows=processes, processes=processes, **sizes
    )


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_several_processes_fill_the_step_that_one_would(seed, processes):
    stream = random_stream(np.random.default_rng(seed), 24)
    rollout, selection, prompts = filled(stream, 6, 4)
    parts, figures = assemble(rollout, group_zscore(), shape_for(6, 2), ALONE, selection)

    def process(peers: Peers):
        rng = np.random.default_rng(peers.index)
        speed = {"sampler": Sampler(rng), "lag": lambda: int(rng.integers(5))}
        own, same, drawn = filled(stream, 6, 4, peers=peers, **speed)
        assert (sizes(same), drawn.drawn) == (sizes(selection), prompts.drawn)
        assert same.groups.tolist() == selection.groups.tolist()
        assert draws(own) == draws(rollout)[peers.index :: peers.count]
        made, counted = assemble(own, group_zscore(), shape_for(6, 2, processes), peers, same)
        return [trained(part) for part in made], counted

    found = in_step([process] * processes)
    for _, counted in found:
        assert equal_but_waste(counted) == equal_but_waste(figures)
    for i, part in enumerate(parts):
        assert sorted(x for own, _ in found for x in own[i]) == sorted(trained(part))


def equal_but_waste(figures: dict[str, float]) -> dict[str, float]:
    """Each process fills rows of its own, so that more of them may end half empty."""
    return {k: v for k, v in figures.items() if k != "rollout/packing_waste"}


def trained(part) -> list[tuple[int, int, float]]:
    """(group, letters of the prompt, advantage) of every sequence of a mini-batch."""
    rows = part.rows
    return [
        (int(group_T[0]), int((input_T == ord("q")).sum()), round(float(advantage_T[is_T][0]), 5))
        for group_T, input_T, advantage_T, is_T in zip(
            *(
                x.reshape(-1, x.shape[-1])
                for x in (rows.group_id_BT, rows.input_BT, rows.advantage_BT, rows.is_response_BT)
            ),
            strict=True,
        )
        if is_T.any()
    ]


def test_a_group_has_the_advantages_that_it_has_without_refill():
    stream = [[WRONG] * 3, [RIGHT, WRONG, WRONG], [RIGHT] * 3, [RIGHT, RIGHT, WRONG]]
    stream += [[RIGHT, WRONG, WRONG], [RIGHT, RIGHT, WRONG]]
    rollout, selection, _ = filled(stream, 2, 3)
    (part,), figures = assemble(rollout, group_zscore(), shape_for(2, 1), ALONE, selection)
    dropped = Rollout(rollout.samples[:12], 3)
    (alone,), _ = assemble(dropped, group_zscore(), shape_for(4, 1))
    assert trained(part) == trained(alone) and len(trained(part)) == 6
    assert count_totals(part.rows).sequences == 6
    made = {k.removeprefix("rollout/"): v for k, v in figures.items()}
    assert made["generation_multiplier"] == 2 and made["rounds"] == 2
    assert made["surplus_groups"] == 0 and made["valid_groups"] == 1 / 2
    assert made["solve_all"] == made["solve_none"] == 1 / 4
    assert all(type(x) is float for x in figures.values())


def test_surplus_is_counted_and_in_no_other_figure():
    stream = [MIXED, SOLVED, MIXED, UNSOLVED, MIXED, MIXED, SOLVED, SOLVED]
    rollout, selection, _ = filled(stream, 4, 2)
    _, figures = assemble(rollout, group_zscore(), shape_for(4, 2), ALONE, selection)
    made = {k.removeprefix("rollout/"): v for k, v in figures.items()}
    assert (made["rounds"], made["generation_multiplier"], made["surplus_groups"]) == (2, 1.5, 2)
    assert made["solve_all"] == made["solve_none"] == 1 / 6 and made["valid_groups"] == 4 / 6


def test_a_shape_that_looks_at_the_whole_step_sees_what_was_drawn():
    """It fines the half of the groups with most right answers, of the two that were drawn."""
    stream = [SOLVED, MIXED, SOLVED]
    rollout, selection, _ = filled(stream, 1, 3, shape=grpo_lambda(top=0.5, alpha=0.5))
    assert sizes(selection) == (2, 2, 1) and selection.groups.tolist() == [1]
    rewards = [[s.verdict.reward for s in group] for group in rollout.groups]
    assert rewards == [[0.75, 0.75], [1.0, 0.0]]


def test_a_group_may_have_its_signal_from_the_past():
    """All right where half was right before: without a past there is no signal."""
    stream, history = [SOLVED, SOLVED, MIXED], History()
    history.add([key_of(prompt(1).id)], np.array([[1.0, 0.0]]), np.ones((1, 2), bool))
    scorer: Any = Scorer(stream)
    collector = Collector(Sampler(), scorer, decode)

    def ask(round_, enough):
        return judge(collector, "params", round_, 2, Occasion(TRAIN), enough=enough)

    for known, trains in ((history, 1), (History(), 2)):
        how = (collector, ask, Stream(1), 3, prompt_smooth(), ALONE, known)
        rollout, selection = refill(*how)
        assert selection.groups.tolist() == [trains]
        (part,), _ = assemble(
            rollout, prompt_smooth(), shape_for(1, 1), ALONE, selection, history=known
        )
        assert len(trained(part)) == 2
        assert len(known.state()) == trains + 1  # all that were drawn are visits


def test_a_rule_that_asks_for_lengths_and_parts_judges_a_group_by_itself():
    right, wrong = ({"exact": v, "style": WRONG} for v in (RIGHT, WRONG))
    mixed = [weighted(parts, (1.0, 0.5)) for parts in (right, wrong)]

    def rule(reward_PG, is_valid_PG, length_PG, parts, weights):
        assert weights == {"exact": 1.0, "style": 0.5} and (length_PG > 0).all()
        return group_mean()(parts["exact"], is_valid_PG)

    scorer: Any = Scorer([[mixed[0]] * 2, mixed])
    scorer.parts = {"exact": 1.0, "style": 0.5}
    collector = Collector(Sampler(), scorer, decode)

    def ask(round_, enough):
        return judge(collector, "params", round_, 2, Occasion(TRAIN), enough=enough)

    _, selection = refill(collector, ask, Stream(1), 2, rule)
    assert selection.groups.tolist() == [1]


def test_a_rule_that_looks_at_the_whole_step_sees_what_trains():
    """Whatever it makes of the others, no more groups train than there is room for."""
    seen: list[tuple[Any, Any]] = []

    def against_the_step(reward_PG, is_valid_PG):
        seen.append((reward_PG, is_valid_PG))
        return np.where(is_valid_PG, reward_PG - reward_PG[is_valid_PG].mean(), 0)

    rollout, selection, _ = filled([SOLVED, MIXED, UNSOLVED, MIXED, SOLVED], 1, 2)
    parts, figures = assemble(rollout, against_the_step, shape_for(1, 1), ALONE, selection)
    assert selection.groups.tolist() == [1]
    assert seen[0][0].tolist() == [[1, 0]] and seen[0][1].all()
    assert figures["rollout/valid_groups"] == 1 / 2 and len(trained(parts[0])) == 2
    rollout, selection, _ = filled([SOLVED, MIXED, SOLVED, SOLVED], 2, 2)
    assemble(rollout, against_the_step, shape_for(2, 1), ALONE, selection)
    assert seen[1][1].tolist() == [[True, True], [False, False]]  # one shape, whatever was found


@pytest.mark.parametrize("seed", range(30))
def test_a_process_has_room_for_its_groups_of_every_minibatch(seed):
    rng = np.random.default_rng(seed)
    processes, minibatches, rounds = (int(x) for x in rng.integers(1, 5, 3))
    step = math.lcm(processes, minibatches) * int(rng.integers(1, 4))
    room = own_groups(step, minibatches, processes, rounds)
    for _ in range(50):
        kept = np.flatnonzero(rng.random(step * rounds) < rng.uniform(0.05, 1))[:step]
        for share in np.array_split(kept, minibatches):
            assert np.bincount(share % processes, minlength=processes).max() <= room
    # Process 0 has every signal of the first mini-batch, as many as its prompts in a row can be.
    most = np.arange(room) * processes
    rest = np.arange(most[-1] + 1, step * rounds)[: step - room]
    first = np.array_split(np.concatenate([most, rest]), minibatches)[0]
    assert (first % processes == 0).sum() >= (room if len(rest) else 0)


def test_without_refill_a_step_is_what_collect_makes():
    """`judge` and `shaped`, which refill is made of, are `collect` in two halves."""
    scorer: Any = Scorer([MIXED, SOLVED])
    collector = Collector(Sampler(), scorer, decode, unshaped)
    whole = collect(collector, "params", [prompt(0), prompt(1)], 2, domain=TRAIN)
    assert [s.verdict for s in whole.samples] == [*MIXED, *SOLVED]
    halves = judge(collector, "params", [prompt(0), prompt(1)], 2, Occasion(TRAIN))
    assert [(s.text, s.verdict) for group in halves for s, _ in group] == [
        (s.text, s.verdict) for s in whole.samples
    ]
