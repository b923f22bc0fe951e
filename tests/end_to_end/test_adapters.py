"""Runs that train an adapter: what they keep, how they go on, what becomes of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from toy import bits, toy_mesh
from trainer_runs import ITERATIONS, TRAP, last_checkpoint, metrics, transcripts

from aspo_jax import check as check_command
from aspo_jax import replay as replay_command
from aspo_jax.build import Machines, build_machines, check_inputs
from aspo_jax.config import Config, read_config
from aspo_jax.export import ExportError, export
from aspo_jax.files import read_sealed
from aspo_jax.library import load, score
from aspo_jax.loading import find_model, identity, load_weights
from aspo_jax.model import Lora, ModelFolderError, load_params, merge
from aspo_jax.model.peft import load_adapter
from aspo_jax.parts import FACTORIES, parts
from aspo_jax.run.records import ModelChanged

LORA = Lora(rank=4, alpha=6.0)
FLAGS = ("Lora.rank=4", "Lora.alpha=6.0", "Optim.learning_rate=1e-2")
INT8 = "Lora.weights='int8'"


def of_types(*int8_marks):
    """The flags of frozen weights in float32 and in int8."""
    each = (
        pytest.param(FLAGS, id="float32"),
        pytest.param((*FLAGS, INT8), id="int8", marks=int8_marks),
    )
    return pytest.mark.parametrize("flags", each, scope="module", indirect=True)


@pytest.fixture(scope="module")
def flags(request) -> tuple[str, ...]:
    return getattr(request, "param", FLAGS)


@pytest.fixture(scope="module")
def adapted(runs, once, flags) -> Path:
    """The folder of a run that nothing disturbed."""
    name = "adapted_int8" if INT8 in flags else "adapted"
    return once(name, lambda folder: runs.run(folder / "run", *flags)) / "run"


@pytest.fixture(scope="module")
def config(runs, flags) -> Config:
    words = [word for flag in flags for word in ("--set", flag)]
    return read_config(["--config", str(runs.config), *words], FACTORIES)


@pytest.fixture(scope="module")
def machines(config, adapted):
    mesh = toy_mesh()
    made: Machines = build_machines(config, parts(config, mesh), adapted / "initial_model", mesh)
    with made.collector.scorer:
        yield made


@pytest.fixture(scope="module")
def trained(machines, adapted) -> Any:
    return last_checkpoint(adapted, machines.learner.state).state.params


def test_a_run_keeps_its_adapter_alone(adapted, machines, trained):
    assert (adapted / "adapter").is_dir() and not (adapted / "model").exists()
    sizes = {name: sum(x.size for x in jax.tree.leaves(t)) for name, t in _trees(machines).items()}
    manifest = read_sealed(epath.Path(adapted / f"checkpoints/{ITERATIONS}/manifest.json"))
    kept = sum(int(np.prod(json.loads(x[x.index("[") :]))) for x in manifest["leaves"].values())
    assert 3 * sizes["adapter"] <= kept <= 3 * sizes["adapter"] + 8 < sizes["frozen"]
    assert machines.reference is machines.frozen  # no second copy
    fresh = machines.initial_params()
    assert bits(fresh) != bits(trained) and not np.any(fresh["layers"]["q"]["b"])


def _trees(machines: Machines) -> dict[str, Any]:
    return {"adapter": machines.learner.state.params, "frozen": machines.frozen}


@of_types(pytest.mark.slow)
def test_killed_it_goes_on_as_if_nothing_had_been(
    runs, flags, adapted, machines, trained, tmp_path
):
    folder = tmp_path / "run"
    trap = "aspo_jax.run.checkpoint:_seal:2:SIGKILL"  # step 4 is there, its manifest is not
    runs.run(folder, *flags, program=(*TRAP, trap), expect=-signal.SIGKILL)
    runs.run(folder, *flags)
    assert bits(last_checkpoint(folder, machines.learner.state).state.params) == bits(trained)
    assert metrics(folder) == metrics(adapted) and transcripts(folder) == transcripts(adapted)


@of_types()
def test_live_saved_and_merged_weights_have_one_evaluation(
    flags, adapted, machines, trained, tmp_path
):
    said = {k: v for k, v in metrics(adapted)[-1].items() if k.startswith("evaluate/")}
    found = export(adapted, tmp_path / "merged", is_merged=True)
    assert ("rounded" in str(found.base)) == (INT8 in flags)
    network = machines.parts.policy.model
    merged, live = load_params(tmp_path / "merged", network.config), machines.weights(trained)
    whole = jax.tree.map(lambda x: x.astype(np.float32), merge(live))
    assert bits(merged) == bits(whole)
    assert bits(merged) != bits(machines.frozen)
    for params in (live, merged):
        scores, _ = machines.evaluate(params)
        assert {f"evaluate/{k}": v for k, v in scores.items()} == said
    token_BT = np.random.RandomState(0).randint(3, 12, (4, 12))
    position_BT = np.broadcast_to(np.arange(12), (4, 12))
    hidden = [
        network.apply(params, token_BT, position_BT, np.ones_like(token_BT))[0]
        for params in (live, merged)
    ]
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-4)


def test_its_adapter_is_where_another_run_starts(adapted, machines, trained, tmp_path):
    found = export(adapted, tmp_path / "adapter")
    assert found == (ITERATIONS, None, "adapter", None)
    for folder in (tmp_path / "adapter", adapted / "adapter"):
        shape, key = machines.parts.policy.model.config, jax.random.key(0)
        assert bits(load_adapter(folder, shape, LORA, toy_mesh(), key)) == bits(trained)
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(adapted / "initial_model")


def test_an_adapter_is_checked_before_anything_is_loaded(config, adapted, tmp_path):
    def asked(**changes):
        lora = dataclasses.replace(config.lora, **changes)
        model = dataclasses.replace(config.model, path=str(adapted / "initial_model"))
        return check_inputs(dataclasses.replace(config, lora=lora, model=model))

    table = dict(asked(path=str(adapted / "adapter")))
    assert table["adapters"].startswith("rank 4, alpha 6, in attention and mlp, beside frozen")
    with pytest.raises(ModelFolderError, match=r"r is 4, and Lora.rank = 8; set Lora.rank to that"):
        asked(path=str(adapted / "adapter"), rank=8)
    with pytest.raises(ModelFolderError, match=r"nowhere.adapter_config.json: not found"):
        asked(path=str(tmp_path / "nowhere"))


def test_a_notebook_loads_one(adapted, machines, trained):
    folder = adapted / "initial_model"
    lora = (f"Lora.path='{adapted / 'adapter'}'", "Lora.rank=4", "Lora.alpha=6")
    model = load(folder, *lora)
    assert bits(model.params) == bits(machines.weights(trained))
    token = score(model, ["34:7"])[0].logp_T
    assert not np.array_equal(token, score(load(folder), ["34:7"])[0].logp_T)


def test_another_base_is_refused(runs, adapted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(adapted, folder)
    (folder / "initial_model" / "config.json").write_text(
        (folder / "initial_model" / "config.json").read_text().replace("{", "{ ", 1)
    )
    with pytest.raises(ModelChanged, match=r"config\.json changed"):
        export(folder, tmp_path / "out")
    _, err = runs.run(folder, *FLAGS, expect=2)
    assert "Delete that folder: the same command makes the same model again" in err


def test_what_cannot_be_exported(adapted, finished, tmp_path):
    with pytest.raises(ExportError, match="trained no adapter"):
        export(finished.folder, tmp_path / "out", is_merged=True)
    with pytest.raises(ExportError, match="adapters are written in float32"):
        export(adapted, tmp_path / "out", "bfloat16")


@of_types()
def test_commands_read_such_a_run(flags, adapted, config, machines, trained, capsys):
    named = find_model(str(adapted))
    loaded = load_weights(named, config, machines.parts.policy, toy_mesh())
    assert bits(merge(loaded)) == bits(merge(machines.weights(trained)))
    assert named.settings["Lora.rank"] == 4
    assert machines.frozen["layers"]["q"]["kernel"].dtype == named.settings["Lora.weights"]
    assert identity(named, config) != identity(find_model(str(adapted), 4), config)
    assert check_command.main([str(adapted), "--prompts", "2"]) == 0
    capsys.readouterr()
    flags = ["--objective", "aspo", "--objective", "ppo_clip", "--iteration", "2", "--json"]
    assert replay_command.main([str(adapted), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objectives"]["aspo"]["grad_norm"] > 0
