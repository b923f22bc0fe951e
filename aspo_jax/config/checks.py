"""What is wrong with a config whose fields are fine one by one: both numbers and the remedy."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from aspo_jax.config.gin import LAUNCH, nearest
from aspo_jax.config.schema import Factories, arguments, describe
from aspo_jax.config.sections import Config


def factory_problems(
    config: Config, factories: Factories, places: Mapping[str, str]
) -> Iterator[str]:
    """Names of factories that do not exist, and their arguments that are missing."""
    objective = config.objective
    used = [
        ("Objective.name", "objective", objective.name),
        *(("Objective.penalties", "objective", name) for name in objective.penalties),
        ("Objective.advantage", "advantage", objective.advantage),
        ("Objective.aggregate", "aggregate", objective.aggregate),
        *(("Reward.shapes", "shape", name) for name in config.reward.shapes),
    ]
    for key, kind, name in used:
        known = factories[kind]
        if name not in known:
            yield (
                f"{at(key, places)}unknown {kind} {name!r}{nearest(name, known)};"
                f" expected one of {', '.join(sorted(known))}"
            )
            continue
        for argument, parameter in arguments(known[name]).items():
            is_given = argument in config.factories.get(name, {})
            if parameter.default is parameter.empty and not is_given:
                yield (
                    f"{at(key, places)}{name} needs {name}.{argument}:"
                    f" {describe(parameter.annotation)}"
                )


def argument_problems(
    config: Config, table: Mapping[str, Callable[..., Any]], places: Mapping[str, str]
) -> Iterator[str]:
    """What the factories themselves say of the arguments that they were given.

    A factory is cheap to call and raises ValueError; here, before anything is loaded.
    """
    for name, given in config.factories.items():
        if any(p.default is p.empty and n not in given for n, p in arguments(table[name]).items()):
            continue  # an unused section; what a used one lacks is a problem of its own
        try:
            table[name](**given)
        except ValueError as error:
            named = [n for n in given if re.search(rf"\b{n}\b", str(error))]
            yield f"{at(f'{name}.{(named or list(given))[0]}', places)}{error}"


def cross_checks(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    """Settings that contradict each other, with both numbers and the remedy."""
    yield from _check_objective(config, places)
    yield from _check_sizes(config, places)
    yield from _check_sampler(config, places)
    yield from _check_model(config, places)
    yield from _check_data(config, places)
    yield from _check_runtime(config, places)


def _check_runtime(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    runtime = config.runtime
    sizes = {"data": runtime.data, "fsdp": runtime.fsdp, "tensor": runtime.tensor}
    for axis, size in sizes.items():
        if size == 0:
            key = f"Runtime.{axis}"
            yield f"{at(key, places)}a mesh axis has no size 0; set 1, or -1 for the rest"
    if sum(size == -1 for size in sizes.values()) > 1:
        axes = ", ".join(f"Runtime.{axis} = {size}" for axis, size in sizes.items())
        yield f"only one mesh axis may be -1 (the rest), found {axes}; set the others to 1"
    if runtime.context != 1:
        yield (
            f"{at('Runtime.context', places)}Runtime.context = {runtime.context}: the axis is"
            " reserved, a sequence is not split over devices as yet; set it to 1"
        )
    yield from _check_launch(config, places)


def _check_launch(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    runtime = config.runtime
    launch = {name: getattr(runtime, name.rpartition(".")[2]) for name in LAUNCH}
    unset = [name for name, value in launch.items() if value is None]
    if len(unset) == len(launch):
        return
    if unset:
        yield f"{', '.join(LAUNCH)} belong together; set {' and '.join(unset)} too, or none of them"
        return
    host, _, port = str(runtime.coordinator).rpartition(":")
    if not host or not port.isdecimal():
        yield (
            f"{at('Runtime.coordinator', places)}Runtime.coordinator = {runtime.coordinator!r};"
            " expected 'host:port' of process 0, such as '10.0.0.1:8476'"
        )
    if (runtime.process_id or 0) >= (runtime.num_processes or 1):
        yield (
            f"{at('Runtime.process_id', places)}Runtime.process_id = {runtime.process_id} must be"
            f" below Runtime.num_processes = {runtime.num_processes}; processes count from 0"
        )


_GROUP_ADVANTAGES = ("group_mean", "group_zscore", "leave_one_out")


def _check_objective(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    objective = config.objective
    rules = (objective.name, *objective.penalties)
    for name in dict.fromkeys(rules):
        if rules.count(name) > 1:
            yield (
                f"{at('Objective.penalties', places)}{name} is named {rules.count(name)} times in"
                f" Objective.name = {objective.name!r} and Objective.penalties ="
                f" {objective.penalties!r}; name it once: its weight and its penalty would count"
                " as often"
            )
    if config.train.samples_per_prompt == 1 and objective.advantage in _GROUP_ADVANTAGES:
        yield (
            f"{at('Train.samples_per_prompt', places)}Train.samples_per_prompt = 1 leaves"
            f" Objective.advantage = {objective.advantage!r} nothing to compare a sample with: the"
            " bare reward would take its place, which is another algorithm (REINFORCE without a"
            f" baseline); set it to 2 or more, for {', '.join(_GROUP_ADVANTAGES)} all compare the"
            " samples of a prompt"
        )


def _check_sizes(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    train, sampler = config.train, config.sampler
    step, mini = train.prompts_per_step, train.prompts_per_minibatch
    if step % mini:
        nearest = sorted({max(step // mini, 1) * mini, (step // mini + 1) * mini})
        yield (
            f"{at('Train.prompts_per_step', places)}Train.prompts_per_step = {step} must be a"
            f" multiple of Train.prompts_per_minibatch = {mini};"
            f" set Train.prompts_per_step to {' or '.join(map(str, nearest))}"
        )
    needed = sampler.max_prompt_tokens + sampler.max_response_tokens - 1
    if train.row_tokens < needed:
        yield (
            f"{at('Train.row_tokens', places)}Train.row_tokens = {train.row_tokens} cannot hold a"
            f" prompt of {sampler.max_prompt_tokens} and a response of"
            f" {sampler.max_response_tokens} tokens; set it to at least"
            f" {sampler.max_prompt_tokens} + {sampler.max_response_tokens} - 1 = {needed}"
        )
    if config.reward.overlong_buffer > sampler.max_response_tokens:
        yield (
            f"{at('Reward.overlong_buffer', places)}Reward.overlong_buffer ="
            f" {config.reward.overlong_buffer} is longer than Sampler.max_response_tokens ="
            f" {sampler.max_response_tokens}; set it to at most {sampler.max_response_tokens}"
        )


def _check_sampler(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    for field, off in (("top_k", 0), ("top_p", 1.0)):
        value = getattr(config.sampler, field)
        if value != off:
            key = f"Sampler.{field}"
            yield (
                f"{at(key, places)}{key} = {value} biases training: tokens would be drawn from a"
                " part of the distribution, renormalised, while importance ratios compare the"
                " whole, and no rule here corrects for that; set it to"
                f" {off} (Evaluate.{field} is for evaluation)"
            )
    evaluate = config.evaluate
    if evaluate.temperature == 0 and (evaluate.top_k, evaluate.top_p, evaluate.min_p) != (0, 1, 0):
        yield (
            f"{at('Evaluate.temperature', places)}Evaluate.temperature = 0 always takes the"
            " likeliest token; Evaluate.top_k, top_p and min_p then mean nothing, leave them out"
        )


def _check_model(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    model = config.model
    if model.path is not None:
        return
    shape = ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size")
    unset = [f"Model.{name}" for name in shape if getattr(model, name) is None]
    if unset:
        yield f"a new model needs its shape: set {', '.join(unset)}, or Model.path to a folder"
        return
    width, heads, kv_heads = model.hidden_size or 0, model.heads or 1, model.kv_heads or 1
    if heads % kv_heads:
        yield (
            f"{at('Model.heads', places)}Model.heads = {heads} must be a multiple of"
            f" Model.kv_heads = {kv_heads}; set Model.kv_heads to a divisor of {heads}"
        )
    if width % (2 * heads):
        yield (
            f"{at('Model.hidden_size', places)}Model.hidden_size = {width} must give each of"
            f" Model.heads = {heads} an even width; set Model.hidden_size to a multiple of"
            f" {2 * heads}"
        )


def _check_data(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    if config.data.kind == "jsonl":
        unset = [f"Data.{n}" for n in ("train_path", "eval_path") if not getattr(config.data, n)]
        if unset:
            yield f"{at('Data.kind', places)}Data.kind = 'jsonl' needs {' and '.join(unset)}"
        if not config.model.path:
            yield (
                f"{at('Data.kind', places)}Data.kind = 'jsonl' needs Model.path: only Countdown has"
                " worked examples to warm-start a new model on; set it to a model folder"
            )
        return
    puzzle = config.countdown
    if puzzle.low > puzzle.high:
        yield (
            f"{at('Countdown.low', places)}Countdown.low = {puzzle.low} is above Countdown.high ="
            f" {puzzle.high}; set Countdown.low to at most {puzzle.high}"
        )
    operations = puzzle.operations
    if not operations or set(operations) - set("+-*") or len(set(operations)) < len(operations):
        yield (
            f"{at('Countdown.operations', places)}Countdown.operations = {operations!r};"
            " expected some of + - *, each once, such as '+-'"
        )


def at(key: str, places: Mapping[str, str]) -> str:
    return f"{places[key]}: " if key in places else ""
