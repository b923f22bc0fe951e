"""Suites as data: what is read of them, and what is said of every mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from aspo_jax.config import ConfigError
from aspo_jax.config.suites import file_suite, point, read_suite, suites
from aspo_jax.data import CHARACTERS, DataError, build_character_tokenizer
from aspo_jax.rewards import Rules, Scorer, Submission
from aspo_jax.scoring.report import read_published
from aspo_jax.suites import digest_of, read_problems

TWO = """
include 'one.gin'
longest = 32
Suite.sets = ('sums', 'dated')
Suite.max_response_tokens = %longest
dated.paths = ('dated.jsonl',)
dated.grader = 'exact'
dated.window = 'when'
dated.since = '2024-08-01'
dated.until = '2025-02-01'
dated.samples = 3
dated.temperature = 0.5
Reward.timeout_s = 9.0
"""
ONE = """
Suite.sets = ('sums',)
sums.paths = ('gone.jsonl', 'sums.jsonl', 'hub:someone/sums/test')
sums.prompt = 'question'
sums.answer = 'said'
sums.answer_pattern = '#### (.*)'
sums.grader = 'exact'
sums.template = 'Q {prompt}'
sums.max_response_tokens = 8
"""


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.gin").write_text(ONE)
    (tmp_path / "two.gin").write_text(TWO)
    jsonl(tmp_path / "sums.jsonl", [{"question": f"{i}+1", "said": f"#### {i + 1}"} for i in "123"
                                    for i in [int(i)]])  # fmt: skip
    days = ("2024-07-31", "2024-08-01T23:59:00", "2025-02-01T00:00:00", "2025-02-02")
    jsonl(tmp_path / "dated.jsonl", [{"prompt": d, "answer": "x", "when": d} for d in days])
    return tmp_path


def flags(*texts: str) -> list[tuple[str, str]]:
    return [(f"--set #{i}", text) for i, text in enumerate(texts, start=1)]


def test_a_set_is_as_the_suite_says_unless_it_says_otherwise(folder):
    suite = read_suite(str(folder / "two.gin"))
    assert list(suite.sets) == ["sums", "dated"] and suite.name == "two" and suite.seed == 1
    sums, dated = suite.sets.values()
    assert (sums.max_response_tokens, dated.max_response_tokens) == (8, 32)
    assert (sums.samples, dated.samples, dated.temperature) == (1, 3, 0.5)
    assert list(suite.engine) == ["Reward.timeout_s"] and suite.changed == ()


def test_the_command_line_is_of_all_sets_and_the_later_wins(folder):
    suite = read_suite(
        str(folder / "two.gin"),
        flags(
            "sums.samples=9",
            "sums.temperature=1.0",
            "Suite.max_response_tokens=4",
            "sums.max_response_tokens=5",
        ),
    )
    sums, dated = suite.sets.values()
    assert (sums.max_response_tokens, dated.max_response_tokens) == (5, 4)
    assert suite.changed == (
        "sums.samples: 1 -> 9",
        "sums.temperature: 0.0 -> 1.0",
        "sums.max_response_tokens: 8 -> 5",
        "dated.max_response_tokens: 32 -> 4",
    )


def test_problems_are_read_from_the_first_file_there_is(folder):
    sums, dated = read_problems(read_suite(str(folder / "two.gin")), folder)
    assert sums.source == str(folder / "sums.jsonl")
    assert [row["messages"][-1]["content"] for row in sums.rows] == ["Q 1+1", "Q 2+1", "Q 3+1"]
    assert [row["answer"] for row in sums.rows] == ["2", "3", "4"]
    # Both ends of the window count, whatever the hour.
    assert [row["question"] for row in dated.rows] == ["2024-08-01T23:59:00", "2025-02-01T00:00:00"]
    assert dated.count == 2 and not dated.is_limited and dated.kinds == {"exact"}


def test_a_limit_takes_the_first(folder):
    suite = read_suite(str(folder / "two.gin"), flags("Suite.limit=2"))
    sums, dated = read_problems(suite, folder)
    assert (len(sums.rows), sums.count, sums.is_limited) == (2, 3, True)
    assert not dated.is_limited


def test_numbers_have_windows_too(folder):
    jsonl(folder / "n.jsonl", [{"prompt": "p", "answer": "x", "n": n, "kind": "exact"}
                               for n in range(1, 20)])  # fmt: skip
    suite = file_suite(
        folder / "n.jsonl", flags("Suite.window=n", "Suite.since='11'", "Suite.until='13'")
    )
    (found,) = read_problems(suite, "nowhere")
    assert [row["columns"]["n"] for row in found.rows] == [11, 12, 13]
    assert point("2024-08-01") == point("2024-08-01 12:00") != point("2024-08-02")
    assert point("eleven") is None and point(True) is None and point("11") == 11


def test_the_digest_is_of_what_is_asked_and_graded(folder):
    tokenizer = build_character_tokenizer(CHARACTERS)
    jsonl(folder / "a.jsonl", [{"prompt": "1 2:3", "answer": "x", "kind": "exact"}])
    (before,) = read_problems(file_suite(folder / "a.jsonl"), folder)
    jsonl(folder / "b.jsonl", [{"prompt": "1 2:3", "answer": "y", "kind": "exact"}])
    (after,) = read_problems(file_suite(folder / "b.jsonl"), folder)
    digests = {digest_of(each.prompts(tokenizer)) for each in (before, after, before)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sums.sampels=1", "sums has no field sampels (did you mean samples?)"),
        ("sum.samples=1", "there is no set or section sum (did you mean sums?)"),
        ("sums.samples=0", "expected a whole number >= 1, found 0"),
        ("Suite.samples=0", "expected a whole number >= 1, found 0"),
        ("sums.samples=many", "expected a whole number >= 1, found 'many'"),
        ("sums.samples=2", "at temperature 0 all samples are one text"),
        ("sums.top_p=0.9", "sums.top_p means nothing where the temperature is 0"),
        ("Suite.sets=('sums','sums')", "names 'sums' 2 times, expected it once"),
        ("Suite.sets=('sum',)", "there is no set 'sum' (did you mean sums?)"),
        ("Suite.sets=()", "expected at least one set"),
        ("Suite.sets=('Run',)", "'Run' cannot be the name of a set"),
        ("dated.since=August", "expected a date such as '2024-08-01', or a number"),
        ("sums.until='5'", "sums.since and until need sums.window"),
        ("dated.answer_pattern='(a)(b)'", "has 2 groups, expected at most one"),
        ("Sampler.temperature=1.0", "has no meaning in an evaluation; set Suite.temperature"),
        ("Sampler.max_gap=1.0", "has no meaning in an evaluation; of Sampler there are slots"),
        ("Train.epochs=2", "has no meaning in an evaluation; leave Train out"),
        ("Reward.timeout=2", "Reward has no field timeout (did you mean timeout_s?)"),
        ("samples=2", "the macro is never used"),
    ],
)
def test_mistakes_name_their_place_and_the_nearest_name(folder, setting, message):
    with pytest.raises(ConfigError) as caught:
        read_suite(str(folder / "two.gin"), flags(setting))
    assert message in str(caught.value)
    named = "--set #1" in str(caught.value) or "sums.since" in message or "2 groups" in message
    assert named, str(caught.value)


def test_mistakes_in_a_file_name_its_line(folder):
    (folder / "two.gin").write_text(TWO + "dated.tempreture = 1.0\n")
    with pytest.raises(ConfigError, match=r"two\.gin:14: dated\.tempreture = 1\.0: dated has no"):
        read_suite(str(folder / "two.gin"))


def test_an_unknown_suite_names_those_there_are(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"no suite 'mth'; .* math.*did you mean math"):
        read_suite("mth")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"no suite 'gone\.gin'"):
        read_suite("gone.gin")


def test_missing_files_and_fields_are_one_message(folder):
    (folder / "sums.jsonl").unlink()
    (folder / "dated.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    text = TWO.replace("%longest", "9").replace("longest = 32\n", "")
    (folder / "one.gin").write_text(ONE.replace(", 'hub:someone/sums/test'", ""))
    (folder / "two.gin").write_text(text)
    with pytest.raises(DataError) as caught:
        read_problems(read_suite(str(folder / "two.gin")), folder)
    lines = str(caught.value).splitlines()
    assert "set sums: there is no file" in lines[0] and "--data-folder" in lines[0]
    assert "set dated:" in lines[1] and "found None for 'when'" in lines[1]
    (folder / "mine.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(DataError, match=r"set mine: .*mine\.jsonl:1: found no field 'kind'"):
        read_problems(file_suite(folder / "mine.jsonl"), folder)
    with pytest.raises(DataError, match=r"set mine: .*mine\.jsonl:1: found neither of 'prompt'"):
        read_problems(file_suite(folder / "mine.jsonl", flags("Suite.grader=exact")), folder)


def test_an_empty_window_is_an_error(folder):
    suite = read_suite(
        str(folder / "two.gin"), flags("dated.since=2030-01-01", "dated.until=2031-01-01")
    )
    with pytest.raises(DataError, match="found no row with when from 2030-01-01 to 2031-01-01"):
        read_problems(suite, folder)


@pytest.mark.parametrize("name", suites())
def test_every_packaged_suite_is_sound(name):
    suite = read_suite(name)
    assert suite.sets and all(s.grader for s in suite.sets.values())
    for s in suite.sets.values():
        assert s.template is None or "{prompt}" in s.template


def test_the_protocol_of_the_paper():
    math = read_suite("math").sets
    k = {"aime24": 64, "aime25": 64, "amc23": 64, "math500": 4, "minerva": 8, "olympiadbench": 4}
    assert {name: s.samples for name, s in math.items()} == k
    asked = {(s.temperature, s.top_p, s.max_response_tokens) for s in math.values()}
    assert asked == {(0.8, 0.95, 32768)}


def test_published_rows_are_whole_and_average_as_printed():
    for table in read_published()["tables"].values():
        size = len(table["sets"])
        assert len(table["titles"]) == size
        for row in table["rows"]:
            assert len(row["avg"]) == len(row["pass"]) == size
            assert all(a <= p for a, p in zip(row["avg"], row["pass"], strict=True))
            assert sum(row["avg"]) / size == pytest.approx(row["mean"], abs=0.11)


def test_the_page_has_the_protocols_that_are_shipped():
    """The table of docs/evaluation.md against the files, set by set."""
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    table = text[text.index("| suite | set |") :].split("\n\n")[0].splitlines()[2:]
    listed: dict[str, list[str]] = {}
    for line in table:
        names, name, size, *asked = [cell.strip() for cell in line.strip("|").split("|")]
        for suite in names.split(", "):
            listed.setdefault(suite, []).append(name)
            s = read_suite(suite).sets[name]
            numbers = (s.samples, s.temperature, s.top_p, s.max_response_tokens)
            assert asked == [*(f"{number:g}" for number in numbers), s.grader], name
            assert size == (str(s.size) if s.size else f"{s.since} to {s.until}"), name
    assert listed == {name: list(read_suite(name).sets) for name in suites()} | {
        "small": ["gsm8k", "humaneval", "mbpp", "math500_greedy"]
    }


def test_programs_are_asked_of_records_as_they_are_published(tmp_path):
    """Our own small records in the shapes of HumanEval, MBPP and LiveCodeBench, then graded."""
    for name in ("humaneval", "mbpp", "livecodebench"):
        (tmp_path / name).mkdir()
    human = {
        "task_id": "Mine/0",
        "prompt": 'def twice(x):\n    """Two times x."""\n',
        "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
    packed = gzip.compress((json.dumps(human) + "\n").encode())
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(packed)
    mbpp = [
        {
            "task_id": number,
            "text": "Write a function twice.",
            "code": "def twice(x):\r\n  return 2 * x",
            "test_setup_code": "",
            "test_list": ["assert twice(1) == 2", "assert twice(2) == 4"],
            "challenge_test_list": [],
        }
        for number in (10, 11, 510, 511)
    ]
    jsonl(tmp_path / "mbpp" / "test.jsonl", mbpp)
    bench = [
        {
            "question_id": f"q{i}",
            "question_content": "Print the sum of a line.",
            "starter_code": "",
            "contest_date": f"{day}T00:00:00",
            "tests": {"inputs": ["1 2\n"], "outputs": ["3\n"]},
        }
        for i, day in enumerate(("2024-07-31", "2025-02-01", "2025-05-02"))
    ]
    jsonl(tmp_path / "livecodebench" / "test.jsonl", bench)
    asked = {
        each.name: each
        for suite in ("humaneval", "mbpp", "code")
        for each in read_problems(read_suite(suite), tmp_path)
    }
    texts = {name: each.rows[0]["messages"][-1]["content"] for name, each in asked.items()}
    assert '```python\ndef twice(x):\n    """Two times x."""\n```' in texts["humaneval"]
    assert "assert twice(1) == 2\nassert twice(2) == 4\n" in texts["mbpp"]
    assert [row["id"] for row in asked["mbpp"].rows] == ["11", "510"]
    assert asked["mbpp"].is_limited and asked["mbpp"].count == 500
    for name in ("lcb_v5", "lcb_v6"):  # a day on the border is in both
        assert [row["id"] for row in asked[name].rows] == ["q1"]

    def submission(name: str, program: str) -> Submission:
        row, text = asked[name].rows[0], f"So:\n```python\n{program}\n```\n"
        return Submission("code", text, row["answer"], True, 9, row=row["columns"])

    programs = [
        ("humaneval", "def twice(x):\n    return 2 * x", "match"),
        ("humaneval", "def twice(x):\n    return x", "mismatch"),
        ("mbpp", "def twice(x):\n    return x + x", "match"),
        ("lcb_v5", "print(sum(map(int, input().split())))", "match"),
        ("lcb_v6", "print(4)", "mismatch"),
    ]
    with Scorer(1, Rules(sandbox="rlimits"), ("code",)) as scorer:
        verdicts = scorer.score([submission(name, program) for name, program, _ in programs])
    assert [v.reason for v in verdicts] == [reason for _, _, reason in programs]
