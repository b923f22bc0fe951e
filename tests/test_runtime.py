"""Mesh sizes, the flags of a CPU process, the compilation cache."""

from __future__ import annotations

import os
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
