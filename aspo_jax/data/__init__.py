"""Data: problems, tokenizers, the stream of prompts, packing.

    spec   = CountdownSpec(numbers=4, operations="+-")
    stream = prompts(CountdownSource(spec, seed=0, split="train"), tokenizer=tokenizer, seed=0,
                     shuffle=False, prompts_per_step=32)
    batch  = next(stream)      # 32 Prompts;  stream.state() is one integer

Other sources: files or hub data sets (`read_rows`), or a Python generator (`generated`).

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
from aspo_jax.data.formats import file_stamps
from aspo_jax.data.generated import generated
from aspo_jax.data.overlap import overlaps
from aspo_jax.data.packing import pack
from aspo_jax.data.prompts import PromptStream, Row, fitting_rows, prompts
from aspo_jax.data.reading import LAYOUTS, made_rows, read_rows
from aspo_jax.data.rows import DataError, Fields
from aspo_jax.data.sources import Mixture, Wanted
from aspo_jax.data.tokenizer import (
    allowed_ids,
    build_character_tokenizer,
    copy_tokenizer,
    encode,
    load_tokenizer,
    load_vocabulary,
    render,
)

__all__ = [
    "CHARACTERS",
    "LAYOUTS",
    "CountdownSource",
    "CountdownSpec",
    "DataError",
    "Fields",
    "Mixture",
    "Problem",
    "PromptStream",
    "Row",
    "Wanted",
    "allowed_ids",
    "build_character_tokenizer",
    "copy_tokenizer",
    "demonstration",
    "encode",
    "file_stamps",
    "fitting_rows",
    "generated",
    "load_tokenizer",
    "load_vocabulary",
    "made_rows",
    "max_prompt_tokens",
    "max_response_tokens",
    "overlaps",
    "pack",
    "problem",
    "prompts",
    "read_rows",
    "render",
    "split_of",
]
