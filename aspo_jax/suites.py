"""The problems of a suite: read, checked and counted before any weights are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aspo_jax.config import Config, ConfigError
from aspo_jax.config.sections import Data
from aspo_jax.config.suites import EvaluationSet, Suite, point, read_suite
from aspo_jax.data import DataError, fitting_rows, prompts
from aspo_jax.errors import UserError
from aspo_jax.inputs import file_rows
from aspo_jax.structs import Prompt

HUB = "hub:"


class Problems(NamedTuple):
    """The rows of a set that are asked.

    source: the file that they came from.
    count: how many there are without `EvaluationSet.limit`, or in the published set.
    engine: what its suite says of graders and sampler, as it is written there.
    """

    name: str
    settings: EvaluationSet
    source: str
    rows: Sequence[Mapping[str, Any]]
    count: int
    engine: tuple[str, ...] = ()

    @property
    def is_limited(self) -> bool:
        return len(self.rows) < self.count

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(row["kind"] for row in self.rows)

    def prompts(self, tokenizer: Any, max_tokens: int = 2**20) -> list[Prompt]:
        """As the model reads them; they are numbered from 0, whatever the limit.

        Raises:
            DataError: one that is longer than ``Sampler.max_prompt_tokens``, or cannot be spelled.
        """
        fitting_rows(
            self.rows,
            tokenizer=tokenizer,
            max_prompt_tokens=max_tokens,
            remedy=f"set Sampler.max_prompt_tokens = {{}}, or leave the set {self.name} out".format,
        )
        size = len(self.rows)
        return next(
            prompts(self.rows, tokenizer=tokenizer, seed=0, shuffle=False, prompts_per_step=size)
        )


def read_problems(suite: Suite, folder: str | Path) -> list[Problems]:
    """Every set of a suite; folder: where its files are looked up.

    Raises:
        UserError: all that is wrong with their files and rows.
    """
    made: list[Problems] = []
    mistakes: list[UserError] = []
    for name, settings in suite.sets.items():
        try:
            read = _read_set(name, settings, Path(folder).expanduser())
            engine = (f"{key} = {binding.found}" for key, binding in suite.engine.items())
            made.append(read._replace(engine=tuple(engine)))
        except UserError as error:
            mistakes.append(error)
    if mistakes:
        raise type(mistakes[0])("\n".join(map(str, mistakes)))
    return made


def _read_set(name: str, settings: EvaluationSet, folder: Path) -> Problems:
    source = _find(name, settings.paths, folder)
    shared = {f.name for f in dataclasses.fields(Data)}
    fields = {
        f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name in shared
    }
    data = Data(source="files", train_path=source, eval_path=source, **fields)
    try:
        rows = file_rows(data)
    except UserError as error:
        own = [str(folder / path) for path in settings.paths if not path.startswith(HUB)]
        nor = f"\n  (nor is there a file {', '.join(own)})" if source.startswith(HUB) else ""
        raise type(error)(f"set {name}: {error}{nor}") from error
    if settings.window is not None:
        rows = list(_in_window(name, settings, rows))
    if not rows:
        raise DataError(
            f"set {name}: {source}: found no row with {settings.window} from {settings.since} to "
            f"{settings.until}, expected at least one; correct {name}.since and {name}.until"
        )
    count = max(len(rows), settings.size or 0)
    return Problems(name, settings, source, rows[: settings.limit], count)


def _find(name: str, paths: Sequence[str], folder: Path) -> str:
    """The first of some files that is there; an address of the hub is always taken to be."""
    for path in paths:
        if path.startswith(HUB):
            return path
        if (folder / path).is_file():
            return str(folder / path)
    looked = ", ".join(str(folder / path) for path in paths)
    raise DataError(
        f"set {name}: there is no file {looked}; put it there, or say with --data-folder (in "
        "training Evaluate.data_folder) where it is"
    )


def _in_window(
    name: str, settings: EvaluationSet, rows: Sequence[Mapping[str, Any]]
) -> Iterable[Mapping[str, Any]]:
    """The rows of a span of dates or numbers, its ends included."""
    field = settings.window or ""
    first, last = point(settings.since), point(settings.until)
    for row in rows:
        is_id = field == (settings.id or "id")
        value = row["id"] if is_id else row["columns"].get(field)
        found = point(value)
        if found is None:
            raise DataError(
                f"set {name}: {row['where']}: found {value!r:.60} for {field!r}, expected a date "
                f"such as '2024-08-01' or a number; correct the row or leave {name}.window out"
            )
        if (first is None or first <= found) and (last is None or found <= last):
            yield row


def digest_of(asked: Sequence[Prompt]) -> str:
    """What was asked and what the graders were told, as one sha256."""
    sha256 = hashlib.sha256()
    for p in asked:
        sha256.update(json.dumps([p.id, p.text, p.answer, p.kind, dict(p.columns)]).encode())
    return sha256.hexdigest()


# --- during training ------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """A set of held-out prompts and how they are asked."""

    name: str
    prompts: Sequence[Prompt]
    settings: EvaluationSet


def held_out_problems(config: Config) -> list[Problems]:
    """The sets of ``Evaluate.suites``, each of ``Evaluate.prompts`` at most.

    Raises:
        UserError: what is wrong with a suite or its files; two sets of one name.
    """
    e, made = config.evaluate, []
    for name in e.suites:
        for problems in read_problems(read_suite(name, what="Evaluate.suites"), e.data_folder):
            made.append(problems._replace(rows=problems.rows[: e.prompts]))
    names = [problems.name for problems in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"Evaluate.suites = {e.suites}: found the set {twice[0]!r} more than once, expected "
            "every set in one suite; write a suite of your own that names it once"
        )
    return made


def set_sizes(config: Config, problems: Sequence[Problems]) -> list[tuple[str, str]]:
    """Rows of the start-up table: what is asked of each set, and what is less than it says."""
    limit, rows = config.sampler.max_response_tokens, []
    for each in problems:
        s = each.settings
        count = f"{len(each.rows):,} prompts x {s.samples} samples"
        of = f", the first of {each.count:,}" if each.is_limited else ""
        longest = s.max_response_tokens
        cut = f", cut at {limit:,} tokens (the suite says {longest:,})" if longest > limit else ""
        own = f", but not by the suite's {', '.join(each.engine)}" if each.engine else ""
        rows.append((each.name, f"{count}{of}{cut}{own}"))
    return rows
