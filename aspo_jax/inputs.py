"""The prompts of a run, from its config: read, checked and counted before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aspo_jax.config import Config, ConfigError
from aspo_jax.config.factories import make
from aspo_jax.config.sections import Data, section_of
from aspo_jax.data import (
    CHARACTERS,
    LAYOUTS,
    CountdownSource,
    CountdownSpec,
    DataError,
    Fields,
    Mixture,
    PromptStream,
    Wanted,
    build_character_tokenizer,
    file_stamps,
    fitting_rows,
    load_tokenizer,
    made_rows,
    max_response_tokens,
    overlaps,
    prompts,
    read_rows,
)
from aspo_jax.rewards import KINDS, find_problem


def countdown_spec(config: Config) -> CountdownSpec:
    """The puzzle; an answer longer than the response limit is an error, not a silent ceiling."""
    spec = CountdownSpec(**dataclasses.asdict(config.countdown))
    limit, longest = config.sampler.max_response_tokens, max_response_tokens(spec)
    if longest > limit:
        raise ConfigError(
            f"Sampler.max_response_tokens is {limit}, but right answers to these puzzles have up "
            f"to {longest} tokens; raise it to {longest}"
        )
    return spec


def start_tokenizer(folder: str | Path | None) -> Any:
    """The tokenizer of a model's folder; None: that of a new model."""
    return build_character_tokenizer(CHARACTERS) if folder is None else load_tokenizer(folder)


def build_prompts(
    config: Config, tokenizer: Any, process: int = 0, processes: int = 1
) -> PromptStream:
    """The endless stream of training prompts, of which one of several processes reads its share."""
    return prompts(
        train_source(config, tokenizer).rows,
        tokenizer=tokenizer,
        seed=config.run.seed,
        shuffle=True,
        prompts_per_step=config.train.prompts_per_step,
        process=process,
        processes=processes,
    )


def held_out_prompts(config: Config, tokenizer: Any) -> list:
    """The prompts of every evaluation, the same for all runs with one ``Evaluate.seed``.

    Of files the first ``Evaluate.prompts``, of a mixture as many in proportion to the weights.
    """
    rows = held_out_source(config, tokenizer).rows
    size = min(len(rows), config.evaluate.prompts)
    if isinstance(rows, Mixture):
        rows = rows.once(size)
    stream = prompts(rows, tokenizer=tokenizer, seed=0, shuffle=False, prompts_per_step=size)
    return next(stream)


class Source(NamedTuple):
    """The rows that can be used, and how many cannot.

    rows: a sequence of them, a `CountdownSource` or a `Mixture`.
    bad: broken, or with an answer that no grader can use (``Data.bad_rows``).
    too_long: above ``Sampler.max_prompt_tokens`` (``Data.too_long``).
    held_out: training rows that are held-out rows too (``Data.overlap_words``).
    """

    rows: Any
    bad: int = 0
    too_long: int = 0
    held_out: int = 0

    @property
    def left_out(self) -> str:
        """What was left out, in words; "" if nothing."""
        counts = {"bad": self.bad, "too long": self.too_long, "held out": self.held_out}
        return ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)


def train_source(config: Config, tokenizer: Any) -> Source:
    """The training prompts, all of which fit and none of which is held out."""
    return _mixed(config, [_clean(config, tokenizer, data) for data in config.sources])


def held_out_source(config: Config, tokenizer: Any) -> Source:
    """All held-out rows of files, ``Evaluate.prompts`` of what is made; all of them fit."""
    wanted = _wanted(config, "held_out")
    return _mixed(config, [_fitting(config, tokenizer, data, wanted) for data in config.sources])


def _wanted(config: Config, split: Literal["train", "held_out"]) -> Wanted:
    if split == "train":
        return Wanted(split, config.run.seed)
    return Wanted(split, config.evaluate.seed, config.evaluate.prompts)


def _mixed(config: Config, sources: list[Source]) -> Source:
    if not config.mixture:
        return sources[0]
    rows, *counts = zip(*sources, strict=True)
    weights = [data.weight for data in config.sources]
    return Source(Mixture(rows, weights), *map(sum, counts))


def _clean(config: Config, tokenizer: Any, data: Data) -> Source:
    """A training source without what the held-out rows hold too."""
    wanted = _wanted(config, "train")
    if not data.overlap_words or data.source == "countdown":
        return _fitting(config, tokenizer, data, wanted)
    held_out = [d for d in config.sources if d.source != "countdown"]
    others = (_Asked.of(d, _wanted(config, "held_out"), config) for d in held_out)
    asked = _Asked.of(data, wanted, config)
    return _clean_rows(asked, tuple(others), _Same(tokenizer), _Room.of(config))


# --- one source -----------------------------------------------------------------------------------


def _fitting(config: Config, tokenizer: Any, data: Data, wanted: Wanted) -> Source:
    if data.source == "countdown":
        limit = config.sampler.max_prompt_tokens
        size = (wanted.size,) if wanted.size else ()
        puzzles = CountdownSource(countdown_spec(config), wanted.seed, wanted.split, *size)
        fitting_rows(puzzles, tokenizer=tokenizer, max_prompt_tokens=limit)
        return Source(puzzles)
    return _fitting_rows(_Asked.of(data, wanted, config), _Same(tokenizer), _Room.of(config))


class _Asked(NamedTuple):
    """A source and what is wanted of it: all that decides its rows.

    settings: the arguments of its factory.
    stamps: of its files, which a notebook's user may mend and read again.
    """

    data: Data
    settings: tuple[tuple[str, Any], ...]
    wanted: Wanted
    stamps: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, data: Data, wanted: Wanted, config: Config | None = None) -> _Asked:
        settings = config.factories.get(section_of(data.source), {}) if config else {}
        stamps = file_stamps(_path(data, wanted)) if data.source == "files" else ()
        return cls(data, tuple(sorted(settings.items())), wanted, stamps)


