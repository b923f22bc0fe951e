"""What the `openai` SDK makes of a server; run in an interpreter that has it, prints JSON.

openai_calls.py URL MODEL PROMPT
"""

# pyright: reportMissingImports=false
import json
import sys
from typing import Any

import openai

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def main(url: str, model: str, prompt: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0)
    asked: Any = {"model": model, "max_tokens": 12, "seed": 7}
    chat = asked | {"messages": [{"role": "user", "content": prompt}]}
    text = asked | {"prompt": prompt}
    found = {
        "models": [m.id for m in client.models.list()],
        "text": client.completions.create(**text, n=2, logprobs=2).model_dump(),
        "again": client.completions.create(**text, n=2, logprobs=2).model_dump(),
        "text_stream": texts(client, text),
        "greedy": client.completions.create(**text, temperature=0).model_dump(),
        "stopped": client.completions.create(**text, temperature=0, stop=["e"]).model_dump(),
        "chat": client.chat.completions.create(**chat, logprobs=True, top_logprobs=2).model_dump(),
        "chat_stream": chat_stream(client, chat),
        "tools": client.chat.completions.create(**chat, tools=[TOOL]).model_dump(),
        "errors": errors(client, text),
    }
    print(json.dumps(found))


def texts(client: openai.OpenAI, asked: Any) -> dict[int, str]:
    """The texts of a streamed completion, put together."""
    whole: dict[int, str] = {}
    for chunk in client.completions.create(**asked, n=2, stream=True):
        for choice in chunk.choices:
            whole[choice.index] = whole.get(choice.index, "") + choice.text
    return whole


def chat_stream(client: openai.OpenAI, asked: Any) -> dict[str, Any]:
    """The text, role, ending and usage of a streamed chat."""
    text, roles, endings, usage = "", [], [], []
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options=options):
        usage += [chunk.usage.model_dump()] if chunk.usage else []
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            endings += [choice.finish_reason] if choice.finish_reason else []
    return {"text": text, "roles": roles, "endings": endings, "usage": usage}


def errors(client: openai.OpenAI, asked: Any) -> dict[str, Any]:
    """The SDK's own exception for each wrong request, and what it read from the body."""
    wrong = {
        "model": asked | {"model": "nobody"},
        "temperature": asked | {"temperature": -1},
        "length": asked | {"prompt": [5] * 200_000},
    }
    return {name: error(client, request) for name, request in wrong.items()}


def error(client: openai.OpenAI, asked: Any) -> dict[str, Any]:
    try:
        client.completions.create(**asked)
    except openai.APIStatusError as e:
        return {"type": type(e).__name__, "status": e.status_code, "body": e.body, "code": e.code}
    return {"type": None}


if __name__ == "__main__":
    main(*sys.argv[1:])
