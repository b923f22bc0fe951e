"""What an engine is asked and what it answers: requests as JSON, answers checked; no HTTP, no jax.

Two forms: `COMPLETIONS`, which vLLM and our own server speak, and `GENERATE`, which SGLang speaks.
Nothing is left to an engine's defaults: every sampling field is sent, so that what it draws from is
the softmax that the trainer computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aspo_jax.errors import UserError

STOP, LENGTH, BROKEN = "stop", "length", "broken"  # why an answer ended
MISSING = -9999.0  # what vLLM writes for -inf, and for a log-probability that it does not have
ROUNDING = 1e-3  # nats: how far above 0 a log-probability may be rounded
LOAD_S = 600  # seconds that an engine's workers may take to load weights
FORBIDDEN_BIAS = -100.0  # the most that the protocol takes; exp(-100) is no probability


class EngineError(UserError):
    """An engine cannot be used, or refuses what it is asked; trying again changes nothing."""


class Failed(EngineError):
    """It did not work this time: no connection, no answer in time, an error of the server's."""


class Malformed(Failed):
    """It answered, but not what was asked."""


class Call(NamedTuple):
    """One HTTP request.

    accept: the answer -> what is wrong with it although its status is 200, None: nothing.
    """

    path: str
    body: Any = None
    method: str = "POST"
    accept: Callable[[Any], str | None] = lambda answer: None


class Group(NamedTuple):
    """The completions of one prompt that are asked for together.

    seed: of the first sample; the i-th one's is ``seed + i``.
    """

    tokens: Sequence[int]
    samples: int
    max_tokens: int
    seed: int


class How(NamedTuple):
    """How ids are drawn.

    temperature: 0: the likeliest id. top_k: 0: all.
    stop_ids, stop_strings: what ends an answer.
    forbidden: ids that must not be drawn. vocabulary: ids that the tokenizer knows.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    forbidden: tuple[int, ...]
    vocabulary: int


class Answer(NamedTuple):
    """One completion as the engine drew it, the id that ended it included.

    finish: `STOP`, `LENGTH`, or `BROKEN`: it was cut before an id that must not be drawn.
    """

    tokens_T: np.ndarray
    logp_T: np.ndarray
    finish: str


class Read(NamedTuple):
    """The answers of a group in the order of its samples.

    duplicates: answers that were there more than once. label: of the weights, where it is said.
    """

    answers: list[Answer]
    duplicates: int = 0
    label: str | None = None


class Wire(NamedTuple):
    """A way to speak with an engine.

    generate: (model, group, how) -> request; read: (answer, group, how) -> `Read`, or `Malformed`.
    score, read_score: (model, tokens) -> request; (answer, tokens) -> log-probabilities of all but
        the first, at temperature 1 over the whole vocabulary.
    pause, resume: no drawing in between. load: (folder, label) -> take its weights.
    settle: label -> what must be done before the weights just loaded may be drawn from.
    rename: label -> give the weights that are there a label; labels: paths of which one says it.
    """

    generate: Callable[[str, Group, How], Call]
    read: Callable[[Any, Group, How], Read]
    score: Callable[[str, Sequence[int]], Call]
    read_score: Callable[[Any, Sequence[int]], np.ndarray]
    pause: Call
    resume: Call
    load: Callable[[str, str], Call]
    settle: Callable[[str], Sequence[Call]]
    rename: Callable[[str], Call]
    labels: Sequence[str]


# --- what any answer must be ----------------------------------------------------------------------


def _well_formed(read: Callable[..., Any]) -> Callable[..., Any]:
    """An answer that lacks what we look for is malformed."""

    @functools.wraps(read)
    def checked(answer: Any, *asked: Any) -> Any:
        try:
            return read(answer, *asked)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Malformed(f"an answer without what was asked for ({error!r:.200})") from error

    return checked


def _in_order(found: Iterable[tuple[int, Answer]], group: Group) -> tuple[list[Answer], int]:
    """Each sample's answer, the first where there are several, and how many were dropped."""
    kept: dict[int, Answer] = {}
    count = 0
    for number, answer in found:
        kept.setdefault(number, answer)
        count += 1
    if kept.keys() != set(range(group.samples)):
        raise Malformed(f"answers numbered {sorted(kept)}, expected 0 to {group.samples - 1}")
    return [kept[number] for number in range(group.samples)], count - len(kept)


