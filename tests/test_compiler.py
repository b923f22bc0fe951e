"""Options of the update's compiler: told where they are known, named where they are not."""

from __future__ import annotations

import types
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest
import toy

from aspo_jax import compiler
from aspo_jax.learner import Goal
from aspo_jax.losses import aspo, sequence_mean
from aspo_jax.model.sharding import abstract_mesh
from aspo_jax.steps import introduce

NONSENSE = "xla_cpu_no_such_option"
MODEL = toy.toy_model(layers=1)


@pytest.fixture
def learner_of_an_older_xla(monkeypatch):
    monkeypatch.setattr(compiler, "_ONE_BY_ONE", (NONSENSE, True))
    return toy.toy_learner(MODEL, Goal(aspo(), sequence_mean), optax.sgd(1.0))


def test_a_cpu_is_told_to_finish_one_array_before_the_next():
    options = compiler.update_options(toy.toy_mesh())
    assert list(options.known) == ["xla_cpu_scheduler_type"] and options.unknown == ()
    assert options.said == "xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


def test_what_an_xla_does_not_know_is_left_out_and_named(learner_of_an_older_xla):
    options = learner_of_an_older_xla.options
    assert options.known == {} and options.unknown == (NONSENSE,)
    assert options.said == f"{NONSENSE} left out, for this XLA does not know it"


def test_and_the_update_compiles_without_it(learner_of_an_older_xla):
    learner = learner_of_an_older_xla
    part = toy.minibatch(toy.examples(), 1, 8, 32)
    part = toy.with_old(learner, toy.random_params(MODEL), part)
    assert learner.step.lower(learner.state, part).compile() is not None


def test_a_run_says_it(learner_of_an_older_xla):
    said: list[str] = []
    policy = types.SimpleNamespace(model=MODEL)
    machines = types.SimpleNamespace(
        learner=learner_of_an_older_xla,
        parts=types.SimpleNamespace(policy=policy, sampler=None),
        frozen=None,
    )
    config: Any = types.SimpleNamespace(train=types.SimpleNamespace(old_logp="score"))
    introduce(config, cast(Any, machines), cast(Any, types.SimpleNamespace(note=said.append)))
    assert f"compiler options of the update: {NONSENSE} left out" in "\n".join(said)


def test_another_failure_of_the_compiler_is_not_taken_for_that(monkeypatch):
    class Broken:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(compiler.jax, "jit", lambda *_, **__: types.SimpleNamespace(lower=Broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no room"):
        compiler._is_known.__wrapped__(toy.toy_mesh(), NONSENSE, True)


@pytest.mark.parametrize("sizes, is_told", [((1, 16, 1), 1), ((1, 1, 1), 0), ((1, 8, 2), 0)])
@pytest.mark.parametrize(
    "platform, option",
    [
        ("tpu", {"xla_tpu_enable_windowed_einsum_for_all_gather": False}),
        ("gpu", {"xla_gpu_reduce_scatter_combine_threshold_bytes": "1"}),
    ],
)
def test_what_is_told_where_chips_share_the_weights(platform, option, sizes, is_told):
    """Not on one chip, where nothing is exchanged, nor over a tensor axis."""
    devices = np.full(sizes, types.SimpleNamespace(platform=platform), object)
    names = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    mesh: Any = types.SimpleNamespace(devices=devices, size=devices.size, shape=names)
    assert compiler._wanted(mesh) == (option if is_told else {})


def test_without_devices_there_is_nothing_to_tell():
    assert compiler.update_options(abstract_mesh((1, 16, 1))) == compiler.Options({})
    assert compiler.Options({}).said == ""
