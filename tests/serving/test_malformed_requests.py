"""Requests that cannot be answered: each has its status and an error object with the remedy."""

from __future__ import annotations

import json

import pytest
from wire_toy import ScriptedEngine, ScriptedGrowth, byte_tokenizer, client_of, says

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GENERATE = "/inference/v1/generate"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}

# Fields beside a good prompt, and the field that the answer names; None: another than it.
FIELDS = [
    # types are as they are
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 5000}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"seed": "five"}, "seed"),
    ({"top_k": "2.5"}, "top_k"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop.0"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stop_token_ids": "5"}, "stop_token_ids"),
    ({"stop_token_ids": [268]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"return_token_ids": "yes"}, "return_token_ids"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"request_id": "x" * 201}, "request_id"),
    ({"request_id": 5}, "request_id"),
    # known, and not supported here
    ({"min_tokens": 3}, "min_tokens"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -0.5}, "frequency_penalty"),
    ({"repetition_penalty": 1.05}, "repetition_penalty"),
    ({"logit_bias": {"5": 10}}, "logit_bias"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
]
ONLY_COMPLETIONS = [
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [5, "a"]}, "prompt"),
    ({"prompt": [5, [6]]}, "prompt"),
    ({"prompt": [[5, True]]}, "prompt"),
    ({"prompt": [5.0]}, "prompt"),
    ({"prompt": [268]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 1000, "n": 5}, "n"),
]
ONLY_CHAT = [
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{}]}, "messages.0.role"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages.0.content.0.type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": "f"}]},
        "messages.0.tool_calls",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}]},
        "messages.0.tool_calls.0",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
    ),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools.0.function"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "continue_final_message"),
]
ONLY_GENERATE = [
    ({"token_ids": None}, "token_ids"),
    ({"token_ids": []}, "token_ids"),
    ({"token_ids": ["a"]}, "token_ids.0"),
    ({"token_ids": [268]}, "token_ids"),
    ({"sampling_params": []}, "sampling_params"),
    ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"sampling_params": {"logprobs": 21}}, "sampling_params.logprobs"),
    ({"sampling_params": {"repetition_penalty": 1.1}}, "sampling_params.repetition_penalty"),
    ({"sampling_params": {"stop": ""}}, "sampling_params.stop"),
    ({"stream": True}, "stream"),
    ({"output_mode": "text"}, "output_mode"),
    ({"features": {"image": 1}}, "features"),
    ({"content_parts": [{}]}, "content_parts"),
]
CASES = [
    *((COMPLETIONS, {"prompt": "hi", **more}, param) for more, param in FIELDS + ONLY_COMPLETIONS),
    *((CHAT, {"messages": USER, **more}, param) for more, param in FIELDS + ONLY_CHAT),
    *((GENERATE, {"token_ids": [5], **more}, param) for more, param in ONLY_GENERATE),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/tokenize", {"messages": [5]}, "messages.0"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [268]}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    *(
        (route, {"prompt": "a", "messages": USER, "token_ids": [5], "model": 5}, "model")
        for route in (COMPLETIONS, CHAT, GENERATE)
    ),
]


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(says(byte_tokenizer(), "hello", 2))


@pytest.fixture(scope="module")
def client(engine):
    return client_of(engine, byte_tokenizer())


@pytest.fixture(autouse=True)
def nothing_is_drawn(engine):
    """No malformed request reaches the engine, and a good one is answered after it."""
    engine.requests.clear()
    yield
    assert engine.requests == [] and engine.running == 0


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and len(error["message"]) < 600
    return error


@pytest.mark.parametrize(("route", "body", "param"), CASES)
def test_a_wrong_field_is_named(client, route, body, param):
    error = error_of(client.post(route, json=body), 400)
    assert error["param"] == param and error["code"] == 400
    assert error["type"] in ("BadRequestError", "Bad Request")


NESTED = b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}"
BODIES = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"prompt"',
    b'{"prompt": "a",}',
    b"{'prompt': 'a'}",
    b'{"prompt": "a"} {}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "x": {"\\udc00": 1}}',
    b"\xff\xfe{\x00}\x00",
    NESTED,
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
]


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT, GENERATE, "/tokenize"])
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_object_of_json(client, route, body):
    sent = client.post(route, content=body, headers={"content-type": "application/json"})
    assert error_of(sent, 400)["type"] in ("BadRequestError", "Bad Request")


@pytest.mark.parametrize("ends", [(b"[", b"]"), (b'{"a":', b"}")])
def test_what_is_ignored_may_not_nest_deeply_either(client, ends):
    media = {"content-type": "application/json"}
    for depth, status in ((50, 200), (70, 400)):
        nested = ends[0] * depth + b"1" + ends[1] * depth
        found = client.post(
            "/tokenize", content=b'{"prompt": "a", "x": ' + nested + b"}", headers=media
        )
        assert found.status_code == status
    assert "nests deeper than 64" in error_of(found, 400)["message"]


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400, "-1e999"])
def test_numbers_beyond_all_bounds(client, number):
    body = f'{{"prompt": "a", "temperature": {number}}}'
    sent = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert error_of(sent, 400)["param"] == "temperature"


