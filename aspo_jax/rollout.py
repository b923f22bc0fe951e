"""Prompts x G -> completions -> verdicts -> advantages -> mini-batches of rows, on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.data import pack
from aspo_jax.rewards import Scorer, Submission, Verdict, repetition
from aspo_jax.sampler import Completion, Request, Sampler
from aspo_jax.structs import Minibatch, Prompt, Rows


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
        """True where the grader did not fail."""
        return self.grid(lambda s: s.verdict.is_valid, bool)

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
    def texts_PG(self) -> list[list[str]]:
        G = self.samples_per_prompt
        texts = [sample.text for sample in self.samples]
        return [texts[start : start + G] for start in range(0, len(texts), G)]


class Codec(NamedTuple):
    """Text to token ids and back, special tokens neither added nor shown."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int] | np.ndarray], str]


def draw(
    sampler: Sampler,
    codec: Codec,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    *,
    domain: int,
    retry: int = 0,
) -> list[Completion]:
    """Sample every prompt ``samples_per_prompt`` times; completions in the order of the prompts."""
    requests = [
        Request(tokens, (domain, prompt.draw, retry, g))
        for prompt in prompts
        for tokens in [codec.encode(prompt.text)]
        for g in range(samples_per_prompt)
    ]
    return sorted(sampler.sample(requests), key=lambda completion: completion.request)


def judge(
    scorer: Scorer, codec: Codec, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Rollout:
    """Have every completion graded; ``completions`` as `draw` returns them."""
    G = len(completions) // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(G)]
    texts = [codec.decode(completion.tokens_T) for completion in completions]
    submissions = [
        Submission(prompt.kind, text, prompt.answer, c.is_finished, len(c.tokens_T))
        for prompt, text, c in zip(asked, texts, completions, strict=True)
    ]
    prompt_tokens = [codec.encode(prompt.text) for prompt in prompts for _ in range(G)]
    verdicts = scorer.score(submissions)
    samples = map(Sample, asked, prompt_tokens, completions, texts, verdicts)
    return Rollout(list(samples), G)


class BatchShape(NamedTuple):
    """Fixed shapes of an iteration's updates.

    minibatches: optimizer updates per pass over the rollout.
    row_tokens, rows: T and B of a micro-batch.
    microbatches: M, room for the worst case (every answer of the longest length).
    """

    minibatches: int
    microbatches: int
    rows: int
    row_tokens: int


def batch_shape(
    *,
    prompts_per_step: int,
    prompts_per_minibatch: int,
    samples_per_prompt: int,
    longest: int,
    row_tokens: int,
    rows: int,
) -> BatchShape:
    """Room for ``prompts_per_minibatch`` groups whose sequences all occupy ``longest`` slots."""
    sequences = prompts_per_minibatch * samples_per_prompt
    worst_rows = math.ceil(sequences / (row_tokens // longest))
    return BatchShape(
        minibatches=prompts_per_step // prompts_per_minibatch,
        microbatches=math.ceil(worst_rows / rows),
        rows=rows,
        row_tokens=row_tokens,
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
    rollout: Rollout, advantage: Callable[..., Any], shape: BatchShape
) -> tuple[list[Minibatch], dict[str, float]]:
    """Advantages, then the groups that carry a signal dealt evenly over fixed-shape mini-batches.

    Groups whose advantages are all zero cost no compute. The order of prompts is kept. Returns the
    mini-batches (arrays on the host) and the figures of the rollout.
    """
    advantage_PG = np.asarray(advantage(rollout.reward_PG, rollout.is_valid_PG))
    if not np.isfinite(advantage_PG).all():
        raise ValueError("advantages are not finite; the advantage rule or a reward is at fault")
    retained = np.flatnonzero((advantage_PG != 0).any(axis=1))
    shares = np.array_split(retained, shape.minibatches)
    minibatches = [fill(_examples(rollout, advantage_PG, share), shape) for share in shares]
    return minibatches, _figures(rollout, advantage_PG, minibatches, shape)


def _examples(rollout: Rollout, advantage_PG: np.ndarray, groups: np.ndarray) -> list[Example]:
    G, is_valid_PG = rollout.samples_per_prompt, rollout.is_valid_PG
    examples = []
    for group, p in enumerate(groups):
        for g in np.flatnonzero(is_valid_PG[p]):
            sample = rollout.samples[p * G + g]
            c = sample.completion
            advantage = float(advantage_PG[p, g])
            examples.append(Example(sample.prompt_tokens, c.tokens_T, advantage, c.logp_T, group))
    return examples


def fill(examples: Sequence[Example], shape: BatchShape) -> Minibatch:
    """Pack token sequences into rows and the rows into micro-batches of fixed shape."""
    lengths = [len(e.prompt_tokens) + len(e.response_tokens) - 1 for e in examples]
    packed = pack(lengths, shape.row_tokens)
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


def _figures(rollout: Rollout, advantage_PG, minibatches, shape: BatchShape) -> dict[str, float]:
    reward_PG, is_valid_PG = rollout.reward_PG, rollout.is_valid_PG
    is_right_PG = rollout.is_right_PG
    used = sum(int((m.rows.sequence_id_BT > 0).sum()) for m in minibatches)
    room = sum(int(m.count) for m in minibatches) * shape.rows * shape.row_tokens
    figures = {
        "reward_mean": reward_PG[is_valid_PG].mean() if is_valid_PG.any() else math.nan,
        "solve_none": (~is_right_PG).all(axis=1).mean(),
        "solve_all": is_right_PG.all(axis=1).mean(),
        "valid_groups": (advantage_PG != 0).any(axis=1).mean(),
        "response_length": rollout.length_PG.mean(),
        "truncated": 1.0 - rollout.is_finished_PG.mean(),
        "repetition": np.mean([repetition(sample.text) for sample in rollout.samples]),
        "distinct_answers": np.mean([len(set(texts)) for texts in rollout.texts_PG]),
        "grader_failures": (~is_valid_PG).sum(),
        "train_tokens": used,
        "packing_waste": 1.0 - used / room if room else 0.0,
    }
    return {f"rollout/{name}": float(value) for name, value in figures.items()}


def transcripts(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """One sample each of the first ``count`` prompts, as plain JSON."""
    shown = rollout.samples[:: rollout.samples_per_prompt][:count]
    return [
        {
            "prompt": sample.prompt.text,
            "response": sample.text,
            "reward": sample.verdict.reward,
            "reason": sample.verdict.reason,
        }
        for sample in shown
    ]
