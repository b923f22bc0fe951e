"""``python -m aspo_jax.plot weights``: pictures of what objectives do to a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from aspo_jax.atlas.pictures import Chart, draw_overlay, draw_rule, save
from aspo_jax.atlas.views import chart, views_of
from aspo_jax.errors import CommandParser, UserError, run_command, writing
from aspo_jax.imports import raised_at
from aspo_jax.losses import OBJECTIVES
from aspo_jax.paths import path_argument
from aspo_jax.rules import Rule, named_objectives


def main(argv: Sequence[str]) -> int:
    """Draw the rules named on the command line; returns the exit status."""
    parser = CommandParser(
        "plot weights",
        "Draw the token weights of objectives, each over (pi_old, pi_theta) and over the ratio, "
        "and the curves of all in one picture.",
    )
    parser.add_argument(
        "--objectives",
        required=True,
        metavar="A,B",
        help=f"{', '.join(OBJECTIVES)}, or package.module:factory; one more with other settings "
        "has a label: aspo,aspo.wide",
    )
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="DIR", help="PNG and SVG of each rule"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="rule.argument=value",
        help="aspo.cap=2, aspo.wide.clip_high=0.4; may be repeated",
    )
    a = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # pictures need no accelerator, which may be busy

    def command() -> int:
        names = [name.strip() for name in a.objectives.split(",") if name.strip()]
        if not names:
            raise AtlasError("--objectives names no rule; expected names with commas between them")
        rules = named_objectives(names, "--objectives", a.set)
        for path in draw_weights(rules, a.out):
            print(path)
        return 0

    return run_command(command)


class AtlasError(UserError):
    """What was asked for cannot be drawn."""


def draw_weights(rules: Mapping[str, Rule], out: Path) -> Iterator[Path]:
    """Draw rules into a folder, and several of them over one another; yields what was written.

    Raises:
        AtlasError: a rule that fails.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    charts = [charted(name, rule) for name, rule in rules.items()]
    figures = {each.name.replace(":", "-"): draw_rule(each) for each in charts}
    if len(charts) > 1:
        figures["overlay"] = draw_overlay(charts)
    for name, figure in figures.items():
        for path in (out / f"{name}.png", out / f"{name}.svg"):
            with writing(path):
                save(figure, path)
            yield path


def charted(name: str, rule: Rule) -> Chart:
    """A rule's views with their numbers.

    Raises:
        AtlasError: the rule fails.
    """
    try:
        views = [chart(rule.objective, view) for view in views_of(rule.objective)]
    except Exception as error:  # a rule of the user's may raise anything
        raise AtlasError(f"the objective {name!r} fails: {raised_at(error)}") from error
    settings = ", ".join(f"{argument} = {value}" for argument, value in rule.settings.items())
    return Chart(name, settings, views)
