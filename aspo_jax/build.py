"""From a config to machines: the one place that knows both.

Below this file no function sees a config; each takes values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from aspo_jax import losses
from aspo_jax.config import Config, ConfigError
from aspo_jax.data import (
    CHARACTERS,
    CountdownSource,
    CountdownSpec,
    PromptStream,
    allowed_ids,
    build_character_tokenizer,
    encode,
    load_tokenizer,
    max_response_tokens,
    prompts,
    read_jsonl,
)
from aspo_jax.evaluation import Scores, scores
from aspo_jax.head import Head
from aspo_jax.learner import Goal, Learner, build_learner, clipped_adamw, learning_rate_schedule
from aspo_jax.model import (
    Model,
    ModelConfig,
    build_model,
    load_params,
    read_model_config,
    save_model,
    shardings,
)
from aspo_jax.rewards import GRADERS, Scorer, build_scorer, overlong_ramp
from aspo_jax.rollout import BatchShape, Codec, Rollout, batch_shape, draw, judge
from aspo_jax.sampler import EVALUATE, BatchSampler, Limits, Sampler, Truncation

FACTORIES = {
    "objective": losses.OBJECTIVES,
    "advantage": losses.ADVANTAGES,
    "aggregate": losses.AGGREGATES,
}


class Policy(NamedTuple):
    """A network, its tokenizer and how its logits become a distribution; weights are apart."""

    model: Model
    tokenizer: Any
    codec: Codec
    head: Head


class Machines(NamedTuple):
    """Everything a run is made of.

    evaluate: params -> (held-out scores, the rollout they were counted on).
    reference: bfloat16 weights of the frozen reference policy; None when no rule reads it.
    learning_rate: number of updates applied -> rate of the next one.
    """

    policy: Policy
    params: Any
    reference: Any
    sampler: Sampler
    scorer: Scorer
    learner: Learner
    advantage: losses.Advantage
    shape: BatchShape
    prompts: PromptStream
    evaluate: Callable[[Any], tuple[Scores, Rollout]]
    learning_rate: optax.Schedule


def build_machines(config: Config, folder: str | Path, mesh: Mesh) -> Machines:
    """All machines of a run that starts from the model in ``folder``."""
    policy = load_policy(config, folder)
    goal = build_goal(config)
    optimizer, rate = build_optimizer(config)
    weights = shardings(mesh, policy.model.partition_specs())
    params = jax.device_put(load_params(folder, policy.model.config), weights)
    sampler = build_sampler(config, policy, mesh)
    scorer = open_scorer(config)
    return Machines(
        policy=policy,
        params=params,
        reference=_reference(params) if losses.reads(goal.objective, "ref_logp_BT") else None,
        sampler=sampler,
        scorer=scorer,
        learner=build_learner(policy.model, policy.head, goal, optimizer, mesh),
        advantage=_make(config, "advantage", config.objective.advantage),
        shape=build_shape(config),
        prompts=build_prompts(config, policy.tokenizer),
        evaluate=build_evaluate(config, policy, sampler, scorer, mesh),
        learning_rate=rate,
    )


def _reference(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


# --- the policy -------------------------------------------------------------------------------


def load_policy(config: Config, folder: str | Path) -> Policy:
    """The policy of a Hugging Face folder."""
    return _policy(config, read_model_config(folder), load_tokenizer(folder))


def new_policy(config: Config) -> Policy:
    """An untrained policy of the config's sizes with a character tokenizer."""
    tokenizer = build_character_tokenizer(CHARACTERS)
    m = config.model
    names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
    sizes = {name: getattr(m, name) for name in names}
    if missing := [f"Model.{name}" for name, value in sizes.items() if value is None]:
        raise ConfigError(f"a new model needs {', '.join(missing)}; set them or Model.path")
    shape = ModelConfig(
        vocab_size=len(tokenizer),
        head_dim=sizes["hidden_size"] // sizes["heads"],
        rope_theta=m.rope_theta,
        tie_embeddings=m.tie_embeddings,
        **sizes,
    )
    return _policy(config, shape, tokenizer)


