"""Prompts x G -> completions -> verdicts -> advantages -> mini-batches, on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.history import KEY_BYTES, History, Key, key_of
from aspo_jax.losses import Advantage, Groups, Past, UnfitReward, advantages_of, asks
from aspo_jax.outcomes import (
    ROLLOUT,
    Count,
    Figure,
    figures,
    is_valid,
    part_figures,
    response_length,
    reward,
)
from aspo_jax.rewards import RewardError, Scorer, Shape, Submission, Verdict, unshaped
from aspo_jax.rows import BatchShape, Example, answered, fill
from aspo_jax.sampler import NONFINITE, Completion, Request, Sampler
from aspo_jax.structs import Minibatch, Prompt


class Peers(NamedTuple):
    """The processes that share a run; each has the prompts ``index::count`` of every step.

    gather: an array -> those of all processes, stacked on a leading axis, bit for bit.
    """

    index: int
    count: int
    gather: Callable[[np.ndarray], np.ndarray]

    def whole(self, x_P: np.ndarray, total: int) -> np.ndarray:
        """Values of this process's prompts -> of all ``total`` prompts, in the step's order."""
        longest = math.ceil(total / self.count)
        room = [(0, longest - len(x_P)), *[(0, 0)] * (x_P.ndim - 1)]
        stacked = self.gather(np.pad(x_P, room))
        return np.swapaxes(stacked, 0, 1).reshape(-1, *x_P.shape[1:])[:total]


ALONE = Peers(index=0, count=1, gather=lambda x: x[None])
Decode = Callable[[Sequence[int] | np.ndarray], str]  # special tokens not shown


class Sample(NamedTuple):
    """One completion with its prompt, text and verdict."""

    prompt: Prompt
    completion: Completion
    text: str
    verdict: Verdict

    @property
    def is_valid(self) -> bool:
        """Whether it may be learned from: neither grader nor sampler failed, no shape masked it."""
        return self.verdict.is_valid and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Whether sampling ended in a distribution that is not finite."""
        return self.completion.ending == NONFINITE


class Rollout(NamedTuple):
    """P prompts times G samples; ``samples[p * G + g]``.

    parts: what rewards are made of, by name: what each is multiplied with. The same on all
        processes; none where rewards are of one thing.
    """

    samples: Sequence[Sample]
    samples_per_prompt: int
    parts: Mapping[str, float] = types.MappingProxyType({})

    @property
    def groups(self) -> list[Sequence[Sample]]:
        """The samples of each prompt."""
        G = self.samples_per_prompt
        return [self.samples[start : start + G] for start in range(0, len(self.samples), G)]


class Collector(NamedTuple):
    """What collects answers and their rewards.

    shape: what becomes of the verdicts; it sees the groups of this process only.
    """

    sampler: Sampler
    scorer: Scorer
    decode: Decode
    shape: Shape = unshaped


def unwatched(*_: Any) -> contextlib.AbstractContextManager[Any]:
    """A phase that nobody times, with a bar that nobody sees."""
    return contextlib.nullcontext(types.SimpleNamespace(advance=lambda **_: None))


class Occasion(NamedTuple):
    """When and what for prompts are sampled.

    domain, retry: with the prompt and the number of the sample they name its random draws.
    iteration: how many iterations the run had done, for graders to know.
    """

    domain: int
    retry: int = 0
    iteration: int = 0


Judged = tuple[Sample, Submission]  # the verdict as the grader gave it
# (p -> the samples of the p-th prompt once all are judged, else None) -> the rest is not needed
Enough = Callable[[Callable[[int], list[Judged] | None]], bool]


def never(_: Any) -> bool:
    """All that was asked for is sampled."""
    return False


def collect(
    collector: Collector,
    params: Any,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    domain: int,
    retry: int = 0,
    iteration: int = 0,
    phase: Callable[..., contextlib.AbstractContextManager[Any]] = unwatched,
) -> Rollout:
    """Sample every prompt and grade each answer while others are still being sampled.

    domain, retry, iteration: see `Occasion`.
    phase: (name, total, unit) -> a context around sampling and another around the wait for the
        last verdicts; the first yields a bar that is moved at each answer.
    """
    occasion = Occasion(domain, retry, iteration)
    groups = judge(collector, params, prompts, samples_per_prompt, occasion, phase=phase)
    return shaped(collector, groups, samples_per_prompt)


def shaped(
    collector: Collector, groups: Sequence[Sequence[Judged]], samples_per_prompt: int
) -> Rollout:
    """The rollout of judged groups, with what the collector's shape makes of their verdicts."""
    judged = [[(asked, sample.verdict) for sample, asked in group] for group in groups]
    samples = [
        sample._replace(verdict=verdict)
        for group, verdicts in zip(groups, collector.shape(judged), strict=True)
        for (sample, _), verdict in zip(group, verdicts, strict=True)
    ]
    return Rollout(samples, samples_per_prompt, collector.scorer.parts)


