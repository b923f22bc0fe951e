"""The gate between sampler and trainer: what it measures, and what its command says."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TINY_CONFIG, examples, figures, minibatch

from aspo_jax import check
from aspo_jax.agreement import Gap, by_position, gap_metrics
from aspo_jax.config import read_config
from aspo_jax.config.reading import find_config

TINY = f"""
include '{{base}}'
{TINY_CONFIG}
Runtime.data = 1
Runtime.fsdp = -1
Runtime.compilation_cache = None
"""

PRECISION = "jax_default_matmul_precision"


def test_gaps_count_response_tokens_only():
    rows = minibatch(examples(), 1, 8, 32).rows
    places = np.argwhere(rows.is_response_BT)
    old = np.array(rows.sampler_logp_BT)
    old[~rows.is_response_BT] = 99.0
    old[tuple(places[0])] += 0.5
    old[tuple(places[5])] -= 0.1
    got = figures(gap_metrics(rows, jnp.asarray(old)))
    assert got["sampler_gap_mean"] == pytest.approx(0.6 / len(places), rel=1e-4)
    assert got["sampler_gap_max"] == pytest.approx(0.5)
    assert got["sampler_gap_outside"] == pytest.approx(1 / len(places))


def test_positions_in_octaves():
    log_ratio_n = np.array([0.0, 0.1, -0.3, 0.2, 0.0])
    found = list(by_position(log_ratio_n, np.array([0, 1, 3, 4, 5])))
    assert [(g.first, g.last, g.tokens) for g in found] == [
        *[(0, 5, 5), (0, 0, 1), (1, 1, 1), (2, 3, 1), (4, 5, 2)],
    ]
    assert found[0] == pytest.approx(Gap(0, 5, 5, 0.12, 0.3, 0.4))
    assert found[-1] == pytest.approx(Gap(4, 5, 2, 0.1, 0.2, 0.5))


def test_command_measures_both_types_and_says_who_is_wrong(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tiny.gin"
    path.write_text(TINY.format(base=find_config("countdown_quick")))
    argv = ["--config", str(path), "--set", "Sampler.cache_type='int8'", "--prompts", "4"]
    assert check.main(argv) == 0
    printed = capsys.readouterr().out
    assert "### float32" in printed and "cache int8" in printed
    assert printed.splitlines()[-1].startswith("sampler and trainer agree: float32 largest ")
    # Nothing but int8 pages can be this far off in float32, and they are.
    assert check.main([*argv, "--set", "Sampler.max_gap=1e-5"]) == 1
    assert "DISAGREE" in capsys.readouterr().out.splitlines()[-1]

    real, precisions = check.draw, []

    def wrong(*arguments, **more):
        precisions.append(getattr(jax.config, PRECISION))
        return [c._replace(logp_T=c.logp_T + 1e-3) for c in real(*arguments, **more)]

    monkeypatch.setattr(check, "draw", wrong)
    assert check.main(argv) == 1
    assert precisions == ["highest", None]  # a GPU's own float32 is off by more than the limit

    monkeypatch.setattr(check, "gaps", lambda *_: [Gap(0, 0, 1, math.nan, math.nan, 0.0)])
    assert check.main(argv) == 1


def test_command_reports_mistakes(capsys):
    assert check.main(["--config", "countdown_quick", "--set", "Sampler.top_p=0.9"]) == 2
    assert "Sampler.top_p = 0.9 biases training" in capsys.readouterr().err


def test_types_are_replaced_and_nothing_else():
    config = read_config(["--config", "countdown_quick"], check.FACTORIES)
    other = check.as_dtype(config, "bfloat16", "int8")
    assert (other.model.dtype, other.sampler.cache_type) == ("bfloat16", "int8")
    same = dataclasses.replace(other, model=config.model, sampler=config.sampler)
    assert same == config
