"""Laws of the advantages, and the values of each by hand."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aspo_jax.losses import (
    ADVANTAGES,
    Groups,
    Past,
    UnfitReward,
    advantages_of,
    asks,
    batch_zscore,
    gdpo,
    group_mean,
    group_zscore,
    grpo_passk,
    leave_one_out,
    maxrl,
    opo,
    passk,
    prompt_smooth,
    shifted_mean,
    token_group_zscore,
    visited,
)

RULES = {**ADVANTAGES, "zscore_ddof0": partial(group_zscore, ddof=0, eps=0.0)}
every_rule = pytest.mark.parametrize("name", RULES)
VALID = np.ones((1, 4), bool)


def all_valid(reward) -> np.ndarray:
    return np.ones(np.shape(reward), bool)


def groups_of(reward, is_valid=None, length=None, past=None) -> Any:
    """Groups with all that a rule may ask for; the reward is made of two parts."""
    reward = np.asarray(reward, np.float32)
    P = len(reward)
    half = reward / 2
    return Groups(
        reward,
        all_valid(reward) if is_valid is None else is_valid,
        np.full(reward.shape, 7.0) if length is None else length,
        {"a": half, "b": half},
        {"a": 1.0, "b": 1.0},
        Past(np.zeros(P), np.zeros(P), np.zeros(P)) if past is None else past,
    )


def of(name: str, groups: Any) -> np.ndarray:
    return np.asarray(advantages_of(RULES[name](), groups))


def random_rewards(name: str, rng: np.random.Generator, shape) -> np.ndarray:
    if name == "passk":
        return rng.integers(0, 2, shape).astype(np.float32)
    reward = rng.normal(size=shape)
    return np.abs(reward) if name == "maxrl" else reward


def random_groups(name: str, shape=(20, 8)) -> Any:
    rng = np.random.default_rng(0)
    reward, is_valid = random_rewards(name, rng, shape), rng.random(shape) < 0.8
    is_valid[:, :5] = True
    past = Past(rng.integers(0, 4, shape[0]), rng.normal(size=shape[0]), rng.random(shape[0]))
    return groups_of(reward, is_valid, rng.integers(1, 90, shape), past)


def changed(groups: Any, change: Any) -> Any:
    """The groups with each array of samples changed."""
    parts = {name: change(x) for name, x in groups.parts.items()}
    first = {name: change(getattr(groups, name)) for name in Groups._fields[:3]}
    return groups._replace(**first, parts=parts)


@every_rule
def test_masked_samples_get_nothing_and_change_nothing(name):
    groups = random_groups(name)
    found, is_valid = of(name, groups), groups.is_valid_PG
    assert found.dtype == np.float32 and found.shape == is_valid.shape
    assert np.isfinite(found).all() and (found[~is_valid] == 0).all()

    def spoil(x):
        return x if x.dtype == bool else np.where(is_valid, x, np.nan)

    np.testing.assert_array_equal(of(name, changed(groups, spoil)), found)


@every_rule
def test_a_group_is_that_of_its_valid_samples(name):
    """Rows of one mask, so that the masked columns can be cut off."""
    groups = random_groups(name)
    is_valid = np.arange(8) < 6
    masked = changed(groups, lambda x: np.where(is_valid, x, 0).astype(x.dtype))
    cut = changed(masked, lambda x: x[:, :6])
    np.testing.assert_allclose(of(name, masked)[:, :6], of(name, cut), rtol=2e-6, atol=1e-6)
    nobody = masked._replace(is_valid_PG=np.zeros((20, 8), bool))
    assert (of(name, nobody) == 0).all()


@every_rule
def test_the_order_of_samples_and_prompts_is_nothing(name):
    groups, rng = random_groups(name), np.random.default_rng(1)
    p, g = rng.permutation(20), rng.permutation(8)
    moved = changed(groups, lambda x: x[p][:, g])
    moved = moved._replace(past=Past(*(x[p] for x in groups.past)))
    np.testing.assert_allclose(of(name, moved), of(name, groups)[p][:, g], rtol=1e-5, atol=1e-6)


SUMS = ("group_mean", "group_zscore", "leave_one_out", "maxrl", "passk", "batch_zscore", "gdpo")


@pytest.mark.parametrize("name", (*SUMS, "zscore_ddof0"))
def test_they_sum_to_zero_over_the_samples(name):
    np.testing.assert_allclose(of(name, random_groups(name)).sum(-1), 0, atol=1e-5)


@pytest.mark.parametrize("rule", [opo(), token_group_zscore(limit=100.0)])
def test_they_sum_to_zero_over_the_tokens(rule):
    groups = random_groups("opo")
    found = np.asarray(advantages_of(rule, groups))
    np.testing.assert_allclose((found * groups.length_PG).sum(-1), 0, atol=3e-4)


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"shifted_mean"}))
def test_equal_rewards_give_exact_zeros(name):
    """With lengths that differ, at the first visit, beside a group that has a signal."""
    rewards = (0.0, 1.0) if name == "passk" else (0.1, 1 / 3, 0.0, 1e6)
    rewards += () if name in ("passk", "maxrl") else (-1e6,)
    for equal in rewards:
        reward = np.full((2, 7), equal)
        reward[1, 0] = 0.0 if equal else 1.0
        found = of(name, groups_of(reward, length=np.arange(14).reshape(2, 7)))
        assert (found[0] == 0).all()


ALONE = {name: 0.0 for name in ("gdpo", "grpo_passk", "maxrl", "prompt_smooth", "passk", "none")}
ALONE |= {"token_group_zscore": 0.0, "shifted_mean": 1.1}


@every_rule
def test_a_single_valid_sample(name):
    """It keeps its reward, but where the docstring says otherwise."""
    reward, is_valid = np.array([[1.0, 5.0, 5.0, 5.0]]), np.array([[True, False, False, False]])
    found = of(name, groups_of(reward, is_valid))
    np.testing.assert_allclose(found, [[ALONE.get(name, 1.0), 0, 0, 0]], rtol=2e-4)


def test_group_values():
    reward = np.array([[1.0, 0.0, 0.0, 0.0]])
    std = np.std(reward, ddof=1)
    np.testing.assert_allclose(
        group_zscore()(reward, VALID), (reward - 0.25) / (std + 1e-6), rtol=1e-6
    )
    np.testing.assert_allclose(
        group_zscore(ddof=0, eps=0.1)(reward, VALID),
        (reward - 0.25) / (np.std(reward) + 0.1),
        rtol=1e-6,
    )
    np.testing.assert_allclose(group_mean()(reward, VALID), reward - 0.25)
    np.testing.assert_allclose(shifted_mean()(reward, VALID), reward - 0.15, rtol=1e-6)
    np.testing.assert_allclose(
        leave_one_out()(reward, VALID), [[1.0, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6
    )
    np.testing.assert_allclose(maxrl()(reward, VALID), [[3.0, -1, -1, -1]], rtol=1e-6)


def test_binary_groups_of_sixteen():
    """One right of sixteen: +3.75 and -0.25, as in the ASPO runs."""
    reward = np.eye(1, 16)
    found = np.asarray(group_zscore()(reward, np.ones((1, 16), bool)))
    np.testing.assert_allclose(found[0, :2], [3.75, -0.25], rtol=1e-4)


@pytest.mark.parametrize(("ddof", "size"), [(0, 1.0), (1, 0.70711)])
def test_two_samples(ddof, size):
    """2-GRPO: the size of a pair's advantages is the choice of ddof."""
    reward = np.array([[1.0, 0.0], [1.0, 1.0]])
    found = group_zscore(ddof=ddof, eps=0.0)(reward, all_valid(reward))
    np.testing.assert_allclose(found, [[size, -size], [0, 0]], rtol=1e-5)


