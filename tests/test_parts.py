"""What a config names becomes values: goal, optimizer, and what is said of those that fail."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aspo_jax.build import check_inputs
from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.losses import ADVANTAGES, trace
from aspo_jax.parts import FACTORIES, build_goal, build_optimizer, check_rules

RULES = """
import optax
from aspo_jax.losses import Coefficient, Objective, ratio


def lion(learning_rate, axes, *, b1: float = 0.9):
    if b1 > 1:
        raise ValueError("too large")
    return optax.lion(learning_rate, b1=b1)


def no_optimizer(learning_rate, axes):
    return 3


def raises(learning_rate, axes):
    return axes["nowhere"]


def halves():
    return lambda reward_PG, is_valid_PG: reward_PG[:, :1] / 2


def others():
    return lambda reward_PG, is_valid_PG: reward_PG - reward_PG[1]


def nameless():
    return lambda reward_PG, is_valid_PG, lengths: reward_PG


def long_first():
    return lambda reward_PG, is_valid_PG, length_PG, past: reward_PG * length_PG


def stranger():
    return lambda reward_PG, is_valid_PG: reward_PG.missing
"""


def config_of(*flags: str) -> Config:
    return read_config([word for flag in flags for word in ("--set", flag)], FACTORIES)


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    name = f"parts_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_rule_used_twice_has_two_settings_and_metrics_of_its_own():
    twice = "Objective.penalties=['kl_penalty', 'kl_penalty.far']"
    goal = build_goal(config_of(twice, "kl_penalty.beta=0.1", "kl_penalty.far.beta=0.2"))
    one = build_goal(config_of("Objective.penalties=['kl_penalty']", "kl_penalty.beta=0.3"))
    assert set(trace(goal.objective)) == {*trace(one.objective), "ref_kl_far"}


def test_a_coupled_rule_takes_its_statistics_where_the_config_says():
    coupled = ("Objective.name=bapo", "Objective.penalties=['low_entropy_kl']")
    assert build_goal(config_of(*coupled)).objective.prepare
    own = build_goal(config_of(*coupled, "Objective.scope=microbatch")).objective
    assert own.prepare is None and "ratio_high" in trace(own)
    plain = build_goal(config_of("Objective.name=aspo", "Objective.scope=microbatch")).objective
    assert plain.prepare is None


def test_an_optimizer_of_anyones_updates_behind_the_clip(module):
    config = config_of(f"Optim.name={module}:lion", "lion.b1=0.5", "Optim.warmup_updates=0")
    optimizer, rate = build_optimizer(config, ())
    w = jnp.ones(3)
    change, _ = jax.jit(optimizer.update)(jnp.array([3.0, -4.0, 0]), optimizer.init(w), w)
    lion = optax.lion(rate, b1=0.5)
    expected: Any = lion.update(jnp.array([0.6, -0.8, 0]), lion.init(w), w)[0]
    np.testing.assert_allclose(change, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["Optim.name={m}:lion", "lion.b1=2"], "{m}:lion: too large"),
        (["Optim.name={m}:no_optimizer"], "the optimizer '{m}:no_optimizer' made 3, expected a"),
        (["Optim.name={m}:raises"], "the optimizer '{m}:raises' fails: KeyError: 'nowhere' at "),
        (["Optim.name=muon", "muon.momentum=2"], "muon.momentum = 2.0; expected a number from 0"),
        (["Objective.advantage={m}:halves"], "Objective.advantage: found advantages (2, 1) for"),
        (["Objective.advantage={m}:stranger"], "Objective.advantage: the rule fails: Attribute"),
        (
            ["Objective.advantage={m}:nameless"],
            "Objective.advantage: the rule has a parameter 'lengths', which nothing fills; behind"
            " rewards and which are valid it may have length_PG, parts, weights, past, or give it",
        ),
        (
            ["Objective.advantage=gdpo"],
            "Objective.advantage: the rule needs parts, which is None: the reward is made of one",
        ),
        (["Objective.advantage=passk", "passk.k=99"], "passk.k = 99; expected at most the 16"),
        (
            ["Objective.advantage={m}:others", "Train.refill_rounds=1"],
            "Objective.advantage: the rule fails: IndexError",
        ),
        (
            ["Objective.name=clip_cov", "Objective.scope=microbatch"],
            "Objective.scope = 'microbatch': Objective.name or one of Objective.penalties has a st",
        ),
        (["Reward.shapes=['{m}:lion']"], "the shape '{m}:lion' fails: TypeError: lion() missing"),
        (["adamw.b1=0.5"], "--set #1: adamw.b1 = 0.5: adamw.b1 is set as Optim.b1; write that"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_loaded(flags, message, module):
    with pytest.raises(ConfigError) as error:
        check_inputs(config_of(*(flag.format(m=module) for flag in flags)))
    assert message.format(m=module) in str(error.value)


def test_the_shipped_rules_pass():
    check_rules(config_of())


@pytest.mark.parametrize("name", [*sorted(ADVANTAGES.keys() - {"none"}), "{m}:long_first"])
def test_every_advantage_passes_where_it_has_what_it_asks_for(name, module):
    two = ("Reward.functions=['a:b', 'a:c']", "Reward.weights=[1, 2]")
    check_rules(config_of(f"Objective.advantage={name.format(m=module)}", *two))
