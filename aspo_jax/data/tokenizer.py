"""Tokenizers and chat templates, in the Hugging Face folder format.

Any tokenizer is loaded with `PreTrainedTokenizerFast`, which does what tokenizer.json says:
`AutoTokenizer` puts pre-tokenizers of its own in place of those of Qwen2 and Llama folders, which
may change ids. The chat template is always rendered to text first (it contains the <bos>), and text
is encoded without adding special tokens, so there is one place where they come from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aspo_jax.data.rows import DataError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

# Else transformers says at every start that PyTorch is missing; read when it is imported.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)

_PAD, _BOS, _EOS = "<pad>", "<bos>", "<eos>"
# Of these `AutoTokenizer` of transformers 5 spells what follows a special token otherwise than
# tokenizer.json; of the generic one it does not.
_REBUILT, _GENERIC = ("LlamaTokenizer", "LlamaTokenizerFast"), "PreTrainedTokenizerFast"
_MARK = ">"  # ends the question
_UNKNOWN = "<unknown>"  # in no vocabulary: where it is asked for, tokenizers raises

# <bos>question>answer<eos>
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '" + _MARK + "' + message['content'] + eos_token }}"
    "{%- else -%}"
    "{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + _MARK + "' }}{%- endif -%}"
)


def build_character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character: ids 0 <pad>, 1 <bos>, 2 <eos>, then ``characters`` in their order.

    The chat template writes ``<bos>question>``; ``>`` is added where ``characters`` lack it.

    It is Qwen2's tokenizer (bytes, no merges) with a small vocabulary, for that is what
    `transformers` makes of any tokenizer beside a Qwen2 model: the ids are the same however its
    folder is loaded. Only there characters outside of the vocabulary are dropped without a word.

    Raises:
        ValueError: a character given twice, or one of several bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Tokenizer

    if len(set(characters)) != len(characters):
        twice = sorted({c for c in characters if characters.count(c) > 1})
        raise ValueError(f"characters {twice} are given more than once, expected each once")
    if wide := [c for c in characters if not c.isascii()]:
        raise ValueError(f"characters {wide} are several bytes each, expected ASCII characters")
    mark = "" if _MARK in characters else _MARK
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [to_bytes.pre_tokenize_str(c)[0][0] for c in characters + mark]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate((_PAD, _BOS, _EOS, *symbols))}, []))
    core.pre_tokenizer = to_bytes
    core.decoder = decoders.ByteLevel()
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=core,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=cast(Any, None),  # its default is a token more than the model has
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return _refusing(tokenizer)


def _refusing(tokenizer: Any) -> Any:
    """The tokenizer; it raises where it would drop characters that it has no token for."""
    model = tokenizer.backend_tokenizer.model
    if getattr(model, "unk_token", "") is None and not model.byte_fallback:
        model.unk_token = _UNKNOWN
    return tokenizer


def load_vocabulary(folder: str | Path) -> dict[str, int]:
    """Token -> id, of a Hugging Face folder; with the tokens that its settings add.

    Raises:
        DataError: no such folder, a file of it is missing or unreadable.
    """
    return _read(Path(folder).expanduser()).get_vocab()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face folder.

    Raises:
        DataError: no such folder, a file of it is missing or unreadable, no end-of-sequence
            token, no chat template.
    """
    folder = Path(folder).expanduser()
    tokenizer = _read(folder)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{folder}/tokenizer_config.json: no eos_token, expected one: without it no response "
            'can end itself (add for example "eos_token": "<|im_end|>")'
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"{folder}: no chat template, expected a file chat_template.jinja or the field "
            "chat_template of tokenizer_config.json (copy it from the model's instruct version)"
        )
    return _refusing(tokenizer)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected a model folder with tokenizer.json, or a name on "
            "the Hugging Face hub such as Qwen/Qwen2.5-0.5B-Instruct "
            "(set Model.path, or leave it out to build a model)"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder}: {name} is missing; expected a tokenizer written by save_pretrained "
                f"({_remedy(folder)})"
            )
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(
            f"{folder}: its tokenizer files cannot be read ({error}); expected a tokenizer "
            "written by save_pretrained (copy the files again from where the model came from)"
        ) from error


def _remedy(folder: Path) -> str:
    """How to come by a file of a tokenizer."""
    if (folder / "tokenizer.model").is_file():
        return (
            "transformers makes it of tokenizer.model, with sentencepiece installed: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return "copy the file from where the model came from"


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Carry the tokenizer of one folder over to another, file by file.

    Unchanged but for the name of a Llama class: any loader of the copy gives the ids that
    `load_tokenizer` gives here.
    """
    target = Path(target)
    for name in FILES:
        path = Path(source).expanduser() / name
        if path.is_file():
            shutil.copyfile(path, target / name)
    path = target / "tokenizer_config.json"
    raw = json.loads(path.read_text()) if path.is_file() else {}
    if raw.get("tokenizer_class") in _REBUILT:
        raw["tokenizer_class"] = _GENERIC
        path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of ``text`` as it stands, nothing added.

    Raises:
        ValueError: a character that the vocabulary cannot spell.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(
            f"text {text[:80]!r} cannot be written in this tokenizer's vocabulary of "
            f"{len(tokenizer)} tokens ({error}); use characters it has"
        ) from error


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> str:
    """What the model reads before it answers: the chat template with the generation prompt."""
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
    )
    return str(text)


def allowed_ids(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_ids: Sequence[int]
) -> np.ndarray:
    """allowed_V, bool: True for the ids that a response may hold.

    Not the padding rows of the embedding (ids from ``len(tokenizer)``), not <pad>, not <bos>; but
    always what ends a response, for which some models use <pad> or <bos> as well.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    import numpy as np

    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {vocab_size}; "
            "expected at most as many: tokenizer and weights are from different models"
        )
    allowed_V = np.arange(vocab_size) < len(tokenizer)
    specials: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.bos_token_id)
    for special in specials:
        if special is not None:
            allowed_V[special] = False
    allowed_V[list(stop_ids)] = True
    return allowed_V
