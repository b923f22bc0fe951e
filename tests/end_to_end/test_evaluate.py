"""`python -m aspo_jax.evaluate` on the model of a real run, and the same sets while it trains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from trainer_runs import metrics, scalars

from aspo_jax import evaluate as command
from aspo_jax.build import check_inputs
from aspo_jax.config import read_config
from aspo_jax.data import CountdownSource
from aspo_jax.errors import UserError
from aspo_jax.inputs import countdown_spec
from aspo_jax.library import evaluate, load
from aspo_jax.parts import FACTORIES
from aspo_jax.run.stop import EXIT_SAVED
from aspo_jax.scoring import running
from aspo_jax.scoring.results import Row

SUITE = """
Suite.sets = ('puzzles', 'echo')
Suite.max_response_tokens = 8
puzzles.paths = ('puzzles.jsonl',)
puzzles.samples = 4
puzzles.temperature = 0.9
echo.paths = ('echo.jsonl',)
echo.grader = 'exact'
"""
PUZZLES = 10
LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"


class Evaluated(NamedTuple):
    """A finished evaluation of the toy model, and the words that make it again."""

    out: Path
    words: list[str]

    def at(self, out: Path) -> list[str]:
        return [*self.words, "--out", str(out)]


def samples(out: Path) -> list[Row]:
    return pq.read_table(out / "samples.parquet").to_pylist()


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def data(config, tmp_path_factory) -> Path:
    """A suite of puzzles and of puzzles whose answer is one fixed text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny.gin").write_text(SUITE)
    source = CountdownSource(countdown_spec(config), 5, "held_out", PUZZLES)
    rows = [source[i] for i in range(PUZZLES)]
    lines = [json.dumps({k: row[k] for k in ("id", "prompt", "answer", "kind")}) for row in rows]
    (folder / "puzzles.jsonl").write_text("\n".join(lines) + "\n")
    echo = [{"prompt": row["prompt"], "answer": "1+1=2"} for row in rows[:3]]
    (folder / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in echo))
    return folder


@pytest.fixture(scope="module")
def evaluated(finished, data, tmp_path_factory) -> Evaluated:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    words = [str(finished.folder / "model"), "--suite", str(data / "tiny.gin")]
    words += ["--data-folder", str(data), "--set", "Sampler.slots=8"]
    done = Evaluated(out, words)
    assert command.main(done.at(out)) == 0
    return done


def test_every_sample_is_in_the_table(evaluated):
    rows = samples(evaluated.out)
    assert [(r["set"], r["draw"], r["sample"]) for r in rows] == [
        *(("puzzles", p, g) for p in range(PUZZLES) for g in range(4)),
        *(("echo", p, 0) for p in range(3)),
    ]
    assert all(r["response"] and r["tokens"] and r["prompt"] and r["identity"] for r in rows)
    assert {r["reason"] for r in rows} > {"match"} and {r["seed"] for r in rows} == {1}
    # The votes of `exact` are whole responses, puzzles have no such thing.
    assert all((r["given"] == r["response"]) == (r["set"] == "echo") for r in rows)
    found = report(evaluated.out)["figures"]["puzzles"]
    right = [r["reason"] == "match" for r in rows if r["set"] == "puzzles"]
    assert found["avg"]["value"] == pytest.approx(sum(right) / 40)
    assert found["pass"]["4"]["value"] == pytest.approx(
        sum(any(right[i : i + 4]) for i in range(0, 40, 4)) / PUZZLES
    )
    assert 0 < found["avg"]["low"] <= found["avg"]["value"] <= found["avg"]["high"] < 1
    assert found["majority"] is None
    assert not (evaluated.out / "chunks").exists()


def test_the_library_finds_the_same(evaluated, finished, data):
    scores, rollout = evaluate(
        load(finished.folder / "model", "Sampler.slots=8"),
        data / "puzzles.jsonl",
        4,
        max_tokens=8,
        temperature=0.9,
        seed=1,
    )
    rows = [r for r in samples(evaluated.out) if r["set"] == "puzzles"]
    assert [s.text for s in rollout.samples] == [r["response"] for r in rows]
    found = report(evaluated.out)["figures"]["puzzles"]
    assert scores["avg"] == found["avg"]["value"]
    assert scores["avg_stderr"] == pytest.approx(found["avg"]["stderr"])
    assert scores["pass_any"] == found["pass"]["4"]["value"]
    assert scores["truncated"] == found["truncated"]


