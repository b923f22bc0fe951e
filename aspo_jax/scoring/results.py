"""The folder of an evaluation: what was asked, every sample, and how far it has come.

settings.json     what is evaluated, of what and how; another evaluation is refused
chunks/           samples of prompts that are finished, until all are; a killed command goes on
samples.parquet   every sample, a row each, to be read by anyone and graded again
clocks.json       seconds per set
report.json, report.md
.lock             who is writing
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aspo_jax.errors import UserError, writing
from aspo_jax.files import write_bytes_atomic, write_text_atomic
from aspo_jax.rewards import Verdict
from aspo_jax.rewards.given import given_answer
from aspo_jax.rollout import Rollout
from aspo_jax.run.folder import RunLock, lock_folder

SETTINGS, SAMPLES, CHUNKS, CLOCKS = "settings.json", "samples.parquet", "chunks", "clocks.json"
Row = dict[str, Any]  # of a sample, by the names of `SCHEMA`
TOLD_ONCE = 2000  # characters: longer answers (tests of programs) are in the row of sample 0 alone

SCHEMA = pa.schema(
    {
        "set": pa.string(),
        "id": pa.string(),
        "draw": pa.int64(),  # number of its prompt in the set
        "sample": pa.int64(),  # number among the samples of the prompt
        "prompt": pa.large_string(),  # as the model read it
        "response": pa.large_string(),
        "tokens": pa.int64(),  # of the response
        "finished": pa.bool_(),  # the model ended it itself
        "ending": pa.string(),
        "given": pa.large_string(),  # final answer that was found in it, for kinds that have one
        "answer": pa.large_string(),  # what its grader was told, as JSON; see `TOLD_ONCE`
        "kind": pa.string(),
        "reward": pa.float64(),
        "reason": pa.string(),
        "valid": pa.bool_(),  # the grader could do its work
        "columns": pa.large_string(),  # the other fields of its row, as JSON; of sample 0 alone
        "seed": pa.int64(),
        "identity": pa.string(),  # names its random draws, with the seed
    }
)


class ResultsError(UserError):
    """The folder holds another evaluation, or what no evaluation wrote."""


def lock_results(folder: Path) -> RunLock:
    """Make the folder and see to it that no other process writes it; see `lock_folder`."""
    return lock_folder(folder, "evaluation folder", "--out")


def claim(folder: Path, settings: Mapping[str, Any], movable: re.Pattern[str]) -> None:
    """Write what is evaluated into the folder, or find the same there.

    movable: names of settings that may have changed.

    Raises:
        ResultsError: it holds another evaluation; the message is the difference.
        WriteError: it cannot be written.
    """
    path = folder / SETTINGS
    if path.exists():
        changes = list(differences(read_settings(folder), settings, movable))
        if changes:
            raise ResultsError(
                f"{folder} holds another evaluation:\n"
                + "\n".join(f"  {change}" for change in changes)
                + "\nchoose another folder with --out, or delete this one"
            )
    elif (folder / SAMPLES).exists() or (folder / CHUNKS).exists():
        raise ResultsError(
            f"{folder} holds samples but no {SETTINGS} to say of what; choose another folder with "
            "--out, or delete this one"
        )
    write_text_atomic(path, as_json(settings))


def read_settings(folder: Path) -> dict[str, Any]:
    """What the folder is an evaluation of.

    Raises:
        ResultsError: nothing that can be read.
    """
    try:
        found = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{folder / SETTINGS}: cannot be read ({error}); expected the folder of an evaluation "
            "(--out of the command that made it)"
        ) from error
    if not isinstance(found, dict):
        raise ResultsError(f"{folder / SETTINGS}: found no JSON object; put back a copy")
    return found


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], movable: re.Pattern[str]
) -> Iterable[str]:
    """What differs, one line each, without what may; names lead inside with dots."""
    before, after = _flat(json.loads(as_json(old))), _flat(json.loads(as_json(new)))
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key) and not movable.fullmatch(key):
            yield f"{key}: {before.get(key, '(not set)')!r} -> {after.get(key, '(not set)')!r}"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    start = f"{name}." if name else ""
    return {k: v for key, x in value.items() for k, v in _flat(x, f"{start}{key}").items()}


def as_json(value: Any) -> str:
    """A text that is the same for the same value."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# --- samples --------------------------------------------------------------------------------------


