"""From a config to what one may swap in a run: `Parts`, each a value that another may replace.

    train(config, parts(config, mesh)._replace(goal=Goal(mine(), token_mean)))

What follows from them is built in `build.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from aspo_jax import losses, runtime
from aspo_jax.config import Config, ConfigError
from aspo_jax.config.factories import make as make_any
from aspo_jax.config.sections import section_of
from aspo_jax.data import PromptStream
from aspo_jax.engines.building import build_external
from aspo_jax.imports import raised_at
from aspo_jax.inputs import SOURCES, build_prompts, data_kinds, held_out_prompts
from aspo_jax.learner import Gate, Goal
from aspo_jax.model import Model, ModelConfig, choose_in_place
from aspo_jax.model.sharding import row_shards
from aspo_jax.optimizers import (
    OPTIMIZERS,
    Offloaded,
    clipped,
    learning_rate_schedule,
    warmup_by_iteration,
)
from aspo_jax.policy import Policy, build_network, load_policy, platform_of
from aspo_jax.rewards import SHAPES, Rules, Scorer, Shape, chain, overlong_ramp
from aspo_jax.rollout import Peers
from aspo_jax.run.writers import WRITERS, Open, TensorBoard
from aspo_jax.sampler import Limits, PagedSampler, Sampler, make_publish, stop_length
from aspo_jax.structs import Prompt
from aspo_jax.suites import HeldOut, held_out_problems

FACTORIES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "objective": losses.OBJECTIVES,
    "advantage": losses.ADVANTAGES,
    "aggregate": losses.AGGREGATES,
    "shape": SHAPES,
    "optimizer": OPTIMIZERS,
    "writer": WRITERS,
    "source": SOURCES,
}


class Parts(NamedTuple):
    """What one may swap in a run.

    policy: network, tokenizer and head.
    goal: the objective, how its tokens are aggregated, and the entropy bonus.
    optimizer, learning_rate: number of updates applied -> rate of the next one, for the log.
    advantage: (rewards, which of them are valid), [P, G] each -> advantages [P, G]; what else it
        may ask for: `aspo_jax.losses.Groups`.
    reward_shape: what is done to the verdicts of a step before its advantages.
    sampler: draws completions, on this process's devices.
    open_scorer: () -> the grading processes; opened when the run begins, closed when it ends.
    prompts: this process's share of the training prompts.
    held_out: all held-out prompts.
    suites: more sets of them, each with its own sampling.
    writers: who gets the rows of the log besides metrics.jsonl and the console.
    """

    policy: Policy
    goal: Goal
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    advantage: losses.Advantage
    reward_shape: Shape
    sampler: Sampler
    open_scorer: Callable[[], Scorer]
    prompts: PromptStream
    held_out: Sequence[Prompt]
    writers: Sequence[Open]
    suites: Sequence[HeldOut] = ()


def parts(config: Config, mesh: Mesh) -> Parts:
    """What the config names, for the devices of a mesh (`runtime.start`). Reads no weights.

    Raises:
        UserError: of the part that cannot be made; see `aspo_jax.build.check_inputs`.
    """
    policy, peers = load_policy(config, config.model_folder, mesh), build_peers()
    sampler = build_sampler if config.sampler.engine is None else build_external
    optimizer, rate = build_optimizer(config, policy.trained.axes)
    return Parts(
        policy=policy,
        goal=build_goal(config),
        optimizer=optimizer,
        learning_rate=rate,
        advantage=build_advantage(config),
        reward_shape=build_reward_shape(config),
        sampler=sampler(config, policy, mesh),
        open_scorer=functools.partial(open_scorer, config),
        prompts=build_prompts(config, policy.tokenizer, peers.index, peers.count),
        held_out=held_out_prompts(config, policy.tokenizer),
        writers=build_writers(config),
        suites=build_suites(config, policy.tokenizer),
    )


def build_suites(config: Config, tokenizer: Any) -> list[HeldOut]:
    """The prompts of ``Evaluate.suites``.

    Raises:
        UserError: a suite, a file, a row or a prompt that cannot be used.
    """
    room = config.sampler.max_prompt_tokens
    return [
        HeldOut(each.name, each.prompts(tokenizer, room), each.settings)
        for each in held_out_problems(config)
    ]


def build_peers() -> Peers:
    """This process among those of the run."""
    return Peers(jax.process_index(), jax.process_count(), runtime.everyone)


# --- what factories make ------------------------------------------------------------------------

ADAMW = ("b1", "b2", "eps", "weight_decay", "decay")  # arguments that are settings of Optim
_EXPECTED = {"objective": losses.Objective, "optimizer": optax.GradientTransformation}


def make(config: Config, kind: str, text: str, *given: Any, **shared: Any) -> Any:
    """What a factory makes of its section of the config, and of what else it is given.

    Raises:
        ConfigError: it refuses its arguments, fails, or makes something else.
    """
    made = make_any(FACTORIES, kind, text, config.factories, *given, **shared)
    expected = _EXPECTED.get(kind)
    if not (isinstance(made, expected) if expected else callable(made)):
        name = expected.__name__ if expected else "function"
        raise ConfigError(f"the {kind} {text!r} made {made!r:.80}, expected a value of type {name}")
    return made


def build_goal(config: Config) -> Goal:
    """Objective, penalties and aggregation by their names; the teacher in the advantage."""
    names = (config.objective.name, *config.objective.penalties)
    rules = [_labelled(make(config, "objective", name), section_of(name)) for name in names]
    if config.teacher.advantage:
        rules[0] = losses.with_teacher(rules[0], coef=config.teacher.advantage)
    rule = losses.chain(*rules) if len(rules) > 1 else rules[0]
    return Goal(
        objective=_per_microbatch(rule) if config.objective.scope == "microbatch" else rule,
        aggregate=make(config, "aggregate", config.objective.aggregate),
        entropy_bonus=config.objective.entropy_bonus,
    )


def _per_microbatch(rule: losses.Objective) -> losses.Objective:
    try:
        return losses.per_microbatch(rule)
    except ValueError as error:
        raise ConfigError(
            "Objective.scope = 'microbatch': Objective.name or one of Objective.penalties has a "
            "state, which is updated by statistics of the whole minibatch; expected 'minibatch'"
        ) from error


def _labelled(rule: losses.Objective, section: str) -> losses.Objective:
    """The rule with its label, if it has one, behind the names of its metrics."""
    label = section.partition(".")[2]

    def coefficient(tokens, state, sums):
        made = rule.coefficient(tokens, state, sums)
        return made._replace(metrics={f"{k}_{label}": v for k, v in made.metrics.items()})

    return rule._replace(coefficient=coefficient) if label else rule


def has_teacher(config: Config, goal: Goal) -> bool:
    """Whether the goal reads a teacher.

    Raises:
        ConfigError: it does and there is none, or the other way round.
    """
    is_read, path = losses.reads(goal.objective, "teacher_logp_BT"), config.teacher.path
    if is_read and path is None:
        raise ConfigError(
            f"Objective.name = {config.objective.name!r} with its penalties reads a teacher, and "
            "Teacher.path is None; set it to a model folder or hub name with the policy's tokens"
        )
    if path is not None and not is_read:
        raise ConfigError(
            f"Teacher.path = {path!r}, and no rule reads a teacher; name 'distill' in "
            "Objective.penalties or set Teacher.advantage above 0, or leave the teacher out"
        )
    return is_read


def build_gate(config: Config, goal: Goal) -> Gate | None:
    """What the sampler's log-probabilities must keep to be the old ones; None: they are not.

    Raises:
        ConfigError: they are to be, and a rule reads what only a forward pass gives.
    """
    if config.train.old_logp == "score":
        return None
    for field, meaning in _OF_SCORE_PASS.items():
        if losses.reads(goal.objective, f"{field}_BT"):
            raise ConfigError(
                f"Train.old_logp = 'sampler' leaves out the pass that gives {meaning}: "
                f"{_who_reads(config, f'{field}_BT')} reads {field}; set it to 'score', or choose "
                "a rule that does without"
            )
    return Gate(config.sampler.max_gap, config.sampler.max_token_gap)


_OF_SCORE_PASS = {
    "old_entropy": "the old policy's entropies",
    "old_square": "the old policy's squared probabilities",
    "sampler_logp": "the trainer's own log-probabilities, to compare the sampler's with",
}


def _who_reads(config: Config, field: str) -> str:
    """The setting and the name of the rule of the config that reads a field."""
    rules = [("Objective.name", config.objective.name)]
    rules += [("Objective.penalties", name) for name in config.objective.penalties]
    readers = (
        f"{key} {name!r}"
        for key, name in rules
        if losses.reads(make(config, "objective", name), field)
    )
    return next(readers, "the objective")


def build_advantage(config: Config) -> losses.Advantage:
    """How the rewards of a group become advantages."""
    return make(config, "advantage", config.objective.advantage)


def check_rules(config: Config) -> None:
    """Run goal and advantage on shapes alone, before anything is loaded or sampled.

    Raises:
        ConfigError: what only the whole of them can have wrong: a field of `Tokens` that nothing
            fills, or not with this ``Train.old_logp``, two metrics of one name, a weight of another
            shape than the tokens', a teacher that is missing or that none of them reads.
    """
    goal, advantage = build_goal(config), build_advantage(config)
    checks = {
        "Objective.name and Objective.penalties": lambda: losses.trace(
            goal.objective, goal.aggregate
        ),
        "Objective.advantage": lambda: _check_advantage(advantage, _blank_groups(config)),
    }
    for what, check in checks.items():
        try:
            check()
        except ValueError as error:
            raise ConfigError(f"{what}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{what}: the rule fails: {raised_at(error)}") from error
    build_gate(config, goal)
    if not has_teacher(config, goal) and config.objective.advantage == "none":
        raise ConfigError(
            "Objective.advantage = 'none' leaves nothing to learn from, for no rule reads a "
            f"teacher; set it to one of {', '.join(x for x in losses.ADVANTAGES if x != 'none')}"
        )


def _blank_groups(config: Config) -> losses.Groups:
    """Groups of the run's shape whose rewards, and all their parts, are 0."""
    P = 1 if config.train.refill_rounds else 2  # refill judges a group by itself
    grid_PG = np.zeros((P, config.train.samples_per_prompt), np.float32)
    own = ("grader", *config.reward.functions) if config.reward.functions else ()
    return losses.Groups(
        reward_PG=grid_PG,
        is_valid_PG=np.ones_like(grid_PG, bool),
        length_PG=np.ones_like(grid_PG),
        parts=dict.fromkeys(own, grid_PG) or None,
        weights=dict.fromkeys(own, 1.0) or None,
        past=losses.Past(*np.zeros((3, P), np.float32)),
    )


