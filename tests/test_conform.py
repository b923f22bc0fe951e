"""A true ASPO is told from a false one, and from its rivals, by what it does to single tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stranger_losses as s

from aspo_jax.conform import main
from aspo_jax.conformance.calling import as_loss
from aspo_jax.conformance.probes import Measured, measure
from aspo_jax.conformance.verdict import NAMES, judge, suffixes


def measured(make: Any, framework: str) -> Measured:
    if framework == "torch":
        pytest.importorskip("torch")
    x = s.torch_library() if framework == "torch" else s.JAX
    return measure(as_loss("mine", make(x), framework))  # type: ignore[arg-type]


BOTH = pytest.mark.parametrize("framework", ["torch", "jax"])

RULES = {  # how it is made -> its name, and what its verdict says
    "aspo": (s.aspo, "aspo", "soft cap 3 on A > 0, soft cap 3 on A < 0"),
    "aspo, cap 5": (lambda x: s.aspo(x, c=5.0), "aspo", "soft cap 5 on A > 0"),
    "aspo, hard on A<0": (lambda x: s.slip(x, negative_cap="hard"), "aspo", "hard cap 3 on A < 0"),
    "aspo, 0.3": (lambda x: s.aspo(x, 0.3), "aspo_other_epsilon", "0.3 below and 0.3 above"),
    "archer2": (s.split_aspo, "archer2", "soft caps 3"),
    "split upside down": (lambda x: s.split_aspo(x, 0.4, 0.2), "aspo_split_inverted", ""),
    "another split": (lambda x: s.split_aspo(x, 0.2, 0.3), "aspo_other_epsilon", ""),
    "naive": (s.naive, "sign_flipped", ""),
    "no gate above": (lambda x: s.slip(x, high="open"), "aspo_gate_missing", ": A > 0"),
    "no gate below": (lambda x: s.slip(x, low="open"), "aspo_gate_missing", ": A < 0"),
    "no gates": (lambda x: s.slip(x, "open", "open"), "aspo_gate_missing", ": A > 0 and A < 0"),
    "straight through": (
        lambda x: s.slip(x, high="open", cap="none"),
        "aspo_gate_missing",
        ": A > 0; no cap on A > 0",
    ),
    "caps for masks": (lambda x: s.slip(x, "cap", "cap"), "aspo_gate_missing", "caps in its place"),
    "no cap": (lambda x: s.slip(x, cap="none"), "aspo_cap_missing", ": A > 0"),
    "no cap on A<0": (lambda x: s.slip(x, negative_cap="none"), "aspo_cap_missing", ": A < 0"),
    "no caps": (
        lambda x: s.slip(x, cap="none", negative_cap="none"),
        "aspo_cap_missing",
        ": A > 0 and A < 0",
    ),
    "hard for soft": (lambda x: s.slip(x, cap="hard"), "aspo_hard_cap", "c = 3"),
    "negated": (lambda x: lambda *a: -s.aspo(x)(*a), "loss_negated", ""),
    "gate on 1/r": (
        lambda x: s.weighted(
            x,
            lambda r: x.where(1 / r > 1.2, 0 * r, 1 / r),
            lambda r: x.where(r < 0.8, 0 * r, x.minimum(r, 3.0)),
        ),
        "aspo_gate_missing",
        ": A > 0; it is on the flipped ratio, which drops r below 0.8333",
    ),
    "soft gate": (
        lambda x: s.weighted(x, lambda r: x.minimum(1 / r, 3.0) / (1 + (r - 1) ** 8), lambda r: r),
        "other",
        "ASPO near r = 1, further out no known shape upwards and no known",
    ),
    "flipped twice": (lambda x: s.weighted(x, lambda r: 1 / r, lambda r: 1 / r), "other", "too"),
    "flip lost": (s.ppo, "ppo_clip", "clip 0.2 below and 0.2 above"),
    "flip lost, dual": (lambda x: s.ppo(x, dual=3.0), "dual_clip", "hard dual clip 3"),
    "flip lost, soft": (
        lambda x: s.weighted(
            x,
            lambda r: x.where(r > 1.2, 0 * r, r),
            lambda r: x.where(r < 0.8, 0 * r, x.minimum(r, 3.0)),
        ),
        "soft_dual_clip",
        "soft dual clip 3",
    ),
    "dapo": (lambda x: s.ppo(x, high=0.28, dual=10.0), "dapo", "0.28 above, hard dual clip 10"),
    "without is": (s.without_is, "grpo_without_is", "0.2 below"),
    "reinforce": (s.reinforce, "reinforce", ""),
    "is": (lambda x: s.weighted(x, lambda r: r, lambda r: r), "importance_sampling", ""),
    "cispo": (s.cispo, "cispo", "the weight is r, at most 5"),
    "cispo, both": (lambda x: s.cispo(x, 0.8, 1.28), "cispo", "at least 0.8 and at most 1.28"),
    "gspo": (s.gspo, "gspo", "0.0003 below and 0.0004 above"),
    "gspo, wide": (lambda x: s.gspo(x, 0.2, 0.2), "gspo", "0.2 below"),
    "gmpo": (s.gmpo, "gmpo", "0.4918 above"),
    "response mean": (s.response_mean, "positive_response_mean", "0.2 above"),
    "sapo": (s.sapo, "other", "further out no known shape upwards"),
    "squared": (s.squared, "other", "not linear in the advantage"),
}


@BOTH
@pytest.mark.parametrize("case", RULES)
def test_every_rule_has_its_name(case, framework):
    make, name, detail = RULES[case]
    found = judge(measured(make, framework))
    assert found.names[0] == name, found
    assert detail in found.title
    assert bool(found.not_aspo) == (name not in ("aspo", "archer2"))


AVERAGES = {
    "token_mean": "token_mean",
    "sequence_mean": "sequence_mean",
    "sequence_sum": "sequence_sum",
    "sum": "sum",
    "fixed_length": "fixed_length, 7",
    "all slots": "mean over all slots, padding included",
    "sum of means": "sum of sequence means",
    "by root": "other, a token of 3 and one of 1 have 0.2887 and 0.5",
}


@pytest.mark.parametrize("how", AVERAGES)
def test_every_average_has_its_name(how):
    m = measured(lambda x: s.averaged(s.aspo(x), how), "torch")
    assert suffixes(m) == [f"aggregation: {AVERAGES[how]}"]
    assert judge(m).names == ("aspo",)


@pytest.mark.parametrize(
    ("how", "high", "name"),
    [
        ("sequence_mean", 0.2, "grpo"),
        ("fixed_length", 0.2, "dr_grpo"),
        ("all slots", 0.2, "dr_grpo"),
        ("token_mean", 0.2, "ppo_clip"),
        ("token_mean", 0.28, "dapo"),
        ("sequence_mean", 0.28, "clip_higher"),
    ],
)
def test_names_that_an_average_decides(how, high, name):
    m = measured(lambda x: s.averaged(s.ppo(x, high=high), how), "torch")
    assert judge(m).names[0] == name


def test_the_average_of_a_flipped_sign():
    m = measured(lambda x: s.averaged(s.naive(x), "sequence_mean"), "torch")
    assert suffixes(m) == ["aggregation: sequence_mean"]


def test_luspo_is_gspo_with_another_average():
    m = measured(lambda x: s.averaged(s.gspo(x), "sequence_sum"), "torch")
    assert judge(m).names == ("luspo", "gspo")


@BOTH
def test_a_loss_without_the_mask(framework):
    m = measured(lambda x: s.averaged(s.aspo(x), "without mask"), framework)
    assert judge(m).names == ("aspo",)
    assert "mask ignored: masked token (0, 1) has" in suffixes(m)[1]


def test_masked_tokens_that_others_feel():
    def make(x):
        unmasked = s.gspo(x)
        return lambda logp, old, adv, mask: unmasked(logp, old, adv, 0 * mask + 1) * mask

    found = measured(lambda x: s.averaged(make(x), "token_mean"), "torch").masked
    assert found.startswith("what is masked changes the response token (0, 0)")


@BOTH
@pytest.mark.parametrize(
    ("kind", "ref", "found"),
    [
        ("k1", None, "+ KL to the old policy, k1, 0.001"),
        ("k2", None, "+ KL to the old policy, k2, 0.001"),
        ("k3", None, "+ KL to the old policy, k3, 0.001"),
        ("k3_is", None, "+ KL to the old policy, k3 times the ratio, 0.001"),
        ("k2", -6.4, "+ KL to a fixed reference, k2, 0.001"),
        ("k3", -6.4, "+ KL to a fixed reference, k3, 0.001"),
        ("k3_is", -6.4, "+ KL to a fixed reference, k3 times the ratio, 0.001"),
        ("odd", None, "+ a term without the advantage, of no known shape"),
    ],
)
def test_every_kl_term_has_its_name(kind, ref, found, framework):
    m = measured(lambda x: s.with_kl(s.aspo(x), kind, 1e-3, x, ref), framework)
    assert judge(m).names == ("aspo",)
    assert suffixes(m)[0] == found


@BOTH
@pytest.mark.parametrize(
    ("make", "defect"),
    [
        (s.forgets_rare, "depends on probability: r = 0.91, A = +1"),
        (s.squared, "not linear in A: r = 0.0025, A from 0.5 to 2"),
        (s.unclamped, "non-finite: nan at log pi = -1, log pi_old = -1001"),
    ],
)
def test_defects_are_found(make, defect, framework):
    assert [f for f in suffixes(measured(make, framework)) if f.startswith(defect)]


def test_a_factor_is_said():
    m = measured(lambda x: s.averaged(s.aspo(x), "token_mean", factor=0.5), "torch")
    assert judge(m).names == ("aspo",)
    assert suffixes(m) == ["aggregation: token_mean, times 0.5"]


@pytest.mark.parametrize(("make", "name"), [(s.aspo, "aspo"), (s.ppo, "ppo_clip")])
def test_a_loss_that_computes_in_float32_has_its_name(make, name):
    def shorter(x):
        loss = make(x)
        return lambda *tensors: loss(*(t.float() for t in tensors))

    m = measured(shorter, "torch")
    assert judge(m).names[0] == name
    assert suffixes(m) == []


# --- our own objectives, and the command ----------------------------------------------------------

OURS = {
    "aspo": "aspo",
    "archer2": "archer2",
    "cispo": "cispo",
    "dapo": "dapo",
    "gspo": "gspo",
    "grpo_without_is": "grpo_without_is",
    "positive_response_mean": "positive_response_mean",
    "ppo_clip": "ppo_clip",
    "grpo": "grpo",
    "reinforce": "reinforce",
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_objectives_have_their_names(name, capsys):
    assert main([f"aspo_jax.losses:{name}", "--expect", OURS[name]]) == 0
    shown = capsys.readouterr().out
    assert ("not ASPO: " in shown) == (name not in ("aspo", "archer2"))


def test_a_penalty_is_a_term_without_the_advantage():
    from aspo_jax.losses import aspo, chain, kl_penalty

    rule = chain(aspo(), kl_penalty(beta=2e-3))
    m = measure(as_loss("mine", rule))
    assert suffixes(m) == ["+ KL to the old policy, k3, 0.002"]


JAX_LOSS = """
import jax.numpy as jnp
from jax.lax import stop_gradient

