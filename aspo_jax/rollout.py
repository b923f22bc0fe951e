"""Prompts x G -> completions -> verdicts -> advantages -> mini-batches of rows, on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.data import pack
from aspo_jax.outcomes import ROLLOUT, Count, Figure, figures, is_valid, reward
from aspo_jax.rewards import RewardError, Scorer, Shape, Submission, Verdict, unshaped
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
    """P prompts times G samples; ``samples[p * G + g]``."""

    samples: Sequence[Sample]
    samples_per_prompt: int

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

    domain, retry: name the random draws, see `draw`.
    iteration: how many iterations the run had done, for graders to know.
    phase: (name, total, unit) -> a context around sampling and another around the wait for the
        last verdicts; the first yields a bar that is moved at each answer.
    """
    G = samples_per_prompt
    asked = [prompt for prompt in prompts for _ in range(G)]
    with collector.scorer.begin() as grading:
        with phase("sample", len(asked), "samples") as bar:

            def hand_in(c: Completion) -> None:
                prompt = asked[c.request]
                submission = Submission(
                    kind=prompt.kind,
                    text=collector.decode(c.tokens_T),
                    answer=prompt.answer,
                    is_finished=c.is_finished,
                    response_tokens=len(c.tokens_T),
                    prompt=prompt.text,
                    identity=f"{domain} {prompt.draw} {c.request % G}",
                    iteration=iteration,
                )
                grading.submit(c.request, submission)
                bar.advance(tokens=len(c.tokens_T))

            completions = draw(
                collector.sampler, params, prompts, G, domain=domain, retry=retry, finished=hand_in
            )
        with phase("grade"):
            judged = grading.results()
    groups = [judged[start : start + G] for start in range(0, len(judged), G)]
    verdicts = [verdict for group in collector.shape(groups) for verdict in group]
    texts = [submission.text for submission, _ in judged]
    return Rollout(list(map(Sample, asked, completions, texts, verdicts)), G)


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

    domain, retry: with the prompt and the number of the sample they name its random draws.
    finished: is called with each completion as soon as it is there.
    """
    requests = [
        Request(prompt.tokens, (domain, prompt.draw, retry, g))
        for prompt in prompts
        for g in range(samples_per_prompt)
    ]
    completions = []
    sampler.start(params)
    for completion in sampler.sample(requests):
        finished(completion)
        completions.append(completion)
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


class BatchShape(NamedTuple):
    """Fixed shapes of an iteration's updates.

    minibatches: optimizer updates per pass over the rollout.
    row_tokens, rows: T of a micro-batch and B, those of all processes, which fill equal shares.
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

    rows: a multiple of ``processes``.
    """
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
    """One sequence of L tokens to train on: an answer, or a conversation of several.

    is_response_L: True where the policy chose the token; of the first token it cannot be.
    logp_L: log-probability of those when they were sampled; the others' are not read.
    group: number of the prompt within its mini-batch.
    """

    tokens_L: np.ndarray
    is_response_L: np.ndarray
    logp_L: np.ndarray
    advantage: float
    group: int


def answered(
    prompt: Sequence[int],
    response: Sequence[int] | np.ndarray,
    logp_T: np.ndarray | float,
    advantage: float,
    group: int,
) -> Example:
    """The example of one prompt and one response; ``logp_T`` is of the response's tokens."""
    tokens_L = np.concatenate([prompt, response]).astype(np.int32)
    is_response_L = np.arange(len(tokens_L)) >= len(prompt)
    logp_L = np.zeros(len(tokens_L), np.float32)
    logp_L[is_response_L] = logp_T
    return Example(tokens_L, is_response_L, logp_L, advantage, group)


