"""Who gets the rows of the log: metrics.jsonl, TensorBoard, wandb, trackio, the console, anyone.

A writer (`aspo_jax.run.metrics.Writer`) is opened with a `Start`. `Metrics.writers` names factories
of what opens one: `wandb`, `trackio` or 'package.module:factory'.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from aspo_jax.errors import UserError, writing
from aspo_jax.files import write_text_atomic
from aspo_jax.run.folder import METRICS
from aspo_jax.run.metrics import Writer, read_rows

_logger = logging.getLogger(__name__)
Row = Mapping[str, float]


class Start(NamedTuple):
    """What a writer is opened with.

    folder: of the run.
    iteration: the first that will be written; what an earlier process wrote from there on is
        written again.
    settings: every setting of the run by its name.
    """

    folder: Path
    iteration: int = 0
    settings: Mapping[str, Any] = {}


Open = Callable[[Start], Writer]


class JsonLines:
    """metrics.jsonl, the record that a run is judged by; what is not finite is null there.

    What an earlier process wrote from the first iteration on is dropped. What is damaged before it
    is reported, with the iterations that are missing, and kept beside as
    ``metrics.jsonl.damaged-N``: a checkpoint does not rest on the log, so the run goes on.
    """

    def __init__(self, start: Start):
        self._path = start.folder / METRICS
        with writing(self._path):
            start.folder.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, start.iteration)
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, iteration: int, row: Row) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in row.items()}
        line = json.dumps({"iteration": iteration, **finite}, allow_nan=False)
        with writing(self._path):
            self._file.write(line + "\n")
            self._file.flush()

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


class TensorBoard:
    """Events in the folder tensorboard/, written at once: tensorboardX's own thread ends at its
    first failed write without a word, and then whoever writes waits for ever."""

    def __init__(self, start: Start):
        # Half a second that a run without TensorBoard need not pay.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._folder = start.folder / "tensorboard"
        self._types, self._scalar = cast(Any, event_pb2), scalar
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))
        session = self._types.SessionLog(status=self._types.SessionLog.START)
        self._add(step=start.iteration, session_log=session)

    def write(self, iteration: int, row: Row) -> None:
        for name, value in row.items():
            if math.isfinite(value):
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


class Calls:
    """A writer of two functions: (row, step) -> None, and one that ends it."""

    def __init__(self, log: Callable[[dict[str, float], int], None], finish: Callable[[], object]):
        self._log, self._finish = log, finish

    def write(self, iteration: int, row: Row) -> None:
        self._log({name: v for name, v in row.items() if math.isfinite(v)}, iteration)

    def flush(self) -> None:
        """What it logs to sends by itself."""

    def close(self) -> None:
        self._finish()
        self._finish = lambda: None


def rows_to(function: Callable[[int, Row], None]) -> Open:
    """A writer that hands every row to a function of (iteration, row)."""
    return lambda start: Calls(lambda row, iteration: function(iteration, row), lambda: None)


# --- factories that `Metrics.writers` names -----------------------------------------------------


def wandb(
    *, project: str, entity: str | None = None, mode: Literal["online", "offline"] = "online"
) -> Open:
    """Weights & Biases; a run that goes on is one run there. Needs the extra `wandb`.

    project, entity: where the run is listed.
    mode: "offline" keeps it in the run folder, for `wandb sync`.
    """
    _require("wandb")

    def open_run(start: Start) -> Writer:
        import wandb  # pyright: ignore[reportMissingImports]

        name, folder = _name(start.folder), str(start.folder)
        how: Any = {"mode": mode, "dir": folder, "id": name, "resume": "allow"}
        run = wandb.init(
            project=project, entity=entity, name=name, config=dict(start.settings), **how
        )
        return Calls(lambda row, step: run.log(row, step=step), run.finish)

    return open_run


def trackio(*, project: str, space_id: str | None = None) -> Open:
    """trackio, local first; a run that goes on is one run there. Needs the extra `trackio`.

    project: where the run is listed.
    space_id: a Hugging Face Space to send it to; None: this machine only.
    """
    _require("trackio")

    def open_run(start: Start) -> Writer:
        import trackio  # pyright: ignore[reportMissingImports]

        name = _name(start.folder)
        settings = {k: str(v) for k, v in start.settings.items()}
        run = trackio.init(
            project, name, space_id=space_id, config=settings, resume="allow", embed=False
        )
        return Calls(lambda row, step: run.log(row, step=step), trackio.finish)

    return open_run


WRITERS: Mapping[str, Callable[..., Open]] = {"trackio": trackio, "wandb": wandb}


def _name(folder: Path) -> str:
    """Of the run: its folder's, and what tells it from one of that name elsewhere."""
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"{folder.name}-{place[:8]}"


def _require(name: str) -> None:
    """Refuse at the start what is not installed, without the second that importing it takes."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"Metrics.writers names {name}, which is not installed; pip install 'aspo_jax[{name}]'"
        )


# --- metrics.jsonl when a run goes on -----------------------------------------------------------


def _truncate(path: Path, start_iteration: int) -> None:
    """Drop the lines from an iteration on; the file is replaced whole or not at all.

    Lines that cannot be read, and iterations before it that are missing, are reported.
    """
    rows, problems = read_rows(path) if path.exists() else ([], [])
    kept = [row for row in rows if row["iteration"] < start_iteration]
    if problems:
        named = (path.with_name(f"{path.name}.damaged-{i}") for i in itertools.count(1))
        copy = next(candidate for candidate in named if not candidate.exists())
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


def _ranges(numbers: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> 3-5, 9"""
    known = set(numbers)
    firsts = [n for n in numbers if n - 1 not in known]
    lasts = [n for n in numbers if n + 1 not in known]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts, strict=True))
