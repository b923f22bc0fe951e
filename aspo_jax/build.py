"""From a config to machines: the one place that knows both; `inputs` reads its prompts."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from aspo_jax import losses, runtime
from aspo_jax.config import Config, ConfigError
from aspo_jax.data import (
    CHARACTERS,
    PromptStream,
    allowed_ids,
    build_character_tokenizer,
    copy_tokenizer,
    encode,
    load_tokenizer,
)
from aspo_jax.errors import UserError
from aspo_jax.evaluation import Scores, scores
from aspo_jax.head import Head
from aspo_jax.inputs import (
    build_prompts,
    data_kinds,
    held_out_prompts,
    held_out_source,
    start_tokenizer,
    train_source,
)
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
    read_eos_ids,
    read_model_config,
    save_model,
    shardings,
)
from aspo_jax.rewards import (
    SHAPES,
    Rules,
    Scorer,
    Shape,
    chain,
    choose_sandbox,
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
    unwatched,
)
from aspo_jax.sampler import (
    EVALUATE,
    Choice,
    Completion,
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


Watch = Callable[[int], Callable[[Completion], None]]


class Policy(NamedTuple):
    """A network, its tokenizer and how its logits become a distribution; weights are apart.

    stop_ids: what ends a response, in sampling and in the export; the tokenizer's <eos> first.
    source: the folder it came from; None for a new one.
    """

    model: Model
    tokenizer: Any
    codec: Codec
    head: Head
    stop_ids: tuple[int, ...]
    source: Path | None = None


class Machines(NamedTuple):
    """Everything a run is made of.

    initial_params: () -> the weights that the run starts from.
    peers: the processes of the run; sampler, scorer and prompts are this process's share.
    evaluate: params -> (held-out scores, this process's share of the rollout they count). A second
        argument is told how many samples will be drawn; what it returns is told each completion.
    reference: bfloat16 weights of the frozen reference policy; None when no rule reads it.
    reward_shape: what is done to the verdicts of a step before its advantages.
    learning_rate: number of updates applied -> rate of the next one.
    """

    policy: Policy
    initial_params: Callable[[], Any]
    reference: Any
    sampler: Sampler
    scorer: Scorer
    reward_shape: Shape
    learner: Learner
    advantage: losses.Advantage
    shape: BatchShape
    peers: Peers
    prompts: PromptStream
    evaluate: Callable[..., tuple[Scores, Rollout]]
    learning_rate: optax.Schedule


def build_machines(config: Config, folder: str | Path, mesh: Mesh) -> Machines:
    """All machines of a run that starts from the model in ``folder``; see `check_inputs` first."""
    check_shares(config, mesh)
    policy = load_policy(config, folder, mesh)
    goal = build_goal(config)
    optimizer, rate = build_optimizer(config)
    scorer = open_scorer(config)
    weights = shardings(mesh, policy.model.partition_specs())
    load = functools.partial(load_params, folder, policy.model.config, shardings=weights)
    has_reference = losses.reads(goal.objective, "ref_logp_BT")
    sampler, peers = build_sampler(config, policy, mesh), build_peers()
    return Machines(
        policy=policy,
        initial_params=load,
        reference=load(dtype=jnp.bfloat16) if has_reference else None,
        sampler=sampler,
        scorer=scorer,
        reward_shape=build_reward_shape(config),
        learner=build_learner(policy.model, policy.head, goal, optimizer, mesh),
        advantage=_make(config, "advantage", config.objective.advantage),
        shape=build_shape(config),
        peers=peers,
        prompts=build_prompts(config, policy.tokenizer, peers.index, peers.count),
        evaluate=build_evaluate(config, policy, sampler, scorer, mesh),
        learning_rate=rate,
    )


# --- the policy -------------------------------------------------------------------------------


def load_policy(config: Config, folder: str | Path, mesh: Mesh) -> Policy:
    """The policy of a Hugging Face folder."""
    tokenizer = load_tokenizer(folder)
    ends = stop_ids(config, tokenizer, folder)
    policy = _policy(config, read_model_config(folder), tokenizer, ends, mesh)
    return policy._replace(source=Path(folder))


def new_policy(config: Config, mesh: Mesh) -> Policy:
    """An untrained policy of the config's sizes with a character tokenizer."""
    tokenizer = build_character_tokenizer(CHARACTERS)
    ends = stop_ids(config, tokenizer)
    return _policy(config, new_shape(config, len(tokenizer)), tokenizer, ends, mesh)


def stop_ids(config: Config, tokenizer: Any, folder: str | Path | None = None) -> tuple[int, ...]:
    """What ends a response: <eos>, what generation_config.json adds to it, ``Sampler.stop_ids``.

    folder: of the model; None for a new one.

    Raises:
        ConfigError: an id that no token has.
        ModelFolderError: generation_config.json cannot be used.
    """
    tokens, own = len(tokenizer), config.sampler.stop_ids
    if wrong := [i for i in own if not 0 <= i < tokens]:
        raise ConfigError(
            f"Sampler.stop_ids = {own}: found {wrong[0]}, expected ids of the tokenizer, 0 to "
            f"{tokens - 1}; leave it out"
        )
    theirs = () if folder is None else read_eos_ids(folder, tokens)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *theirs, *own)))


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


