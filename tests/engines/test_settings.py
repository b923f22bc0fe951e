"""Settings of external engines: what is refused and why, and what a plan leaves out."""

from __future__ import annotations

import pytest

from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.engines.building import build_external
from aspo_jax.parts import FACTORIES, build_goal
from aspo_jax.plan import plan, report
from aspo_jax.planning.programs import SCORE, UPDATE
from aspo_jax.warmstart import cache_key

HERE = "Sampler.addresses=['http://127.0.0.1:8000']"


def read(*settings: str) -> Config:
    words = [word for setting in settings for word in ("--set", setting)]
    return read_config(["--config", "countdown_tiny", *words], FACTORIES)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ([HERE], "Sampler.addresses = .* is for an engine; set Sampler.engine to 'vllm'"),
        (["Sampler.command='x'"], "Sampler.command = 'x' is for an engine"),
        (["Sampler.served_model='x'"], "Sampler.served_model = 'x' is for an engine"),
        (["Sampler.engine=vllm"], "needs Sampler.addresses or Sampler.command, found neither"),
        (
            ["Sampler.engine=vllm", HERE, "Sampler.command='x {model} {port}'"],
            "needs Sampler.addresses or Sampler.command, found both",
        ),
        (
            ["Sampler.engine=vllm", "Sampler.addresses=['127.0.0.1:8000']"],
            "'127.0.0.1:8000' is none; write 'http://HOST:PORT'",
        ),
        (
            ["Sampler.engine=vllm", "Sampler.addresses=['http://a:1', 'http://a:1']"],
            "names 'http://a:1' twice; name it once",
        ),
        (
            ["Sampler.engine=vllm", "Sampler.command='vllm serve {model}'"],
            "Sampler.command = .* lacks {port}; write it where",
        ),
        (
            [
                *("Sampler.engine=sglang", HERE, "Runtime.coordinator='a:1'"),
                *("Runtime.num_processes=2", "Runtime.process_id=0"),
            ],
            "is for a run of one process, found Runtime.num_processes = 2",
        ),
        (["Sampler.engine=vllm", HERE, "Sampler.top_p=0.9"], "Sampler.top_p = 0.9 biases training"),
        (["Sampler.engine=trt"], "Sampler.engine.*expected one of 'vllm', 'sglang', 'aspo_jax'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        read(*settings)


def test_several_processes_are_refused_at_the_start_too(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="for a run of one process, found 2"):
        build_external(read("Sampler.engine=vllm", HERE), None, None)  # type: ignore[arg-type]


def test_a_warm_start_does_not_depend_on_the_engine():
    """It draws in its own process: a cached one serves runs with any engine."""
    assert cache_key(read("Sampler.engine=vllm", HERE)) == cache_key(read())


def test_corrections_are_switched_on_by_a_setting():
    goal = build_goal(read("Sampler.engine=vllm", HERE, "Objective.penalties=['tis']"))
    assert goal.objective.coefficient is not build_goal(read()).objective.coefficient
    read("Sampler.engine=vllm", HERE, "Objective.penalties=['mis']", "mis.high=2.0")


def test_a_plan_counts_no_sampler():
    found = plan(read("Sampler.engine=vllm", HERE), "cpu:1", lower_only=True)
    assert [row.program for row in found.rows] == [UPDATE, SCORE]
    text = report(found)
    assert "sampler: vllm, an engine whose memory and time are not counted here" in text
    assert "weights for sampling" not in text
