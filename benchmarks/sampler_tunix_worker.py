"""The rival of `sampler.py` from google-tunix: its vanilla sampler, in a process of its own.

    python benchmarks/sampler_tunix_worker.py FOLDER

Its `Sampler.__call__` on its own Qwen2, float32, temperature 1 with top-p 1, as its GRPO samples by
default. It decodes a batch until its longest answer ends; the schedule's answers end without a stop
id, so the step at which a batch is over is set to just that, and the buffers stay those of the cap
(one compilation). What packages it needs: see `tunix_worker.py`.

FOLDER holds the network as `transformers` writes it and ``task.json`` (`sampler.py`). Commands come
as JSON lines ``[[[prompt, length], ...]]``; the answer is ``{"seconds", "peak_mib"}``.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from machine import peak_mib
from rivals import own_output
from tunix_worker import load_model


class Ids:
    """A tokenizer whose text is the ids."""

    def __init__(self, pad: int, stop: int):
        self._pad, self._stop = pad, stop

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self._stop

    def pad_id(self) -> int:
        return self._pad


def build_sampler(folder: Path, task: dict[str, Any], mesh: Any) -> Any:
    """Tunix's sampler; its attribute ``longest`` says after how many tokens a batch is over."""
    from tunix.generate.sampler import CacheConfig, Sampler

    class Scheduled(Sampler):
        longest = 0

        def init_sample_state(self, all_input_ids: Any, *arguments: Any, **more: Any) -> Any:
            state = super().init_sample_state(all_input_ids, *arguments, **more)
            over = all_input_ids.shape[1] + self.longest
            return dataclasses.replace(state, total_sampling_steps=over)

    raw = json.loads((folder / "config.json").read_text())
    size = task["prompt"] + task["cap"]
    heads = raw["num_attention_heads"]
    cache = CacheConfig(
        size, raw["num_hidden_layers"], raw["num_key_value_heads"], raw["hidden_size"] // heads
    )
    tokenizer = Ids(task["pad"], task["stop"])
    return Scheduled(load_model(folder, mesh), tokenizer, cache)


def main(folder: str) -> int:
    say = own_output()
    try:
        import jax

        importlib.import_module("tunix.generate.sampler")
    except ImportError as error:
        say({"absent": str(error)})
        return 0
    task = json.loads(Path(folder, "task.json").read_text())
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sampler = build_sampler(Path(folder), task, mesh)
    say({"versions": {n: importlib.metadata.version(n) for n in ("google-tunix", "jax")}})
    for line in sys.stdin:
        (requests,) = json.loads(line)
        start = time.perf_counter()
        for first in range(0, len(requests), task["rows"]):
            batch = requests[first : first + task["rows"]]
            sampler.longest = max(length for _, length in batch)
            with mesh:
                out = sampler(
                    [" ".join(map(str, prompt)) for prompt, _ in batch],
                    max_generation_steps=task["cap"],
                    max_prompt_length=task["prompt"],
                    forbidden_tokens=(task["pad"], task["stop"]),
                    temperature=1.0,
                    top_p=1.0,
                    seed=first,
                )
            jax.block_until_ready(out.padded_prompt_tokens)
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "peak_mib": peak_mib()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