def test_a_group_that_is_too_small_to_leave_one_out():
    reward, is_valid = np.array([[1.0, 0.0, 0.0]] * 2), np.array([[True] * 3, [True, True, False]])
    found = leave_one_out(min_valid=3)(reward, is_valid)
    np.testing.assert_allclose(found, [[1, -0.5, -0.5], [0, 0, 0]])


def test_opo_by_hand():
    """Mean over tokens: (1 x 30 + 0 x 10) / 40 = 0.75."""
    reward, length = np.array([[1.0, 0.0]]), np.array([[30, 10]])
    np.testing.assert_allclose(opo()(reward, all_valid(reward), length), [[0.25, -0.75]])


def test_a_zscore_over_tokens_by_hand():
    """Mean 0.75, standard deviation sqrt(0.75 x 0.25); a far one falls back to the group's."""
    reward, length = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[30, 10], [1, 99]])
    found = np.asarray(token_group_zscore(eps=0.0)(reward, all_valid(reward), length))
    std = np.sqrt(0.75 * 0.25)
    np.testing.assert_allclose(found[0], [0.25 / std, -0.75 / std], rtol=1e-6)
    np.testing.assert_allclose(found[1], [0.70711, -0.70711], rtol=1e-5)  # it was 0.99 / 0.0995
    free = np.asarray(token_group_zscore(eps=0.0, limit=10.0)(reward, all_valid(reward), length))
    np.testing.assert_allclose(free[1], [9.9499, -0.1005], rtol=1e-3)


