"""The map from a record to a row: names that lead inside, patterns, templates, layouts."""

import dataclasses
import json
from typing import Any

import pytest

from aspo_jax.data import LAYOUTS, DataError, Fields, made_rows, read_rows
from aspo_jax.data.verl import GRADERS
from aspo_jax.rewards import KINDS, find_problem

GSM8K = "She sells 3 * 450 = <<3*450=1350>>1,350.\n#### 1,350"
PROBLEM = {
    "uid": 7,
    "task": {"text": "Add.", "level": 2, "hints": ["one", "two"]},
    "a.b": "dotted",
    "gold": GSM8K,
    "tests": {"inputs": ["1"], "outputs": ["2"]},
    "note": None,
}


def row_of(record=PROBLEM, **fields):
    named: dict[str, Any] = {
        "id": "uid",
        "prompt": "task.text",
        "answer": "gold",
        "grader": "math",
    } | fields
    (row,) = made_rows([record], "mine", KINDS, Fields(**named))
    return row


def test_names_that_lead_inside():
    row = row_of()
    assert (row["id"], row["question"], row["answer"]) == ("7", "Add.", GSM8K)
    assert (row["kind"], row["where"]) == ("math", "mine row 1")
    assert row_of(answer="a.b")["answer"] == "dotted"
    assert row_of(answer="task.hints.1")["answer"] == "two"
    assert row_of(answer="tests", grader="code")["answer"] == PROBLEM["tests"]
    with pytest.raises(DataError, match="no field 'task.hints.2'"):
        row_of(answer="task.hints.2")


def test_what_else_a_record_holds_is_kept_for_its_grader():
    assert row_of()["columns"].keys() == {"task", "a.b", "tests", "note"}
    assert row_of(answer="*", grader="code")["columns"].keys() == {*PROBLEM} - {"uid"}


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        (r"#### (.*)", "1,350"),
        (r"#### .*", "#### 1,350"),
        (r"(?:<<.*=)(\d+)>>", "1350"),
        (r"\d+$", "350"),
    ],
)
def test_a_pattern_takes_its_group_or_all_it_matches(pattern, answer):
    assert row_of(answer_pattern=pattern)["answer"] == answer


def test_a_group_that_did_not_match_is_no_answer():
    with pytest.raises(DataError, match="found null for 'gold'"):
        row_of(answer_pattern="####|(5000)")


def test_the_record_as_a_whole_is_the_answer():
    humaneval = {"prompt": "def f(x):\n", "test": "def check(c):\n  assert c(1) == 1", "id": "h"}
    humaneval["entry_point"] = "f"
    mbpp = {"text": "Same.", "test_list": ["assert f(1) == 1"], "test_setup_code": "", "code": "x"}
    for record, prompt in ((humaneval, "prompt"), (mbpp, "text")):
        row = row_of(record, id="id", prompt=prompt, answer="*", grader="code")
        assert row["answer"] == record
        assert find_problem("code", row["answer"]) is None


def test_templates():
    def asked(template, **fields):
        return row_of(template=template, **fields)["messages"][-1]["content"]

    assert asked("{prompt}") == "Add."
    assert asked("{prompt} ({task.level})\n{task.hints}") == "Add. (2)\none\ntwo"
    assert asked("{a.b}{prompt}{prompt}") == "dottedAdd.Add."
    assert asked("{tests}") == json.dumps(PROBLEM["tests"])
    assert asked(r"\boxed{} {{x}} { } {1} {prompt}") == r"\boxed{} {x} { } {1} Add."
    assert row_of(template="{prompt}!")["question"] == "Add."
    with pytest.raises(DataError, match="no field 'level'"):
        asked("{level}")
    with pytest.raises(DataError, match="null for 'note', expected something to fill the template"):
        asked("{note}")


def test_the_template_is_around_the_last_message_and_the_system_before_all():
    chat = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "{prompt}"},
    ]
    row = row_of({"chat": chat, "gold": "4"}, prompt="chat", template="<{prompt}>", system="Short.")
    assert row["messages"] == [
        {"role": "system", "content": "Short."},
        *chat[:2],
        {"role": "user", "content": "<{prompt}>"},  # what is filled in is not read again
    ]
    assert row["question"] == "{prompt}"


def test_two_system_messages_are_an_error():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1"}]
    record = {"messages": chat, "answer": "4"}
    (row,) = made_rows([record], "mine", fields=Fields(grader="math"))
    assert row["messages"] == chat
    with pytest.raises(DataError, match="a chat with a system message, expected none beside Data"):
        made_rows([record], "mine", fields=Fields(grader="math", system="Short."))


def test_a_text_of_a_prompt_is_no_template():
    record = {"prompt": "{answer} {x}", "answer": "4"}
    (row,) = made_rows([record], "mine", fields=Fields(grader="math", template="{prompt}"))
    assert row["messages"][0]["content"] == "{answer} {x}"


# --- layouts --------------------------------------------------------------------------------------


def verl(source="math_dapo", index: object = 0, **changes):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "2+2"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": index},
    } | changes


def rows_of_verl(*records, **fields):
    return made_rows(records, "mine", KINDS, dataclasses.replace(LAYOUTS["verl"], **fields))


def test_rows_of_verl_as_they_are():
    tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    code = verl("livecodebench_v5", "c", reward_model={"ground_truth": tests})
    first, second = rows_of_verl(verl(index="9a9b"), code)
    assert (first["id"], first["kind"], first["answer"]) == ("9a9b", "math", "4")
    assert first["messages"] == verl()["prompt"] and first["question"] == "2+2"
    assert first["columns"].keys() == {"data_source", "ability", "reward_model", "extra_info"}
    assert (second["id"], second["kind"]) == ("c", "code")
    assert find_problem("code", second["answer"]) is None


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([5, 6, 7], ["5", "6", "7"]),
        ([0, 1, 0], ["1", "2", "3"]),  # two sources that each count from 0
        ([4, None, "x"], ["4", "2", "x"]),
        ([2, None, 7], ["1", "2", "3"]),  # the number of the second is the first's index
    ],
)
def test_rows_of_verl_are_numbered_where_their_indices_do_not_tell(indices, expected):
    rows = rows_of_verl(*(verl(index=index) for index in indices))
    assert [row["id"] for row in rows] == expected
    without = verl()
    del without["extra_info"]
    assert [row["id"] for row in rows_of_verl(without, without)] == ["1", "2"]


def test_the_graders_of_verl():
    assert set(GRADERS.values()) <= set(KINDS)
    for source, kind in {
        "openai/gsm8k": "math",
        "DigitalLearningGmbH/MATH-lighteval": "math",
        "aime2024": "math",
        "math_dapo_reasoning": "math",
        "numina_olympiads": "math",
        "code": "code",
        "codecontests": "code",
        "livecodebench": "code",
    }.items():
        assert rows_of_verl(verl(source))[0]["kind"] == kind
    with pytest.raises(DataError, match="data_source = 'hiyouga/geometry3k', for which no grader"):
        rows_of_verl(verl("hiyouga/geometry3k"))
    assert rows_of_verl(verl("hiyouga/geometry3k"), grader="exact")[0]["kind"] == "exact"


def test_a_file_is_read_as_made_rows_are(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    fields = Fields(id="uid", prompt="task.text", answer="gold", grader="math")
    (row,) = read_rows(tmp_path / "mine.jsonl", KINDS, fields)
    assert row | {"where": "mine row 1"} == row_of()
