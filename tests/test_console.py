"""The console: the same lines everywhere, bars on a terminal, progress while something goes on."""

from __future__ import annotations

import io
import logging
import math
import re
import threading
import time

import pytest

from aspo_jax.config import parse_config
from aspo_jax.config.reading import config_folder
from aspo_jax.run import console as room
from aspo_jax.run.console import Console

METRICS = {
    "rollout/reward_mean": 0.3125,
    "rollout/valid_groups": 0.75,
    "rollout/solve_all": 0.0,
    "rollout/solve_none": 0.25,
    "rollout/generation_multiplier": 1.0,
    "rollout/response_length": 8123.4,
    "update/clip_share": 0.012,
    "speed/sample": 1234567.0,
    "seconds/iteration": 1234.5,
}
SCORES = {
    "evaluate/avg": 0.5,
    "evaluate/avg_stderr": 0.02,
    "evaluate/reward_mean": 0.5,
    "evaluate/pass_any": 0.9,
    "evaluate/distinct_right": 3.25,
    "evaluate/truncated": 0.01,
    "evaluate/response_length": 13.0,
    "evaluate/samples": 16.0,
}
NO_SIGNAL = METRICS | {
    "rollout/valid_groups": 0.0,
    "rollout/solve_all": 3 / 32,
    "rollout/solve_none": 29 / 32,
}
del NO_SIGNAL["update/clip_share"]


def _nothing():
    """Nothing to set."""


def _aspo(clip_low: float = 0.2, clip_high: float = 0.2, cap: float = 3.0):
    """ASPO."""


