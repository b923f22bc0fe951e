"""Adapter folders: round trips, what is refused, and the `peft` package and vLLM themselves.

ASPO_PEFT=PYTHON pytest -m slow -n 0 tests/model/test_peft.py     an interpreter with peft
ASPO_VLLM=VLLM pytest -m slow -n 0 tests/model/test_peft.py       an executable
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from servers import MODEL, vllm, write_toy
from toy import CONFIG, bits, random_adapter, random_params, toy_mesh, toy_model

from aspo_jax.model import (
    Lora,
    ModelFolderError,
    build_model,
    load_params,
    merge,
    read_model_config,
    save_model,
    trained_part,
)
from aspo_jax.model.lora import attach
from aspo_jax.model.peft import Base, load_adapter, save_adapter

LORA = Lora(rank=3, alpha=5.0)
KEY = jax.random.key(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_adapter(tmp_path / "adapter", random_adapter(LORA, CONFIG), CONFIG, LORA, Base("base"))
    return tmp_path / "adapter"


def load(folder: Path, lora: Lora = LORA, **sizes: int) -> Any:
    return load_adapter(folder, CONFIG, lora, toy_mesh(**sizes), KEY)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=["alone", "four devices"])
def test_round_trip_is_bitwise(folder, sizes):
    read = load(folder, **sizes)
    assert bits(read) == bits(random_adapter(LORA, CONFIG))
    assert len(read["layers"]["q"]["b"].sharding.device_set) == (4 if sizes else 1)


def test_names_and_shapes_are_those_of_peft(folder):
    adapter, tensors = random_adapter(LORA, CONFIG), load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 7 * 2 * CONFIG.layers
    place = "base_model.model.model.layers.1."
    a = tensors[place + "self_attn.o_proj.lora_A.weight"]
    assert np.array_equal(a, adapter["layers"]["o"]["a"][1].reshape(16, 3).T)
    b = tensors[place + "self_attn.q_proj.lora_B.weight"]
    assert np.array_equal(b, adapter["layers"]["q"]["b"][1].reshape(3, 16).T)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (3, 5, False)


def test_a_matrix_without_an_adapter_gets_a_new_one(folder):
    def only_queries(tensors):
        for name in [name for name in tensors if ".q_proj." not in name]:
            del tensors[name]

    edit_tensors(folder, only_queries)
    read, adapter = load(folder)["layers"], random_adapter(LORA, CONFIG)["layers"]
    assert bits(read["q"]) == bits(adapter["q"])
    assert read["up"]["a"].any() and not read["up"]["b"].any()


NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


def test_tensors_that_do_not_fit(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: tensors[NAME][:, :2].copy()}))
    with pytest.raises(ModelFolderError, match=r"lora_B.weight has shape \(24, 2\), expected \(24"):
        load(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ModelFolderError, match=r"missing .*up_proj.lora_B.weight \(24, 3\)"):
        load(folder)
    with pytest.raises(ModelFolderError, match=r"Lora.targets = 'attention' .*\n  surplus .*mlp"):
        load(folder, LORA._replace(targets="attention"))


def test_numbers_that_are_not_finite(folder):
    edit_tensors(folder, lambda tensors: tensors[NAME].fill(np.nan))
    with pytest.raises(ModelFolderError, match=r"up_proj.* holds numbers that are not finite"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"r is 8, and Lora.rank = 3; set Lora.rank to that"),
        ({"lora_alpha": 16}, r"lora_alpha is 16, and Lora.alpha = 5.0"),
        ({"use_rslora": True}, r"use_rslora is True, and Lora.is_rank_stabilised = False"),
        ({"use_dora": True}, r"use_dora is True, expected False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], expected None"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern is"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3', expected 'LORA'"),
    ],
)
def test_settings_that_mean_something_else(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ModelFolderError, match=message):
        load(folder)


def test_what_is_no_adapter(tmp_path, folder):
    with pytest.raises(
        ModelFolderError, match=r"adapter_config.json: not found; expected the fold"
    ):
        load(tmp_path / "nowhere")
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelFolderError, match=r"adapter_model.safetensors: .*copy the folder"):
        load(folder)


# --- the package itself ------------------------------------------------------------------------

PROGRAM = """
import json, sys, torch, peft, transformers
base, ours, theirs = sys.argv[1:]
token_BT = torch.tensor(json.loads(sys.stdin.read()))

