"""What a run records: the name, unit and definition of every metric, and the log that keeps them.

Each iteration becomes one line of ``metrics.jsonl`` and, if wanted, a TensorBoard event. Values
stay on the device until their line is whole. A mean over nothing is no value: such a metric is
left out of the line. A new metric is a new line of `METRICS`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from aspo_jax.config.gin import nearest
from aspo_jax.errors import UserError, WriteError, writing
from aspo_jax.files import write_text_atomic
from aspo_jax.losses import WEIGHT_BIN_EDGES, histogram_quantile
from aspo_jax.run.folder import METRICS as METRICS_FILE
from aspo_jax.structs import Histogram, Max, Mean, Metric

WEIGHT_QUANTILES = (10, 50, 90)  # percent

_logger = logging.getLogger(__name__)


class MetricsError(UserError):
    """A metrics.jsonl holds what `Log` does not write."""


class Info(NamedTuple):
    """A metric's unit and what exactly is measured."""

    unit: str
    definition: str


def _by_sign(name: str, unit: str, definition: str) -> dict[str, Info]:
    """One metric for each sign of the advantage; ``{sign}`` and ``{relation}`` are filled in."""
    return {
        f"{name}_{sign}": Info(unit, definition.format(sign=sign, relation=relation))
        for sign, relation in (("positive", "A > 0"), ("negative", "A < 0"))
    }


def _weight_quantiles() -> dict[str, Info]:
    return {
        f"update/weight_{sign}_q{q}": Info(
            "weight",
            f"{q} % quantile, read from a fixed-bin histogram, of the token weight w over response"
            f" tokens with {relation}; 0 where the clip removed the gradient",
        )
        for sign, relation in (("positive", "A > 0"), ("negative", "A < 0"))
        for q in WEIGHT_QUANTILES
    }


_ROLLOUT = {
    "reward_mean": Info("reward", "mean reward of all samples whose grader did not fail"),
    "solve_none": Info("share of groups", "groups in which no sample is right"),
    "solve_all": Info("share of groups", "groups in which every sample is right"),
    "valid_groups": Info(
        "share of groups", "groups whose advantages are not all zero, so that they train"
    ),
    "response_length": Info("tokens", "mean number of response tokens, the end token included"),
    "truncated": Info("share of samples", "samples cut off before they ended themselves"),
    "repetition": Info(
        "share of 20-grams",
        "mean share of a response's 20-grams of words already seen in that response; 0 if shorter",
    ),
    "distinct_answers": Info("texts", "mean number of different response texts in a group"),
    "grader_failures": Info("samples", "samples masked because their grader failed twice"),
    "grader_timeouts": Info("samples", "samples whose grading took too long; their reward is 0"),
    "sampler_failures": Info(
        "samples", "samples masked because they ended in a distribution that is not finite"
    ),
    "train_tokens": Info("tokens", "prompt and response tokens in one pass of the updates"),
    "packing_waste": Info("share of tokens", "slots of the training rows that hold no token"),
}

_UPDATE = {
    "surrogate": Info("", "value of the published surrogate of the rule, as aggregated"),
    "ratio_kl": Info(
        "nats", "mean of r - 1 - log r over response tokens, r = pi / pi_old: drift within a step"
    ),
    "abs_log_ratio_max": Info("nats", "largest |log pi - log pi_old| of a response token"),
    "clip_share": Info(
        "share of tokens", "response tokens with A != 0 whose gradient the clip removed"
    ),
    "entropy": Info("nats", "mean entropy of the policy over response tokens, during the updates"),
    "old_entropy": Info("nats", "the same under pi_old: the entropy of the policy that sampled"),
    "sampler_gap_mean": Info(
        "nats", "mean |log-probability reported by the sampler - log pi_old| over response tokens"
    ),
    "sampler_gap_max": Info(
        "nats", "the largest such gap; a correctness alarm, about 1e-5 in float32"
    ),
    "sampler_gap_outside": Info(
        "share of tokens", "response tokens whose two probabilities have a ratio beyond 1 +- 0.2"
    ),
    "ref_kl": Info("nats", "mean estimated KL divergence from the reference policy"),
    "grad_norm": Info("", "global norm of the gradient before clipping, mean over the updates"),
    "skipped_nonfinite": Info(
        "share of updates", "updates not applied because the gradient was not finite"
    ),
    "skipped_empty": Info(
        "share of updates", "updates not applied because no sample carried a signal"
    ),
    "learning_rate": Info("", "learning rate of the iteration's last update that was applied"),
}

_EVALUATE = {
    "avg": Info(
        "share",
        "avg@k: held-out samples that are right, k = Evaluate.samples per prompt. Right is the"
        " verdict `match`; of numbers that a Reward.function returns, those from 1 on",
    ),
    "avg_stderr": Info("share", "standard error of avg over the prompts"),
    "reward_mean": Info(
        "reward", "mean reward of the held-out samples, not shaped; 0 where a grader failed"
    ),
    "pass_any": Info("share", "pass@k: held-out prompts with at least one right sample among k"),
    "distinct_right": Info("texts", "mean number of different right answers among k samples"),
    "truncated": Info("share of samples", "samples cut off before they ended themselves"),
    "response_length": Info("tokens", "mean number of response tokens, the end token included"),
    "samples": Info("samples", "k, the samples per held-out prompt"),
}

