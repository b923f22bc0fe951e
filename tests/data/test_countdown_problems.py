"""Countdown problems: the same everywhere, splits apart, lengths bounded."""

import itertools
import random
import subprocess
import sys

import pytest

from aspo_jax.data import (
    CHARACTERS,
    CountdownSource,
    CountdownSpec,
    DataError,
    build_character_tokenizer,
    demonstration,
    encode,
    max_prompt_tokens,
    max_response_tokens,
    problem,
    render,
    split_of,
)

SPECS = [
    CountdownSpec(),
    CountdownSpec(numbers=3),
    CountdownSpec(operations="+-*"),
    CountdownSpec(numbers=6, low=0, high=100, operations="+-*", max_intermediate=9999),
    CountdownSpec(numbers=5, low=1, high=2, operations="*+", max_intermediate=50),
    CountdownSpec(numbers=2, low=7, high=9, operations="-"),
]

GOLDEN = {
    "train": [
        "5 7 8 9:5>8-5=3,9+3=12,12-7=5",
        "1 2 6 7:2>7-1=6,2+6=8,8-6=2",
        "4 7 8 9:4>9-4=5,5+7=12,12-8=4",
        "1 1 2 8:10>1+8=9,9-1=8,2+8=10",
    ],
    "held_out": [
        "5 7 8 8:12>7+5=12,8-8=0,12+0=12",
        "6 6 6 8:10>6+6=12,6+12=18,18-8=10",
        "5 5 6 8:14>8+5=13,6-5=1,1+13=14",
        "1 3 3 9:8>9-3=6,6-1=5,3+5=8",
    ],
}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_golden_problems(split):
    """A change here changes every run: it must be meant, and named in the changelog."""
    drawn = [problem(CountdownSpec(), 0, i, split) for i in range(4)]
    assert [f"{p.text}>{demonstration(p, random.Random(0))}" for p in drawn] == GOLDEN[split]


def test_problems_do_not_depend_on_the_process():
    program = (
        "from aspo_jax.data import *\n"
        "print(*(problem(CountdownSpec(), 5, i, 'train').text for i in range(20)), sep='|')"
    )
    texts = "|".join(problem(CountdownSpec(), 5, i, "train").text for i in range(20))
    for hash_seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert found.stdout.strip() == texts


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_problems_keep_to_their_spec(spec):
    for i in range(200):
        drawn = problem(spec, 3, i, "train")
        assert len(drawn.numbers) == spec.numbers and list(drawn.numbers) == sorted(drawn.numbers)
        assert spec.low <= drawn.numbers[0] and drawn.numbers[-1] <= spec.high
        assert drawn.target == drawn.steps[-1].result >= 1
        for step in drawn.steps:
            assert step.operation in spec.operations
            assert 0 <= step.result <= spec.max_intermediate


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
def test_splits_are_disjoint_by_their_text(spec):
    splits = {
        split: {problem(spec, seed, i, split).text for seed in (0, 1) for i in range(500)}
        for split in ("train", "held_out")
    }
    assert not splits["train"] & splits["held_out"]
    for split, texts in splits.items():
        assert {split_of(text) for text in texts} == {split}


def test_about_a_fifth_is_held_out():
    texts = [f"{a} {b} {c}:{d}" for a, b, c, d in itertools.product(range(10), repeat=4)]
    assert sum(split_of(text) == "held_out" for text in texts) == pytest.approx(2000, abs=150)


def test_seeds_splits_and_indices_differ():
    spec = CountdownSpec()
    draws = {
        tuple(problem(spec, seed, i, split).text for i in range(10))
        for seed in range(5)
        for split in ("train", "held_out")
    }
    assert len(draws) == 10


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_length_bounds_hold(spec):
    tokenizer = build_character_tokenizer(CHARACTERS)
    prompts, answers = [], []
    for i in range(300):
        drawn = problem(spec, 0, i, "train")
        text = render(tokenizer, [{"role": "user", "content": drawn.text}])
        prompts.append(len(encode(tokenizer, text)))
        answer = demonstration(drawn, random.Random(i)) + "<eos>"
        answers.append(len(encode(tokenizer, answer)))
    assert max(prompts) <= max_prompt_tokens(spec)
    assert max(answers) <= max_response_tokens(spec)


def test_length_bounds_of_the_default_are_tight():
    assert (max_prompt_tokens(CountdownSpec()), max_response_tokens(CountdownSpec())) == (12, 23)
    (row,) = CountdownSource(CountdownSpec(), 0, "train").longest
    assert row["prompt"] == "9 9 9 9:36"


def test_demonstrations_vary_with_their_rng():
    drawn = problem(CountdownSpec(operations="+"), 0, 0, "train")
    texts = {demonstration(drawn, random.Random(i)) for i in range(50)}
    assert len(texts) == 8  # two orders for each of three sums
    assert demonstration(drawn, random.Random(1)) == demonstration(drawn, random.Random(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"numbers": 1}, "Countdown.numbers is 1, expected 2 to 16"),
        ({"numbers": 17}, "Countdown.numbers is 17"),
        ({"low": -1}, "Countdown.low is -1, expected 0 or more"),
        ({"high": 0}, r"Countdown.high is 0, expected 1 \(low\)"),
        ({"operations": ""}, "Countdown.operations is '', expected one or more of"),
        ({"operations": "+/"}, "Countdown.operations is '\\+/'"),
        ({"operations": "++"}, "each once"),
        ({"max_intermediate": 0}, "Countdown.max_intermediate is 0, expected 1"),
        ({"low": 60, "high": 99, "operations": "+"}, "no problem at all .*max_intermediate=99"),
        ({"low": 5, "high": 5, "operations": "-"}, "no problem at all .*operations='-'"),
    ],
)
def test_impossible_specs(fields, message):
    with pytest.raises(DataError, match=message):
        CountdownSpec(**fields)


def test_a_spec_too_narrow_for_a_split():
    spec = CountdownSpec(numbers=2, low=1, high=1, operations="+")  # only 1 1:2
    other = "train" if split_of("1 1:2") == "held_out" else "held_out"
    assert problem(spec, 0, 0, split_of("1 1:2")).text == "1 1:2"
    with pytest.raises(DataError, match=f"no problem in '{other}'"):
        problem(spec, 0, 0, other)


def test_source_rows():
    source = CountdownSource(CountdownSpec(), seed=2, split="held_out", size=5)
    drawn = problem(CountdownSpec(), 2, 3, "held_out")
    assert len(source) == 5
    assert source[3] == {
        "id": "countdown/held_out/2/3",
        "prompt": drawn.text,
        "answer": {"numbers": list(drawn.numbers), "target": drawn.target, "operations": "+-"},
        "kind": "countdown",
    }
    assert [row["id"] for row in source] == [f"countdown/held_out/2/{i}" for i in range(5)]
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]


def test_imports_stay_light():
    heavy = "{'jax', 'numpy', 'transformers', 'tokenizers', 'grain'}"
    program = f"import sys, aspo_jax.data; sys.exit(str({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr.strip() == "set()"
