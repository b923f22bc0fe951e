"""The prompts of a run, from its config: read, checked and counted before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple, cast

from aspo_jax.config import Config, ConfigError
from aspo_jax.data import (
    CHARACTERS,
    CountdownSource,
    CountdownSpec,
    DataError,
    PromptStream,
    build_character_tokenizer,
    check_prompts,
    load_tokenizer,
    max_response_tokens,
    prompts,
    read_jsonl,
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
        train_source(config, tokenizer),
        tokenizer=tokenizer,
        seed=config.run.seed,
        shuffle=config.data.kind == "jsonl",
        prompts_per_step=config.train.prompts_per_step,
        process=process,
        processes=processes,
    )


def train_source(config: Config, tokenizer: Any) -> Any:
    """The training prompts, all of which fit."""
    return _source(config, tokenizer, config.data.train_path, config.run.seed, "train")


def held_out_source(config: Config, tokenizer: Any) -> Any:
    """All rows of the held-out file, or ``Evaluate.prompts`` puzzles; all of them fit."""
    e = config.evaluate
    return _source(config, tokenizer, config.data.eval_path, e.seed, "held_out", e.prompts)


def _source(config: Config, tokenizer: Any, path: str | None, *puzzles: Any) -> Any:
    """The rows of a file, or the puzzles (seed, split and number) where the data are puzzles."""
    s = config.sampler
    if config.data.kind == "countdown":
        source = CountdownSource(countdown_spec(config), *puzzles)
        check_prompts(source, tokenizer=tokenizer, max_prompt_tokens=s.max_prompt_tokens)
        return source
    room = _Room(
        s.max_prompt_tokens, s.max_response_tokens, config.train.row_tokens, s.cache_tokens
    )
    return _fitting_rows(cast(str, path), _Same(tokenizer), room)


class _Room(NamedTuple):
    """Settings that say how long a prompt may be, in tokens."""

    prompt: int
    response: int
    row: int
    cache: int | None

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


@functools.lru_cache(4)
def _fitting_rows(path: str, same: _Same, room: _Room) -> list[dict[str, Any]]:
    rows = _read_rows(path)
    check_prompts(rows, tokenizer=same.tokenizer, max_prompt_tokens=room.prompt, remedy=room.remedy)
    return rows


@functools.lru_cache(2)
def _read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file, each with an answer that its grader can use."""
    rows = read_jsonl(path, kinds=KINDS)
    found = [(row, find_problem(row["kind"], row["answer"])) for row in rows]
    bad = [(row, problem) for row, problem in found if problem is not None]
    if bad:
        row, problem = bad[0]
        more = f" (and {len(bad) - 1} more rows of {len(rows)})" if len(bad) > 1 else ""
        raise DataError(f"{row['where']} (id {row['id']}): {problem}{more}")
    return rows


def held_out_prompts(config: Config, tokenizer: Any) -> list:
    """The prompts of every evaluation, the same for all runs with one ``Evaluate.seed``.

    Of a file the first ``Evaluate.prompts``.
    """
    source = held_out_source(config, tokenizer)
    stream = prompts(
        source,
        tokenizer=tokenizer,
        seed=0,
        shuffle=False,
        prompts_per_step=min(len(source), config.evaluate.prompts),
    )
    return next(stream)


def data_kinds(config: Config) -> frozenset[str]:
    """The kinds of answers among the prompts of training and evaluation."""
    if config.data.kind == "countdown":
        return frozenset({"countdown"})
    paths = (config.data.train_path, config.data.eval_path)
    return frozenset(row["kind"] for path in paths for row in _read_rows(cast(str, path)))
