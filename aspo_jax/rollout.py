"""Prompts x G -> completions -> verdicts -> advantages -> mini-batches of rows, on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.data import pack
from aspo_jax.rewards import (
    Grading,
    RewardError,
    Shape,
    Submission,
    Verdict,
    repetition,
    unshaped,
)
from aspo_jax.sampler import NONFINITE, Completion, Request, Sampler
from aspo_jax.structs import Minibatch, Prompt, Rows


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


class Sample(NamedTuple):
    """One completion with its prompt, text and verdict."""

    prompt: Prompt
    prompt_tokens: Sequence[int]
    completion: Completion
    text: str
    verdict: Verdict


class Rollout(NamedTuple):
    """P prompts times G samples; ``samples[p * G + g]``."""

    samples: Sequence[Sample]
    samples_per_prompt: int

    def grid(self, of: Callable[[Sample], Any], dtype) -> np.ndarray:
        """An attribute of every sample as an array [P, G]."""
        values = np.array([of(sample) for sample in self.samples], dtype)
        return values.reshape(-1, self.samples_per_prompt)

    @property
    def reward_PG(self) -> np.ndarray:
        return self.grid(lambda s: s.verdict.reward, np.float32)

    @property
    def is_valid_PG(self) -> np.ndarray:
        """True where the sample may be learned from: neither grader nor sampler failed."""
        return self.grid(lambda s: s.verdict.is_valid, bool) & ~self.is_broken_PG

    @property
    def is_broken_PG(self) -> np.ndarray:
        """True where sampling ended in a distribution that is not finite."""
        return self.grid(lambda s: s.completion.ending == NONFINITE, bool)

    @property
    def is_failed_PG(self) -> np.ndarray:
        """True where the grader could not do its work."""
        return self.grid(lambda s: s.verdict.reason in ("crash", "bad_gold"), bool)

    @property
    def is_timeout_PG(self) -> np.ndarray:
        """True where running or grading the answer took too long."""
        return self.grid(lambda s: s.verdict.reason == "timeout", bool)

    @property
    def is_right_PG(self) -> np.ndarray:
        return self.grid(lambda s: s.verdict.reason == "match", bool)

    @property
    def is_finished_PG(self) -> np.ndarray:
        return self.grid(lambda s: s.completion.is_finished, bool)

    @property
    def length_PG(self) -> np.ndarray:
        """Response tokens."""
        return self.grid(lambda s: len(s.completion.tokens_T), np.float32)

    @property
    def groups(self) -> list[Sequence[Sample]]:
        """The samples of each prompt."""
        G = self.samples_per_prompt
        return [self.samples[start : start + G] for start in range(0, len(self.samples), G)]

    @property
    def distinct_P(self) -> np.ndarray:
        """Different texts in each group."""
        return np.array([len({s.text for s in group}) for group in self.groups])

    @property
    def distinct_right_P(self) -> np.ndarray:
        """Different right texts in each group."""
        right = [{s.text for s in group if s.verdict.reason == "match"} for group in self.groups]
        return np.array([len(texts) for texts in right])


class Codec(NamedTuple):
    """Text to token ids and back, special tokens neither added nor shown."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int] | np.ndarray], str]


def unwatched(completion: Completion) -> None:
    """Nothing is done with a completion as soon as it is there."""


def draw(
    sampler: Sampler,
    codec: Codec,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    domain: int,
    retry: int = 0,
    finished: Callable[[Completion], None] = unwatched,
) -> list[Completion]:
    """Sample every prompt ``samples_per_prompt`` times; completions in the order of the prompts.

    finished: is called with each completion as soon as it is there.
    """
    requests = [
        Request(tokens, (domain, prompt.draw, retry, g))
        for prompt in prompts
        for tokens in [codec.encode(prompt.text)]
        for g in range(samples_per_prompt)
    ]
    completions = []
    for completion in sampler.sample(requests):
        finished(completion)
        completions.append(completion)
    return sorted(completions, key=lambda completion: completion.request)


