"""From a config to machines: the one place that knows both.

Below this file no function sees a config; each takes values.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from aspo_jax import losses, runtime
from aspo_jax.config import Config, ConfigError
from aspo_jax.data import (
    CHARACTERS,
    CountdownSource,
    CountdownSpec,
    DataError,
    PromptStream,
    allowed_ids,
    build_character_tokenizer,
    copy_tokenizer,
    encode,
    load_tokenizer,
    max_response_tokens,
    prompts,
    read_jsonl,
)
from aspo_jax.evaluation import Scores, scores
from aspo_jax.head import Head
from aspo_jax.learner import (
    Goal,
    Learner,
    build_learner,
    clipped_adamw,
    learning_rate_schedule,
    matrices_only,
    warmup_by_iteration,
)
from aspo_jax.model import (
    Model,
    ModelConfig,
    build_model,
    choose_attention,
    load_params,
    read_model_config,
    save_model,
    shardings,
)
from aspo_jax.rewards import (
    KINDS,
    SHAPES,
    Rules,
    Scorer,
    Shape,
    build_scorer,
    chain,
    choose_sandbox,
    find_problem,
    overlong_ramp,
)
from aspo_jax.rollout import (
    BatchShape,
    Codec,
    Peers,
    Rollout,
    batch_shape,
    draw,
    gather_outcomes,
    judge,
    submitter,
)
from aspo_jax.sampler import (
    EVALUATE,
    EVERYTHING,
    Choice,
    Limits,
    PagedSampler,
    Sampler,
    make_publish,
)

FACTORIES = {
    "objective": losses.OBJECTIVES,
    "advantage": losses.ADVANTAGES,
    "aggregate": losses.AGGREGATES,
    "shape": SHAPES,
}


class Policy(NamedTuple):
    """A network, its tokenizer and how its logits become a distribution; weights are apart.

    source: the folder it came from; None for a new one.
    """

    model: Model
    tokenizer: Any
    codec: Codec
    head: Head
    source: Path | None = None


class Machines(NamedTuple):
    """Everything a run is made of.

    peers: the processes of the run; sampler, scorer and prompts are this process's share.
    evaluate: params -> (held-out scores, this process's share of the rollout they count).
    reference: bfloat16 weights of the frozen reference policy; None when no rule reads it.
    reward_shape: what is done to the verdicts of a step before its advantages.
    learning_rate: number of updates applied -> rate of the next one.
    """

    policy: Policy
    params: Any
    reference: Any
    sampler: Sampler
    scorer: Scorer
    reward_shape: Shape
    learner: Learner
    advantage: losses.Advantage
    shape: BatchShape
    peers: Peers
    prompts: PromptStream
    evaluate: Callable[[Any], tuple[Scores, Rollout]]
    learning_rate: optax.Schedule


def build_machines(config: Config, folder: str | Path, mesh: Mesh) -> Machines:
    """All machines of a run that starts from the model in ``folder``."""
    check_shares(config, mesh)
    policy = load_policy(config, folder, mesh)
    goal = build_goal(config)
    optimizer, rate = build_optimizer(config)
    weights = shardings(mesh, policy.model.partition_specs())
    params = load_params(folder, policy.model.config, shardings=weights)
    sampler = build_sampler(config, policy, mesh)
    scorer = open_scorer(config)
    return Machines(
        policy=policy,
        params=params,
        reference=_reference(params) if losses.reads(goal.objective, "ref_logp_BT") else None,
        sampler=sampler,
        scorer=scorer,
        reward_shape=build_reward_shape(config),
        learner=build_learner(policy.model, policy.head, goal, optimizer, mesh),
        advantage=_make(config, "advantage", config.objective.advantage),
        shape=build_shape(config),
        peers=build_peers(),
        prompts=build_prompts(config, policy.tokenizer),
        evaluate=build_evaluate(config, policy, sampler, scorer, mesh),
        learning_rate=rate,
    )


def _reference(params: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


# --- the policy -------------------------------------------------------------------------------


def load_policy(config: Config, folder: str | Path, mesh: Mesh) -> Policy:
    """The policy of a Hugging Face folder."""
    policy = _policy(config, read_model_config(folder), load_tokenizer(folder), mesh)
    return policy._replace(source=Path(folder))


def new_policy(config: Config, mesh: Mesh) -> Policy:
    """An untrained policy of the config's sizes with a character tokenizer."""
    tokenizer = build_character_tokenizer(CHARACTERS)
    return _policy(config, new_shape(config, len(tokenizer)), tokenizer, mesh)


def new_shape(config: Config, vocab_size: int) -> ModelConfig:
    """The network that the config's own sizes describe."""
    m = config.model
    names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
    sizes = {name: getattr(m, name) for name in names}
    if missing := [f"Model.{name}" for name, value in sizes.items() if value is None]:
        raise ConfigError(f"a new model needs {', '.join(missing)}; set them or Model.path")
    return ModelConfig(
        vocab_size=vocab_size,
        head_dim=sizes["hidden_size"] // sizes["heads"],
        rope_theta=m.rope_theta,
        tie_embeddings=m.tie_embeddings,
        **sizes,
    )


def build_network(
    config: Config,
    shape: ModelConfig,
    mesh: Mesh,
    row_tokens: int,
    platform: str | None = None,
    *,
    is_stacked: bool = True,
) -> Model:
    """The network of a shape, with the attention that the mesh's devices do best.

    platform: of those devices; needed where the mesh is abstract or its devices name it otherwise.
    is_stacked: see `build_model`.

    Raises:
        MeshError: an axis of the network does not split over the mesh.
        AttentionError: the attention asked for cannot run there.
    """
    _check_splits(shape, mesh)
    dtype = jnp.dtype(config.model.dtype)
    attention = choose_attention(
        platform or mesh.devices.flat[0].platform,
        head_dim=shape.head_dim,
        row_tokens=row_tokens,
        packed=config.train.pack,
        dtype=dtype,
        mesh=mesh,
        name=config.model.attention,
    )
    return build_model(
        shape,
        dtype=dtype,
        remat=config.model.remat,
        attention=attention,
        mesh=mesh,
        is_stacked=is_stacked,
    )


def _check_splits(shape: ModelConfig, mesh: Mesh) -> None:
    sizes = {
        "tensor": (shape.heads, shape.kv_heads, shape.intermediate_size, shape.vocab_size),
        "fsdp": (shape.hidden_size,),
    }
    for axis, widths in sizes.items():
        devices = mesh.shape[axis]
        if any(width % devices for width in widths):
            raise runtime.MeshError(
                f"Runtime.{axis} = {devices} does not divide the model's {widths}; expected a "
                "common divisor of them"
            )


def _policy(config: Config, shape: ModelConfig, tokenizer: Any, mesh: Mesh) -> Policy:
    model = build_network(config, shape, mesh, config.train.row_tokens)
    codec = Codec(
        encode=functools.lru_cache(4096)(lambda text: tuple(encode(tokenizer, text))),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )
    head = Head(
        temperature=config.sampler.temperature,
        is_allowed_V=allowed_ids(tokenizer, shape.vocab_size),
        chunk=config.train.head_chunk,
        mesh=mesh,
    )
    return Policy(model, tokenizer, codec, head)


def save_policy(policy: Policy, params: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that `transformers` loads; what came with the model's own folder is kept."""
    save_tokenizer = policy.tokenizer.save_pretrained
    if policy.source is not None:
        save_tokenizer = functools.partial(copy_tokenizer, policy.source)
    save_model(
        folder,
        params,
        policy.model.config,
        save_tokenizer,
        eos_token_id=policy.tokenizer.eos_token_id,
        source=policy.source,
        dtype=dtype,
    )


# --- prompts and rewards ----------------------------------------------------------------------


def countdown_spec(config: Config) -> CountdownSpec:
    """The puzzle; an answer longer than the response limit is an error, not a silent ceiling."""
    spec = CountdownSpec(**dataclasses.asdict(config.countdown))
    limit, longest = config.sampler.max_response_tokens, max_response_tokens(spec)
    if longest > limit:
        raise ConfigError(
            f"Sampler.max_response_tokens is {limit}, but right answers to these puzzles have up "
            f"to {longest} tokens; raise it to {longest}"
        )
    return spec


def build_prompts(config: Config, tokenizer: Any) -> PromptStream:
    """The endless stream of training prompts, of which this process reads its share."""
    peers = build_peers()
    if config.data.kind == "countdown":
        source = CountdownSource(countdown_spec(config), config.run.seed, "train")
    else:
        source = _read_rows(cast(str, config.data.train_path))
    return prompts(
        source,
        tokenizer=tokenizer,
        seed=config.run.seed,
        shuffle=config.data.kind == "jsonl",
        prompts_per_step=config.train.prompts_per_step,
        max_prompt_tokens=config.sampler.max_prompt_tokens,
        process=peers.index,
        processes=peers.count,
    )


@functools.lru_cache(2)
def _read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file, each with an answer that its grader can use."""
    rows = read_jsonl(path, kinds=KINDS)
    for row in rows:
        if (problem := find_problem(row["kind"], row["answer"])) is not None:
            raise DataError(f"{row['where']} (id {row['id']}): {problem}")
    return rows


def held_out_prompts(config: Config, tokenizer: Any) -> list:
    """The prompts of every evaluation, the same for all runs with one ``Evaluate.seed``."""
    wanted = config.evaluate.prompts
    if config.data.kind == "countdown":
        source = CountdownSource(countdown_spec(config), config.evaluate.seed, "held_out", wanted)
    else:
        source = _read_rows(cast(str, config.data.eval_path))[:wanted]
    stream = prompts(
        source,
        tokenizer=tokenizer,
        seed=0,
        shuffle=False,
        prompts_per_step=len(source),
        max_prompt_tokens=config.sampler.max_prompt_tokens,
    )
    return next(stream)


def open_scorer(config: Config) -> Scorer:
    """Start the grading processes, for the kinds of answers that the data hold.

    Raises:
        RewardError: no safe sandbox for programs, or a function of the user's that cannot be used.
    """
    r, kinds = config.reward, data_kinds(config)
    rules = Rules(
        timeout_s=r.timeout_s,
        grade_truncated=r.grade_truncated,
        function=r.function,
        sandbox=r.sandbox,
        test_timeout_s=r.test_timeout_s,
        test_memory_mib=r.test_memory_mib,
        program_timeout_s=r.program_timeout_s,
        max_tests=r.max_tests,
        seed=config.run.seed,
    )
    if "code" in kinds:
        rules, report = choose_sandbox(rules)
        print(f"sandbox: {report}", file=sys.stderr)
    scorer = build_scorer(r.workers, rules, kinds)
    if "custom" in kinds:
        scorer.wait_until_ready()  # a mistake in it shows now, not after the first sampling
    return scorer


def data_kinds(config: Config) -> frozenset[str]:
    """The kinds of answers among the prompts of training and evaluation."""
    if config.data.kind == "countdown":
        return frozenset({"countdown"})
    paths = (config.data.train_path, config.data.eval_path)
    return frozenset(row["kind"] for path in paths for row in _read_rows(cast(str, path)))


def build_reward_shape(config: Config) -> Shape:
    """The overlong ramp, then ``Reward.shapes`` in their order."""
    reward = config.reward
    ramp = overlong_ramp(
        config.sampler.max_response_tokens, reward.overlong_buffer, reward.overlong_factor
    )
    return chain(ramp, *(_make(config, "shape", name) for name in reward.shapes))


# --- sampling and evaluation ------------------------------------------------------------------


def build_sampler(
    config: Config, policy: Policy, mesh: Mesh, choice: Choice = EVERYTHING
) -> PagedSampler:
    """A sampler on this process's own devices; by default that of training rollouts."""
    local = runtime.local_mesh(mesh)
    model = build_sampling_network(config, policy.model.config, local)
    stop_ids = (policy.tokenizer.eos_token_id, *config.sampler.stop_ids)
    strings = config.sampler.stop_strings
    return PagedSampler(
        model,
        policy.head,
        build_limits(config, local, build_peers().count, stop_ids),
        local,
        seed=config.run.seed,
        choice=choice,
        stops=functools.partial(stop_length, policy.codec, strings) if strings else None,
        publish=make_publish(model, mesh, local, config.model.dtype),
    )


def build_limits(
    config: Config,
    local: Mesh,
    processes: int,
    stop_ids: tuple[int, ...],
    platform: str | None = None,
) -> Limits:
    """Shapes of one process's sampler; it reads as many prompts at once as fill its rows.

    Raises:
        ConfigError: the cache is too small for one sequence.
    """
    s, parts = config.sampler, local.shape["data"] * local.shape["fsdp"]
    slots = s.slots // processes
    prompts = math.ceil(slots / config.train.samples_per_prompt / parts) * parts
    limits = Limits(
        s.max_prompt_tokens,
        s.max_response_tokens,
        slots,
        stop_ids,
        prompts=prompts,
        page=min(s.page, s.max_response_tokens),
        cache_tokens=s.cache_tokens and s.cache_tokens // processes,
        cache_type=s.cache_type,
        read=64 if _is_cpu(local, platform) else 512,
    )
    try:
        limits.pool_pages(parts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return limits


def stop_length(codec: Codec, strings: Sequence[str], tokens: Sequence[int]) -> int | None:
    """How many of the tokens it takes until their text holds one of the strings, if it does."""

    def is_over(count: int) -> bool:
        text = codec.decode(tokens[:count])
        return any(string in text for string in strings)

    if not is_over(len(tokens)):
        return None
    return bisect.bisect_left(range(len(tokens) + 1), True, key=is_over)


def build_sampling_network(
    config: Config, shape: ModelConfig, local: Mesh, platform: str | None = None
) -> Model:
    """The network as the sampler runs it: prompts padded to a bucket, any attention that can."""
    train, model = config.train, config.model
    sampling = dataclasses.replace(
        config,
        train=dataclasses.replace(train, pack=True),
        model=dataclasses.replace(model, attention="auto"),
    )
    longest = build_limits(config, local, 1, (), platform).buckets[-1]
    is_stacked = not _is_cpu(local, platform)
    return build_network(sampling, shape, local, longest, platform, is_stacked=is_stacked)


def _is_cpu(mesh: Mesh, platform: str | None) -> bool:
    return (platform or mesh.devices.flat[0].platform) == "cpu"


def build_evaluate(
    config: Config, policy: Policy, sampler: PagedSampler, scorer: Scorer, mesh: Mesh
) -> Callable[[Any], tuple[Scores, Rollout]]:
    """Held-out evaluation with paired sampling keys: every call draws with the same randomness.

    Each process samples and grades its share of the prompts; the scores are those of all.
    """
    peers, held_out = build_peers(), held_out_prompts(config, policy.tokenizer)
    if len(held_out) < peers.count:
        raise ConfigError(
            f"found {len(held_out)} held-out prompts (Evaluate.prompts) for {peers.count} "
            f"processes; expected at least {peers.count}"
        )
    own = held_out[peers.index :: peers.count]
    e = config.evaluate
    choice = Choice(e.top_k, e.top_p, e.min_p, is_greedy=e.temperature == 0)
    if not choice.is_whole or e.temperature != policy.head.temperature:
        head = policy.head._replace(temperature=e.temperature or 1.0)
        sampler = build_sampler(config, policy._replace(head=head), mesh, choice)

    def evaluate(params: Any) -> tuple[Scores, Rollout]:
        codec, k = policy.codec, config.evaluate.samples
        with scorer.begin() as grading:
            hand_in = submitter(grading, codec, own, k, domain=EVALUATE)
            sampler.start(params)
            completions = draw(
                sampler,
                codec,
                own,
                k,
                domain=EVALUATE,
                retry=config.evaluate.seed,
                finished=hand_in,
            )
            sampler.release()
            rollout = judge(grading, codec, own, completions)
        o = gather_outcomes(rollout, peers, total=len(held_out))
        distinct_P = o.distinct_right_PG[:, 0]
        return scores(o.is_right_PG, distinct_P, o.is_finished_PG, o.length_PG), rollout

    return evaluate


# --- the update -------------------------------------------------------------------------------


def _make(config: Config, kind: str, name: str) -> Any:
    try:
        return FACTORIES[kind][name](**config.factories.get(name, {}))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_goal(config: Config) -> Goal:
    """Objective, penalties and aggregation by their names."""
    names = (config.objective.name, *config.objective.penalties)
    rules = [_make(config, "objective", name) for name in names]
    return Goal(
        objective=losses.chain(*rules) if len(rules) > 1 else rules[0],
        aggregate=_make(config, "aggregate", config.objective.aggregate),
        entropy_bonus=config.objective.entropy_bonus,
    )


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW of the RL phase and its learning rate."""
    o = config.optim
    t = config.train
    updates = t.iterations * t.epochs * (t.prompts_per_step // t.prompts_per_minibatch)
    rate = learning_rate_schedule(
        o.learning_rate, o.warmup_updates, updates if o.schedule == "linear" else None
    )
    if o.warmup_iterations:
        rate = warmup_by_iteration(rate, o.warmup_iterations, updates // t.iterations)
    optimizer = clipped_adamw(
        rate,
        betas=(o.b1, o.b2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        decay=matrices_only if o.decay == "matrices" else None,
    )
    return optimizer, rate


def build_shape(config: Config, processes: int | None = None) -> BatchShape:
    """The fixed shapes of an iteration's updates, for the processes of this run or a number."""
    t, s = config.train, config.sampler
    return batch_shape(
        prompts_per_step=t.prompts_per_step,
        prompts_per_minibatch=t.prompts_per_minibatch,
        samples_per_prompt=t.samples_per_prompt,
        longest=s.max_prompt_tokens + s.max_response_tokens - 1,
        row_tokens=t.row_tokens,
        rows=t.rows_per_microbatch,
        is_packed=t.pack,
        processes=processes or build_peers().count,
    )


def check_shares(config: Config, mesh: Mesh, processes: int | None = None) -> None:
    """The sizes that processes (of this run, or a number) and devices share can be shared equally.

    Raises:
        ConfigError: the setting, the number of processes or devices, and the nearest size that
            they can share.
    """
    t, processes = config.train, processes or build_peers().count
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    devices = f"{mesh.shape['data']} x {mesh.shape['fsdp']} data and fsdp devices"
    sizes = [
        ("Train.prompts_per_step", t.prompts_per_step, processes, f"{processes} processes"),
        ("Train.rows_per_microbatch", t.rows_per_microbatch, shards, devices),
        ("Sampler.slots", config.sampler.slots, shards, devices),
    ]
    if config.model.path is None:
        sizes.append(("WarmStart.batch_size", config.warm_start.batch_size, shards, devices))
    problems = [
        f"{name} = {size} cannot be shared equally by {sharers}; set it to "
        f"{max(size // count, 1) * count} or {(size // count + 1) * count}"
        for name, size, count, sharers in sizes
        if size % count
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def build_peers() -> Peers:
    """This process among those of the run."""
    return Peers(jax.process_index(), jax.process_count(), runtime.everyone)


def parameter_count(params: Any) -> int:
    """Number of weights."""
    return int(sum(np.prod(x.shape) for x in jax.tree.leaves(params)))