def _policy(config: Config, shape: ModelConfig, tokenizer: Any) -> Policy:
    model = build_model(shape, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
    codec = Codec(
        encode=functools.lru_cache(4096)(lambda text: tuple(encode(tokenizer, text))),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )
    head = Head(
        temperature=config.sampler.temperature,
        is_allowed_V=allowed_ids(tokenizer, shape.vocab_size),
        chunk=config.train.head_chunk,
    )
    return Policy(model, tokenizer, codec, head)


def save_policy(policy: Policy, params: Any, folder: str | Path) -> None:
    """Write a folder that `transformers` loads."""
    save_model(
        folder,
        params,
        policy.model.config,
        policy.tokenizer.save_pretrained,
        eos_token_id=policy.tokenizer.eos_token_id,
    )


# --- prompts and rewards ----------------------------------------------------------------------


def countdown_spec(config: Config) -> CountdownSpec:
    """The puzzle; an answer longer than the response limit is an error, not a silent ceiling."""
    spec = CountdownSpec(**dataclasses.asdict(config.countdown))
    limit, longest = config.sampler.max_response_tokens, max_response_tokens(spec)
    if longest > limit:
        raise ConfigError(
            f"Sampler.max_response_tokens is {limit}, but right answers to these puzzles have up "
            f"to {longest} tokens; raise it to {longest}"
        )
    return spec


def build_prompts(config: Config, tokenizer: Any) -> PromptStream:
    """The endless stream of training prompts."""
    if config.data.kind == "countdown":
        source = CountdownSource(countdown_spec(config), config.run.seed, "train")
    else:
        source = read_jsonl(cast(str, config.data.train_path), kinds=GRADERS)
    return prompts(
        source,
        tokenizer=tokenizer,
        seed=config.run.seed,
        shuffle=config.data.kind == "jsonl",
        prompts_per_step=config.train.prompts_per_step,
        max_prompt_tokens=config.sampler.max_prompt_tokens,
    )


def held_out_prompts(config: Config, tokenizer: Any) -> list:
    """The prompts of every evaluation, the same for all runs with one ``Evaluate.seed``."""
    wanted = config.evaluate.prompts
    if config.data.kind == "countdown":
        source = CountdownSource(countdown_spec(config), config.evaluate.seed, "held_out", wanted)
    else:
        source = read_jsonl(cast(str, config.data.eval_path), kinds=GRADERS)[:wanted]
    stream = prompts(
        source,
        tokenizer=tokenizer,
        seed=0,
        shuffle=False,
        prompts_per_step=len(source),
        max_prompt_tokens=config.sampler.max_prompt_tokens,
    )
    return next(stream)


def open_scorer(config: Config) -> Scorer:
    """Start the grading processes."""
    reward = config.reward
    shape = overlong_ramp(
        config.sampler.max_response_tokens, reward.overlong_buffer, reward.overlong_factor
    )
    return build_scorer(reward.workers, reward.timeout_s, shape)


# --- sampling and evaluation ------------------------------------------------------------------


def build_sampler(config: Config, policy: Policy, mesh: Mesh) -> BatchSampler:
    """The sampler of training rollouts."""
    s = config.sampler
    return BatchSampler(
        policy.model,
        policy.head,
        Limits(s.max_prompt_tokens, s.max_response_tokens, s.slots, policy.tokenizer.eos_token_id),
        mesh,
        seed=config.run.seed,
        truncation=Truncation(s.top_k, s.top_p),
    )


def build_evaluate(
    config: Config, policy: Policy, sampler: BatchSampler, scorer: Scorer, mesh: Mesh
) -> Callable[[Any], tuple[Scores, Rollout]]:
    """Held-out evaluation with paired sampling keys: every call draws with the same randomness."""
    held_out = held_out_prompts(config, policy.tokenizer)
    if config.evaluate.temperature != policy.head.temperature:
        head = policy.head._replace(temperature=config.evaluate.temperature)
        sampler = build_sampler(config, policy._replace(head=head), mesh)

    def evaluate(params: Any) -> tuple[Scores, Rollout]:
        sampler.start(params)
        completions = draw(
            sampler,
            policy.codec,
            held_out,
            config.evaluate.samples,
            domain=EVALUATE,
            retry=config.evaluate.seed,
        )
        rollout = judge(scorer, policy.codec, held_out, completions)
        return scores(
            rollout.is_right_PG, rollout.texts_PG, rollout.is_finished_PG, rollout.length_PG
        ), rollout

    return evaluate


# --- the update -------------------------------------------------------------------------------


def _make(config: Config, kind: str, name: str) -> Any:
    try:
        return FACTORIES[kind][name](**config.factories.get(name, {}))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_goal(config: Config) -> Goal:
    """Objective, penalties and aggregation by their names."""
    names = (config.objective.name, *config.objective.penalties)
    rules = [_make(config, "objective", name) for name in names]
    return Goal(
        objective=losses.chain(*rules) if len(rules) > 1 else rules[0],
        aggregate=_make(config, "aggregate", config.objective.aggregate),
        entropy_bonus=config.objective.entropy_bonus,
    )


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW of the RL phase and its learning rate."""
    o = config.optim
    t = config.train
    updates = t.iterations * t.epochs * (t.prompts_per_step // t.prompts_per_minibatch)
    rate = learning_rate_schedule(
        o.learning_rate, o.warmup_updates, updates if o.schedule == "linear" else None
    )
    optimizer = clipped_adamw(
        rate,
        betas=(o.b1, o.b2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )
    return optimizer, rate


def build_shape(config: Config) -> BatchShape:
    """The fixed shapes of an iteration's updates."""
    t, s = config.train, config.sampler
    return batch_shape(
        prompts_per_step=t.prompts_per_step,
        prompts_per_minibatch=t.prompts_per_minibatch,
        samples_per_prompt=t.samples_per_prompt,
        longest=s.max_prompt_tokens + s.max_response_tokens - 1,
        row_tokens=t.row_tokens,
        rows=t.rows_per_microbatch,
    )


def parameter_count(params: Any) -> int:
    """Number of weights."""
    return int(sum(np.prod(x.shape) for x in jax.tree.leaves(params)))
