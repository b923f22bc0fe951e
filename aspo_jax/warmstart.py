"""Phase 1 of the embedded default: teach a new model the task's form from worked examples.

Supervised learning is the policy gradient with weight 1 and advantage 1 on given answers, so this
is the very update of phase 2 with another objective: `reinforce` under `token_mean` is the mean
negative log-likelihood. It stops at a held-out score, not at a time, so that phase 2 starts from
the same place on every machine, and its result is cached by what determines it.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.build import (
    Policy,
    build_evaluate,
    build_peers,
    build_sampler,
    check_shares,
    countdown_spec,
    new_policy,
    open_scorer,
    save_policy,
)
from aspo_jax.config import Config
from aspo_jax.console import Console
from aspo_jax.data import CountdownSpec, demonstration, problem, render
from aspo_jax.errors import UserError
from aspo_jax.learner import Goal, build_learner, clipped_adamw, learning_rate_schedule
from aspo_jax.losses import reinforce, token_mean
from aspo_jax.rollout import BatchShape, Example, fill
from aspo_jax.structs import Minibatch, OldPolicy

VERSION = 2  # of the recipe below and of what its folder holds; part of the cache key
INITIAL_MODEL = "initial_model"


class WarmStartError(UserError):
    """The warm start did not reach its target."""


def warm_start(config: Config, mesh: Mesh, folder: Path, console: Console) -> Path:
    """The folder of a warm-started model: the run's own copy, from the cache or freshly trained.

    Raises:
        WarmStartError: the target was not reached within ``WarmStart.max_steps``.
    """
    own = folder / INITIAL_MODEL
    # Process 0 looks and writes, for all: a cache may be on one host only.
    if runtime.any_of(runtime.is_main() and own.is_dir()):
        return own
    cached = Path(config.warm_start.cache).expanduser() / cache_key(config)
    if runtime.any_of(runtime.is_main() and cached.is_dir()):
        console.note(f"warm start: found in {cached}")
    else:
        _train(config, mesh, cached, console)
    runtime.on_main(lambda: _copy(cached, own))
    return own


def _copy(cached: Path, own: Path) -> None:
    partial = own.with_name(own.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(cached, partial)
    partial.rename(own)


def cache_key(config: Config) -> str:
    """Digest of everything that the warm-started weights depend on."""
    used = ("Run.seed", "Countdown.", "Model.", "WarmStart.", "Sampler.", "Train.row_tokens")
    used_of_evaluate = tuple(f"Evaluate.{x}" for x in ("prompts", "samples", "seed", "temperature"))
    unused = ("WarmStart.cache", "Sampler.slots", "Sampler.cache_tokens", "Sampler.max_gap")
    relevant = {
        name: value
        for name, value in config.bindings().items()
        if name.startswith((*used, *used_of_evaluate)) and name not in unused
    }
    text = f"{VERSION} {relevant}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _train(config: Config, mesh: Mesh, target_folder: Path, console: Console) -> None:
    """Train until the held-out score is reached and write the folder."""
    check_shares(config, mesh)
    w = config.warm_start
    policy, spec = new_policy(config, mesh), countdown_spec(config)
    optimizer = clipped_adamw(
        learning_rate_schedule(w.learning_rate, w.warmup_steps, w.max_steps),
        betas=(0.9, w.b2),
        eps=1e-8,
        weight_decay=w.weight_decay,
        clip_norm=w.clip_norm,
    )
    learner = build_learner(
        policy.model, policy.head, Goal(reinforce(), token_mean), optimizer, mesh
    )
    shape = BatchShape(1, 1, w.batch_size, config.train.row_tokens, config.train.pack)
    state = learner.init(policy.model.init(jax.random.key(config.run.seed)))
    progress = console.phase("warm start", w.max_steps, "steps", is_cap=True)
    with open_scorer(config) as scorer, progress as bar:
        sampler = build_sampler(config, policy, mesh)
        evaluate = build_evaluate(config, policy, sampler, scorer, mesh)
        average, k = 0.0, config.evaluate.samples
        for step in range(1, w.max_steps + 1):
            batch = _demonstrations(policy, spec, config.run.seed, step, shape)
            state, _ = learner.step(state, learner.place(batch))
            bar.advance()
            if step % w.eval_every == 0:
                average = evaluate(state.params)[0].avg
                bar.advance(0, figures=f"held-out avg@{k} {average:.3f} of {w.target}")
                if average >= w.target:
                    break
    if average < w.target:
        raise WarmStartError(
            f"the warm start reached held-out avg@{config.evaluate.samples} {average:.3f} in "
            f"{w.max_steps} steps, expected WarmStart.target = {w.target}; raise "
            "WarmStart.max_steps or lower the target"
        )
    console.note(
        f"warm start: held-out avg@{config.evaluate.samples} {average:.3f} after {step} steps"
    )
    save_policy(policy, state.params, target_folder)


def _demonstrations(
    policy: Policy, spec: CountdownSpec, seed: int, step: int, shape: BatchShape
) -> Minibatch:
    """This process's share of the step's worked examples, each a function of (seed, its index)."""
    examples, peers = [], build_peers()
    for index in range(step * shape.rows + peers.index, (step + 1) * shape.rows, peers.count):
        drawn = problem(spec, seed, index, "train")
        answer = demonstration(drawn, random.Random(f"demonstration {seed} {index}"))
        question = render(policy.tokenizer, [{"role": "user", "content": drawn.text}])
        response = [*policy.codec.encode(answer), policy.tokenizer.eos_token_id]
        examples.append(Example(policy.codec.encode(question), response, 1.0, 0.0, 0))
    minibatch = fill(examples, shape._replace(rows=shape.rows // peers.count))
    nothing: Any = np.zeros(minibatch.rows.target_BT.shape, np.float32)
    return Minibatch(minibatch.rows, minibatch.count, OldPolicy(nothing, nothing))
