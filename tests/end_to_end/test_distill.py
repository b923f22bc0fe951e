"""A student is drawn to its teacher, with and without a reward, through stops and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy import TINY_CONFIG, bits, random_params, toy_mesh, toy_model
from trainer_runs import TRAP, Runs, last_checkpoint, metrics

from aspo_jax import train
from aspo_jax.build import build_machines, check_inputs
from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.data import CHARACTERS, build_character_tokenizer
from aspo_jax.model import load_params, save_model
from aspo_jax.parts import FACTORIES, parts
from aspo_jax.policy import load_policy, load_teacher
from aspo_jax.run.metrics import read_metrics
from aspo_jax.run.records import ModelChanged
from aspo_jax.run.stop import EXIT_SAVED

SETTINGS = (
    *TINY_CONFIG.strip().splitlines(),
    *("Train.iterations = 4", "Train.prompts_per_step = 8", "Train.prompts_per_minibatch = 4"),
    *("Train.epochs = 1", "Evaluate.every = 0", "Evaluate.prompts = 2", "Evaluate.samples = 2"),
    *("Checkpoint.every = 2", "Metrics.tensorboard = False", "Optim.learning_rate = 1e-2"),
    *("Optim.warmup_updates = 0", "Optim.schedule = 'constant'", "Train.samples_per_prompt = 8"),
    *("Objective.name = 'distill'", "Objective.advantage = 'none'", "Objective.penalties = ()"),
)


def save(folder: Path, characters: str = CHARACTERS, *, seed: int, rows: int = 0, **sizes: int):
    """A random model with a vocabulary of characters; rows: more of its embedding than tokens."""
    tokenizer = build_character_tokenizer(characters)
    model = toy_model(vocab_size=len(tokenizer) + rows, **sizes)
    save = tokenizer.save_pretrained
    save_model(folder, random_params(model, seed), model.config, save, eos_token_id=(2,))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A student, and a wider and shallower teacher with more rows of its embedding."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "student", seed=0)
    save(folder / "teacher", seed=1, rows=7, hidden_size=24, layers=1, heads=2, kv_heads=1)
    return folder


def config_of(models: Path, run: Path, *more: str, teacher: str | None = "teacher") -> Config:
    named = [f"Teacher.path = '{models / teacher}'"] if teacher else []
    settings: Any = jax.config
    own = (
        f"Model.path = '{models / 'student'}'",
        f"Run.folder = '{run}'",
        f"Runtime.compilation_cache = '{settings.jax_compilation_cache_dir}'",
    )
    flags = [
        word
        for s in (*SETTINGS, *own, *named, *more)
        for word in ("--set", s.replace(" = ", "=", 1))
    ]
    return read_config(["--config", "countdown_quick", *flags], FACTORIES)


def test_distilled_alone_it_learns_from_answers_that_are_all_wrong(models, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.train(config_of(models, run, "Train.iterations = 14")) == 0
    out = capsys.readouterr().out
    assert f"teacher               {models / 'teacher'}" in out and "aspo_jax.plot" in out
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "update/teacher_kl" in row]
    assert len(rows) == 14 and {row["rollout/valid_groups"] for row in rows} == {1.0}
    assert min(row["rollout/solve_none"] for row in rows) > 0.5  # groups of equal rewards
    kl = [row["update/teacher_kl"] for row in rows]
    # 1.7 -> 1.0 nats, each mean of three with an error of about 0.1
    assert 0 < np.mean(kl[-3:]) < 0.75 * np.mean(kl[:3])


def weights(models: Path, folder: Path):
    shape = toy_model(vocab_size=len(build_character_tokenizer(CHARACTERS))).config
    return bits(load_params(folder, shape))


@pytest.mark.parametrize("way", ["Objective.penalties = ('distill',)", "Teacher.advantage = 0.5"])
def test_beside_a_reward(models, tmp_path, way):
    run, mixed = tmp_path / "run", ("Objective.name = 'dapo'", "Objective.advantage = 'group_mean'")
    assert train.train(config_of(models, run, *mixed, way, "Train.iterations = 1")) == 0
    row = read_metrics(run / "metrics.jsonl")[0]
    assert row["update/teacher_kl"] > 0 and row["rollout/valid_groups"] == 1
    assert row["update/skipped_empty"] == 0
    assert weights(models, run / "model") != weights(models, models / "student")


def test_a_stopped_run_goes_on_with_its_teacher_and_with_no_other(models, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    (tmp_path / "distill.gin").write_text(config_of(models, whole).text())
    runs = Runs(tmp_path / "distill.gin")
    runs.run(whole)
    runs.run(folder, program=(*TRAP, "aspo_jax.train:update:2:SIGTERM"), expect=EXIT_SAVED)

    path = models / "teacher" / "model.safetensors"
    kept = path.read_bytes()
    save(models / "teacher", seed=2, rows=7, hidden_size=24, layers=1, heads=2, kv_heads=1)
    with pytest.raises(ModelChanged, match=f"{models / 'teacher'} is not .* The teacher is read"):
        train.train(config_of(models, folder))
    path.write_bytes(kept)
    with pytest.raises(ConfigError, match="another config:\nTeacher.path"):
        train.train(config_of(models, folder, teacher="student"))

    runs.run(folder)
    config, mesh = config_of(models, whole), toy_mesh()
    machines = build_machines(config, parts(config, mesh), models / "student", mesh)
    with machines.collector.scorer:
        expected, found = (last_checkpoint(f, machines.learner.state) for f in (whole, folder))
    assert found.step == expected.step == 4
    assert bits(found.state) == bits(expected.state)
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize(
    ("settings", "teacher", "message"),
    [
        ((), None, "Objective.name = 'distill' with its penalties reads a teacher, and Teacher.pa"),
        ((), "nowhere", "no config.json there; expected a Hugging Face model folder, or a name on"),
        ((), "stranger", "has other tokens than the policy, .*: id 3 is '>' there and '0' here; "),
        (("Objective.name = 'dapo'",), "teacher", "and no rule reads a teacher; name 'distill' in"),
        (("Objective.name = 'dapo'",), None, "Objective.advantage = 'none' leaves nothing to lear"),
    ],
)
def test_what_is_refused_at_the_start(models, tmp_path, settings, teacher, message):
    save(models / "stranger", CHARACTERS[::-1], seed=1)
    config = config_of(models, tmp_path / "run", *settings, teacher=teacher)
    with pytest.raises(ConfigError, match=message):
        check_inputs(config)


def test_its_distribution_has_the_policys_temperature_and_ids(models, tmp_path):
    """Of which the tokenizer decides; the rows of its embedding beyond them are never drawn."""
    config = config_of(models, tmp_path, "Sampler.temperature = 0.7", "Sampler.stop_ids = (0,)")
    policy = load_policy(config, config.model_folder, toy_mesh())
    head = load_teacher(config, policy, toy_mesh()).head
    assert head.temperature == 0.7 and head.is_allowed_V[0] and not head.is_allowed_V[1]
    assert head.is_allowed_V.tolist() == [*policy.head.is_allowed_V.tolist(), *[False] * 7]
    with pytest.raises(ConfigError, match="Teacher.path = .*teacher': Runtime.tensor = 2 does not"):
        load_teacher(config, policy, toy_mesh(tensor=2))
