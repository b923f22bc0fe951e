"""The tasks of reasoning-gym as sources of prompts: ``Data.source = 'reasoning_gym:chain_sum'``.

Every task of the installed package is a name of this module: a factory whose arguments are the
task's own settings (``chain_sum.max_terms = 4``). Rows are drawn by task, split, seed and index;
which split a question belongs to is decided by a digest of its text, so that none is in both.

A row's answer holds the whole entry for the task's scorer (kind ``reasoning_gym``). A task whose
entries are no longer right for it once they are JSON is refused by name.

Many tasks draw by the order of sets, which every process has anew. So a process of its own makes
the rows, with one order (``PYTHONHASHSEED=0``): a run that goes on has the rows it began with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from aspo_jax.data.countdown import split_of
from aspo_jax.data.rows import DataError
from aspo_jax.data.sources import Wanted
from aspo_jax.errors import nearest
from aspo_jax.imports import NotFound

_INSTALL = "pip install 'aspo_jax[reasoning-gym]'"
_OURS = ("seed", "size")  # settings of every task that are not the user's
_MOST_DRAWS = 100  # of one row, until one is of the split that is wanted
_BY_CHANCE = ("codeio",)  # runs programs that draw as they like
_SIZE = 1000

Factory = Callable[..., Sequence[dict[str, Any]]]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return reasoning_gym(name)


@functools.cache
def reasoning_gym(task: str) -> Factory:
    """The source of a task: (wanted, size, **settings of the task) -> its rows.

    size: training rows; held-out rows are as many as are wanted.

    Raises:
        NotFound: the package or the task is not there.
    """
    _, settings = _find(task)
    given = dataclasses.fields(settings)
    parameters = {f.name: p for f in given if (p := _parameter(settings, f)) is not None}

    def rows(wanted: Wanted, size: int = _SIZE, **config: Any) -> Sequence[dict[str, Any]]:
        for name in config.keys() - parameters:
            raise DataError(
                f"reasoning_gym:{task} has no setting {name!r}{nearest(name, parameters)}; "
                f"expected one of {', '.join(parameters)}"
            )
        if size < 1:
            raise DataError(f"{task}.size is {size}, expected at least 1 training row")
        return _made_apart(task, wanted._replace(size=wanted.size or size), config)

    own = list(inspect.signature(rows, eval_str=True).parameters.values())[:2]
    rows.__name__ = task
    rows.__doc__ = f"Puzzles of reasoning-gym's task {task}.\n\nsize: training rows, at least 1."
    setattr(rows, "__signature__", inspect.Signature([*own, *parameters.values()]))  # noqa: B010
    return rows


class _Rows:
    """The puzzles of one split of a task, made one after the other.

    Raises:
        DataError: settings that the task refuses, or a task that cannot be a source; from a row, an
            entry that cannot be used.
    """

    def __init__(self, task: str, wanted: Wanted, config: Mapping[str, Any]):
        if task in _BY_CHANCE:
            raise DataError(
                f"reasoning_gym:{task} draws other rows every time, so that a run could not be "
                "repeated or go on; this task cannot be a source"
            )
        self._task, self._wanted, self._size = task, wanted, wanted.size or _SIZE
        self._config, self._declared = config, _as_declared(task, config)
        self._datasets: list[Any] = []
        self._dataset(0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, range(self._size))

    def _row(self, index: int) -> dict[str, Any]:
        wanted = self._wanted
        drawn, dataset = next(x for x in self._draws(index) if _split(x[0]) == wanted.split)
        entry = self._checked(drawn, dataset, index)
        answer = {"task": self._task, "entry": entry}
        return {
            "id": f"{self._task}/{wanted.split}/{wanted.seed}/{index}",
            "prompt": entry["question"],
            "answer": answer | ({"config": self._config} if self._config else {}),
            "kind": "reasoning_gym",
            "task": self._task,
        }

    def _draws(self, index: int) -> Iterator[tuple[dict[str, Any], Any]]:
        """Entries that may be the row, one after the other, each with its dataset."""
        for attempt in range(_MOST_DRAWS):
            dataset = self._dataset(attempt)
            try:
                entry = dataset[index]
            except Exception as error:
                raise self._fault(index, f"{type(error).__name__}: {error}") from error
            yield entry, dataset
        raise DataError(
            f"reasoning_gym:{self._task}: {_MOST_DRAWS} draws gave no question of the split "
            f"{self._wanted.split!r} for row {index}; the task has too few under these settings"
        )

    def _checked(self, entry: dict[str, Any], dataset: Any, index: int) -> dict[str, Any]:
        """An entry as it is after a way through JSON; still right for its scorer."""
        try:
            plain = json.loads(json.dumps(entry, allow_nan=False, default=_plain))
            gold = plain["answer"]
            score = None if gold is None else dataset.score_answer(answer=gold, entry=plain)
        except Exception as error:
            raise self._fault(index, f"{type(error).__name__}: {error}") from error
        if score is not None and score < 1 - 1e-9:
            raise self._fault(
                index,
                f"the task's scorer gives its own answer {score:g} once the entry is JSON, "
                "expected 1; this task cannot be a source",
            )
        return plain

    def _fault(self, index: int, problem: str) -> DataError:
        return DataError(f"reasoning_gym:{self._task}: row {index}: {problem}")

    def _dataset(self, attempt: int) -> Any:
        """The dataset that the draws of an attempt come from; each has a seed of its own."""
        while len(self._datasets) <= attempt:
            number, w = len(self._datasets), self._wanted
            named = f"{self._task} {w.split} {w.seed} {number}".encode()
            seed = int.from_bytes(hashlib.sha256(named).digest()[:4], "big") >> 2  # numpy's: 32 bit
            kind, settings = _find(self._task)
            try:
                made = settings(**self._declared, seed=seed, size=self._size)
                self._datasets.append(kind(config=made))
            except Exception as error:
                raise DataError(
                    f"reasoning_gym:{self._task} refuses its settings: "
                    f"{error or type(error).__name__}"
                ) from error
        return self._datasets[attempt]


def _split(entry: Mapping[str, Any]) -> str:
    return split_of(entry["question"])


def _find(task: str) -> tuple[type, type]:
    """A task's dataset and its settings."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise NotFound(f"reasoning-gym is not installed; {_INSTALL}") from error
    if task not in DATASETS:
        raise NotFound(
            f"reasoning-gym has no task {task!r}{nearest(task, DATASETS)}; it has "
            f"{', '.join(sorted(DATASETS))}"
        )
    return DATASETS[task]


