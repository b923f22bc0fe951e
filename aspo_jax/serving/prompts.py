"""Prompts of requests as token ids: given as ids, as a text, or as a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aspo_jax.serving.errors import ApiError, shown, unsupported
from aspo_jax.serving.fields import ChatTemplate
from aspo_jax.serving.site import Model, Site

_ROLES = ("system", "developer", "user", "assistant", "tool")
_RESERVED = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "return_dict", "return_tensors", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "padding", "truncation", "max_length"),
}


class Prompt(NamedTuple):
    """A prompt; text: as it was given, None where ids were."""

    tokens: list[int]
    text: str | None = None


async def read_prompts(site: Site, model: Model, prompt: Any, adds_special: bool) -> list[Prompt]:
    """The prompts of `/v1/completions`: a text, ids, or a list of either.

    Raises:
        ApiError: something else, nothing, too many, an id that is no token.
    """
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(
            f"prompt = {shown(prompt)}: expected a text, a list of token ids, or a list of either",
            param="prompt",
        )
    if len(prompt) > site.settings.most_prompts:
        raise ApiError(
            f"prompt holds {len(prompt)}, expected at most {site.settings.most_prompts}; send "
            "several requests",
            param="prompt",
        )
    if any(isinstance(x, str) for x in prompt):
        return await site.in_thread(lambda: [_read_text(model, x, adds_special) for x in prompt])
    return [Prompt(check_ids(model, x, "prompt")) for x in prompt]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _read_text(model: Model, text: Any, adds_special: bool) -> Prompt:
    if not isinstance(text, str):
        raise ApiError(
            f"prompt holds {shown(text)} beside a text; expected all texts, or all lists of ids",
            param="prompt",
        )
    if not text:
        raise ApiError("prompt is an empty text, expected some characters", param="prompt")
    return Prompt(encode(model, text, adds_special, "prompt"), text)


def encode(model: Model, text: str, adds_special: bool, param: str) -> list[int]:
    """The ids of a text.

    Raises:
        ApiError: a character that the vocabulary cannot spell, or no ids at all.
    """
    try:
        tokens = model.vocabulary.tokenizer.encode(text, add_special_tokens=adds_special)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ApiError(
            f"{param}: {shown(text)} cannot be written in the vocabulary of {model.name} "
            f"({error}); use characters it has",
            param=param,
        ) from error
    if not tokens:
        raise ApiError(f"{param}: {shown(text)} has no tokens; use other characters", param=param)
    return tokens


def check_ids(model: Model, ids: Any, param: str) -> list[int]:
    """A list of at least one token id.

    Raises:
        ApiError: it is none.
    """
    if not _is_ids(ids):
        raise ApiError(f"{param} = {shown(ids)}: expected a list of token ids", param=param)
    size = model.vocabulary.size
    if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < size]:
        raise ApiError(
            f"{param} holds {wrong[0]}, expected ids of {model.name}'s tokens, 0 to {size - 1}; "
            "use its /tokenize",
            param=param,
        )
    return ids


def room(model: Model, prompt: Sequence[int], max_tokens: int | None, param: str) -> int:
    """Longest answer to a prompt: what was asked for, or what the window leaves.

    Raises:
        ApiError: the window leaves nothing.
    """
    left = model.engine.window - len(prompt)
    if left < (max_tokens != 0):
        raise ApiError(
            f"This model's maximum context length is {model.engine.window} tokens, the prompt has "
            f"{len(prompt)}, which leaves none for an answer; shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    return left if max_tokens is None else min(max_tokens, left)


async def read_chat(site: Site, model: Model, fields: ChatTemplate) -> Prompt:
    """The conversation as the chat template writes it.

    Raises:
        ApiError: a message or tool is not one, or the template refuses them.
    """
    if fields.chat_template is not None and not site.settings.trusts_templates:
        raise unsupported("chat_template", fields.chat_template, "the template of the model")
    if fields.add_generation_prompt and fields.continue_final_message:
        raise ApiError(
            "add_generation_prompt and continue_final_message are both true, expected one of "
            "them; send add_generation_prompt = false to go on with the last message",
            param="continue_final_message",
        )
    if wrong := _RESERVED & fields.chat_template_kwargs.keys():
        raise ApiError(
            f"chat_template_kwargs holds {', '.join(sorted(wrong))}, expected variables of the "
            "template's own; send fields of that name in the body",
            param="chat_template_kwargs",
        )
    messages = [read_message(m, f"messages.{i}") for i, m in enumerate(fields.messages)]
    check_tools(fields.tools)
    return await site.in_thread(lambda: _render(model, fields, messages))


def _render(model: Model, fields: ChatTemplate, messages: list[dict[str, Any]]) -> Prompt:
    more: dict[str, Any] = {}
    if fields.chat_template is not None:
        more["chat_template"] = fields.chat_template
    try:
        text = model.vocabulary.tokenizer.apply_chat_template(
            messages,
            tools=fields.tools,
            tokenize=False,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            **more,
            **fields.chat_template_kwargs,
        )
    except Exception as error:  # the template is a program, and raises what it likes
        raise ApiError(
            f"the chat template of {model.name} refuses these messages ({type(error).__name__}: "
            f"{error}); change messages, tools or chat_template_kwargs",
            param="messages",
        ) from error
    if not text:
        raise ApiError("the chat template makes an empty text of these messages", param="messages")
    return Prompt(encode(model, str(text), fields.add_special_tokens, "messages"), str(text))


def read_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates want it: content one text, arguments of calls as objects.

    Raises:
        ApiError: it is no message of texts.
    """
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(
            f"{where}.role = {shown(role)}: expected one of {', '.join(_ROLES)}",
            param=f"{where}.role",
        )
    read = {k: v for k, v in message.items() if v is not None}
    read["role"] = "system" if role == "developer" else role  # its newer name elsewhere
    calls = message.get("tool_calls")
    read["content"] = _content(message.get("content"), f"{where}.content", may_lack=bool(calls))
    if calls is not None:
        read["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return read


def _content(content: Any, where: str, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and content:
        return "\n".join(_part(part, f"{where}.{i}") for i, part in enumerate(content))
    raise ApiError(
        f"{where} = {shown(content)}: expected a text or a list of parts such as "
        '{"type": "text", "text": "..."}',
        param=where,
    )


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise ApiError(f'{where} = {shown(part)}: expected {{"type": "text", ...}}', param=where)
    if part.get("type") != "text":
        raise unsupported(f"{where}.type", part.get("type"), '"text"', "send texts only")
    text = part.get("text")
    if not isinstance(text, str):
        raise ApiError(f"{where}.text = {shown(text)}: expected a text", param=f"{where}.text")
    return text


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ApiError(f"{where} = {shown(calls)}: expected a list of calls", param=where)
    return [_call(call, f"{where}.{i}") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(
            f'{where} = {shown(call)}: expected {{"type": "function", "function": {{"name": ..., '
            '"arguments": ...}}',
            param=where,
        )
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ApiError(
            f"{where}.function.arguments = {shown(arguments)} is not JSON ({error}); expected an "
            "object written as JSON",
            param=f"{where}.function.arguments",
        ) from error
    return {**call, "function": {**function, "arguments": arguments}}


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Every tool is a function with a name.

    Raises:
        ApiError: one is not.
    """
    for i, tool in enumerate(tools or ()):
        where = f"tools.{i}"
        if tool.get("type") != "function":
            raise unsupported(
                f"{where}.type", tool.get("type"), '"function"', "send functions only"
            )
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(
                f"{where}.function = {shown(function)}: expected an object with a name",
                param=f"{where}.function",
            )
