"""A scripted engine on loopback: vLLM's and SGLang's routes, a tiny policy, and faults on demand.

As a program it is the engine of a command: python engine_toy.py MODEL PORT [KIND] [--die-once N].
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

VOCAB, STOP_ID, FORBIDDEN = 16, 2, (0, 1, 14, 15)  # the last two rows belong to no token
NAME = "policy"


# --- the policy -----------------------------------------------------------------------------------


def save(shift: float, folder: Path) -> None:
    """A model folder of the only weight that the policy has."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(json.dumps(shift))


def logp_V(shift: float, last: int, temperature: float = 1.0, forbidden: Sequence[int] = ()):
    """Log-probabilities of the next id behind another."""
    z_V = 2.0 * np.sin(shift * np.arange(1, VOCAB + 1) + 0.7 * last)
    z_V[list(forbidden)] -= 100.0
    z_V = z_V / temperature
    return z_V - np.log(np.exp(z_V).sum())


def scores(shift: float, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of all tokens but the first, at temperature 1."""
    return [
        float(logp_V(shift, last)[token])
        for last, token in zip(tokens[:-1], tokens[1:], strict=True)
    ]


# --- the server -----------------------------------------------------------------------------------


class ToyEngine:
    """An engine at ``address`` until `close`.

    asked: bodies of the requests for completions. events: paths of all others but looks at health.
    faults: what happens to the next requests for completions, one each.
    reload: what a load does: "ok", "warn": nothing but say so, "half": fail half way.
    die_after: requests for completions until it dies; None: it lives.
    """

    def __init__(self, kind: str = "vllm", shift: float = 0.0, port: int = 0):
        self.kind, self.shift, self.label, self.reload = kind, shift, "default", "ok"
        self.asked: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.faults: deque[str] = deque()
        self.cache_resets: deque[bool] = deque()
        self.die_after: int | None = None
        self.name = NAME
        self.is_dead = self.is_paused = False
        self.disconnected = 0
        self._lock = threading.Lock()
        engine = self

        class Handler(_Handler):
            toy = engine

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.is_dead = True
        self.server.shutdown()
        self.server.server_close()

    def dies(self) -> bool:
        """Whether it dies at this request."""
        with self._lock:
            if self.die_after is not None:
                self.die_after -= 1
                if self.die_after < 0:
                    self.is_dead = True
            return self.is_dead

    def load(self, folder: str) -> None:
        text = (Path(folder) / "model.safetensors").read_text()
        if self.reload == "ok":
            self.shift = json.loads(text)

    def group(self, prompt: Sequence[int], how: dict[str, Any], seed: int) -> list[Any]:
        """`drawn` for each of the samples that are asked for."""
        return [self.drawn(prompt, how, seed + i) for i in range(how["n"])]

    def scored(self, prompt: Sequence[int]) -> list[float]:
        """Log-probabilities of all tokens of a prompt but the first."""
        return scores(self.shift, prompt)

    def drawn(self, prompt: Sequence[int], how: dict[str, Any], seed: int):
        """Ids and log-probabilities of one completion, and why it ended."""
        rng, last, tokens, logp = np.random.default_rng(seed), prompt[-1], [], []
        forbidden = [int(i) for i in how.get("logit_bias", {})]
        most = how.get("max_tokens", how.get("max_new_tokens"))
        temperature = how["temperature"]
        while True:
            next_V = logp_V(self.shift, last, temperature or 1.0, forbidden)
            choice = rng.choice(VOCAB, p=np.exp(next_V)) if temperature else next_V.argmax()
            last = int(choice)
            tokens.append(last)
            logp.append(float(next_V[last]))
            if last in how["stop_token_ids"]:
                return tokens, logp, "stop"
            if len(tokens) == most:
                return tokens, logp, "length"


class _Handler(BaseHTTPRequestHandler):
    toy: ToyEngine
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drop(self, *, within_answer: bool = False) -> None:
        if within_answer:
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"choices": [')
            self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        toy, path = self.toy, urlsplit(self.path).path
        if toy.is_dead:
            self.drop()
        elif path == "/health":
            self.answer(None)
        elif path == "/v1/models":
            self.answer({"object": "list", "data": [{"id": toy.name}]})
        elif path in ("/weight_info", "/model_info"):
            self.answer({"weight_version": toy.label})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        toy, path = self.toy, urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"null")
        if toy.is_dead:
            self.drop()
        elif path in ("/v1/completions", "/generate"):
            self.completions(body)
        else:
            toy.events.append(path)
            self.admin(path, body)

    def admin(self, path: str, body: Any) -> None:
        toy = self.toy
        if path in ("/pause", "/pause_generation"):
            toy.is_paused = True
        elif path in ("/resume", "/continue_generation"):
            toy.is_paused = False
        elif path in ("/collective_rpc", "/update_weights_from_disk"):
            is_vllm = path == "/collective_rpc"
            toy.load(body["kwargs"]["weights_path"] if is_vllm else body["model_path"])
            if toy.reload == "half":
                toy.shift += 0.1
                failed = {"error": {"message": "half of them", "code": 500}}
                self.answer(*((failed, 500) if is_vllm else ({"success": False}, 200)))
                return
            toy.label = body.get("weight_version", toy.label)
            self.answer({"results": [None]} if is_vllm else {"success": True, "message": ""})
            return
        elif path == "/reset_prefix_cache":
            self.answer({"success": toy.cache_resets.popleft() if toy.cache_resets else True})
            return
        elif path == "/update_weight_version":
            toy.label = body["new_version"]
            self.answer({"success": True, "new_version": toy.label})
            return
        self.answer({"status": "ok", "success": True})

    def completions(self, body: dict[str, Any]) -> None:
        toy = self.toy
        if toy.is_paused:
            self.answer({"error": {"message": "paused"}}, 503)
            return
        is_vllm = "prompt" in body
        prompt = body["prompt"] if is_vllm else body["input_ids"]
        how = body if is_vllm else body["sampling_params"]
        if body.get("echo") or body.get("logprob_start_len") == 0:
            self.score(prompt, is_vllm)
            return
        toy.asked.append(body)
        if toy.dies():
            self.drop(within_answer=True)
            return
        fault = toy.faults.popleft() if toy.faults else ""
        if self.fails(fault):
            return
        found = toy.group(prompt, how, how.get("seed", len(toy.asked)))
        make = self.vllm if is_vllm else self.sglang
        self.answer(spoiled(make(prompt, found), fault))

    def fails(self, fault: str) -> bool:
        """Whether the request fails as a whole."""
        if fault == "500":
            self.answer({"error": {"message": "EngineDeadError", "code": 500}}, 500)
        elif fault == "400":
            self.answer({"error": {"message": "no such model `policy`", "code": 400}}, 400)
        elif fault == "drop":
            self.drop(within_answer=True)
        elif fault == "hang":
            time.sleep(0.2)
            self.connection.settimeout(5.0)
            if self.connection.recv(1) == b"":
                self.toy.disconnected += 1
            self.close_connection = True
        elif fault == "text":
            self.answer("not an answer")
        else:
            return False
        return True

    def score(self, prompt: list[int], is_vllm: bool) -> None:
        found = [None, *self.toy.scored(prompt)]
        if is_vllm:
            self.answer({"choices": [{"index": 0, "logprobs": {"token_logprobs": found}}]})
        else:
            pairs = [[x, token, None] for x, token in zip(found, prompt, strict=True)]
            self.answer({"meta_info": {"input_token_logprobs": pairs}})

    def vllm(self, prompt: list[int], found: list[Any]) -> Any:
        choices = [
            {
                "index": i,
                "text": "",
                "token_ids": tokens,
                "prompt_token_ids": prompt,
                "logprobs": {"token_logprobs": logp},
                "finish_reason": finish,
                "stop_reason": None,
            }
            for i, (tokens, logp, finish) in enumerate(found)
        ]
        return {"id": "cmpl-1", "object": "text_completion", "choices": choices}

    def sglang(self, prompt: list[int], found: list[Any]) -> Any:
        answers = [
            {
                "text": "",
                "output_ids": tokens,
                "meta_info": {
                    "finish_reason": {"type": finish},
                    "prompt_tokens": len(prompt),
                    "output_token_logprobs": [
                        [x, token, None] for x, token in zip(logp, tokens, strict=True)
                    ],
                    "weight_version": self.toy.label,
                },
            }
            for tokens, logp, finish in found
        ]
        return answers if len(answers) > 1 else answers[0]


def spoiled(answer: Any, fault: str) -> Any:
    """An answer of vLLM's with one thing wrong."""
    if not fault:
        return answer
    choices = answer["choices"]
    first, logp = choices[0], choices[0]["logprobs"]["token_logprobs"]

    def instead(finish: str, *tokens: int) -> None:
        known = {"token_logprobs": [-1.0] * len(tokens)}
        first.update(finish_reason=finish, token_ids=list(tokens), logprobs=known)

    spoil = {
        "duplicate": lambda: choices.append(dict(first)),
        "one less": choices.pop,
        "lengths": logp.pop,
        "missing": lambda: logp.__setitem__(0, -9999.0),
        "nan": lambda: logp.__setitem__(0, float("nan")),
        "positive": lambda: logp.__setitem__(0, 0.5),
        "null": lambda: logp.__setitem__(0, None),
        "prompt": lambda: first.update(prompt_token_ids=[3, 3, 3]),
        "abort": lambda: first.update(finish_reason="abort"),
        "early": lambda: instead("length", 5),
        "goes on": lambda: instead("stop", STOP_ID, 5, 5),
        "no stop": lambda: instead("stop", 5, 5),
        "forbidden": lambda: instead("length", 5, 15, 5, 5, 5, 5),
    }
    spoil[fault]()
    return answer


# --- as a program ---------------------------------------------------------------------------------


def main(folder: str, port: str, kind: str = "vllm", *more: str) -> None:
    """Serve a folder; --die-once N: end at the N-th request, the first time only."""
    toy = ToyEngine(kind, port=int(port))
    toy.load(folder)
    print(f"serving {folder}", flush=True)
    mark = Path(os.environ.get("TOY_MARK", "/nonexistent"))
    if more[:1] == ("--die-once",) and not mark.exists():
        mark.touch()
        toy.die_after = int(more[1])
    while not toy.is_dead:
        time.sleep(0.02)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