def aspo(logp, old_logp, advantage, mask):
    r = jnp.exp(jnp.clip(logp - old_logp, -20, 20))
    keep = jnp.where(advantage > 0, r <= 1.2, r >= 0.8)
    w = keep * jnp.minimum(jnp.where(advantage > 0, 1 / r, r), 3.0)
    values = -advantage * stop_gradient(w) * logp * mask
    return (values.sum(-1) / mask.sum(-1)).mean(), {"seen": mask.sum()}
"""
TORCH_LOSS = """
import torch

def ppo(logp, old_logp, advantage, mask):
    r = torch.exp(torch.clamp(logp - old_logp, -20, 20))
    values = torch.maximum(-advantage * r, -advantage * torch.clamp(r, 0.8, 1.2))
    return values[mask].mean()

def swapped(old_log_prob, log_prob, advantages, mask):
    return ppo(log_prob, old_log_prob, advantages, mask)

def in_order(loss):
    return lambda logp, old_logp, advantage, mask: loss(old_logp, logp, advantage, mask)
"""
ODD = """
import jax.numpy as jnp

def few(logp, old_logp):
    return (logp - old_logp).sum()

def rows(logp, old_logp, advantage, mask):
    return (logp * advantage).sum(-1)

def number(logp, old_logp, advantage, mask):
    return 3.0