def assemble(
    rollout: Rollout, advantage: Callable[..., Any], shape: BatchShape, peers: Peers = ALONE
) -> tuple[list[Minibatch], dict[str, float]]:
    """Advantages, then the groups that carry a signal dealt evenly over fixed-shape mini-batches.

    Groups whose advantages are all zero cost no compute. The order of prompts is kept. Every
    process judges the outcomes of all, so that all agree which group goes where, as one process
    would have it; each then fills rows with its own groups and all adopt the largest number of
    micro-batches. Returns this process's mini-batches (arrays on the host) and the figures of the
    whole rollout.
    """
    counted = gather(rollout, ROLLOUT, peers)
    reward_PG, is_valid_PG = counted[reward].astype(np.float32), counted[is_valid] > 0
    advantage_PG = np.asarray(advantage(reward_PG, is_valid_PG))
    if not np.isfinite(advantage_PG).all():
        raise ValueError("advantages are not finite; the advantage rule or a reward is at fault")
    retained = np.flatnonzero((advantage_PG != 0).any(axis=1))
    shares = np.array_split(retained, shape.minibatches)
    examples = [_examples(rollout, advantage_PG, share, peers) for share in shares]
    filled = [fill(share, shape, peers.count) for share in examples]
    minibatches, train_tokens = _agree(filled, peers)
    room = sum(int(m.count) for m in minibatches) * shape.rows * shape.row_tokens
    made = figures(ROLLOUT, counted) | {
        "valid_groups": len(retained) / len(advantage_PG),
        "train_tokens": float(train_tokens),
    }
    if room:
        made["packing_waste"] = 1.0 - train_tokens / room
    return minibatches, {f"rollout/{name}": value for name, value in made.items()}


def gather(
    rollout: Rollout, table: Mapping[str, Figure], peers: Peers = ALONE, total: int | None = None
) -> dict[Count, np.ndarray]:
    """Rewards and what a table counts of every sample [P, G], of all processes in one exchange.

    total: number of prompts; None: every process has as many as this one.
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
                c = sample.completion
                examples.append(
                    answered(sample.prompt.tokens, c.tokens_T, c.policy_logp_T, advantage, group)
                )
    return examples


def fill(examples: Sequence[Example], shape: BatchShape, processes: int = 1) -> Minibatch:
    """Lay token sequences into rows, and these into one process's share of the micro-batches.

    Raises:
        ValueError: a sequence too long for a row, or one that begins with a token of the policy's,
            which nothing predicts.
    """
    lengths = [len(e.tokens_L) - 1 for e in examples]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # as `pack` has them
    packed = pack(lengths, shape.row_tokens) if shape.is_packed else [[i] for i in longest_first]
    own_rows = shape.rows // processes
    rows = _empty_rows(shape.microbatches * own_rows, shape.row_tokens)
    for row, contents in enumerate(packed):
        start = 0
        for sequence_id, index in enumerate(contents, start=1):
            _write(rows, row, start, sequence_id, examples[index])
            start += lengths[index]
    stacked: dict[str, Any] = {
        name: x.reshape(shape.microbatches, own_rows, shape.row_tokens) for name, x in rows.items()
    }
    return Minibatch(rows=Rows(**stacked), count=np.int32(math.ceil(len(packed) / own_rows)))


def _empty_rows(rows: int, row_tokens: int) -> dict[str, np.ndarray]:
    types = {"is_response_BT": bool, "advantage_BT": np.float32, "sampler_logp_BT": np.float32}
    fields = Rows.__dataclass_fields__
    return {name: np.zeros((rows, row_tokens), types.get(name, np.int32)) for name in fields}


def _write(rows: dict[str, np.ndarray], row: int, start: int, sequence_id: int, e: Example):
    """One sequence of L tokens into L-1 slots: inputs ``x[:-1]``, of all else ``x[1:]``."""
    if e.is_response_L[0]:
        raise ValueError(
            f"a sequence of {len(e.tokens_L)} tokens begins with one that the policy chose, "
            "expected one that was given, such as <bos>: nothing predicts the first"
        )
    slots, is_response_T = slice(start, start + len(e.tokens_L) - 1), e.is_response_L[1:]
    values = {
        "input_BT": e.tokens_L[:-1],
        "target_BT": e.tokens_L[1:],
        "position_BT": np.arange(len(is_response_T)),
        "sequence_id_BT": sequence_id,
        "response_position_BT": np.where(is_response_T, np.cumsum(is_response_T) - 1, 0),
        "is_response_BT": is_response_T,
        "advantage_BT": np.where(is_response_T, e.advantage, 0),
        "sampler_logp_BT": np.where(is_response_T, e.logp_L[1:], 0),
        "group_id_BT": e.group,
    }
    for name, x in values.items():
        rows[name][row, slots] = x


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
