"""The verbs of the loop in `train.py`; two may end a run by an error, none says what is next."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aspo_jax import runtime
from aspo_jax.agreement import SamplingError, gap_metrics
from aspo_jax.build import Machines
from aspo_jax.config import Config
from aspo_jax.errors import writing
from aspo_jax.files import write_text_atomic
from aspo_jax.policy import parameter_count, save_policy
from aspo_jax.recording import Trained, rollout_rows, write_rollout
from aspo_jax.refill import refill
from aspo_jax.rollout import (
    Enough,
    Judged,
    Occasion,
    Rollout,
    Selection,
    assemble,
    check_failures,
    collect,
    held_out_transcripts,
    judge,
    training_transcripts,
)
from aspo_jax.rounding import rounding_cost
from aspo_jax.run.checkpoint import Checkpoints
from aspo_jax.run.console import Bar, Console
from aspo_jax.run.folder import ADAPTER, CHECKPOINTS, METRICS, MODEL, RunLock
from aspo_jax.run.metrics import Clock, Log, read_metrics, update_name
from aspo_jax.run.records import before_and_after, next_command
from aspo_jax.run.writers import JsonLines, Open, Start, rows_to
from aspo_jax.sampler import TRAIN
from aspo_jax.structs import (
    Mean,
    Metrics,
    Minibatch,
    OldPolicy,
    Prompt,
    Rows,
    TrainState,
    merge_metrics,
)
from aspo_jax.weights import save_trained_adapter


class Run(NamedTuple):
    """A run under way: its settings, machines and records."""

    config: Config
    machines: Machines
    folder: Path
    checkpoints: Checkpoints
    log: Log
    clock: Clock
    console: Console
    lock: RunLock

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Bar]:
        """Time a phase and show how far it is."""
        doing = f"{name.removesuffix('e')}ing"
        with self.clock(name), self.console.phase(doing, total, unit) as bar:
            yield bar


def introduce(config: Config, m: Machines, console: Console) -> None:
    """Say what was built."""
    count, attention = parameter_count(m.learner.state.params), m.parts.policy.model.attention
    if m.frozen is None:
        parameters = f"{count:,} parameters"
    else:
        parameters = f"{count:,} trained parameters beside {parameter_count(m.frozen):,} frozen"
    console.note(f"{parameters}, {jax.device_count()} device(s)")
    console.note(f"attention: {attention.name} ({attention.reason})")
    if m.learner.options.said:
        console.note(f"compiler options of the update: {m.learner.options.said}")
    if config.train.old_logp == "sampler":
        console.note(
            "old log-probabilities: the sampler's, no pass is made for them; the first ratio of an "
            "iteration is 1 but for the gap between sampler and trainer (update/sampler_gap_max)"
        )
    if (said := getattr(m.parts.sampler, "description", "")) and runtime.is_main():
        console.note(said)


def closing(m: Machines) -> contextlib.AbstractContextManager[Any]:
    """Ends what the sampler has started outside this process, if it has."""
    close = getattr(m.parts.sampler, "close", None)
    return contextlib.nullcontext() if close is None else contextlib.closing(m.parts.sampler)


def restore_or_init(checkpoints: Checkpoints, m: Machines) -> tuple[TrainState, int]:
    """The newest verified checkpoint of this run folder, else the initial model."""
    restored = checkpoints.restore(m.learner.state)
    if restored is None:
        return m.learner.init(m.initial_params()), 0
    m.parts.prompts.restore(restored.meta["data_position"])
    m.history.restore(restored.meta.get("history", {}))  # absent before there was any
    return restored.state, restored.meta["iteration"]


def open_log(config: Config, writers: Sequence[Open], done: int, console: Console) -> Log:
    """The log of a run that has ``done`` iterations; of other processes than the first, none."""
    if not runtime.is_main():
        return Log()
    start = Start(Path(config.run_folder), done, config.bindings())
    return Log(done, [open_(start) for open_ in (JsonLines, *writers, rows_to(console.iteration))])


def resumed(run: Run, done: int) -> str:
    """Where a run goes on that has ``done`` iterations."""
    saved = (run.folder / CHECKPOINTS / str(done)).stat().st_mtime
    when = datetime.datetime.fromtimestamp(saved).isoformat(" ", "minutes")
    total = run.config.train.iterations
    return f"going on after {done} of {total} iterations (checkpoint of {when})"


def roll_out(run: Run, state: TrainState, iteration: int) -> tuple[list[Minibatch], dict[str, Any]]:
    """This iteration's prompts, answers, verdicts, advantages and old log-probabilities.

    Each process samples and grades its own share; the mini-batches and figures are those of all.
    """
    m = run.machines
    rollout, selection = sample(run, state, iteration)
    keep_transcripts(run, "train", iteration, training_transcripts, rollout)
    check_failures(rollout, run.config.reward.max_failures, m.peers)
    how = (m.parts.advantage, m.shape, m.peers, selection)
    assembled, figures = assemble(rollout, *how, history=m.history, signal=m.signal)
    minibatches = [part for part in assembled if part.count]  # counts are the same on all processes
    with run.phase("score", len(minibatches), "minibatches") as bar:
        placed, weights = [m.learner.place(part) for part in minibatches], m.weights(state.params)
        minibatches = [m.learner.with_old(weights, m.reference, part, m.teacher) for part in placed]
        for part in minibatches:
            jax.block_until_ready(part)
            bar.advance()
    keep_rollout(run, iteration, rollout, assembled, minibatches)
    return minibatches, figures | check_agreement(run.config, minibatches, figures)


def sample(run: Run, state: TrainState, iteration: int) -> tuple[Rollout, Selection | None]:
    """The samples of one round of prompts, or with refill of several and which groups train."""
    m, train = run.machines, run.config.train

    def draw_prompts() -> Sequence[Prompt]:
        with run.clock("data"):
            return next(m.parts.prompts)

    asked = (m.collector, m.weights(state.params))
    if not train.refill_rounds:
        when = {"domain": TRAIN, "iteration": iteration}
        prompts = draw_prompts()
        return collect(*asked, prompts, train.samples_per_prompt, phase=run.phase, **when), None

    def ask(prompts: Sequence[Prompt], enough: Enough) -> list[list[Judged]]:
        how = (train.samples_per_prompt, Occasion(TRAIN, iteration=iteration))
        return judge(*asked, prompts, *how, phase=run.phase, enough=enough)

    rounds = 1 + train.refill_rounds
    how = (m.parts.advantage, m.peers)
    return refill(m.collector, ask, draw_prompts, rounds, *how, history=m.history, signal=m.signal)


def check_agreement(
    config: Config, minibatches: Sequence[Minibatch], figures: dict[str, Any]
) -> dict[str, Any]:
    """How far the sampler's log-probabilities are from the old policy's, where both are known.

    Raises:
        SamplingError: too far, or samples are broken and the config says to stop then.
    """
    s, broken = config.sampler, figures["rollout/sampler_failures"]
    if broken and s.nonfinite == "stop":
        raise SamplingError(
            f"{broken:.0f} samples ended in a distribution that is not finite; the weights or the "
            "sampler are broken. Sampler.nonfinite = 'drop' goes on without such samples"
        )
    if not minibatches or config.train.old_logp == "sampler":
        return {}
    gaps = reduce(_merge, (_gap_metrics(part.rows, part.old) for part in minibatches))
    mean = gaps["sampler_gap_mean"]
    if float(mean.total) > s.max_gap * float(mean.count):
        raise SamplingError(
            f"the sampler's log-probabilities are {float(mean.total) / float(mean.count):.3g} nats "
            f"from the trainer's on average, expected at most Sampler.max_gap = {s.max_gap}; "
            f"`{config.command('check')}` shows where"
        )
    return {f"update/{name}": gap for name, gap in gaps.items()}


def check_first_update(config: Config, report: dict[str, Any]) -> None:
    """The first update found the sampler's log-probabilities fit to be the old policy's.

    Raises:
        SamplingError: it did not, and has left the state as it was.
    """
    if not _is_refused(report.get("update/skipped_gap")):
        return
    mean, s = report["update/sampler_gap_mean"], config.sampler
    raise SamplingError(
        f"the sampler's log-probabilities are {float(mean.total) / float(mean.count):.3g} nats from"
        f" the trainer's on average and {float(report['update/sampler_gap_max'].value):.3g} at most"
        f" in the first minibatch, expected Sampler.max_gap = {s.max_gap} and Sampler.max_token_gap"
        f" = {s.max_token_gap}, for Train.old_logp = 'sampler' to take them for the old policy's;"
        " nothing was updated. The same command goes on with --set Train.old_logp=score --set"
        f" Run.accept_changes=True; `{config.command('check')}` shows where they differ"
    )


def _is_refused(skipped: Any) -> bool:
    return skipped is not None and bool(skipped.total)


def update(
    run: Run, state: TrainState, minibatches: Sequence[Minibatch]
) -> tuple[TrainState, dict[str, Any]]:
    """Epochs times mini-batches of the jitted step; the report covers all of them.

    A first one that is refused (`check_first_update`) is the last.
    ``minibatches``: those with something to learn from; the report counts the others as skipped.
    """
    m, reports = run.machines, []
    epochs = run.config.train.epochs
    skipped = jnp.float32(epochs * (m.shape.minibatches - len(minibatches)))
    if not minibatches:
        return state, {"update/skipped_empty": Mean(skipped, skipped)}
    run.checkpoints.let_go()
    with run.phase("update", epochs * len(minibatches), "updates") as bar:
        for part in epochs * list(minibatches):
            state, report = m.learner.step(state, part, m.frozen, is_first=not reports)
            reports.append(jax.block_until_ready(report))
            bar.advance()
            if _is_refused(report.get("skipped_gap")):
                break
        # The next thing is to sample from the new weights: waiting here costs nothing and makes
        # the times of the phases true.
        jax.block_until_ready(state)
    merged = reduce(_merge, reports)
    total, count = merged["skipped_empty"]
    merged["skipped_empty"] = Mean(total + skipped, count + skipped)
    applied = jnp.minimum(merged["grad_norm"].count, 1)
    rate = Mean(applied * m.parts.learning_rate(state.step - 1), applied)
    return state, {update_name(k): v for k, v in merged.items()} | {"update/learning_rate": rate}


def speeds(config: Config, figures: dict[str, float], laps: dict[str, float]) -> dict[str, float]:
    """Tokens per second of sampling, and of training where there was any."""
    groups = config.train.prompts_per_step * figures["rollout/generation_multiplier"]
    samples = groups * config.train.samples_per_prompt
    sampled = figures["rollout/response_length"] * samples
    trained = figures["rollout/train_tokens"] * config.train.epochs
    shown = {"speed/sample": sampled / laps["seconds/sample"]}
    if trained:
        shown["speed/train"] = trained / laps["seconds/update"]
    return shown


_merge = jax.jit(merge_metrics)


@jax.jit
def _gap_metrics(rows: Rows, old: OldPolicy) -> Metrics:
    return gap_metrics(rows, old.old_logp_BT)


def evaluate(run: Run, state: TrainState, iteration: int) -> None:
    """Score the policy on the held-out prompts, and on the sets of ``Evaluate.suites``."""
    m = run.machines
    weights = m.weights(state.params)
    for name, score in {"": m.evaluate, **m.evaluate_sets}.items():
        scores, rollout = score(weights, lambda _, *size: run.phase("evaluate", *size))
        figures = {f"evaluate/{k}": v for k, v in scores.items()}
        prefix = f"evaluate/{name}/" if name else "evaluate/"
        run.log.write(iteration, {f"{prefix}{k}": v for k, v in scores.items()})
        run.console.evaluation(iteration, figures, name)
        kind = f"held_out_{name}" if name else "held_out"
        keep_transcripts(run, kind, iteration, held_out_transcripts, rollout)


def keep_transcripts(
    run: Run,
    kind: str,
    iteration: int,
    of: Callable[[Rollout, int], list[dict[str, Any]]],
    rollout: Rollout,
) -> None:
    """Some samples of a rollout, in a file of their own."""
    run.lock.check()
    if runtime.is_main():
        path = run.folder / "transcripts" / f"{kind}_{iteration:06d}.jsonl"
        samples = of(rollout, run.config.metrics.transcripts)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, "".join(json.dumps(sample) + "\n" for sample in samples))


def keep_rollout(
    run: Run,
    iteration: int,
    rollout: Rollout,
    assembled: Sequence[Minibatch],
    scored: Sequence[Minibatch],
) -> None:
    """This process's samples of an iteration of ``Train.record``, in a file of their own.

    assembled: all mini-batches on the host; scored: those of them that are not empty, scored.
    """
    every = run.config.train.record
    if not every or iteration % every:
        return
    run.lock.check()
    filled = {number: part for number, part in enumerate(assembled) if part.count}
    trained = [
        Trained(number, part.rows, placed.old)
        for (number, part), placed in zip(filled.items(), scored, strict=True)
    ]
    rows = rollout_rows(rollout, trained, iteration, run.config.run.seed)
    write_rollout(run.folder, iteration, rows, run.machines.peers.index)


def position(m: Machines) -> dict[str, Any]:
    """Where the run stands besides its TrainState: in the stream of prompts and in their past."""
    return {"data_position": m.parts.prompts.state(), "history": m.history.state()}


def save(run: Run, state: TrainState, done: int, place: dict[str, Any]) -> None:
    """Start saving the state after ``done`` iterations; the log is safe before the checkpoint.

    place: what `position` said then.
    """
    with run.phase("save"):
        run.log.flush()
        meta = {
            "iteration": done,
            **place,
            "seed": run.config.run.seed,
            "config": run.config.text(),
        }
        run.checkpoints.save(done, state, meta)


def settle(run: Run, done: int) -> None:
    """Wait for the last save; its time and that of the last evaluation are in the last line."""
    with run.phase("save"):
        run.checkpoints.wait()
    laps = run.clock.lap()
    run.log.write(done, {k: v for k, v in laps.items() if k != "seconds/iteration"})


def finish(run: Run, state: TrainState, console: Console) -> None:
    """Export, draw and say where everything is; one process does, the others wait."""
    dtype, policy = run.config.run.export_dtype, run.machines.parts.policy
    target = run.folder / (MODEL if policy.lora is None else ADAPTER)
    run.lock.check()
    with writing(target):
        if policy.lora is None:
            save_policy(policy, state.params, target, dtype)
        else:
            save_trained_adapter(run.config, policy, state.params, target)
    if policy.lora is None and dtype != "float32":
        console.note(rounding_cost(run.config, policy, state.params, dtype).line(dtype))
    run.lock.check()
    runtime.on_main(lambda: _conclude(run, console))


def _conclude(run: Run, console: Console) -> None:
    folder, rows = run.folder, read_metrics(run.folder / METRICS)
    if idle := sum(row.get("rollout/valid_groups") == 0 for row in rows):
        console.note(
            f"{idle} of {run.config.train.iterations} iterations had no group to learn from"
        )
    from aspo_jax.run.figures import dynamics  # matplotlib costs each start 0.4 s, here none

    with writing(folder / "dynamics.png"):
        dynamics({folder.name: rows}, folder / "dynamics.png")
    paths = {
        "model (Hugging Face)": folder / MODEL,
        "adapter (peft)": folder / ADAPTER,
        "checkpoints": folder / CHECKPOINTS,
        "metrics": folder / METRICS,
        "TensorBoard": folder / "tensorboard",
        "pictures": folder / "dynamics.png",
        "samples": folder / "transcripts",
    }
    console.final(
        *before_and_after(rows),
        {label: str(path) for label, path in paths.items() if path.exists()},
        next_command(run.config),
    )
