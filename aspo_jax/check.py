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

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.agreement import EXACT, Gap, by_position
from aspo_jax.build import (
    FACTORIES,
    Policy,
    build_goal,
    build_optimizer,
    build_sampler,
    check_shares,
    load_policy,
    new_policy,
)
from aspo_jax.config import Config, config_flags, parse_config, read
from aspo_jax.config.reading import DEFAULT
from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.inputs import held_out_prompts
from aspo_jax.learner import build_learner
from aspo_jax.model import load_params, shardings
from aspo_jax.paths import path_argument
from aspo_jax.rollout import BatchShape, Example, draw, fill
from aspo_jax.run.folder import CONFIG, INITIAL_MODEL
from aspo_jax.run.records import read_run_config, trained_weights
from aspo_jax.sampler import EVALUATE
from aspo_jax.structs import Minibatch


class CheckError(UserError):
    """What was asked for cannot be checked."""


def as_dtype(config: Config, dtype: str, cache_type: Any) -> Config:
    """The config with other types of computation and cache."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype),
        sampler=dataclasses.replace(config.sampler, cache_type=cache_type),
    )


def gaps(config: Config, mesh: Mesh, prompts: int, run: Path | None = None) -> list[Gap]:
    """Gaps of ``Train.samples_per_prompt`` samples of each prompt, see `by_position`."""
    policy, params = _trained(config, mesh, run) if run else _policy_and_params(config, mesh)
    held_out = held_out_prompts(config, policy.tokenizer)[:prompts]
    group = config.train.samples_per_prompt
    sampler = build_sampler(config, policy, mesh)
    sampler.start(params)
    completions = draw(sampler, policy.codec, held_out, group, domain=EVALUATE)
    sampler.release()
    tokens = [policy.codec.encode(prompt.text) for prompt in held_out for _ in range(group)]
    examples = [
        Example(prompt, c.tokens_T, 1.0, c.policy_logp_T, 0)
        for prompt, c in zip(tokens, completions, strict=True)
    ]
    t = config.train
    microbatches = math.ceil(len(examples) / t.rows_per_microbatch)
    shape = BatchShape(1, microbatches, t.rows_per_microbatch, t.row_tokens, t.pack)
    return _rescored(config, policy, params, fill(examples, shape), mesh)


def _policy_and_params(config: Config, mesh: Mesh) -> tuple[Policy, Any]:
    if config.model.path is None:
        policy = new_policy(config, mesh)
        weights = shardings(mesh, policy.model.partition_specs())
        init = jax.jit(policy.model.init, out_shardings=weights)
        return policy, init(jax.random.key(config.run.seed))
    policy = load_policy(config, config.model.path, mesh)
    weights = shardings(mesh, policy.model.partition_specs())
    return policy, load_params(config.model.path, policy.model.config, shardings=weights)


def _trained(config: Config, mesh: Mesh, run: Path) -> tuple[Policy, Any]:
    """The policy of a run folder with the weights of its newest checkpoint."""
    policy = load_policy(config, config.model.path or run / INITIAL_MODEL, mesh)
    wanted = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(policy.model.init, jax.random.key(0)),
        shardings(mesh, policy.model.partition_specs()),
    )
    return policy, trained_weights(run, config, wanted)[1]


def _rescored(
    config: Config, policy: Policy, params: Any, part: Minibatch, mesh: Mesh
) -> list[Gap]:
    goal, optimizer = build_goal(config), build_optimizer(config)[0]
    learner = build_learner(policy.model, policy.head, goal, optimizer, mesh)
    old = learner.old_policy(params, None, learner.place(part))
    rows: Any = part.rows
    log_ratio_MBT = rows.sampler_logp_BT - np.asarray(old.old_logp_BT)
    is_response_MBT = rows.is_response_BT
    return list(
        by_position(log_ratio_MBT[is_response_MBT], rows.response_position_BT[is_response_MBT])
    )


def report(title: str, found: Sequence[Gap]) -> str:
    """A Markdown table of gaps by response position."""
    lines = [
        f"### {title}",
        "",
        "| response positions | tokens | mean gap, nats | largest | ratio outside 1 +- 0.2 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for gap in found:
        lines.append(
            f"| {gap.first} to {gap.last} | {gap.tokens:,} | {gap.mean:.2e} | {gap.largest:.2e} "
            f"| {gap.outside:.2%} |"
        )
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m aspo_jax.check",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("run", nargs="?", type=path_argument, metavar="RUN", help="a run folder")
    config_flags(parser)
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts to sample")
    a = parser.parse_args(argv)
    if a.prompts < 1:
        parser.error(f"--prompts {a.prompts}: expected 1 or more")
    return run_command(lambda: check(_config(a), a.prompts, a.run))


def _config(flags: argparse.Namespace) -> Config:
    run = flags.run
    if run is None:
        return read(flags, FACTORIES)
    if flags.config != DEFAULT or flags.set:
        raise CheckError(f"{run} has its own config; leave --config and --set out, or the folder")
    if not (run / CONFIG).is_file():
        raise CheckError(f"{run}: not a run; expected a run folder (with {CONFIG}), or --config")
    return parse_config(read_run_config(run), FACTORIES, str(run / CONFIG))


def check(config: Config, prompts: int, run: Path | None = None) -> int:
    """Print both tables and the verdict; returns the exit status, 0 or 1."""
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    check_shares(config, mesh)
    in_float32 = as_dtype(config, "float32", None)
    exact = as_run = gaps(in_float32, mesh, prompts, run)
    print(report("float32", exact))
    if config != in_float32:
        as_run = gaps(config, mesh, prompts, run)
        cache = config.sampler.cache_type or config.model.dtype
        print(report(f"the run's types: {config.model.dtype}, cache {cache}", as_run))
    limit, agree = config.sampler.max_gap, "agree"
    if exact[0].largest > EXACT or as_run[0].mean > limit:
        agree = "DISAGREE"
    print(
        f"sampler and trainer {agree}: float32 largest {exact[0].largest:.1e} (limit {EXACT:.0e}), "
        f"as the run has it mean {as_run[0].mean:.1e} (limit Sampler.max_gap = {limit})"
    )
    return 0 if agree == "agree" else 1


if __name__ == "__main__":
    sys.exit(main())
