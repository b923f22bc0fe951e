"""verifiers: sums, with a tool that adds; its program runs in process, with no network.

    vf-eval calc_v1 -m policy --client.base-url http://127.0.0.1:8000/v1 \
        --env.agent.runtime.type subprocess --no-push --no-rich
"""

# pyright: reportMissingImports=false
import json
import re
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.runtimes import ProgramResult

__all__ = ["CalcHarness", "CalcTaskset"]

SUMS = ((2, 3), (4, 4), (7, 1), (5, 6), (9, 3), (8, 8), (12, 5), (17, 25))
TURNS = 3
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class CalcData(vf.TaskData):
    answer: str


class CalcTask(vf.Task[CalcData]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        numbers = re.findall(r"\d+", trace.last_reply or "")
        return float(numbers[-1:] == [self.data.answer])


class CalcConfig(vf.TasksetConfig):
    pass


class CalcTaskset(vf.Taskset[CalcTask, CalcConfig]):
    def load(self) -> list[CalcTask]:
        return [
            CalcTask(
                CalcData(
                    prompt=f"What is {a} + {b}? Answer with the number alone.",
                    system_prompt="You add numbers.",
                    answer=str(a + b),
                ),
                self.config.task,
            )
            for a, b in SUMS
        ]


class CalcHarnessConfig(vf.HarnessConfig):
    id: str = "calc_v1"
    tools: bool = True
    """Offer the tool."""


class CalcHarness(vf.Harness[CalcHarnessConfig]):
    """A chat of at most three turns; what the policy calls is added up here."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> ProgramResult:
        system, question = self.resolve_prompt(data)
        messages: list[Any] = [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
        ]
        more: Any = {"tools": [ADD]} if self.config.tools else {}
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            for _ in range(TURNS):
                answer = await client.chat.completions.create(
                    model=ctx.model, messages=messages, **more
                )
                message = answer.choices[0].message
                if not message.tool_calls:
                    break
                messages.append(message.model_dump(exclude_none=True))
                messages += [called(call) for call in message.tool_calls]
        return ProgramResult(exit_code=0, stdout="", stderr="")


def called(call: Any) -> dict[str, Any]:
    """The tool's answer to a call; a wrong call is told so."""
    try:
        values = json.loads(call.function.arguments)
        said = str(int(values["a"]) + int(values["b"]))
    except (KeyError, TypeError, ValueError) as error:
        said = f"error: {error!r}"
    return {"role": "tool", "tool_call_id": call.id, "content": said}
