"""What the user sees: a line per iteration and per evaluation, and what is going on meanwhile.

The lines are the same everywhere. A terminal shows bars and colours besides; a file or a pipe gets
a line of progress every `PROGRESS_S` seconds at most. `metrics.jsonl` has all figures.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

import jax
import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from aspo_jax.config import Config

_logger = logging.getLogger("aspo_jax")
PROGRESS_S = 30.0
COMPILING_S = 3.0  # a compilation that takes longer is announced


class _Column(NamedTuple):
    label: str
    metric: str
    form: str


_COLUMNS = (  # speeds are in tokens
    _Column("reward", "rollout/reward_mean", "{:.3f}"),
    _Column("signal", "rollout/valid_groups", "{:.0%}"),
    _Column("length", "rollout/response_length", "{:,.1f}"),
    _Column("cut", "rollout/truncated", "{:.1%}"),
    _Column("entropy", "update/old_entropy", "{:.3f}"),
    _Column("clip", "update/clip_share", "{:.2%}"),
    _Column("KL", "update/ratio_kl", "{:.4f}"),
    _Column("sampled/s", "speed/sample", "{:,.0f}"),
    _Column("trained/s", "speed/train", "{:,.0f}"),
    _Column("seconds", "seconds/iteration", "{:,.1f}"),
)
_HELD_OUT = (
    _Column("avg@{k}", "evaluate/avg", "{:.3f}"),
    _Column("+-", "evaluate/avg_stderr", "{:.3f}"),
    _Column("pass@{k}", "evaluate/pass_any", "{:.3f}"),
    _Column("distinct right", "evaluate/distinct_right", "{:.2f}"),
    _Column("length", "evaluate/response_length", "{:,.1f}"),
    _Column("cut", "evaluate/truncated", "{:.1%}"),
)
_REWARD = (
    _Column("reward", "evaluate/reward_mean", "{:.3f}"),
    _Column("+-", "evaluate/reward_stderr", "{:.3f}"),
)


class Bar:
    """The progress of one phase.

    total: how much there is to do; None: not known yet.
    is_cap: the total is a limit at which the phase need not arrive.
    moved: is called with the bar whenever it has moved.
    """

    def __init__(
        self, name: str, total: int | None, unit: str, is_cap: bool, moved: Callable[[Bar], None]
    ):
        self._name, self._unit, self.is_cap, self._report = name, unit, is_cap, moved
        self.total, self.done, self._tokens, self._figures = total, 0, 0, ""
        self._start = self._moved = time.monotonic()
        self._done_at_start = 0

    def begin_at(self, done: int, total: int | None = None) -> None:
        """So much was done before: the time left is judged by what comes from now on."""
        self.done = self._done_at_start = done
        self._start = self._moved = time.monotonic()
        self.total = self.total if total is None else total
        self._report(self)

    def advance(self, amount: int = 1, *, tokens: int = 0, figures: str | None = None) -> None:
        """Move on: by so many tokens too, with figures of the moment to show."""
        self.done += amount
        self._moved = time.monotonic()
        self._tokens += tokens
        self._figures = self._figures if figures is None else figures
        self._report(self)

    def __str__(self) -> str:
        """sampling 37/256 samples, 1,234+ tokens/s, 0:25 left"""
        of = "" if self.total is None or self.is_cap else f"/{self.total:,}"
        count = "" if self.total is None else f" {self.done:,}{of} {self._unit}"
        return ", ".join(filter(None, (f"{self._name}{count}", self._speed, self._left)))

    @property
    def _speed(self) -> str:
        if self._figures or not self._tokens:
            return self._figures
        # More than that: what is still being drawn is not counted yet.
        return f"{self._tokens / (time.monotonic() - self._start):,.0f}+ tokens/s"

    @property
    def _left(self) -> str:
        steps = self.done - self._done_at_start
        if self.total is None or not steps:
            return ""
        step_s = (self._moved - self._start) / steps
        # The step under way has used up the time of one at most.
        seconds = step_s * (self.total - self.done) - min(time.monotonic() - self._moved, step_s)
        seconds = max(seconds, 0.0)
        return f"{'at most ' if self.is_cap else ''}{_clock(seconds)} left"


def _clock(seconds: float) -> str:
    """0:05, 12:30, 1:02:30"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """Talks to the user on standard output.

    is_terminal: bars and colours or plain lines; None finds out by itself.
    is_quiet: say nothing, as all processes of a run but one.

    As a context it says the warnings of this package: above the bars of a terminal, where a line
    written past it would end up in them, else on standard error.
    """

    def __init__(
        self,
        is_terminal: bool | None = None,
        file: IO[str] | None = None,
        *,
        is_quiet: bool = False,
    ):
        if type(file or sys.stdout).__module__.startswith("ipykernel"):
            is_terminal = False  # a notebook says that it is one, but lines cannot be redrawn there
        self._console = rich.console.Console(
            force_terminal=False if is_quiet else is_terminal,
            force_jupyter=False,  # else each line is an output of its own
            file=file,
            highlight=False,
            soft_wrap=True,
            quiet=is_quiet,
        )
        self.is_terminal = self._console.is_terminal
        self._warnings = _Warnings(self) if self.is_terminal else logging.StreamHandler()
        words = TextColumn("{task.fields[bar]}", "dim", markup=False)
        self._progress = Progress(BarColumn(10), words, console=self._console, transient=True)
        self._bars: dict[Bar, TaskID] = {}
        self._spoke = time.monotonic()
        self._compiling: dict[str, threading.Timer] = {}
        self._announced: set[str] = set()
        self._has_remarked = False
        self._compiling_lock = threading.Lock()
        self._samples, self._total, self._prompts = "k", 0, 0
        self._lines = 0

    def __enter__(self) -> Console:
        _logger.addHandler(self._warnings)
        _logger.propagate = False  # libraries set up the root logger in their own way
        return self

    def __exit__(self, *exc_info: object) -> None:
        _logger.removeHandler(self._warnings)
        _logger.propagate = True

    # --- what runs, and how it goes -----------------------------------------------------------

    def title(self, config: Config, sizes: Sequence[tuple[str, str]] | None = None) -> None:
        """What will run, where, and what its sizes amount to; None: ``config.derived()``."""
        self._samples, self._total = str(config.evaluate.samples), config.train.iterations
        self._prompts = config.train.prompts_per_step
        self._print(
            Text.assemble((config.name, "bold"), f"  seed {config.run.seed}  ->  ")
            + Text(config.run_folder, "cyan")
        )
        self.table("What will run", config.derived() if sizes is None else sizes)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Rows of a name and a value."""
        self._print(Text(f"\n{title}", "bold"))
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._print(Text.assemble((f"  {name:<{width}}  ", "dim"), value))

    def note(self, text: str, style: str = "") -> None:
        """A sentence."""
        self._print(Text(text, style))

    def evaluation(self, iteration: int, scores: Mapping[str, float], name: str = "") -> None:
        """The held-out scores of the policy after so many iterations, as soon as they are there.

        name: of a set of ``Evaluate.suites``; its k is its own.

        Rewards that are not all 0 or 1 have a mean that says more than the share of right answers:
        it comes first then. Where a reward says neither right nor wrong there is no such share.
        """
        columns = (*_REWARD, *_HELD_OUT) if _is_dense(scores) else _HELD_OUT
        k = f"{scores['evaluate/samples']:.0f}"
        words = "   ".join(
            f"{c.label.format(k=k)} {_shown(c, scores)}" for c in columns if c.metric in scores
        )
        words = words.replace("   +-", " +-")
        shown = name or "held out"
        self._print(Text(f"{iteration:>4}/{self._total:<4} {shown}   {words}", "bold"))

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """One line, and a sentence where the iteration had nothing to learn from.

        A row without a rollout, which only the last evaluation writes, is no line.
        """
        if "rollout/valid_groups" not in metrics:
            return
        widths = [max(len(column.label), 6) + 2 for column in _COLUMNS]
        if self._lines % 20 == 0:
            labels = "".join(f"{c.label:>{w}}" for c, w in zip(_COLUMNS, widths, strict=True))
            self._print(Text(f"{'':>9}{labels}", "dim"))
        shown = [
            f"{_shown(c, metrics) if c.metric in metrics else '-':>{w}}"
            for c, w in zip(_COLUMNS, widths, strict=True)
        ]
        self._print(Text.assemble((f"{iteration:>4}/{self._total:<4}", "bold"), *shown))
        if metrics["rollout/valid_groups"] == 0:
            self.note(f"{'':>9}  {self._why_nothing(metrics)}: nothing to learn from, no update")
        self._lines += 1

    def _why_nothing(self, metrics: Mapping[str, float]) -> str:
        if "rollout/solve_all" not in metrics:  # the reward says neither right nor wrong
            return "all answers to each prompt had one reward, or were masked"
        groups = round(metrics["rollout/generation_multiplier"] * self._prompts)
        right = round(metrics["rollout/solve_all"] * groups)
        wrong = round(metrics["rollout/solve_none"] * groups)
        counts = f"all right: {right} groups, all wrong: {wrong}"
        if rest := groups - right - wrong:
            return f"no group had a signal ({counts}, masked or equal in reward: {rest})"
        return f"no group had both right and wrong answers ({counts})"

    def final(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        paths: Mapping[str, str],
        next_command: str,
    ) -> None:
        """Held-out figures before and after, where everything is, and what to try next."""
        self._print(
            Text(f"\n{'Held-out result':<20}{'before':>10}{'after':>10}{'change':>10}", "bold")
        )
        is_dense = any("evaluate/samples" in s and _is_dense(s) for s in (before, after))
        columns = (*_REWARD, *_HELD_OUT) if is_dense else (*_HELD_OUT, *_REWARD)
        parts = [name for name in after if name.startswith("evaluate/reward/")]
        sets = [name for name in after if name.count("/") == 2 and name.endswith("/avg")]
        for column in (*columns, *(_Column("", name, "") for name in (*parts, *sets))):
            name = column.metric
            if name in before and name in after:
                old, new = before[name], after[name]
                cells = f"{old:>10.3f}{new:>10.3f}{new - old:>+10.3f}"
                # avg@16 by its label, evaluate/avg_stderr as avg stderr
                own = name.removeprefix("evaluate/").replace("_", " ")
                label = self._label(column) if "{k}" in column.label else own
                self._print(Text.assemble((f"  {label:<18}", "dim"), cells))
        self.table("Where things are", list(paths.items()))
        self._print(Text.assemble(("\nNext: ", "bold"), next_command))

    def _label(self, column: _Column) -> str:
        return column.label.format(k=self._samples)

    # --- progress -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(
        self, name: str, total: int | None = None, unit: str = "", *, is_cap: bool = False
    ) -> Iterator[Bar]:
        """The progress of the body, within that of the phases it is part of; leaves no trace."""
        bar = Bar(name, total, unit, is_cap, self._moved)
        self._bars[bar] = task = self._progress.add_task("", total=None, bar=bar)
        self._moved(bar)
        if self.is_terminal:
            self._progress.start()
        try:
            yield bar
        finally:
            del self._bars[bar]
            self._progress.remove_task(task)
            if self.is_terminal and not self._bars:
                self._progress.stop()

    def _moved(self, bar: Bar) -> None:
        """Move the bar on the screen; elsewhere it is time for a line, or not yet."""
        total = None if bar.is_cap else bar.total
        self._progress.update(self._bars[bar], completed=bar.done, total=total)
        if not self.is_terminal and time.monotonic() - self._spoke >= PROGRESS_S:
            self.note("  " + "; ".join(map(str, self._bars)))

    def compiling(self, program: str) -> None:
        """A compilation began; it is announced if it takes long."""
        timer = threading.Timer(COMPILING_S, self._announce, (program,))
        timer.daemon = True
        with self._compiling_lock:
            self._compiling[program] = timer
        timer.start()

    def compiled(self, program: str, seconds: float) -> None:
        """The compilation has ended."""
        with self._compiling_lock:
            timer = self._compiling.pop(program, None)
            is_announced = program in self._announced
            self._announced.discard(program)
        if timer is not None:
            timer.cancel()
        if is_announced:
            self.note(f"  compiled {program} in {_clock(seconds)}")
            if self.is_terminal and self._bars:
                self._progress.start()

    def _announce(self, program: str) -> None:
        with self._compiling_lock:
            if program not in self._compiling:
                return
            self._announced.add(program)
            # XLA itself complains on standard error about compilations of minutes: no bar may be
            # there then.
            if self.is_terminal:
                self._progress.stop()
            self.note(f"  compiling {program} ...{self._remark()}")

    def _remark(self) -> str:
        """What to expect of the first compilation that is announced, on a CPU."""
        if self._has_remarked or jax.default_backend() != "cpu":
            return ""
        self._has_remarked = True
        return " (minutes for a large model on a CPU; XLA itself may remark on it)"

    def _print(self, text: Text) -> None:
        self._spoke = time.monotonic()
        self._console.print(text)


def _is_dense(scores: Mapping[str, float]) -> bool:
    """The mean reward is not the share of right answers, or there is no such share."""
    reward, right = scores["evaluate/reward_mean"], scores.get("evaluate/avg")
    return right is None or abs(reward - right) > 1e-6


def _shown(column: _Column, metrics: Mapping[str, float]) -> str:
    value = metrics[column.metric]
    return column.form.format(value) if math.isfinite(value) else "nan"


class _Warnings(logging.Handler):
    """Shows warnings on a console."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.note(record.getMessage(), "yellow")
