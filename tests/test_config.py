"""Configs: what is read, what is refused and with which words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from aspo_jax.config import ConfigError, diff_text, packaged, parse_config, read_config
from aspo_jax.config.factories import arguments
from aspo_jax.config.reading import config_folder
from aspo_jax.config.schema import describe, meanings
from aspo_jax.config.sections import SECTIONS, fields
from aspo_jax.errors import run_command
from aspo_jax.parts import FACTORIES as SHIPPED
from aspo_jax.paths import page, shown


def _aspo(clip_low: float = 0.2, clip_high: float = 0.2, cap: float | None = 3.0):
    """ASPO: the flipped ratio."""


def _kl_penalty(*, beta: float, kind: Literal["k1", "k3"] = "k3"):
    """Pull towards the reference."""


def _none():
    """Nothing to set."""


def _fixed_length(length: int):
    """A constant denominator."""


def _adamw(learning_rate, axes):
    """Made from more than its settings."""


FACTORIES = {
    "source": SHIPPED["source"],
    "objective": {"aspo": _aspo, "kl_penalty": _kl_penalty},
    "advantage": {"group_zscore": _none},
    "aggregate": {"sequence_mean": _none, "token_mean": _none, "fixed_length": _fixed_length},
    "shape": {},
    "optimizer": {"adamw": _adamw},
    "writer": {},
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
    assert config.data.source == "countdown" and config.model.hidden_size == 64
    assert config.factories["aspo"] == {"clip_low": 0.2, "clip_high": 0.2, "cap": 3.0}
    rows = dict(config.derived())
    assert rows["sequences per step"] == "32 prompts x 16 samples = 512"
    assert rows["updates per step"] == "4 minibatches x 2 epochs = 8"
    assert "refill" not in rows
    rows = dict(_read("--set", "Train.refill_rounds=3").derived())
    assert rows["refill"] == "up to 3 more rounds of 32 prompts: at most 4 x 512 = 2,048 sequences"


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
    # A run of an earlier version, which knew fewer settings, goes on.
    fewer = "".join(line for line in new.text().splitlines(True) if "Optim.name" not in line)
    assert "Optim.name" in new.text() and new.diff(fewer) == ""
    other = _read("--set", "Metrics.transcripts=3").diff(_read().text().replace("Metrics.t", "#"))
    assert other == "Metrics.transcripts: 8 -> 3"


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
    ("a.b.c = 1", "run.gin:{n}: a.b.c = 1: unknown section a.b"),
    ("a.b.c.d = 1", "run.gin:{n}: found 'a.b.c.d = 1'; expected Section.field = literal"),
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
     " one of aspo, kl_penalty, or 'package.module:factory'"),
    (["Objective.advantage=zscore"], "--set #1: unknown advantage 'zscore' (did you mean"
     " group_zscore?); expected one of group_zscore, or 'package.module:factory'"),
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
     " folder or hub name"),
    (["Run.seed=1", "Data.source=files", "Model.path=model"], "--set #2: Data.source = 'files'"
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
    (["Evaluate.temperature=0", "Evaluate.min_p=0.1"], "--set #1: Evaluate.temperature = 0.0 always"
     " takes the likeliest token; Evaluate.top_k, top_p and min_p then mean nothing, leave them"
     " out"),
    (["Reward.overlong_buffer=30"], "--set #1: Reward.overlong_buffer = 30 is longer than"
     " Sampler.max_response_tokens = 24; set it to at most 24"),
    (["Runtime.fsdp=-1"], "only one mesh axis may be -1 (the rest), found Runtime.data = -1,"
     " Runtime.fsdp = -1, Runtime.tensor = 1; set the others to 1"),
    (["Runtime.tensor=0"], "--set #1: Runtime.tensor = 0: a mesh axis has no size 0; set 1,"
     " or -1 for the rest"),
    (["Lora.path=adapter"], "--set #1: Lora.path = 'adapter' starts from an adapter and Lora.rank ="
     " None trains none; set Lora.rank"),
    (["Lora.weights=int8"], "--set #1: Lora.weights = 'int8' is of frozen weights and Lora.rank ="
     " None trains all; set Lora.rank"),
    (["Lora.rank=0"], "--set #1: Lora.rank = 0: expected a whole number >= 1 or None, found 0"),
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


# --- whatever a user may hand in: exit status 2 and one paragraph --------------------------------

DEEP = 20_000
HOSTILE_TEXTS = {
    "operators": b"Run.seed = " + b"1+" * DEEP + b"1",
    "brackets": b"Run.seed = " + b"[" * DEEP + b"]" * DEEP,
    "brackets that parse": b"Run.seed = " + b"[" * 90 + b"]" * 90,
    "signs": b"Run.seed = " + b"-" * DEEP + b"1",
    "nots": b"Run.seed = " + b"not " * DEEP + b"1",
    "attributes": b"a" + b".b" * DEEP + b" = 1",
    "calls": b"Run.seed = " + b"f(" * DEEP + b")" * DEEP,
    "a lambda": b"Run.seed = " + b"lambda:" * DEEP + b"1",
    "digits": b"Run.seed = " + b"9" * 5000,
    "hexadecimal digits": b"Run.seed = 0x" + b"f" * 5000,
    "digits of a float": b"Optim.eps = 1" + b"0" * 400,
    "a long name": b"Run." + b"s" * 5000 + b" = 1",
    "a long section": b"R" * 5000 + b".seed = 1",
    "a long bare name": b"Run.seed = " + b"s" * 5000,
    "a long text for a number": b"Run.seed = '" + b"s" * 5000 + b"'",
    "a long list for a number": b"Run.seed = [" + b"1, " * 5000 + b"]",
    "a long line that is no setting": b"x" * 5000,
    "a long call": b"Run.seed = open('" + b"x" * 5000 + b"')",
    "macros of macros": b"\n".join(b"m%d = %%m%d" % (i, i + 1) for i in range(2000))
    + b"\nRun.seed = %m0",
    "NUL": b"Run.seed = 1\0",
    "half a surrogate pair": b"Run.folder = '\\ud800'",
    "NUL in a text": b"Run.folder = 'a\\0b'",
    "a home that is not": b"Run.folder = '~nosuchuser/x'",
    "an address": b"Run.folder = 'gs://bucket/x'",
    "a long path": b"Run.folder = '" + b"x" * 300 + b"'",
    "a blank path": b"Model.path = ''",
    "a blank text": b"Objective.name = ' '",
    "an empty stop": b"Sampler.stop_strings = ['\\n', '']",
    "a byte-order mark": b"\xef\xbb\xbfRun.seed = 1",
    "UTF-16": "Run.seed = 1".encode("utf-16"),
    "UTF-16 without mark": "Run.seed = 1".encode("utf-16-le"),
    "latin-1": b"Run.folder = 'caf\xe9'",
    "gzip": b"\x1f\x8b\x08\x00",
    "noise": bytes(range(255, 0, -1)),
    "nothing": b"",
    "an unclosed text": b"Run.folder = '''a",
    "a tab too many": b"  Run.seed = 1",
    "a class": b"class A: pass",
    "an f-string": b"Run.folder = f'{1}'",
    "bytes": b"Run.folder = b'x'",
    "a complex number": b"Run.seed = 1j",
    "an ellipsis": b"Run.seed = ...",
    "a set": b"Run.seed = {1}",
    "include of nothing": b"include ''",
    "include of a folder": b"include '.'",
    "include of half a pair": b"include '\\ud800'",
    "include of NUL": b"include 'a\\0b'",
    "include of an address": b"include 'https://host/a.gin'",
    "include of itself": b"include 'run.gin'",
}  # fmt: skip
HOSTILE_PATHS = [
    *("", " ", "a\0b", "\ud800.gin", "~nosuchuser/a.gin", "x" * 300, "x/" * 3000, "http://h/a.gin"),
    *("/", ".", "..", "/dev/null", "pipe", "nowhere.gin", "nowhere/a.gin", "run.gin/a.gin", "loop"),
]
HOSTILE_FLAGS = [
    *("", "=", "Run", "Run.seed", "=1", "Run.seed=", "Run.se ed=1", "Run..seed=1", "Run.seed=1\n2"),
    *("Run.seed=-1", "Run.seed=1e20", f"Run.seed={2**32}", f"Run.seed={2**31}", "Run.seed=0.5"),
    *(f"Evaluate.seed={2**32}", f"Countdown.high={2**40}", "Countdown.numbers=17"),
    *("Optim.learning_rate=nan", "Optim.learning_rate=inf", "Optim.learning_rate=1e999"),
    *("Optim.learning_rate=1e39", "Optim.eps=1e-300", "aspo.cap=1e300", "Reward.timeout_s=1e30"),
    *("Run.seed=" + "9" * 5000, "Run.seed=" + "-" * DEEP + "1", "Run.seed=" + "(" * DEEP),
    *("Run.folder=\ud800", "Run.folder=a\0b", "Run.folder=", "Run.folder=''", "Run.folder='  '"),
    *("Sampler.stop_ids=(-1,)", "Sampler.stop_ids=(1e3,)", "Sampler.stop_strings=('',)"),
    *("Metrics.profile_iterations=[-1]", f"Sampler.stop_ids=({2**31},)", "aspo.cap=True"),
    *("Train.samples_per_prompt=1", "Objective.penalties=('kl_penalty', 'kl_penalty')"),
    *("Objective.penalties=('aspo',)", "Objective.name=''", "Model.path=~nosuchuser"),
    *("WarmStart.cache=''", "WarmStart.cache=gs://a", "Runtime.compilation_cache=~nosuchuser/x"),
    *("x" * 5000, "x" * 5000 + "=1", "include='a.gin'", "%a=1", "Run.seed=%a", "Run.seed=#"),
]


def _refused(*argv: str, capsys) -> str:
    """What a command says that ends with status 2 in one paragraph."""
    assert run_command(lambda: _read(*argv) and 0) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    assert "\n\n" not in said and len(said) < 2500
    return said


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS.keys())
def test_no_text_ends_in_a_traceback(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.gin").write_bytes(text)
    assert "run.gin" in _refused("--config", "run.gin", capsys=capsys)


@pytest.mark.parametrize("path", HOSTILE_PATHS, ids=lambda path: ascii(path[:20]))
def test_no_path_ends_in_a_traceback(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, GOOD)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    _refused("--config", path, capsys=capsys)


@pytest.mark.parametrize("flag", HOSTILE_FLAGS, ids=lambda flag: ascii(flag[:40]))
def test_no_override_ends_in_a_traceback(flag, capsys):
    _refused("--set", flag, capsys=capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["Train.iterations=3"], "'Train.iterations=3': write --set Train.iterations=3"),
        (["--Run.seed=3"], "write --set Run.seed=3"),
        (["--sett", "Run.seed=1"], "'--sett' (did you mean --set?)"),
        (["--conifg=x"], "(did you mean --config?)"),
        (["--print_config"], "(did you mean --print-config?)"),
        (["my.gin"], "write --config my.gin"),
        (["word"], "unknown argument 'word'; expected one of --config, --help"),
        (["--set"], "argument --set: expected one argument"),
        (["\ud800" * 500], "unknown argument"),
    ],
)
def test_mistyped_arguments_are_answered_with_the_remedy(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        _read(*argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert message in said and len(said) < 1000


def test_every_field_of_numbers_is_bounded():
    """Nothing that a config accepts overflows on its way to a 32-bit device."""
    for name in SECTIONS:
        for field, info in fields(name).items():
            words = describe(info.annotation, info.metadata)
            if "whole number" in words and "list" not in words:
                values = [str(10**20), str(2**31)]
            elif "a number" in words:
                values = ["1e999", "1e39", "float('nan')"]
            else:
                continue
            for value in values:
                with pytest.raises(ConfigError, match=rf"{name}.{field}|found .float"):
                    _read("--set", f"{name}.{field}={value}")


def test_a_factory_says_what_is_wrong_with_its_arguments_at_their_line(tmp_path, monkeypatch):
    def picky(low: float = 0.1, high: float = 1.0):
        if low > 1 or high > 1:
            raise ValueError(f"picky.{'low' if low > 1 else 'high'} is too large")

    factories = {**FACTORIES, "objective": {**FACTORIES["objective"], "picky": picky}}
    monkeypatch.chdir(tmp_path)
    n = GOOD.count("\n")
    _write(tmp_path, f"{GOOD}picky.low = 0.5\npicky.high = 2\n")
    with pytest.raises(ConfigError) as error:
        read_config(["--config", "run.gin"], factories)
    assert str(error.value) == f"run.gin:{n + 2}: picky.high is too large"


# --- factories of one's own -------------------------------------------------------------------

RULES = """
def mine(*, beta: float = 0.5, gain=2, label: str = 'a', what=None):
    \"\"\"A rule.

    beta: how much.
    \"\"\"

