"""`python -m aspo_jax.train`: the whole machine on one page.

    prompts -> sample -> grade -> advantage -> old log-probs -> update -> log, evaluate, save

Iteration i speaks of the policy after i iterations: its held-out scores (where due), its rollout
and the updates made from that rollout are one line of the log. Every random draw is named by the
run's seed and its place, so a run that was stopped or killed goes on as if it never had been.
Several processes (hosts) all run this page: each samples and grades its share of the prompts, an
update is one program over all devices, process 0 writes and speaks.
What one may swap is made in `parts.py`, what follows from it in `build.py`, the verbs are in
`steps.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from aspo_jax import runtime
from aspo_jax.agreement import SamplingError
from aspo_jax.build import build_machines, check_inputs
from aspo_jax.config import Config, read_config
from aspo_jax.errors import run_command
from aspo_jax.origin import fetch_weights, locate, locate_teacher
from aspo_jax.parts import FACTORIES, Parts
from aspo_jax.parts import parts as parts_of
from aspo_jax.rewards import RewardError
from aspo_jax.run.checkpoint import Checkpoints
from aspo_jax.run.console import Console
from aspo_jax.run.folder import CHECKPOINTS, RunLock
from aspo_jax.run.metrics import Clock, profile
from aspo_jax.run.records import check_config, claim_folder, keeping, lock_folder
from aspo_jax.run.stop import EXIT_SAVED, Interrupted, StopRequest
from aspo_jax.steps import (
    Run,
    check_first_update,
    closing,
    evaluate,
    finish,
    introduce,
    open_log,
    position,
    restore_or_init,
    resumed,
    roll_out,
    save,
    settle,
    speeds,
    update,
)
from aspo_jax.warmstart import warm_start


def main(argv: Sequence[str] | None = None) -> int:
    """Run a config; returns the exit status.

    0: done. 75: a signal stopped it and what it had done is saved; the same command goes on. 2:
    something that a person must mend, in one message: a mistake in the settings, a full disk,
    graders that fail. 1: a mistake of the program's, with a traceback. 128 + N: signal N, given
    twice, ended it at once. After each of them the same command goes on from what was saved.
    """
    words = sys.argv[1:] if argv is None else argv
    status = run_command(lambda: train(read_config(words, FACTORIES)))
    return runtime.leave(status) if status == 2 else status


def train(config: Config, parts: Parts | None = None) -> int:
    """Train, or go on training, in the config's run folder; returns the exit status, 0 or 75.

    parts: some of the config's own (`aspo_jax.parts.parts`), some swapped for others. The run
        folder knows the config alone: going on with the same parts is the caller's business.

    Raises:
        UserError: what a person must mend.
    """
    with StopRequest() as stop:
        try:
            with stop.interruptible():
                here = config.runtime
                runtime.join(here.coordinator, here.num_processes, here.process_id)
                console = Console(is_quiet=not runtime.is_main())
                config = locate(config, config.run_folder, console.note)
                config = locate_teacher(config, config.run_folder, console.note)
                sizes = config.derived() if parts else check_inputs(config)
            stop.agree = None if runtime.is_alone() else runtime.any_of
            compilations = runtime.compilations(console.compiling, console.compiled)
            with lock_folder(config) as lock, console, compilations:
                console.title(config, sizes)
                return _train(config, parts, console, stop, lock)
        except Interrupted:
            note = "stopped before an iteration: nothing new to save, the same command goes on"
            Console(is_quiet=not runtime.is_main()).note(note)
            return EXIT_SAVED


def _train(
    config: Config, parts: Parts | None, console: Console, stop: StopRequest, lock: RunLock
) -> int:
    """Train in the locked run folder. Raises Interrupted: a signal before the first iteration."""
    folder = check_config(config)
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    with stop.interruptible():
        fetch_weights(config, console.note)
        model_folder = config.model_folder or warm_start(config, mesh, folder, console)
    with stop.interruptible():
        m = build_machines(config, parts or parts_of(config, mesh), model_folder, mesh)
    introduce(config, m, console)

    checkpoints = Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep, lock.check)
    with (
        m.collector.scorer,
        closing(m),
        checkpoints,
        keeping(checkpoints),
        console.phase("training", config.train.iterations, "iterations") as bar,
    ):
        state, done = restore_or_init(checkpoints, m)
        claim_folder(config, model_folder)
        checkpoints.remove_leftovers()
        bar.begin_at(done)
        log = open_log(config, m.parts.writers, done, console)
        run = Run(config, m, folder, checkpoints, log, Clock(), console, lock)
        if done:
            console.note(resumed(run, done))
        place = position(m)
        try:
            for i in range(done, config.train.iterations):
                with profile(i, config.metrics.profile_iterations, folder / "profile"):
                    with stop.interruptible():
                        if i % (config.evaluate.every or config.train.iterations) == 0:
                            evaluate(run, state, i)
                        minibatches, figures = roll_out(run, state, i)
                    state, report = update(run, state, minibatches)
                    check_first_update(config, report)
                done, place = i + 1, position(m)
                laps = run.clock.lap()
                log.write(i, figures | report | laps | speeds(config, figures, laps))
                log.end_row()
                bar.advance()
                if done % config.checkpoint.every == 0 or done == config.train.iterations:
                    save(run, state, done, place)
            with stop.interruptible():
                evaluate(run, state, done)
            settle(run, done)
        except (Interrupted, SamplingError, RewardError) as reason:
            save(run, state, done, place)
            runtime.on_main(checkpoints.wait)
            if not isinstance(reason, Interrupted):
                raise
            console.note(f"stopped after {done} iterations, saved; the same command goes on")
            return EXIT_SAVED
        log.close()
    with keeping(checkpoints):
        finish(run, state, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
