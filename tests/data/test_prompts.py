"""The stream of prompts: whole epochs, one integer of state, prompts that fit."""

import itertools

import pytest

from aspo_jax.data import (
    CHARACTERS,
    CountdownSource,
    CountdownSpec,
    DataError,
    build_character_tokenizer,
    encode,
    fitting_rows,
    max_prompt_tokens,
    prompts,
)
from aspo_jax.structs import Prompt

ROWS = [{"id": str(i), "prompt": f"{i}:", "answer": str(i), "kind": "exact"} for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_character_tokenizer(CHARACTERS)


@pytest.fixture
def stream(tokenizer):
    def make(source=ROWS, seed=0, shuffle=True, prompts_per_step=3):
        return prompts(
            source,
            tokenizer=tokenizer,
            seed=seed,
            shuffle=shuffle,
            prompts_per_step=prompts_per_step,
        )

    return make


def take(stream, count):
    return list(itertools.islice(stream, count))


def ids(batches):
    return [prompt.id for batch in batches for prompt in batch]


def test_a_step_of_prompts(stream, tokenizer):
    first, second = take(stream(shuffle=False, prompts_per_step=2), 2)
    texts = ["<bos>0:>", "<bos>1:>"]
    zero, one = (tuple(encode(tokenizer, text)) for text in texts)
    assert len(zero) == len(one) == 4 and zero[0] == tokenizer.bos_token_id
    assert first == [
        Prompt(id="0", draw=0, text=texts[0], tokens=zero, answer="0", kind="exact"),
        Prompt(id="1", draw=1, text=texts[1], tokens=one, answer="1", kind="exact"),
    ]
    assert [prompt.draw for prompt in second] == [2, 3]


def test_epochs_are_whole_and_differ(stream):
    found = ids(take(stream(), 14))
    epochs = [found[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert ids(take(stream(shuffle=False), 14)) == list("0123456") * 6


def test_seeds(stream):
    assert take(stream(seed=4), 9) == take(stream(seed=4), 9)
    assert ids(take(stream(seed=4), 9)) != ids(take(stream(seed=5), 9))


@pytest.mark.parametrize("k", [0, 1, 2, 5, 13, 40])
@pytest.mark.parametrize("shuffle", [True, False])
def test_restored_is_never_stopped(stream, k, shuffle):
    whole = stream(shuffle=shuffle)
    take(whole, k)
    state = whole.state()
    assert state == k
    rest = take(whole, 10)
    fresh = stream(shuffle=shuffle)
    fresh.restore(state)
    assert take(fresh, 10) == rest
    whole.restore(state)  # and back in place
    assert take(whole, 10) == rest
    assert fresh.state() == k + 10


def test_draws_number_the_prompts_of_the_stream(stream):
    again = stream()
    again.restore(4)
    draws = [p.draw for batch in take(again, 3) for p in batch]
    assert draws == list(range(12, 21))


def test_a_step_may_be_larger_than_the_source(stream):
    (batch,) = take(stream(prompts_per_step=20), 1)
    assert sorted(ids([batch]))[:6] == ["0", "0", "0", "1", "1", "1"]


@pytest.mark.parametrize("shuffle", [True, False])
def test_countdown_stream(stream, shuffle):
    source = CountdownSource(CountdownSpec(), 0, "train")
    made = stream(source, shuffle=shuffle, prompts_per_step=32)
    batches = take(made, 3)
    assert len(set(ids(batches))) == 96
    if not shuffle:
        assert batches[1][4].text == f"<bos>{source[36]['prompt']}>"


def test_messages_are_rendered(stream):
    chat = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ]
    rows = [{"id": "a", "messages": chat, "answer": "4", "kind": "exact"}]
    ((prompt,),) = take(stream(rows, prompts_per_step=1), 1)
    assert prompt.text == "<bos>1>2<eos>3>"


@pytest.fixture
def check(tokenizer):
    return lambda source, limit=12, **remedy: fitting_rows(
        source, tokenizer=tokenizer, max_prompt_tokens=limit, **remedy
    )


def test_the_longest_prompt_is_named_and_the_others_counted(check):
    check(ROWS, limit=4)
    with pytest.raises(DataError, match=r"^row 3 \(id 3\): found a prompt of 4 .* of 4 \(of 4\)"):
        check(ROWS[3:], limit=3)
    rows = [
        ROWS[i] | {"where": f"mine.jsonl:{i + 1}", "prompt": "1" * n}
        for i, n in enumerate((2, 11, 17, 17, 13))
    ]
    with pytest.raises(DataError) as error:
        check(rows)
    assert str(error.value) == (
        "mine.jsonl:3 (id 2): found a prompt of 19 tokens, the longest of 4 (of 5) that are too"
        " long, expected at most 12; set Sampler.max_prompt_tokens = 19 or drop the rows"
    )
    with pytest.raises(DataError, match="at most 12; ask for 19$"):
        check(rows, remedy="ask for {}".format)


def test_a_prompt_that_cannot_be_spelled_is_named(check):
    with pytest.raises(DataError, match=r"mine.jsonl:9 \(id 0\): text .*a.* cannot be written"):
        check([ROWS[0] | {"where": "mine.jsonl:9", "prompt": "a"}])


def test_countdown_lengths_are_checked_by_the_spec(check):
    spec = CountdownSpec()
    source = CountdownSource(spec, 0, "train")
    check(source, limit=max_prompt_tokens(spec))
    with pytest.raises(DataError, match="of 12 tokens, .* expected at most 11"):
        check(source, limit=max_prompt_tokens(spec) - 1)


def test_nothing_to_read(check, stream):
    with pytest.raises(DataError, match="found no prompts"):
        check([])
    with pytest.raises(ValueError, match="-1"):
        stream().restore(-1)
