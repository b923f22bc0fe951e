"""What an evaluation found: figures of every set, as JSON and as a page beside published ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aspo_jax.config.gin import config_folder
from aspo_jax.files import write_text_atomic
from aspo_jax.rewards import repetition
from aspo_jax.rewards.given import GIVEN, vote
from aspo_jax.rewards.verdict import FAILED
from aspo_jax.scoring.results import Row, as_json, read_seconds
from aspo_jax.statistics import LEVEL, RESAMPLES, SEED, estimate, majority, pass_at, powers

REPORT, PAGE = "report.json", "report.md"


def make_report(settings: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Every setting and figure; the same for the same samples and verdicts, clocks are elsewhere.

    settings: as `aspo_jax.scoring.results.claim` keeps them.
    """
    sets = {
        name: figures([r for r in rows if r["set"] == name], s["samples"])
        for name, s in settings["sets"].items()
    }
    return {
        "intervals": f"{LEVEL:.0%}, problems resampled {RESAMPLES} times, seed {SEED}",
        "average": _average(sets),
        "is_limited": bool(_limited(settings)),
        "figures": sets,
        "settings": settings,
    }


def _average(sets: Mapping[str, Any]) -> float | None:
    """Of avg over the sets; None where one has no share of right answers."""
    found = [figures_["avg"] for figures_ in sets.values()]
    return None if None in found else float(np.mean([avg["value"] for avg in found]))