def judge(
    collector: Collector,
    params: Any,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    occasion: Occasion,
    *,
    phase: Callable[..., contextlib.AbstractContextManager[Any]] = unwatched,
    enough: Enough = never,
) -> list[list[Judged]]:
    """`collect` before verdicts are shaped: the judged samples of each prompt.

    enough: is asked at each answer whether sampling may stop. The result then ends before the first
        prompt of which not all is judged.
    """
    G = samples_per_prompt
    answers = _Answers([prompt for prompt in prompts for _ in range(G)], G)
    with collector.scorer.begin(G) as grading:
        with phase("sample", len(answers.asked), "samples") as bar:

            def hand_in(c: Completion) -> bool:
                grading.submit(c.request, answers.note(c, collector.decode(c.tokens_T), occasion))
                bar.advance(tokens=len(c.tokens_T))
                answers.are_enough = enough(lambda p: answers.group(p, grading.verdict))
                return answers.are_enough

            how = {"domain": occasion.domain, "retry": occasion.retry}
            draw(collector.sampler, params, prompts, G, finished=hand_in, **how)
        if not answers.are_enough and len(answers.given) < len(answers.asked):
            raise ValueError(
                f"the sampler gave {len(answers.given)} completions for {len(answers.asked)} "
                "requests, expected one for each"
            )
        with phase("grade"):
            if answers.are_enough:
                grading.give_up()
            else:
                grading.results()
    groups = []
    for p in range(len(prompts)):
        if (group := answers.group(p, grading.verdict)) is None:
            break
        groups.append(group)
    return groups


class _Answers:
    """The answers to ``asked``, each prompt ``samples_per_prompt`` times, as they come in.

    given: number of the request -> what there is. are_enough: no more are needed.
    """

    def __init__(self, asked: Sequence[Prompt], samples_per_prompt: int):
        self.asked = asked
        self.given: dict[int, tuple[Completion, Submission]] = {}
        self.are_enough = False
        self._samples = samples_per_prompt

    def note(self, c: Completion, text: str, occasion: Occasion) -> Submission:
        """Keep an answer; returns what its grader gets."""
        prompt, g = self.asked[c.request], c.request % self._samples
        submission = Submission(
            kind=prompt.kind,
            text=text,
            answer=prompt.answer,
            is_finished=c.is_finished,
            response_tokens=len(c.tokens_T),
            prompt=prompt.text,
            identity=f"{occasion.domain} {prompt.draw} {g}",
            iteration=occasion.iteration,
            row=dict(prompt.columns),
        )
        self.given[c.request] = c, submission
        return submission

    def group(self, p: int, verdict: Callable[[int], Verdict | None]) -> list[Judged] | None:
        """The samples of a prompt once every verdict is known."""
        found: list[Judged] = []
        for number in range(p * self._samples, (p + 1) * self._samples):
            if (known := verdict(number)) is None:
                return None
            completion, submission = self.given[number]
            found.append(
                (Sample(self.asked[number], completion, submission.text, known), submission)
            )
        return found


def draw(
    sampler: Sampler,
    params: Any,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    domain: int,
    retry: int = 0,
    finished: Callable[[Completion], object] = lambda completion: None,
) -> list[Completion]:
    """Sample every prompt ``samples_per_prompt`` times; completions in the order of the prompts.

    domain, retry: see `Occasion`.
    finished: is called with each completion as soon as it is there; once it returns True, those
        that are not there yet are given up.
    """
    requests = [
        Request(prompt.tokens, (domain, prompt.draw, retry, g))
        for prompt in prompts
        for g in range(samples_per_prompt)
    ]
    completions = []
    sampler.start(params)
    for completion in sampler.sample(requests):
        completions.append(completion)
        if finished(completion) is True:
            break
    sampler.release()
    return sorted(completions, key=lambda completion: completion.request)


def check_failures(rollout: Rollout, largest_share: float, peers: Peers = ALONE) -> None:
    """Refuse to train on a rollout of which too much was masked because graders failed.

    Raises:
        RewardError: the share among the samples of all processes is above the largest; with the
            numbers and what to look at. On every process.
    """
    own = sum(sample.verdict.is_failed for sample in rollout.samples)
    failed, total = peers.gather(np.array([own, len(rollout.samples)], np.int32)).sum(axis=0)
    if failed > largest_share * total:
        raise RewardError(
            f"the graders of {failed} of {total} samples failed, more than "
            f"Reward.max_failures = {largest_share:g} allows; their own messages are above"
        )


