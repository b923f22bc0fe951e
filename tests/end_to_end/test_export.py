"""`python -m aspo_jax.export`: checkpoints of a real run as model folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from toy import bits, toy_mesh
from trainer_runs import ITERATIONS

from aspo_jax import export as command
from aspo_jax.data import CountdownSource
from aspo_jax.inputs import countdown_spec, held_out_prompts
from aspo_jax.model import load_params, read_model_config
from aspo_jax.parts import build_sampler
from aspo_jax.rewards import countdown
from aspo_jax.rollout import draw
from aspo_jax.rounding import PROMPTS, round_to, rounding_cost
from aspo_jax.sampler import EVALUATE, EVERYTHING


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("place", ["", "checkpoints", f"checkpoints/{ITERATIONS}"])
def test_the_newest_step_is_the_model_that_the_run_itself_exported(
    finished, tmp_path, place, capsys
):
    out = tmp_path / "out"
    assert command.main([str(finished.folder / place), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: the model after {ITERATIONS} iterations\n"
    assert files(out) == files(finished.folder / "model")


def test_an_older_step_and_another_type(finished, tmp_path):
    older = min(int(path.name) for path in (finished.folder / "checkpoints").iterdir())
    assert older < ITERATIONS
    command.export(finished.folder / "checkpoints" / str(older), tmp_path / "older")
    config = read_model_config(tmp_path / "older")
    older_params = load_params(tmp_path / "older", config)
    newest_params = load_params(finished.folder / "model", config)
    assert bits(older_params) != bits(newest_params)
    command.export(finished.folder, tmp_path / "half", "bfloat16")
    half = load_params(tmp_path / "half", config)
    for x, y in zip(jax.tree.leaves(half), jax.tree.leaves(newest_params), strict=True):
        np.testing.assert_array_equal(x, y.astype("bfloat16").astype("float32"))


def test_a_smaller_type_says_what_it_costs(finished, machines, config, tmp_path, capsys):
    """The line's figures are those of the folder it wrote, asked for its own answers."""
    out = tmp_path / "half"
    assert command.main([str(finished.folder), str(out), "--dtype", "bfloat16"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]

    policy, params = machines.parts.policy, machines.initial_params()
    half = load_params(out, policy.model.config)
    assert bits(round_to(params, "bfloat16")) == bits(half) != bits(params)
    prompts = held_out_prompts(config, policy.tokenizer)[:PROMPTS]
    sampler = build_sampler(config, policy, toy_mesh()).drawing(0.0, EVERYTHING)
    answers = []
    for weights in (params, half):
        answers.append(draw(sampler, weights, prompts, 1, domain=EVALUATE))
    equal, gaps = 0, []
    for a, b in zip(*answers, strict=True):
        equal += a.tokens_T.tolist() == b.tokens_T.tolist()
        for token, other, x, y in zip(
            a.tokens_T, b.tokens_T, a.policy_logp_T, b.policy_logp_T, strict=False
        ):
            if token != other:
                break
            gaps.append(abs(x - y))
    cost = rounding_cost(config, policy, params, "bfloat16")
    assert cost[:2] == (len(prompts), equal)
    np.testing.assert_allclose(cost[2:], [np.mean(gaps), np.max(gaps)], rtol=1e-3)
    assert 0 < cost.mean < cost.largest
    assert line == cost.line("bfloat16")
    assert line.startswith(f"export in bfloat16: {equal} of {len(prompts)} greedy texts equal, ")

    assert rounding_cost(config, policy, half, "bfloat16") == (len(prompts), len(prompts), 0, 0)
    assert rounding_cost(config, policy, params, "float8_e4m3fn").equal < len(prompts)


def test_what_is_not_measured_is_said(finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    flags = ["--dtype", "bfloat16"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "QUICK", 100)
        assert command.main([str(run), str(tmp_path / "large"), *flags]) == 0
    assert "was not measured (" in (out := capsys.readouterr().out)
    assert "parameters take long on a CPU, --measure takes them)" in out
    config = run / "config.gin"
    text = config.read_text().replace("Data.source = 'countdown'", "Data.source = 'files'")
    for name in ("train", "eval"):
        text = text.replace(f"Data.{name}_path = None", f"Data.{name}_path = '{tmp_path}/gone'")
    source = run / "initial_model"
    config.write_text(text.replace("Model.path = None", f"Model.path = '{source}'"))
    assert command.main([str(run), str(tmp_path / "no_data"), *flags]) == 0
    assert "was not measured (" in (out := capsys.readouterr().out) and "gone" in out
    assert files(tmp_path / "large") == files(tmp_path / "no_data")


def test_answers_as_a_user_gets_them_are_the_runs_own(finished, machines, config):
    """AutoTokenizer, chat template, generate: the texts and verdicts of the run's own sampler."""
    torch = pytest.importorskip("torch")
    held_out = held_out_prompts(config, machines.parts.policy.tokenizer)
    sampler = build_sampler(config, machines.parts.policy, toy_mesh()).drawing(0.0, EVERYTHING)
    drawn = draw(sampler, machines.initial_params(), held_out, 1, domain=EVALUATE)

    folder = finished.folder / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    rows = CountdownSource(countdown_spec(config), config.evaluate.seed, "held_out", len(held_out))
    right = 0
    for row, ours in zip((rows[i] for i in range(len(rows))), drawn, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            limit = config.sampler.max_response_tokens
            output = model.generate(**inputs, do_sample=False, max_new_tokens=limit)[0]
        theirs = output[inputs["input_ids"].shape[1] :].tolist()
        assert theirs == ours.tokens_T.tolist()
        text = tokenizer.decode(theirs, skip_special_tokens=True)
        is_finished = theirs[-1] == tokenizer.eos_token_id
        our_text = machines.parts.policy.decode(ours.tokens_T)
        verdict = countdown.grade(text, row["answer"], is_finished)
        assert verdict == countdown.grade(our_text, row["answer"], ours.is_finished)
        right += verdict.is_right
    assert right > 0


def test_mistakes_are_messages(finished, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("mine")
    damaged = tmp_path / "damaged"
    shutil.copytree(finished.folder, damaged)
    step = damaged / "checkpoints" / str(ITERATIONS)
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    mistakes = {
        (finished.folder, taken): "exists and is not an empty folder; choose another OUT",
        (tmp_path, tmp_path / "new"): "not a run; expected a run folder",
        (finished.folder / "checkpoints" / "99", tmp_path / "new"): "checkpoints/99 cannot be used",
        (step, tmp_path / "new"): "bytes, expected",
    }
    for (checkpoint, out), message in mistakes.items():
        assert command.main([str(checkpoint), str(out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err
    assert files(taken) == {"precious.txt": b"mine"}
    assert not (tmp_path / "new").exists()