def test_a_zscore_of_the_batch_by_hand():
    reward = np.array([[1.0, 0.0], [1.0, 1.0]])
    found = batch_zscore(eps=0.0)(reward, all_valid(reward))
    np.testing.assert_allclose(found, [[1.0, -1.0], [0, 0]], rtol=1e-6)  # std of 1, 0, 1, 1: 0.5


def test_the_best_of_k_gets_its_lead():
    reward = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    found = grpo_passk(is_scaled=False)(reward, all_valid(reward))
    np.testing.assert_allclose(found, [[1.0, 0, 0], [0, 0, 0]])
    scaled = grpo_passk(eps=0.0)(2 * reward, all_valid(reward))  # std of 6, 2, 4: 2
    np.testing.assert_allclose(scaled, [[1.0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("right", "of_right", "of_wrong"),
    [(1, 1.732, -0.115), (4, 0.611, -0.204), (8, 0.200, -0.200), (13, 0, 0), (16, 0, 0), (0, 0, 0)],
)
def test_passk_of_sixteen(right, of_right, of_wrong):
    reward = (np.arange(16) < right).astype(np.float32)[None]
    found = np.asarray(passk(k=4)(reward, all_valid(reward)))[0]
    np.testing.assert_allclose(found[:right], of_right, atol=1e-3)
    np.testing.assert_allclose(found[right:], of_wrong, atol=1e-3)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("right", [1, 3])
def test_passk_is_the_mean_over_all_subsets(right, k):
    """Every subset's reward as a z-score among the subsets, given to each of its samples."""
    reward = np.arange(6) < right
    subsets = [np.array(s) for s in combinations(range(6), k)]
    score = np.array([float(reward[s].any()) for s in subsets])
    found = np.asarray(passk(k=k, eps=0.0)(reward[None], all_valid(reward[None])))[0]
    if score.std() == 0:
        assert right > 6 - k and (found == 0).all()
        return
    score = (score - score.mean()) / score.std()
    expected = [
        np.mean([x for x, s in zip(score, subsets, strict=True) if i in s]) for i in range(6)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_passk_without_k_valid_samples_has_no_signal():
    reward, is_valid = np.eye(2, 4), np.array([[True] * 4, [True, True, False, False]])
    found = np.asarray(passk(k=3)(reward, is_valid))
    assert (found[0] != 0).all() and (found[1] == 0).all()


def test_gdpo_by_hand():
    """Each reward's z-score is +-0.7071; weighted 1 and 3 they are added, and scaled together."""
    right, style = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 9.0], [5.0, 5.0]])
    parts, weights = {"right": right, "style": style}, {"right": 1.0, "style": 3.0}
    reward = right + 3 * style
    found = gdpo(eps=0.0)(reward, all_valid(reward), parts, weights)
    s = np.array([[-2.0, 2.0], [1.0, -1.0]]) / np.sqrt(2)
    np.testing.assert_allclose(found, s / np.sqrt((s**2).sum() / 3), rtol=1e-6)
    plain = gdpo(eps=0.0)(right + style, all_valid(reward), parts)
    np.testing.assert_allclose(plain[0], [0, 0], atol=1e-6)
    assert plain[1, 0] > 0 > plain[1, 1]