# (advantage_PG, is_valid_PG) -> has_signal_P: whether there is something to learn from a group
Signal = Callable[[np.ndarray, np.ndarray], np.ndarray]


def by_reward(advantage_PG: np.ndarray, is_valid_PG: np.ndarray) -> np.ndarray:
    """Groups whose advantages are not all zero: a penalty alone is no reason to train."""
    return np.any(advantage_PG != 0, axis=1)


def by_teacher(advantage_PG: np.ndarray, is_valid_PG: np.ndarray) -> np.ndarray:
    """Groups with a valid sample, of which a teacher has something to say whatever its reward."""
    return np.any(is_valid_PG, axis=1)


class Selection(NamedTuple):
    """Which groups of a rollout train, in the order of the stream, as all processes see it.

    asked: prompts that were asked for. drawn: those of them that the rollout has, the first ones.
    wanted: groups that a step may train on.
    groups: numbers of those that do, at most ``wanted``.
    """

    asked: int
    drawn: int
    wanted: int
    groups: np.ndarray

    def advantages(self, rule: Advantage, groups: Groups) -> np.ndarray:
        """A rule's advantages of the selected groups, 0 for the others.

        The rule sees the selected groups alone, and masked ones up to ``wanted``: one shape.
        """
        advantage_PG = np.zeros(groups.reward_PG.shape, np.float32)
        picked = groups.picked(self.groups, self.wanted)
        advantage_PG[self.groups] = advantages(rule, picked)[: len(self.groups)]
        return advantage_PG


def advantages(rule: Advantage, groups: Groups) -> np.ndarray:
    """A rule's advantages of some groups.

    Raises:
        RewardError: the rule is not defined for a reward among them.
    """
    try:
        return np.asarray(advantages_of(rule, groups))
    except UnfitReward as error:
        raise RewardError(f"Objective.advantage: {error}") from error


def groups_of(
    rollout: Rollout,
    counted: Mapping[Count, np.ndarray],
    parts: Mapping[str, Figure],
    past: Past | None = None,
) -> Groups:
    """What an advantage may know of the groups that were counted, of all processes.

    counted: rewards, which are valid, lengths, and what the parts count.
    """
    reward_PG, length_PG = (counted[c].astype(np.float32) for c in (reward, response_length))
    said = {name: counted[f.count].astype(np.float32) for name, f in parts.items() if f.count}
    return Groups(
        reward_PG, counted[is_valid] > 0, length_PG, said or None, rollout.parts or None, past
    )


def keys_of(rollout: Rollout, peers: Peers, total: int) -> list[Key]:
    """What `History` knows the prompts of all processes by, in one exchange."""
    own = b"".join(key_of(group[0].prompt.id) for group in rollout.groups)
    own_PB = np.frombuffer(own, np.uint8).reshape(-1, KEY_BYTES)
    return [key_B.tobytes() for key_B in peers.whole(own_PB, total)]


def assemble(
    rollout: Rollout,
    advantage: Advantage,
    shape: BatchShape,
    peers: Peers = ALONE,
    selection: Selection | None = None,
    history: History | None = None,
    signal: Signal = by_reward,
) -> tuple[list[Minibatch], dict[str, float]]:
    """Advantages, then the groups that carry a signal dealt evenly over fixed-shape mini-batches.

    Groups without one cost no compute. The order of prompts is kept. Every process judges the
    outcomes of all, so that all agree which group goes where, as one process would have it; each
    then fills rows with its own groups and all adopt the largest number of micro-batches. Returns
    this process's mini-batches (arrays on the host) and the figures of the whole rollout.

    advantage: see `aspo_jax.losses.Groups`.
    selection: the only groups that may train; None: all.
    history: of the prompts, for an advantage that asks for their past. All groups are added to it.
    signal: which groups carry one.
    """
    parts = part_figures(rollout.parts)
    counted = gather(rollout, {**ROLLOUT, **parts}, peers, selection and selection.asked)
    if selection is not None:
        counted = {count: x_PG[: selection.drawn] for count, x_PG in counted.items()}
    groups = groups_of(rollout, counted, parts)
    if history is not None and "past" in asks(advantage):
        total = selection.asked if selection else len(rollout.groups) * peers.count
        keys = keys_of(rollout, peers, total)[: len(groups.reward_PG)]
        groups = groups._replace(past=history.past(keys))
        history.add(keys, groups.reward_PG, groups.is_valid_PG)
    rule = advantages if selection is None else selection.advantages
    advantage_PG = rule(advantage, groups)
    if not np.isfinite(advantage_PG).all():
        raise ValueError("advantages are not finite; the advantage rule or a reward is at fault")
    retained = np.flatnonzero(signal(advantage_PG, groups.is_valid_PG))
    if selection is not None:
        retained = np.intersect1d(retained, selection.groups)
    shares = np.array_split(retained, shape.minibatches)
    examples = [_examples(rollout, advantage_PG, share, peers) for share in shares]
    filled = [fill(share, shape, peers.count) for share in examples]
    minibatches, train_tokens = _agree(filled, peers)
    room = sum(int(m.count) for m in minibatches) * shape.rows * shape.row_tokens
    drawn = asked = wanted = len(advantage_PG)
    if selection is not None:
        asked, wanted = selection.asked, selection.wanted
    made = figures(ROLLOUT, counted) | {
        "valid_groups": len(retained) / drawn,
        "generation_multiplier": drawn / wanted,
        "rounds": asked / wanted,
        "surplus_groups": float(asked - drawn),
        "train_tokens": float(train_tokens),
    }
    if room:
        made["packing_waste"] = 1.0 - train_tokens / room
    rewards = {f"reward/{name}": x for name, x in figures(parts, counted).items()}
    return minibatches, {f"rollout/{name}": x for name, x in made.items()} | rewards


