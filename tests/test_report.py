"""Figures and pages of samples that are known beforehand, and what the folder keeps of them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from rollout_toy import RIGHT, WRONG, completion, prompt

from aspo_jax.rewards import Verdict
from aspo_jax.rewards.given import vote
from aspo_jax.rollout import Rollout, Sample
from aspo_jax.sampler import EVALUATE
from aspo_jax.scoring.report import figures, make_report, page, read_published
from aspo_jax.scoring.results import (
    TOLD_ONCE,
    ResultsError,
    claim,
    differences,
    finished_draws,
    judged,
    read_samples,
    rows_of,
    write_chunk,
    write_samples,
)

TEXTS = [  # of each prompt: text, whether it is right
    [(r"\boxed{\frac12}", True), (r"so \boxed{0.5}", True), (r"\boxed{3}", False), ("no idea", 0)],
    [(r"\boxed{3}", False), (r"\boxed{ 3 }", False), (r"\boxed{4}", True), (r"\boxed{5}", False)],
    [(r"\boxed{1}", True), (r"\boxed{2}", False), (r"\boxed{1 }", True), (r"\boxed{2}", False)],
]


def rollout_of(texts=TEXTS, kind: str = "math", answer: object = "1/2") -> Rollout:
    samples = []
    for p, group in enumerate(texts):
        asked = prompt(p)
        asked = type(asked)(f"p{p}", p, asked.text, asked.tokens, answer, kind, {"level": p})
        for g, (text, right) in enumerate(group):
            drawn = completion(g, text, is_finished=text != "no idea")
            samples.append(Sample(asked, drawn, text, RIGHT if right else WRONG))
    return Rollout(samples, len(texts[0]))


def settings_of(**changes):
    asked = {"samples": 4, "prompts": 3, "of": 3, "source": "aime24.jsonl", "grader": "math"}
    asked |= {"template": None, "temperature": 0.8, "top_p": 0.95, "max_response_tokens": 32}
    return {
        "name": "toy",
        "model": {"path": "models/toy", "step": None, "digest": "0" * 64},
        "suite": "math",
        "changed": [],
        "seed": 1,
        "sets": {"aime24": asked | changes},
        "versions": {"python": "3"},
    }


def test_figures_by_hand():
    rows = rows_of("aime24", rollout_of(), EVALUATE, 7)
    found = figures(rows, 4)
    assert found["avg"]["value"] == pytest.approx((2 / 4 + 1 / 4 + 2 / 4) / 3)
    assert found["pass"].keys() == {"1", "2", "4"}
    # No two of four are right with chance C(2,2)/C(4,2), C(3,2)/C(4,2), C(2,2)/C(4,2).
    assert found["pass"]["2"]["value"] == pytest.approx(1 - (1 / 6 + 3 / 6 + 1 / 6) / 3)
    # 1/2 and 0.5 are both right and so one answer; '3' has two votes; of '1' and '2' one is drawn.
    assert found["majority"]["value"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert "math" in found["majority"]["rule"]
    assert found["truncated"] == 1 / 12 and found["reasons"] == {"match": 5, "mismatch": 7}
    assert found["tokens"] == sum(len(text) for group in TEXTS for text, _ in group)
    assert found["reward"]["value"] == found["avg"]["value"]


def test_a_reward_that_is_no_share_has_no_share_of_right_answers():
    rows = [judged(r, "custom", Verdict(2.5, "scored")) for r in rows_of("s", rollout_of(), 1, 0)]
    found = figures(rows, 4)
    assert found["avg"] is None and found["majority"] is None and found["pass"] == {}
    assert found["reward"]["value"] == 2.5
    report = make_report(settings_of(), [r | {"set": "aime24"} for r in rows])
    assert report["average"] is None and "2.500 +- 0.000" in page(report, {})


def test_failed_graders_are_said():
    rows = rows_of("aime24", rollout_of(), EVALUATE, 7)
    rows[0] = judged(rows[0], "math", Verdict(0.0, "crash", is_valid=False))
    report = make_report(settings_of(), rows)
    assert report["figures"]["aime24"]["grader_failures"] == 1
    assert "**Graders failed: aime24 1 samples, which count as wrong.**" in page(report, {})


def test_the_page_has_the_papers_rows_and_says_whose_are_whose():
    rows = rows_of("aime24", rollout_of(), EVALUATE, 7)
    text = page(make_report(settings_of(), rows), {"aime24": 2.0})
    assert "| ASPO-Math-1.5B | published, arXiv 2510.06062 | 49.0 (80.0) | - |" in text
    assert "| **toy** | ours | 41.7 (100.0) | - |" in text
    assert "Limited" not in text and "2 seconds for 120 tokens (60 a second)" in text
    assert read_published()["citation"] in text
    limited = page(make_report(settings_of(of=30), rows), {})
    assert "| **toy** | ours, LIMITED | 41.7 (100.0) | - |" in limited
    assert "**Limited: aime24 3 of 30 prompts. This is not the published score.**" in limited
    other = settings_of() | {"changed": ["aime24.samples: 64 -> 4", "Suite.seed: 1 -> 2"]}
    assert "| **toy** | ours, other settings |" in page(make_report(other, rows), {})
    unknown = settings_of() | {"sets": {"mine": settings_of()["sets"]["aime24"]}}
    assert "published" not in page(make_report(unknown, [r | {"set": "mine"} for r in rows]), {})


def test_every_row_of_a_table_is_as_wide_as_its_head():
    rows = rows_of("aime24", rollout_of(), EVALUATE, 7)
    text = page(make_report(settings_of(template="a | b\n{prompt}"), rows), {})
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_samples_come_back_as_they_were(tmp_path):
    """In whatever chunks they were written; a torn file of a kill is none."""
    long = rollout_of(answer="9" * (TOLD_ONCE + 1))
    rows = rows_of("b", long, EVALUATE, 7)
    assert [r["answer"] is None for r in rows[:4]] == [False, True, True, True]
    assert [r["columns"] for r in rows[:2]] == ['{"level": 0}', None]
    write_chunk(tmp_path, rows[4:])
    write_chunk(tmp_path, [])
    assert finished_draws(read_samples(tmp_path), "b", 4) == {1, 2}
    assert finished_draws(read_samples(tmp_path), "b", 8) == set()
    write_chunk(tmp_path, rows[:3])
    assert finished_draws(read_samples(tmp_path), "b", 4) == {1, 2}
    write_chunk(tmp_path, rows[:4])
    (tmp_path / "chunks" / ".b-000009-0.parquet.tmp").write_bytes(b"torn")
    assert read_samples(tmp_path) == rows
    write_samples(tmp_path, rows)
    assert read_samples(tmp_path) == rows and not (tmp_path / "chunks").exists()
    (tmp_path / "samples.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ResultsError, match=r"samples\.parquet: cannot be read"):
        read_samples(tmp_path)


def test_a_folder_is_of_one_evaluation(tmp_path):
    movable = re.compile(r"a\.path")
    claim(tmp_path, {"a": {"path": "x", "n": 1}, "list": (1, 2)}, movable)
    claim(tmp_path, {"a": {"path": "y", "n": 1}, "list": (1, 2)}, movable)
    with pytest.raises(ResultsError, match=r"another evaluation:\n  a\.n: 1 -> 2\nchoose"):
        claim(tmp_path, {"a": {"path": "y", "n": 2}, "list": (1, 2)}, movable)
    assert json.loads((tmp_path / "settings.json").read_text())["a"] == {"path": "y", "n": 1}
    (tmp_path / "settings.json").unlink()
    (tmp_path / "chunks").mkdir()
    with pytest.raises(ResultsError, match=r"holds samples but no settings\.json"):
        claim(tmp_path, {}, movable)
    assert list(differences({"a": {}}, {"a": {"b": None}}, movable)) == ["a: {} -> '(not set)'"]


def test_votes_are_equal_for_equal_answers():
    assert vote("math", r"\boxed{ \frac{1}{3} }", True, False) == vote(
        "math", r"The answer is \boxed{\frac13}.", True, False
    )
    assert vote("math", r"\boxed{1}", True, False) != vote("math", r"\boxed{2}", True, False)
    assert vote("math", "", True, False) is None
    # What was cut off votes for what it calls its answer only, as it is graded.
    assert vote("math", "so 3", False, False) is None is not vote("math", "so 3", True, False)
    assert vote("exact", " a  b ", True, False) == vote("exact", "a b", True, False)
    assert vote("math", "x", True, True) == vote("math", "y", True, True)


def test_intervals_say_how_they_were_made():
    rows = rows_of("aime24", rollout_of(), EVALUATE, 7)
    report = make_report(settings_of(), rows)
    assert report["intervals"] == "95%, problems resampled 2000 times, seed 0"
    low, high = (report["figures"]["aime24"]["avg"][end] for end in ("low", "high"))
    assert (low, high) == pytest.approx((0.25, 0.5)) and np.isfinite(low)