_SPEED = {
    "sample": Info("tokens / second", "response tokens drawn per second of sampling"),
    "train": Info("tokens / second", "trained tokens, all epochs, per second of updating"),
}

_SECONDS = {
    "sample": Info("seconds", "drawing completions"),
    "grade": Info("seconds", "waiting for graders after sampling"),
    "score": Info("seconds", "log-probabilities under the old and the reference policy"),
    "update": Info("seconds", "all optimizer updates"),
    "evaluate": Info("seconds", "held-out evaluation"),
    "save": Info("seconds", "waiting for saves since the line before; the last line has the last"),
    "iteration": Info("seconds", "the whole iteration"),
}


def _group(name: str, metrics: Mapping[str, Info]) -> dict[str, Info]:
    return {f"{name}/{key}": info for key, info in metrics.items()}


METRICS: dict[str, Info] = {
    **_group("rollout", _ROLLOUT),
    **_group("update", _UPDATE),
    **_by_sign(
        "update/clip_share",
        "share of tokens",
        "response tokens with {relation} whose gradient the clip removed",
    ),
    **_by_sign(
        "update/cap_share",
        "share of tokens",
        "response tokens with {relation} whose weight the rule's cap bounds (ASPO)",
    ),
    **_by_sign(
        "update/response_ratio",
        "ratio",
        "mean over responses with {relation} of their mean ratio pi / pi_old",
    ),
    **_weight_quantiles(),
    **_group("evaluate", _EVALUATE),
    **_group("speed", _SPEED),
    **_group("seconds", _SECONDS),
}

_GROUPS = {
    "rollout": "The samples of an iteration, all of them, before any is dropped.",
    "update": "The optimizer updates of an iteration, over all minibatches and epochs.",
    "evaluate": "Held-out prompts; iteration 0 is before the first update.",
    "speed": "Throughput, over all devices.",
    "seconds": "Wall-clock time per phase.",
}


def metrics_page() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Every name in `metrics.jsonl` and TensorBoard."
        " Made by `python -m aspo_jax.run.metrics > docs/metrics.md`.",
        "A is the advantage, w the token weight, pi the policy, pi_old the policy that sampled."
        " A metric that has nothing to count in an iteration is absent; `null` is not finite.",
    ]
    for group, meaning in _GROUPS.items():
        lines += ["", f"## {group}", "", meaning, ""]
        lines += ["| name | unit | definition |", "|---|---|---|"]
        for name, info in METRICS.items():
            if name.startswith(f"{group}/"):
                definition = info.definition.replace("|", "\\|")
                lines.append(f"| `{name}` | {info.unit or '-'} | {definition} |")
    return "\n".join(lines) + "\n"


class Log:
    """The metrics of a run in ``folder``: metrics.jsonl and, if wanted, tensorboard/.

    start_iteration: the first iteration that will be written; what an earlier process wrote from
        there on is dropped, also in TensorBoard. What is damaged before it is reported, with the
        iterations that are missing, and kept beside as ``metrics.jsonl.damaged-N``: a checkpoint
        does not rest on the log, so the run goes on.
    on_row: called with (iteration, its metrics) once they are recorded.

    Raises ValueError for a metric that `METRICS` does not define, or an iteration that goes back;
    WriteError where there is no room.
    """

    def __init__(
        self,
        folder: str | Path,
        start_iteration: int = 0,
        tensorboard: bool = True,
        on_row: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        folder = Path(folder)
        self._path = folder / METRICS_FILE
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, start_iteration)
            self._file = self._path.open("a", encoding="utf-8")
        self._events = _Events(folder / "tensorboard", start_iteration) if tensorboard else None
        self._iteration = start_iteration
        self._pending: dict[str, Any] = {}
        self._on_row = on_row
        self.latest: dict[str, float] = {}

    def write(self, iteration: int, values: Mapping[str, float | jax.Array | Metric]) -> None:
        """Hand in scalars or `Metric`s; calls with the same iteration add up to one line.

        Device values are fetched when the line ends: at `end_row`, `flush`, or a later iteration.
        A `Histogram` is one of token weights and becomes three quantiles.
        """
        for name, value in values.items():
            probe = f"{name}_q50" if isinstance(value, Histogram) else name
            if probe not in METRICS:
                raise ValueError(f"unknown metric {probe!r}{nearest(probe, METRICS)}; see METRICS")
        if iteration < self._iteration:
            raise ValueError(f"iteration {iteration} after iteration {self._iteration}")
        if iteration > self._iteration:
            self._record()
        self._iteration = iteration
        self._pending |= values

    def end_row(self) -> None:
        """The iteration's line is whole; a later `write` must be of a later iteration."""
        self._record()

    def flush(self) -> None:
        """Write what is pending and make it safe against a crash of the machine.

        A later `write` must be of a later iteration.
        """
        self._record()
        with self._writing():
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Flush and close; may be called twice."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _record(self) -> None:
        if not self._pending:
            return
        fetched = jax.device_get(self._pending)
        self._pending = {}
        self.latest = _scalars(fetched)
        finite = {name: v if math.isfinite(v) else None for name, v in self.latest.items()}
        line = {"iteration": self._iteration, **finite}
        with self._writing():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.write(self._iteration, finite)
        if self._on_row:
            self._on_row(self._iteration, self.latest)
        self._iteration += 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(self._path):
                yield
        except WriteError:
            # Else what is still buffered would be tried again, at the end of the interpreter too.
            for file in (self._file, self._events):
                with contextlib.suppress(OSError, WriteError):
                    if file is not None:
                        file.close()
            raise


