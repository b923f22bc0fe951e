"""Every config file of the package parses, builds and lowers for its hardware, without it."""

from __future__ import annotations

import json
import math
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aspo_jax.build import check_inputs
from aspo_jax.config import Config, packaged, parse_config, read_config, sections
from aspo_jax.config.reading import config_folder
from aspo_jax.data import build_character_tokenizer
from aspo_jax.model import AttentionError, build_model, choose_attention, parse_model_config
from aspo_jax.model.decoder import REMAT
from aspo_jax.model.sharding import abstract_mesh
from aspo_jax.parts import FACTORIES
from aspo_jax.planning.programs import SCORE, UPDATE, programs, read_shape

LONG = [
    name
    for name in packaged()
    if not name.startswith(("countdown", "own_data", "qwen_", "smollm2"))
]
SHAPES = sorted((config_folder() / "shapes").glob("*.json"))
# Parameters as the model cards give them, in billions.
BILLIONS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "DeepSeek-R1-Distill-Qwen-7B": 7.62,
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-7B": 7.62,
    "Qwen2.5-Math-1.5B": 1.54,
    "Qwen3-0.6B": 0.60,
    "Qwen3-1.7B": 1.72,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "SmolLM2-135M-Instruct": 0.13,
}


def _read(name: str) -> Config:
    return read_config(["--config", name], FACTORIES)


@pytest.mark.parametrize("name", packaged())
def test_parses_and_round_trips(name):
    config = _read(name)
    again = parse_config(config.text(), FACTORIES)
    assert again == config and again.text() == config.text()
    assert config.diff(again.text()) == ""


@pytest.mark.parametrize("name", packaged())
def test_header_says_how_and_what_for(name):
    text = (config_folder() / f"{name}.gin").read_text()
    header = text.partition("\n\n")[0] if name in LONG else text.partition("\n\n# ")[0]
    assert "python -m aspo_jax.train" in header
    assert "Hardware" in header
    assert "Expected:" in header and "arXiv" in header if name in LONG else "result:" in header


def test_the_config_for_own_data_fits_its_sample_files(tmp_path, monkeypatch):
    """All but the model's own folder is there: a tokenizer of characters stands for it."""
    printable = "".join(map(chr, range(32, 127)))
    build_character_tokenizer(printable).save_pretrained(tmp_path)
    shape = (config_folder() / "shapes" / "Qwen2.5-0.5B.json").read_text()
    (tmp_path / "config.json").write_text(shape)
    monkeypatch.chdir(Path(__file__).parents[1])
    flags = ["--config", "own_data", "--set", f"Model.path={tmp_path}"]
    table = dict(check_inputs(read_config(flags, FACTORIES)))
    assert table["prompts"] == "configs/samples/sums_train.jsonl, 16 rows"
    assert table["evaluation"] == "8 prompts x 4 samples = 32, every 20 iterations"


