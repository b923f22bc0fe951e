"""`python -m aspo_jax.train`: the whole machine on one page.

    prompts -> sample -> grade -> advantage -> old log-probs -> update -> log, evaluate, save

Iteration i speaks of the policy after i iterations: its held-out scores (where due), its rollout
and the updates made from that rollout are one line of the log. Every random draw is named by the
run's seed and its place, so a run that was stopped or killed goes on as if it never had been.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax

from aspo_jax import plot, runtime
from aspo_jax.build import FACTORIES, Machines, build_machines, parameter_count, save_policy
from aspo_jax.checkpoint import (
    EXIT_SAVED,
    CheckpointError,
    Checkpoints,
    Interrupted,
    RunFolderError,
    RunLocked,
    StopRequest,
    lock_run,
)
from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.console import Console
from aspo_jax.data import DataError
from aspo_jax.metrics import Clock, Log, profile
from aspo_jax.model import ModelFolderError
from aspo_jax.records import before_and_after, claim_folder, write_transcripts
from aspo_jax.rollout import assemble, draw, judge, transcripts
from aspo_jax.sampler import TRAIN
from aspo_jax.structs import Minibatch, TrainState, merge_metrics
from aspo_jax.warmstart import WarmStartError, warm_start

USER_ERRORS = (
    *(CheckpointError, ConfigError, DataError, ModelFolderError, RunFolderError, RunLocked),
    *(WarmStartError, runtime.MeshError),
)


class Run(NamedTuple):
    """A run under way: its settings, machines and records."""

    config: Config
    machines: Machines
    folder: Path
    checkpoints: Checkpoints
    log: Log
    clock: Clock


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config. Exit status: 0 done, 2 a mistake of the user's, 75 stopped and saved."""
    console = Console()
    try:
        config = read_config(sys.argv[1:] if argv is None else argv, FACTORIES)
        with lock_run(config.run_folder), StopRequest() as stop:
            return train(config, console, stop)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(config: Config, console: Console, stop: StopRequest) -> int:
    folder = claim_folder(config)
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    console.title(config)
    try:
        with stop.interruptible():
            model_folder = config.model.path or warm_start(config, mesh, folder, console)
    except Interrupted:
        console.note("stopped during the warm start: nothing to save, it will begin anew")
        return EXIT_SAVED
    m = build_machines(config, model_folder, mesh)
    console.note(f"{parameter_count(m.params):,} parameters, {jax.device_count()} device(s)")

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    with m.scorer, checkpoints, console.phase("training", config.train.iterations) as bar:
        state, done = restore_or_init(checkpoints, m, config)
        bar.advance(done)
        log = Log(folder, done, config.metrics.tensorboard, on_row=console.iteration)
        run = Run(config, m, folder, checkpoints, log, Clock())
        position = m.prompts.state()
        try:
            for i in range(done, config.train.iterations):
                with profile(i, config.metrics.profile_iterations, folder / "profile"):
                    with stop.interruptible():
                        if i % (config.evaluate.every or config.train.iterations) == 0:
                            evaluate(run, state, i)
                        minibatches, figures = roll_out(run, state)
                    state, report = update(run, state, minibatches)
                done, position = i + 1, m.prompts.state()
                laps = run.clock.lap()
                log.write(i, figures | report | laps | speeds(config, figures, laps))
                bar.advance()
                if done % config.checkpoint.every == 0 or done == config.train.iterations:
                    save(run, state, done, position)
            with stop.interruptible():
                evaluate(run, state, done)
        except Interrupted:
            save(run, state, done, position)
            checkpoints.wait()
            console.note(f"stopped after {done} iterations, saved; the same command goes on")
            return EXIT_SAVED
        log.close()
    finish(run, state, console)
    return 0


def restore_or_init(
    checkpoints: Checkpoints, m: Machines, config: Config
) -> tuple[TrainState, int]:
    """The newest verified checkpoint of this run folder, else the initial model."""
    state = m.learner.init(m.params)
    restored = checkpoints.restore(state)
    if restored is None:
        return state, 0
    m.prompts.restore(restored.meta["data_position"])
    return restored.state, restored.meta["iteration"]


def roll_out(run: Run, state: TrainState) -> tuple[list[Minibatch], dict[str, Any]]:
    """This iteration's prompts, answers, verdicts, advantages and old log-probabilities."""
    m, train, clock = run.machines, run.config.train, run.clock
    prompts = next(m.prompts)
    with clock("sample"):
        m.sampler.start(state.params)
        completions = draw(
            m.sampler, m.policy.codec, prompts, train.samples_per_prompt, domain=TRAIN
        )
    with clock("grade"):
        rollout = judge(m.scorer, m.policy.codec, prompts, completions)
    minibatches, figures = assemble(rollout, m.advantage, m.shape)
    with clock("score"):
        placed = [m.learner.place(part) for part in minibatches]
        old = [m.learner.old_policy(state.params, m.reference, part) for part in placed]
        minibatches = [
            dataclasses.replace(part, old=old_policy)
            for part, old_policy in zip(placed, old, strict=True)
        ]
        jax.block_until_ready(minibatches)
    return minibatches, figures


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


def evaluate(run: Run, state: TrainState, iteration: int) -> None:
    """Score the policy on the held-out prompts."""
    with run.clock("evaluate"):
        scores, rollout = run.machines.evaluate(state.params)
    run.log.write(iteration, {f"evaluate/{k}": v for k, v in scores._asdict().items()})
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
    """Export, draw and say where everything is."""
    folder, name = run.folder, run.config.name
    save_policy(run.machines.policy, state.params, folder / "model")
    plot.draw([folder], None, folder / "dynamics.png")
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


if __name__ == "__main__":
    sys.exit(main())
