"""Tokenizers: exact round trips, ids that stay, errors that help."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

from aspo_jax.data import (
    CHARACTERS,
    CountdownSpec,
    DataError,
    allowed_ids,
    build_character_tokenizer,
    copy_tokenizer,
    demonstration,
    encode,
    load_tokenizer,
    problem,
    render,
)

QUESTION = [{"role": "user", "content": "3 3 6 7:7"}]


@pytest.fixture(scope="module")
def tokenizer():
    return build_character_tokenizer(CHARACTERS)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_golden_ids(tokenizer):
    """Saved models depend on these."""
    text = render(tokenizer, QUESTION)
    assert text == "<bos>3 3 6 7:7>"
    assert encode(tokenizer, text) == [1, 6, 18, 6, 18, 9, 18, 10, 19, 10, 20]
    assert encode(tokenizer, "7-3=4,4*1+0<eos>") == [10, 14, 6, 16, 7, 17, 7, 15, 4, 13, 3, 2]


def test_specials(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 3 + len(CHARACTERS)


def test_every_character_round_trips(tokenizer):
    ids = encode(tokenizer, CHARACTERS + "  " + CHARACTERS[::-1])
    assert len(ids) == 2 * len(CHARACTERS) + 2
    assert tokenizer.decode(ids) == CHARACTERS + "  " + CHARACTERS[::-1]
    assert encode(tokenizer, "") == []


def test_decode_can_leave_specials_out(tokenizer):
    ids = encode(tokenizer, "<bos>1+1=2<eos><pad>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1+1=2"
    assert tokenizer.decode(ids) == "<bos>1+1=2<eos><pad>"


def test_any_characters_can_be_chosen():
    characters = "aB \n\t'.,!"
    tokenizer = build_character_tokenizer(characters)
    assert len(tokenizer) == 3 + len(characters) + 1  # the '>' of the chat template
    text = "a .'!\n\n\tB , ."
    assert len(encode(tokenizer, text)) == len(text)
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_whole_chat(tokenizer):
    chat = [*QUESTION, {"role": "assistant", "content": "7-3=4"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == render(tokenizer, QUESTION) + "7-3=4<eos>"


def test_saved_and_loaded_is_the_same(tokenizer, folder):
    loaded = load_tokenizer(folder)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in folder.iterdir()}
    text = render(loaded, QUESTION)
    assert text == render(tokenizer, QUESTION)
    assert encode(loaded, text) == encode(tokenizer, text)
    assert loaded.decode(encode(loaded, text)) == text
    assert loaded.get_vocab() == tokenizer.get_vocab()


LOADERS = ("AutoTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast")


def load(name: str, folder):
    return getattr(transformers, name).from_pretrained(folder)


def texts_of_the_task() -> list[str]:
    """Prompts as the model reads them, and worked answers with what ends them."""
    spec, rng, texts = CountdownSpec(4, 1, 9, "+-*"), random.Random(0), [CHARACTERS, " 1  2 "]
    for index in range(200):
        drawn = problem(spec, 0, index, "train")
        texts.append(f"<bos>{drawn.text}>{demonstration(drawn, rng)}<eos>")
    return texts


@pytest.mark.parametrize("loader", LOADERS)
def test_ids_are_the_same_however_a_user_loads_the_folder(tokenizer, folder, tmp_path, loader):
    """Beside a Qwen2 model `transformers` replaces most of what tokenizer.json says."""
    model = transformers.Qwen2Config(vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    loaded = load(loader, folder)
    loaded.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    for theirs in (loaded, *(load(name, tmp_path / "again") for name in LOADERS)):
        assert len(theirs) == len(tokenizer)
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
        assert [getattr(theirs, name) for name in names] == [0, 1, 2, None]
        assert render(theirs, QUESTION) == render(tokenizer, QUESTION)
        for text in texts_of_the_task():
            ids = encode(tokenizer, text)
            assert theirs(text).input_ids == ids
            assert theirs.decode(ids) == text
            shown = theirs.decode(ids, skip_special_tokens=True)
            assert shown == tokenizer.decode(ids, skip_special_tokens=True)


def test_unknown_characters_are_named(tokenizer, folder, tmp_path):
    """Also after a round trip through what would drop them."""
    transformers.Qwen2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for each in (tokenizer, load_tokenizer(folder), load_tokenizer(tmp_path / "again")):
        for text in ("1+x", "1+é", "\n"):
            with pytest.raises(ValueError, match=r"text '.*' cannot be written .* of 21 tokens"):
                encode(each, text)


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("aba", r"characters \['a'\] are given more than once"),
        ("aé", r"characters \['é'\] are several bytes each, expected ASCII"),
    ],
)
def test_characters_that_cannot_be_one_token_each_are_refused(characters, message):
    with pytest.raises(ValueError, match=message):
        build_character_tokenizer(characters)


MODEL = os.environ.get("ASPO_TEST_MODEL", "")


@pytest.mark.skipif(not MODEL, reason="ASPO_TEST_MODEL names no model folder")
def test_a_published_folder_has_the_ids_of_auto_tokenizer(tmp_path):
    copy_tokenizer(MODEL, tmp_path)
    shutil.copyfile(Path(MODEL) / "config.json", tmp_path / "config.json")
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = render(ours, [{"role": "user", "content": "Write f(x) = x**2.\n\n    héllo, 😀 123"}])
    for text in (chat, *texts_of_the_task(), *Path(__file__).read_text().split("\n\n\n")):
        assert encode(ours, text) == theirs.encode(text, add_special_tokens=False)


def test_allowed_ids(tokenizer):
    allowed_V = allowed_ids(tokenizer, 32, [2])
    assert allowed_V.dtype == np.bool_
    assert allowed_V.tolist() == [False, False, True] + [True] * 18 + [False] * 11


def test_what_ends_a_response_is_allowed_even_where_it_is_pad_and_bos(tokenizer):
    assert allowed_ids(tokenizer, 21, [2, 0]).tolist() == [True, False] + [True] * 19
    tokenizer = build_character_tokenizer("ab")
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    assert allowed_ids(tokenizer, 6, [2]).tolist() == [True] * 6


def test_too_small_a_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokenizer has 21 tokens and the model only 20"):
        allowed_ids(tokenizer, 20, [2])


def edit_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_friendly_errors(folder, tmp_path):
    def broken(message, error, breaking):
        copy = tmp_path / "broken"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        breaking(copy)
        with pytest.raises(error, match=message):
            load_tokenizer(copy)

    broken("broken: no such folder", DataError, shutil.rmtree)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        broken(f"{name} is missing", DataError, lambda f, n=name: (f / n).unlink())
    broken("cannot be read", DataError, lambda f: (f / "tokenizer.json").write_text("{"))
    broken("no eos_token", DataError, lambda f: edit_config(f, eos_token=None))
    broken("no chat template", DataError, lambda f: (f / "chat_template.jinja").unlink())