def _answer(tokens: Any, logp: Any, finish: Any, group: Group, how: How) -> Answer:
    """A completion, once its numbers, its length and its end are what they must be.

    Raises:
        Malformed: they are not.
    """
    if finish not in (STOP, LENGTH):
        raise Malformed(f"an answer that ended by {finish!r}, expected 'stop' or 'length'")
    if len(tokens) != len(logp) or not 0 < len(tokens) <= group.max_tokens:
        raise Malformed(
            f"{len(tokens)} ids and {len(logp)} log-probabilities, expected as many of both and "
            f"1 to {group.max_tokens}"
        )
    if wrong := [x for x in tokens if type(x) is not int or x < 0]:
        raise Malformed(f"the id {wrong[0]!r:.40}, expected a whole number")
    logp_T = np.array(_log_probabilities(logp), np.float32)
    stops = [t for t, token in enumerate(tokens) if token in how.stop_ids]
    if stops and stops[0] < len(tokens) - 1:
        raise Malformed(f"id {tokens[stops[0]]}, which ends an answer, inside one")
    if finish == STOP and not stops and not how.stop_strings:
        raise Malformed(f"an answer that stopped at id {tokens[-1]}, which ends none")
    if finish == LENGTH and not stops and len(tokens) < group.max_tokens:
        raise Malformed(
            f"an answer cut at {len(tokens)} of {group.max_tokens} tokens; the engine's window "
            "must hold the longest prompt and response together"
        )
    tokens_T, cut = np.array(tokens, np.int32), _first_forbidden(tokens, how)
    if cut is not None:
        return Answer(tokens_T[:cut], logp_T[:cut], BROKEN)
    return Answer(tokens_T, logp_T, STOP if stops else finish)


def _log_probabilities(found: Iterable[Any]) -> list[float]:
    numbers = list(found)
    for x in numbers:
        is_number = isinstance(x, int | float) and not isinstance(x, bool)
        if not is_number or not math.isfinite(x) or x > ROUNDING or x == MISSING:
            raise Malformed(f"the log-probability {x!r:.40}, expected a finite number up to 0")
    return numbers


def _first_forbidden(tokens: Sequence[int], how: How) -> int | None:
    """Position of the first id that the trainer's softmax does not have."""
    forbidden: Collection[int] = set(how.forbidden)
    places = (t for t, x in enumerate(tokens) if x >= how.vocabulary or x in forbidden)
    return next(places, None)


def _bias(how: How) -> dict[str, float]:
    return {str(token): FORBIDDEN_BIAS for token in how.forbidden}


# --- vLLM and our own server ----------------------------------------------------------------------