def needs(*, beta: float):
    pass

def refuses(*, beta: float = 0.0):
    if beta > 1:
        raise ValueError('refuses.beta is too large')

no_function = 3
"""


@pytest.fixture
def rules(tmp_path, monkeypatch) -> str:
    """A module of factories that lies in the current folder; its name."""
    name = f"rules_{abs(hash(tmp_path))}"  # a module is imported once
    (tmp_path / f"{name}.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_factory_of_anyones_is_named_by_its_module(rules):
    config = _read(
        *("--set", f"Objective.name={rules}:mine", "--set", "mine.beta=1", "--set", "mine.gain=3"),
        *("--set", f"Objective.aggregate={rules}:mine.b", "--set", "mine.b.beta=2"),
        *("--set", f"Optim.name={rules}:mine.c"),
    )
    assert config.factories["mine"] == {"beta": 1.0, "gain": 3}
    assert config.factories["mine.b"] == {"beta": 2.0} and "mine.c" not in config.factories
    assert config.run_folder == "runs/countdown_cpu-mine-seed0"
    assert parse_config(config.text(), FACTORIES) == config
    diff = config.diff(_read("--set", f"Objective.name={rules}:mine").text())
    assert "mine.b.beta: (default) -> 2.0" in diff


def test_a_rule_is_used_twice_with_two_settings():
    config = _read(
        *("--set", "Objective.penalties=['kl_penalty', 'kl_penalty.b']"),
        *("--set", "kl_penalty.beta=0.1", "--set", "kl_penalty.b.beta=0.2"),
    )
    assert config.factories["kl_penalty"] == {"beta": 0.1}
    assert config.factories["kl_penalty.b"] == {"beta": 0.2}
    with pytest.raises(ConfigError, match="kl_penalty.b needs kl_penalty.b.beta: a number"):
        _read(
            *("--set", "Objective.penalties=['kl_penalty', 'kl_penalty.b']"),
            *("--set", "kl_penalty.beta=0.1"),
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["Objective.name=nowhere:mine"],
            "--set #1: Objective.name = 'nowhere:mine': cannot"
            " import nowhere (ModuleNotFoundError: No module named 'nowhere'); run from the folder",
        ),
        (
            ["Objective.name={rules}:main"],
            "--set #1: Objective.name = '{rules}:main': {rules} has"
            " no function 'main'; it has mine, needs, refuses",
        ),
        (
            ["Objective.name={rules}:no_function"],
            "--set #1: Objective.name = '{rules}:no_function'"
            ": {rules} has no function 'no_function'; it has mine, needs, refuses",
        ),
        (
            ["Objective.name={rules}:mine", "mine.gamma=1"],
            "--set #2: mine.gamma = 1: mine has no argument gamma",
        ),
        (
            ["Objective.name={rules}:mine", "mine.gain=0.5"],
            "--set #2: mine.gain = 0.5: expected a whole number, found 0.5",
        ),
        (
            ["Objective.name={rules}:mine", "mine.what=1"],
            "--set #2: mine.what = 1: mine has no argument what",
        ),
        (["Objective.name={rules}:needs"], "--set #1: needs needs needs.beta: a number"),
        (
            ["Objective.name={rules}:refuses", "refuses.beta=2"],
            "--set #2: refuses.beta is too large",
        ),
        (["mine.beta=1"], "--set #1: mine.beta = 1: unknown section mine"),
        (
            ["Objective.name=aspo:"],
            "--set #1: Objective.name = 'aspo:': expected one of aspo,"
            " kl_penalty, or 'package.module:factory', either with a label behind a dot",
        ),
        (["Objective.name=a-b:d"], "--set #1: Objective.name = 'a-b:d': expected one of aspo"),
        (["Objective.name={rules}:mine", "Objective.aggregate=os:getcwd.b"], ""),
        (["adamw.b1=0.5"], "adamw has no argument b1"),
    ],
)
def test_a_factory_that_cannot_be_used(flags, message, rules):
    flags = [flag.format(rules=rules) for flag in flags]
    if not message:
        assert _read(*(w for flag in flags for w in ("--set", flag))).objective.aggregate
        return
    with pytest.raises(ConfigError) as error:
        _read(*(word for flag in flags for word in ("--set", flag)))
    assert message.format(rules=rules) in str(error.value)


def test_a_module_that_breaks_is_named_by_its_line(rules, tmp_path):
    (tmp_path / f"broken_{rules}.py").write_text("import math\n\nmath.nothing()\n")
    with pytest.raises(ConfigError, match=rf"AttributeError: .* at .*broken_{rules}.py:3\)"):
        _read("--set", f"Objective.name=broken_{rules}:mine")


def test_two_factories_of_one_name_are_told_apart_by_a_label(rules, tmp_path):
    (tmp_path / f"other_{rules}.py").write_text(RULES)
    flags = ["--set", f"Objective.name={rules}:mine"]
    with pytest.raises(ConfigError, match="has the name of another section, mine; give it a label"):
        _read(*flags, "--set", f"Objective.penalties=['other_{rules}:mine']")
    assert _read(*flags, "--set", f"Objective.penalties=['other_{rules}:mine.b']")


def test_help_of_a_factory_of_anyones(rules, capsys):
    page = _help(f"{rules}:mine", capsys)
    assert "mine.beta  (float, default 0.5)\n        how much." in page


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("aspo.clip_low=2", "--set #1: aspo.clip_low = 2.0; expected a number from 0 to 1"),
        ("aspo.cap=0", "--set #1: aspo.cap = 0.0; expected a number > 0"),
        ("archer2.clip_high_entropy=2", "--set #1: archer2.clip_high_entropy = 2.0; expected"),
        ("archer2.quantile=-1", "--set #1: .*quantile = -1.0; expected a number from 0 to 1"),
        ("dapo.dual_cap=1", "--set #1: ppo_clip.dual_cap = 1.0; expected a ratio above 1"),
        ("cispo.ratio_max=-1", "--set #1: cispo.ratio_min = 0.0, cispo.ratio_max = -1.0"),
        ("gspo.clip_low=1.5", "--set #1: gspo.clip_low = 1.5; expected a number from 0 to 1"),
        ("kl_penalty.beta=-1", "--set #1: kl_penalty.beta = -1.0; expected a number >= 0"),
        ("kl_penalty.clamp=0", "--set #1: kl_penalty.clamp = 0.0; expected a number > 0"),
        ("fixed_length.length=0", "--set #1: fixed_length.length = 0; expected the maximum"),
        ("group_zscore.ddof=2", "--set #1: group_zscore.ddof = 2; expected 0 or 1"),
        ("curriculum_budget.weight=-1", "--set #1: curriculum_budget: weight is -1.0, expected"),
        ("format_reward.weight=-1", "--set #1: format_reward: weight is -1.0, expected a reward"),
    ],
)
def test_the_shipped_factories_bound_their_arguments(flag, message):
    with pytest.raises(ConfigError, match=message):
        read_config(["--set", flag], SHIPPED)


def test_one_sample_per_prompt_is_no_group():
    with pytest.raises(
        ConfigError, match="--set #1: Train.samples_per_prompt = 1 leaves .*2 or mo"
    ):
        _read("--set", "Train.samples_per_prompt=1")


@pytest.mark.parametrize("name", sorted(SHIPPED["advantage"].keys() - {"none"}))
def test_no_advantage_compares_a_sample_with_itself(name):
    with pytest.raises(ConfigError, match="Train.samples_per_prompt = 1 leaves"):
        flags = ("Train.samples_per_prompt=1", f"Objective.advantage={name}")
        read_config([word for flag in flags for word in ("--set", flag)], SHIPPED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["Reward.overlong_buffer=8", "Objective.advantage=maxrl"],
            "--set #1: Reward.overlong_buffer = 8 makes other rewards than Objective.advantage ="
            " 'maxrl' can take: 0 or more; set it to 0, or choose another advantage",
        ),
        (
            ["Reward.shapes=['mask_truncated', 'format_reward']", "Objective.advantage=passk.b"],
            "--set #1: Reward.shapes = ('mask_truncated', 'format_reward'): format_reward makes"
            " other rewards than Objective.advantage = 'passk' can take: exactly 0 or 1; leave it"
            " out, or choose another advantage",
        ),
    ],
)
def test_shapes_that_an_advantage_cannot_take(flags, message):
    with pytest.raises(ConfigError) as error:
        read_config([word for flag in flags for word in ("--set", flag)], SHIPPED)
    assert str(error.value) == message
    fine = ("Reward.shapes=['mask_truncated']", "Objective.advantage=passk")
    read_config([word for flag in fine for word in ("--set", flag)], SHIPPED)


# --- includes, help, the result ------------------------------------------------------------------


def test_a_packaged_config_is_included_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "include 'countdown_cpu.gin'\nRun.seed = 7\n")
    assert _read("--config", "run.gin").run.seed == 7
    _write(tmp_path, f"{GOOD}Run.seed = 5\n", "countdown_cpu.gin")  # the nearer one wins
    _write(tmp_path, "include 'countdown_cpu.gin'\nRun.folder = 'x'\n")
    assert _read("--config", "run.gin").run.seed == 5
    _write(tmp_path, "include 'countdown_cup.gin'\n")
    with pytest.raises(ConfigError) as error:
        _read("--config", "run.gin")
    packaged_one = shown(config_folder() / "countdown_cup.gin")
    assert f"there is no countdown_cup.gin and no {packaged_one};" in str(error.value)


def test_files_of_the_current_folder_are_named_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path, GOOD + "Run.sede = 1\n")
    for spelled in (path, "run.gin", "./run.gin"):
        with pytest.raises(ConfigError, match=r"^run\.gin:\d+: Run.sede"):
            _read("--config", spelled)


def test_print_config_shows_the_resolved_text_and_exits(capsys):
    with pytest.raises(SystemExit) as stop:
        _read("--config", "countdown_quick", "--set", "Run.seed=3", "--print-config")
    assert stop.value.code == 0
    found = parse_config(capsys.readouterr().out, FACTORIES)
    assert found == _read("--config", "countdown_quick", "--set", "Run.seed=3")


def _help(topic: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        read_config(["--help", topic], SHIPPED)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_of_a_section(capsys):
    page = _help("Sampler", capsys)
    assert "Sampler.temperature  (float, default 1.0)" in page and "Optim." not in page
    assert "[tokens] longest prompt (>= 1)" in page
    assert _help("sampler.slots", capsys) == page
    with pytest.raises(ConfigError, match="--help Smapler: unknown section .*did you mean Sampler"):
        read_config(["--help", "Smapler"], SHIPPED)


def test_help_of_a_factory_says_what_every_argument_means(capsys):
    page = _help("aspo", capsys)
    assert "aspo.cap  (float, default 3.0)\n        largest weight, above 0." in page
    assert "A > 0:  w = min(1/r, cap)" in page
    for named in SHIPPED.values():
        for name, factory in named.items():
            page = _help(name, capsys)
            for argument in arguments(factory):
                if argument != "metric":
                    assert argument in meanings(factory), f"{name}.{argument}"
                assert f"{name}.{argument}  (" in page


def test_meanings_are_read_from_the_usual_forms():
    def factory(a: int, b: int, c: int):
        """Do.

        Args:
            a, b: one thing,
                over two lines.
            c: another.

        Raises:
            ValueError: never.
        """

    assert meanings(factory) | {"a": "one thing, over two lines.", "c": "another."} == meanings(
        factory
    )


def test_pages_that_messages_name_exist():
    assert Path(page("config.md")).is_file() and Path(page("rewards.md")).is_file()
