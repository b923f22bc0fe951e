"""What a run records: the name, unit and definition of every metric, and the log that keeps them.

Each iteration becomes one row, which goes to every writer (`aspo_jax.run.writers`). Values stay on
the device until their row is whole. A mean over nothing is no value: such a metric is left out.
The figures of a rollout are defined in `aspo_jax.outcomes`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from aspo_jax.errors import UserError, WriteError, nearest
from aspo_jax.losses import WEIGHT_BIN_EDGES, histogram_quantile
from aspo_jax.outcomes import EVALUATE, ROLLOUT, Figure
from aspo_jax.structs import Histogram, Max, Mean, Metric

WEIGHT_QUANTILES = (10, 50, 90)  # percent


class MetricsError(UserError):
    """A metrics.jsonl holds what no run writes."""


class Info(NamedTuple):
    """A metric's unit and what exactly is measured."""

    unit: str
    definition: str


def _by_sign(name: str, unit: str, definition: str) -> dict[str, Info]:
    """One metric for each sign of the advantage; ``{sign}`` and ``{relation}`` are filled in."""
    return {
        name.format(sign=sign): Info(unit, definition.format(relation=relation))
        for sign, relation in (("positive", "A > 0"), ("negative", "A < 0"))
    }


_UPDATE = {
    "surrogate": Info("", "value of the published surrogate of the rule, as aggregated"),
    "ratio_kl": Info(
        "nats", "mean of r - 1 - log r over response tokens, r = pi / pi_old: drift within a step"
    ),
    "ratio_variance": Info("", "mean of (r - 1)^2 over response tokens (R2VPO)"),
    "dual_lam": Info("", "lambda of R2VPO, the learned price of that variance"),
    "abs_log_ratio_max": Info("nats", "largest |log pi - log pi_old| of a response token"),
    "clip_share": Info(
        "share of tokens",
        "response tokens with A != 0 whose weight is 0: the clip or a cap took it away",
    ),
    "entropy": Info("nats", "mean entropy of the policy over response tokens, during the updates"),
    "old_entropy": Info(
        "nats",
        "the same under pi_old: the entropy of the policy that sampled; with Train.old_logp ="
        " 'sampler' over the first minibatch",
    ),
    "sampler_gap_mean": Info(
        "nats",
        "mean |log-probability reported by the sampler - that of the trainer, same weights| over"
        " response tokens; with Train.old_logp = 'sampler' over the first minibatch, whose"
        " |log ratio| it is",
    ),
    "sampler_gap_max": Info(
        "nats", "the largest such gap; a correctness alarm, about 1e-5 in float32"
    ),
    "sampler_gap_outside": Info(
        "share of tokens", "response tokens whose two probabilities have a ratio beyond 1 +- 0.2"
    ),
    "covariance_share": Info(
        "share of tokens", "response tokens that Clip-Cov or KL-Cov picks out by their covariance"
    ),
    "ess": Info(
        "share", "effective sample size (sum r)^2 / (n sum r^2) of a minibatch's n ratios (P3O)"
    ),
    "ratio_low": Info("ratio", "lower clip bound that the rule chose for the minibatch (BAPO)"),
    "ratio_high": Info("ratio", "upper clip bound that the rule chose for the minibatch (BAPO)"),
    "ref_kl": Info("nats", "mean estimated KL divergence from the reference policy"),
    "teacher_kl": Info(
        "nats",
        "mean log pi - log pi_teacher over response tokens: estimates the KL divergence from the"
        " teacher (`distill`)",
    ),
    "grad_norm": Info("", "global norm of the gradient before clipping, mean over the updates"),
    "grad_norm_max": Info("", "the largest such norm of an applied update, 0 if none was applied"),
    "skipped_nonfinite": Info(
        "share of updates", "updates not applied because the gradient was not finite"
    ),
    "skipped_empty": Info(
        "share of updates", "updates not applied because no sample carried a signal"
    ),
    "skipped_gap": Info(
        "share of first updates",
        "updates not applied because the sampler's log-probabilities, which are the old ones, were"
        " too far from the trainer's; the run then stops (Train.old_logp = 'sampler')",
    ),
    "learning_rate": Info("", "learning rate of the iteration's last update that was applied"),
    **_by_sign(
        "clip_share_{sign}",
        "share of tokens",
        "response tokens with {relation} whose weight is 0: the clip or a cap took it away",
    ),
    **_by_sign(
        "cap_share_{sign}",
        "share of tokens",
        "response tokens with {relation} whose weight the rule's cap bounds (ASPO)",
    ),
    "vanished_share": Info(
        "share of tokens",
        "response tokens whose response's weight has vanished, below 1e-3 (VESPO)",
    ),
    **_by_sign(
        "response_ratio_{sign}",
        "ratio",
        "mean over responses with {relation} of their mean ratio pi / pi_old",
    ),
}
_CORRECTIONS = {
    "tis": "truncates the ratio of",
    **dict.fromkeys(
        (
            *("mis", "icepop", "sequence_mask", "seq_mask_tis"),
            *("geometric_rejection", "k3_rejection", "opsm", "outlier_veto"),
        ),
        "drops",
    ),
}
_UPDATE |= {
    f"{name}_share": Info("share of tokens", f"response tokens that the correction `{name}` {what}")
    for name, what in _CORRECTIONS.items()
}
for _q in WEIGHT_QUANTILES:
    _UPDATE |= _by_sign(
        f"weight_{{sign}}_q{_q}",
        "weight",
        f"{_q} % quantile, read from a fixed-bin histogram, of the token weight w over response"
        " tokens with {relation}; 0 where the clip or a cap took it away",
    )

