"""The atlas: what rules were found to read, the numbers of their maps, and the pictures."""

from __future__ import annotations

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from aspo_jax.atlas.pictures import COLOUR_MAP, Chart, draw_overlay, draw_rule, save
from aspo_jax.atlas.views import PLACES, RATIOS, chart, edges, reads_of, views_of
from aspo_jax.losses import (
    Coefficient,
    Objective,
    archer2,
    aspo,
    chain,
    cispo,
    dapo,
    gspo,
    kl_penalty,
    ppo_clip,
    reinforce,
)
from aspo_jax.plot import main


def charts(objective):
    return [chart(objective, view) for view in views_of(objective)]


def weighing(weight, bias=None, prepare=None):
    """A rule of a weight and a bias: functions of the tokens and the statistics."""

    def coefficient(tokens, state, stats):
        weight_BT = weight(tokens, stats) + jnp.zeros_like(tokens.logp_BT)
        bias_BT = bias(tokens) if bias else jnp.zeros_like(weight_BT)
        return Coefficient(weight_BT, bias_BT, {})

    return Objective(coefficient, prepare=prepare)


def r(tokens):
    return jnp.exp(tokens.logp_BT - tokens.old_logp_BT)


RULES = {
    "nothing": (reinforce(), set()),
    "the ratio": (aspo(), {"policy"}),
    "its response": (gspo(), {"policy", "response"}),
    "entropies": (archer2(), {"policy", "entropy"}),
    "the reference": (kl_penalty(), {"policy", "reference"}),
    "the sampler alone": (
        weighing(lambda t, _: jnp.minimum(jnp.exp(t.old_logp_BT - t.sampler_logp_BT), 2)),
        {"probability", "sampler"} - {"probability"},
    ),
    "the teacher": (
        weighing(lambda t, _: 0.0, lambda t: t.teacher_logp_BT - t.logp_BT),
        {"policy", "teacher"},
    ),
    "probabilities": (
        weighing(lambda t, _: jnp.abs(jnp.exp(t.logp_BT) - jnp.exp(t.old_logp_BT)) < 0.1),
        {"policy", "probability"},
    ),
    "positions": (
        weighing(lambda t, _: jnp.where(r(t) < 1.1 + t.position_BT / 500, r(t), 0)),
        {"policy", "position"},
    ),
    "the mini-batch": (
        weighing(lambda t, mean: r(t) / mean, prepare=lambda t, state: jnp.mean(r(t))),
        {"policy", "response", "minibatch"},
    ),
}


@pytest.mark.parametrize(("rule", "reads"), RULES.values(), ids=RULES)
def test_what_a_rule_reads_is_found(rule, reads):
    assert reads_of(rule) == reads


def test_the_map_and_the_curves_are_the_rule():
    (found,) = charts(aspo(clip_low=0.3, clip_high=0.2, cap=2.5))
    ratio = PLACES[:, None] / PLACES[None, :]
    expected = {
        1: np.where(ratio <= 1.2, np.minimum(1 / ratio, 2.5), 0),
        -1: np.where(ratio >= 0.7, np.minimum(ratio, 2.5), 0),
    }
    for sign, values in expected.items():
        np.testing.assert_allclose(found.maps[sign], values, rtol=2e-5)
    (curve,) = found.curves[1].values()
    np.testing.assert_allclose(
        curve, np.where(RATIOS <= 1.2, np.minimum(1 / RATIOS, 2.5), 0), rtol=2e-5
    )
    assert found.shows == "weight" and found.is_of_ratio


def test_bounds_and_caps_are_found_on_a_curve():
    def of(objective, sign):
        (found,) = charts(objective)
        return edges(next(iter(found.curves[sign].values())))

    step = RATIOS[1] / RATIOS[0] - 1
    for objective, sign, jumps, bends in [
        (aspo(), 1, [1.2], [1 / 3]),
        (aspo(), -1, [0.8], [3]),
        (dapo(), -1, [0.8, 10], []),
        (cispo(), 1, [], [5]),
        (reinforce(), 1, [], []),
    ]:
        found = of(objective, sign)
        assert len(found.jumps) == len(jumps) and len(found.bends) == len(bends)
        np.testing.assert_allclose([*found.jumps, *found.bends], [*jumps, *bends], rtol=2 * step)


def test_entropies_give_two_views_with_their_own_bounds():
    low, high = charts(archer2(clip_low_entropy=0.2, clip_high_entropy=0.4))
    assert (low.view.label, high.view.label) == ("low entropy", "high entropy")
    bounds = [edges(next(iter(x.curves[1].values()))).jumps[0] for x in (low, high)]
    np.testing.assert_allclose(bounds, [1.2, 1.4], rtol=0.02)
    assert "entropy 0.05 nats" in low.view.caption and "ratio 1" in low.view.caption