class _Events:
    """TensorBoard events in a folder, written at once: tensorboardX's own thread ends at its first
    failed write without a word, and then whoever writes waits for ever."""

    def __init__(self, folder: Path, start_iteration: int):
        # Half a second that a run without TensorBoard need not pay.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._folder, self._types, self._scalar = folder, cast(Any, event_pb2), scalar
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        session = self._types.SessionLog(status=self._types.SessionLog.START)
        self._add(step=start_iteration, session_log=session)

    def write(self, iteration: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._add(step=iteration, summary=self._scalar(name, value))

    def flush(self) -> None:
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with writing(self._folder), contextlib.closing(self._writer._py_recordio_writer):
            self._writer.flush()

    def _add(self, **fields: Any) -> None:
        with writing(self._folder):
            self._writer.write_event(self._types.Event(wall_time=time.time(), **fields))


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Means divided, histograms turned into quantiles; without those that counted nothing."""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if _is_over_nothing(value):
            continue
        if isinstance(value, Mean):
            scalars[name] = float(value.total / value.count)
        elif isinstance(value, Max):
            scalars[name] = float(value.value)
        elif isinstance(value, Histogram):
            for q in WEIGHT_QUANTILES:
                quantile = histogram_quantile(np.asarray(value.counts), WEIGHT_BIN_EDGES, q / 100)
                scalars[f"{name}_q{q}"] = quantile
        else:
            scalars[name] = float(value)
    return scalars


def _is_over_nothing(value: Any) -> bool:
    if isinstance(value, Mean):
        return not value.count
    if isinstance(value, Max):
        return float(value.value) == -math.inf
    return isinstance(value, Histogram) and not value.counts.any()


class Clock:
    """Wall-clock seconds per phase of an iteration."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds per phase and of the whole iteration since the last lap, by metric name."""
        now = time.perf_counter()
        laps = {**self._seconds, "iteration": now - self._start}
        self._seconds, self._start = {}, now
        return {f"seconds/{phase}": seconds for phase, seconds in laps.items()}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line without its line end was torn and is left out.

    Raises:
        MetricsError: file and line of anything that `Log` does not write.
    """
    rows, problems = _read_rows(Path(path))
    if problems:
        raise MetricsError(problems[0])
    return rows


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that are whole, and what is wrong with each other line."""
    rows, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
            continue
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            rows.append(row)
        else:
            problems.append(f"{path}:{number}: expected an object with a whole 'iteration'")
    return rows, problems


def _truncate(path: Path, start_iteration: int) -> None:
    """Drop the lines from an iteration on; the file is replaced whole or not at all.

    Lines that cannot be read, and iterations before it that are missing, are reported.
    """
    rows, problems = _read_rows(path) if path.exists() else ([], [])
    kept = [row for row in rows if row["iteration"] < start_iteration]
    if problems:
        copy = _free_name(path)
        shutil.copy2(path, copy)
        _logger.warning("%s (%d lines); kept as it is in %s", problems[0], len(problems), copy.name)
    known = {row["iteration"] for row in kept}
    if missing := [i for i in range(start_iteration) if i not in known]:
        _logger.warning(
            "%s lacks iterations %s: the run goes on from its checkpoint, but its curves have a "
            "gap; put back a copy of the file to close it",
            path,
            _ranges(missing),
        )
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}.damaged-{i}") for i in itertools.count(1))
    return next(candidate for candidate in numbered if not candidate.exists())


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> 3-5, 9"""
    known = set(numbers)
    firsts = [n for n in numbers if n - 1 not in known]
    lasts = [n for n in numbers if n + 1 not in known]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts, strict=True))


@contextlib.contextmanager
def profile(iteration: int, iterations: Collection[int], folder: str | Path) -> Iterator[None]:
    """Trace the body with the JAX profiler if ``iteration`` is one of ``iterations``."""
    if iteration in iterations:
        with jax.profiler.trace(str(folder)):
            yield
    else:
        yield


if __name__ == "__main__":
    print(metrics_page(), end="")
