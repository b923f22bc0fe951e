"""From a config to graders: kinds of the data, bad rows, shapes."""

import json
import subprocess
import sys

import pytest

from aspo_jax.build import check_inputs
from aspo_jax.config import ConfigError, read_config
from aspo_jax.config.reading import config_folder
from aspo_jax.data import DataError, build_character_tokenizer, load_tokenizer
from aspo_jax.inputs import build_prompts, data_kinds, held_out_prompts
from aspo_jax.parts import FACTORIES, build_reward_shape, open_scorer
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
    data = ("Data.source=files", f"Data.train_path={path}", f"Data.eval_path={path}")
    return config_of(*data, "Model.path=somewhere", *settings)


def test_the_kinds_of_the_data_are_opened(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def f(completion, answer, kind): return float(kind == 'custom' and answer['word'] == "
        "completion)"
    )
    monkeypatch.chdir(tmp_path)
    config = jsonl(tmp_path, [ROWS[0], ROWS[2]], "Reward.functions=['own_rewards:f']")
    assert data_kinds(config) == {"math", "custom"}
    assert data_kinds(config_of()) == {"countdown"}
    with open_scorer(config) as scorer:
        verdicts = scorer.score(
            [
                Submission("math", "4", "4", True, 1),
                Submission("custom", "yes", ROWS[2]["answer"], True, 1),
            ]
        )
    right, wrong = Verdict(1.0, "match"), Verdict(0.0, "mismatch")
    assert verdicts == [
        Verdict(1.0, "match", parts={"math": right, "f": wrong}),
        Verdict(1.0, "match", parts={"f": right}),
    ]


def test_weights_are_of_functions():
    two = "Reward.functions=['own:f', 'own:g']"
    assert config_of(two, "Reward.weights=[1, -0.5]").reward.weights == (1.0, -0.5)
    with pytest.raises(
        ConfigError, match=r"Reward.weights = \(1.0,\) has 1 of 2 weights; expected"
    ):
        config_of(two, "Reward.weights=[1.0]")


def test_a_mistake_in_the_function_shows_at_the_start(tmp_path):
    config = jsonl(tmp_path, ROWS[2:], "Reward.functions=['no_such_module:f']")
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer and the shape of a model; no weights: none may be read."""
    folder = tmp_path_factory.mktemp("model")
    build_character_tokenizer("0123456789+= ").save_pretrained(folder)
    shape = (config_folder() / "shapes" / "Qwen2.5-0.5B.json").read_text()
    (folder / "config.json").write_text(shape)
    return folder


def write_rows(path, prompts, **changes):
    rows = [{"prompt": p, "answer": "4", "kind": "math"} | changes for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_data(model, train, evaluation, *settings):
    data = (f"Model.path={model}", f"Data.train_path={train}", f"Data.eval_path={evaluation}")
    return config_of("Data.source=files", *data, *settings)


def test_the_start_table_counts_the_prompts_that_there_are(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["1+1=", "2+2="])
    evaluation = write_rows(tmp_path / "eval.jsonl", ["1+3="] * 8)
    table = dict(check_inputs(own_data(model, train, evaluation)))
    assert table["prompts"] == f"{train}, 2 rows"
    assert table["evaluation"] == (
        "8 prompts x 16 samples = 128, all rows of the file (Evaluate.prompts = 128 asks for more),"
        " every 20 iterations"
    )
    few = own_data(model, train, evaluation, "Evaluate.prompts=3")
    assert dict(check_inputs(few))["evaluation"] == (
        "3 prompts x 16 samples = 48, the first 3 of 8 rows (Evaluate.prompts = 8 for all),"
        " every 20 iterations"
    )
    assert len(held_out_prompts(few, load_tokenizer(model))) == 3
    exact = own_data(model, train, evaluation, "Evaluate.prompts=8")
    assert dict(check_inputs(exact))["evaluation"].startswith("8 prompts x 16 samples = 128, every")


def test_what_is_wrong_with_both_files_is_said_at_once_with_what_would_hold_them(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["1+1=", "1+1=" * 10, "2" * 20])
    evaluation = write_rows(tmp_path / "eval.jsonl", ["3" * 30])
    with pytest.raises(DataError) as error:
        check_inputs(own_data(model, train, evaluation, "Sampler.cache_tokens=40"))
    assert str(error.value) == (
        f"{train}:2 (id 2): found a prompt of 42 tokens, the longest of 2 (of 3) that are too long,"
        " expected at most 12; set Sampler.max_prompt_tokens = 42 and Train.row_tokens = 65 (now"
        " 35) and a Sampler.cache_tokens well above 65 (now 40), or drop the rows\n"
        f"{evaluation}:1 (id 1): found a prompt of 32 tokens, the longest of 1 (of 1) that are too"
        " long, expected at most 12; set Sampler.max_prompt_tokens = 32 and Train.row_tokens = 55"
        " (now 35) and a Sampler.cache_tokens well above 55 (now 40), or drop the rows"
    )


def test_prompts_are_spelled_once_for_the_check_and_the_stream(model, tmp_path, monkeypatch):
    train = write_rows(tmp_path / "train.jsonl", ["1+1="])
    config = own_data(model, train, train)
    check_inputs(config)
    monkeypatch.setattr("aspo_jax.inputs.fitting_rows", lambda *_, **__: pytest.fail("again"))
    assert len(next(build_prompts(config, load_tokenizer(model)))) == 32


def test_bad_answers_are_counted_and_found_before_anything_is_loaded(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["1+1="])
    evaluation = write_rows(tmp_path / "eval.jsonl", ["1", "2", "3"], answer={"a": 1})
    with pytest.raises(
        DataError, match=r"eval.jsonl:1 \(id 1\): .* \(and 2 more rows of 3\); correct"
    ):
        check_inputs(own_data(model, train, evaluation))


def test_rules_and_stop_ids_are_checked_with_the_vocabulary(model, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["1+1="])
    beyond = own_data(model, train, train, "Sampler.stop_ids=[2, 17]")
    with pytest.raises(ConfigError, match=r"stop_ids = \(2, 17\): found 17, expected .* 0 to 16"):
        check_inputs(beyond)
    twice = config_of("Objective.penalties=['kl_penalty', 'low_entropy_kl']")
    with pytest.raises(ConfigError, match="'ref_kl' is emitted twice"):
        check_inputs(twice)


def test_a_model_folder_that_is_not_there_is_found_first(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ["1+1="])
    with pytest.raises(DataError, match="nowhere: no such folder"):
        check_inputs(own_data(tmp_path / "nowhere", train, train))


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
    with pytest.raises(ConfigError, match="^--set #2: .*top is 1.5, expected a share from 0 to 1"):
        config_of("Reward.shapes=('grpo_lambda',)", "grpo_lambda.top=1.5")
