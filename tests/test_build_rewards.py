"""From a config to graders: kinds of the data, bad rows, shapes."""

import json
import subprocess
import sys

import pytest

from aspo_jax.build import FACTORIES, build_reward_shape, data_kinds, open_scorer
from aspo_jax.config import ConfigError, read_config
from aspo_jax.data import DataError
from aspo_jax.rewards import RewardError, Submission, Verdict

ROWS = [
    {"prompt": "2+2", "answer": "4", "kind": "math"},
    {"prompt": "add", "answer": {"asserts": ["assert add(1, 2) == 3"]}, "kind": "code"},
    {"prompt": "say", "answer": {"word": "yes"}, "kind": "custom"},
]


def config_of(*settings: str):
    flags = [word for setting in settings for word in ("--set", setting)]
    return read_config(["--config", "countdown_cpu", *flags], FACTORIES)


def jsonl(folder, rows, *settings: str):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("Data.kind=jsonl", f"Data.train_path={path}", f"Data.eval_path={path}")
    return config_of(*data, "Model.path=somewhere", *settings)


def test_the_kinds_of_the_data_are_opened(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def f(p, c, a): return float(a['word'] in c)")
    monkeypatch.chdir(tmp_path)
    config = jsonl(tmp_path, [ROWS[0], ROWS[2]], "Reward.function=own_rewards:f")
    assert data_kinds(config) == {"math", "custom"}
    assert data_kinds(config_of()) == {"countdown"}
    with open_scorer(config) as scorer:
        verdicts = scorer.score(
            [
                Submission("math", "4", "4", True, 1),
                Submission("custom", "yes", ROWS[2]["answer"], True, 1),
            ]
        )
    assert verdicts == [Verdict(1.0, "match")] * 2


def test_a_mistake_in_the_function_shows_at_the_start(tmp_path):
    config = jsonl(tmp_path, ROWS[2:], "Reward.function=no_such_module:f")
    with pytest.raises(RewardError, match="cannot import no_such_module"):
        open_scorer(config)


@pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux")
def test_the_sandbox_is_attacked_once(tmp_path, monkeypatch):
    run, probes = subprocess.run, []

    def counted(command, **how):
        probes.append(command)
        return run(command, **how)

    monkeypatch.setattr(subprocess, "run", counted)
    with open_scorer(jsonl(tmp_path, ROWS[1:2], "Reward.sandbox=rlimits")) as scorer:
        program = "```python\ndef add(a, b): return a + b\n```"
        verdicts = scorer.score([Submission("code", program, ROWS[1]["answer"], True, 1)])
    assert verdicts == [Verdict(1.0, "match")]
    assert len(probes) == 1


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("code", {"asserts": ["assert f("]}, r".*\(asserts\[0\] is not Python"),
        ("code", {"inputs": ["1"], "outputs": []}, r".*\(inputs has 1 entries and outputs 0"),
        ("code", {"inputs": None, "outputs": ["1"]}, r".*\(inputs is null, expected a list"),
        ("math", {"a": 1}, "found the answer .*expected a string, a number"),
        ("countdown", "7", "found the answer .*expected such as .*numbers"),
    ],
)
def test_answers_that_no_grader_can_use_are_named_by_line(tmp_path, kind, answer, message):
    config = jsonl(tmp_path, [ROWS[0], {"prompt": "x", "answer": answer, "kind": kind}])
    with pytest.raises(DataError, match=rf"rows.jsonl:2 \(id 2\): {message}"):
        data_kinds(config)


def test_shapes_come_from_the_config():
    cut = Submission("exact", "x", "x", False, 10_000)
    shape = build_reward_shape(config_of("Reward.shapes=('mask_truncated',)"))
    assert shape([[(cut, Verdict(1.0, "match"))]]) == [[Verdict(1.0, "match", is_valid=False)]]
    ramp = build_reward_shape(config_of("Reward.overlong_buffer=16"))
    assert ramp([[(cut, Verdict(1.0, "match"))]])[0][0].reward < 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("Reward.shapes=('mask_truncatd',)", "unknown shape 'mask_truncatd'.*mask_truncated"),
        ("Reward.sandbox=docker", "Reward.sandbox"),
        ("Reward.max_failures=1.5", "Reward.max_failures"),
        ("grpo_lambda.tip=0.5", "grpo_lambda.tip"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        config_of(setting)


def test_impossible_arguments_of_a_shape_are_config_errors():
    config = config_of("Reward.shapes=('grpo_lambda',)", "grpo_lambda.top=1.5")
    with pytest.raises(ConfigError, match="top is 1.5, expected a share from 0 to 1"):
        build_reward_shape(config)
