"""Prompts from a generator: the stream of a file, without the file."""

import itertools
import random

import pytest

from aspo_jax.data import CHARACTERS, DataError, build_character_tokenizer, generated, prompts


def sums():
    draw = random.Random(0)
    while True:
        a, b = draw.randrange(100), draw.randrange(100)
        yield {"prompt": f"{a}+{b}", "answer": a + b, "kind": "exact"}


def few():
    for i in range(5):
        yield {"id": f"few/{i}", "prompt": f"{i}", "answer": f"{i}", "kind": "exact"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_character_tokenizer(CHARACTERS)


@pytest.fixture
def stream(tokenizer):
    def make(rows=sums, prompts_per_step=4, max_prompt_tokens=12, **how):
        return generated(
            rows,
            tokenizer=tokenizer,
            prompts_per_step=prompts_per_step,
            max_prompt_tokens=max_prompt_tokens,
            **how,
        )

    return make


def take(stream, count):
    return list(itertools.islice(stream, count))


def ids(batches):
    return [prompt.id for batch in batches for prompt in batch]


def test_steps_hold_the_rows_in_their_order(stream):
    first, second = take(stream(few, 2), 2)
    assert [(p.id, p.draw, p.text, p.answer, p.kind) for p in first] == [
        ("few/0", 0, "<bos>0>", "0", "exact"),
        ("few/1", 1, "<bos>1>", "1", "exact"),
    ]
    assert [prompt.draw for prompt in second] == [2, 3]
    assert ids(take(stream(), 2)) == list("12345678")


def test_it_is_the_stream_of_the_same_rows_in_a_list(stream, tokenizer):
    listed = prompts(list(few()), tokenizer=tokenizer, seed=0, shuffle=False, prompts_per_step=3)
    assert take(stream(few, 3), 7) == take(listed, 7)


def test_a_generator_that_ends_is_made_again(stream):
    assert ids(take(stream(few, 4), 3)) == [f"few/{i % 5}" for i in range(12)]
    assert ids(take(stream(few, 12), 1)) == [f"few/{i % 5}" for i in range(12)]


@pytest.mark.parametrize("k", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("rows", [sums, few])
def test_restored_is_never_stopped(stream, rows, k):
    whole = stream(rows)
    take(whole, k)
    state = whole.state()
    assert state == k
    rest = take(whole, 6)
    fresh = stream(rows)
    fresh.restore(state)
    assert take(fresh, 6) == rest
    whole.restore(state)  # and back in place
    assert take(whole, 6) == rest
    assert fresh.state() == k + 6


def test_processes_share_each_step(stream):
    whole = take(stream(), 3)
    shares = [take(stream(process=i, processes=2), 3) for i in range(2)]
    assert [batch[0::2] for batch in whole] == shares[0]
    assert [batch[1::2] for batch in whole] == shares[1]
    with pytest.raises(DataError, match="3 processes cannot share Train.prompts_per_step = 4"):
        stream(processes=3)


def with_row(number, **changes):
    """A generator of which one row is changed; None takes a field away."""

    def make():
        for i, row in enumerate(sums(), start=1):
            new = row | changes if i == number else row
            yield {name: value for name, value in new.items() if value is not None}

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "exakt"}, r"found kind 'exakt', expected one of \['exact'\]"),
        ({"answer": None}, "no field 'answer'"),
        ({"messages": []}, "both of 'prompt' and 'messages'"),
        ({"answer": {1, 2}}, "a value that JSON does not hold .*set"),
        ({"answer": float("nan")}, "a value that JSON does not hold"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "a"}, "cannot be written"),
        (
            {"prompt": "1" * 17},
            "found a prompt of 19 tokens, the longest of 1 .of 4. that are too long, expected at"
            " most 12; set Sampler.max_prompt_tokens = 19",
        ),
    ],
)
@pytest.mark.parametrize("process", [0, 1])
def test_a_bad_row_is_named_in_its_step_on_every_process(stream, changes, message, process):
    """Twice: a step that failed is not taken for one that was drawn."""
    made = stream(with_row(6, **changes), kinds=["exact"], process=process, processes=2)
    next(made)
    for _ in range(2):
        with pytest.raises(DataError, match=f"^row 6 of the generator.*{message}"):
            next(made)
    assert made.state() == 1


def test_what_is_no_row_is_named(stream):
    with pytest.raises(DataError, match="^row 1 of the generator: found a str, expected a dict"):
        next(stream(lambda: ["1+1"]))


def test_a_generator_without_rows_is_an_error(stream):
    with pytest.raises(DataError, match="no row in generator 1 of the stream"):
        next(stream(list))
    once = few()
    with pytest.raises(DataError, match="no row in generator 2 .* a new generator from every call"):
        take(stream(lambda: once, 2), 3)