def figures(rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """The figures of one set; see docs/evaluation.md.

    rows: all samples, those of a prompt behind each other.
    """
    groups = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    reward_PG = np.array([[r["reward"] for r in group] for group in groups])
    reasons = Counter(r["reason"] for r in rows)
    return {
        "prompts": len(groups),
        "samples": samples,
        **(_right(groups, samples) if "scored" not in reasons else _UNJUDGED),
        "reward": estimate(reward_PG.mean(axis=1))._asdict(),
        "truncated": _share(rows, lambda r: not r["finished"]),
        "tokens_mean": float(np.mean([r["tokens"] for r in rows])),
        "tokens": sum(r["tokens"] for r in rows),
        "repetition": float(np.mean([repetition(r["response"]) for r in rows])),
        "grader_failures": sum(reasons[reason] for reason in FAILED),
        "sampler_failures": sum(r["ending"] == "nonfinite" for r in rows),
        "reasons": dict(sorted(reasons.items())),
    }


# Where a reward says neither right nor wrong, nothing that counts right answers is known.
_UNJUDGED: dict[str, Any] = {"avg": None, "pass": {}, "majority": None}


def _right(groups: Sequence[Sequence[Row]], samples: int) -> dict[str, Any]:
    """avg@k, pass@j and maj@k."""
    right_PG = np.array([[r["reason"] == "match" for r in group] for group in groups])
    return {
        "avg": estimate(right_PG.mean(axis=1))._asdict(),
        "pass": {str(j): estimate(pass_at(right_PG, j))._asdict() for j in powers(samples)},
        "majority": _majority(groups, right_PG),
    }


def _majority(groups: Sequence[Sequence[Row]], right_PG: np.ndarray) -> dict[str, Any] | None:
    """maj@k and how answers were compared; None where a kind of answers cannot be."""
    kinds = {r["kind"] for group in groups for r in group}
    if not kinds <= GIVEN.keys():
        return None
    votes = [
        [
            vote(r["kind"], r["response"], r["finished"], bool(is_right))
            for r, is_right in zip(group, right_G, strict=True)
        ]
        for group, right_G in zip(groups, right_PG, strict=True)
    ]
    rule = "; ".join(GIVEN[kind].rule for kind in sorted(kinds))
    return {**estimate(majority(votes, right_PG))._asdict(), "rule": rule}


def _share(rows: Sequence[Row], is_counted: Any) -> float:
    return sum(map(is_counted, rows)) / len(rows)


def _limited(settings: Mapping[str, Any]) -> list[str]:
    """The sets that were not asked whole, with their numbers."""
    sets = settings["sets"].items()
    return [f"{n} {s['prompts']} of {s['of']}" for n, s in sets if s["prompts"] < s["of"]]


def _changed(settings: Mapping[str, Any]) -> list[str]:
    """What flags set otherwise than the suite has it, but for the seed and what `_limited` says."""
    return [c for c in settings["changed"] if ".limit:" not in c and "seed" not in c]


# --- files ----------------------------------------------------------------------------------------


def write_report(folder: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Write report.json and report.md; returns the page."""
    report = make_report(settings, rows)
    seconds = read_seconds(folder)
    write_text_atomic(folder / REPORT, as_json(report))
    text = page(report, seconds)
    write_text_atomic(folder / PAGE, text)
    return text


def read_report(folder: Path) -> dict[str, Any]:
    """What `write_report` wrote."""
    return json.loads((folder / REPORT).read_text())


def page(report: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    model = settings["model"]
    step = "" if model["step"] is None else f", step {model['step']}"
    blocks = [
        f"# {settings['name']} on the suite {settings['suite']}",
        f"`{model['path']}`{step}, {model['digest'][:12]}",
        *_warnings(report),
        _table(_figure_rows(report)),
        "In percent; +- is the standard error over problems, brackets are intervals "
        f"({report['intervals']}). cut: share of answers cut at the limit; rep: share of word "
        "20-grams seen before in the same answer.",
        *_published(report),
        "## How it was asked",
        _table(_setting_rows(settings)),
        *_majority_rule(report),
        f"Seed {settings['seed']}. "
        + ", ".join(f"{k} {v}" for k, v in settings["versions"].items()),
        _speeds(report, seconds),
        "Every setting and figure: report.json; every sample: samples.parquet.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _warnings(report: Mapping[str, Any]) -> list[str]:
    settings = report["settings"]
    said = []
    if limited := _limited(settings):
        said.append(f"**Limited: {', '.join(limited)} prompts. This is not the published score.**")
    if changed := _changed(settings):
        said.append("**Not as the suite has it:** " + "; ".join(changed))
    if settings.get("regraded"):
        said.append("Graded again, from the stored samples.")
    failures = {n: f["grader_failures"] for n, f in report["figures"].items()}
    if any(failures.values()):
        counts = ", ".join(f"{n} {c}" for n, c in failures.items() if c)
        said.append(f"**Graders failed: {counts} samples, which count as wrong.**")
    return said


def _figure_rows(report: Mapping[str, Any]) -> list[list[str]]:
    head = ["set", "prompts", "k", "avg@k", "95 %", "pass@j", "maj@k"]
    head += ["reward", "cut", "tokens", "rep"]
    rows = [head]
    for name, f in report["figures"].items():
        avg, majority_, several = f["avg"], f["majority"], f["samples"] > 1
        passes = {j: e for j, e in f["pass"].items() if several and j != "1"}
        cells = [name, str(f["prompts"]), str(f["samples"])]
        cells.append(f"{_percent(avg['value'])} +- {_percent(avg['stderr'])}" if avg else "-")
        cells.append(f"[{_percent(avg['low'])}, {_percent(avg['high'])}]" if avg else "-")
        cells.append(", ".join(f"{j}: {_percent(e['value'])}" for j, e in passes.items()) or "-")
        cells.append(_percent(majority_["value"]) if majority_ and several else "-")
        cells.append(f"{f['reward']['value']:.3f} +- {f['reward']['stderr']:.3f}")
        cells += [_percent(f["truncated"]), f"{f['tokens_mean']:,.1f}", f"{f['repetition']:.3f}"]
        rows.append(cells)
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _published(report: Mapping[str, Any]) -> list[str]:
    """Our figures below those of the paper, where it has some of these sets."""
    published = read_published()
    blocks = []
    for table in published["tables"].values():
        judged = [name for name, found in report["figures"].items() if found["avg"]]
        shown = [i for i, name in enumerate(table["sets"]) if name in judged]
        if shown:
            rows = [["model", "source", *(table["titles"][i] for i in shown), "Avg"]]
            rows += [_published_row(row, published["citation"], shown) for row in table["rows"]]
            names = [table["sets"][i] for i in shown]
            rows.append(_our_row(report, names, is_whole=len(shown) == len(table["sets"])))
            blocks += ["## Beside the paper", table["protocol"] + ".", _table(rows)]
    return blocks


def _published_row(row: Mapping[str, Any], citation: str, shown: Sequence[int]) -> list[str]:
    cells = [f"{row['avg'][i]:.1f} ({row['pass'][i]:.1f})" for i in shown]
    mean = f"{row['mean']:.1f}" if len(shown) == len(row["avg"]) else "-"
    return [row["model"], f"published, {citation}", *cells, mean]


def _our_row(report: Mapping[str, Any], names: Sequence[str], *, is_whole: bool) -> list[str]:
    found = report["figures"]
    cells = [
        f"{_percent(found[n]['avg']['value'])} ({_percent(_last_pass(found[n]))})" for n in names
    ]
    settings = report["settings"]
    remarks = ["ours"]
    remarks += ["LIMITED"] if _limited(settings) else []
    remarks += ["other settings"] if _changed(settings) else []
    mean = np.mean([found[n]["avg"]["value"] for n in names])
    average = _percent(float(mean)) if is_whole else "-"
    return [f"**{settings['name']}**", ", ".join(remarks), *cells, average]


def _last_pass(found: Mapping[str, Any]) -> float:
    return found["pass"][str(found["samples"])]["value"]


def read_published() -> dict[str, Any]:
    """The paper's tables, by suite."""
    return json.loads((config_folder() / "eval" / "published.json").read_text())


def _setting_rows(settings: Mapping[str, Any]) -> list[list[str]]:
    rows = [["set", "file", "rows", "grader", "temperature", "top_p", "longest", "prompt"]]
    for name, s in settings["sets"].items():
        template = json.dumps(s["template"], ensure_ascii=False) if s["template"] else "as it is"
        rows.append([
            name,
            s["source"],
            f"{s['prompts']} of {s['of']}",
            s["grader"] or "of the row",
            f"{s['temperature']:g}",
            f"{s['top_p']:g}",
            f"{s['max_response_tokens']:,}",
            template,
        ])  # fmt: skip
    return rows


def _majority_rule(report: Mapping[str, Any]) -> list[str]:
    rules = {f["majority"]["rule"] for f in report["figures"].values() if f["majority"]}
    return [f"maj@k: {rule}." for rule in sorted(rules)]


def _speeds(report: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """Wall-clock time of sampling and grading; in no figure above."""
    total = sum(seconds.get(name, 0.0) for name in report["figures"])
    tokens = sum(f["tokens"] for f in report["figures"].values())
    if not total:
        return ""
    return f"{total:,.0f} seconds for {tokens:,} tokens ({tokens / total:,.0f} a second)."


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def table_text(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as lines for a terminal."""
    head, *rows = _figure_rows(report)
    lines = []
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        is_judged = cells["avg@k"] != "-"
        score = f"avg@{cells['k']} {cells['avg@k']} {cells['95 %']}"
        words = score if is_judged else f"reward {cells['reward']}"
        words += f"   pass@j {cells['pass@j']}" if cells["pass@j"] != "-" else ""
        words += f"   maj {cells['maj@k']}" if cells["maj@k"] != "-" else ""
        lines.append((cells["set"], f"{words}   cut {cells['cut']} %   {cells['tokens']} tokens"))
    return lines
