"""Chat over a scripted engine: templates, tools, streams."""

from __future__ import annotations

import pytest
from wire_toy import ScriptedEngine, chat, client_of, says, stream

from aspo_jax.sampler import Drawing

END = 2


# --- chat --------------------------------------------------------------------------------------


def test_a_chat_has_every_field(hello, tokenizer):
    engine, client = hello
    found = chat(client, temperature=0.5)
    assert found.pop("id").startswith("chatcmpl-") and found.pop("created") > 1.7e9
    assert found == {
        "object": "chat.completion",
        "model": "policy",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello world", "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 6, "total_tokens": 26},
        "system_fingerprint": None,
        "prompt_token_ids": None,
        "prompt_logprobs": None,
    }
    assert tokenizer.decode(engine.requests[0].tokens) == (
        "<|start|>user\nhi<|end|><|start|>assistant\n"
    )
    assert engine.requests[0].max_tokens == 64 - 20  # what the window leaves
    assert engine.requests[0].drawing == Drawing(temperature=0.5)


def test_log_probabilities_of_a_chat(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "!é"))
    found = chat(client_of(engine, tokenizer), logprobs=True, top_logprobs=1, return_token_ids=True)
    (choice,) = found["choices"]
    likeliest = {"token": "!", "logprob": -0.125, "bytes": [33]}
    assert choice["logprobs"]["content"] == [
        {
            "token": "!",
            "logprob": -0.5,
            "bytes": [33],
            "top_logprobs": [likeliest | {"logprob": -0.5}],
        },
        {"token": "\ufffd", "logprob": -0.375, "bytes": [0xC3], "top_logprobs": [likeliest]},
        {"token": "\ufffd", "logprob": -1.25, "bytes": [0xA9], "top_logprobs": [likeliest]},
    ]
    assert choice["token_ids"] == tokenizer.encode("!é") and len(found["prompt_token_ids"]) == 20
    found = chat(client_of(engine, tokenizer), logprobs=True, return_tokens_as_token_ids=True)
    entry = found["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == "token_id:3" and entry["top_logprobs"] == []


def test_the_newer_name_of_the_limit_counts(hello):
    engine, client = hello
    chat(client, max_tokens=9, max_completion_tokens=2)
    assert engine.requests[0].max_tokens == 2


def test_messages_of_every_kind_reach_the_template(hello, tokenizer):
    engine, client = hello
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    messages = [
        {"role": "developer", "content": "A"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "8", "tool_call_id": "c"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}]
    body = {"messages": messages, "tools": tools, "chat_template_kwargs": {"mood": "gay:"}}
    engine.window = 200
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert tokenizer.decode(engine.requests[0].tokens) == (
        "<tools>f;</tools><|start|>system\nA<|end|><|start|>user\nb\nc<|end|>"
        "<|start|>assistant\n[7]<|end|><|start|>tool\n8<|end|><|start|>assistant\ngay:"
    )


def test_the_last_message_can_go_on(hello, tokenizer):
    engine, client = hello
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    text = tokenizer.decode(engine.requests[0].tokens)
    assert text == "<|start|>user\na<|end|><|start|>assistant\nb c"


def test_a_template_of_the_request_needs_the_server_to_trust_it(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "a"))
    chat(
        client_of(engine, tokenizer, trusts_templates=True),
        chat_template="<{{messages[0].content}}>",
    )
    assert tokenizer.decode(engine.requests[0].tokens) == "<hi>"


TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'


def test_calls_of_tools_are_parsed_where_tools_are_given(tokenizer):
    engine = ScriptedEngine(says(tokenizer, f"I add. {CALL}", END), window=200)
    client = client_of(engine, tokenizer)
    (choice,) = chat(client, tools=TOOLS)["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "I add. "}
    assert call["function"] == {"name": "add", "arguments": '{"x": 1}'}
    assert choice["finish_reason"] == "tool_calls"
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = chat(client, **fields)["choices"]
        assert choice["message"]["content"] == f"I add. {CALL}"
        assert choice["message"]["tool_calls"] == [] and choice["finish_reason"] == "stop"


def test_a_call_alone_has_no_content(tokenizer):
    engine = ScriptedEngine(says(tokenizer, CALL + CALL, END), window=300)
    client = client_of(engine, tokenizer)
    (choice,) = chat(client, tools=TOOLS)["choices"]
    assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 2
    (choice,) = chat(client, tools=TOOLS, parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_a_call_that_was_cut_off_stays_text(tokenizer):
    engine = ScriptedEngine(says(tokenizer, CALL), window=200)
    (choice,) = chat(client_of(engine, tokenizer), tools=TOOLS, max_tokens=9)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("<tool_call>")


def test_an_answer_cut_behind_its_call_was_cut(tokenizer):
    engine = ScriptedEngine(says(tokenizer, f"{CALL} and"), window=200)
    client = client_of(engine, tokenizer)
    (choice,) = chat(client, tools=TOOLS)["choices"]
    assert choice["finish_reason"] == "length" and len(choice["message"]["tool_calls"]) == 1
    last = chat_stream(client, tools=TOOLS)[-1]["choices"][0]
    assert last["finish_reason"] == "length" and len(last["delta"]["tool_calls"]) == 1


def chat_stream(client, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return stream(client, "/v1/chat/completions", **body)


def test_events_of_a_chat(hello):
    _, client = hello
    events = chat_stream(client, stream_options={"include_usage": True}, return_token_ids=True)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert events[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert len(events[0]["prompt_token_ids"]) == 20
    deltas = [e["choices"][0]["delta"] for e in events[1:-1]]
    assert deltas == [*({"content": t} for t in ("hello", " wo", "r", "l", "d")), {}]
    assert [e["choices"][0]["finish_reason"] for e in events[1:-1]] == [None] * 5 + ["stop"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_stream_gives_calls_at_its_end(tokenizer, block):
    engine = ScriptedEngine(says(tokenizer, f"I <b> add. {CALL} ok", END), window=300, block=block)
    events = chat_stream(client_of(engine, tokenizer), tools=TOOLS, logprobs=True)
    deltas = [e["choices"][0]["delta"] for e in events]
    assert "".join(d.get("content") or "" for d in deltas) == "I <b> add.  ok"
    assert [d for d in deltas if "tool_calls" in d] == deltas[-1:]
    (call,) = deltas[-1]["tool_calls"]
    assert call["index"] == 0 and call["function"]["name"] == "add"
    assert [e["choices"][0]["finish_reason"] for e in events[-2:]][-1] == "tool_calls"


def test_every_choice_of_a_stream_ends(hello):
    _, client = hello
    for limit in (0, 2, 60):
        events = chat_stream(client, n=3, max_tokens=limit)
        ends = [e["choices"][0] for e in events if e["choices"][0]["finish_reason"]]
        assert sorted(c["index"] for c in ends) == [0, 1, 2]