def _plain(value: Any) -> Any:
    """What entries hold beside JSON: numpy's numbers, fractions."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


# --- settings -------------------------------------------------------------------------------------


def _parameter(settings: type, field: dataclasses.Field[Any]) -> inspect.Parameter | None:
    """A field as an argument of plain type; None: it is not one that a config can give."""
    declared = typing.get_type_hints(settings)[field.name]
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    default = tuple(default) if isinstance(default, list) else default
    annotation = _plain_type(declared, default)
    if field.name in _OURS or annotation is None:
        return None
    missing = inspect.Parameter.empty
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=missing if default is dataclasses.MISSING else default,
        annotation=annotation,
    )


def _plain_type(declared: Any, default: Any) -> Any:
    """The type in a config: lists are tuples there; None for what it cannot hold."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if declared in (int, float, str, bool, types.NoneType) or origin is Literal:
        return declared
    if declared is tuple and default:
        return _plain_type(tuple[type(default[0]), ...], default)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain_type(part, default) for part in inner]
        return None if None in parts else typing.Union[tuple(parts)]  # noqa: UP007
    if origin in (list, tuple, Sequence):
        part = _plain_type(inner[0], None)
        return None if part is None else tuple[part, ...]
    return None


def _as_declared(task: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, from JSON, with tuples where the task declares no lists."""
    declared = typing.get_type_hints(_find(task)[1])
    return {
        name: tuple(x) if isinstance(x, list) and "list" not in str(declared[name]).lower() else x
        for name, x in config.items()
    }


# --- the process that makes rows ------------------------------------------------------------------


def _made_apart(task: str, wanted: Wanted, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that ``python -m aspo_jax.data.reasoning`` makes."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps([task, wanted, config])]
    folders = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": folders}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise DataError(
            done.stdout.strip()
            or f"reasoning_gym:{task}: the process that makes its rows ended "
            f"with status {done.returncode}; see its own message above"
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(asked: str) -> int:
    """Print the rows, one a line, and return 0; or why there are none, and 1."""
    task, wanted, config = json.loads(asked)
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the package prints goes elsewhere
    try:
        lines, status = [json.dumps(row) for row in _Rows(task, Wanted(*wanted), config)], 0
    except DataError as error:
        lines, status = [str(error)], 1
    with said:
        said.writelines(f"{line}\n" for line in lines)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
