"""TRL's and verl's policy losses in the form that `python -m aspo_jax.conform` asks.

    cd examples/conform
    python -m aspo_jax.conform trl:GRPOTrainer --adapter adapters:trl_grpo --expect grpo
    python -m aspo_jax.conform verl.trainer.ppo.core_algos:compute_policy_loss_gspo \\
        --adapter adapters:verl_gspo --expect gspo

An adapter is given what the command line names and returns
``f(logp, old_logp, advantage, mask) -> loss``. Written for trl 1.16 and verl 0.9.1; both are run as
they are, nothing of them is copied.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any


def verl(loss: Callable[..., Any], average: str = "token-mean", **settings: Any) -> Any:
    """One of verl's registered policy losses: it takes the old log-probabilities first.

    average: verl's loss_agg_mode. settings: of verl's ActorConfig, e.g. clip_ratio_high.
    """
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)

    def adapted(logp, old_logp, advantage, mask):
        return loss(old_logp, logp, advantage, mask, average, config)

    return adapted


verl_grpo = functools.partial(verl, average="seq-mean-token-mean", clip_ratio_c=1e9)
verl_dr_grpo = functools.partial(verl, average="seq-mean-token-sum-norm", clip_ratio_c=1e9)
verl_dapo = functools.partial(verl, clip_ratio_high=0.28, clip_ratio_c=10.0)
verl_cispo = functools.partial(verl, clip_ratio_low=0.2, clip_ratio_high=0.28)
verl_gspo = functools.partial(
    verl, average="seq-mean-token-mean", clip_ratio_low=3e-4, clip_ratio_high=4e-4
)
verl_geo_mean = functools.partial(verl, clip_ratio_low=0.4, clip_ratio_high=0.4)


def trl(trainer: Any, **settings: Any) -> Any:
    """The loss of TRL's GRPOTrainer, which is a method: it is run on a stand-in for the trainer.

    settings: of TRL's GRPOConfig; the others have its defaults. The stand-in's model gives the
    log-probabilities that are asked about, one process and no accumulation of gradients.
    """
    import torch
    from trl import GRPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    args = types.SimpleNamespace(**{**defaults, "steps_per_generation": 1, **settings})

    def adapted(logp, old_logp, advantage, mask):
        zeros = torch.zeros(logp.shape, dtype=torch.long)
        inputs = {
            "prompt_ids": zeros,
            "prompt_mask": zeros,
            "completion_ids": zeros,
            "completion_mask": mask,
            "advantages": advantage,
            "old_per_token_logps": old_logp,
            "ref_per_token_logps": old_logp,
            "num_items_in_batch": mask.sum(),
        }
        stand_in = _trainer(args, logp)
        return trainer._compute_loss(stand_in, stand_in.model, inputs)

    return adapted


def _trainer(args: Any, logp: Any) -> Any:
    """What TRL's loss reads of its trainer."""
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    upper = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return types.SimpleNamespace(
        **{**vars(args), "epsilon_low": args.epsilon, "epsilon_high": upper},
        args=args,
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, 0 * logp.detach(), None),
    )


trl_grpo = functools.partial(trl, loss_type="grpo")
trl_bnpo = functools.partial(trl, loss_type="bnpo")
trl_dr_grpo = functools.partial(trl, loss_type="dr_grpo", max_completion_length=512)
trl_dapo = functools.partial(trl, loss_type="dapo", epsilon_high=0.28)
trl_cispo = functools.partial(trl, loss_type="cispo", epsilon_high=5.0)
trl_gspo = functools.partial(
    trl, loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
)
trl_luspo = functools.partial(
    trl, loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3
)
trl_dual_clip = functools.partial(trl, loss_type="grpo", delta=3.0)
trl_kl = functools.partial(trl, loss_type="grpo", beta=1e-3)
