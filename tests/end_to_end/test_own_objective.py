"""An objective from a file outside the package: trained, exported, checked and planned by name."""

from __future__ import annotations

from aspo_jax import check, export, plan, train
from aspo_jax.run.metrics import read_metrics

RULES = '''
from aspo_jax.losses import Coefficient, Objective, mean_over, ratio


def mine(*, cap: float = 2.0) -> Objective:
    """The inverse ratio, at most the cap."""

    def coefficient(tokens, state, sums):
        weight_BT = (1 / ratio(tokens)).clip(max=cap)
        far = mean_over(weight_BT >= cap, tokens.is_response_BT)
        return Coefficient(weight_BT, 0 * weight_BT, {"at_cap": far})

    return Objective(coefficient)


def broken() -> Objective:
    def coefficient(tokens, state, sums):
        return Coefficient(tokens.advantage_BT[:, 0], tokens.teacher_BT, {})

    return Objective(coefficient)


def per_row() -> Objective:
    def coefficient(tokens, state, sums):
        return Coefficient(ratio(tokens)[:, :1], 0 * ratio(tokens), {})

    return Objective(coefficient)


def clash() -> Objective:
    def coefficient(tokens, state, sums):
        one_BT = ratio(tokens)
        return Coefficient(one_BT, 0 * one_BT, {"ref_kl": mean_over(one_BT, one_BT > 0)})

    return Objective(coefficient)
'''


def test_it_trains_and_is_exported_checked_and_planned(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_module.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    own = ("Objective.name=my_module:mine", "mine.cap=1.5", "Train.iterations=2")
    out, _ = runs.run(run, *own)
    assert "my_module:mine + kl_penalty, group_zscore" in out
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "update/entropy" in row]
    assert rows and all(0 <= row["rule/at_cap"] <= 1 for row in rows)
    (next_command,) = (line for line in out.splitlines() if line.startswith("Next: "))
    assert "Objective.name=dapo" in next_command and "mine.cap" not in next_command

    assert export.main([str(run), str(tmp_path / "model")]) == 0
    assert check.main([str(run), "--prompts", "2"]) == 0
    config = ["--config", str(run / "config.gin"), "--topology", "cpu:1", "--lower-only"]
    assert plan.main(config) == 0
    assert "sampler and trainer agree" in capsys.readouterr().out

    for rule, message in (
        ("broken", "the rule fails: AttributeError: 'Tokens' object has no attribute 'teacher_BT'"),
        ("per_row", "the rule's weight_BT has shape (2, 1), expected (2, 8)"),
        ("clash", "metric 'ref_kl' is emitted twice; rename it in one of the rules"),
    ):
        new = tmp_path / rule
        flags = [f"Objective.name=my_module:{rule}", f"Run.folder='{new}'"]
        words = ["--config", str(runs.config), *(w for flag in flags for w in ("--set", flag))]
        assert train.main(words) == 2
        assert f"Objective.name and Objective.penalties: {message}" in capsys.readouterr().err
        assert not new.exists()
