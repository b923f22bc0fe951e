"""The rival of `sampler.py` from transformers: `generate` in torch on the CPU, its own process.

    python benchmarks/sampler_torch_worker.py FOLDER

`AutoModelForCausalLM.generate` as it comes (dynamic cache, sdpa attention), float32, sampling from
the whole softmax. A batch runs until its longest answer ends, which is just where the schedule says
(``max_new_tokens``; nobody heeds a stop id). Files, commands and answers are those of
`sampler_tunix_worker.py`.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from machine import peak_mib
from rivals import own_output


def main(folder: str) -> int:
    say = own_output()
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        say({"absent": str(error)})
        return 0
    task = json.loads(Path(folder, "task.json").read_text())
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    say({"versions": {m.__name__: m.__version__ for m in (transformers, torch)}})
    pad = task["pad"]
    for line in sys.stdin:
        (requests,) = json.loads(line)
        start, worked = time.perf_counter(), time.process_time()
        for first in range(0, len(requests), task["rows"]):
            batch = requests[first : first + task["rows"]]
            size = max(len(prompt) for prompt, _ in batch)
            ids = torch.tensor([[pad] * (size - len(prompt)) + prompt for prompt, _ in batch])
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=(ids != pad).long(),
                    max_new_tokens=max(length for _, length in batch),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    suppress_tokens=task["forbidden"],
                    pad_token_id=pad,
                )
        seconds = time.perf_counter() - start
        worked = time.process_time() - worked
        say({"seconds": seconds, "cpu_seconds": worked, "peak_mib": peak_mib()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