def submitter(
    grading: Grading,
    codec: Codec,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    domain: int,
    iteration: int = 0,
    watch: Callable[[Completion], None] = unwatched,
) -> Callable[[Completion], None]:
    """Hands a completion to the graders while others are still being sampled (`draw`).

    watch: is called with it too.
    """

    def submit(c: Completion) -> None:
        p, g = divmod(c.request, samples_per_prompt)
        prompt = prompts[p]
        submission = Submission(
            prompt.kind,
            codec.decode(c.tokens_T),
            prompt.answer,
            c.is_finished,
            len(c.tokens_T),
            prompt.text,
            f"{domain} {prompt.draw} {g}",
            iteration,
        )
        grading.submit(c.request, submission)
        watch(c)

    return submit


def judge(
    grading: Grading,
    codec: Codec,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    shape: Shape = unshaped,
) -> Rollout:
    """Wait for the verdicts of all ``completions``, which `submitter` handed in and `draw` sorted.

    shape: sees the groups of this process only.
    """
    G = len(completions) // len(prompts)
    judged = grading.results()
    groups = [judged[start : start + G] for start in range(0, len(judged), G)]
    verdicts = [verdict for group in shape(groups) for verdict in group]
    asked = [prompt for prompt in prompts for _ in range(G)]
    prompt_tokens = [codec.encode(prompt.text) for prompt in asked]
    texts = [submission.text for submission, _ in judged]
    samples = map(Sample, asked, prompt_tokens, completions, texts, verdicts)
    return Rollout(list(samples), G)


def check_failures(rollout: Rollout, largest_share: float, peers: Peers = ALONE) -> None:
    """Refuse to train on a rollout of which too much was masked because graders failed.

    Raises:
        RewardError: the share among the samples of all processes is above the largest; with the
            numbers and what to look at. On every process.
    """
    own = sum(sample.verdict.reason == "crash" for sample in rollout.samples)
    failed, total = peers.gather(np.array([own, len(rollout.samples)], np.int32)).sum(axis=0)
    if failed > largest_share * total:
        raise RewardError(
            f"the graders of {failed} of {total} samples failed twice, more than "
            f"Reward.max_failures = {largest_share:g} allows; their own messages are above"
        )


class BatchShape(NamedTuple):
    """Fixed shapes of an iteration's updates.

    minibatches: optimizer updates per pass over the rollout.
    row_tokens, rows: T of a micro-batch, and B, of which each process fills an equal share.
    microbatches: M, room for the worst case (every answer of the longest length).
    is_packed: several sequences may share a row.
    """

    minibatches: int
    microbatches: int
    rows: int
    row_tokens: int
    is_packed: bool = True


