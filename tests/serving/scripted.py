"""A small server for the page: the two streams of the wire, with answers that are written here."""

from __future__ import annotations

import codecs
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import aspo_jax

PAGE = Path(aspo_jax.__file__).parent / "serving" / "page.html"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
Token = tuple[bytes, float]  # its text and its probability
ANSWERS: dict[str, list[Token]] = {
    "sum": [
        *((b"The", 0.93), (b" sum", 0.61), (b" of", 0.99), (b" ", 0.4), (b"3", 0.88), (b",", 0.97)),
        *((b" ", 0.95), (b"5", 0.999), (b" and", 0.72), (b" 7", 0.998), (b" is", 0.91)),
        *((b" ", 0.77), (b"15", 0.34), (b".", 0.83), (b"\n\n", 0.12), (b"Check", 0.021)),
        *((b":", 0.66), (b" 3", 0.84), (b" +", 0.98), (b" 5", 0.99), (b" +", 0.97), (b" 7", 1.0)),
        *((b" =", 0.99), (b" 15", 0.985), (b".", 0.51)),
    ],
    "bytes": [
        (b"caf", 0.9),
        (b"\xc3", 0.8),
        (b"\xa9 ", 0.7),
        (b"\xf0\x9f", 0.5),
        (b"\x98\x80!", 0.25),
    ],
    "hostile": [(HOSTILE[i : i + 7].encode(), 0.5) for i in range(0, len(HOSTILE), 7)],
    "never": [(b"never", 0.0)],
}
STOP = (b"<|im_end|>", 0.9)


def logp(probability: float) -> float:
    return math.log(probability) if probability else -9999.0


def candidates(token: Token) -> list[Token]:
    """Those that could be drawn at a place, the likeliest first: the drawn one and five others."""
    left = 1 - token[1]
    words = {b" alpha": 0.5, b" beta": 0.25, b" gamma": 0.12, b" delta": 0.08, b" epsilon": 0.05}
    others = [(text, left * share) for text, share in words.items()]
    return sorted([token, *others], key=lambda candidate: -candidate[1])


def chat_logprobs(tokens: list[Token]) -> dict[str, Any]:
    def named(token: Token) -> dict[str, Any]:
        text = token[0].decode(errors="replace")
        return {"token": text, "logprob": logp(token[1]), "bytes": list(token[0])}

    return {
        "content": [
            {**named(t), "top_logprobs": [named(c) for c in candidates(t)[:5]]} for t in tokens
        ]
    }


class Chunk(NamedTuple):
    """What an event adds. offsets: characters before each token."""

    text: str
    tokens: list[Token]
    offsets: list[int]
    ending: str | None


def chunks(tokens: list[Token]) -> Iterator[Chunk]:
    """An answer two tokens at a time. A character is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    for i in range(0, len(tokens), 2):
        some = tokens[i : i + 2]
        pieces = [decoder.decode(text) for text, _ in some]
        ends = list(itertools.accumulate(map(len, pieces), initial=at))
        yield Chunk("".join(pieces), some, ends[:-1], None)
        at = ends[-1]
    yield Chunk("", [STOP], [at], "stop")


def plain_logprobs(chunk: Chunk) -> dict[str, Any]:
    return {
        "tokens": [text.decode(errors="replace") for text, _ in chunk.tokens],
        "token_logprobs": [logp(p) for _, p in chunk.tokens],
        "top_logprobs": [
            {text.decode(errors="replace"): logp(p) for text, p in candidates(token)}
            for token in chunk.tokens
        ],
        "text_offset": chunk.offsets,
    }


def answer_to(said: str, model: str, is_chat: bool) -> Iterator[dict[str, Any]]:
    """The events of an answer."""
    tokens = ANSWERS[next((name for name in ANSWERS if name in said), "sum")]
    if model == "policy-200":
        tokens = [(text, p**3) for text, p in tokens]
    if is_chat:
        opening = {"role": "assistant", "content": ""}
        yield {"choices": [{"index": 0, "delta": opening, "logprobs": None, "finish_reason": None}]}
    for chunk in chunks(tokens * 2000 if said == "endless" else tokens):
        text = {"delta": {"content": chunk.text}} if is_chat else {"text": chunk.text}
        logprobs = chat_logprobs(chunk.tokens) if is_chat else plain_logprobs(chunk)
        choice = {"index": 0, **text, "logprobs": logprobs, "finish_reason": chunk.ending}
        yield {"choices": [choice]}
    usage = {"prompt_tokens": 12, "completion_tokens": len(tokens) + 1}
    yield {"choices": [], "usage": usage}


class Scripted(ThreadingHTTPServer):
    """Answers by the last words said. Keeps what it was asked."""

    daemon_threads = True

    def __init__(
        self, models: tuple[str, ...] = ("policy",), key: str = "", pause: float = 0.0
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.key, self.pause = models, key, pause
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refused = 0  # those without the key
        self.was_left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        error = {"message": message, "type": "Error", "param": None, "code": status}
        self.answer(status, json.dumps({"error": error}).encode())

    def is_let_in(self) -> bool:
        if self.server.key in ("", self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return True
        self.server.refused += 1
        self.answer(401, b'{"error": "Unauthorized"}')
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models" and self.is_let_in():
            data = [{"id": name, "object": "model"} for name in self.server.models]
            self.answer(200, json.dumps({"object": "list", "data": data}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_let_in():
            return
        self.server.asked.append((self.path, body))
        is_chat = self.path == "/v1/chat/completions"
        if is_chat and body["model"].startswith("base"):
            self.refuse(400, f"The model {body['model']} has no chat template.")
        elif (said := body["messages"][-1]["content"] if is_chat else body["prompt"]) == "away":
            self.close_connection = True  # without a word
        elif said == "busy" and len(self.server.asked) == 1:
            self.refuse(503, "512 requests are waiting.")
        else:
            self.stream(said, body["model"], is_chat)

    def stream(self, said: str, model: str, is_chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.events(said, model, is_chat)
        except (BrokenPipeError, ConnectionResetError):
            self.server.was_left.set()

    def events(self, said: str, model: str, is_chat: bool) -> None:
        for number, event in enumerate(answer_to(said, model, is_chat)):
            if said == "broken" and number == 3:
                return
            if said == "trouble" and number == 3:
                event = {"error": {"message": "The logits are not finite.", "code": 500}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            time.sleep(0.02 if said == "endless" else self.server.pause)
        self.wfile.write(b"data: [DONE]\n\n")
