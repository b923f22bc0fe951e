"""Completions over a scripted engine: what it is asked for, every field of answers and streams."""

from __future__ import annotations

import math

import pytest
from wire_toy import ScriptedEngine, client_of, completion, logp_of, says, stream

from aspo_jax.sampler import SERVE, Drawing
from aspo_jax.serving.seam import EngineError, PromptScore

END = 2


# --- completions ------------------------------------------------------------------------------


def test_a_completion_has_every_field(hello, tokenizer):
    _, client = hello
    found = completion(client)
    assert found.pop("id").startswith("cmpl-") and found.pop("created") > 1.7e9
    assert found == {
        "object": "text_completion",
        "model": "policy",
        "choices": [
            {
                "index": 0,
                "text": "hello world",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_token_ids": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8},
        "system_fingerprint": None,
    }


def test_defaults_of_the_fields(hello):
    engine, client = hello
    completion(client)
    (request,) = engine.requests
    assert request.drawing == Drawing() and request.max_tokens == 16 and request.written == 0
    assert request.identity[0] == SERVE and request.identity[2:] == (0, 0)


def test_fields_reach_the_engine(hello):
    engine, client = hello
    completion(
        client,
        prompt=[[5, 6], [7]],
        n=2,
        temperature=0,
        top_k=-1,
        top_p=0.5,
        min_p=0.25,
        ignore_eos=True,
        seed=2**32 + 5,
        max_tokens=3,
        logprobs=4,
    )
    assert [list(r.tokens) for r in engine.requests] == [[5, 6], [5, 6], [7], [7]]
    seed = 5 ^ 1  # both halves count
    assert [r.identity for r in engine.requests] == [
        (SERVE, seed, p, g) for p in range(2) for g in range(2)
    ]
    assert {r.drawing for r in engine.requests} == {Drawing(0.0, 0, 0.5, 0.25, True, 4)}
    assert {r.max_tokens for r in engine.requests} == {3}


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63), -1])
def test_seeds_of_64_bits_name_draws_of_32(hello, seed):
    engine, client = hello
    completion(client, seed=seed)
    completion(client, seed=seed)
    first, second = (r.identity for r in engine.requests)
    assert first == second and all(0 <= x < 2**32 for x in first)


def test_a_number_may_be_written_as_a_text(hello):
    """`vf-eval` sends the fields that it does not know so."""
    engine, client = hello
    completion(client, seed=5, top_k=3, min_p=0.25)
    completion(client, seed="5", top_k="3", min_p="0.25")
    first, second = engine.requests
    assert first == second and first.drawing == Drawing(top_k=3, min_p=0.25)


def test_without_a_seed_draws_differ(hello):
    engine, client = hello
    for _ in range(4):
        completion(client, seed=None)
    assert len({r.identity for r in engine.requests}) == 4


def test_nulls_are_fields_left_out(hello):
    engine, client = hello
    names = ("temperature", "top_p", "n", "max_tokens", "stop", "logprobs", "stream", "model")
    completion(client, **dict.fromkeys([*names, "logit_bias", "suffix", "best_of"]))
    assert engine.requests[0].drawing == Drawing() and engine.requests[0].max_tokens == 16


def test_neutral_values_of_what_is_not_supported_pass(hello):
    _, client = hello
    neutral = {
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "min_tokens": 0,
        "use_beam_search": False,
        "best_of": 2,
        "response_format": {"type": "text"},
        "suffix": "",
    }
    completion(client, n=2, unknown_field={"a": 1}, user="me", **neutral)


