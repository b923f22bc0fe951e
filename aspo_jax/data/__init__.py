"""Data: problems, tokenizers, the stream of prompts, packing.

    spec   = CountdownSpec(numbers=4, operations="+-")
    stream = prompts(CountdownSource(spec, seed=0, split="train"), tokenizer=tokenizer, seed=0,
                     shuffle=False, prompts_per_step=32)
    batch  = next(stream)      # 32 Prompts;  stream.state() is one integer

Other sources: the lines of a file (`read_jsonl`), or a Python generator (`generated`).

Importing this loads neither jax nor transformers nor grain; the functions that need them do.
"""

from aspo_jax.data.countdown import (
    CHARACTERS,
    CountdownSource,
    CountdownSpec,
    Problem,
    demonstration,
    max_prompt_tokens,
    max_response_tokens,
    problem,
    split_of,
)
from aspo_jax.data.generated import generated
from aspo_jax.data.jsonl import DataError, read_jsonl
from aspo_jax.data.packing import pack
from aspo_jax.data.prompts import PromptStream, Row, check_prompts, prompts
from aspo_jax.data.tokenizer import (
    allowed_ids,
    build_character_tokenizer,
    copy_tokenizer,
    encode,
    load_tokenizer,
    render,
)

__all__ = [
    "CHARACTERS",
    "CountdownSource",
    "CountdownSpec",
    "DataError",
    "Problem",
    "PromptStream",
    "Row",
    "allowed_ids",
    "build_character_tokenizer",
    "check_prompts",
    "copy_tokenizer",
    "demonstration",
    "encode",
    "generated",
    "load_tokenizer",
    "max_prompt_tokens",
    "max_response_tokens",
    "pack",
    "problem",
    "prompts",
    "read_jsonl",
    "render",
    "split_of",
]
