"""What is wrong with a config whose fields are fine one by one: both numbers and the remedy."""

import inspect
import re
from collections.abc import Iterator, Mapping

from aspo_jax.config.factories import Factory, Use, arguments
from aspo_jax.config.gin import LAUNCH
from aspo_jax.config.schema import describe
from aspo_jax.config.sections import OF_ENGINES, Config, Sampler, fields


def factory_problems(
    config: Config, table: Mapping[str, Factory], used: list[Use], places: Mapping[str, str]
) -> Iterator[str]:
    """Arguments that a factory in use needs and was not given."""
    for use in used:
        given = config.factories.get(use.section, {})
        for argument, parameter in arguments(table[use.section]).items():
            if parameter.default is parameter.empty and argument not in given:
                yield (
                    f"{at(use.key, places)}{use.section} needs {use.section}.{argument}:"
                    f" {describe(parameter.annotation)}"
                )


def argument_problems(
    config: Config, table: Mapping[str, Factory], places: Mapping[str, str]
) -> Iterator[str]:
    """What the factories themselves say of the arguments that they were given.

    A factory is cheap to call and raises ValueError; here, before anything is loaded.
    """
    for name, given in config.factories.items():
        needed = inspect.signature(table[name]).parameters.items()
        if any(p.default is p.empty and n not in given for n, p in needed):
            continue  # an unused section, or one that is made from more than its settings
        try:
            table[name](**given)
        except ValueError as error:
            named = [n for n in given if re.search(rf"\b{n}\b", str(error))]
            yield f"{at(f'{name}.{(named or list(given))[0]}', places)}{error}"


Problem = tuple[str, str]  # a setting, or "" for none, and what stands behind its value


def cross_checks(config: Config, places: Mapping[str, str]) -> Iterator[str]:
    """Settings that contradict each other, with both numbers and the remedy."""
    values = config.bindings()
    checks = (
        _runtime,
        _launch,
        _objective,
        _sizes,
        _sampler,
        _engine,
        _reward,
        _model,
        _lora,
        _data,
    )
    for check in checks:
        for key, problem in check(config):
            yield f"{at(key, places)}{key} = {values[key]!r}{problem}" if key else problem


def _runtime(config: Config) -> Iterator[Problem]:
    sizes = {f"Runtime.{n}": getattr(config.runtime, n) for n in ("data", "fsdp", "tensor")}
    for key, size in sizes.items():
        if size == 0:
            yield key, ": a mesh axis has no size 0; set 1, or -1 for the rest"
    if sum(size == -1 for size in sizes.values()) > 1:
        axes = ", ".join(f"{key} = {size}" for key, size in sizes.items())
        yield "", f"only one mesh axis may be -1 (the rest), found {axes}; set the others to 1"
    if config.runtime.context != 1:
        reserved = ": the axis is reserved, a sequence is not split over devices as yet"
        yield "Runtime.context", f"{reserved}; set it to 1"


def _launch(config: Config) -> Iterator[Problem]:
    runtime = config.runtime
    unset = [name for name in LAUNCH if getattr(runtime, name.rpartition(".")[2]) is None]
    if len(unset) == len(LAUNCH):
        return
    if unset:
        missing = f"set {' and '.join(unset)} too, or none of them"
        yield "", f"{', '.join(LAUNCH)} belong together; {missing}"
        return
    host, _, port = str(runtime.coordinator).rpartition(":")
    if not host or not port.isdecimal():
        expected = "expected 'host:port' of process 0, such as '10.0.0.1:8476'"
        yield "Runtime.coordinator", f"; {expected}"
    if (runtime.process_id or 0) >= (runtime.num_processes or 1):
        limit = f"Runtime.num_processes = {runtime.num_processes}"
        yield "Runtime.process_id", f" must be below {limit}; processes count from 0"


