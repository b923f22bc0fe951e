"""Configs: what is read, what is refused and with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from aspo_jax.config import ConfigError, diff_text, packaged, parse_config, read_config
from aspo_jax.config.reading import config_folder
from aspo_jax.config.sections import SECTIONS, fields


def _aspo(clip_low: float = 0.2, clip_high: float = 0.2, cap: float | None = 3.0):
    """ASPO: the flipped ratio."""


def _kl_penalty(*, beta: float, kind: Literal["k1", "k3"] = "k3"):
    """Pull towards the reference."""


def _none():
    """Nothing to set."""


def _fixed_length(length: int):
    """A constant denominator."""


FACTORIES = {
    "objective": {"aspo": _aspo, "kl_penalty": _kl_penalty},
    "advantage": {"group_zscore": _none},
    "aggregate": {"sequence_mean": _none, "token_mean": _none, "fixed_length": _fixed_length},
}
GOOD = (config_folder() / "countdown_cpu.gin").read_text()


def _read(*argv: str):
    return read_config(argv, FACTORIES)


def _write(folder: Path, text: str, name: str = "run.gin") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- what is read -----------------------------------------------------------------------------


def test_default_is_the_embedded_run():
    config = _read()
    assert config.name == "countdown_cpu"
    assert config.run_folder == "runs/countdown_cpu-aspo-seed0"
    assert config.data.kind == "countdown" and config.model.hidden_size == 64
    assert config.factories["aspo"] == {"clip_low": 0.2, "clip_high": 0.2, "cap": 3.0}
    rows = dict(config.derived())
    assert rows["sequences per step"] == "32 prompts x 16 samples = 512"
    assert rows["updates per step"] == "4 minibatches x 2 epochs = 8"


def test_packaged_configs_are_named():
    assert {"countdown_cpu", "countdown_quick", "countdown_hard"} <= set(packaged())


def test_text_round_trips_unusual_values():
    config = _read(
        *("--set", "Run.folder='it''s # 100 %name'", "--set", "Metrics.profile_iterations=[1, 2]"),
        *("--set", "Objective.penalties=('kl_penalty',)", "--set", "kl_penalty.beta=1e-3"),
        *("--set", "aspo.cap=None", "--set", "Run.accept_changes=True"),
    )
    assert config.run.folder == "its # 100 %name"
    assert config.metrics.profile_iterations == (1, 2)
    assert parse_config(config.text(), FACTORIES) == config


def test_includes_macros_comments_and_overrides(tmp_path):
    _write(tmp_path, GOOD, "base.gin")
    path = _write(
        tmp_path,
        "include 'base.gin'  # first\n\n# a comment with %nothing\nwidth = 32\n"
        "Model.hidden_size = %width\nModel.intermediate_size = %width\n"
        "Metrics.profile_iterations = [\n    3,  # multi-line\n    4,\n]\nOptim.clip_norm = 2\n",
    )
    config = _read("--config", path)
    assert (config.model.hidden_size, config.model.intermediate_size) == (32, 32)
    assert config.metrics.profile_iterations == (3, 4)
    assert config.optim.clip_norm == 2.0 and isinstance(config.optim.clip_norm, float)
    assert _read("--config", path, "--set", "width=48").model.hidden_size == 48
    assert _read("--config", path, "--set", "Model.hidden_size=%width").model.hidden_size == 32


def test_later_flags_win_and_shell_stripped_quotes_are_text():
    config = _read(
        *(
            "--set",
            "Objective.name=aspo",
            "--set",
            "Run.folder=runs/a-1.5_b",
            "--set",
            "Run.seed=1",
        ),
        *("--set", "Countdown.operations=+-*", "--set", "Run.seed=2"),
    )
    assert config.run.seed == 2
    assert config.run_folder == "runs/a-1.5_b"
    assert config.countdown.operations == "+-*"


def test_diff_is_readable_and_ignores_permission_and_place():
    old = _read("--set", "aspo.cap=2.0").text()
    changes = ("Optim.learning_rate=1e-3", "Run.accept_changes=True", "Run.folder=elsewhere")
    new = _read(*(word for change in changes for word in ("--set", change)))
    assert new.diff(old) == "Optim.learning_rate: 0.0005 -> 0.001\naspo.cap: 2.0 -> 3.0"
    assert diff_text("A.b = 1\n", "A.b = 1\nC.d = 2\n") == "C.d: (default) -> 2"


def test_frozen():
    with pytest.raises(AttributeError):
        _read().train.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        _read("--help")
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for name in SECTIONS:
        for field, info in fields(name).items():
            assert f"{name}.{field}  (" in page and info.description in page
    assert "aspo.cap  (float | None, default 3.0)" in page
    assert "kl_penalty.beta  (float, required)" in page
    assert "ASPO: the flipped ratio." in page
    assert "[tokens] longest prompt" in page


def test_config_does_not_import_jax():
    code = "import sys, aspo_jax.config; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is refused, word for word -----------------------------------------------------------

# (lines put after the good config, in file run.gin; message; {n} is the line of the first one)
BAD_LINES = [
    ("Optim.lerning_rate = 1.0", "run.gin:{n}: Optim.lerning_rate = 1.0: Optim has no field"
     " lerning_rate (did you mean learning_rate?)"),
    ("Optm.b1 = 0.5", "run.gin:{n}: Optm.b1 = 0.5: unknown section Optm (did you mean Optim?)"),
    ("aspo.kap = 2.0", "run.gin:{n}: aspo.kap = 2.0: aspo has no argument kap"
     " (did you mean cap?)"),
    ("kl_penalty.beta = 'big'", "run.gin:{n}: kl_penalty.beta = 'big': expected a number,"
     " found 'big'"),
    ("kl_penalty.kind = 'k2'", "run.gin:{n}: kl_penalty.kind = 'k2': expected one of 'k1', 'k3',"
     " found 'k2'"),
    ("Train.head_chunk = 1.5", "run.gin:{n}: Train.head_chunk = 1.5: expected a whole number >= 1,"
     " found 1.5"),
    ("Train.head_chunk = True", "run.gin:{n}: Train.head_chunk = True: expected a whole number"
     " >= 1, found True"),
    ("Train.head_chunk = 0", "run.gin:{n}: Train.head_chunk = 0: expected a whole number >= 1,"
     " found 0"),
    ("Optim.b1 = 1", "run.gin:{n}: Optim.b1 = 1: expected a number >= 0 and < 1, found 1"),
    ("Optim.b2 = '0.9'", "run.gin:{n}: Optim.b2 = '0.9': expected a number >= 0 and < 1,"
     " found '0.9'"),
    ("Optim.eps = 1e999", "run.gin:{n}: Optim.eps = 1e309: expected a number > 0, found inf"),
    ("Run.folder = 3", "run.gin:{n}: Run.folder = 3: expected quoted text or None, found 3"),
    ("Metrics.tensorboard = 1", "run.gin:{n}: Metrics.tensorboard = 1: expected True or False,"
     " found 1"),
    ("Metrics.tensorboard = true", "run.gin:{n}: found the bare name true; expected a literal"
     " (did you mean True?)"),
    ("Model.dtype = 'float16'", "run.gin:{n}: Model.dtype = 'float16': expected one of 'float32',"
     " 'bfloat16', found 'float16'"),
    ("Objective.penalties = 'kl_penalty'", "run.gin:{n}: Objective.penalties = 'kl_penalty':"
     " expected a list of quoted texts, found 'kl_penalty'"),
    ("Reward.timeout_s = 2 * 3", "run.gin:{n}: found '2 * 3'; expected a literal: a number, quoted"
     " text, True, False, None or a list of these"),
    ("Run.folder = open('x')", "run.gin:{n}: found \"open('x')\"; expected a literal: a number,"
     " quoted text, True, False, None or a list of these"),
    ("Run.seed = %sede", "run.gin:{n}: unknown macro %sede"),
    ("size = %size\nRun.seed = %size", "run.gin:{n}: the macro %size stands for itself"),
    ("seed = 3", "run.gin:{n}: seed = 3: the macro is never used; a setting is written"
     " Section.field (did you mean Run.seed or Evaluate.seed?)"),
    ("Optim.learning_rate", "run.gin:{n}: found 'Optim.learning_rate'; expected Section.field ="
     " literal"),
    ("a.b.c = 1", "run.gin:{n}: found 'a.b.c = 1'; expected Section.field = literal"),
    ("Run.seed == 1 =", "run.gin:{n}: cannot read 'Run.seed == 1 ='; expected Section.field ="
     " literal"),
    ("include 'other.gin'", "run.gin:{n}: include must come before the first setting of the file"),
    ("Run.seed = 1\nRun.seed = 1", "run.gin:{m}: Run.seed is set twice, first at run.gin:{n}"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_bad_line(lines, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, GOOD + lines + "\n")
    n = GOOD.count("\n") + 1
    with pytest.raises(ConfigError) as error:
        _read("--config", "run.gin")
    assert str(error.value) == message.format(n=n, m=n + 1)


# (the --set values; message)
BAD_FLAGS = [
    (["Objective.name=apso"], "--set #1: unknown objective 'apso' (did you mean aspo?); expected"
     " one of aspo, kl_penalty"),
    (["Objective.advantage=zscore"], "--set #1: unknown advantage 'zscore' (did you mean"
     " group_zscore?); expected one of group_zscore"),
    (["Objective.aggregate=fixed_length"], "--set #1: fixed_length needs fixed_length.length:"
     " a whole number"),
    (["Train.prompts_per_step=30"], "--set #1: Train.prompts_per_step = 30 must be a multiple of"
     " Train.prompts_per_minibatch = 8; set Train.prompts_per_step to 24 or 32"),
    (["Train.row_tokens=34"], "--set #1: Train.row_tokens = 34 cannot hold a prompt of 12 and a"
     " response of 24 tokens; set it to at least 12 + 24 - 1 = 35"),
    (["Model.kv_heads=3"], "{base}: Model.heads = 4 must be a multiple of Model.kv_heads = 3;"
     " set Model.kv_heads to a divisor of 4"),
    (["Model.hidden_size=60"], "--set #1: Model.hidden_size = 60 must give each of Model.heads = 4"
     " an even width; set Model.hidden_size to a multiple of 8"),
    (["Model.layers=None"], "a new model needs its shape: set Model.layers, or Model.path to a"
     " folder"),
    (["Run.seed=1", "Data.kind=jsonl", "Model.path=model"], "--set #2: Data.kind = 'jsonl'"
     " needs Data.train_path and Data.eval_path"),
    (["Countdown.low=12"], "--set #1: Countdown.low = 12 is above Countdown.high = 9; set"
     " Countdown.low to at most 9"),
    (["Countdown.operations='+/'"], "--set #1: Countdown.operations = '+/'; expected some of"
     " + - *, each once, such as '+-'"),
    (["Sampler.temperature=0"], "--set #1: Sampler.temperature = 0: expected a number > 0,"
     " found 0"),
    (["Sampler.top_p=0.9"], "--set #1: Sampler.top_p = 0.9 biases training: tokens would be drawn"
     " from a part of the distribution, renormalised, while importance ratios compare the whole,"
     " and no rule here corrects for that; set it to 1.0 (Evaluate.top_p is for evaluation)"),
    (["Evaluate.temperature=0", "Evaluate.min_p=0.1"], "--set #1: Evaluate.temperature = 0 always"
     " takes the likeliest token; Evaluate.top_k, top_p and min_p then mean nothing, leave them"
     " out"),
    (["Reward.overlong_buffer=30"], "--set #1: Reward.overlong_buffer = 30 is longer than"
     " Sampler.max_response_tokens = 24; set it to at most 24"),
    (["Runtime.fsdp=-1"], "only one mesh axis may be -1 (the rest), found Runtime.data = -1,"
     " Runtime.fsdp = -1, Runtime.tensor = 1; set the others to 1"),
    (["Runtime.tensor=0"], "--set #1: a mesh axis has no size 0; set 1, or -1 for the rest"),
    (["Run.seed"], "--set #1: found 'Run.seed'; expected Section.field=value"),
    (["Run.seed=one"], "--set #1: Run.seed = 'one': expected a whole number >= 0, found 'one'"),
    (["Run.folder=__import__('os')"], "--set #1: found \"__import__('os')\"; expected a literal:"
     " a number, quoted text, True, False, None or a list of these"),
    (["Run.sed=1", "Train.epochs=0"], "--set #2: Train.epochs = 0: expected a whole number"
     " >= 1, found 0\n--set #1: Run.sed = 1: Run has no field sed (did you mean seed?)"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[f[-1] for f, _ in BAD_FLAGS])
def test_bad_flag(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, GOOD)
    line = 1 + GOOD[: GOOD.index("Model.heads")].count("\n")
    with pytest.raises(ConfigError) as error:
        _read("--config", "run.gin", *(word for flag in flags for word in ("--set", flag)))
    assert str(error.value) == message.format(base=f"run.gin:{line}")


def test_all_missing_settings_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        parse_config("Train.epochs = 1\n", FACTORIES)
    lines = str(error.value).splitlines()
    assert lines[0] == "text: 12 required settings are missing:"
    assert len(lines) == 13
    assert "  Optim.learning_rate: a number > 0; learning rate after the warm-up" in lines


def test_missing_and_circular_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        _read("--config", "countdown_quik")
    names = ", ".join(packaged())
    assert str(error.value) == (
        f"--config: no config file 'countdown_quik'; expected a path or one of {names}"
        " (did you mean countdown_quick?)"
    )
    _write(tmp_path, "include 'b.gin'\n", "a.gin")
    _write(tmp_path, "include 'a.gin'\n", "b.gin")
    with pytest.raises(ConfigError, match="in a circle: a.gin -> b.gin -> a.gin"):
        _read("--config", "a.gin")
    _write(tmp_path, "include 'gone.gin'\n", "c.gin")
    with pytest.raises(ConfigError, match=r"c.gin:1: the included file .*gone.gin' does not exist"):
        _read("--config", "c.gin")


def test_factories_may_not_share_a_name():
    clash = {**FACTORIES, "aggregate": {"aspo": _none}}
    with pytest.raises(ValueError, match="the aggregate factory 'aspo' has the name of another"):
        read_config([], clash)
