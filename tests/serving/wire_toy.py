"""A scripted engine and small tokenizers, to test what lies between a socket and an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aspo_jax.sampler import LENGTH, STOP, Request
from aspo_jax.serving.app import create_app
from aspo_jax.serving.seam import EngineError, Grown, Overloaded, PromptScore, Served
from aspo_jax.serving.site import Settings

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }};{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.arguments.x }}]{% endfor %}"
    "<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{{ mood }}{% endif %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('no such thing') }}{% endif %}"
)
SPECIAL = ["<pad>", "<|start|>", "<|end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("!", "ä")]


def byte_tokenizer() -> Any:
    """Byte-level BPE: 3 special tokens, 256 bytes, a few merges, one of them within a character."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    core.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<pad>", chat_template=TEMPLATE
    )


def piece_tokenizer() -> Any:
    """As sentencepiece has it: words with a leading space, other characters byte by byte."""
    words = ["▁", "▁hello", "▁world", "▁a", "a", "!", "wor"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    core = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens([AddedToken(x, special=True) for x in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


class ThreeTokens:
    """A vocabulary of "a", "b" and "c" for arithmetic by hand; ids 0, 1, 2."""

    added_tokens_decoder: dict[int, Any] = {}
    chat_template = None
    eos_token = "c"

    def __len__(self) -> int:
        return 3

    @property
    def backend_tokenizer(self) -> ThreeTokens:
        return self

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ["abc".index(c) for c in text]

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join("abc"[i] for i in tokens)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return "abc"[ids] if isinstance(ids, int) else ["abc"[i] for i in ids]


class Policy(NamedTuple):
    tokenizer: Any
    source: Any = None


def logp_of(token: int) -> float:
    """The log-probability that the scripted engine gives a token: exact in binary."""
    return -(token % 32 + 1) / 8


class ScriptedEngine:
    """Draws what a script says.

    script: request -> the ids it would draw without an end. stops: own stop ids. block: tokens per
    decode call. pause: seconds before each.
    """

    logprobs_mode = "processed"

    def __init__(
        self,
        script: Callable[[Request], Sequence[int]],
        *,
        stops: Sequence[int] = (2,),
        block: int = 1,
        delay: float = 0.0,
        window: int = 64,
        full: bool = False,
    ):
        self.script, self.stops, self.block, self.delay = script, stops, block, delay
        self.window, self.full = window, full
        self.version = "default"
        self.is_alive, self.is_paused = True, False
        self.requests: list[Request] = []
        self.scored: list[tuple[list[int], int]] = []
        self.running = 0  # sequences that hold a row
        self.drawn = 0  # tokens in all
        self.calls: list[Any] = []
        self.likely = [(3, -0.125), (4, -0.25)]
        self.fails: Exception | None = None
        self.scorer: Callable[[Sequence[int], int], PromptScore] = _score
        self.go = asyncio.Event()
        self.go.set()

    def generate(self, requests: Sequence[Request]) -> ScriptedGrowth:
        if self.full:
            raise Overloaded("256 sequences wait, which is all the queue holds; try again later")
        self.requests += requests
        return ScriptedGrowth(self, requests)

    async def score(self, tokens: Sequence[int], top: int) -> PromptScore:
        self.scored.append((list(tokens), top))
        return self.scorer(tokens, top)

    async def load(self, folder: str, label: str | None) -> None:
        self.calls.append(("load", folder, label))
        if folder == "broken":
            raise EngineError("broken: no config.json there; the old weights go on serving")
        self.version = label or self.version

    async def pause(self, mode: str) -> None:
        self.calls.append(("pause", mode))
        self.is_paused = True
        self.go.clear()

    async def resume(self) -> None:
        self.is_paused = False
        self.go.set()


def _score(tokens: Sequence[int], top: int) -> PromptScore:
    likely = [(3, -0.125), (4, -0.25), (5, -0.375)][:top]
    return PromptScore([logp_of(t) for t in tokens[1:]], [likely for _ in tokens[1:]])


class ScriptedGrowth:
    def __init__(self, engine: ScriptedEngine, requests: Sequence[Request]):
        self.engine, self.requests = engine, requests
        self.live = dict.fromkeys(range(len(requests)))
        self.cancelled: list[int] = []

    async def __aenter__(self) -> ScriptedGrowth:
        self.engine.running += len(self.live)
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.engine.running -= len(self.live)
        self.live.clear()

    def cancel(self, index: int) -> None:
        self.cancelled.append(index)
        self.end(index)

    def end(self, index: int) -> None:
        if index in self.live:
            del self.live[index]
            self.engine.running -= 1

    async def __aiter__(self) -> AsyncIterator[Grown]:
        engine, at = self.engine, 0
        scripts = [list(engine.script(request)) for request in self.requests]
        while self.live:
            await engine.go.wait()
            await asyncio.sleep(engine.delay)
            if engine.fails:
                raise engine.fails
            for index in reversed(list(self.live)):  # not in the order of the answer
                if index in self.live:
                    grown = self.grow(index, scripts[index], at)
                    engine.drawn += len(grown.tokens)
                    yield grown
            while self.cancelled:  # drawn before the engine heard of it
                yield Grown(self.cancelled.pop(), [67], [-1.0], [], None, engine.version)
            at += engine.block

    def grow(self, index: int, script: list[int], at: int) -> Grown:
        request = self.requests[index]
        drawing, limit = request.drawing, request.max_tokens
        assert drawing is not None and limit is not None
        limit = min(limit, len(script))
        tokens, ending = script[at : min(at + self.engine.block, limit)], None
        ends = [i for i, t in enumerate(tokens) if t in self.engine.stops]
        if ends and not drawing.ignores_stops:
            tokens, ending = tokens[: ends[0] + 1], STOP
        elif at + len(tokens) >= limit:
            ending = LENGTH
        if ending:
            self.end(index)
        top = [self.engine.likely[: drawing.top] for _ in tokens] if drawing.top else []
        return Grown(index, tokens, [logp_of(t) for t in tokens], top, ending, self.engine.version)


def says(tokenizer: Any, text: str, *more: int) -> Callable[[Request], list[int]]:
    """A script that always draws one text, then some ids."""
    tokens = [*tokenizer.encode(text, add_special_tokens=False), *more]
    return lambda request: tokens


def app_of(engine: Any, tokenizer: Any, **settings: Any) -> Any:
    return create_app(
        {"policy": Served(engine, Policy(tokenizer), "/models/toy")}, Settings(**settings)
    )


def client_of(engine: Any, tokenizer: Any, **settings: Any) -> TestClient:
    return TestClient(app_of(engine, tokenizer, **settings), headers={"host": "testserver"})


def events_of(body: str) -> Iterator[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        assert line.startswith("data: ")
        yield json.loads(line[6:])


def completion(client, **fields):
    response = client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def chat(client, text="hi", **fields):
    body = {"messages": [{"role": "user", "content": text}], **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def generate(client, ids=(5, 6), **sampling):
    body = {"token_ids": list(ids), "sampling_params": sampling}
    response = client.post("/inference/v1/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client, route="/v1/completions", **fields):
    body = {"stream": True, **fields}
    response = client.post(route, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return list(events_of(response.text))