def _long(*quick: str) -> list:
    """The names of the long runs; those that are not named take part in `pytest -m slow` only."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in LONG]


# The others differ from it in their rule, which test_baselines.py compiles, or in their sizes.
@pytest.mark.parametrize("name", _long("aspo_math_1p5b"))
def test_lowers_for_tpu_at_full_size(name):
    """16 chips, 34,816-token rows, all layers: the stack is scanned, so depth costs nothing."""
    config = _read(name)
    shape = read_shape(config).config
    found = programs(config, shape, abstract_mesh((1, 16, 1)), abstract_mesh((4, 1, 1)), "tpu")
    assert found.attention.name == "splash"
    assert found.has_reference == ("kl_penalty" in config.objective.penalties)
    wanted = list(found.by_name) if name in ("aspo_math_1p5b", "aspo_qwen3_4b") else [UPDATE]
    for program in wanted:
        text = found.by_name[program].lower("tpu").as_text()
        chips = 16 if program in (UPDATE, SCORE) else 4  # a host samples by itself
        assert re.findall(r"num_partitions = (\d+)", text) == [str(chips)]
    assert found.batch.microbatches * found.batch.rows >= 256


@pytest.mark.parametrize("name", sorted(set(packaged()) - set(LONG)))
def test_small_configs_lower_too(name):
    config = _read(name)
    devices = min(8, config.train.rows_per_microbatch)
    mesh = abstract_mesh((devices, 1, 1))
    found = programs(config, read_shape(config).config, mesh, mesh, "tpu")
    assert f"num_partitions = {devices}" in found.by_name[UPDATE].lower("tpu").as_text()


def test_official_values():
    """arXiv 2510.06062 and the authors' released scripts."""
    config = _read("aspo_math_1p5b")
    train, sampler, optim, reward = config.train, config.sampler, config.optim, config.reward
    sizes = (train.prompts_per_step, train.samples_per_prompt, train.prompts_per_minibatch)
    assert (*sizes, train.epochs) == (64, 16, 16, 3)
    assert (sampler.max_prompt_tokens, sampler.max_response_tokens) == (2048, 32768)
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == (1.0, 1.0, 0)
    assert (optim.learning_rate, optim.b1, optim.b2, optim.eps) == (1e-6, 0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.decay, optim.clip_norm) == (0.1, "all", 1.0)
    assert (optim.warmup_iterations, optim.warmup_updates, optim.schedule) == (10, 0, "constant")
    assert (reward.overlong_buffer, reward.overlong_factor) == (16, 1.0)
    assert config.factories["aspo"] == {"clip_low": 0.2, "clip_high": 0.2, "cap": 3.0}
    assert config.factories["kl_penalty"] == {"beta": 1e-3, "estimator": "k3"}
    assert (config.objective.advantage, config.objective.aggregate) == (
        "group_zscore",
        "sequence_mean",
    )
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize("name", [n for n in LONG if n != "aspo_math_1p5b"])
def test_variants_differ_from_the_official_run_only_as_their_names_say(name):
    base, other = _read("aspo_math_1p5b").bindings(), _read(name).bindings()
    changed = {key for key in other if other[key] != base.get(key)}
    rule = {"Objective.name", "Objective.penalties", "Objective.aggregate"}
    rule |= {key for key in changed if key.split(".")[0] == other["Objective.name"]}
    code = {"Data.train_path", "Data.eval_path", "Reward.max_tests"}
    code |= {"Reward.test_timeout_s", "Reward.program_timeout_s"}
    code |= {"Evaluate.prompts", "Evaluate.samples"}
    small = {"Model.path", "Train.iterations", "Train.row_tokens"}
    small |= {"Sampler.max_response_tokens", "Sampler.slots"}
    allowed = rule | (code if "code" in name else set()) | (small if "qwen3" in name else set())
    assert changed <= allowed


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_packaged_shapes_have_the_published_sizes(path: Path):
    shape = parse_model_config(json.loads(path.read_text()), str(path))
    params = jax.eval_shape(build_model(shape).init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert round(count / 1e9, 2) == BILLIONS[path.stem]
    is_llama = path.stem.startswith("SmolLM2")
    assert shape.qk_norm == path.stem.startswith("Qwen3")
    assert shape.qkv_bias == (not is_llama and not shape.qk_norm)


def test_every_packaged_shape_is_known():
    assert {path.stem for path in SHAPES} == BILLIONS.keys()


@pytest.mark.usefixtures("has_cudnn")
def test_the_settings_of_the_model_are_what_the_model_knows():
    """A config is read without jax, so it cannot ask the model."""
    choices = typing.get_type_hints(sections.Model)
    assert set(typing.get_args(choices["remat"])) == REMAT.keys()
    for name in typing.get_args(choices["attention"]):
        assert any(_runs_on(platform, name) for platform in ("cpu", "gpu", "tpu"))


def _runs_on(platform: str, name: str) -> bool:
    sizes = {"head_dim": 128, "row_tokens": 128, "packed": False, "dtype": jnp.bfloat16}
    try:
        found = choose_attention(platform, **sizes, mesh=abstract_mesh((1, 1, 1)), name=name)
    except AttentionError:
        return False
    return name in (found.name, "auto")
