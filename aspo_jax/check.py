"""Sample, score again with the trainer's forward pass, and say how far the two are apart.

    python -m aspo_jax.check --config configs/aspo_math_1p5b.gin [--prompts 8]
    python -m aspo_jax.check runs/countdown_cpu-aspo-seed0

Once in float32, where they must agree to 1e-4 nats on every token, and once as the run would have
it (``Model.dtype``, ``Sampler.cache_type``), where the mean must be below ``Sampler.max_gap``. The
prompts are the held-out ones. The weights are those of ``Model.path``, or new ones without it; of
a run folder, those of its newest checkpoint.

Exit status: 0 they agree, 1 they do not, 2 a mistake in the arguments.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.agreement import EXACT, Gap, by_position
from aspo_jax.build import check_shares
from aspo_jax.config import Config, config_flags, read
from aspo_jax.config.reading import DEFAULT
from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.inputs import held_out_prompts
from aspo_jax.learner import make_old_policy, place
from aspo_jax.origin import fetch_weights, locate
from aspo_jax.parts import FACTORIES, build_sampler
from aspo_jax.paths import path_argument
from aspo_jax.policy import Policy, load_policy
from aspo_jax.rollout import draw
from aspo_jax.rows import BatchShape, answered, fill
from aspo_jax.run.folder import INITIAL_MODEL
from aspo_jax.run.records import Saved, find_run, run_config
from aspo_jax.sampler import EVALUATE
from aspo_jax.weights import load_saved, load_start


def as_dtype(config: Config, dtype: str, cache_type: Any) -> Config:
    """The config with other types of computation and cache; frozen weights keep theirs."""
    lora = config.lora
    if lora.rank is not None:
        lora = dataclasses.replace(lora, weights=config.frozen_dtype)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype),
        lora=lora,
        sampler=dataclasses.replace(config.sampler, cache_type=cache_type),
    )


def gaps(config: Config, mesh: Mesh, prompts: int, saved: Saved | None = None) -> list[Gap]:
    """Gaps of ``Train.samples_per_prompt`` samples of each prompt, see `by_position`."""
    policy, params = _policy_and_params(config, mesh, saved)
    held_out = held_out_prompts(config, policy.tokenizer)[:prompts]
    t, sampler = config.train, build_sampler(config, policy, mesh)
    completions = draw(sampler, params, held_out, t.samples_per_prompt, domain=EVALUATE)
    asked = [prompt for prompt in held_out for _ in range(t.samples_per_prompt)]
    examples = [
        answered(prompt.tokens, c.tokens_T, c.policy_logp_T, 1.0, 0)
        for prompt, c in zip(asked, completions, strict=True)
    ]
    rows_each = t.rows_per_microbatch
    microbatches = math.ceil(len(examples) / rows_each)
    sequences = policy.model.attention.sequences
    shape = BatchShape(1, microbatches, rows_each, t.row_tokens, sequences)
    part = fill(examples, shape)
    old = make_old_policy(policy.model, policy.head, mesh)(params, None, place(mesh, part))
    rows: Any = part.rows
    log_ratio_BT = rows.sampler_logp_BT - np.asarray(old.old_logp_BT)
    chosen = rows.is_response_BT
    return list(by_position(log_ratio_BT[chosen], rows.response_position_BT[chosen]))


def _policy_and_params(config: Config, mesh: Mesh, saved: Saved | None) -> tuple[Policy, Any]:
    """The policy with the weights of a checkpoint, of ``Model.path``, or new ones."""
    folder = config.model_folder or (saved and saved.run / INITIAL_MODEL)
    policy = load_policy(config, folder, mesh)
    if saved:
        return policy, load_saved(saved, config, policy, mesh)[1]
    if folder:
        return policy, load_start(config, policy, folder, mesh)
    model = policy.model
    new = jax.jit(model.init, out_shardings=model.shardings(mesh))
    return policy, new(jax.random.key(config.run.seed))


def report(title: str, found: Sequence[Gap]) -> str:
    """A Markdown table of gaps by response position."""
    return "\n".join(
        [
            f"### {title}\n",
            "| response positions | tokens | mean gap, nats | largest | ratio outside 1 +- 0.2 |",
            "| --- | ---: | ---: | ---: | ---: |",
            *(
                f"| {gap.first} to {gap.last} | {gap.tokens:,} | {gap.mean:.2e} "
                f"| {gap.largest:.2e} | {gap.outside:.2%} |"
                for gap in found
            ),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser("check", __doc__)
    parser.add_argument("run", nargs="?", type=path_argument, metavar="RUN", help="a run folder")
    config_flags(parser)
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts to sample")
    a = parser.parse_args(argv)
    if a.prompts < 1:
        parser.error(f"--prompts {a.prompts}: expected 1 or more")

    def command() -> int:
        if a.run is None:
            return check(read(a, FACTORIES), a.prompts)
        if a.config != DEFAULT or a.set:
            raise UserError(f"{a.run} has its own config; leave --config and --set, or RUN, out")
        saved = find_run(a.run)
        return check(run_config(saved.run, FACTORIES), a.prompts, saved)

    return run_command(command)


def check(config: Config, prompts: int, saved: Saved | None = None) -> int:
    """Print both tables and the verdict; returns the exit status, 0 or 1."""
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    check_shares(config, mesh)
    config = locate(config, saved.run if saved else config.run_folder)
    if saved is None:
        fetch_weights(config)
    config = as_dtype(config, config.model.dtype, config.sampler.cache_type)
    in_float32 = as_dtype(config, "float32", None)
    # GPUs and TPUs multiply float32 in shorter types by themselves.
    with jax.default_matmul_precision("highest"):
        exact = as_run = gaps(in_float32, mesh, prompts, saved)
    print(report("float32", exact))
    if config != in_float32:
        as_run = gaps(config, mesh, prompts, saved)
        cache = config.sampler.cache_type or config.model.dtype
        print(report(f"the run's types: {config.model.dtype}, cache {cache}", as_run))
    limit = config.sampler.max_gap
    agree = exact[0].largest <= EXACT and as_run[0].mean <= limit
    print(
        f"sampler and trainer {'agree' if agree else 'DISAGREE'}: "
        f"float32 largest {exact[0].largest:.1e} (limit {EXACT:.0e}), "
        f"as the run has it mean {as_run[0].mean:.1e} (limit Sampler.max_gap = {limit})"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