@pytest.mark.parametrize(
    "media", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonp"]
)
def test_other_media_types_are_refused(client, media):
    body = json.dumps({"prompt": "a"})
    sent = client.post(COMPLETIONS, content=body, headers={"content-type": media})
    assert error_of(sent, 415)["type"] == "UnsupportedMediaTypeError"


def test_media_types_may_name_a_character_set(client, engine):
    media = {"content-type": "Application/JSON; charset=utf-8"}
    sent = client.post("/detokenize", content=b'{"tokens": [5]}', headers=media)
    assert sent.status_code == 200


def test_a_body_too_long_is_refused_by_its_header_and_by_its_length():
    engine = ScriptedEngine(lambda request: [5])
    client = client_of(engine, byte_tokenizer(), body_limit=1000)
    media = {"content-type": "application/json"}
    body = json.dumps({"prompt": "a" * 1000}).encode()
    for content in (body, iter([body[:600], body[600:]])):
        error = error_of(client.post(COMPLETIONS, content=content, headers=media), 413)
        assert "1,000" in error["message"]


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("GET", COMPLETIONS, 405),
        ("PUT", CHAT, 405),
        ("DELETE", GENERATE, 405),
        ("POST", "/health", 405),
        ("POST", "/v1/models", 405),
        ("OPTIONS", COMPLETIONS, 405),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/page.html", 404),
        ("GET", "/%00", 404),
    ],
)
def test_routes_and_methods_that_are_not_there(client, method, route, status):
    found = client.request(method, route)
    error = error_of(found, status)
    assert error["code"] == status
    assert ("allow" in found.headers) == (status == 405)


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT, GENERATE, "/tokenize", "/detokenize"])
def test_an_unknown_model(client, route):
    body = {"prompt": "a", "token_ids": [5], "tokens": [5], "model": "gpt"}
    if route == CHAT:
        body["messages"] = USER
    error = error_of(client.post(route, json=body), 404)
    assert error["type"] == "NotFoundError" and "`gpt` does not exist" in error["message"]
    assert error["param"] == "model"


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_too_long_says_so_to_harnesses(client, length):
    for route, body in (
        (COMPLETIONS, {"prompt": [5] * length}),
        (COMPLETIONS, {"prompt": [[5], [5] * length], "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * length}]}),
        (GENERATE, {"token_ids": [5] * length}),
    ):
        error = error_of(client.post(route, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 64 tokens" in error["message"]


def test_a_prompt_that_fills_the_window_can_be_scored(client):
    body = {"prompt": [5] * 64, "echo": True, "max_tokens": 0, "logprobs": 0}
    assert client.post(COMPLETIONS, json=body).status_code == 200
    body["prompt"] = [5] * 65
    assert error_of(client.post(COMPLETIONS, json=body), 400)["code"] == "context_length_exceeded"


def test_a_full_queue_is_for_another_try():
    client = client_of(ScriptedEngine(lambda request: [5], full=True), byte_tokenizer())
    for stream in (False, True):
        found = client.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
        error = error_of(found, 503)
        assert error["type"] == "ServiceUnavailableError" and "queue" in error["message"]
        assert found.headers["retry-after"]


def test_a_distribution_that_is_not_finite_is_no_answer():
    class Broken(ScriptedEngine):
        def generate(self, requests):
            return BrokenGrowth(self, requests)

    class BrokenGrowth(ScriptedGrowth):
        def grow(self, index, script, at):
            return super().grow(index, script, at)._replace(ending="nonfinite")

    engine = Broken(lambda request: [5, 5])
    client = client_of(engine, byte_tokenizer())
    error = error_of(client.post(COMPLETIONS, json={"prompt": "a"}), 500)
    assert "not finite" in error["message"] and error["type"] == "InternalServerError"
    engine.requests.clear()


@pytest.mark.parametrize(
    ("route", "is_guarded"),
    [
        ("/v1/models", True),
        ("/pause", True),
        ("/health", False),
        ("/version", False),
        ("/tokenizer_info", False),
    ],
)
@pytest.mark.parametrize("sent", [None, "Bearer wrong", "Bearer ", "Basic s3cret", "Bearer s3crét"])
def test_the_key_guards_the_routes(route, is_guarded, sent):
    client = client_of(
        ScriptedEngine(lambda request: [5]), byte_tokenizer(), api_key="s3cret", is_admin=True
    )
    method = "POST" if route == "/pause" else "GET"
    headers = {} if sent is None else {"authorization": sent.encode()}
    found = client.request(method, route, headers=headers)
    assert found.status_code == (401 if is_guarded else 200)
    if is_guarded:
        assert found.json() == {"error": "Unauthorized"}
    headers = {"authorization": "bearer s3cret"}
    assert client.request(method, route, headers=headers).status_code == 200


def test_the_key_is_asked_for_before_anything_is_read():
    client = client_of(ScriptedEngine(lambda request: [5]), byte_tokenizer(), api_key="k")
    for route in ("/v1/nothing", "/inference/v1/generate", "/v2"):
        assert client.post(route, content=b"{").status_code == 401


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://testserver:99"])
def test_pages_of_other_sites_are_kept_out(client, origin):
    found = client.post("/tokenize", json={"prompt": "a"}, headers={"origin": origin})
    assert error_of(found, 403)["type"] == "PermissionDeniedError"
    own = {"origin": "http://testserver"}
    assert client.post("/tokenize", json={"prompt": "a"}, headers=own).status_code == 200