@pytest.mark.parametrize("name", ["write_chunk", "add_seconds", "write_samples", "write_report"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_command_goes_on_to_the_same_report(
    evaluated, tmp_path, monkeypatch, capsys, name, when
):
    """Ended around each write, first at once and then later; never anything is drawn twice."""
    drawn: list[int] = []
    real, answers, skipped = getattr(running, name), running.answers, [0]

    def trapped(*arguments: Any) -> Any:
        skipped[0] += 1
        made = real(*arguments) if when == "after" or skipped[0] < 2 else None
        if skipped[0] >= 2 or name in ("write_samples", "write_report"):
            raise KeyboardInterrupt
        return made

    def counted(collector: Any, params: Any, prompts: Any, *more: Any, **named: Any) -> Any:
        drawn.extend(prompt.draw for prompt in prompts)
        return answers(collector, params, prompts, *more, **named)

    monkeypatch.setattr(running, "answers", counted)
    words = [*evaluated.at(tmp_path / "out"), "--chunk", "4"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, name, trapped)
        command.main(words)
    (tmp_path / "out" / ".report.json.tmp").write_text("what a kill left")
    assert command.main(words) == 0
    for file in ("report.json", "settings.json"):
        expected, found = ((out / file).read_text() for out in (evaluated.out, tmp_path / "out"))
        assert found == expected
    assert samples(tmp_path / "out") == samples(evaluated.out)
    again = 4 if (name, when) == ("write_chunk", "before") else 0
    assert len(drawn) == PUZZLES + 3 + again
    if name == "add_seconds":
        assert "puzzles: all" not in capsys.readouterr().out


def test_a_signal_ends_it_in_order(evaluated, tmp_path, monkeypatch, capsys):
    """As a scheduler stops it: in the middle of a chunk, with what is finished kept."""
    answers, calls = running.answers, [0]

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(*arguments, **named)

    words = [*evaluated.at(tmp_path / "out"), "--chunk", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(running, "answers", interrupted)
        assert command.main(words) == EXIT_SAVED
    assert "the same command goes on" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "chunks").iterdir())) == 1
    assert command.main(words) == 0
    assert report(tmp_path / "out") == report(evaluated.out)


def test_two_processes_share_it_and_find_the_same(evaluated, tmp_path):
    """Each samples its prompts on its own devices; a third command goes on alone."""
    out = tmp_path / "out"
    program = {"PROGRAM": "-m aspo_jax.evaluate", "PYTHON": sys.executable}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **program}
    command_line = ["bash", str(LOCAL), "2", *evaluated.at(out), "--chunk", "5"]
    ran = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("What was found") == 1
    assert report(out)["figures"] == report(evaluated.out)["figures"]
    assert samples(out) == samples(evaluated.out)
    assert command.main(evaluated.at(out)) == 0


def test_a_finished_evaluation_is_shown_again_without_the_model(evaluated, monkeypatch, capsys):
    monkeypatch.setattr(running, "load_weights", None)
    before = (evaluated.out / "report.json").read_bytes()
    assert command.main(evaluated.at(evaluated.out)) == 0
    assert (evaluated.out / "report.json").read_bytes() == before
    assert "puzzles  avg@4" in capsys.readouterr().out


def test_another_evaluation_is_refused_with_the_difference(evaluated, tmp_path, capsys):
    before = (evaluated.out / "settings.json").read_bytes()
    for more, said in {
        ("--seed", "2"): "seed: 1 -> 2",
        ("--set", "puzzles.samples=2"): "sets.puzzles.samples: 4 -> 2",
        ("--set", "Reward.timeout_s=9"): "grading.timeout_s: 5.0 -> 9.0",
        ("--limit", "2"): "sets.puzzles.prompts: 10 -> 2",
        ("--only", "echo"): "sets.puzzles.samples: 4 -> '(not set)'",
    }.items():
        assert command.main([*evaluated.at(evaluated.out), *more]) == 2
        error = capsys.readouterr().err
        assert "holds another evaluation" in error and said in error and "--out" in error
    assert (evaluated.out / "settings.json").read_bytes() == before
    # Who grades is no matter.
    shutil.copytree(evaluated.out, tmp_path / "copy")
    assert command.main([*evaluated.at(tmp_path / "copy"), "--set", "Reward.workers=2"]) == 0


def test_another_model_is_refused(evaluated, finished, tmp_path, capsys):
    words = [str(finished.folder / "initial_model"), *evaluated.words[1:]]
    assert command.main([*words, "--out", str(evaluated.out)]) == 2
    assert "model.digest: " in capsys.readouterr().err


