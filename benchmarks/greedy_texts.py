"""The greedy texts of an evaluation beside those of `transformers`, by the same graders.

    python -m aspo_jax.evaluate MODEL --suite humaneval --data-folder DATA --out OUT
    python benchmarks/greedy_texts.py MODEL OUT

Every text of ours is read by `transformers`' own network in float32: where each of its tokens is
the likeliest there too, ``generate`` would write the same text. Where one is not, ``generate``
writes the text anew. So all its texts are known at the cost of few; OUT-transformers holds them,
graded, as OUT holds ours.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import machine

from aspo_jax.config.suites import file_suite
from aspo_jax.data import load_tokenizer
from aspo_jax.model import read_eos_ids
from aspo_jax.scoring.regrading import regrade
from aspo_jax.scoring.results import Row, read_samples, read_settings, write_samples


class Rival:
    """`transformers`' network of a folder and the tokenizer of ours."""

    def __init__(self, folder: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.tokenizer = load_tokenizer(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ends = read_eos_ids(folder, len(self.tokenizer))
        self.ends = tuple(dict.fromkeys((self.tokenizer.eos_token_id, *ends)))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def agrees(self, row: Row) -> bool:
        """Every token of the text, and its end if it has one, is the likeliest behind the last."""
        prompt, response = self.encode(row["prompt"]), self.encode(row["response"])
        with self.torch.inference_mode():
            kept = len(response) + 1
            logits = self.model(self.torch.tensor([prompt + response]), logits_to_keep=kept).logits[
                0
            ]
        likeliest = logits.argmax(-1).tolist()
        is_end = likeliest[-1] in self.ends if row["finished"] else True
        return likeliest[:-1] == response and is_end

    def generate(self, row: Row, most: int) -> Row:
        """The row with the text that ``generate`` writes."""
        prompt = self.torch.tensor([self.encode(row["prompt"])])
        with self.torch.inference_mode():
            out = self.model.generate(
                input_ids=prompt,
                attention_mask=self.torch.ones_like(prompt),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=list(self.ends),
                pad_token_id=self.ends[0],
            )[0, prompt.shape[1] :].tolist()
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        is_finished = out[-1] in self.ends
        return row | {"response": text, "tokens": len(out), "finished": is_finished}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    rows, sets = read_samples(a.out), read_settings(a.out)["sets"]
    if any(s["temperature"] or s["samples"] != 1 for s in sets.values()):
        parser.error(f"{a.out}: expected one greedy answer a prompt")
    rival, start, written = Rival(a.model), time.perf_counter(), []
    for i, row in enumerate(rows):
        if not rival.agrees(row):
            rows[i] = rival.generate(row, sets[row["set"]]["max_response_tokens"])
            written.append((row, rows[i]))
        print(f"\r{i + 1} of {len(rows)}, {len(written)} anew", end="", file=sys.stderr)
    theirs = a.out.with_name(f"{a.out.name}-transformers")
    shutil.copytree(a.out, theirs)
    write_samples(theirs, rows)
    regrade(theirs, file_suite("stored", []))
    print(_report(a, sets, written, time.perf_counter() - start), flush=True)
    return 0


def _report(a: argparse.Namespace, sets: Any, written: list[tuple[Row, Row]], took: float) -> str:
    folders = (a.out, a.out.with_name(f"{a.out.name}-transformers"))
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in folders)
    cells = [
        [
            name,
            str(s["prompts"]),
            *(f"{100 * r['figures'][name]['avg']['value']:.1f}" for r in (ours, theirs)),
            str(sum(mine["set"] == name for mine, _ in written)),
            str(
                sum(
                    mine["set"] == name and mine["response"] != x["response"] for mine, x in written
                )
            ),
        ]
        for name, s in sets.items()
    ]
    head = ["set", "prompts", "ours", "transformers", "texts written anew", "texts that differ"]
    packages = ("jax", "torch", "transformers")
    title = machine.header("Greedy texts", f"python benchmarks/greedy_texts.py {a.model}", packages)
    return f"{title}\n{machine.table(head, cells)}\n\n{took:.0f} s."


if __name__ == "__main__":
    sys.exit(main())