FACTORIES = {
    "source": {"countdown": _nothing},
    "objective": {"aspo": _aspo},
    "advantage": {"group_zscore": _nothing},
    "aggregate": {"token_mean": _nothing},
    "optimizer": {"adamw": _nothing},
}
CONFIG = parse_config((config_folder() / "countdown_cpu.gin").read_text(), FACTORIES, "demo")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """Whatever terminal the tests are run in, that of the console has colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def _console(is_terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    console = Console(is_terminal, out)
    console.title(CONFIG)
    return console, out


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def _everything(is_terminal: bool) -> str:
    console, out = _console(is_terminal)
    console.evaluation(0, SCORES)
    console.iteration(0, METRICS)
    console.iteration(1, NO_SIGNAL)
    console.note("it's [bold]plain[/bold] and long " + "word " * 60)
    console.final(SCORES, SCORES | {"evaluate/avg": 0.7}, {"metrics": "a b/c"}, "run --set X.y='z'")
    return out.getvalue()


def test_a_pipe_gets_the_lines_of_a_terminal_without_colours():
    plain, shown = _everything(is_terminal=False), _everything(is_terminal=True)
    assert "\x1b" not in plain and "\x1b[" in shown
    assert plain == _without_colours(shown)
    assert "sequences per step" in plain and "[bold]plain[/bold]" in plain
    assert "avg@16" in plain and "+0.200" in plain and "run --set X.y='z'" in plain


def test_an_iteration_is_one_readable_line():
    console, out = _console()
    console.iteration(79, METRICS)
    header, line = out.getvalue().splitlines()[-2:]
    assert len(header) == len(line) <= 100
    assert "79/80" in line and "8,123.4" in line and "1.20%" in line and "1,234,567" in line
    assert line.split()[5] == "-"  # the entropy was not measured


def test_an_iteration_without_a_signal_says_so_and_shows_no_figure_that_is_none():
    console, out = _console()
    console.iteration(4, NO_SIGNAL)
    line, sentence = out.getvalue().splitlines()[-2:]
    assert "nan" not in line and "inf" not in line and line.count(" - ") >= 3
    assert (
        "no group had both right and wrong answers (all right: 3 groups, all wrong: 29)" in sentence
    )
    console.iteration(5, NO_SIGNAL | {"rollout/solve_none": 27 / 32})
    assert "all wrong: 27, masked or equal in reward: 2" in out.getvalue().splitlines()[-1]


def test_what_is_really_not_a_number_is_shown_as_such():
    console, out = _console()
    console.iteration(4, METRICS | {"update/clip_share": math.nan})
    assert "nan" in out.getvalue() and "nan%" not in out.getvalue()


def test_the_last_row_has_no_iteration():
    console, out = _console()
    before = out.getvalue()
    console.iteration(80, SCORES | {"seconds/save": 1.0})
    assert out.getvalue() == before


def test_a_dense_reward_is_shown_as_a_mean():
    console, out = _console()
    console.evaluation(20, SCORES)
    assert "20/80   held out   avg@16 0.500 +- 0.020   pass@16 0.900" in out.getvalue()
    thin = {"evaluate/avg": 0.0, "evaluate/reward_mean": 0.05, "evaluate/reward_stderr": 0.002}
    console.evaluation(40, SCORES | thin)
    assert "40/80   held out   reward 0.050 +- 0.002   avg@16 0.000" in out.getvalue()


def test_a_reward_that_is_no_share_has_no_avg():
    console, out = _console()
    right = {"evaluate/avg", "evaluate/avg_stderr", "evaluate/pass_any", "evaluate/distinct_right"}
    scores = {name: x for name, x in SCORES.items() if name not in right}
    before = scores | {"evaluate/reward_mean": -3.7, "evaluate/reward/style": 0.25}
    after = before | {"evaluate/reward_mean": 2.5, "evaluate/reward/style": 0.75}
    console.evaluation(40, before)
    console.final(before, after, {}, "")
    assert "held out   reward -3.700   length 13.0   cut 1.0%" in out.getvalue()
    assert "reward mean           -3.700     2.500    +6.200" in out.getvalue()
    assert "reward/style           0.250     0.750    +0.500" in out.getvalue()
    assert "avg@" not in out.getvalue().partition("held out")[2]
    bare = {name: x for name, x in NO_SIGNAL.items() if "solve" not in name}
    console.iteration(4, bare)
    assert "all answers to each prompt had one reward, or were masked" in out.getvalue()


# --- progress -----------------------------------------------------------------------------------


def test_progress_off_a_terminal_is_a_line_when_one_is_due(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    console, out = _console()
    before = out.getvalue()
    with console.phase("training", 80, "iterations") as outer:
        outer.begin_at(20)
        now[0] += 10
        outer.advance()
        with console.phase("sampling", 256, "samples") as bar:
            for _ in range(64):
                now[0] += 1
                bar.advance(tokens=100)
    lines = out.getvalue().removeprefix(before).splitlines()
    assert lines == [
        "  training 21/80 iterations, 9:40 left; sampling 20/256 samples, 100+ tokens/s, 3:56 left",
        "  training 21/80 iterations, 9:40 left; sampling 50/256 samples, 100+ tokens/s, 3:26 left",
    ]


def test_a_bar_fills_as_the_phase_goes_on():
    console, out = _console(is_terminal=True)
    with console.phase("sampling", 4, "samples") as bar:
        bar.advance(2)
        _wait_for(lambda: "sampling 2/4 samples" in _without_colours(out.getvalue()))
    assert re.search(r"m━{10}\x1b", out.getvalue())  # nothing done: ten cells of one colour
    assert re.search(r"m━{5}\x1b", out.getvalue())  # half of it


def test_a_phase_that_may_end_early_says_at_most(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    console, _ = _console()
    with console.phase("warm start", 2000, "steps", is_cap=True) as bar:
        now[0] += 60
        bar.advance(100, figures="held-out avg@16 0.100 of 0.3")
    assert str(bar) == "warm start 100 steps, held-out avg@16 0.100 of 0.3, at most 19:00 left"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_long_compilation_is_announced_while_it_lasts(is_terminal, monkeypatch):
    monkeypatch.setattr(room, "COMPILING_S", 0.0)
    console, out = _console(is_terminal)
    with console.phase("sampling", 4, "samples"):
        console.compiling("decode")
        _wait_for(lambda: "compiling decode" in out.getvalue())
        during = out.getvalue()
        time.sleep(0.3)  # a bar would be drawn again by now, into what XLA itself may say
        assert out.getvalue() == during
        console.compiled("decode", 75.0)
        assert "compiled decode in 1:15" in out.getvalue()
        if is_terminal:
            _wait_for(lambda: "sampling 0/4" in out.getvalue().rpartition("compiled")[2])


@pytest.mark.parametrize(("platform", "remarks"), [("cpu", 1), ("gpu", 0), ("tpu", 0)])
def test_minutes_are_foretold_once_and_on_a_cpu_alone(platform, remarks, monkeypatch):
    monkeypatch.setattr(room, "COMPILING_S", 0.0)
    monkeypatch.setattr(room.jax, "default_backend", lambda: platform)
    console, out = _console()
    for program in ("prefill", "decode"):
        console.compiling(program)
        _wait_for(lambda line=f"compiling {program} ...": line in out.getvalue())
        console.compiled(program, 75.0)
    assert out.getvalue().count("minutes for a large model on a CPU") == remarks


def test_a_short_compilation_is_not_mentioned():
    console, out = _console()
    before = out.getvalue()
    console.compiling("decode")
    console.compiled("decode", 0.1)
    assert out.getvalue() == before
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def _wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [True, False])
def test_warnings_are_plain_sentences_in_one_place(is_terminal, capsys):
    console, out = _console(is_terminal)
    with console:
        logging.getLogger("aspo_jax.run.checkpoint").warning("%s: saving", "SIGINT")
    logging.getLogger("aspo_jax.run.checkpoint").warning("afterwards")
    said = _without_colours(out.getvalue()) if is_terminal else capsys.readouterr().err
    assert said.splitlines()[-1] == "SIGINT: saving"
    assert "afterwards" not in out.getvalue()