_SPEED = {
    "sample": Info("tokens / second", "response tokens drawn per second of sampling"),
    "train": Info("tokens / second", "trained tokens, all epochs, per second of updating"),
}

_SECONDS = {
    "data": Info("seconds", "waiting for prompts: read, rendered by the chat template, tokenized"),
    "sample": Info("seconds", "drawing completions"),
    "grade": Info("seconds", "waiting for graders after sampling"),
    "score": Info(
        "seconds",
        "log-probabilities under the old (unless they are the sampler's), reference and teacher"
        " policy",
    ),
    "update": Info("seconds", "all optimizer updates"),
    "evaluate": Info("seconds", "held-out evaluation"),
    "save": Info("seconds", "waiting for saves since the line before; the last line has the last"),
    "iteration": Info("seconds", "the whole iteration"),
}
_GROUPS: Mapping[str, tuple[str, Mapping[str, Info | Figure]]] = {
    "rollout": (
        "The samples of an iteration, all of them, before groups without a signal are dropped.",
        ROLLOUT,
    ),
    "update": (
        "The optimizer updates of an iteration, over all minibatches and epochs.",
        _UPDATE,
    ),
    "evaluate": ("Held-out prompts; iteration 0 is before the first update.", EVALUATE),
    "speed": ("Throughput, over all devices.", _SPEED),
    "seconds": ("Wall-clock time per phase.", _SECONDS),
}

# Followed by the names of what the reward is made of.
_HELD_OUT_PARTS = re.compile(r"evaluate/(\w+/)?reward/.+")