def _check_advantage(advantage: losses.Advantage, groups: losses.Groups) -> None:
    found, expected = np.shape(losses.advantages_of(advantage, groups)), groups.reward_PG.shape
    if found != expected:
        raise ValueError(f"found advantages {found} for rewards {expected}, expected as many")


def build_optimizer(
    config: Config, axes: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of the RL phase behind a clip of the gradient's norm, and its learning rate.

    axes: logical axes of everything that is trained (`aspo_jax.policy.Policy.trained`).
    """
    o, t = config.optim, config.train
    updates = t.iterations * t.epochs * (t.prompts_per_step // t.prompts_per_minibatch)
    rate = learning_rate_schedule(
        o.learning_rate, o.warmup_updates, updates if o.schedule == "linear" else None
    )
    if o.warmup_iterations:
        rate = warmup_by_iteration(rate, o.warmup_iterations, updates // t.iterations)
    given = {k: getattr(o, k) for k in ADAMW} if o.name == "adamw" else {}
    optimizer = make(config, "optimizer", o.name, rate, axes, **given)
    optimizer = clipped(optimizer, o.clip_norm)
    return Offloaded(*optimizer) if o.offload else optimizer, rate


def build_writers(config: Config) -> list[Open]:
    """Who gets the rows of the log besides metrics.jsonl and the console."""
    named = [make(config, "writer", name) for name in config.metrics.writers]
    return [TensorBoard, *named] if config.metrics.tensorboard else named


# --- rewards ------------------------------------------------------------------------------------


def open_scorer(config: Config, kinds: frozenset[str] | None = None) -> Scorer:
    """Start the grading processes, for some kinds of answers; None: those that the data hold.

    Raises:
        RewardError: no safe sandbox for programs, or a function of the user's that cannot be used.
    """
    r, kinds = config.reward, _kinds(config) if kinds is None else kinds
    kinds |= {"custom"} if r.functions else set()  # whatever prompts of one's own ask for
    rules = Rules(
        timeout_s=r.timeout_s,
        grade_truncated=r.grade_truncated,
        functions=r.functions,
        weights=r.weights,
        sandbox=r.sandbox,
        test_timeout_s=r.test_timeout_s,
        test_memory_mib=r.test_memory_mib,
        program_timeout_s=r.program_timeout_s,
        max_tests=r.max_tests,
        seed=config.run.seed,
    )
    scorer = Scorer(r.workers, rules, kinds)
    if scorer.sandbox is not None:
        print(f"sandbox: {scorer.sandbox}", file=sys.stderr)
    if "custom" in kinds:
        scorer.wait_until_ready()  # a mistake in it shows now, not after the first sampling
    return scorer


def _kinds(config: Config) -> frozenset[str]:
    return data_kinds(config).union(*(each.kinds for each in held_out_problems(config)))


def build_reward_shape(config: Config) -> Shape:
    """The overlong ramp, then ``Reward.shapes`` in their order."""
    reward = config.reward
    ramp = overlong_ramp(
        config.sampler.max_response_tokens, reward.overlong_buffer, reward.overlong_factor
    )
    return chain(ramp, *(make(config, "shape", name) for name in reward.shapes))


# --- sampling -----------------------------------------------------------------------------------


def build_sampler(config: Config, policy: Policy, mesh: Mesh) -> PagedSampler:
    """A sampler on this process's own devices."""
    local = runtime.local_mesh(mesh)
    model = build_sampling_network(config, policy.model.config, local)
    strings, lora = config.sampler.stop_strings, None if config.lora.is_merged else policy.lora
    return PagedSampler(
        model,
        policy.head,
        build_limits(config, local, build_peers().count, policy.stop_ids),
        local,
        seed=config.run.seed,
        stops=functools.partial(stop_length, policy.decode, strings) if strings else None,
        publish=make_publish(model, mesh, local, config.model.dtype, lora),
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
    s, shards = config.sampler, row_shards(local)
    is_cpu = platform_of(local, platform) == "cpu"
    slots = s.slots // processes
    prompts = math.ceil(slots / config.train.samples_per_prompt / shards) * shards
    limits = Limits(
        s.max_prompt_tokens,
        s.max_response_tokens,
        slots,
        stop_ids,
        prompts=prompts,
        page=min(s.page, s.max_response_tokens),
        cache_tokens=s.cache_tokens and s.cache_tokens // processes,
        cache_type=s.cache_type,
        read=64 if is_cpu else 512,
        prefill=256 if is_cpu else None,
    )
    try:
        limits.pool_pages(shards)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return limits


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
    # A TPU multiplies with a layer where it lies in the stack, a CPU and a GPU copy it out first.
    # A GPU keeps the trainer's own stack where it may be the frozen weights beside adapters.
    platform = platform_of(local, platform)
    is_shared = config.lora.rank is not None and not config.lora.is_merged
    is_stacked = platform == "tpu" or (platform == "gpu" and is_shared)
    has_kernel = config.sampler.paged_kernel
    in_place = choose_in_place(platform, shape.head_dim, local) if has_kernel else None
    return build_network(
        sampling, shape, local, longest, platform, is_stacked=is_stacked, in_place=in_place
    )
