"""Calls of tools in a text: ``<tool_call>{...}</tool_call>``, as Qwen and Hermes write them."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, NamedTuple

from aspo_jax.serving.texts import begun

OPEN = "<tool_call>"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class Parsed(NamedTuple):
    """A text without its calls, and the calls as clients want them."""

    content: str
    calls: list[dict[str, Any]]


def parse_calls(text: str, is_several: bool = True) -> Parsed:
    """The calls of tools in a text; what is not well formed stays text.

    is_several: else only the first call counts.
    """
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        call = _call(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    before, mark, after = text.partition(OPEN)
    rest = _CALL.sub(take, mark + after)
    content = before + (rest if rest.strip() else "")
    return Parsed(content, calls if is_several else calls[:1])


def _call(written: str) -> dict[str, Any] | None:
    try:
        call = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


class Withheld:
    """The text of a stream up to where a call may begin; the rest waits for its end."""

    def __init__(self):
        self._text = ""

    def add(self, text: str) -> str:
        """What may be shown now."""
        if self._text.startswith(OPEN):
            self._text += text
            return ""
        text = self._text + text
        at = text.find(OPEN)
        if at < 0:
            at = len(text) - begun(text, (OPEN,))
        self._text = text[at:]
        return text[:at]

    @property
    def rest(self) -> str:
        """What waits."""
        return self._text