def gather(
    rollout: Rollout, table: Mapping[str, Figure], peers: Peers = ALONE, total: int | None = None
) -> dict[Count, np.ndarray]:
    """Rewards and what a table counts of every sample [P, G], of all processes in one exchange.

    total: number of prompts, of which those that no process has count 0; None: every process has
        as many as this one.
    """
    counts = dict.fromkeys((reward, is_valid, *(f.count for f in table.values() if f.count)))
    own = np.array([[count(group) for count in counts] for group in rollout.groups], np.float32)
    whole = peers.whole(own, total or len(own) * peers.count).astype(np.float64)
    return {count: whole[:, i] for i, count in enumerate(counts)}


def _agree(filled: Sequence[Minibatch], peers: Peers) -> tuple[list[Minibatch], int]:
    """The mini-batches with counts that hold on all processes; the tokens of all processes."""
    used = [int((m.rows.sequence_id_BT > 0).sum()) for m in filled]
    counts = [int(m.count) for m in filled]
    all_counts, all_used = np.swapaxes(peers.gather(np.array([counts, used], np.int32)), 0, 1)
    agreed = [
        dataclasses.replace(m, count=np.int32(count))
        for m, count in zip(filled, all_counts.max(axis=0), strict=True)
    ]
    return agreed, int(all_used.sum())


def _examples(
    rollout: Rollout, advantage_PG: np.ndarray, groups: np.ndarray, peers: Peers
) -> list[Example]:
    """This process's valid samples of the groups; ``group`` is the number among all of them."""
    examples, own_groups = [], rollout.groups
    for group, p in enumerate(groups):
        own, process = divmod(int(p), peers.count)
        if process != peers.index:
            continue
        for sample, advantage in zip(own_groups[own], advantage_PG[p].tolist(), strict=True):
            if sample.is_valid:
                c, prompt = sample.completion, sample.prompt
                _check_finite(prompt, c.policy_logp_T)
                examples.append(
                    answered(prompt.tokens, c.tokens_T, c.policy_logp_T, advantage, group)
                )
    return examples


def _check_finite(prompt: Prompt, logp_T: np.ndarray) -> None:
    """A correction of what the sampler reported cannot be right about a number that is none."""
    broken = np.flatnonzero(~np.isfinite(logp_T))
    if broken.size:
        t = broken[0]
        raise ValueError(
            f"the sampler reported {logp_T[t]} as the log-probability of token {t} of an answer to "
            f"prompt {prompt.id!r}, expected a finite number; the engine is at fault: it is to end "
            f"such an answer before that token, as {NONFINITE!r}"
        )


def held_out_transcripts(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """The first sample of each of the first ``count`` prompts, as plain JSON."""
    return [_transcript(group, 0) for group in rollout.groups[:count]]


def training_transcripts(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """At most ``count`` samples as plain JSON: of each prompt the best and the worst."""
    shown: list[dict[str, Any]] = []
    for group in rollout.groups[:count]:
        reward_G = np.array(reward(group))
        chosen = dict.fromkeys((int(reward_G.argmax()), int(reward_G.argmin())))
        shown += [_transcript(group, g) for g in chosen]
    return shown[:count]


def _transcript(group: Sequence[Sample], g: int) -> dict[str, Any]:
    sample = group[g]
    parts = {name: part.reward for name, part in sample.verdict.parts.items()}
    return {
        "id": sample.prompt.id,
        "draw": sample.prompt.draw,
        "sample": g,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "answer": sample.prompt.answer,
        "reward": sample.verdict.reward,
        "reason": sample.verdict.reason,
        "tokens": len(sample.completion.tokens_T),
        "ending": sample.completion.ending,
    } | ({"parts": parts} if parts else {})
