"""Stored samples of an evaluation graded again, without the model and without sampling."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo_jax.config.reading import changed_config
from aspo_jax.config.suites import ENGINE, Suite, bound
from aspo_jax.errors import UserError
from aspo_jax.parts import FACTORIES, open_scorer
from aspo_jax.rewards import KINDS, Scorer, Submission, find_problem
from aspo_jax.sampler import EVALUATE
from aspo_jax.scoring.results import (
    Row,
    claim,
    finished_draws,
    judged,
    lock_results,
    read_samples,
    read_settings,
    write_samples,
)
from aspo_jax.scoring.running import conclude, versions


def regrade(out: Path, suite: Suite, kind: str | None = None) -> str:
    """Grade the stored samples under other settings of ``Reward``; returns the report's text.

    kind: another grader for all of them; None: each as before.

    Raises:
        UserError: no samples, or a gold answer that the grader cannot use.
    """
    other = [key for key in suite.engine if not key.startswith("Reward.")]
    if other := [*suite.changed, *other]:
        raise UserError(
            f"--regrade changes verdicts alone, and {other[0]} is none of Reward's; leave it out"
        )
    if not out.is_dir():
        raise UserError(f"--regrade {out}: no such folder; expected that of an evaluation")
    with lock_results(out):
        settings = read_settings(out)
        stored = {
            f"Reward.{field}": bound(value, str(out / "settings.json"))
            for field, value in settings["grading"].items()
        }
        config = changed_config(stored | dict(suite.engine), FACTORIES)
        rows = read_samples(out)
        _check_whole(out, settings, rows)
        if kind is not None and kind not in KINDS:
            raise UserError(f"--grader {kind}: expected one of {', '.join(KINDS)}")
        kinds = frozenset([kind] if kind else (row["kind"] for row in rows))
        with open_scorer(config, kinds) as scorer:
            rows = [
                row
                for name, s in settings["sets"].items()
                for row in _graded(
                    out, [r for r in rows if r["set"] == name], s["samples"], kind, scorer
                )
            ]
        grading = {name: getattr(config.reward, name) for name in ENGINE["Reward"]}
        settings |= {"grading": grading, "versions": versions(), "regraded": True}
        if kind is not None:
            settings["sets"] = {n: {**s, "grader": kind} for n, s in settings["sets"].items()}
        write_samples(out, rows)
        claim(out, settings, re.compile(".*"))
        return conclude(out, settings)


def _check_whole(out: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    for name, s in settings["sets"].items():
        done = len(finished_draws(rows, name, s["samples"]))
        if done < s["prompts"]:
            raise UserError(
                f"{out}: {name} has the samples of {done} of {s['prompts']} prompts; let the "
                "command that makes them finish first"
            )


def _graded(
    out: Path, rows: Sequence[Row], samples: int, kind: str | None, scorer: Scorer
) -> list[Row]:
    """The rows of a set with new verdicts; the first sample of a prompt knows all of its row."""
    kinds = [kind or row["kind"] for row in rows]
    submissions = []
    for start in range(0, len(rows), samples):
        first = rows[start]
        answer, columns = json.loads(first["answer"]), json.loads(first["columns"])
        if problem := find_problem(kinds[start], answer):
            raise UserError(f"{out}: {first['set']} {first['id']}: {problem}")
        for row in rows[start : start + samples]:
            submissions.append(
                Submission(
                    kind=kinds[start],
                    text=row["response"],
                    answer=answer,
                    is_finished=row["finished"],
                    response_tokens=row["tokens"],
                    prompt=row["prompt"],
                    identity=f"{EVALUATE} {row['draw']} {row['sample']}",
                    row=columns,
                )
            )
    verdicts = scorer.score(submissions, samples)
    return [judged(*each) for each in zip(rows, kinds, verdicts, strict=True)]