def fresh():
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()

def logp(model):
    with torch.no_grad():
        return torch.log_softmax(model(token_BT).logits, -1).tolist()

of_ours = logp(peft.PeftModel.from_pretrained(fresh(), ours))
torch.manual_seed(0)
settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
model = peft.get_peft_model(fresh(), settings)
for name, x in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(x, std=0.2)
model.save_pretrained(theirs)
print(json.dumps([logp(fresh()), of_ours, logp(model.eval())]))
"""


@pytest.mark.slow
def test_peft_reads_ours_and_we_read_theirs(tmp_path, folder):
    python = os.environ.get("ASPO_PEFT")
    if not python:
        pytest.skip("ASPO_PEFT is not set: the path of a Python that has peft")
    model, frozen = toy_model(), random_params(toy_model())
    save_model(tmp_path / "base", frozen, CONFIG, lambda folder: None, eos_token_id=2)
    token_BT = np.random.RandomState(0).randint(3, 20, (2, 9))
    arguments = [python, "-c", PROGRAM, *(str(x) for x in (tmp_path / "base", folder))]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    done = subprocess.run(
        [*arguments, str(tmp_path / "theirs")],
        input=json.dumps(token_BT.tolist()),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    base, of_ours, of_theirs = map(np.array, json.loads(done.stdout.splitlines()[-1]))

    def logp(params):
        position_BT = np.broadcast_to(np.arange(9), token_BT.shape)
        hidden, _ = model.apply(params, token_BT, position_BT, np.ones_like(token_BT))
        return np.asarray(jax.nn.log_softmax(hidden @ model.unembedding(params).T))

    ours = attach(random_adapter(LORA, CONFIG), frozen, LORA.scale)
    theirs = trained_part(model, LORA).whole(load(tmp_path / "theirs"), frozen)
    for params, expected in ((ours, of_ours), (theirs, of_theirs)):
        np.testing.assert_allclose(logp(params), expected, atol=1e-4)
        np.testing.assert_allclose(logp(merge(params)), expected, atol=1e-4)
        assert np.abs(expected - base).max() > 0.1


@pytest.mark.slow
def test_vllm_serves_ours(tmp_path):
    if "ASPO_VLLM" not in os.environ:
        pytest.skip("ASPO_VLLM is not set: the path of a vllm executable")
    base = write_toy(tmp_path / "base")
    shape, lora = read_model_config(base), Lora(rank=8, alpha=12.0)
    adapter, model = random_adapter(lora, shape), build_model(shape)
    save_adapter(tmp_path / "adapter", adapter, shape, lora, Base(str(base)))
    token_T = np.random.RandomState(0).randint(5, 90, 12)
    body = {"prompt": token_T.tolist(), "max_tokens": 1, "logprobs": 0, "echo": True}
    flags = (
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        f"ours={tmp_path / 'adapter'}",
    )
    with vllm(base, tmp_path / "log", *flags) as served:
        found = [
            served.ask("/v1/completions", body | {"model": name})["choices"][0]["logprobs"]
            for name in (MODEL, "ours")
        ]
    plain, adapted = (np.array(each["token_logprobs"][1:12], np.float32) for each in found)
    params = load_params(base, shape)

    def logp_T(params):
        token_BT, position_BT = token_T[None], np.arange(12)[None]
        hidden, _ = model.apply(params, token_BT, position_BT, np.ones_like(token_BT))
        logp_BTV = jax.nn.log_softmax(hidden @ model.unembedding(params).T)
        return np.asarray(logp_BTV[0, np.arange(11), token_T[1:]])

    np.testing.assert_allclose(plain, logp_T(params), atol=1e-3)
    np.testing.assert_allclose(adapted, logp_T(attach(adapter, params, lora.scale)), atol=1e-3)
    assert np.abs(plain - adapted).max() > 0.1
