"""`python -m aspo_jax.replay` on the rollouts of a real run."""

from __future__ import annotations

import json

import matplotlib.image
from trainer_runs import ITERATIONS, metrics

from aspo_jax.recording import read_rollout, recorded_iterations, trained_on
from aspo_jax.replay import main


def test_a_run_records_what_it_trained_on(finished):
    assert recorded_iterations(finished.folder) == [0, 2, 4]
    logged = {row["iteration"]: row for row in metrics(finished.folder)}
    for iteration in (0, 2, 4):
        rows = read_rollout(finished.folder, iteration)
        assert len(rows) == 16  # 4 prompts, 4 samples
        mean = sum(row["reward"] for row in rows) / len(rows)
        assert abs(mean - logged[iteration]["rollout/reward_mean"]) < 1e-6
        trained = [row for row in rows if row["minibatch"] is not None]
        assert len(trained) == 16 * logged[iteration]["rollout/valid_groups"]
        for row in trained:
            lengths = {len(row[f"{name}_logp"]) for name in ("sampler", "old", "ref")}
            assert lengths == {len(row["response_tokens"])} and row["advantage"] is not None


def test_rules_are_compared_on_it(finished, tmp_path, capsys):
    run = str(finished.folder)
    rules = ["--objective", "ppo_clip", "--objective", "aspo.capped", "--objective", "kl_penalty"]
    picture = tmp_path / "replay.png"
    flags = ["--iteration", "2", "--set", "aspo.capped.cap=0.5", "--json", "--out", str(picture)]
    assert main([run, *rules, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["iteration"], found["checkpoint"]) == (2, ITERATIONS)
    assert found["abs_log_ratio_mean"] > 1e-4 and found["ratio_kl"] > 0
    assert list(found["objectives"]) == ["aspo", "ppo_clip", "aspo.capped", "kl_penalty"]
    aspo, capped = found["objectives"]["aspo"], found["objectives"]["aspo.capped"]
    assert abs(aspo["cosine"] - 1) < 1e-4
    assert 0.4 < capped["grad_norm"] / aspo["grad_norm"] < 0.7 and capped["cosine"] > 0.9
    assert matplotlib.image.imread(picture).std() > 0.05


def test_the_newest_rollout_and_checkpoint_are_the_default(finished, capsys):
    assert main([str(finished.folder), "--objective", "cispo"]) == 0
    out = capsys.readouterr().out
    newest = max(i for i in (0, 2, 4) if trained_on(read_rollout(finished.folder, i)))
    assert f"rollout of iteration {newest}, weights after {ITERATIONS} iterations" in out
    assert "mean |log r| = " in out and "weight of tokens with A < 0" in out
    assert "cosine to aspo" in out


def test_mistakes_are_messages(finished, tmp_path, capsys):
    run = str(finished.folder)
    mistakes = {
        (run, "--objective", "cispo", "--iteration", "3"): "no rollout of iteration 3; recorded: 0",
        (
            run,
            "--objective",
            "cipso",
        ): "--objective: unknown objective 'cipso' (did",
        (run, "--objective", "cispo", "--checkpoint", "5"): "has no such step; complete: ",
        (run, "--objective", "cispo", "--set", "gspo.clip_low=1"): "gspo is not among --objective",
        (str(tmp_path), "--objective", "cispo"): "expected a Hugging Face model folder",
        (
            str(finished.folder / "model"),
            "--objective",
            "cispo",
        ): "not a run; expected a run",
    }
    for words, message in mistakes.items():
        assert main(list(words)) == 2
        assert message in capsys.readouterr().err
