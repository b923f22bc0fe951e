"""What ends a response: read from the model folder, sampled, kept in the softmax and exported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TINY_CONFIG, bits, toy_mesh

from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.data import load_tokenizer
from aspo_jax.head import logp_and_entropy
from aspo_jax.model import ModelFolderError, load_params
from aspo_jax.parts import FACTORIES, build_sampler
from aspo_jax.policy import Policy, load_policy, save_policy, stop_ids
from aspo_jax.sampler import STOP, TRAIN, Request

PAD, BOS, EOS = 0, 1, 2
QUESTION = [1, 4, 18, 5, 19, 6, 20]  # <bos>1 2:3>


def config_of(*extra: str) -> Config:
    settings = (*TINY_CONFIG.strip().splitlines(), *extra)
    flags = [word for setting in settings for word in ("--set", setting.replace(" = ", "="))]
    return read_config(["--config", "countdown_quick", *flags], FACTORIES)


@pytest.fixture
def folder(tmp_path):
    """A new model's folder, as the warm start writes it."""
    policy = load_policy(config_of(), None, toy_mesh())
    save_policy(policy, jax.jit(policy.model.init)(jax.random.key(0)), tmp_path / "model")
    return tmp_path / "model"


def says(folder, eos) -> None:
    raw = {"eos_token_id": eos, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(raw))


def load(folder, *extra: str) -> tuple[Config, Policy]:
    config = config_of(*extra)
    return config, load_policy(config, folder, toy_mesh())


@pytest.mark.parametrize(
    ("eos", "extra", "expected"),
    [
        (2, [], (2,)),
        (None, [], (2,)),
        ([2, 0], [], (2, 0)),
        ([0, 2, 1], [], (2, 0, 1)),
        (17, [], (2, 17)),
        ([2, 0], ["Sampler.stop_ids=(17, 0)"], (2, 0, 17)),
    ],
)
def test_ids_of_tokenizer_folder_and_config_together(folder, eos, extra, expected):
    says(folder, eos)
    _, policy = load(folder, *extra)
    assert policy.stop_ids == expected
    is_allowed_V = policy.head.is_allowed_V
    assert [is_allowed_V[i] for i in (PAD, BOS)] == [PAD in expected, BOS in expected]
    assert is_allowed_V[2:21].all()


def test_a_folder_that_says_nothing_has_the_tokenizers(folder):
    (folder / "generation_config.json").unlink()
    assert load(folder)[1].stop_ids == (EOS,)


@pytest.mark.parametrize("eos", [-1, 21, "2", True, [2, None], [2, 99], {"id": 2}])
def test_nonsense_in_the_folder_is_named(folder, eos):
    says(folder, eos)
    with pytest.raises(ModelFolderError, match=r"generation_config.json: eos_token_id is .* 0 to"):
        load(folder)


def test_ids_beyond_the_tokenizer_are_named(folder):
    with pytest.raises(ConfigError, match=r"Sampler.stop_ids = .*found 21, expected .* 0 to 20"):
        load(folder, "Sampler.stop_ids=(2, 21)")


def test_a_pad_that_ends_responses_is_sampled_scored_and_learned(folder):
    says(folder, [EOS, PAD])
    config, policy = load(folder)
    params = load_params(folder, policy.model.config)
    sampler = build_sampler(config, policy, toy_mesh())
    sampler.start(params)
    drawn = list(sampler.sample([Request(QUESTION, (TRAIN, 0, 0, g)) for g in range(200)]))
    lasts = {int(c.tokens_T[-1]) for c in drawn if c.ending == STOP}
    assert lasts == {EOS, PAD}
    assert all(not np.isin(c.tokens_T[:-1], (EOS, PAD)).any() for c in drawn)
    ended = next(c for c in drawn if c.tokens_T[-1] == PAD and c.ending == STOP)
    assert policy.decode(ended.tokens_T) == policy.decode(ended.tokens_T[:-1])

    token_BT = np.array([[*QUESTION, *ended.tokens_T]], np.int32)
    input_BT, target_BT = token_BT[:, :-1], token_BT[:, 1:]
    position_BT = np.arange(input_BT.shape[1], dtype=np.int32)[None]
    hidden_BTD, _ = policy.model.apply(params, input_BT, position_BT, np.ones_like(input_BT))
    weight_VD = policy.model.unembedding(params)
    logp_BT, _ = logp_and_entropy(policy.head, weight_VD, hidden_BTD, jnp.asarray(target_BT))
    np.testing.assert_allclose(logp_BT[0, len(QUESTION) - 1 :], ended.logp_T, atol=1e-4)


def test_the_export_ends_where_the_run_did(folder, tmp_path):
    says(folder, [0, 2])
    _, policy = load(folder, "Sampler.stop_ids=(17,)")
    params = load_params(folder, policy.model.config)
    save_policy(policy, params, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert raw == {"eos_token_id": [17, 0, 2], "temperature": 0.7}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == EOS
    assert set(load(tmp_path / "out")[1].stop_ids) == {0, 2, 17}
    assert bits(load_params(tmp_path / "out", policy.model.config)) == bits(params)
    policy = load_policy(config_of("Sampler.stop_ids=(17,)"), None, toy_mesh())
    save_policy(policy, params, tmp_path / "new")
    raw = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert raw["eos_token_id"] == [EOS, 17]


MODEL = os.environ.get("ASPO_TEST_MODEL", "")


@pytest.mark.skipif(not MODEL, reason="ASPO_TEST_MODEL names no model folder")
def test_a_published_folder_ends_as_it_says():
    said: Any = json.loads((Path(MODEL) / "generation_config.json").read_text())["eos_token_id"]
    tokenizer: Any = load_tokenizer(MODEL)
    found = stop_ids(config_of(), tokenizer, MODEL)
    assert found[0] == tokenizer.eos_token_id
    assert {*found[1:]} == {*np.ravel(said).tolist()} - {found[0]}
