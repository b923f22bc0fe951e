"""What the user sees: bars, tables and one line per iteration; plain lines off a terminal.

Off a terminal every line is a row of ``key=value`` words in shell quoting, so that `shlex.split`
(or grep) reads it; there are no bars and no colours.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from aspo_jax.config import Config


class _Column(NamedTuple):
    label: str  # {k} is the number of samples per held-out prompt; speeds are in tokens
    metric: str
    form: str


_COLUMNS = (
    _Column("reward", "rollout/reward_mean", "{:.3f}"),
    _Column("avg@{k}", "evaluate/avg", "{:.3f}"),
    _Column("pass@{k}", "evaluate/pass_any", "{:.3f}"),
    _Column("entropy", "update/old_entropy", "{:.3f}"),
    _Column("clip", "update/clip_share", "{:.2%}"),
    _Column("KL", "update/ratio_kl", "{:.4f}"),
    _Column("sampled/s", "speed/sample", "{:,.0f}"),
    _Column("trained/s", "speed/train", "{:,.0f}"),
)


class Bar:
    """The progress of one phase."""

    def __init__(self, progress: Progress | None, task: TaskID | None):
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, **figures: float) -> None:
        """Move on, with figures of the moment to show beside the bar."""
        if self._progress is None or self._task is None:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        changed: dict[str, Any] = {"figures": shown} if figures else {}
        self._progress.update(self._task, advance=amount, **changed)


class Console:
    """Talks to the user on standard output.

    is_terminal: rich output or plain lines; None finds out by itself.
    is_quiet: say nothing, as all processes of a run but one.
    """

    def __init__(
        self,
        is_terminal: bool | None = None,
        file: IO[str] | None = None,
        *,
        is_quiet: bool = False,
    ):
        self._console = rich.console.Console(
            force_terminal=False if is_quiet else is_terminal,
            file=file,
            highlight=False,
            soft_wrap=True,
            quiet=is_quiet,
        )
        self.is_terminal = self._console.is_terminal
        self._samples, self._total = "k", 0
        self._evaluated: dict[str, float] = {}
        self._lines = 0

    def title(self, config: Config, sizes: Sequence[tuple[str, str]] | None = None) -> None:
        """What will run, where, and what its sizes amount to; None: ``config.derived()``."""
        self._samples, self._total = str(config.evaluate.samples), config.train.iterations
        if self.is_terminal:
            self._console.print()
            self._console.print(
                Text.assemble((config.name, "bold"), f"  seed {config.run.seed}  ->  ")
                + Text(config.run_folder, "cyan")
            )
        else:
            self._plain(config=config.name, seed=config.run.seed, folder=config.run_folder)
        self.table("What will run", config.derived() if sizes is None else sizes)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Rows of a name and a value."""
        if not self.is_terminal:
            for name, value in rows:
                self._plain(table=title, row=name, value=value)
            return
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.box = None
        table.add_column(style="dim")
        table.add_column()
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        self._console.print()
        self._console.print(table)

    @contextlib.contextmanager
    def phase(self, name: str, total: float, unit: str = "") -> Iterator[Bar]:
        """A bar with rate and time left while the body runs; it leaves no trace."""
        if not self.is_terminal:
            yield Bar(None, None)
            return
        progress = Progress(
            TextColumn("  [dim]{task.description:<12}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
        )
        with progress:
            yield Bar(progress, progress.add_task(name, total=total, figures=""))

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """One line; the held-out scores are those of the latest evaluation."""
        if not self.is_terminal:
            self._plain(
                iteration=iteration, of=self._total, **{k: f"{v:.6g}" for k, v in metrics.items()}
            )
            return
        self._evaluated |= {k: v for k, v in metrics.items() if k.startswith("evaluate/")}
        shown = {**self._evaluated, **metrics}
        if self._lines % 20 == 0:
            labels = "".join(f"{column:>{width}}" for column, width in self._header())
            self._console.print(Text(f"{'':>8}{labels}", "dim"))
        line = Text.assemble((f"{iteration:>4}/{self._total:<3}", "bold"))
        for column, (_, width) in zip(_COLUMNS, self._header(), strict=True):
            value = column.form.format(shown[column.metric]) if column.metric in shown else "-"
            is_old = column.metric not in metrics
            line.append(f"{value:>{width}}", "dim" if is_old else "")
        self._console.print(line)
        self._lines += 1

    def note(self, text: str) -> None:
        """A sentence."""
        if self.is_terminal:
            self._console.print(Text(text))
        else:
            self._plain(note=text)

    def final(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        paths: Mapping[str, str],
        next_command: str,
    ) -> None:
        """Held-out figures before and after, where everything is, and what to try next."""
        names = [name for name in after if name in before]
        if not self.is_terminal:
            for name in names:
                self._plain(result=name, before=f"{before[name]:.6g}", after=f"{after[name]:.6g}")
            for name, path in paths.items():
                self._plain(path=name, value=path)
            self._plain(next=next_command)
            return
        table = Table(title="Held-out result", title_justify="left", title_style="bold")
        table.box = None
        table.add_column("")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right", header_style="dim")
        for name in names:
            change = after[name] - before[name]
            cells = (f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f}")
            table.add_row(Text(self._label(name)), *cells)
        self._console.print()
        self._console.print(table)
        self.table("Where things are", list(paths.items()))
        self._console.print()
        self._console.print(Text.assemble(("Next: ", "bold"), next_command))

    def _header(self) -> list[tuple[str, int]]:
        labels = [column.label.format(k=self._samples) for column in _COLUMNS]
        return [(label, max(len(label), 6) + 2) for label in labels]

    def _label(self, metric: str) -> str:
        """evaluate/avg -> avg@16, evaluate/distinct_right -> distinct right."""
        for column in _COLUMNS:
            if column.metric == metric:
                return column.label.format(k=self._samples)
        return metric.rpartition("/")[2].replace("_", " ")

    def _plain(self, **words: object) -> None:
        line = " ".join(shlex.quote(f"{key}={value}") for key, value in words.items())
        # A line end inside a value would break the one-line-per-record rule.
        self._console.print(Text(line.replace("\n", " ")))


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = f" {self._unit}" if self._unit else ""
        return Text("" if speed is None else f"{speed:,.1f}{unit}/s", "dim")