def test_samples_are_graded_again_without_the_model(evaluated, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert command.main(evaluated.at(out)) == 0
    rows = samples(out)
    page = (out / "report.md").read_text()
    monkeypatch.setattr(running, "load_weights", None)
    monkeypatch.setattr(running, "load_policy", None)
    assert command.main(["--regrade", str(out)]) == 0
    assert samples(out) == rows
    found, expected = report(out), report(evaluated.out)
    assert found["figures"] == expected["figures"] and found["settings"]["regraded"]
    assert "Graded again" in (out / "report.md").read_text() and "Graded again" not in page

    # What was stored is what is graded: another text, another verdict.
    wrong = [r | {"response": "1+1=2" if r["set"] == "echo" else "0"} for r in rows]
    running.write_samples(out, wrong)
    assert command.main(["--regrade", str(out), "--set", "Reward.timeout_s=7"]) == 0
    found = report(out)
    assert found["figures"]["puzzles"]["avg"]["value"] == 0
    assert found["figures"]["echo"]["avg"]["value"] == 1
    assert found["figures"]["echo"]["majority"]["value"] == 1
    assert found["settings"]["grading"]["timeout_s"] == 7.0
    capsys.readouterr()
    for words, said in {
        ("--grader", "countdown"): "echo 1: found the answer",
        ("--samples", "2"): "--regrade changes verdicts alone",
        ("--set", "Model.dtype=bfloat16"): "Model.dtype is none of Reward's",
        ("--set", "Suite.seed=2"): "is none of Reward's",
    }.items():
        assert command.main(["--regrade", str(out), *words]) == 2
        assert said in capsys.readouterr().err


def test_a_part_of_a_set_is_no_score_of_it(evaluated, tmp_path):
    out = tmp_path / "out"
    assert command.main([*evaluated.at(out), "--limit", "2"]) == 0
    page = (out / "report.md").read_text()
    assert "**Limited: puzzles 2 of 10, echo 2 of 3 prompts. This is not" in page
    assert report(out)["is_limited"] and not report(evaluated.out)["is_limited"]
    # The same prompts draw the same texts in whatever company.
    whole = {(r["set"], r["draw"], r["sample"]): r["response"] for r in samples(evaluated.out)}
    for r in samples(out):
        assert whole[r["set"], r["draw"], r["sample"]] == r["response"]


def test_two_writers_are_one_too_many(evaluated, tmp_path, capsys):
    with running.lock_results(tmp_path / "out"):
        assert command.main(evaluated.at(tmp_path / "out")) == 2
    assert "evaluation folder" in (error := capsys.readouterr().err) and "is being written" in error


def test_mistakes_cost_no_weights(evaluated, finished, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "load_weights", None)
    model, suite = (
        evaluated.words[0],
        ["--suite", str(data / "tiny.gin"), "--data-folder", str(data)],
    )
    for words, said in {
        (model,): "expected one of --suite, --data and --regrade",
        (model, "--suite", "mth"): "no suite 'mth'",
        (model, *suite[:2], "--data-folder", str(tmp_path)): "set echo: there is no file",
        (model, "--data", str(tmp_path / "gone.jsonl")): "there is no file",
        (model, "--data", str(data / "echo.jsonl")): "found no field 'kind'",
        (model, "--data", str(data / "echo.jsonl"), "--grader", "exat"): "kind 'exat'",
        (model, *suite, "--samples", "0"): "--samples: Suite.samples = 0: expected a whole number",
        (model, *suite, "--chunk", "0"): "--chunk 0: expected 1 or more",
        (model, *suite, "--onyl", "echo"): "unknown argument '--onyl' (did you mean --only?)",
        (model, *suite, "--only", "ecko"): "there is no set 'ecko' (did you mean echo?)",
        (model, *suite, "--checkpoint", "2"): "is no run; leave it out",
        (str(tmp_path / "gone"), *suite): "no such folder; expected a Hugging Face model folder",
        (str(tmp_path), *suite): "a folder without config.json; expected",
        (str(finished.folder), *suite, "--checkpoint", "99"): "has no such step; complete: ",
        (str(finished.folder / "checkpoints" / "6"), *suite, "--checkpoint", "4"): "leave one out",
        (model, *suite, "--out", str(data / "echo.jsonl")): "cannot be used",
    }.items():
        try:
            status = command.main([*words])
        except SystemExit as left:
            status = left.code
        error = capsys.readouterr().err
        assert status == 2 and said in error, (words, error)


def test_a_full_disk_is_said_and_costs_nothing(evaluated, full_disk, monkeypatch, capsys):
    (full_disk / "filler").write_bytes(b"x" * (1020 * 1024))
    monkeypatch.setattr(running, "load_weights", None)
    assert command.main(evaluated.at(full_disk / "out")) == 2
    assert "make room there" in capsys.readouterr().err
    (full_disk / "filler").unlink()
    monkeypatch.undo()
    assert command.main(evaluated.at(full_disk / "out")) == 0
    assert report(full_disk / "out") == report(evaluated.out)


def test_live_weights_checkpoint_and_export_have_one_evaluation(runs, data, tmp_path, finished):
    """What the run says of its last policy, of its checkpoint and of its exported folder."""
    suites = [f"Evaluate.suites=('{data / 'tiny.gin'}',)", f"Evaluate.data_folder='{data}'"]
    folder = tmp_path / "run"
    out, _ = runs.run(folder, *suites, "Train.iterations=2", "Metrics.tensorboard=True")
    assert "puzzles 10 prompts x 4 samples" in " ".join(out.split())
    rows = [row for row in metrics(folder) if "evaluate/puzzles/avg" in row]
    assert [row["iteration"] for row in rows] == [0, 2] and "2/2    puzzles   avg@4" in out
    live = rows[-1]
    before, after = (row["evaluate/puzzles/avg"] for row in rows)
    assert f"puzzles/avg {before:.3f} {after:.3f}" in " ".join(out.split())
    assert scalars(folder)["evaluate/puzzles/avg"][-1] == (
        2,
        pytest.approx(live["evaluate/puzzles/avg"]),
    )

    words = ["--suite", str(data / "tiny.gin"), "--data-folder", str(data)]
    words += ["--set", "Sampler.slots=16"]  # the run's
    found = {}
    for model in ("run", "run/model"):
        place = tmp_path / f"evaluation of {model.replace('/', ' ')}"
        assert command.main([str(tmp_path / model), *words, "--out", str(place)]) == 0
        found[model] = samples(place)
        figures = report(place)["figures"]
        for name in ("puzzles", "echo"):
            assert figures[name]["avg"]["value"] == live[f"evaluate/{name}/avg"]
            assert figures[name]["truncated"] == pytest.approx(live[f"evaluate/{name}/truncated"])
            assert figures[name]["tokens_mean"] == live[f"evaluate/{name}/response_length"]
    assert found["run"] == found["run/model"]
    for name in ("puzzles", "echo"):
        path = folder / "transcripts" / f"held_out_{name}_000002.jsonl"
        texts = [json.loads(line) for line in path.read_text().splitlines()]
        first = {r["draw"]: r for r in found["run"] if r["set"] == name and r["sample"] == 0}
        assert [t["response"] for t in texts] == [first[t["draw"]]["response"] for t in texts]
        assert len(texts) == min(8, len(first))


def test_a_suite_that_cannot_be_used_stops_a_run_at_its_start(runs, data, tmp_path):
    tiny, gone = str(data / "tiny.gin"), str(data / "gone.gin")
    (data / "gone.gin").write_text("Suite.sets = ('gone',)\ngone.paths = ('gone.jsonl',)\n")
    (data / "long.gin").write_text(SUITE.replace("= 8", "= 99") + "Reward.timeout_s = 9.0\n")
    (data / "wide.gin").write_text(SUITE + "echo.template = '1 1 1 1 1 {prompt}'\n")

    def rows(*suites: str) -> dict[str, str]:
        flags = (f"Evaluate.suites={suites!r}", f"Evaluate.data_folder='{data}'")
        words = [word for flag in (*flags, "Evaluate.prompts=4") for word in ("--set", flag)]
        return dict(check_inputs(read_config(["--config", str(runs.config), *words], FACTORIES)))

    for suites, said in {
        ("mth",): "Evaluate.suites: no suite 'mth'",
        (gone,): "set gone: there is no file .*Evaluate.data_folder",
        (tiny, tiny): "the set 'echo' more than once",
        (str(data / "wide.gin"),): "expected at most 8; set Sampler.max_prompt_tokens = ",
    }.items():
        with pytest.raises(UserError, match=said):
            rows(*suites)
    assert rows(tiny)["puzzles"] == "4 prompts x 4 samples, the first of 10"
    assert rows(str(data / "long.gin"))["echo"] == (
        "3 prompts x 1 samples, cut at 8 tokens (the suite says 99), but not by the suite's "
        "Reward.timeout_s = 9.0"
    )
