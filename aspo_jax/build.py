"""From the parts of a run to its machines, and what is checked before either is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from aspo_jax import losses
from aspo_jax.config import Config, ConfigError
from aspo_jax.errors import UserError
from aspo_jax.evaluation import Evaluate, evaluator, set_collectors
from aspo_jax.history import History
from aspo_jax.inputs import Source, held_out_source, start_tokenizer, train_source
from aspo_jax.learner import Learner, Teacher, build_learner
from aspo_jax.model import build_model, load_params, trained_part
from aspo_jax.model.peft import check_adapter
from aspo_jax.model.sharding import row_shards
from aspo_jax.parts import (
    Parts,
    build_gate,
    build_optimizer,
    build_peers,
    build_reward_shape,
    build_suites,
    build_writers,
    check_rules,
    has_teacher,
)
from aspo_jax.policy import (
    Policy,
    build_lora,
    check_teacher,
    fewest_sequences,
    load_teacher,
    network_shape,
    stop_ids,
)
from aspo_jax.rewards import unshaped
from aspo_jax.rollout import Collector, Peers, Signal, by_reward, by_teacher
from aspo_jax.rows import BatchShape, batch_shape, own_groups
from aspo_jax.sampler import Choice
from aspo_jax.structs import Prompt
from aspo_jax.suites import HeldOut, held_out_problems, set_sizes
from aspo_jax.weights import load_frozen, load_initial


class Machines(NamedTuple):
    """What follows from the parts of a run.

    parts: with the policy as it is loaded.
    initial_params: () -> what is trained, as the run starts: weights, or an adapter.
    frozen: the weights that an adapter is trained beside; None: all are trained.
    reference: weights of the frozen reference policy, bfloat16 or those of ``frozen``; None when
        no rule reads it.
    teacher: weights of ``Teacher.path``; None when no rule reads it.
    signal: which groups train.
    collector: sampler and graders of training; its scorer is to be closed.
    shape: of the mini-batches.
    peers: the processes of the run; sampler, scorer and prompts are this process's share.
    """

    parts: Parts
    initial_params: Callable[[], Any]
    frozen: Any
    reference: Any
    teacher: Any
    signal: Signal
    collector: Collector
    learner: Learner
    shape: BatchShape
    peers: Peers
    evaluate: Evaluate
    evaluate_sets: Mapping[str, Evaluate]  # by the names of the sets of Evaluate.suites
    history: History  # of the training prompts; empty unless the advantage asks for their past

    def weights(self, trained: Any) -> Any:
        """The policy's params, of which these are what is trained."""
        return self.parts.policy.trained.whole(trained, self.frozen)


def build_machines(config: Config, parts: Parts, folder: str | Path, mesh: Mesh) -> Machines:
    """All machines of a run that starts from the weights in ``folder``."""
    check_shares(config, mesh)
    policy = parts.policy._replace(source=Path(folder))
    frozen = load_frozen(config, policy, folder, mesh)
    has_reference = losses.reads(parts.goal.objective, "ref_logp_BT")
    teacher = load_teacher(config, policy, mesh) if has_teacher(config, parts.goal) else None
    collector = Collector(parts.sampler, parts.open_scorer(), policy.decode, parts.reward_shape)
    return Machines(
        parts=parts._replace(policy=policy),
        initial_params=functools.partial(load_initial, config, policy, folder, mesh),
        frozen=frozen,
        reference=_reference(policy, folder, frozen, mesh) if has_reference else None,
        teacher=teacher and load_teacher_params(config, teacher, mesh),
        signal=by_teacher if teacher else by_reward,
        collector=collector,
        learner=build_learner(
            *(policy.model, policy.head, parts.goal, parts.optimizer, mesh, teacher, policy.lora),
            gate=build_gate(config, parts.goal),
        ),
        shape=build_shape(config, fewest_sequences(policy.model, teacher and teacher.model)),
        peers=build_peers(),
        evaluate=build_evaluate(config, collector, parts.held_out),
        evaluate_sets=build_evaluate_sets(config, collector, parts.suites),
        history=History(),
    )


def _reference(policy: Policy, folder: str | Path, frozen: Any, mesh: Mesh) -> Any:
    """The weights that the run starts from: the frozen ones themselves, or a copy in bfloat16."""
    if frozen is not None:
        return frozen
    network = policy.model
    places = network.shardings(mesh)
    return load_params(folder, network.config, shardings=places, dtype=jnp.bfloat16)