def test_gdpo_leaves_out_a_part_that_a_sample_does_not_have():
    """Prompts of two kinds, each with its own grader, and one function for both."""
    nan = np.nan
    parts = {
        "math": np.array([[1.0, 0.0, 0.0], [nan, nan, nan]]),
        "code": np.array([[nan, nan, nan], [0.0, 1.0, 0.0]]),
        "style": np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]),
    }
    reward = np.nansum(list(parts.values()), axis=0)
    found = np.asarray(gdpo()(reward, all_valid(reward), parts))
    np.testing.assert_allclose(found.sum(-1), 0, atol=1e-6)
    assert found[0, 0] == found[0, 1] > 0 and found[1, 1] == pytest.approx(2 * found[0, 1] * 2)


def test_gdpo_refuses_what_a_shape_has_changed():
    reward = np.array([[1.0, 0.0], [0.5, 0.0]])
    with pytest.raises(UnfitReward, match=r"weighted sum of a; found 0.5 for 1: a shape of the"):
        gdpo()(reward, all_valid(reward), {"a": np.array([[1.0, 0.0], [1.0, 0.0]])})


# --- a past -------------------------------------------------------------------------------------

NEVER = Past(np.zeros(1), np.zeros(1), np.zeros(1))


def test_two_visits_by_hand():
    """Means 1/4 and 3/4, both of standard deviation 1/2: all of them 1/2 and sqrt(5/16)."""
    first, second = np.array([[1.0, 0, 0, 0]]), np.array([[1.0, 1, 1, 0]])
    rule, past = prompt_smooth(), visited(NEVER, first, VALID)
    np.testing.assert_allclose(past, [[1], [0.25], [0.5]])
    np.testing.assert_allclose(rule(first, VALID, NEVER), (first - 0.25) / 0.5)
    past_2 = visited(past, second, VALID)
    np.testing.assert_allclose(past_2, [[2], [0.5], [np.sqrt(5 / 16)]], rtol=1e-6)
    of_visit, of_all = (second - 0.75) / 0.5, (second - 0.5) / np.sqrt(5 / 16)
    np.testing.assert_allclose(rule(second, VALID, past), (of_visit + of_all) / 2, rtol=1e-6)


def test_the_third_visit_takes_the_smaller_mixture():
    past = Past(np.array([2.0]), np.array([0.5]), np.array([0.5]))
    reward = np.array([[1.0, 1, 1, 0]])
    _, mean, std = (x.item() for x in visited(past, reward, VALID))
    of_visit, of_all = (reward - 0.75) / 0.5, (reward - mean) / std
    mixed = np.array([2 * of_visit + of_all, of_visit + 2 * of_all]) / 3
    smaller = np.take_along_axis(mixed, np.abs(mixed).argmin(0)[None], 0)[0]
    np.testing.assert_allclose(prompt_smooth()(reward, VALID, past), smaller, rtol=1e-6)


def test_a_group_of_equal_rewards_learns_from_earlier_visits():
    past, right = visited(NEVER, np.array([[1.0, 0, 0, 0]]), VALID), np.ones((1, 4))
    found = np.asarray(prompt_smooth()(right, VALID, past))
    assert (found > 0).all() and (found == found[0, 0]).all()


def test_visits_of_equal_rewards_stay_without_a_signal():
    """Their mean is exactly theirs; a rounded one would make standard deviations of 1e-8."""
    reward, past = np.full((1, 4), 0.1), NEVER
    for visit in range(1, 8):
        assert (np.asarray(prompt_smooth()(reward, VALID, past)) == 0).all()
        past = visited(past, reward, VALID)
        np.testing.assert_array_equal(past, np.array([[visit], [0.1], [0]], np.float32))