def batch_shape(
    *,
    prompts_per_step: int,
    prompts_per_minibatch: int,
    samples_per_prompt: int,
    longest: int,
    row_tokens: int,
    rows: int,
    is_packed: bool = True,
    processes: int = 1,
) -> BatchShape:
    """Room for the groups of a mini-batch that one process may have to hold, all of ``longest``.

    Of P prompts dealt over U mini-batches, one process of n can find ``ceil(P / (U + n - 1))`` of
    its own in one: a of them in a row leave (n - 1)(a - 1) prompts of others between them, which
    were dropped, so that the mini-batch of at most ceil((P - (n - 1)(a - 1)) / U) holds all a.

    Raises:
        ValueError: ``rows`` is not a multiple of ``processes``.
    """
    if rows % processes:
        raise ValueError(
            f"Train.rows_per_microbatch = {rows} cannot be shared by {processes} processes; set "
            f"it to a multiple of {processes}"
        )
    minibatches = prompts_per_step // prompts_per_minibatch
    groups = math.ceil(prompts_per_step / (minibatches + processes - 1))
    per_row = row_tokens // longest if is_packed else 1
    worst_rows = math.ceil(groups * samples_per_prompt / per_row)
    return BatchShape(
        minibatches=minibatches,
        microbatches=math.ceil(worst_rows / (rows // processes)),
        rows=rows,
        row_tokens=row_tokens,
        is_packed=is_packed,
    )


class Example(NamedTuple):
    """One sequence to train on: a prompt, its response and what is known of the response.

    sampler_logp_T: log-probability of each response token when it was sampled.
    group: number of the prompt within its mini-batch.
    """

    prompt_tokens: Sequence[int]
    response_tokens: Sequence[int] | np.ndarray
    advantage: float
    sampler_logp_T: np.ndarray | float
    group: int


def assemble(
    rollout: Rollout,
    advantage: Callable[..., Any],
    shape: BatchShape,
    peers: Peers = ALONE,
) -> tuple[list[Minibatch], dict[str, float]]:
    """Advantages, then the groups that carry a signal dealt evenly over fixed-shape mini-batches.

    Groups whose advantages are all zero cost no compute. The order of prompts is kept. Every
    process judges the outcomes of all, so that all agree which group goes where, as one process
    would have it; each then fills rows with its own groups and all adopt the largest number of
    micro-batches. Returns this process's mini-batches (arrays on the host) and the figures of the
    whole rollout.
    """
    outcomes = gather_outcomes(rollout, peers)
    advantage_PG = np.asarray(advantage(outcomes.reward_PG, outcomes.is_valid_PG))
    if not np.isfinite(advantage_PG).all():
        raise ValueError("advantages are not finite; the advantage rule or a reward is at fault")
    retained = np.flatnonzero((advantage_PG != 0).any(axis=1))
    shares = np.array_split(retained, shape.minibatches)
    own = shape._replace(rows=shape.rows // peers.count)
    filled = [fill(_examples(rollout, advantage_PG, share, peers), own) for share in shares]
    minibatches, train_tokens = _agree(filled, peers)
    room = sum(int(m.count) for m in minibatches) * shape.rows * shape.row_tokens
    figures = _figures(outcomes, advantage_PG) | {
        "train_tokens": train_tokens,
        "packing_waste": 1.0 - train_tokens / room if room else math.nan,
    }
    counted = {name: float(value) for name, value in figures.items() if not math.isnan(value)}
    return minibatches, {f"rollout/{name}": value for name, value in counted.items()}


class Outcomes(NamedTuple):
    """What is counted of every sample, of all processes; P prompts in the order of the step.

    distinct_PG, distinct_right_PG: number of different, and of different right, texts in the group.
    """

    reward_PG: np.ndarray
    is_valid_PG: np.ndarray
    is_failed_PG: np.ndarray
    is_timeout_PG: np.ndarray
    is_broken_PG: np.ndarray
    is_right_PG: np.ndarray
    is_finished_PG: np.ndarray
    length_PG: np.ndarray
    repetition_PG: np.ndarray
    distinct_PG: np.ndarray
    distinct_right_PG: np.ndarray


def gather_outcomes(rollout: Rollout, peers: Peers = ALONE, total: int | None = None) -> Outcomes:
    """The outcomes of ``total`` prompts; None: every process has as many as this one."""
    G = rollout.samples_per_prompt
    own = Outcomes(
        reward_PG=rollout.reward_PG,
        is_valid_PG=rollout.is_valid_PG,
        is_failed_PG=rollout.is_failed_PG,
        is_timeout_PG=rollout.is_timeout_PG,
        is_broken_PG=rollout.is_broken_PG,
        is_right_PG=rollout.is_right_PG,
        is_finished_PG=rollout.is_finished_PG,
        length_PG=rollout.length_PG,
        repetition_PG=rollout.grid(lambda s: repetition(s.text), np.float32),
        distinct_PG=np.tile(rollout.distinct_P[:, None], G),
        distinct_right_PG=np.tile(rollout.distinct_right_P[:, None], G),
    )
    prompts = len(rollout.samples) // G
    stacked_PG = np.stack([x.astype(np.float32) for x in own], axis=-1)
    whole_PG = peers.whole(stacked_PG, prompts * peers.count if total is None else total)
    return Outcomes(*(whole_PG[..., i].astype(x.dtype) for i, x in enumerate(own)))


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
    G, is_valid_PG = rollout.samples_per_prompt, rollout.is_valid_PG
    examples = []
    for group, p in enumerate(groups):
        own, process = divmod(int(p), peers.count)
        if process != peers.index:
            continue
        for g in map(int, np.flatnonzero(is_valid_PG[own])):
            sample = rollout.samples[own * G + g]
            c = sample.completion
            advantage = float(advantage_PG[p, g])
            examples.append(
                Example(sample.prompt_tokens, c.tokens_T, advantage, c.policy_logp_T, group)
            )
    return examples


def fill(examples: Sequence[Example], shape: BatchShape) -> Minibatch:
    """Lay token sequences into rows and the rows into micro-batches of fixed shape."""
    lengths = [len(e.prompt_tokens) + len(e.response_tokens) - 1 for e in examples]
    packed = pack(lengths, shape.row_tokens) if shape.is_packed else _alone(lengths)
    rows = _empty_rows(shape.microbatches * shape.rows, shape.row_tokens)
    for row, contents in enumerate(packed):
        start = 0
        for sequence_id, index in enumerate(contents, start=1):
            _write(rows, row, start, sequence_id, examples[index])
            start += lengths[index]
    stacked: dict[str, Any] = {
        name: x.reshape(shape.microbatches, shape.rows, shape.row_tokens)
        for name, x in rows.items()
    }
    return Minibatch(rows=Rows(**stacked), count=np.int32(math.ceil(len(packed) / shape.rows)))


def _alone(lengths: Sequence[int]) -> list[list[int]]:
    """A row for each sequence, the longest first as `pack` has it."""
    return [[i] for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])]


def _empty_rows(rows: int, row_tokens: int) -> dict[str, np.ndarray]:
    types = {"is_response_BT": bool, "advantage_BT": np.float32, "sampler_logp_BT": np.float32}
    fields = Rows.__dataclass_fields__
    return {name: np.zeros((rows, row_tokens), types.get(name, np.int32)) for name in fields}


def _write(rows: dict[str, np.ndarray], row: int, start: int, sequence_id: int, e: Example):
    """One sequence of L tokens into L-1 slots: inputs ``x[:-1]``, targets ``x[1:]``."""
    tokens = np.concatenate([e.prompt_tokens, e.response_tokens])
    slots = slice(start, start + len(tokens) - 1)
    answer = slice(slots.stop - len(e.response_tokens), slots.stop)
    rows["input_BT"][row, slots] = tokens[:-1]
    rows["target_BT"][row, slots] = tokens[1:]
    rows["position_BT"][row, slots] = np.arange(len(tokens) - 1)
    rows["sequence_id_BT"][row, slots] = sequence_id
    rows["group_id_BT"][row, slots] = e.group
    rows["response_position_BT"][row, answer] = np.arange(len(e.response_tokens))
    rows["is_response_BT"][row, answer] = True
    rows["advantage_BT"][row, answer] = e.advantage
    rows["sampler_logp_BT"][row, answer] = e.sampler_logp_T


def _figures(outcomes: Outcomes, advantage_PG: np.ndarray) -> dict[str, Any]:
    o = outcomes
    return {
        "reward_mean": o.reward_PG[o.is_valid_PG].mean() if o.is_valid_PG.any() else math.nan,
        "solve_none": (~o.is_right_PG).all(axis=1).mean(),
        "solve_all": o.is_right_PG.all(axis=1).mean(),
        "valid_groups": (advantage_PG != 0).any(axis=1).mean(),
        "response_length": o.length_PG.mean(),
        "truncated": 1.0 - o.is_finished_PG.mean(),
        "repetition": o.repetition_PG.mean(dtype=np.float64),
        "distinct_answers": o.distinct_PG.mean(),
        "grader_failures": o.is_failed_PG.sum(),
        "grader_timeouts": o.is_timeout_PG.sum(),
        "sampler_failures": o.is_broken_PG.sum(),
    }


def held_out_transcripts(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """The first sample of each of the first ``count`` prompts, as plain JSON."""
    return [_transcript(group, 0) for group in rollout.groups[:count]]


def training_transcripts(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """At most ``count`` samples as plain JSON: of each prompt the best and the worst."""
    shown: list[dict[str, Any]] = []
    for group, reward_G in zip(rollout.groups, rollout.reward_PG, strict=True):
        if len(shown) >= count:
            break
        chosen = dict.fromkeys((int(reward_G.argmax()), int(reward_G.argmin())))
        shown += [_transcript(group, g) for g in chosen]
    return shown[:count]


def _transcript(group: Sequence[Sample], g: int) -> dict[str, Any]:
    sample = group[g]
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
    }
