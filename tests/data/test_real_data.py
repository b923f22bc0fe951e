"""Public data sets as they are on disk, by settings alone. ``ASPO_DATA`` names their folder."""

import collections
import os
from pathlib import Path

import pytest

from aspo_jax.data import Fields, made_rows, read_rows
from aspo_jax.rewards import KINDS, find_problem
from aspo_jax.rewards.math.mathematics import grade

ROOT = os.environ.get("ASPO_DATA")
pytestmark = pytest.mark.skipif(ROOT is None, reason="ASPO_DATA names no folder of real data sets")

PROBLEM = Fields(prompt="problem", grader="math")
GSM8K = Fields(prompt="question", answer_pattern="#### (.*)", grader="math")
MBPP = Fields(
    id="task_id",
    prompt="text",
    answer="*",
    grader="code",
    template="{prompt}\nYour code should pass these tests:\n{test_list}",
)
SETS = {
    "aime24/test.jsonl": (30, PROBLEM),
    "aime25/test.jsonl": (30, PROBLEM),
    "amc23/test.jsonl": (40, PROBLEM),
    "math500/test.jsonl": (500, Fields(id="unique_id", prompt="problem", grader="math")),
    "olympiadbench/test.jsonl": (
        675,
        Fields(prompt="question", answer="final_answer", grader="math"),
    ),
    "gsm8k/test.jsonl": (1319, GSM8K),
    "gsm8k/train_500.jsonl": (500, GSM8K),
    "aime_train_1983_2023/train.json": (975, PROBLEM),
    "math_train/train_1000.jsonl": (999, PROBLEM),  # one answer is null
    "humaneval/HumanEval.jsonl.gz": (164, Fields(id="task_id", answer="*", grader="code")),
    "mbpp/test_11_260.jsonl": (260, MBPP),
    "mbpp": (360, MBPP),
    "code_contests/test_small_even.jsonl": (
        40,
        Fields(prompt="problem", answer="tests", grader="code"),
    ),
    "countdown/cd3_test.jsonl": (256, Fields(prompt="input", answer="output", grader="exact")),
}


@pytest.mark.parametrize("name", SETS)
def test_every_row_can_be_used(name):
    count, fields = SETS[name]
    skipped = []
    rows = read_rows(Path(ROOT or "") / name, KINDS, fields, skipped)
    assert len(rows) == count
    assert [row["where"] for row in rows if find_problem(row["kind"], row["answer"])] == []
    null = [f"{ROOT}/{name}:887: found null for 'answer'"] if count == 999 else []
    assert [text.partition(", expected")[0] for text in skipped] == null


@pytest.mark.parametrize(
    ("name", "gold", "right", "wrong"),
    [
        ("aime24/test.jsonl", "033", "33", "34"),
        ("aime25/test.jsonl", 70, "70", "71"),
        ("amc23/test.jsonl", 27.0, "27", "26"),
        ("gsm8k/test.jsonl", "18", "18", "19"),
    ],
)
def test_answers_of_every_type_are_graded(name, gold, right, wrong):
    answers = [row["answer"] for row in read_rows(Path(ROOT or "") / name, KINDS, SETS[name][1])]
    found = answers[answers.index(gold)]
    assert type(found) is type(gold)
    assert grade(rf"\boxed{{{right}}}", found, True).reward == 1
    assert grade(rf"\boxed{{{wrong}}}", found, True).reward == 0


def test_thousands_with_a_comma():
    rows = read_rows(Path(ROOT or "") / "gsm8k/test.jsonl", KINDS, GSM8K)
    commas = [row["answer"] for row in rows if "," in row["answer"]]
    assert commas
    for answer in commas:
        assert grade(f"#### {answer.replace(',', '')}", answer, True).reward == 1


def test_line_ends_of_windows_stay():
    rows = read_rows(Path(ROOT or "") / "mbpp/train_601_700.jsonl", KINDS, MBPP)
    assert sum("\r\n" in row["answer"]["code"] for row in rows) > 50
    assert all(row["messages"][0]["content"].count("assert") >= 3 for row in rows)


def test_countdown_puzzles_by_a_source_of_a_few_lines():
    def puzzles(records):
        for row in records:
            answer = {
                "numbers": [int(number) for number in row["question"].split(",")],
                "target": int(row["answer"]),
                "operations": "+-*",
            }
            prompt = f"{row['question'].replace(',', ' ')}:{row['answer']}"
            yield {"prompt": prompt, "answer": answer, "kind": "countdown"}

    fields = SETS["countdown/cd3_test.jsonl"][1]
    records = read_rows(Path(ROOT or "") / "countdown/cd3_test.jsonl", KINDS, fields)
    rows = made_rows(puzzles(records), "cd3", KINDS)
    usable = collections.Counter(find_problem("countdown", row["answer"]) is None for row in rows)
    assert usable == {True: 239, False: 17}  # these need a division
