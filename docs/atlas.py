"""Draw the atlas: ``python docs/atlas.py [RULE ...]``, minutes for all rules.

`atlas.md`, a picture of every objective in `atlas/`, and the numbers behind them in
`atlas/weights.json`, by which a test holds that they are fresh whatever version of matplotlib drew
them. With names, only these rules are drawn again.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo_jax.atlas.command import charted
from aspo_jax.atlas.pictures import draw_overlay, draw_rule, save
from aspo_jax.atlas.views import summary, views_of
from aspo_jax.config.factories import arguments
from aspo_jax.losses import OBJECTIVES
from aspo_jax.rules import Rule

DOCS = Path(__file__).resolve().parent
PAGE, PICTURES = DOCS / "atlas.md", DOCS / "atlas"
NUMBERS = PICTURES / "weights.json"
MADE = "<!-- Made by `python docs/atlas.py`; edit that, or the rules, instead. -->"

# Settings of the rules that have none by default.
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "apc": {"delta": 0.2},
    "copg": {"beta": 0.1},
    "dispo": {
        "clip_low_positive": 0.2,
        "clip_high_positive": 4.0,
        "clip_low_negative": 0.2,
        "clip_high_negative": 1.0,
    },
    "opsm": {"delta": 0.1},
    "reg_grpo": {"sigma_floor": 0.1},
}

# One picture over another: what a reader compares first.
OVERLAYS: Mapping[str, Sequence[str]] = {
    "ratios": ("aspo", "grpo", "dapo", "grpo_without_is", "cispo"),
    "soft": ("aspo", "sapo", "mhpo", "gppo", "dcpo", "vespo"),
}

INTRODUCTION = """# The atlas

What every objective does to one token. A map has the token's probability under the old policy to
the right and under the new one upwards, as Figure 4 of [arXiv
2510.06062](https://arxiv.org/abs/2510.06062); its colour is the weight `w` that stands before the
advantage in [the gradient](index.md#the-equation).

- **Grey** is 1. **Dark blue** is less, **light yellow** more: the lightness rises with the
  weight, so that a grey print and a colour-blind reader have the same order. Eight bands are a
  factor of 2.
- **Hatched** is 0: the token is masked. **Red crosses**: a negative weight, which pushes against
  the advantage.
- **Lines** through the origin are ratios where the weight jumps (full: a bound) or bends (dashed:
  a cap). Dotted: ratio 1.
- On the right the same over the ratio, for both signs. Zeros lie in the strip below.

A rule with a bias `b` is drawn as `(w A + b) / A` at `A` = +1 and -1; one whose weight is
constant by its bias alone. A picture has two axes: what else a rule reads is held at values that
stand below it. What a rule reads was found by changing it. Where not said otherwise it is one
response of one token, alone in its mini-batch, with the sampler's, the reference's and the
teacher's probabilities those of the old policy. Rules that do not look at the new policy but at
the sampler are drawn over those two.

Any rule with any settings, yours too:

    python -m aspo_jax.plot weights --objectives aspo,aspo.wide,my:rule --out pictures \\
        --set aspo.wide.clip_high=0.4

[Two rules side by side](weights.html), with their settings to turn, in your browser. Where they
come from and what their settings mean: [Objectives](objectives.md)."""

REPLAY = """## On a rollout of yours

A map says what a rule does to a token that is there; it does not say which tokens are there.
`Train.record = 10` keeps every tenth rollout of a run in
`RUN/rollouts/ITERATION-PROCESS.parquet`: a row per sample with its tokens, its log-probabilities
under the sampler, the old policy and the reference, entropies, reward, verdict, advantage and
mini-batch (`aspo_jax/recording.py` lists the columns). From these

    python -m aspo_jax.replay RUN --objective dapo --objective cispo --out replay.png

says for any objective, without training, what its update would be: the gradient's norm and its
cosine to ASPO's (`--against` for another), the share of tokens it clips, and its weights by the
sign of the advantage and the quartile of the ratio. `--json` prints all of it. The old policy is
that of the record, the new one a later checkpoint, for at ratio 1 rules hardly differ:
`--iteration` and `--checkpoint` choose them, by default the newest checkpoint and the newest
rollout before it that had something to learn from; the output says how far the two are apart.
Norms and cosines are means over the rollout's mini-batches, aggregated as the run does;
advantages are the run's; a rule with a state begins with a fresh one; the exact entropy bonus is
no part of it."""


def rules() -> dict[str, Rule]:
    """Every objective with the settings that it is drawn with."""
    made = {}
    for name, factory in OBJECTIVES.items():
        known = arguments(factory)
        defaults = {k: p.default for k, p in known.items() if p.default is not p.empty}
        settings = defaults | dict(EXAMPLES.get(name, {}))
        if missing := set(known) - set(settings):
            raise SystemExit(f"{name} needs {', '.join(sorted(missing))}: add it to EXAMPLES")
        made[name] = Rule(factory(**EXAMPLES.get(name, {})), settings)
    return made


def numbers_of(rule: Rule) -> list[dict[str, Any]]:
    """What `weights.json` keeps of a rule."""
    return [summary(rule.objective, view) for view in views_of(rule.objective)]


def page(numbers: Mapping[str, Any]) -> str:
    """The page's text."""
    overlays = [
        f"![The weights of {', '.join(names)} over the ratio](atlas/overlay-{title}.png)"
        for title, names in _overlays().items()
    ]
    parts = [INTRODUCTION.replace("# The atlas\n", f"# The atlas\n\n{MADE}\n", 1)]
    parts += [REPLAY, "## Side by side", *overlays, "## Rule by rule"]
    for name, views in numbers.items():
        doc = inspect.getdoc(OBJECTIVES[name]) or ""
        first = " ".join(doc.partition("\n\n")[0].replace("``", "`").split())
        held = [f"{v['label'] or 'held'}: {v['caption']}" for v in views if v["caption"]]
        parts += [
            f"### {name}",
            first.replace("<", "&lt;").replace("*", r"\*"),
            f"![Token weight of {name}](atlas/{name}.png)",
            *([f"<small>{'<br>'.join(held)}</small>"] if held else []),
        ]
    return "\n\n".join(parts) + "\n"


def _overlays() -> dict[str, list[str]]:
    """The rules of each overlay that are there."""
    return {title: [n for n in names if n in OBJECTIVES] for title, names in OVERLAYS.items()}


def pictures() -> set[str]:
    """Names of the files in `atlas/`."""
    overlays = {f"overlay-{title}.png" for title in OVERLAYS}
    return {NUMBERS.name, *overlays, *(f"{name}.png" for name in OBJECTIVES)}


def main(argv: Sequence[str]) -> int:
    """Draw all rules, or those that are named, and write the page."""
    PICTURES.mkdir(exist_ok=True)
    known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    made = rules()
    numbers, charts = {}, {}
    for name, rule in made.items():
        if argv and name not in argv and name in known:
            numbers[name] = known[name]
            continue
        numbers[name] = numbers_of(rule)
        charts[name] = charted(name, rule)
        save(draw_rule(charts[name]), PICTURES / f"{name}.png")
        print(PICTURES / f"{name}.png", flush=True)
    for title, names in _overlays().items():
        if not argv or set(names) & set(argv):
            chosen = [charts[n] if n in charts else charted(n, made[n]) for n in names]
            save(draw_overlay(chosen), PICTURES / f"overlay-{title}.png")
    for path in PICTURES.iterdir():
        if path.name not in pictures():
            path.unlink()
    lines = (f"{json.dumps(name)}: {json.dumps(of)}" for name, of in numbers.items())
    NUMBERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    PAGE.write_text(page(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
