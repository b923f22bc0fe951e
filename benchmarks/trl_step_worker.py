"""The rival of `train_step.py` from TRL: its GRPO loss on transformers' Qwen2, torch on the CPU.

    python benchmarks/trl_step_worker.py FOLDER

What runs per micro-batch is `GRPOTrainer._compute_loss` of the installed TRL with its real
log-probabilities and entropies (its fused output layer), its metrics included, then ``backward``;
per update the clip of the global norm and `torch.optim.AdamW` (fused, transformers' default).
Float32, ``sdpa`` attention, no gradient checkpointing (TRL's default recomputes, which is slower),
no KL term. TRL packs no rollouts: a mini-batch is padded to its longest sequence and split into
micro-batches of ``rows``. Files, commands and answers are those of `tunix_worker.py`.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rivals import own_output, serve

THREADS = 2


def build_trainer(model: Any, clip: float, microbatches: int) -> Any:
    """A GRPOTrainer with TRL's default settings and nothing but what its loss reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer, add_fused_lm_head

    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    trainer: Any = object.__new__(GRPOTrainer)
    settings = {
        "loss_type": "grpo",
        "epsilon_low": clip,
        "epsilon_high": clip,
        "beta": 0.0,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": microbatches,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "model": model,
        "args": SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1, report_to=[]
        ),
        "accelerator": SimpleNamespace(
            num_processes=1,
            is_main_process=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            autocast=contextlib.nullcontext,
        ),
    }
    vars(trainer).update(settings)
    return trainer


def microbatches(arrays: Any, rows: int) -> list[dict[str, Any]]:
    """TRL's inputs, responses cut to the longest of the mini-batch, ``rows`` sequences each."""
    import torch

    longest = int(arrays["is_response"].sum(axis=1).max())
    response = {n: arrays[n][:, :longest] for n in ("response", "is_response", "old_logp")}
    mask = torch.tensor(response["is_response"]).long()
    whole = {
        "prompt_ids": torch.tensor(arrays["prompt"]).long(),
        "prompt_mask": torch.ones(arrays["prompt"].shape, dtype=torch.long),
        "completion_ids": torch.tensor(response["response"]).long(),
        "completion_mask": mask,
        "advantages": torch.tensor(arrays["advantage"]),
        "old_per_token_logps": torch.tensor(response["old_logp"]),
    }
    parts = range(0, len(mask), rows)
    return [
        {name: x[start : start + rows] for name, x in whole.items()}
        | {"num_items_in_batch": mask.sum()}
        for start in parts
    ]


def build_update(folder: Path, name: str, task: dict[str, Any]):
    """() -> (loss, gradient norm) of one update on the mini-batch of that name."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    with np.load(folder / f"{name}.npz") as arrays:
        parts = microbatches(arrays, task["rows"])
    trainer = build_trainer(model, task["clip"], len(parts))
    o = task["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=o["learning_rate"],
        betas=tuple(o["betas"]),
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        fused=True,
    )

    def update() -> tuple[float, float]:
        total = 0.0
        for part in parts:
            loss = trainer._compute_loss(model, part)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return total, norm.item()

    return update


def main(folder: str) -> int:
    say = own_output()
    try:
        import torch
        import transformers
        import trl.trainer.grpo_trainer
    except ImportError as error:
        say({"absent": str(error)})
        return 0
    torch.set_num_threads(THREADS)
    task = json.loads(Path(folder, "task.json").read_text())
    versions = {m.__name__: m.__version__ for m in (trl, torch, transformers)}
    say({"versions": versions})
    serve(say, lambda name: build_update(Path(folder), name, task))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