def test_fewer_than_two_valid_samples_are_no_visit():
    past = Past(np.array([3.0]), np.array([0.5]), np.array([0.25]))
    once = visited(past, np.array([[1.0, 0, 0, 0]]), np.array([[True, False, False, False]]))
    np.testing.assert_array_equal(once, past)


# --- what a rule asks for -----------------------------------------------------------------------


def test_a_rule_gets_what_its_parameters_name():
    groups = random_groups("opo")
    assert {
        name: list(asks(factory())) for name, factory in ADVANTAGES.items() if asks(factory())
    } == {
        "gdpo": ["parts", "weights"],
        "opo": ["length_PG"],
        "prompt_smooth": ["past"],
        "token_group_zscore": ["length_PG"],
    }

    def brief(reward_PG, is_valid_PG, length_PG, *, scale: float = 2.0):
        return scale * length_PG

    np.testing.assert_array_equal(advantages_of(brief, groups), 2 * groups.length_PG)
    plain = advantages_of(lambda r, v: jnp.asarray(r) + v, groups)
    np.testing.assert_allclose(plain, groups.reward_PG + groups.is_valid_PG)


def test_what_a_rule_asks_for_in_vain():
    bare = Groups(np.zeros((1, 2)), np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="has a parameter 'lengths', which nothing fills"):
        advantages_of(lambda r, v, lengths: r, bare)
    with pytest.raises(ValueError, match="needs length_PG, which is None"):
        advantages_of(opo(), bare)
    with pytest.raises(ValueError, match="needs parts, which is None: the reward is made of one"):
        advantages_of(gdpo(), bare)
    advantages_of(lambda r, v, past=None: r, bare)


def test_picked_groups_are_padded_with_masked_ones():
    groups = random_groups("gdpo")
    picked = groups.picked(np.array([3, 5]), 4)
    np.testing.assert_array_equal(picked.reward_PG[:2], groups.reward_PG[[3, 5]])
    np.testing.assert_array_equal(picked.past.mean_P[:2], groups.past.mean_P[[3, 5]])
    np.testing.assert_array_equal(picked.parts["b"][:2], groups.parts["b"][[3, 5]])
    assert picked.weights == groups.weights and picked.length_PG.shape == (4, 8)
    assert picked.is_valid_PG.dtype == bool and not picked.is_valid_PG[2:].any()


@pytest.mark.parametrize(
    ("rule", "reward", "message"),
    [
        (maxrl(), [[1.0, -0.5]], "maxrl needs rewards >= 0; found 1 others, such as -0.5"),
        (maxrl(), [[1.0, np.nan]], "maxrl needs rewards >= 0; found 1 others, such as nan"),
        (passk(k=1), [[1.0, 0.5]], "passk needs rewards of 0 and 1; found 1 others, such as 0.5"),
    ],
)
def test_rewards_that_a_rule_is_not_defined_for(rule, reward, message):
    with pytest.raises(UnfitReward, match=message):
        rule(np.array(reward), all_valid(reward))
    rule(np.array(reward), np.array([[True, False]]))  # masked: no matter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: group_zscore(ddof=2), "group_zscore.ddof = 2; expected 0 or 1"),
        (lambda: batch_zscore(ddof=-1), "batch_zscore.ddof = -1; expected 0 or 1"),
        (lambda: group_zscore(eps=-1.0), "group_zscore.eps = -1.0"),
        (lambda: gdpo(eps=-1.0), "gdpo.eps = -1.0"),
        (lambda: grpo_passk(eps=float("nan")), "grpo_passk.eps = nan"),
        (lambda: passk(k=0), "passk.k = 0; expected at least 1"),
        (
            lambda: passk(k=5)(np.zeros((1, 4)), VALID),
            "passk.k = 5; expected at most the 4 samples",
        ),
        (lambda: grpo_passk()(np.zeros((1, 1)), VALID[:, :1]), "grpo_passk needs two samples"),
        (lambda: leave_one_out(min_valid=0), "leave_one_out.min_valid = 0"),
        (lambda: shifted_mean(shift=float("inf")), "shifted_mean.shift = inf; expected a finite"),
        (lambda: token_group_zscore(limit=0.0), "token_group_zscore.limit = 0.0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