def test_choices_are_prompt_major_whatever_ends_first(tokenizer):
    def script(request):
        number = request.identity[2] * 2 + request.identity[3]
        return tokenizer.encode("abcd"[number] * (9 - 2 * number))

    engine = ScriptedEngine(script, block=2)
    choices = completion(client_of(engine, tokenizer), prompt=["x", "y"], n=2)["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [c["text"] for c in choices] == ["a" * 9, "b" * 7, "c" * 5, "d" * 3]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [74, 75], [[74, 75]]])
def test_a_prompt_in_every_form(hello, tokenizer, prompt):
    engine, client = hello
    assert tokenizer.encode("hi") == [74, 75]
    completion(client, prompt=prompt)
    assert [list(r.tokens) for r in engine.requests] == [[74, 75]]


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_a_stop_string_cuts_at_its_token_whatever_the_block(tokenizer, block):
    engine = ScriptedEngine(says(tokenizer, "hello STOP and more", END), block=block)
    found = completion(
        client_of(engine, tokenizer), stop="TO", max_tokens=40, return_token_ids=True, logprobs=0
    )
    (choice,) = found["choices"]
    assert choice["text"] == "hello S" and choice["stop_reason"] == "TO"
    assert tokenizer.decode(choice["token_ids"]) == "hello STO"
    assert len(choice["logprobs"]["token_logprobs"]) == found["usage"]["completion_tokens"] == 5
    assert engine.running == 0


def test_a_stop_string_frees_its_row_at_once(tokenizer):
    """While the other sample goes on."""

    def script(request):
        return tokenizer.encode("a!" + "b" * 60 if request.identity[3] else "b" * 60)

    engine = ScriptedEngine(script, window=200)
    found = completion(client_of(engine, tokenizer), stop=["!"], max_tokens=60, n=2)
    assert [c["finish_reason"] for c in found["choices"]] == ["length", "stop"]
    assert engine.drawn == 60 + 2


@pytest.mark.parametrize(("ignores", "count"), [(False, 3), (True, 4)])
def test_stop_ids_of_the_request(tokenizer, ignores, count):
    engine = ScriptedEngine(says(tokenizer, "ab", END, 3, 4, 5))
    found = completion(
        client_of(engine, tokenizer),
        ignore_eos=ignores,
        stop_token_ids=[3] if ignores else [],
        return_token_ids=True,
    )
    (choice,) = found["choices"]
    assert len(choice["token_ids"]) == count and choice["text"] == "ab"
    assert choice["stop_reason"] == (3 if ignores else None)
    assert choice["finish_reason"] == "stop" and choice["prompt_token_ids"] == [74, 75]


def test_own_stop_ids_named_by_the_request_are_its_reason(tokenizer):
    """As a trainer stops: its own set of ids, the engine's ignored."""
    engine = ScriptedEngine(says(tokenizer, "ab", END, 67))
    for ignores in (True, False):
        (choice,) = completion(
            client_of(engine, tokenizer), stop_token_ids=[END], ignore_eos=ignores
        )["choices"]
        assert (choice["text"], choice["stop_reason"]) == ("ab", END)


def test_special_tokens_can_be_shown(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "ab", END))
    client = client_of(engine, tokenizer)
    (choice,) = completion(client, skip_special_tokens=False, include_stop_str_in_output=True)[
        "choices"
    ]
    assert choice["text"] == "ab<|end|>"
    (choice,) = completion(client, skip_special_tokens=False)["choices"]
    assert choice["text"] == "ab"


def test_answers_are_cut_to_the_window(hello):
    engine, client = hello
    completion(client, prompt=[5] * 60, max_tokens=1000)
    assert engine.requests[0].max_tokens == 4
    assert completion(client, max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_of_the_drawn_and_the_likeliest(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "!b", END))
    (choice,) = completion(client_of(engine, tokenizer), logprobs=2)["choices"]
    ids = [*tokenizer.encode("!b"), END]
    assert ids[0] == 3  # is among the likeliest, at -0.125; its own float is -0.5
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [logp_of(i) for i in ids],
        "tokens": ["!", "b", "<|end|>"],
        "top_logprobs": [
            {"!": -0.5, '"': -0.25},
            {"b": logp_of(ids[1]), "!": -0.125, '"': -0.25},
            {"<|end|>": logp_of(END), "!": -0.125, '"': -0.25},
        ],
    }


def test_tokens_named_by_id(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "!b"))
    (choice,) = completion(
        client_of(engine, tokenizer), logprobs=1, return_tokens_as_token_ids=True
    )["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:3", "token_id:68"]
    assert choice["logprobs"]["top_logprobs"][1].keys() == {"token_id:68", "token_id:3"}


@pytest.mark.parametrize(("own", "likelier"), [(-3.0, -0.5), (-0.5, -3.0)])
def test_where_two_ids_have_one_spelling_the_larger_counts(tokenizer, own, likelier):
    """The second byte of é and the first of 你 are both no character."""
    half, other = tokenizer.encode("é")[1], tokenizer.encode("你")[0]
    engine = ScriptedEngine(lambda request: [half])
    engine.scorer = lambda tokens, top: PromptScore([own], [[(other, likelier)]])
    client = client_of(engine, tokenizer)
    (choice,) = completion(client, prompt=[5, half], echo=True, max_tokens=0, logprobs=1)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, own]
    assert choice["logprobs"]["top_logprobs"] == [None, {"\ufffd": -0.5}]


def test_minus_infinity_is_a_number_in_json(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "a"))
    engine.scorer = lambda tokens, top: PromptScore([-math.inf], [[(3, -0.0)]])
    (choice,) = completion(client_of(engine, tokenizer), echo=True, max_tokens=0, logprobs=1)[
        "choices"
    ]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0]


# --- streams -----------------------------------------------------------------------------------