METRICS: Mapping[str, Info | Figure] = {
    f"{group}/{name}": info for group, (_, infos) in _GROUPS.items() for name, info in infos.items()
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
    for group, (meaning, infos) in _GROUPS.items():
        lines += ["", f"## {group}", "", meaning, ""]
        lines += ["| name | unit | definition |", "|---|---|---|"]
        for name, info in infos.items():
            definition = info.definition.replace("|", "\\|")
            lines.append(f"| `{group}/{name}` | {info.unit or '-'} | {definition} |")
    lines += [
        *("", "## evaluate/SET", ""),
        "The same figures of each set of `Evaluate.suites`, k being the set's own:"
        " `evaluate/gsm8k/avg`, `evaluate/gsm8k/truncated` and so on.",
        *("", "## reward", ""),
        "`reward/NAME`, and `evaluate/reward/NAME` of the held-out samples: where rewards are made"
        " of several, the mean of each, not weighted and not shaped. NAME is a kind of answers or a"
        " function of `Reward.functions`.",
        *("", "## rule", ""),
        "What a loss rule of one's own reports, under the names that it gives: a `Mean` or `Max`"
        " over the updates of an iteration, or the quantiles of a `Histogram` of weights.",
    ]
    return "\n".join(lines) + "\n"


class Writer(Protocol):
    """Takes the rows of the log; see `aspo_jax.run.writers`."""

    def write(self, iteration: int, row: Mapping[str, float]) -> None:
        """One row: name -> number, NaN and infinities included."""

    def flush(self) -> None:
        """Make what was written safe against a crash of the machine."""

    def close(self) -> None:
        """The end; may be called twice."""


class Log:
    """The metrics of a run, one row an iteration, handed to each of its writers.

    start_iteration: the first iteration that will be written.
    writers: see `aspo_jax.run.writers`; without any, nothing is fetched from the devices.

    Raises ValueError for a metric of one of our groups that `METRICS` does not define, or an
    iteration that goes back; WriteError where there is no room.
    """

    def __init__(self, start_iteration: int = 0, writers: Sequence[Writer] = ()):
        self._writers = tuple(writers)
        self._iteration = start_iteration
        self._pending: dict[str, Any] = {}
        self.latest: dict[str, float] = {}

    def write(self, iteration: int, values: Mapping[str, float | jax.Array | Metric]) -> None:
        """Hand in scalars or `Metric`s; calls with the same iteration add up to one line.

        Device values are fetched when the line ends: at `end_row`, `flush`, or a later iteration.
        A `Histogram` is one of token weights and becomes three quantiles.
        """
        for name, value in values.items():
            probe = f"{name}_q50" if isinstance(value, Histogram) else name
            is_ours = name.partition("/")[0] in _GROUPS and not _HELD_OUT_PARTS.fullmatch(name)
            if is_ours and _of_set(probe) not in METRICS:
                raise ValueError(f"unknown metric {probe!r}{nearest(probe, METRICS)}; see METRICS")
        if iteration < self._iteration:
            raise ValueError(f"iteration {iteration} after iteration {self._iteration}")
        if iteration > self._iteration:
            self.end_row()
        self._iteration = iteration
        self._pending |= values

    def end_row(self) -> None:
        """The iteration's line is whole; a later `write` must be of a later iteration."""
        if not self._pending or not self._writers:
            return
        fetched, self._pending, self.latest = jax.device_get(self._pending), {}, {}
        for name, value in fetched.items():
            self.latest |= _scalars(name, value)
        self._all(lambda writer: writer.write(self._iteration, self.latest))
        self._iteration += 1

    def flush(self) -> None:
        """Write what is pending and make it safe against a crash of the machine.

        A later `write` must be of a later iteration.
        """
        self.end_row()
        self._all(lambda writer: writer.flush())

    def close(self) -> None:
        """Flush and close; may be called twice."""
        if self._writers:
            self.flush()
            self._all(lambda writer: writer.close())
        self._writers = ()

    def _all(self, act: Callable[[Writer], None]) -> None:
        try:
            for writer in self._writers:
                act(writer)
        except WriteError:
            # Else what is still buffered would be tried again, at the end of the interpreter too.
            for writer in self._writers:
                with contextlib.suppress(OSError, WriteError):
                    writer.close()
            self._writers = ()
            raise


def _of_set(name: str) -> str:
    """A figure of a set of ``Evaluate.suites`` as that of the held-out prompts."""
    group, *inner = name.split("/")
    return f"evaluate/{inner[1]}" if group == "evaluate" and len(inner) == 2 else name


def update_name(metric: str) -> str:
    """Where a metric of an update is logged: under ``rule/`` if only the rule itself defines it."""
    is_ours = f"update/{metric}" in METRICS or f"update/{metric}_q50" in METRICS
    return f"update/{metric}" if is_ours else f"rule/{metric}"


def _scalars(name: str, value: Any) -> dict[str, float]:
    """A mean divided, a histogram turned into quantiles; none of what counted nothing."""
    if isinstance(value, Mean):
        return {name: float(value.total / value.count)} if value.count else {}
    if isinstance(value, Max):
        return {name: float(value.value)} if value.value != -math.inf else {}
    if isinstance(value, Histogram):
        counts, edges = np.asarray(value.counts), WEIGHT_BIN_EDGES
        quantiles = WEIGHT_QUANTILES if counts.any() else ()
        return {f"{name}_q{q}": histogram_quantile(counts, edges, q / 100) for q in quantiles}
    return {name: float(value)}


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
        MetricsError: file and line of anything that no run writes.
    """
    rows, problems = read_rows(Path(path))
    if problems:
        raise MetricsError(problems[0])
    return rows


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
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


def profile(
    iteration: int, iterations: Collection[int], folder: str | Path
) -> contextlib.AbstractContextManager[None]:
    """Trace the body with the JAX profiler if ``iteration`` is one of ``iterations``."""
    is_traced = iteration in iterations
    return jax.profiler.trace(str(folder)) if is_traced else contextlib.nullcontext()


if __name__ == "__main__":
    print(metrics_page(), end="")