def _sampling(how: How) -> dict[str, Any]:
    """What no default of the engine may decide."""
    return {
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": how.top_k,
        "min_p": how.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _ask_completions(has_bias: bool, model: str, group: Group, how: How) -> Call:
    body = {
        "model": model,
        "prompt": list(group.tokens),
        "n": group.samples,
        "max_tokens": group.max_tokens,
        **_sampling(how),
        "seed": group.seed,
        "stop": list(how.stop_strings),
        "stop_token_ids": list(how.stop_ids),
        "ignore_eos": True,  # the model's own stop ids are among ours
        # Stop strings are looked for in the text that the engine sees: ours has no special tokens.
        "skip_special_tokens": bool(how.stop_strings),
        "logprobs": 0,  # of the drawn id alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if has_bias and how.forbidden:
        body["logit_bias"] = _bias(how)
    return Call("/v1/completions", body)


@_well_formed
def _read_completions(answer: Any, group: Group, how: How) -> Read:
    prompts = [choice.get("prompt_token_ids") for choice in answer["choices"]]
    given = [prompt for prompt in prompts if prompt is not None]
    if not given or any(prompt != list(group.tokens) for prompt in given):
        raise Malformed("answers to another prompt than the one that was sent, or without its ids")

    def of(choice: Any) -> tuple[int, Answer]:
        logp = choice["logprobs"]["token_logprobs"]
        how_ended = (choice["finish_reason"], group, how)
        return choice["index"], _answer(choice["token_ids"], logp, *how_ended)

    return Read(*_in_order(map(of, answer["choices"]), group))


def _score_completions(model: str, tokens: Sequence[int]) -> Call:
    body = {"model": model, "prompt": list(tokens), "echo": True, "max_tokens": 0, "logprobs": 1}
    return Call("/v1/completions", body | {"temperature": 1.0, "return_token_ids": True})


@_well_formed
def _read_score_completions(answer: Any, tokens: Sequence[int]) -> np.ndarray:
    return _scores(answer["choices"][0]["logprobs"]["token_logprobs"], tokens)


def _scores(found: Sequence[Any], tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities of a prompt, of which the first id has none."""
    if len(found) != len(tokens):
        raise Malformed(f"{len(found)} log-probabilities of a prompt of {len(tokens)} tokens")
    return np.array(_log_probabilities(found[1:]), np.float32)


def _succeeded(answer: Any) -> str | None:
    """What is wrong with an answer that must say that it succeeded."""
    if isinstance(answer, dict) and answer.get("success") is True:
        return None
    return f"it answered {answer!r:.200}, expected success"


def _loaded(answer: Any) -> str | None:
    results = answer.get("results") if isinstance(answer, dict) else None
    if isinstance(results, list) and results and all(result is None for result in results):
        return None
    return f"it answered {answer!r:.200}, expected one null of each worker"


def _load_completions(folder: str, label: str) -> Call:
    body = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": LOAD_S}
    return Call("/collective_rpc", body, accept=_loaded)


def _rename_completions(label: str) -> Call:
    return Call("/update_weight_version", {"new_version": label}, accept=_succeeded)


def _settle_completions(label: str) -> tuple[Call, ...]:
    reset = Call("/reset_prefix_cache?reset_running_requests=true", accept=_succeeded)
    return reset, _rename_completions(label)


def _completions(has_bias: bool) -> Wire:
    """has_bias: forbidden ids must be named; our own server never draws them."""
    return Wire(
        generate=functools.partial(_ask_completions, has_bias),
        read=_read_completions,
        score=_score_completions,
        read_score=_read_score_completions,
        # All requests are ours, and those that we no longer wait for are to end.
        pause=Call("/pause?mode=abort"),
        resume=Call("/resume"),
        load=_load_completions,
        settle=_settle_completions,
        rename=_rename_completions,
        labels=("/weight_info",),
    )


# --- SGLang ---------------------------------------------------------------------------------------


def _ask_generate(model: str, group: Group, how: How) -> Call:
    sampling = _sampling(how) | {
        "n": group.samples,
        "top_k": how.top_k or -1,
        "max_new_tokens": group.max_tokens,
        "stop": list(how.stop_strings),
        "stop_token_ids": list(how.stop_ids),
        "ignore_eos": True,
        "skip_special_tokens": bool(how.stop_strings),
    }
    if how.forbidden:
        sampling["logit_bias"] = _bias(how)
    body = {"input_ids": list(group.tokens), "sampling_params": sampling, "return_logprob": True}
    return Call("/generate", body)


@_well_formed
def _read_generate(answer: Any, group: Group, how: How) -> Read:
    found = answer if isinstance(answer, list) else [answer]
    labels = {each["meta_info"].get("weight_version") for each in found}

    def of(each: Any) -> Answer:
        about = each["meta_info"]
        drawn = about["output_token_logprobs"]
        if [pair[1] for pair in drawn] != each["output_ids"]:
            raise Malformed("log-probabilities of other ids than those of the answer")
        if about.get("prompt_tokens", len(group.tokens)) != len(group.tokens):
            raise Malformed("answers to another prompt than the one that was sent")
        logp = [pair[0] for pair in drawn]
        return _answer(each["output_ids"], logp, about["finish_reason"]["type"], group, how)

    return Read(
        *_in_order(enumerate(map(of, found)), group),
        label=labels.pop() if len(labels) == 1 else None,
    )


def _score_generate(model: str, tokens: Sequence[int]) -> Call:
    sampling = {"max_new_tokens": 0, "temperature": 1.0}
    body = {"input_ids": list(tokens), "sampling_params": sampling, "return_logprob": True}
    return Call("/generate", body | {"logprob_start_len": 0})


@_well_formed
def _read_score_generate(answer: Any, tokens: Sequence[int]) -> np.ndarray:
    return _scores([pair[0] for pair in answer["meta_info"]["input_token_logprobs"]], tokens)


def _load_generate(folder: str, label: str) -> Call:
    body = {"model_path": folder, "weight_version": label, "abort_all_requests": False}
    return Call("/update_weights_from_disk", body | {"flush_cache": True}, accept=_succeeded)


def _rename_generate(label: str) -> Call:
    body = {"new_version": label, "abort_all_requests": False}
    return Call("/update_weight_version", body, accept=_succeeded)


COMPLETIONS = _completions(has_bias=True)
OWN = _completions(has_bias=False)
GENERATE = Wire(
    generate=_ask_generate,
    read=_read_generate,
    score=_score_generate,
    read_score=_read_score_generate,
    pause=Call("/pause_generation", {"mode": "abort"}),
    resume=Call("/continue_generation", {}),
    load=_load_generate,
    settle=lambda label: (),  # the load did it
    rename=_rename_generate,
    labels=("/model_info", "/get_model_info"),
)
WIRES = {"vllm": COMPLETIONS, "sglang": GENERATE, "aspo_jax": OWN}