def _objective(config: Config) -> Iterator[Problem]:
    objective = config.objective
    rules = (objective.name, *objective.penalties)
    for name in dict.fromkeys(rules):
        if rules.count(name) > 1:
            yield (
                "Objective.penalties",
                f" and Objective.name = {objective.name!r} name {name} {rules.count(name)} times;"
                " name it once: its weight and its penalty would count as often. With other"
                f" settings, give it a label: '{name}.b'",
            )
    for name in config.factories.get("adamw", ()):
        yield f"adamw.{name}", f": adamw.{name} is set as Optim.{name}; write that"
    # All of ours compare the samples of a prompt, but for the one that is 0 for all.
    is_ours, name = ":" not in objective.advantage, objective.advantage.partition(".")[0]
    if config.train.samples_per_prompt == 1 and is_ours and name != "none":
        yield (
            "Train.samples_per_prompt",
            f" leaves Objective.advantage = {objective.advantage!r} nothing to compare a sample"
            " with: the bare reward would take its place, which is another algorithm (REINFORCE"
            " without a baseline), or 0; set it to 2 or more",
        )


def _sizes(config: Config) -> Iterator[Problem]:
    train, sampler = config.train, config.sampler
    step, mini = train.prompts_per_step, train.prompts_per_minibatch
    if step % mini:
        nearest = sorted({max(step // mini, 1) * mini, (step // mini + 1) * mini})
        yield (
            "Train.prompts_per_step",
            f" must be a multiple of Train.prompts_per_minibatch = {mini};"
            f" set Train.prompts_per_step to {' or '.join(map(str, nearest))}",
        )
    prompt, response = sampler.max_prompt_tokens, sampler.max_response_tokens
    if train.row_tokens < prompt + response - 1:
        yield (
            "Train.row_tokens",
            f" cannot hold a prompt of {prompt} and a response of {response} tokens;"
            f" set it to at least {prompt} + {response} - 1 = {prompt + response - 1}",
        )
    if config.reward.overlong_buffer > response:
        longest = f"Sampler.max_response_tokens = {response}"
        yield "Reward.overlong_buffer", f" is longer than {longest}; set it to at most {response}"


def _sampler(config: Config) -> Iterator[Problem]:
    for field, off in (("top_k", 0), ("top_p", 1.0)):
        if getattr(config.sampler, field) != off:
            yield (
                f"Sampler.{field}",
                " biases training: tokens would be drawn from a part of the distribution,"
                " renormalised, while importance ratios compare the whole, and no rule here"
                f" corrects for that; set it to {off} (Evaluate.{field} is for evaluation)",
            )
    evaluate = config.evaluate
    if evaluate.temperature == 0 and (evaluate.top_k, evaluate.top_p, evaluate.min_p) != (0, 1, 0):
        yield (
            "Evaluate.temperature",
            " always takes the likeliest token; Evaluate.top_k, top_p and min_p then mean nothing,"
            " leave them out",
        )


def _engine(config: Config) -> Iterator[Problem]:
    sampler, known = config.sampler, fields("Sampler")
    if sampler.engine is None:
        for field in OF_ENGINES:
            if getattr(sampler, field) != known[field].default:
                kinds = "'vllm', 'sglang' or 'aspo_jax'"
                yield f"Sampler.{field}", f" is for an engine; set Sampler.engine to {kinds}"
        return
    if bool(sampler.addresses) == bool(sampler.command):
        found = "neither" if not sampler.addresses else "both"
        yield (
            "Sampler.engine",
            f" needs Sampler.addresses or Sampler.command, found {found}; set the one to where the"
            " engines are, or the other to what starts one",
        )
    yield from _engine_places(sampler)
    if (config.runtime.num_processes or 1) > 1:
        yield (
            "Sampler.engine",
            f" is for a run of one process, found Runtime.num_processes ="
            f" {config.runtime.num_processes}; leave it out, or start one process",
        )


def _engine_places(sampler: Sampler) -> Iterator[Problem]:
    for address in sampler.addresses:
        if not re.fullmatch(r"https?://[^\s/]+:\d+/?", address):
            yield "Sampler.addresses", f": {address!r} is none; write 'http://HOST:PORT'"
        if sampler.addresses.count(address) > 1:
            yield "Sampler.addresses", f" names {address!r} twice; name it once"
    for name in ("{model}", "{port}"):
        if sampler.command and name not in sampler.command:
            yield "Sampler.command", f" lacks {name}; write it where the engine is to be told it"


_UNSHAPED = {  # what some advantages need of rewards, which shapes change
    "gdpo": "the weighted sum of the grader's and those of Reward.functions",
    "maxrl": "0 or more",
    "passk": "exactly 0 or 1",
}


def _reward(config: Config) -> Iterator[Problem]:
    functions, weights = config.reward.functions, config.reward.weights
    if weights and len(weights) != len(functions):
        expected = f"expected one for each of Reward.functions = {functions!r}, or none: 1 each"
        yield "Reward.weights", f" has {len(weights)} of {len(functions)} weights; {expected}"
    advantage, shapes = config.objective.advantage.partition(".")[0], config.reward.shapes
    if config.reward.overlong_buffer and (needed := _UNSHAPED.get(advantage)):
        yield (
            "Reward.overlong_buffer",
            f" makes other rewards than Objective.advantage = {advantage!r} can take: {needed};"
            " set it to 0, or choose another advantage",
        )
    changing = [s for s in shapes if ":" not in s and s.partition(".")[0] != "mask_truncated"]
    if changing and advantage in ("gdpo", "passk"):
        yield (
            "Reward.shapes",
            f": {', '.join(changing)} makes other rewards than Objective.advantage = {advantage!r}"
            f" can take: {_UNSHAPED[advantage]}; leave it out, or choose another advantage",
        )


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is not None:
        return
    shape = ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size")
    unset = ", ".join(f"Model.{name}" for name in shape if getattr(model, name) is None)
    if unset:
        yield "", f"a new model needs its shape: set {unset}, or Model.path to a folder or hub name"
        return
    width, heads, kv_heads = model.hidden_size or 0, model.heads or 1, model.kv_heads or 1
    if heads % kv_heads:
        remedy = f"set Model.kv_heads to a divisor of {heads}"
        yield "Model.heads", f" must be a multiple of Model.kv_heads = {kv_heads}; {remedy}"
    if width % (2 * heads):
        remedy = f"an even width; set Model.hidden_size to a multiple of {2 * heads}"
        yield "Model.hidden_size", f" must give each of Model.heads = {heads} {remedy}"


def _lora(config: Config) -> Iterator[Problem]:
    if config.lora.path is not None and config.lora.rank is None:
        yield "Lora.path", " starts from an adapter and Lora.rank = None trains none; set Lora.rank"
    if config.lora.weights == "int8" and config.lora.rank is None:
        yield "Lora.weights", " is of frozen weights and Lora.rank = None trains all; set Lora.rank"


def _data(config: Config) -> Iterator[Problem]:
    yield from _labels(config)
    sources = {f"Data.{label}": data for label, data in config.mixture.items()}
    for section, data in (sources or {"Data": config.data}).items():
        paths = [f"{section}.{n}" for n in ("train_path", "eval_path") if not getattr(data, n)]
        if data.source == "files" and paths:
            yield f"{section}.source" if not sources else "", f" needs {' and '.join(paths)}"
        if data.answer_pattern is not None and (problem := pattern_problem(data.answer_pattern)):
            yield f"{section}.answer_pattern", problem
    if not config.is_countdown:
        if not config.model.path:
            yield (
                "Data.source",
                " needs Model.path: only Countdown has worked examples to warm-start a new model"
                " on; set it to a model folder or hub name",
            )
        return
    puzzle = config.countdown
    if puzzle.low > puzzle.high:
        remedy = f"set Countdown.low to at most {puzzle.high}"
        yield "Countdown.low", f" is above Countdown.high = {puzzle.high}; {remedy}"
    used = puzzle.operations
    if not used or set(used) - set("+-*") or len(set(used)) < len(used):
        yield "Countdown.operations", "; expected some of + - *, each once, such as '+-'"


def _labels(config: Config) -> Iterator[Problem]:
    labels = config.data.mixture
    for label in labels:
        if not label.isidentifier() or label in vars(config.data):
            yield "Data.mixture", f": {label!r} cannot be a label; take a word that is no setting"
        if labels.count(label) > 1:
            yield "Data.mixture", f" names {label!r} twice; name it once, with a greater weight"


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression of which one group counts, behind its text."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f" is no regular expression ({error}); correct it"
    return f" has {groups} groups, expected at most one; write (?:...)" if groups > 1 else None


def at(key: str, places: Mapping[str, str]) -> str:
    return f"{places[key]}: " if key in places else ""