class _Room(NamedTuple):
    """Settings that say how long a prompt may be, in tokens."""

    prompt: int
    response: int
    row: int
    cache: int | None

    @classmethod
    def of(cls, config: Config) -> _Room:
        s = config.sampler
        row = config.train.row_tokens
        return cls(s.max_prompt_tokens, s.max_response_tokens, row, s.cache_tokens)

    def remedy(self, longest: int) -> str:
        """The settings that would hold a prompt."""
        row = longest + self.response - 1
        settings = [f"Sampler.max_prompt_tokens = {longest}"]
        if self.row < row:
            settings.append(f"Train.row_tokens = {row} (now {self.row})")
        if self.cache is not None and self.cache < row:
            settings.append(f"a Sampler.cache_tokens well above {row} (now {self.cache})")
        return f"set {' and '.join(settings)}, or drop the rows"


class _Same:
    """A tokenizer that equals another one of the same folder: all prompts are spelled only once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and hash(other) == hash(self)

    def __hash__(self) -> int:
        return hash(self.tokenizer.name_or_path)


@functools.lru_cache(8)
def _clean_rows(asked: _Asked, others: tuple[_Asked, ...], same: _Same, room: _Room) -> Source:
    """The fitting rows of which no question is one of the others'."""
    source, words = _fitting_rows(asked, same, room), asked.data.overlap_words
    held_out = [
        row["question"] for other in others for row in _fitting_rows(other, same, room).rows
    ]
    found = overlaps([row["question"] for row in source.rows], held_out, words)
    rows = [row for row, other in zip(source.rows, found, strict=True) if other is None]
    if not rows:
        raise DataError(
            f"Data.overlap_words = {words}: found {len(found)} training rows of "
            f"{asked.data.source} that are all held out too, expected some that are not; raise it "
            "or set it to 0"
        )
    return source._replace(rows=rows, held_out=len(found) - len(rows))


@functools.lru_cache(8)
def _fitting_rows(asked: _Asked, same: _Same, room: _Room) -> Source:
    rows, bad = _usable_rows(asked)
    too_long: list[str] | None = [] if asked.data.too_long == "skip" else None
    fitting = fitting_rows(
        rows,
        tokenizer=same.tokenizer,
        max_prompt_tokens=room.prompt,
        remedy=room.remedy,
        too_long=too_long,
    )
    return Source(fitting, bad, len(too_long or ()))


@functools.lru_cache(8)
def _usable_rows(asked: _Asked) -> tuple[list[dict[str, Any]], int]:
    """The rows with answers that their graders can use; how many others there are."""
    skipped: list[str] | None = [] if asked.data.bad_rows == "skip" else None
    rows = _made(asked, skipped)
    found = [(row, find_problem(row["kind"], row["answer"])) for row in rows]
    problems = [f"{row['where']} (id {row['id']}): {problem}" for row, problem in found if problem]
    if skipped is None and problems:
        many = len(problems) - 1
        more = f" (and {many} more rows of {len(rows)})" if many else ""
        remedy = "correct it, or leave such rows out with Data.bad_rows = 'skip'"
        raise DataError(f"{problems[0]}{more}; {remedy}")
    usable = [row for row, problem in found if problem is None]
    left_out = [*(skipped or ()), *problems]
    if not usable:
        first = f": {left_out[0]}" if left_out else ""
        raise DataError(f"found no row that can be used, expected at least one{first}")
    return usable, len(left_out)


def file_rows(data: Data) -> list[dict[str, Any]]:
    """The held-out rows of a file, all of which can be used.

    Raises:
        DataError: the first that cannot, or what is wrong with the file.
    """
    return _usable_rows(_Asked.of(data, Wanted("held_out")))[0]


def _made(asked: _Asked, skipped: list[str] | None) -> list[dict[str, Any]]:
    """The rows of a source, whatever their answers."""
    data, wanted = asked.data, asked.wanted
    if data.source == "files":
        return read_rows(_path(data, wanted), KINDS, _fields(data), skipped)
    settings = {section_of(data.source): dict(asked.settings)}
    made = make({"source": SOURCES}, "source", data.source, settings, wanted)
    return made_rows(made, f"{data.source} ({wanted.split})", KINDS, _fields(data), skipped)


def _path(data: Data, wanted: Wanted) -> str:
    return (data.train_path if wanted.split == "train" else data.eval_path) or ""


def _fields(data: Data) -> Fields:
    """The layout, but for what is set."""
    names = [f.name for f in dataclasses.fields(Fields) if hasattr(data, f.name)]
    given = {name: getattr(data, name) for name in names if getattr(data, name) is not None}
    if "id" in given:
        given["are_ids_loose"] = False
    return dataclasses.replace(LAYOUTS[data.layout], **given)


def data_kinds(config: Config) -> frozenset[str]:
    """The kinds of answers among the prompts of training and evaluation."""
    kinds: set[str] = set()
    for data in config.sources:
        if data.source == "countdown":
            kinds.add("countdown")
            continue
        for split in ("train", "held_out"):
            rows, _ = _usable_rows(_Asked.of(data, _wanted(config, split), config))
            kinds |= {row["kind"] for row in rows}
    return frozenset(kinds)


def countdown() -> None:
    """Puzzles made from the seed; see the section Countdown."""


def files() -> None:
    """The rows of ``Data.train_path`` and ``Data.eval_path``; see the section Data."""


# What `Data.source` may name beside anyone's 'package.module:factory'; these two are made here.
SOURCES: dict[str, Callable[..., Any]] = {"countdown": countdown, "files": files}
