"""inspect-ai: the sums of sums.jsonl; right where the last number of the answer is.

inspect eval sums_task.py --model openai-api/aspo/policy
"""

# pyright: reportMissingImports=false
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def sums() -> Task:
    rows = json_dataset(
        str(Path(__file__).with_name("sums.jsonl")), FieldSpec(input="prompt", target="answer")
    )
    greedy = GenerateConfig(temperature=0.0, max_tokens=32)
    return Task(dataset=rows, solver=generate(), scorer=match(numeric=True), config=greedy)