def test_what_moves_and_what_is_held_is_said():
    (of_sampler,) = charts(RULES["the sampler alone"][0])
    assert of_sampler.view.axes == ("pi_sampler", "pi_old")
    assert of_sampler.maps[1][-1, 0] == 2  # pi_old far above pi_sampler
    first, late = charts(RULES["positions"][0])
    assert late.maps[1][20, 10] > 0 == first.maps[1][20, 10]  # ratio 2
    assert "token 1000" in late.view.caption
    (probabilities,) = charts(RULES["probabilities"][0])
    assert len(probabilities.curves[1]) == 2 and not probabilities.is_of_ratio
    (together,) = charts(RULES["the mini-batch"][0])
    assert "12 other responses" in together.view.caption
    spread = together.maps[1] / (PLACES[:, None] / PLACES[None, :])
    assert spread.max() > 1.01 * spread.min()  # the others are there


def test_biases_are_shown_as_what_they_are():
    (alone,) = charts(kl_penalty(beta=0.1))
    assert alone.shows == "bias"
    np.testing.assert_allclose(alone.maps[1], alone.maps[-1])
    (both,) = charts(chain(ppo_clip(), kl_penalty(beta=0.1)))
    (weight,) = charts(ppo_clip())
    assert both.shows == "coefficient"
    for sign in (1, -1):
        np.testing.assert_allclose(
            both.maps[sign], weight.maps[sign] + sign * alone.maps[1], rtol=1e-4, atol=1e-5
        )


def test_a_rule_that_bends_with_the_advantage_says_so():
    rule = weighing(lambda t, _: r(t) * jnp.abs(t.advantage_BT))
    assert "A = +1 and -1" in views_of(rule)[0].caption
    assert views_of(ppo_clip())[0].caption == ""


def test_colours_keep_their_order_in_grey():
    grey = COLOUR_MAP(np.linspace(0, 1, 32))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > 0).all() and grey[-1] - grey[0] > 0.7


def test_pictures_differ_where_rules_do(tmp_path):
    rules = {"aspo": aspo(), "archer2": archer2(), "ppo_clip": ppo_clip(), "kl": kl_penalty()}
    made = [Chart(name, "cap = 3", charts(rule)) for name, rule in rules.items()]
    for each in made:
        save(draw_rule(each), tmp_path / f"{each.name}.png")
        assert 8_000 < (tmp_path / f"{each.name}.png").stat().st_size < 60_000
    images = {each.name: matplotlib.image.imread(tmp_path / f"{each.name}.png") for each in made}
    assert images["aspo"].shape == images["ppo_clip"].shape
    assert np.abs(images["aspo"] - images["ppo_clip"]).mean() > 0.02
    save(draw_overlay(made), tmp_path / "overlay.svg")
    text = (tmp_path / "overlay.svg").read_text()
    assert "<!-- archer2 (low entropy) -->" in text and "<!-- kl -->" not in text


def test_the_command_draws_each_rule_and_all_together(tmp_path, capsys):
    out = tmp_path / "pictures"
    flags = ["--objectives", "cispo,cispo.low", "--set", "cispo.low.ratio_max=2"]
    assert main(["weights", *flags, "--out", str(out)]) == 0
    written = capsys.readouterr().out.split()
    assert sorted(map(str, out.iterdir())) == sorted(written) and len(written) == 6
    assert "ratio_max = 2.0" in (out / "cispo.low.svg").read_text()
    assert "ratio_max = 5.0" in (out / "cispo.svg").read_text()


def test_the_command_explains_mistakes(tmp_path, capsys, monkeypatch):
    (tmp_path / "failing.py").write_text(
        "from aspo_jax.losses import Objective\n"
        "def rule(): return Objective(lambda tokens, state, stats: 1 / 0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for flags, message in [
        (["aspo,reinforc"], "unknown objective 'reinforc' (did you mean reinforce?)"),
        (["aspo,aspo"], "--objectives names aspo twice; give one a label, such as aspo.b"),
        ([","], "--objectives names no rule"),
        (["aspo", "--set", "cispo.ratio_max=3"], "--set #1: cispo is not among --objectives"),
        (["aspo", "--set", "aspo.cap=-3"], "--set #1: aspo.cap = -3.0; expected a number > 0"),
        (["aspo", "--set", "aspo.ca=3"], "aspo has no argument ca (did you mean cap?)"),
        (["failing:rule"], "the objective 'failing:rule' fails: ZeroDivisionError"),
    ]:
        assert main(["weights", "--objectives", *flags, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
