"""The rival of `train_step.py` from google-tunix, in a process (and an environment) of its own.

    python benchmarks/tunix_worker.py FOLDER

What runs is tunix's own `Trainer.train`, the call that its GRPO learner makes for every mini-batch,
on its own Qwen2 with its own GRPO loss, entropy and metrics as they come, float32, AdamW behind a
clip of the global norm (optax, as tunix takes it), no KL term. Old log-probabilities are given, as
in all but the first of several iterations. "padded" is one [rows, tokens] example; "packed" is the
same sequences through tunix's own `pack_sequences` with a budget of one row, one row after the
other, gradients accumulated over them by its own setting.

FOLDER holds the network as `transformers` writes it and ``NAME.npz`` per layout (`train_step.py`).
Commands come as JSON lines ``[name, repeats]``; the answer is ``{"seconds": [...], "loss",
"grad_norm"}`` of the updates, the last two from the first one of a name's first call.

Needs the packages that tunix imports, but not its ``jax[tpu]``:
    pip install --no-deps google-tunix
    pip install "jax==0.10.2" flax optax orbax-checkpoint grain jaxtyping jinja2 google-metrax \
        qwix sentencepiece "safetensors<0.8" omegaconf pylatexenc python-dotenv tenacity kagglehub \
        hf_transfer huggingface_hub transformers fsspec tqdm sympy pillow numba \
        importlib_resources perfetto pandas tensorboardX
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rivals import own_output, serve

os.environ["JAX_PLATFORMS"] = "cpu"


def load_model(folder: Path, mesh: Any) -> Any:
    """Tunix's Qwen2 with the weights of the folder, through tunix's own loader."""
    import jax.numpy as jnp
    from tunix.models.qwen2 import model, params

    raw = json.loads((folder / "config.json").read_text())
    config = model.ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=raw["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    return params.create_model_from_safe_tensors(str(folder), config, mesh, dtype=jnp.float32)


def examples(arrays: Any, budget: int | None) -> list[Any]:
    """The mini-batch as tunix's learner hands it to its trainer, packed where there is a budget."""
    import jax.numpy as jnp
    from tunix.rl import utils
    from tunix.rl.grpo.grpo_learner import TrainExample

    # Tunix pads prompts on the left and responses on the right, with the pad id as the mask.
    is_response = arrays["is_response"]
    example = TrainExample(
        prompt_ids=jnp.asarray(arrays["prompt"]),
        prompt_mask=jnp.ones(arrays["prompt"].shape, bool),
        completion_ids=jnp.asarray(arrays["response"]),
        completion_mask=jnp.asarray(is_response),
        advantages=jnp.asarray(arrays["advantage"]),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(arrays["old_logp"]),
    )
    if budget is None:
        return [example]
    return [row for rows in utils.pack_sequences(iter([[example]]), budget) for row in rows]


def build_update(folder: Path, name: str, task: dict[str, Any], mesh: Any):
    """() -> (loss, gradient norm) of one update on the mini-batch of that name."""
    import numpy as np
    import optax
    from tunix.rl import function_registry
    from tunix.rl.grpo.grpo_learner import GRPOConfig
    from tunix.rl.trainer import Trainer
    from tunix.sft.peft_trainer import TrainingConfig

    layout = task["layouts"][name]
    with np.load(folder / f"{name}.npz") as arrays:
        batch = examples(arrays, layout["tunix_budget"])
    o = task["optimizer"]
    trainer = Trainer(
        load_model(folder, mesh),
        optax.chain(
            optax.clip_by_global_norm(o["clip_norm"]),
            optax.adamw(
                o["learning_rate"], *o["betas"], eps=o["eps"], weight_decay=o["weight_decay"]
            ),
        ),
        TrainingConfig(
            eval_every_n_steps=1_000_000,
            gradient_accumulation_steps=len(batch) if len(batch) > 1 else None,
            max_seq_token_per_tpu=layout["tunix_budget"],
        ),
        custom_checkpoint_metadata_fn=dict,
    )
    config: Any = GRPOConfig(num_iterations=2, beta=0.0, epsilon=task["clip"])
    config.temperature = 1.0
    grpo = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: grpo(
            model, train_example, algo_config=config, pad_id=task["pad"], eos_id=task["eos"]
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
    trainer.is_managed_externally = True
    seen: list[Any] = []
    buffer = trainer._buffer_metrics

    def observed(*args: Any, **kwargs: Any):
        seen.append((kwargs["loss"], kwargs["additional_metrics"]["grad_norm"][0]))
        return buffer(*args, **kwargs)

    trainer._buffer_metrics = observed

    def update() -> tuple[float, float]:
        seen.clear()
        with mesh:
            trainer.train(batch)  # returns when the last step is done
        losses, norms = zip(*seen, strict=True)
        return float(np.mean(losses)), float(norms[0])

    return update


def main(folder: str) -> int:
    say = own_output()
    try:
        import jax
        import tunix.rl.trainer
    except ImportError as error:
        say({"absent": str(error)})
        return 0
    import importlib.metadata

    task = json.loads(Path(folder, "task.json").read_text())
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    del tunix
    say({"versions": {n: importlib.metadata.version(n) for n in ("google-tunix", "jax", "flax")}})
    serve(say, lambda name: build_update(Path(folder), name, task, mesh))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
