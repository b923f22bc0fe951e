"""The fields of a request: their types, defaults and bounds, and what of them is not supported.

What nobody knows is ignored, as all servers of these routes do. A null is a field left out.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aspo_jax.sampler import SERVE, Drawing
from aspo_jax.serving.errors import ApiError, shown, unsupported

MOST_TOP = 20  # likeliest ids at a position
_STOPS, _STOP_CHARACTERS = 64, 1024
# Known elsewhere, not here: each with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "logprob_token_ids": ([],),
}

# What pydantic finds, in the words of the other messages.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "an integer",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a text",
    "too_short": "at least {min_length} entries, or the field left out",
}

M = TypeVar("M", bound=BaseModel)


class Wire(BaseModel):
    """JSON types as they are: no text for a number, no number for a truth value."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Wire):
    """What a stream says beside the tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(Wire):
    """How to draw and where to stop: the same on all routes."""

    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    max_tokens: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of(cls, stop: Any) -> Any:
        """One stop string as a list of it."""
        return [stop] if isinstance(stop, str) else stop

    @field_validator("top_k", "min_p", "seed", mode="before")
    @classmethod
    def _number(cls, given: Any) -> Any:
        """A number as it is or written as a text: `vf-eval` sends what it does not know so."""
        is_number = isinstance(given, str) and re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?", given)
        return json.loads(given) if is_number else given

    def drawing(self, top: int) -> Drawing:
        """How the engine draws it. top: likeliest ids to report at each position."""
        return Drawing(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            ignores_stops=self.ignore_eos,
            top=top,
        )


class Streamed(Wire):
    """What the two routes of texts have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    request_id: str | None = None

    @property
    def usage(self) -> StreamOptions:
        """What a stream says of tokens used."""
        return self.stream_options or StreamOptions()


class CompletionFields(Sampling, Streamed):
    """`/v1/completions`."""

    prompt: Any
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool = False
    add_special_tokens: bool = True


class ChatTemplate(Wire):
    """What the chat template is given."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = Field(None, min_length=1)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


class ChatFields(ChatTemplate, Sampling, Streamed):
    """`/v1/chat/completions`."""

    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class TokenSampling(Sampling):
    """``sampling_params`` of `/inference/v1/generate`."""

    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)


class GenerateFields(Wire):
    """`/inference/v1/generate`."""

    model: str | None = None
    token_ids: list[int]
    sampling_params: dict[str, Any] = {}
    request_id: str | None = None
    stream: bool = False
    output_mode: str = "tokens"


class TokenizeFields(Wire):
    """`/tokenize` of a text; of messages it is `ChatTemplate`."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeFields(Wire):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[int]


def parse(fields: type[M], body: Mapping[str, Any], prefix: str = "") -> M:
    """The fields of a body.

    prefix: where the body lies in the request, for messages.

    Raises:
        ApiError: a field is missing, of another type, out of bounds, or not supported.
    """
    given = {name: value for name, value in body.items() if value is not None}
    try:
        read = fields.model_validate(given)
    except ValidationError as error:
        raise _mistake(error, prefix) from error
    if isinstance(read, Sampling):
        _check_sampling(read, prefix)
        _check_neutral(given, prefix)
    return read


def _mistake(error: ValidationError, prefix: str) -> ApiError:
    """The first of the mistakes, in words."""
    first = error.errors(include_url=False)[0]
    name = prefix + ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        message = f"{name} is missing; expected that field in the body"
    else:
        expected = _EXPECTED.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
        message = f"{name} = {shown(first['input'])}: expected {expected}"
    return ApiError(message, param=name, kind="Bad Request")


def _check_sampling(read: Sampling, prefix: str) -> None:
    if "" in read.stop:
        raise ApiError(
            "stop holds an empty text, which every text holds; leave it out", param=f"{prefix}stop"
        )
    if len(read.stop) > _STOPS or any(len(text) > _STOP_CHARACTERS for text in read.stop):
        raise ApiError(
            f"stop has {len(read.stop)} texts of up to {max(map(len, read.stop))} characters, "
            f"expected at most {_STOPS} of at most {_STOP_CHARACTERS}; give fewer or shorter ones",
            param=f"{prefix}stop",
        )


def _check_neutral(given: Mapping[str, Any], prefix: str) -> None:
    """Fields that others support are absent, or as good as."""
    for name, neutral in _NEUTRAL.items():
        if name in given and given[name] not in neutral:
            supported = f"{shown(neutral[0])}, which changes nothing" if neutral else "null"
            raise unsupported(prefix + name, given[name], supported)
    if "best_of" in given and given["best_of"] != given.get("n", 1):
        raise unsupported(f"{prefix}best_of", given["best_of"], "what n is", "ask for n and choose")


def seed_of(seed: int | None) -> int:
    """A request's seed in 32 bits; a random one where none was given."""
    if seed is None:
        return secrets.randbits(32)
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF


def identity(seed: int, prompt: int, sample: int) -> tuple[int, int, int, int]:
    """What the draws of one sequence are named by. seed: see `seed_of`."""
    return (SERVE, seed, prompt, sample)