def _policy(
    config: Config, shape: ModelConfig, tokenizer: Any, stop_ids: tuple[int, ...], mesh: Mesh
) -> Policy:
    model = build_network(config, shape, mesh, config.train.row_tokens)
    codec = Codec(
        encode=functools.lru_cache(4096)(lambda text: tuple(encode(tokenizer, text))),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )
    head = Head(
        temperature=config.sampler.temperature,
        is_allowed_V=allowed_ids(tokenizer, shape.vocab_size, stop_ids),
        chunk=config.train.head_chunk,
        mesh=mesh,
    )
    return Policy(model, tokenizer, codec, head, stop_ids)


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
        eos_token_id=policy.stop_ids,
        source=policy.source,
        dtype=dtype,
    )


# --- prompts and rewards ----------------------------------------------------------------------


def check_inputs(config: Config) -> list[tuple[str, str]]:
    """The start-up table, once rules, model folder, prompts and answers have been found usable.

    Reads no weights and writes nothing, so that a mistake costs seconds and leaves no trace.

    Raises:
        ConfigError, DataError, ModelFolderError: what is wrong with each of them, with its place.
    """
    tokenizer = start_tokenizer(config)
    counts: list[int] = []
    checks = (
        lambda: _check_rules(config),
        lambda: config.model.path and read_model_config(config.model.path),
        lambda: stop_ids(config, tokenizer, config.model.path),
        lambda: counts.append(len(train_source(config, tokenizer))),
        lambda: counts.append(len(held_out_source(config, tokenizer))),
    )
    problems = [error for check in checks if (error := _problem(check)) is not None]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    if config.data.kind == "countdown":
        return config.derived()
    return config.derived(train_rows=counts[0], held_out_rows=counts[1])


def _problem(check: Callable[[], Any]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def _check_rules(config: Config) -> None:
    """The objective, run on shapes alone, for what only the whole chain can have wrong."""
    try:
        losses.trace(build_goal(config).objective)
    except ValueError as error:
        raise ConfigError(f"Objective.name and Objective.penalties: {error}") from error


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
    scorer = Scorer(r.workers, rules, kinds)  # not build_scorer, which would attack it again
    if "custom" in kinds:
        scorer.wait_until_ready()  # a mistake in it shows now, not after the first sampling
    return scorer


def build_reward_shape(config: Config) -> Shape:
    """The overlong ramp, then ``Reward.shapes`` in their order."""
    reward = config.reward
    ramp = overlong_ramp(
        config.sampler.max_response_tokens, reward.overlong_buffer, reward.overlong_factor
    )
    return chain(ramp, *(_make(config, "shape", name) for name in reward.shapes))


# --- sampling and evaluation ------------------------------------------------------------------


def build_sampler(config: Config, policy: Policy, mesh: Mesh) -> PagedSampler:
    """The sampler of training rollouts, on this process's own devices."""
    local = runtime.local_mesh(mesh)
    model = build_sampling_network(config, policy.model.config, local)
    strings = config.sampler.stop_strings
    return PagedSampler(
        model,
        policy.head,
        build_limits(config, local, build_peers().count, policy.stop_ids),
        local,
        seed=config.run.seed,
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
) -> Callable[..., tuple[Scores, Rollout]]:
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
    sampler = sampler.drawing(e.temperature, Choice(e.top_k, e.top_p, e.min_p))

    def evaluate(params: Any, watch: Watch = lambda total: unwatched) -> tuple[Scores, Rollout]:
        codec, k = policy.codec, config.evaluate.samples
        with scorer.begin() as grading:
            hand_in = submitter(grading, codec, own, k, domain=EVALUATE, watch=watch(len(own) * k))
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
        return (
            scores(o.reward_PG, o.is_right_PG, distinct_P, o.is_finished_PG, o.length_PG),
            rollout,
        )

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
