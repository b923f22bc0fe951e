"""The verbs of the loop in `train.py`; none of them decides what comes next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax

from aspo_jax import runtime
from aspo_jax.agreement import SamplingError, gap_metrics
from aspo_jax.build import Machines, save_policy
from aspo_jax.checkpoint import Checkpoints
from aspo_jax.config import Config
from aspo_jax.console import Console
from aspo_jax.errors import writing
from aspo_jax.figures import dynamics
from aspo_jax.metrics import Clock, Log, read_metrics
from aspo_jax.records import Silent, before_and_after, write_transcripts
from aspo_jax.rollout import assemble, check_failures, draw, judge, submitter, transcripts
from aspo_jax.run_folder import RunLock
from aspo_jax.sampler import TRAIN
from aspo_jax.structs import Minibatch, TrainState, merge_metrics


class Run(NamedTuple):
    """A run under way: its settings, machines and records."""

    config: Config
    machines: Machines
    folder: Path
    checkpoints: Checkpoints
    log: Log | Silent
    clock: Clock
    lock: RunLock


def restore_or_init(checkpoints: Checkpoints, m: Machines) -> tuple[TrainState, int]:
    """The newest verified checkpoint of this run folder, else the initial model."""
    state = m.learner.init(m.params)
    restored = checkpoints.restore(state)
    if restored is None:
        return state, 0
    m.prompts.restore(restored.meta["data_position"])
    return restored.state, restored.meta["iteration"]


def roll_out(run: Run, state: TrainState) -> tuple[list[Minibatch], dict[str, Any]]:
    """This iteration's prompts, answers, verdicts, advantages and old log-probabilities.

    Each process samples and grades its own share; the mini-batches and figures are those of all.
    """
    m, train, clock = run.machines, run.config.train, run.clock
    prompts = next(m.prompts)
    codec, G = m.policy.codec, train.samples_per_prompt
    iteration = prompts[0].draw // train.prompts_per_step
    with m.scorer.begin() as grading:
        hand_in = submitter(grading, codec, prompts, G, domain=TRAIN, iteration=iteration)
        with clock("sample"):
            m.sampler.start(state.params)
            completions = draw(m.sampler, codec, prompts, G, domain=TRAIN, finished=hand_in)
            m.sampler.release()
        with clock("grade"):
            rollout = judge(grading, codec, prompts, completions, m.reward_shape)
    check_failures(rollout, run.config.reward.max_failures)
    minibatches, figures = assemble(rollout, m.advantage, m.shape, m.peers)
    with clock("score"):
        placed = [m.learner.place(part) for part in minibatches]
        old = [m.learner.old_policy(state.params, m.reference, part) for part in placed]
        minibatches = [
            dataclasses.replace(part, old=old_policy)
            for part, old_policy in zip(placed, old, strict=True)
        ]
        jax.block_until_ready(minibatches)
    return minibatches, figures | check_agreement(run.config, minibatches, figures)


def check_agreement(
    config: Config, minibatches: Sequence[Minibatch], figures: dict[str, Any]
) -> dict[str, Any]:
    """How far the sampler's log-probabilities are from the old policy's.

    Raises:
        SamplingError: too far, or samples are broken and the config says to stop then.
    """
    s, broken = config.sampler, figures["rollout/sampler_failures"]
    if broken and s.nonfinite == "stop":
        raise SamplingError(
            f"{broken:.0f} samples ended in a distribution that is not finite; the weights or the "
            "sampler are broken. Sampler.nonfinite = 'drop' goes on without such samples"
        )
    gaps = reduce(_merge, (_gap_metrics(part.rows, part.old) for part in minibatches))
    mean = gaps["sampler_gap_mean"]
    if float(mean.total) > s.max_gap * float(mean.count):
        raise SamplingError(
            f"the sampler's log-probabilities are {float(mean.total) / float(mean.count):.3g} nats "
            f"from the trainer's on average, expected at most Sampler.max_gap = {s.max_gap}; "
            f"`python -m aspo_jax.check --config {config.name}` shows where"
        )
    return {f"update/{name}": gap for name, gap in gaps.items()}


def update(
    run: Run, state: TrainState, minibatches: Sequence[Minibatch]
) -> tuple[TrainState, dict[str, Any]]:
    """Epochs times mini-batches of the jitted step; the report covers all of them."""
    m, reports = run.machines, []
    with run.clock("update"):
        for _ in range(run.config.train.epochs):
            for part in minibatches:
                state, report = m.learner.step(state, part)
                reports.append(report)
        # The next thing is to sample from the new weights: waiting here costs nothing and makes
        # the times of the phases true.
        jax.block_until_ready(state)
    merged = reduce(_merge, reports)
    rate = m.learning_rate(state.step - 1)
    return state, {f"update/{k}": v for k, v in merged.items()} | {"update/learning_rate": rate}


def speeds(config: Config, figures: dict[str, float], laps: dict[str, float]) -> dict[str, float]:
    """Tokens per second of sampling and of training."""
    samples = config.train.prompts_per_step * config.train.samples_per_prompt
    sampled = figures["rollout/response_length"] * samples
    trained = figures["rollout/train_tokens"] * config.train.epochs
    return {
        "speed/sample": sampled / laps["seconds/sample"],
        "speed/train": trained / laps["seconds/update"],
    }


_merge = jax.jit(merge_metrics)
_gap_metrics = jax.jit(gap_metrics)


def evaluate(run: Run, state: TrainState, iteration: int) -> None:
    """Score the policy on the held-out prompts."""
    run.lock.check()
    with run.clock("evaluate"):
        scores, rollout = run.machines.evaluate(state.params)
    run.log.write(iteration, {f"evaluate/{k}": v for k, v in scores._asdict().items()})
    if runtime.is_main():
        shown = transcripts(rollout, run.config.metrics.transcripts)
        write_transcripts(run.folder, iteration, shown)


def save(run: Run, state: TrainState, done: int, position: int) -> None:
    """Start saving the state after ``done`` iterations; the log is safe before the checkpoint."""
    with run.clock("save"):
        run.log.flush()
        meta = {
            "iteration": done,
            "data_position": position,
            "seed": run.config.run.seed,
            "config": run.config.text(),
        }
        run.checkpoints.save(done, state, meta)


def finish(run: Run, state: TrainState, console: Console) -> None:
    """Export, draw and say where everything is; one process does, the others wait."""
    dtype, target = run.config.run.export_dtype, run.folder / "model"
    run.lock.check()
    with writing(target):
        save_policy(run.machines.policy, state.params, target, dtype)
    run.lock.check()
    runtime.on_main(lambda: _conclude(run, console))


def _conclude(run: Run, console: Console) -> None:
    folder, name = run.folder, run.config.name
    with writing(folder / "dynamics.png"):
        dynamics({folder.name: read_metrics(folder / "metrics.jsonl")}, folder / "dynamics.png")
    paths = {
        "model (Hugging Face)": folder / "model",
        "checkpoints": folder / "checkpoints",
        "metrics": folder / "metrics.jsonl",
        "TensorBoard": folder / "tensorboard",
        "pictures": folder / "dynamics.png",
        "samples": folder / "transcripts",
    }
    console.final(
        *before_and_after(folder),
        {label: str(path) for label, path in paths.items()},
        f"python -m aspo_jax.train --config {name} --set Objective.name=dapo",
    )
