"""A program of `verifiers` whose policy calls a tool: of a scripted engine, for toys call none."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Served
from test_clients import asks, row_of, vf_eval
from wire_toy import ScriptedEngine, app_of, byte_tokenizer, logp_of

from aspo_jax.serving.server import listen, make_server

END = 2
# A rendered call has the ids that the policy drew: each prompt begins with the one before.
TEMPLATE = """\
{%- for t in tools or [] %}{{ t.function.name }};{% endfor %}
{%- for m in messages %}<|start|>{{ m.role + '\n' }}{{ m.content or '' }}
{%- for c in m.tool_calls or [] -%}
<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>
{%- endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{{ '\n' }}{% endif %}"""


def write_next(text: str) -> str:
    """What the policy writes behind a prompt: the call of the tool, then what the tool said."""
    if told := re.findall(r"<\|start\|>tool\n(-?\d+)<", text):
        return f"It is {told[-1]}"
    a, b = re.findall(r"What is (\d+) \+ (\d+)\?", text)[-1]
    return f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'


@pytest.fixture(scope="module")
def calling(tmp_path_factory) -> Iterator[Served]:
    """A server of a policy that calls the tool, in a thread."""
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    def script(request: Any) -> list[int]:
        written = write_next(tokenizer.decode(request.tokens))
        return [*tokenizer.encode(written, add_special_tokens=False), END]

    app = app_of(ScriptedEngine(script, window=2048, block=4), tokenizer)
    bound, ports = threading.Event(), []

    def on_bound(host: str, port: int) -> None:
        ports.append(port)
        bound.set()

    server = make_server(app, 5, on_bound)
    thread = threading.Thread(target=server.run, args=([listen("127.0.0.1", 0)],))
    thread.start()
    assert bound.wait(30)
    yield Served(f"http://127.0.0.1:{ports[0]}", folder)
    server.should_exit = True
    thread.join(30)


def said(trace: Any) -> list[tuple[str, str | None]]:
    return [(n["message"]["role"], n["message"].get("content")) for n in trace["nodes"][1:]]


@asks("verifiers", "ASPO_VERIFIERS")
def test_a_tool_is_called_and_answered(calling, tmp_path):
    for trace in vf_eval(calling, tmp_path, "--sampling.max-tokens", "200"):
        answer = trace["task"]["data"]["answer"]
        assert [role for role, _ in said(trace)] == ["user", "assistant", "tool", "assistant"]
        assert [text for _, text in said(trace)[2:]] == [answer, f"It is {answer}"]
        (call,) = trace["nodes"][2]["message"]["tool_calls"]
        assert call["name"] == "add" and sum(json.loads(call["arguments"]).values()) == int(answer)
        assert [c["finish_reason"] for c in trace["calls"]] == ["tool_calls", "stop"]
        assert trace["rewards"]["right"]["score"] == 1.0


@asks("verifiers", "ASPO_VERIFIERS")
def test_what_is_trained_on_is_what_was_drawn(calling, tmp_path):
    """Two turns in one branch: the drawn ids of both, and only they, have log-probabilities."""
    parser = ("--client.renderer.name", "default", "--client.renderer.tool-parser", "qwen3")
    client = ("--client.type", "train", "--client.renderer-model-name", str(calling.folder))
    for trace in vf_eval(calling, tmp_path, *client, *parser, "--sampling.max-tokens", "200"):
        assert trace["rewards"]["right"]["score"] == 1.0
        assert [node["sampled"] for node in trace["nodes"]] == [False, False, True, False, True]
        ids, drawn, logp = row_of(trace)
        assert sum(drawn) > 20
        for token, is_drawn, value in zip(ids, drawn, logp, strict=True):
            assert value == (logp_of(token) if is_drawn else 0.0)