def broken(logp, old_logp, advantage, mask):
    raise KeyError("x")

def looks(logp, old_logp, advantage, mask):
    if mask.sum() == 0:
        return 0 * logp.sum()
    return -(logp * advantage * mask).sum() / mask.sum()

def constant(logp, old_logp, advantage, mask):
    return jnp.sum(advantage * mask)

def nothing():
    return 3
"""


@pytest.fixture(autouse=True)
def platforms(monkeypatch):
    """The command's choice ends with the test."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Modules of others on the path, gone from Python's memory afterwards."""
    for name, text in {"jax_rules": JAX_LOSS, "torch_rules": TORCH_LOSS, "odd_rules": ODD}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_true_aspo_passes_and_is_told_in_a_table(strangers, capsys):
    assert main(["jax_rules:aspo"]) == 0
    shown = capsys.readouterr().out
    assert "jax_rules:aspo (jax, float64, mask of type float64)" in shown
    assert "verdict: ASPO as in the paper" in shown and "- aggregation: sequence_mean" in shown
    table = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][2:]
    assert len(table) == 16 and all(len(row) == 5 for row in table)
    assert not [row for row in table if row[-1] == "NO |"]
    assert "| gate | A > 0, r = 1.52, 5.1, 400 | 0 above 1.2 | 0 beyond r = 1.2000" in shown


def test_torch_is_found_and_another_rule_fails(strangers, capsys):
    pytest.importorskip("torch")
    assert main(["torch_rules:ppo", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["ppo_clip"] and found["exit_status"] == 1
    assert found["called"].startswith("torch, float64, mask of type bool")
    assert found["facts"][0] == {
        "what": "weight near 1",
        "tokens": "A > 0, r = 0.91, 1, 1.09",
        "aspo": "1/r",
        "found": "r (0.91, 1, 1.09)",
        "agrees": False,
    }
    assert main(["torch_rules:ppo", "--expect", "ppo_clip"]) == 0
    assert main(["torch_rules:ppo", "--expect", "aspo"]) == 1


def test_an_adapter_mends_the_order(strangers, capsys):
    pytest.importorskip("torch")
    assert main(["torch_rules:swapped"]) == 2
    assert "takes 'old_log_prob' before 'log_prob'; expected the" in capsys.readouterr().err
    adapted = ["torch_rules:swapped", "--adapter", "torch_rules:in_order"]
    assert main([*adapted, "--expect", "ppo_clip"]) == 0


def test_a_loss_that_looks_at_values_is_not_compiled(strangers):
    assert main(["odd_rules:looks", "--expect", "reinforce"]) == 0


def test_a_defect_fails_unless_it_is_allowed(tmp_path, monkeypatch):
    text = JAX_LOSS.replace("jnp.clip(logp - old_logp, -20, 20)", "logp - old_logp")
    text = text.replace("stop_gradient(w) * logp", "stop_gradient(w / r) * r")
    (tmp_path / "wild_rules.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["wild_rules:aspo"]) == 1
    assert main(["wild_rules:aspo", "--allow", "non-finite"]) == 0


def test_no_gradient_is_a_weight_of_zero(strangers, capsys):
    assert main(["odd_rules:constant"]) == 1
    assert "near r = 1, w is no law that is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["odd_rules:few"], "(logp, old_logp) cannot be called with four arrays (too many"),
        (["odd_rules:rows"], "returned shape (2,) for arrays (2, 5); expected a scalar or values"),
        (["odd_rules:number"], "returned 3.0, which has no gradient; expected the array"),
        (["odd_rules:broken"], "raised KeyError: 'x' at "),
        (["odd_rules:nothing"], "returned 3; expected an Objective, or f(logp, old_logp"),
        (["odd_rules:absent"], "odd_rules has no function 'absent'; it has broken, constant"),
        (["absent_rules:aspo"], "the loss 'absent_rules:aspo': cannot import absent_rules"),
        (["odd_rules:few", "--adapter", "x"], "--adapter 'x': expected 'package.module:function'"),
        (["odd_rules:few", "--adapter", "odd_rules:nothing"], "odd_rules:nothing raised TypeError"),
    ],
)
def test_what_cannot_be_called_is_said_with_the_remedy(arguments, message, strangers, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_an_unknown_expectation_is_an_error_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["x:y", "--expect", "aspp"])
    assert "(did you mean aspo?)" in capsys.readouterr().err


def test_a_jax_loss_is_asked_without_torch_in_a_process_of_its_own(strangers):
    code = (
        "import sys; from aspo_jax.conform import main; status = main(['jax_rules:aspo']);"
        "sys.exit(3 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=strangers, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_explains_every_verdict():
    text = (Path(__file__).parents[1] / "docs" / "conformance.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []


# --- packages of others ---------------------------------------------------------------------------

VERL = "verl.trainer.ppo.core_algos:compute_policy_loss_"
PACKAGES = [  # what is asked, by which adapter, its names, how it averages
    (VERL + "vanilla", "verl", "dual_clip", "token_mean"),
    (VERL + "vanilla", "verl_grpo", "grpo", "sequence_mean"),
    (VERL + "vanilla", "verl_dr_grpo", "dr_grpo", "mean over all slots, padding included"),
    (VERL + "vanilla", "verl_dapo", "dapo", "token_mean"),
    (VERL + "cispo", "verl_cispo", "cispo", "token_mean"),
    (VERL + "gspo", "verl_gspo", "gspo", "sequence_mean"),
    (VERL + "geo_mean", "verl_geo_mean", "gmpo", "sequence_mean"),
    (VERL + "gpg", "verl", "reinforce", "token_mean"),
    ("trl:GRPOTrainer", "trl", "ppo_clip", "token_mean"),
    ("trl:GRPOTrainer", "trl_grpo", "grpo", "sequence_mean"),
    ("trl:GRPOTrainer", "trl_bnpo", "ppo_clip", "token_mean"),
    ("trl:GRPOTrainer", "trl_dr_grpo", "dr_grpo", "fixed_length, 512"),
    ("trl:GRPOTrainer", "trl_dapo", "dapo", "token_mean"),
    ("trl:GRPOTrainer", "trl_cispo", "cispo", "token_mean"),
    ("trl:GRPOTrainer", "trl_gspo", "gspo", "sequence_mean"),
    ("trl:GRPOTrainer", "trl_luspo", "luspo", "sequence_sum"),
    ("trl:GRPOTrainer", "trl_dual_clip", "dual_clip", "sequence_mean"),
    ("trl:GRPOTrainer", "trl_kl", "grpo", "sequence_mean"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("loss", "adapter", "name", "average"), PACKAGES)
def test_policy_losses_of_other_packages(loss, adapter, name, average, capsys, monkeypatch):
    pytest.importorskip(loss.partition(".")[0].partition(":")[0], reason="docs/conformance.md")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "conform")
    status = main([loss, "--adapter", f"adapters:{adapter}", "--json", "--expect", name])
    found = json.loads(capsys.readouterr().out)
    assert found["names"][0] == name
    assert f"aggregation: {average}" in found["findings"]
    overflows = [finding for finding in found["findings"] if finding.startswith("non-finite")]
    assert status == (1 if overflows else 0)
    if adapter == "trl_kl":
        assert "+ KL to the old policy, k3 times the ratio, 0.001" in found["findings"]
