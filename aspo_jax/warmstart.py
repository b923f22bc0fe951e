"""Phase 1 of the embedded default: teach a new model the task's form from worked examples.

Supervised learning is the policy gradient with weight 1 and advantage 1 on given answers, so this
is the very update of phase 2 with another objective: `reinforce` under `token_mean` is the mean
negative log-likelihood. It stops at a held-out score, not at a time, so that phase 2 starts from
the same place on every machine, and its result is cached by what determines it.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.build import build_evaluate, check_shares
from aspo_jax.config import Config
from aspo_jax.config.sections import OF_ENGINES
from aspo_jax.data import CountdownSpec, demonstration, encode, problem, render
from aspo_jax.errors import UserError, describe, writing
from aspo_jax.files import (
    Damaged,
    check_digests,
    digests,
    read_sealed,
    sealed_text,
    write_text_atomic,
)
from aspo_jax.inputs import countdown_spec, held_out_prompts
from aspo_jax.learner import Goal, build_learner
from aspo_jax.losses import reinforce, token_mean
from aspo_jax.optimizers import adamw, clipped, learning_rate_schedule
from aspo_jax.parts import build_peers, build_sampler, open_scorer
from aspo_jax.policy import Policy, load_policy, save_policy
from aspo_jax.rollout import BatchShape, Collector, answered, fill
from aspo_jax.run.console import Console
from aspo_jax.run.folder import INITIAL_MODEL
from aspo_jax.run.records import has_results
from aspo_jax.structs import Minibatch, OldPolicy

VERSION = 2  # of the recipe below and of what its folder holds; part of the cache key
SEAL = "warm_start.json"  # digests of the files beside it, and the cache key


class WarmStartError(UserError):
    """The warm start did not reach its target."""


def warm_start(config: Config, mesh: Mesh, folder: Path, console: Console) -> Path:
    """The folder of a warm-started model: the run's own copy, from the cache or freshly trained.

    Raises:
        WarmStartError: the target was not reached within ``WarmStart.max_steps``, or the run's own
            copy is damaged and its checkpoints rest on it.
    """
    own, key = folder / INITIAL_MODEL, cache_key(config)
    cached = Path(config.warm_start.cache).expanduser() / key
    # Process 0 looks and writes, for all: a cache may be on one host only.
    if runtime.any_of(runtime.on_main(lambda: _find(own, cached, key, console)) or False):
        return own
    fresh = own.with_name(own.name + ".new")
    _train(config, mesh, fresh, console)
    runtime.on_main(lambda: _keep(fresh, own, cached, key, console))
    return own


def _find(own: Path, cached: Path, key: str, console: Console) -> bool:
    """Whether the run now has its own model: it had, or the cache has one that is whole."""
    if own.exists():
        problem = _problem(own, None if has_results(own.parent) else key)
        if problem is None:
            return True
        if has_results(own.parent):
            raise WarmStartError(
                f"{own}: {problem}; the run began from it, and its reference policy is read from "
                "there. Delete that folder: the same command makes the same model again"
            )
        console.note(f"warm start: {own} is made anew: {problem}")
        shutil.rmtree(own)
    if not cached.exists():
        return False
    if problem := _problem(cached, key):
        console.note(f"warm start: {cached} is not used but made anew: {problem}")
        return False
    console.note(f"warm start: found in {cached}")
    with writing(own):
        _copy(cached, own)
    return True


def _problem(folder: Path, key: str | None) -> str | None:
    """Why a warm-started model cannot be used; key: of the settings it must be made under."""
    try:
        seal = read_sealed(folder / SEAL)
        check_digests(folder, seal.get("files"))
    except FileNotFoundError:
        return f"it has no {SEAL}: it was never completed"
    except Damaged as problem:
        return str(problem)
    return None if key in (None, seal.get("key")) else "it was made under other settings"


def _keep(fresh: Path, own: Path, cached: Path, key: str, console: Console) -> None:
    """Seal a trained model as the run's own, and put a copy into the cache if that is possible."""
    write_text_atomic(fresh / SEAL, sealed_text({"key": key, "files": digests(fresh)}))
    fresh.rename(own)
    try:
        _copy(own, cached)
    except OSError as error:
        console.note(f"warm start: not kept for other runs: {describe(error, cached) or error}")


def _copy(source: Path, target: Path) -> None:
    """Copy a model so that the target is there whole or not at all; it replaces a damaged one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        shutil.copytree(source, partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_key(config: Config) -> str:
    """Digest of everything that the warm-started weights depend on."""
    used = ("Run.seed", "Countdown.", "Model.", "WarmStart.", "Sampler.", "Train.row_tokens")
    used_of_evaluate = tuple(f"Evaluate.{x}" for x in ("prompts", "samples", "seed", "temperature"))
    unused = ("WarmStart.cache", "Sampler.slots", "Sampler.cache_tokens", "Sampler.max_gap")
    unused += tuple(f"Sampler.{name}" for name in OF_ENGINES)  # this process draws here
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
    policy, spec = load_policy(config, None, mesh), countdown_spec(config)
    rate = learning_rate_schedule(w.learning_rate, w.warmup_steps, w.max_steps)
    optimizer = adamw(rate, policy.model.axes(), b2=w.b2, weight_decay=w.weight_decay)
    goal = Goal(reinforce(), token_mean)
    learner = build_learner(policy.model, policy.head, goal, clipped(optimizer, w.clip_norm), mesh)
    t, sequences = config.train, policy.model.attention.sequences
    shape = BatchShape(1, 1, w.batch_size, t.row_tokens, sequences)
    state = learner.init(policy.model.init(jax.random.key(config.run.seed)))
    progress = console.phase("warm start", w.max_steps, "steps", is_cap=True)
    with open_scorer(config) as scorer, progress as bar:
        collector = Collector(build_sampler(config, policy, mesh), scorer, policy.decode)
        evaluate = build_evaluate(config, collector, held_out_prompts(config, policy.tokenizer))
        average, reached = 0.0, f"held-out avg@{config.evaluate.samples}"
        for step in range(1, w.max_steps + 1):
            batch = _demonstrations(policy, spec, config.run.seed, step, shape)
            state, _ = learner.step(state, learner.place(batch))
            bar.advance()
            if step % w.eval_every == 0:
                average = evaluate(state.params)[0]["avg"]
                bar.advance(0, figures=f"{reached} {average:.3f} of {w.target}")
                if average >= w.target:
                    break
    if average < w.target:
        raise WarmStartError(
            f"the warm start reached {reached} {average:.3f} in {w.max_steps} steps, expected "
            f"WarmStart.target = {w.target}; raise WarmStart.max_steps or lower the target"
        )
    console.note(f"warm start: {reached} {average:.3f} after {step} steps")
    with writing(target_folder):
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
        response = [*encode(policy.tokenizer, answer), policy.tokenizer.eos_token_id]
        prompt = encode(policy.tokenizer, question)
        examples.append(answered(prompt, response, logp_T=0.0, advantage=1.0, group=0))
    minibatch = fill(examples, shape, peers.count)
    nothing: Any = np.zeros(minibatch.rows.target_BT.shape, np.float32)
    return Minibatch(minibatch.rows, minibatch.count, OldPolicy(nothing, nothing))
