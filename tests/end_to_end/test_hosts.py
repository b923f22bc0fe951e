"""Several processes are one run: the same trajectory, an agreed stop, another number afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy import bits, toy_learner, toy_mesh
from trainer_runs import TRAP, last_checkpoint, metrics

from aspo_jax.export import export
from aspo_jax.learner import Learner
from aspo_jax.run.stop import EXIT_SAVED

LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"
ITERATIONS, STOPPED = 4, 3
# Compiling is most of these runs: LLVM takes it easy, in all that are compared.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
CURVES = ("update/surrogate", "update/grad_norm", "rollout/reward_mean", "update/entropy")


def devices(count: int) -> dict[str, str]:
    """The environment of a process with that many simulated devices."""
    plain = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return plain | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}


def start(*command: object, count: int, **environment: str) -> subprocess.Popen[str]:
    """In a session of its own, so that a test can end all that it started."""
    return subprocess.Popen(
        [str(word) for word in command],
        env=devices(count) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expect, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


@pytest.fixture(scope="module")
def flags(runs, finished):
    """Settings of a run that starts from a warm-started model."""

    def of(folder: Path, *more: str) -> list[str]:
        settings = (
            f"Run.folder='{folder}'",
            f"Model.path='{finished.folder / 'initial_model'}'",
            f"Train.iterations={ITERATIONS}",
            *more,
        )
        return ["--config", str(runs.config), *(x for s in settings for x in ("--set", s))]

    return of


def two_processes(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Of two devices each; environment: more of it, such as the PROGRAM of the launcher."""
    return start("bash", LOCAL, 2, *arguments, count=2, PYTHON=sys.executable, **environment)


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """One process with four devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(sys.executable, "-m", "aspo_jax.train", *flags(folder), count=4, **QUICK))
    return folder


@pytest.fixture
def four_devices(config, machines) -> Learner:
    """The update with its parameters and moments spread over four devices."""
    own = machines.parts
    return toy_learner(own.policy.model, own.goal, own.optimizer, toy_mesh(fsdp=4))


def assert_same_trajectory(folder: Path, expected: Path) -> None:
    """Every curve within 1e-5 of its largest value or 1e-7; what is counted and scored is equal."""
    ours, theirs = metrics(folder), metrics(expected)
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs]
    for name in CURVES:
        a, b = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        # A surrogate sums advantages of the size of 1 that nearly cancel.
        atol = max(1e-5 * np.abs(b).max(), 1e-7)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
    for one, other in zip(ours, theirs, strict=True):
        counted = [k for k in one if k.startswith(("rollout/", "evaluate/"))]
        # Each process fills rows of its own, so that more of them may end half empty.
        equal = set(counted) - {"rollout/packing_waste"}
        assert {k: one[k] for k in equal} == {k: other[k] for k in equal}


@pytest.mark.slow
def test_two_processes_say_what_a_smaller_export_costs(runs, finished, tmp_path):
    """A run that is over exports again: each process answers its share, one speaks."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    changes = ("Run.export_dtype='bfloat16'", "Run.accept_changes=True")
    settings = [f"Run.folder='{folder}'", *changes]
    words = ["--config", str(runs.config), *(x for s in settings for x in ("--set", s))]
    out, _ = finish(two_processes(*words))
    cost = export(folder, tmp_path / "alone").cost
    assert cost is not None and cost.startswith("export in bfloat16: ")
    assert out.count(cost) == 1
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()


def test_two_processes_train_as_one_stop_together_and_one_goes_on(
    flags, alone, machines, abstract_state, four_devices, tmp_path
):
    """2 x 2 devices = 1 x 4; SIGTERM to one process stops both; 1 x 1 continues what they saved."""
    folder = tmp_path / "run"
    draws = STOPPED + 2  # two evaluations draw before the iteration that is dropped
    trap = f"{TRAP[0]} aspo_jax.rollout:draw:{draws}:SIGTERM"
    two = two_processes(*flags(folder), PROGRAM=trap, **QUICK)
    out, err = finish(two, expect=EXIT_SAVED)
    assert out.count(f"stopped after {STOPPED} iterations, saved") == 1  # one process speaks
    assert err.count("SIGTERM: saving, then stopping") == 1
    assert len(metrics(folder)) == STOPPED

    one = last_checkpoint(folder, abstract_state)
    assert one.step == STOPPED and one.meta["data_position"] == STOPPED
    spread = last_checkpoint(folder, four_devices.state)
    assert len(spread.state.params["embed"].sharding.device_set) == 4
    assert bits(spread.state) == bits(one.state)

    finish(start(sys.executable, "-m", "aspo_jax.train", *flags(folder), count=1, **QUICK))
    assert_same_trajectory(folder, alone)


def test_devices_that_do_not_start_end_every_process_with_one_message():
    """The processes have met by then; none waits for the other."""
    started = two_processes("--config", "countdown_tiny", JAX_PLATFORMS="nonsense")
    _, err = finish(started, expect=2)
    said = "error: jax cannot start the devices of JAX_PLATFORMS=nonsense: Unable to initialize"
    assert err.count(said) == 2 and "Traceback" not in err, err


@pytest.mark.slow
def test_one_process_of_two_is_killed_and_both_go_on_bit_for_bit(flags, abstract_state, tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    finish(two_processes(*flags(undisturbed)))
    trap = f"{TRAP[0]} aspo_jax.train:update:{ITERATIONS}:SIGKILL"
    finish(two_processes(*flags(folder), PROGRAM=trap), expect=128 + signal.SIGKILL)
    assert last_checkpoint(folder, abstract_state).step < ITERATIONS
    finish(two_processes(*flags(folder)))
    found, expected = (last_checkpoint(f, abstract_state) for f in (folder, undisturbed))
    assert found.step == expected.step == ITERATIONS
    assert bits(found.state) == bits(expected.state)
    assert metrics(folder) == metrics(undisturbed)


@pytest.mark.slow
def test_two_processes_refill_a_step_as_one_does(flags, tmp_path):
    """They agree on the rounds and on the groups, wherever their prompts were sampled."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    refill = "Train.refill_rounds=2"
    own = (sys.executable, "-m", "aspo_jax.train", *flags(alone, refill))
    finish(start(*own, count=4, **QUICK))
    finish(two_processes(*flags(two, refill), **QUICK))
    assert_same_trajectory(two, alone)
    rounds = {row["rollout/rounds"] for row in metrics(two)[:ITERATIONS]}
    assert len(rounds) > 1 and max(rounds) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("Lora.weights='int8'", "Lora.is_merged=False", "Runtime.fsdp=2")],
    ids=["merged", "int8, unmerged, fsdp"],
)
def test_two_processes_train_an_adapter_as_one_does(flags, tmp_path, more):
    alone, two = tmp_path / "alone", tmp_path / "two"
    lora = ("Lora.rank=4", "Lora.alpha=6.0", "Optim.learning_rate=1e-2", *more)
    finish(start(sys.executable, "-m", "aspo_jax.train", *flags(alone, *lora), count=4, **QUICK))
    finish(two_processes(*flags(two, *lora), **QUICK))
    assert_same_trajectory(two, alone)
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (two, alone))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-4 * np.abs(x).max(), err_msg=name)
        assert name.endswith("A.weight") or x.any()  # B was moved
