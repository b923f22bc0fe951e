"""Scores of prompts, by echo and by prompt_logprobs: what evaluation harnesses read."""

from __future__ import annotations

import math

import pytest
from wire_toy import ScriptedEngine, ThreeTokens, client_of, completion, logp_of

from aspo_jax.serving.seam import EngineError, Overloaded, PromptScore

END = 2


# --- echo and scores ---------------------------------------------------------------------------


def test_echo_alone_draws_nothing(hello):
    engine, client = hello
    found = completion(client, prompt="hello w", echo=True, max_tokens=0, logprobs=1)
    (choice,) = found["choices"]
    assert choice["text"] == "hello w" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["hello", " w"]
    assert choice["logprobs"]["text_offset"] == [0, 5]
    assert choice["logprobs"]["top_logprobs"] == [None, {" w": logp_of(263), "!": -0.125}]
    assert engine.requests == [] and engine.scored == [([262, 263], 1)]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_echo_goes_before_every_sample(hello):
    engine, client = hello
    found = completion(client, prompt=["a", "b", "a"], n=2, echo=True, max_tokens=1, logprobs=0)
    assert [c["text"] for c in found["choices"]] == [f"{p}hello" for p in "aabbaa"]
    assert [c["logprobs"]["text_offset"] for c in found["choices"]] == [[0, 1]] * 6
    assert len(engine.scored) == 2  # equal prompts once


def test_echo_without_log_probabilities_scores_nothing(hello):
    engine, client = hello
    assert completion(client, echo=True, max_tokens=1)["choices"][0]["text"] == "hihello"
    assert engine.scored == []


def test_the_prompt_is_not_shown_beside_its_ids(hello):
    _, client = hello
    (choice,) = completion(client, echo=True, max_tokens=1, return_token_ids=True)["choices"]
    assert choice["text"] == "hello" and choice["prompt_token_ids"] == [74, 75]


def test_prompt_log_probabilities_by_id(hello):
    _, client = hello
    (choice,) = completion(client, prompt=[5, 6, 4], prompt_logprobs=2, max_tokens=1)["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "6": {"logprob": logp_of(6), "rank": None, "decoded_token": "$"},
            "3": {"logprob": -0.125, "rank": 1, "decoded_token": "!"},
            "4": {"logprob": -0.25, "rank": 2, "decoded_token": '"'},
        },
        {
            "4": {"logprob": logp_of(4), "rank": 2, "decoded_token": '"'},
            "3": {"logprob": -0.125, "rank": 1, "decoded_token": "!"},
        },
    ]


def likelihood(choice, context):
    """What an evaluation harness reads of an echo: log-likelihood, and whether it is greedy."""
    scores = choice["logprobs"]["token_logprobs"][context:-1]
    top = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(scores), all(p == max(t.values()) for p, t in zip(scores, top, strict=True))


def test_likelihoods_of_three_tokens_by_hand():
    """Context "a", then "bc" or "cb". After "a" b has 1/2, c 1/4; after "b" c has 3/4."""
    table = {
        0: {0: 0.25, 1: 0.5, 2: 0.25},
        1: {0: 0.125, 1: 0.125, 2: 0.75},
        2: {0: 0.5, 1: 0.25, 2: 0.25},
    }

    def score(tokens, top):
        steps = [
            sorted(((i, math.log(p)) for i, p in table[t].items()), key=lambda x: -x[1])
            for t in tokens[:-1]
        ]
        own = [dict(s)[t] for s, t in zip(steps, tokens[1:], strict=True)]
        return PromptScore(own, [s[:top] for s in steps])

    engine = ScriptedEngine(lambda request: [0], stops=(), block=1)
    engine.scorer, engine.likely = score, [(0, -0.125)]
    body = {
        "model": "policy",
        "prompt": [[0, 1, 2], [0, 2, 1]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = client_of(engine, ThreeTokens()).post("/v1/completions", json=body).json()["choices"]
    assert [c["text"] for c in choices] == ["abca", "acba"]
    assert all(len(c["logprobs"]["tokens"]) == 4 for c in choices)
    first, second = (likelihood(c, 1) for c in choices)
    assert first == (pytest.approx(math.log(0.5 * 0.75)), True)
    assert second == (pytest.approx(math.log(0.25 * 0.25)), False)


@pytest.mark.parametrize(
    ("error", "status"),
    [(Overloaded("the queue is full"), 503), (EngineError("gone"), 500), (KeyError("x"), 500)],
)
def test_a_score_that_fails_is_said(hello, error, status, caplog):
    engine, client = hello

    def fail(tokens, top):
        raise error

    engine.scorer = fail
    for fields in ({"echo": True, "max_tokens": 0, "logprobs": 1}, {"prompt_logprobs": 1}):
        found = client.post("/v1/completions", json={"prompt": "hi", **fields})
        assert found.status_code == status
        assert str(error) in found.json()["error"]["message"]
    found = client.post(
        "/inference/v1/generate",
        json={"token_ids": [5], "sampling_params": {"prompt_logprobs": 1, "max_tokens": 1}},
    )
    assert found.status_code == status and engine.running == 0
    is_mistake = isinstance(error, KeyError)  # of the program's: whoever runs it needs the place
    assert ("a request failed" in caplog.text) == is_mistake
