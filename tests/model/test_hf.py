"""Hugging Face folders: round trip, parity with transformers, errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import CONFIG, bits, random_params, toy_model

from aspo_jax.model import (
    ModelConfig,
    ModelFolderError,
    build_model,
    load_params,
    read_model_config,
    save_model,
)

SHAPES = {
    "tied, one key head per query head": ModelConfig(23, 16, 28, 2, 4, 4, 4),
    "untied, grouped, head width not hidden / heads": ModelConfig(
        37, 20, 41, 3, 6, 2, 6, rope_theta=1e6, tie_embeddings=False, max_position=99
    ),
    "tied, one key head, odd widths": ModelConfig(19, 33, 17, 1, 3, 1, 10, rms_norm_eps=1e-5),
}
TOKEN_BT = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def save(folder: Path, config: ModelConfig = CONFIG, seed: int = 0):
    params = random_params(build_model(config), seed)
    save_model(folder, params, config, no_tokenizer, eos_token_id=2)
    return params


def logits(config: ModelConfig, params) -> np.ndarray:
    model = build_model(config)
    position_BT = np.tile(np.arange(TOKEN_BT.shape[1]), (len(TOKEN_BT), 1))

    @jax.jit
    def run(params):
        hidden, _ = model.apply(params, TOKEN_BT, position_BT, np.ones_like(TOKEN_BT))
        return hidden @ model.unembedding(params).T

    return np.asarray(run(params))


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_round_trip_is_bitwise(tmp_path, config):
    folder = tmp_path / "exports" / "model"
    params = save(folder, config)
    assert read_model_config(folder) == config
    loaded = load_params(folder, config)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert bits(loaded) == bits(params)


# Logits of the last position of the first row, computed by transformers 5.23 and torch 2.13 from
# the folders that `save` writes. Change them only together with `random_params` or `SHAPES`.
GOLDEN = {
    "tied, one key head per query head": [3.20168, -1.94282, -1.97621, 0.0653262, -0.643165],
    "untied, grouped, head width not hidden / heads": [0.153376, -1.71863, -0.386039, 0.243233],
    "tied, one key head, odd widths": [3.49303, 0.662974, -0.144264, -0.369896, 1.57608],
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_golden_logits(config):
    name = next(name for name, value in SHAPES.items() if value == config)
    got = logits(config, random_params(build_model(config)))[0, -1, : len(GOLDEN[name])]
    np.testing.assert_allclose(got, GOLDEN[name], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_the_same_logits_from_our_folder(tmp_path, config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params = save(tmp_path / "model", config)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKEN_BT)).logits.numpy()
    got = logits(config, params)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_we_compute_the_same_logits_from_a_folder_of_transformers(tmp_path, config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_position,
        )
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.3)
        expected = theirs(torch.tensor(TOKEN_BT)).logits.numpy()
    theirs.save_pretrained(tmp_path)
    assert read_model_config(tmp_path) == config
    got = logits(config, load_params(tmp_path, config))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


# --- folders that cannot be used --------------------------------------------------------------


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model\.norm\.weight \(16,\)"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(3)}),
            r"surplus model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.ones((8, 17))}),
            r"model\.layers\.1\.self_attn\.k_proj\.weight has shape \(8, 17\), expected \(8, 16\)",
        ),
    ],
    ids=["missing", "surplus", "misshapen"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, problem):
    save(tmp_path / "model")
    change_weights(tmp_path / "model", change)
    with pytest.raises(ModelFolderError, match=problem) as error:
        load_params(tmp_path / "model", CONFIG)
    assert str(tmp_path / "model" / "model.safetensors") in str(error.value)
    assert "1 problems" in str(error.value)


def test_a_tied_folder_may_repeat_the_embedding_as_the_head(tmp_path):
    params = save(tmp_path / "model")
    change_weights(tmp_path / "model", lambda t: t.update({"lm_head.weight": params["embed"]}))
    assert bits(load_params(tmp_path / "model", CONFIG)) == bits(params)


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama', expected 'qwen2'"),
        (lambda c: c.pop("model_type"), "model_type is None, expected 'qwen2'"),
        (lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (lambda c: c.update(use_sliding_window=True), "use_sliding_window is True"),
        (
            lambda c: c.update(rope_scaling={"type": "yarn", "factor": 4.0}),
            "rope scaling .*yarn.* is not supported",
        ),
        (
            lambda c: c.update(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
            "rope scaling .*linear.* is not supported",
        ),
        (lambda c: c.pop("hidden_size"), "field 'hidden_size' is missing"),
    ],
    ids=["type", "no type", "act", "window", "yarn", "linear", "missing"],
)
def test_what_the_config_asks_for_and_we_lack_is_named(tmp_path, change, problem):
    save(tmp_path / "model")
    change_config(tmp_path / "model", change)
    with pytest.raises(ModelFolderError, match=problem) as error:
        read_model_config(tmp_path / "model")
    assert str(tmp_path / "model" / "config.json") in str(error.value)


def test_old_and_new_places_of_rope_theta(tmp_path):
    save(tmp_path / "model")
    change_config(tmp_path / "model", lambda c: c.update(rope_theta=5e5))
    assert read_model_config(tmp_path / "model").rope_theta == 5e5
    change_config(tmp_path / "model", lambda c: c.update(rope_parameters={"rope_theta": 7e5}))
    assert read_model_config(tmp_path / "model").rope_theta == 7e5


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ModelFolderError, match=r"config\.json: not found; Model\.path must be"):
        read_model_config(tmp_path)
    with pytest.raises(ModelFolderError, match=r"model\.safetensors: not found"):
        load_params(tmp_path, CONFIG)


# --- a killed export ----------------------------------------------------------------------------


def killed(folder: Path) -> None:
    assert folder.name.endswith(".partial")  # the last thing written is not in place yet either
    raise KeyboardInterrupt


def test_a_killed_export_leaves_no_half_folder_and_spoils_no_whole_one(tmp_path):
    folder = tmp_path / "model"
    new = random_params(toy_model(), 1)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, new, CONFIG, killed, eos_token_id=2)
    assert not folder.exists()
    old = save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, new, CONFIG, killed, eos_token_id=2)
    assert bits(load_params(folder, CONFIG)) == bits(old)
    save_model(folder, new, CONFIG, no_tokenizer, eos_token_id=2)
    assert bits(load_params(folder, CONFIG)) == bits(new)


def test_what_else_is_in_the_folder(tmp_path):
    folder = tmp_path / "model"
    save(folder)
    assert (folder / "tokenizer.json").is_file()
    generation = json.loads((folder / "generation_config.json").read_text())
    raw = json.loads((folder / "config.json").read_text())
    assert generation["eos_token_id"] == raw["eos_token_id"] == 2
    assert raw["architectures"] == ["Qwen2ForCausalLM"] and raw["torch_dtype"] == "float32"