def load_teacher_params(config: Config, teacher: Teacher, mesh: Mesh) -> Any:
    """The weights of a teacher, in ``Teacher.dtype``, on the devices of the mesh."""
    folder, network = str(config.teacher_folder), teacher.model
    weights, dtype = network.shardings(mesh), jnp.dtype(config.teacher.dtype)
    return load_params(folder, network.config, shardings=weights, dtype=dtype)


def check_inputs(config: Config) -> list[tuple[str, str]]:
    """The start-up table, once rules, model folder, prompts and answers have been found usable.

    Reads no weights and writes nothing, so that a mistake costs seconds and leaves no trace.

    Raises:
        ConfigError, DataError, ModelFolderError: what is wrong with each of them, with its place.
    """
    path = config.model_folder
    tokenizer = start_tokenizer(path)
    sources: list[Source] = []
    checks = (
        lambda: check_rules(config),
        lambda: build_optimizer(config, _trained_axes(config, path, len(tokenizer))),
        lambda: (build_reward_shape(config), build_writers(config)),
        lambda: stop_ids(config, tokenizer, path),
        lambda: _check_adapter(config),
        lambda: config.teacher.path and check_teacher(config, tokenizer),
        lambda: sources.append(train_source(config, tokenizer)),
        lambda: sources.append(held_out_source(config, tokenizer)),
        lambda: build_suites(config, tokenizer),
    )
    problems = [error for check in checks if (error := _problem(check)) is not None]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    more = set_sizes(config, held_out_problems(config))
    if config.is_countdown:
        return [*config.derived(), *more]
    train, held_out = sources
    left_out = [
        f"{which}: {source.left_out}"
        for which, source in (("train", train), ("held out", held_out))
        if source.left_out
    ]
    sizes = config.derived(train_rows=len(train.rows), held_out_rows=len(held_out.rows))
    return [*sizes, *([("rows left out", "; ".join(left_out))] if left_out else []), *more]


def _check_adapter(config: Config) -> None:
    lora = build_lora(config)
    if lora is not None and config.lora.path is not None:
        check_adapter(config.lora.path, lora)


def _trained_axes(config: Config, path: str | None, vocab_size: int) -> Any:
    network = build_model(network_shape(config, path, vocab_size))
    return trained_part(network, build_lora(config)).axes


def _problem(check: Callable[[], Any]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


def build_evaluate(config: Config, collector: Collector, held_out: Sequence[Prompt]) -> Evaluate:
    """Held-out evaluation by the settings of ``Evaluate``; rewards are not shaped."""
    e = config.evaluate
    sampler = collector.sampler.drawing(e.temperature, Choice(e.top_k, e.top_p, e.min_p))
    collector = collector._replace(sampler=sampler, shape=unshaped)
    return evaluator(collector, held_out, e.samples, seed=e.seed, peers=build_peers())


def build_evaluate_sets(
    config: Config, collector: Collector, suites: Sequence[HeldOut]
) -> dict[str, Evaluate]:
    """Evaluation of the sets of ``Evaluate.suites``, by the settings of each."""
    collector_of = set_collectors(collector, config.sampler.max_response_tokens)
    seed, peers = config.evaluate.seed, build_peers()
    return {
        each.name: evaluator(
            collector_of(each.settings),
            each.prompts,
            each.settings.samples,
            seed=seed,
            peers=peers,
        )
        for each in suites
    }


def build_shape(config: Config, sequences: int | None, processes: int | None = None) -> BatchShape:
    """The fixed shapes of an iteration's updates, for the processes of this run or a number.

    sequences: the most that share a row, see `fewest_sequences`.
    """
    t, s, processes = config.train, config.sampler, processes or build_peers().count
    minibatches = t.prompts_per_step // t.prompts_per_minibatch
    return batch_shape(
        minibatches=minibatches,
        groups=own_groups(t.prompts_per_step, minibatches, processes, 1 + t.refill_rounds),
        samples_per_prompt=t.samples_per_prompt,
        longest=s.max_prompt_tokens + s.max_response_tokens - 1,
        row_tokens=t.row_tokens,
        rows=t.rows_per_microbatch,
        sequences=sequences,
        processes=processes,
    )


def check_shares(config: Config, mesh: Mesh, processes: int | None = None) -> None:
    """The sizes that processes (of this run, or a number) and devices share can be shared equally.

    Raises:
        ConfigError: the setting, the number of processes or devices, and the nearest size that
            they can share.
    """
    t, processes = config.train, processes or build_peers().count
    shards = row_shards(mesh)
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
