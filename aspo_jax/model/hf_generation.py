"""`generation_config.json` of a Hugging Face folder, in and out: what ends a response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aspo_jax.model.hf_config import ModelFolderError, read_json, with_eos

GENERATION_FILE = "generation_config.json"


def read_eos_ids(folder: str | Path, tokens: int) -> tuple[int, ...]:
    """The ids that end a response, as the folder says; empty where it says nothing of it.

    tokens: size of its tokenizer.

    Raises:
        ModelFolderError: something else than an id or a list of ids below ``tokens``.
    """
    found = (_fields(folder) or {}).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int or not 0 <= i < tokens for i in ids):
        raise ModelFolderError(
            f"{Path(folder) / GENERATION_FILE}: eos_token_id is {found!r:.80}, expected an id from "
            f"0 to {tokens - 1} or a list of such; copy it again from where the model came from"
        )
    return tuple(ids)


def generation_config(source: str | Path | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The file's fields, those of the source folder's where it has one."""
    raw = None if source is None else _fields(source)
    return with_eos({"do_sample": True, "temperature": 1.0} if raw is None else raw, eos_ids)


def _fields(folder: str | Path) -> dict[str, Any] | None:
    path = Path(folder).expanduser() / GENERATION_FILE
    return read_json(path) if path.is_file() else None