def rows_of(name: str, rollout: Rollout, domain: int, seed: int) -> list[Row]:
    """A rollout as rows of a set."""
    k = rollout.samples_per_prompt
    told = [json.dumps(group[0].prompt.answer) for group in rollout.groups]
    return [
        {
            "set": name,
            "id": s.prompt.id,
            "draw": s.prompt.draw,
            "sample": i % k,
            "prompt": s.prompt.text,
            "response": s.text,
            "tokens": len(s.completion.tokens_T),
            "finished": s.completion.is_finished,
            "ending": s.completion.ending,
            "answer": None if i % k and len(told[i // k]) > TOLD_ONCE else told[i // k],
            "kind": s.prompt.kind,
            "columns": None if i % k else json.dumps(dict(s.prompt.columns)),
            "seed": seed,
            "identity": f"{domain} {s.prompt.draw} {seed} {i % k}",
            **_judgement(s.prompt.kind, s.text, s.completion.is_finished, s.verdict),
        }
        for i, s in enumerate(rollout.samples)
    ]


def judged(row: Row, kind: str, verdict: Verdict) -> Row:
    """The row under another verdict."""
    said = _judgement(kind, row["response"], row["finished"], verdict)
    return {**row, "kind": kind, **said}


def _judgement(kind: str, text: str, is_finished: bool, verdict: Verdict) -> Row:
    return {
        "given": given_answer(kind, text, is_finished),
        "reward": verdict.reward,
        "reason": verdict.reason,
        "valid": verdict.is_valid,
    }


def write_chunk(folder: Path, rows: Sequence[Row], process: int = 0) -> None:
    """Keep the samples of some prompts of a set, whole or not at all."""
    if not rows:
        return
    place = folder / CHUNKS
    with writing(place):
        place.mkdir(exist_ok=True)
    name = f"{rows[0]['set']}-{rows[0]['draw']:06d}-{process}.parquet"
    write_bytes_atomic(place / name, _parquet(rows))


def write_samples(folder: Path, rows: Sequence[Row]) -> None:
    """Put all samples into one file; the chunks have done their work then."""
    write_bytes_atomic(folder / SAMPLES, _parquet(rows))
    shutil.rmtree(folder / CHUNKS, ignore_errors=True)


def _parquet(rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), out, compression="zstd")
    return out.getvalue()


def read_samples(folder: Path, name: str = "*") -> list[Row]:
    """All samples that are there, in the order of their prompts; sets in that of their names.

    name: of one set; "*": of all.

    Raises:
        ResultsError: a file is damaged.
    """
    rows: dict[tuple[str, int, int], Row] = {}
    for path in (*sorted((folder / CHUNKS).glob(f"{name}-*.parquet")), folder / SAMPLES):
        if not path.exists():
            continue
        try:
            # Of this one file: its folder's name says nothing of its columns.
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowException) as error:
            raise ResultsError(
                f"{path}: cannot be read ({error}); put back a copy, or delete it: the same "
                "command draws its samples again"
            ) from error
        if not table.schema.equals(SCHEMA):
            raise ResultsError(f"{path}: found other columns than an evaluation writes; delete it")
        found = [row for row in table.to_pylist() if name in ("*", row["set"])]
        rows |= {(r["set"], r["draw"], r["sample"]): r for r in found}
    return [rows[key] for key in sorted(rows)]


def finished_draws(rows: Iterable[Row], name: str, samples: int) -> set[int]:
    """Prompts of a set that have all of their samples."""
    counts: dict[int, int] = {}
    for row in rows:
        if row["set"] == name:
            counts[row["draw"]] = counts.get(row["draw"], 0) + 1
    return {draw for draw, count in counts.items() if count == samples}


# --- clocks ---------------------------------------------------------------------------------------


def add_seconds(folder: Path, name: str, seconds: float) -> None:
    """Count the time of a chunk; kept apart from the report, which is the same for every run."""
    clocks = read_seconds(folder)
    clocks[name] = clocks.get(name, 0.0) + seconds
    write_text_atomic(folder / CLOCKS, as_json(clocks))


def read_seconds(folder: Path) -> dict[str, float]:
    """Seconds of sampling and grading per set; of sets without a clock none."""
    try:
        return json.loads((folder / CLOCKS).read_text())
    except (OSError, ValueError):
        return {}