def test_bytes_of_a_stream(tokenizer, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.5)
    engine = ScriptedEngine(says(tokenizer, "hé\u2028", END), block=2)
    response = client_of(engine, tokenizer).post(
        "/v1/completions",
        json={
            "prompt": "hi",
            "stream": True,
            "logprobs": 0,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
        headers={"x-request-id": "r1"},
    )
    head = '"object":"text_completion","created":1800000000,"model":"policy","choices":['
    bodies = [
        '{"index":0,"text":"h","logprobs":{"text_offset":[0,1],"token_logprobs":[-1.375,-0.375],'
        '"tokens":["h","\\ufffd"],"top_logprobs":[{"h":-1.375},{"\\ufffd":-0.375}]},'
        '"finish_reason":null,"stop_reason":null,"token_ids":[74,130],"prompt_token_ids":[74,75]}]',
        '{"index":0,"text":"\\u00e9","logprobs":{"text_offset":[1,2],"token_logprobs":[-1.25,-0.25],'
        '"tokens":["\\ufffd","\\ufffd"],"top_logprobs":[{"\\ufffd":-1.25},{"\\ufffd":-0.25}]},'
        '"finish_reason":null,"stop_reason":null,"token_ids":[105,161]}]',
        '{"index":0,"text":"\\u2028","logprobs":{"text_offset":[2,2],"token_logprobs":[-0.25,-1.125],'
        '"tokens":["\\ufffd","\\ufffd"],"top_logprobs":[{"\\ufffd":-0.25},{"\\ufffd":-1.125}]},'
        '"finish_reason":null,"stop_reason":null,"token_ids":[225,104]}]',
        '{"index":0,"text":"","logprobs":{"text_offset":[3],"token_logprobs":[-0.375],'
        '"tokens":["<|end|>"],"top_logprobs":[{"<|end|>":-0.375}]},'
        '"finish_reason":"stop","stop_reason":null,"token_ids":[2]}]',
        '],"usage":{"prompt_tokens":2,"completion_tokens":7,"total_tokens":9}',
    ]
    events = [f'data: {{"id":"cmpl-r1",{head}{body}}}\n\n' for body in bodies]
    assert response.content == "".join([*events, "data: [DONE]\n\n"]).encode()


@pytest.mark.parametrize("block", [1, 3, 50])
@pytest.mark.parametrize("stop", [[], ["wörld"], ["l", "好"]])
def test_a_stream_is_the_answer_in_pieces(tokenizer, block, stop):
    fields = {
        "prompt": ["a", "b"],
        "n": 2,
        "stop": stop,
        "max_tokens": 40,
        "logprobs": 1,
        "seed": 1,
    }
    texts = ["hello wörld 你好", "one", "wörld", "好"]

    def script(request):
        return [*tokenizer.encode(texts[request.identity[2] * 2 + request.identity[3]]), END]

    def engine():
        return ScriptedEngine(script, block=block)

    whole = completion(client_of(engine(), tokenizer), return_token_ids=True, **fields)
    for choice in whole["choices"]:
        pieces = [
            event["choices"][0]
            for event in stream(client_of(engine(), tokenizer), return_token_ids=True, **fields)
            if event["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(p["text"] for p in pieces) == choice["text"]
        assert sum((p["token_ids"] for p in pieces), []) == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            assert sum((p["logprobs"][name] for p in pieces), []) == values
        assert [p["finish_reason"] for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        assert pieces[-1]["stop_reason"] == choice["stop_reason"]


def test_an_echo_is_the_first_event(hello):
    _, client = hello
    events = stream(client, prompt="hello w", echo=True, max_tokens=1, logprobs=0)
    assert [e["choices"][0]["text"] for e in events] == ["hello w", "hello"]
    assert events[0]["choices"][0]["logprobs"]["token_logprobs"] == [None, logp_of(263)]
    (only,) = stream(client, prompt="hello w", echo=True, max_tokens=0)
    assert only["choices"][0]["finish_reason"] == "length"


def test_ids_of_the_prompt_come_once(hello):
    _, client = hello
    for echo in (False, True):
        events = stream(client, prompt="hi", echo=echo, return_token_ids=True, max_tokens=3)
        has_ids = ["prompt_token_ids" in e["choices"][0] for e in events]
        assert has_ids == [True] + [False] * (len(events) - 1)


def test_usage_goes_with_every_event_if_asked(hello):
    _, client = hello
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(client, prompt="hi", stream_options=options)
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 3, 4, 5, 6, 6]
    assert events[-1]["choices"] == []


def test_what_fails_within_a_stream_is_its_last_event(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "hello"))
    engine.fails = EngineError("the device is gone")
    (event,) = stream(client_of(engine, tokenizer), prompt="hi")
    assert event["error"]["code"] == 500 and "the device is gone" in event["error"]["message"]
    assert engine.running == 0
