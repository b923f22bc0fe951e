"""Token ids, the small routes and those of whoever runs the server, over a scripted engine."""

from __future__ import annotations

import json

import pytest
from wire_toy import (
    Policy,
    ScriptedEngine,
    client_of,
    completion,
    generate,
    logp_of,
    piece_tokenizer,
    says,
)

import aspo_jax
from aspo_jax.sampler import Drawing
from aspo_jax.serving.app import create_app
from aspo_jax.serving.seam import Served
from aspo_jax.serving.site import Settings

END = 2


# --- token ids ---------------------------------------------------------------------------------


def test_generate_has_every_field(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "!b", END))
    found = generate(client_of(engine, tokenizer), logprobs=1, skip_special_tokens=False)
    assert found.pop("request_id").startswith("generate-tokens-") and found.pop("created") > 1.7e9
    ids = [3, 68, END]
    assert found == {
        "model": "policy",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        "output_mode": "tokens",
        "prompt_token_ids": None,
        "choices": [
            {
                "index": 0,
                "token_ids": ids,
                "finish_reason": "stop",
                "stop_reason": None,
                "logprobs": {
                    "content": [
                        {
                            "token": f"token_id:{i}",
                            "token_id": i,
                            "logprob": logp_of(i),
                            "rank": None,
                            "bytes": None,
                            "top_logprobs": [],
                        }
                        for i in ids
                    ]
                },
                "weight_versions": [{"version": "default", "start": 0, "end": 3}],
            }
        ],
        "prompt_logprobs": None,
    }
    assert engine.requests[0].max_tokens == 62 and engine.requests[0].drawing == Drawing()


def test_generate_stops_and_draws_as_asked(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "ab STOP c", END))
    client = client_of(engine, tokenizer)
    found = generate(client, n=2, stop="STOP", logprobs=3, max_tokens=50, stop_token_ids=[END])
    assert [c["stop_reason"] for c in found["choices"]] == ["STOP", "STOP"]
    assert tokenizer.decode(found["choices"][1]["token_ids"]) == "ab STOP"
    first = found["choices"][0]["logprobs"]["content"][0]
    assert [t["token_id"] for t in first["top_logprobs"]] == [3, 4]
    assert engine.requests[0].drawing == Drawing(top=3)
    assert generate(client)["choices"][0]["logprobs"] is None


def test_generate_scores_prompts(hello):
    _, client = hello
    found = generate(client, max_tokens=1, prompt_logprobs=0)
    assert found["prompt_logprobs"] == [
        None,
        {"6": {"logprob": logp_of(6), "rank": None, "decoded_token": "$"}},
    ]


def test_versions_of_a_sequence_that_crossed_an_update(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "abcd"), block=2)
    engine.version = "1"
    tokens = tokenizer.encode("abcd")

    def script(request):
        return tokens

    class Changing(ScriptedEngine):
        @property
        def version(self):
            return "1" if self.drawn < 2 else "2"

        @version.setter
        def version(self, label):
            pass

    found = generate(client_of(Changing(script, block=2), tokenizer))
    assert found["choices"][0]["weight_versions"] == [
        {"version": "1", "start": 0, "end": 2},
        {"version": "2", "start": 2, "end": 4},
    ]


# --- the small ones ----------------------------------------------------------------------------


def test_models_health_and_version(hello):
    engine, client = hello
    (model,) = client.get("/v1/models").json()["data"]
    assert model.pop("created") > 1.7e9
    assert model == {
        "id": "policy",
        "object": "model",
        "owned_by": "aspo_jax",
        "root": "/models/toy",
        "parent": None,
        "max_model_len": 64,
        "permission": [],
    }
    assert client.get("/version").json() == {"version": aspo_jax.__version__}
    assert (client.get("/health").status_code, client.get("/health").content) == (200, b"")
    engine.is_alive = False
    assert client.get("/health").status_code == 503
    for route in ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate"):
        body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "token_ids": [5]}
        assert client.post(route, json=body).status_code == 500


def test_the_tokenizer_is_served(hello, tokenizer):
    _, client = hello
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>" and info["bos_token"] is None
    assert info["chat_template"] == tokenizer.chat_template
    found = client.post("/tokenize", json={"prompt": "hello é", "return_token_strs": True}).json()
    assert found == {
        "count": 4,
        "max_model_len": 64,
        "tokens": [262, 223, 130, 105],
        "token_strs": ["hello", "Ġ", "Ã", "©"],
    }
    text = client.post("/detokenize", json={"tokens": [1, *found["tokens"], 2]}).json()
    assert text == {"prompt": "<|start|>hello é<|end|>"}
    body = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert tokenizer.decode(tokens) == "<|start|>user\na<|end|>"


def test_the_settings_of_a_folder_are_served(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(raw | {"own": 1, "eos_token": {"content": "<|end|>"}})
    )
    app = create_app(
        {"a": Served(ScriptedEngine(says(tokenizer, "a")), Policy(tokenizer, tmp_path))}
    )
    client = type(client_of(ScriptedEngine(says(tokenizer, "a")), tokenizer))(app)
    info = client.get("/tokenizer_info").json()
    assert info["own"] == 1 and info["eos_token"] == "<|end|>"


