"""The rival of `losses.py` in a process of its own: TRL's GRPO loss, torch on the CPU.

    python benchmarks/trl_worker.py INPUTS.npz

What runs is `GRPOTrainer._compute_loss` of the installed TRL, its metrics included, on an instance
whose model call returns given log-probabilities; its accelerator is a stand-in for one process
(gather and reduce return their argument). Commands come as JSON lines ``[loss_type, repeats]``; the
answer is ``{"seconds": median}``, or with 0 repeats ``{"loss": value, "gradient": path}``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

THREADS = 2
# loss_type -> (epsilon_low, epsilon_high)
CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28)}


def build_trainer(loss_type: str, logp: Any, entropy: Any) -> Any:
    """A GRPOTrainer with TRL's default settings and nothing but what its loss reads."""
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    trainer: Any = object.__new__(GRPOTrainer)
    low, high = CLIP[loss_type]
    settings = {
        "loss_type": loss_type,
        "epsilon_low": low,
        "epsilon_high": high,
        "beta": 0.0,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logp, entropy, None),
    }
    vars(trainer).update(settings)
    return trainer


def build_step(loss_type: str, arrays: Any):
    """A function that computes loss and gradient once and returns both."""
    import torch  # pyright: ignore[reportMissingImports]

    logp = torch.tensor(arrays["logp"], requires_grad=True)
    entropy = torch.tensor(arrays["entropy"])
    mask = torch.tensor(arrays["is_response"]).long()
    nothing = torch.zeros(mask.shape[0], 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(arrays["advantage"][:, 0]),
        "old_per_token_logps": torch.tensor(arrays["old_logp"]),
        "num_items_in_batch": mask.sum(),
    }
    trainer = build_trainer(loss_type, logp, entropy)

    def step():
        logp.grad = None
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return loss, logp.grad

    return step


def answer(step, repeats: int, gradient_path: Path) -> dict[str, Any]:
    """Time the step, or with 0 repeats show what it computes."""
    if repeats == 0:
        loss, gradient = step()
        np.save(gradient_path, gradient.numpy())
        return {"loss": loss.item(), "gradient": str(gradient_path)}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds)}


def main(path: str) -> int:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import trl  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return 0
    torch.set_num_threads(THREADS)
    with np.load(path) as arrays:
        steps = {name: build_step(name, arrays) for name in CLIP}
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        name, repeats = json.loads(line)
        result = answer(steps[name], repeats, Path(path).with_name(f"{name}.npy"))
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
