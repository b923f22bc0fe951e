"""Questions that two data sets share: by words, of files, and as a command."""

import json
import os
from pathlib import Path

import pytest

from aspo_jax.data import DataError, overlaps
from aspo_jax.data.overlap import questions, shared_questions, words_of
from aspo_jax.overlap import main

REAL = os.environ.get("ASPO_DATA")
TRAIN = ["Find $x$ if x+1 = 3 and x < 9.", "What is 12-30?", "How many?", "ＦＵＬＬ width, twice"]
TEST = ["find\n\\(x\\) IF  x+1 = 3, and x < 9 !", "What is 12+30?", "full Width twice"]


def test_words():
    assert words_of("a_b, $C$: 12-30!") == ["a", "b", "c", "12", "-", "30", "!"]
    assert words_of("É ﬁ") == ["é", "fi"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, [None, None, None, 2]),  # the first has a sign more
        (100, [None, None, None, 2]),
        (8, [0, None, None, 2]),
        (4, [0, None, None, 2]),  # 'how many' is short and compared whole
        (2, [0, 1, None, 2]),
        (1, [0, 1, None, 2]),
    ],
)
def test_overlaps(words, expected):
    assert overlaps(TRAIN, TEST, words) == expected


def test_the_first_of_several_is_named():
    assert overlaps(["a b c d"], ["x", "c d e", "a b c"], 2) == [1]


@pytest.fixture
def files(tmp_path):
    train = [{"problem": {"text": text}, "answer": None} for text in TRAIN]
    (tmp_path / "train.json").write_text(json.dumps(train))
    rows = [{"messages": [{"role": "user", "content": text}]} for text in TEST]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    named = ["train.json", "test.jsonl", "--train-prompt", "problem.text"]
    assert main(named) == 1
    shared = "train.json:1 (element 4) is test.jsonl:3\n"
    assert capsys.readouterr().out == f"{shared}1 of 4 training questions are one of 3 others\n"
    assert main([*named, "--words", "8"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("train.json:1 (element 1) is test.jsonl:1\n")
    assert out.endswith("2 of 4 training questions share 8 words in a row with one of 3 others\n")
    (files / "test.jsonl").write_text('{"prompt": "Another one"}\n')
    assert main(named) == 0
    assert capsys.readouterr().out == "0 of 4 training questions are one of 1 others\n"


def test_mistakes_of_the_command(files, capsys):
    assert main([str(files / "train.json"), str(files / "test.jsonl")]) == 2
    assert "train.json:1 (element 1): found neither of 'prompt' and" in capsys.readouterr().err
    assert main([str(files / "no.json"), str(files / "test.jsonl")]) == 2
    assert "no.json: cannot be read" in capsys.readouterr().err
    for words in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit) as stopped:
            main(["a", "b", "--words", words])
        assert stopped.value.code == 2
        assert "expected a whole number of 1 or more" in capsys.readouterr().err


def test_a_file_without_questions(files):
    (files / "test.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(DataError, match="test.jsonl:1: found an empty 'prompt'"):
        questions(files / "test.jsonl")


@pytest.mark.skipif(REAL is None, reason="ASPO_DATA names the folder of real data sets")
def test_six_problems_of_math_500_are_of_aime():
    folder = Path(REAL or "")
    aime = questions(folder / "aime_train_1983_2023" / "train.json", "problem")
    math = questions(folder / "math500" / "test.jsonl", "problem")
    assert (len(aime), len(math)) == (975, 500)
    shared = shared_questions(aime, math)
    assert len(shared) == 6
    numbers = sorted(int(question.where.rpartition(" ")[2][:-1]) for question, _ in shared)
    assert numbers == [2, 178, 303, 561, 726, 787]
    assert len(shared_questions(math, aime)) == 6
