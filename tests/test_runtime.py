"""Devices that do not start, mesh sizes, the flags of a CPU process, the compilation cache."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from aspo_jax import runtime
from aspo_jax.runtime import EXACT_BFLOAT16, MeshError, compilations, make_mesh

CACHE_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def settings() -> dict[str, object]:
    return {name: getattr(jax.config, name) for name in CACHE_SETTINGS}


@pytest.fixture
def fresh(monkeypatch):
    """The test's own flags and cache settings; jax's are put back afterwards."""
    before = settings()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def start(**changes):
    return runtime.start(
        **{"data": -1, "fsdp": 1, "tensor": 1, "compilation_cache": None} | changes
    )


@pytest.mark.parametrize(
    "asked, sizes",
    [
        ({}, (4, 1, 1)),
        ({"data": -1, "fsdp": 2}, (2, 2, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 2, 2)),
        ({"data": 1, "tensor": -1}, (1, 1, 4)),
        ({"data": 2, "fsdp": 1, "tensor": 2}, (2, 1, 2)),
    ],
)
def test_the_rest_of_the_devices_goes_where_minus_one_is(asked, sizes):
    mesh = make_mesh(**asked)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert mesh.size == jax.device_count() == 4


@pytest.mark.parametrize(
    "asked, needs",
    [
        ({"data": 1}, "mesh data=1, fsdp=1, tensor=1 does not fit 4 device"),
        ({"data": 2, "fsdp": 4}, "mesh data=2, fsdp=4, tensor=1 does not fit 4 device"),
        ({"data": -1, "fsdp": 3}, "mesh data=-1, fsdp=3, tensor=1 does not fit 4 device"),
        ({"data": -1, "fsdp": -1}, "mesh data=-1, fsdp=-1, tensor=1 does not fit 4 device"),
        ({"data": 8, "tensor": -1}, "mesh data=8, fsdp=1, tensor=-1 does not fit 4 device"),
        ({"data": -1, "fsdp": 0}, "mesh data=-1, fsdp=0, tensor=1 does not fit 4 device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_with_both_numbers(asked, needs):
    with pytest.raises(MeshError, match=needs):
        make_mesh(**asked)


def test_exact_bfloat16_is_asked_for_on_a_cpu_and_a_users_word_is_kept(fresh):
    start()
    assert os.environ["XLA_FLAGS"] == EXACT_BFLOAT16
    fresh.setenv("XLA_FLAGS", "--xla_foo=1")
    start()
    assert os.environ["XLA_FLAGS"] == f"--xla_foo=1 {EXACT_BFLOAT16}"
    fresh.setenv("XLA_FLAGS", "--xla_allow_excess_precision=true")
    start()
    assert os.environ["XLA_FLAGS"] == "--xla_allow_excess_precision=true"
    fresh.setenv("XLA_FLAGS", "")
    fresh.setenv("JAX_PLATFORMS", "cuda,cpu")
    start()
    assert os.environ["XLA_FLAGS"] == ""


# --- devices that do not start ------------------------------------------------------------------

TWICE = """
from jax._src import hardware_utils
from aspo_jax import runtime
hardware_utils.has_visible_nvidia_gpu = lambda: False
for _ in range(2):
    try:
        runtime.join()
    except runtime.DeviceError as error:
        print(error)
"""


def run(platforms: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("platforms", "found"),
    [
        ("cpu,nonsense", "Unable to initialize backend 'nonsense': Backend 'nonsense' is not in"),
        ("cuda", "there is no GPU that it can see; expected devices with their plugin and driver"),
    ],
)
def test_a_second_try_does_not_go_on_with_the_devices_that_did_start(platforms, found):
    first, second = run(platforms, "-c", TWICE).stdout.splitlines()
    assert first == second
    assert first.startswith(f"jax cannot start the devices of JAX_PLATFORMS={platforms}: {found}")
    assert "nvidia-smi" in first and first.endswith("JAX_PLATFORMS=cpu runs on the CPU")


def test_devices_without_free_memory_do_not_start(monkeypatch):
    def refuse(x, device):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr("jax.extend.backend.clear_backends", lambda: None)  # other tests' arrays
    with pytest.raises(runtime.DeviceError, match="devices.*: RESOURCE_EXHAUSTED: Out of memory;"):
        runtime.join()


@pytest.mark.parametrize("command", ["train", "check"])
def test_no_rule_is_blamed_for_them(command, tmp_path):
    flags = ("--config", "countdown_tiny", "--set", f"Run.folder='{tmp_path / 'run'}'")
    error = run("nonsense", "-m", f"aspo_jax.{command}", *flags, expect=2).stderr
    assert error.startswith("error: jax cannot start the devices of JAX_PLATFORMS=nonsense: ")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("plot", "weights", "--objectives", "cispo", "--out", "."),
        ("conform", "aspo_jax.losses:cispo", "--expect", "cispo"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_the_cpu_alone_asks_for_no_other(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    run("nonsense", "-m", f"aspo_jax.{command}", *rest)


# --- compiling ----------------------------------------------------------------------------------


def test_compiled_programs_are_kept_where_the_config_says(fresh, tmp_path):
    fresh.setenv("HOME", str(tmp_path))
    start(compilation_cache="~/programs")
    folder = str(tmp_path / "programs")
    assert settings() == dict(zip(CACHE_SETTINGS, (folder, 0, -1), strict=True))
    start(compilation_cache=None)
    assert settings()[CACHE_SETTINGS[0]] == folder


def test_compilations_are_heard_when_they_begin_and_when_they_end():
    heard: list[tuple[Any, ...]] = []

    def strange_name(x):
        return x * 3 + 1

    def began(program: str) -> None:
        heard.append(("began", program))

    def ended(program: str, seconds: float) -> None:
        heard.append(("ended", program))
        assert seconds >= 0

    with compilations(began, ended):
        jax.jit(strange_name)(jnp.ones(7))
    jax.jit(lambda x: x * 5 + 2)(jnp.ones(9))
    assert [h for h in heard if h[1] == "strange_name"] == [
        ("began", "strange_name"),
        ("ended", "strange_name"),
    ]
    assert heard[-1] == ("ended", "strange_name")
