"""The console: every line off a terminal can be read by a program."""

from __future__ import annotations

import io
import shlex

from aspo_jax.config import parse_config
from aspo_jax.config.reading import config_folder
from aspo_jax.console import Console

METRICS = {"rollout/reward_mean": 0.3125, "evaluate/avg": 0.5, "update/clip_share": 0.012}


def _nothing():
    """Nothing to set."""


def _aspo(clip_low: float = 0.2, clip_high: float = 0.2, cap: float = 3.0):
    """ASPO."""


FACTORIES = {
    "objective": {"aspo": _aspo},
    "advantage": {"group_zscore": _nothing},
    "aggregate": {"token_mean": _nothing},
}
CONFIG = parse_config((config_folder() / "countdown_cpu.gin").read_text(), FACTORIES, "demo")


def _everything(is_terminal: bool) -> str:
    out = io.StringIO()
    console = Console(is_terminal, out)
    console.title(CONFIG)
    with console.phase("sample", 4, "sequences") as bar:
        bar.advance(2, reward=0.5)
        bar.advance(2)
    console.iteration(1, METRICS)
    console.iteration(2, {"rollout/reward_mean": 0.4})
    console.note("it's [bold]plain[/bold]\nand long " + "word " * 60)
    console.final(
        {"evaluate/avg": 0.3}, {"evaluate/avg": 0.7}, {"metrics": "a b/c"}, "run --set X.y='z'"
    )
    return out.getvalue()


def test_plain_lines_are_key_value_words():
    text = _everything(is_terminal=False)
    assert "\x1b" not in text
    rows = [dict(word.split("=", 1) for word in shlex.split(line)) for line in text.splitlines()]
    assert rows[0] == {"config": "demo", "seed": "0", "folder": "runs/demo-aspo-seed0"}
    iterations = [row for row in rows if "iteration" in row]
    assert len(iterations) == 2
    assert iterations[0]["of"] == "80"
    assert {k: float(iterations[0][k]) for k in METRICS} == METRICS
    assert {"result": "evaluate/avg", "before": "0.3", "after": "0.7"} in rows
    assert {"path": "metrics", "value": "a b/c"} in rows
    assert rows[-1] == {"next": "run --set X.y='z'"}
    assert any(row.get("row") == "sequences per step" for row in rows)


def test_terminal_shows_scores_and_remembers_the_last_evaluation():
    text = _everything(is_terminal=True)
    assert "avg@16" in text and "[bold]plain[/bold]" in text
    lines = [line for line in text.splitlines() if "/80" in line]
    assert "0.500" in lines[0] and "0.500" in lines[1]
    assert "+0.400" in text and "run --set X.y='z'" in text
