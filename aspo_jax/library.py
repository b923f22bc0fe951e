"""A model in a notebook: load it, chat, sample, score texts, evaluate on a file.

    model = load("models/Qwen2.5-0.5B-Instruct")
    answers = sample(model, [chat(model, "Name a prime above 100.")], 4, max_tokens=64)

Settings are the trainer's, written as after ``--set``. A loop of one's own stands on
`aspo_jax.parts` and `aspo_jax.build`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.config import Config, read_config
from aspo_jax.data import encode, render
from aspo_jax.evaluation import Scores, evaluator
from aspo_jax.inputs import held_out_prompts
from aspo_jax.loading import ROOM, fitted_sampler, rounded
from aspo_jax.model.sharding import row_shards
from aspo_jax.origin import fetch_weights, locate
from aspo_jax.parts import FACTORIES, open_scorer
from aspo_jax.policy import Policy, load_policy
from aspo_jax.rollout import Collector, Rollout, draw
from aspo_jax.sampler import EVALUATE, EVERYTHING, Completion, PagedSampler
from aspo_jax.structs import OldPolicy, Prompt
from aspo_jax.text_scores import make_rescore, score_texts
from aspo_jax.weights import load_start


class Loaded(NamedTuple):
    """A policy with its weights, on the devices of a mesh.

    rescore: the trainer's own scorer, over the whole vocabulary.
    samplers: those made so far, by their shapes: their programs stay compiled.
    """

    config: Config
    mesh: Mesh
    policy: Policy
    params: Any
    rescore: Callable[..., OldPolicy]
    samplers: dict[tuple[int, ...], PagedSampler]


class TextScore(NamedTuple):
    """What a policy says of a text of L tokens; the first is given, T = L - 1 are predicted.

    logp_T, entropy_T: in nats, at temperature 1, over the whole vocabulary.
    """

    tokens_L: np.ndarray
    logp_T: np.ndarray
    entropy_T: np.ndarray


class Answer(NamedTuple):
    """A sampled response: its text and what the sampler says of its tokens."""

    text: str
    completion: Completion


def configure(config: str, *settings: str) -> Config:
    """A packaged config or a .gin file with settings, such as ``"Optim.learning_rate=1e-4"``.

    Raises:
        ConfigError: every mistake in them.
    """
    words = [word for setting in settings for word in ("--set", setting)]
    return read_config(["--config", config, *words], FACTORIES)


def start(config: Config) -> Mesh:
    """The devices of a config; see `aspo_jax.runtime.start`."""
    return runtime.start(**dataclasses.asdict(config.runtime))


def load(folder: str | Path, *settings: str) -> Loaded:
    """The model of a Hugging Face folder or name, with settings: ``"Model.dtype=bfloat16"``.

    An adapter of it: ``"Lora.path='FOLDER'", "Lora.rank=16", "Lora.alpha=32"``.

    folder: or a name on the hub, ``owner/name`` or ``owner/name@revision``.

    Raises:
        UserError: a setting, or the folder, cannot be used.
    """
    config = configure("countdown_cpu", f"Model.path={str(folder)!r}", *settings)
    mesh = start(config)
    config = locate(config)
    fetch_weights(config)
    place = str(config.model_folder)
    policy = load_policy(config, place, mesh)
    params = load_start(config, policy, place, mesh)
    return Loaded(config, mesh, policy, params, make_rescore(policy.model, policy.head, mesh), {})


def chat(model: Loaded, messages: str | Sequence[Mapping[str, str]]) -> str:
    """The prompt that the model reads: a question, or the messages of a chat, in its template."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return render(model.policy.tokenizer, list(messages))


def score(model: Loaded, texts: Sequence[str]) -> list[TextScore]:
    """Log-probability and entropy of every token of some texts, as the trainer computes them.

    Raises:
        ValueError: a text of fewer than two tokens.
    """
    tokens = [np.asarray(encode(model.policy.tokenizer, text)) for text in texts]
    if short := [text for text, t in zip(texts, tokens, strict=True) if len(t) < 2]:
        raise ValueError(f"found {short[0]!r}, expected texts of at least two tokens")
    scores = score_texts(model.rescore, model.params, model.mesh, tokens)
    return [TextScore(own, *score) for own, score in zip(tokens, scores, strict=True)]


def sample(
    model: Loaded,
    prompts: Sequence[str],
    samples: int = 1,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[Answer]]:
    """Some responses to each prompt; see `chat` for how a prompt is written.

    temperature: 0: always the likeliest token.
    seed: names the random draws: the same call draws the same responses.
    """
    tokenizer, decode = model.policy.tokenizer, model.policy.decode
    asked = [
        Prompt(str(i), i, text, tuple(encode(tokenizer, text)), None, "exact")
        for i, text in enumerate(prompts)
    ]
    sampler = _sampler(model, asked, samples, max_tokens).drawing(temperature, EVERYTHING)
    drawn = draw(sampler, model.params, asked, samples, domain=EVALUATE, retry=seed)
    answers = [Answer(decode(completion.tokens_T), completion) for completion in drawn]
    return [answers[p * samples : (p + 1) * samples] for p in range(len(asked))]


def evaluate(
    model: Loaded,
    path: str | Path,
    samples: int = 1,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[Scores, Rollout]:
    """Sample and grade every row of a data file: avg@k, pass@k and the rest, and the samples.

    Raises:
        DataError: what is wrong with the file, and where.
    """
    config = model.config
    data = dataclasses.replace(
        config.data, source="files", train_path=str(path), eval_path=str(path)
    )
    wide = dataclasses.replace(config.sampler, max_prompt_tokens=2**20)
    every = dataclasses.replace(config.evaluate, prompts=2**31 - 1)
    config = dataclasses.replace(config, data=data, sampler=wide, evaluate=every)
    prompts = held_out_prompts(config, model.policy.tokenizer)
    sampler = _sampler(model, prompts, samples, max_tokens).drawing(temperature, EVERYTHING)
    with open_scorer(config) as scorer:
        collector = Collector(sampler, scorer, model.policy.decode)
        return evaluator(collector, prompts, samples, seed=seed)(model.params)


def _sampler(
    model: Loaded, prompts: Sequence[Prompt], samples: int, max_tokens: int
) -> PagedSampler:
    """A sampler with room for these prompts."""
    longest = rounded(max(len(prompt.tokens) for prompt in prompts), ROOM)
    slots = rounded(min(len(prompts) * samples, model.config.sampler.slots), row_shards(model.mesh))
    shapes = (longest, max_tokens, slots, samples)
    if shapes not in model.samplers:
        model.samplers[shapes] = fitted_sampler(
            model.config,
            model.policy,
            model.mesh,
            longest_prompt=longest,
            max_tokens=max_tokens,
            slots=slots,
            samples=samples,
        )
    return model.samplers[shapes]