def test_beginning_of_text_is_added_to_texts_as_the_tokenizer_does():
    tokenizer = piece_tokenizer()
    engine = ScriptedEngine(says(tokenizer, "a"))
    client = client_of(engine, tokenizer)
    for adds in (True, False):
        body = {"prompt": "▁hello", "add_special_tokens": adds}
        tokens = client.post("/tokenize", json=body).json()["tokens"]
        assert tokens == tokenizer.encode("▁hello", add_special_tokens=adds)


def test_several_models_by_name(tokenizer):
    engines = [ScriptedEngine(says(tokenizer, text, END)) for text in ("one", "two")]
    served = {
        name: Served(engine, Policy(tokenizer))
        for name, engine in zip(("new", "old"), engines, strict=True)
    }
    client = type(client_of(engines[0], tokenizer))(create_app(served, Settings(is_admin=True)))
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["new", "old"]
    for name, text in ((None, "one"), ("new", "one"), ("old", "two")):
        found = completion(client, model=name)
        assert found["choices"][0]["text"] == text and found["model"] == (name or "new")
    client.post("/update_weight_version?model=old", json={"new_version": "5"})
    assert [engine.version for engine in engines] == ["default", "5"]
    engines[1].is_alive = False
    assert client.get("/health").status_code == 503
    assert completion(client, model="new")["choices"][0]["text"] == "one"


def test_the_page_is_served_where_it_is(hello, tmp_path, monkeypatch):
    _, client = hello
    monkeypatch.setattr("aspo_jax.serving.small.PAGE", tmp_path / "page.html")
    assert client.get("/").status_code == 404
    (tmp_path / "page.html").write_text("<p>ü", encoding="utf-8")
    found = client.get("/")
    assert found.text == "<p>ü" and found.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in found.headers["content-security-policy"]


# --- admin -------------------------------------------------------------------------------------


@pytest.fixture
def admin(tokenizer):
    engine = ScriptedEngine(says(tokenizer, "hello", END))
    return engine, client_of(engine, tokenizer, is_admin=True)


def test_admin_routes_need_the_flag(hello):
    _, client = hello
    for route in ("/pause", "/resume", "/update_weights", "/collective_rpc", "/abort_requests"):
        assert client.post(route, json={}).status_code == 404


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause_and_resume(admin, mode):
    engine, client = admin
    assert client.post(f"/pause?mode={mode}&clear_cache=false").json() == {"status": "paused"}
    assert engine.calls == [("pause", mode)]
    assert client.get("/is_paused").json() == {"is_paused": True}
    assert client.post("/resume").json() == {"status": "resumed"}
    assert client.get("/is_paused").json() == {"is_paused": False}


def test_weights_are_loaded_by_either_route(admin):
    engine, client = admin
    assert client.get("/weight_info").json() == {"weight_version": "default"}
    assert client.post("/update_weights", json={"weight_dir": "/w/1"}).json() == {"status": "ok"}
    body = {"method": "reload_weights", "kwargs": {"weights_path": "/w/2"}, "timeout": 600}
    assert client.post("/collective_rpc", json=body).json() == {"results": [None]}
    assert client.post("/reset_prefix_cache").json() == {"success": True}
    label = client.post("/update_weight_version", json={"new_version": "2"}).json()
    assert label == {"success": True, "new_version": "2"}
    client.post("/update_weights", json={"weight_dir": "/w/3", "weight_version": "3"})
    assert client.get("/weight_info").json() == {"weight_version": "3"}
    assert engine.calls == [("load", "/w/1", None), ("load", "/w/2", None), ("load", "/w/3", "3")]


def test_a_failed_load_is_said_and_the_old_weights_serve(admin):
    _, client = admin
    body = {"method": "reload_weights", "kwargs": {"weights_path": "broken"}}
    for route, sent in (("/update_weights", {"weight_dir": "broken"}), ("/collective_rpc", body)):
        found = client.post(route, json=sent)
        assert found.status_code == 500
        assert "the old weights go on serving" in found.json()["error"]
    assert completion(client)["choices"][0]["text"] == "hello"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/pause?mode=now", {}),
        ("/pause?clear_cache=perhaps", {}),
        ("/abort_requests", {}),
        ("/abort_requests", {"request_ids": [1]}),
        ("/update_weights", {}),
        ("/update_weights", {"weight_dir": ""}),
        ("/update_weights", {"weight_dir": "/w", "weight_version": 3}),
        ("/collective_rpc", {"method": "shutdown"}),
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {}}),
        ("/update_weight_version", {"new_version": 3}),
        ("/update_weight_version", []),
    ],
)
def test_mistakes_on_admin_routes_are_said(admin, route, body):
    engine, client = admin
    found = client.post(route, json=body)
    assert found.status_code == 400
    assert isinstance(found.json()["error"], str) and "expected" in found.json()["error"]
    assert engine.calls == []
