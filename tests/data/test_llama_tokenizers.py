"""The tokenizers of Llama models: GPT-2's kind, Llama 3's and sentencepiece's, small ones of each.

A folder, the copy that an export writes, and what `AutoTokenizer` saves again: one spelling.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from aspo_jax.data import DataError, copy_tokenizer, encode, load_tokenizer, render

LINES = [
    "Hello world, this is a test of 1234 words.",
    "What is 2+2? It's 4!",
    "def f(x):\n    return x**2\n",
]
CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": " 4, hello"},
    {"role": "user", "content": "It's  naïve 😀"},
]
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def trained(core: Tokenizer, size: int, **how: Any) -> Tokenizer:
    core.train_from_iterator(LINES, BpeTrainer(vocab_size=size, show_progress=False, **how))
    return core


def beginning_with(core: Tokenizer, bos: str) -> None:
    """As published: whoever asks for special tokens gets a <bos>; `encode` does not ask."""
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )


def of_bytes(split: Any, ignores_merges: bool, specials: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignores_merges)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(core, 300, special_tokens=specials, initial_alphabet=alphabet)


def as_smollm2() -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = of_bytes(pre_tokenizers.Digits(individual_digits=True), False, specials)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return core, {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>", **names}


def as_llama3() -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<|begin_of_text|>", "<|im_start|>", "<|eot_id|>"]
    core = of_bytes(pre_tokenizers.Split(Regex(WORDS), "isolated"), True, specials)
    beginning_with(core, "<|begin_of_text|>")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return core, {"tokenizer_class": "PreTrainedTokenizerFast", **names}


def as_tinyllama() -> tuple[Tokenizer, dict[str, Any]]:
    """Spaces are ▁, every piece of text begins with one, unknown characters are bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained(core, 360, special_tokens=[*specials, *fallback], limit_alphabet=50)
    raw = json.loads(core.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in specials]
    core = Tokenizer.from_str(json.dumps(raw))
    core.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    beginning_with(core, "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return core, {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names}


KINDS = {"SmolLM2": as_smollm2, "Llama 3": as_llama3, "TinyLlama": as_tinyllama}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path) -> Path:
    core, settings = KINDS[request.param]()
    folder = tmp_path / "model"
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    start = "{{ bos_token }}" if request.param == "Llama 3" else ""
    settings |= {"chat_template": start + TURNS, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    transformers.LlamaConfig(vocab_size=core.get_vocab_size()).save_pretrained(folder)
    return folder


def with_config(source: Path, target: Path) -> Path:
    shutil.copyfile(source / "config.json", target / "config.json")
    return target


def test_ids_and_texts_survive_an_export_through_auto_tokenizer(folder, tmp_path):
    ours, copy, again = load_tokenizer(folder), tmp_path / "copy", tmp_path / "again"
    copy.mkdir()
    copy_tokenizer(folder, copy)
    theirs = transformers.AutoTokenizer.from_pretrained(with_config(folder, copy))
    theirs.save_pretrained(again)
    others = [
        *(load_tokenizer(copy), theirs, load_tokenizer(again)),
        transformers.AutoTokenizer.from_pretrained(with_config(folder, again)),
    ]
    chat, raw = render(ours, CHAT), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (chat, *LINES, "  two  spaces\n\n ", f"{ours.eos_token}\nx", "1234", ""):
        ids = encode(ours, text)
        assert raw.encode(text, add_special_tokens=False).ids == ids
        for other in others:
            assert encode(other, text) == ids
            assert other.decode(ids) == ours.decode(ids)
    for other in others:
        assert render(other, CHAT) == chat
        assert other.eos_token_id == ours.eos_token_id and len(other) == len(ours)


def test_a_prompt_has_the_bos_of_its_template_and_no_second_one(folder):
    ours = load_tokenizer(folder)
    ids = encode(ours, render(ours, CHAT))
    bos: Any = ours.bos_token
    count = {"<s>": 0, "<|begin_of_text|>": 1, "<|im_start|>": 4}[bos]
    assert ours.convert_ids_to_tokens(ids).count(bos) == count


def test_what_a_model_answers_is_decoded_without_special_tokens(folder):
    ours = load_tokenizer(folder)
    for text in ("4 is the answer, naïve 😀", "def f(x):\n    return x**2"):
        ids = [*encode(ours, text), ours.eos_token_id]
        assert ours.decode(ids, skip_special_tokens=True) == text


def test_a_folder_with_sentencepiece_alone_is_told_how_to_convert_it(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer.json is missing; .*of tokenizer.model, with"):
        load_tokenizer(folder)
