"""The atlas in the documentation is that of the rules; the interactive page computes as they do."""

from __future__ import annotations

import html
import importlib.util
import inspect
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aspo_jax.atlas.views import CURVE_AT, RATIOS, chart, views_of
from aspo_jax.losses import OBJECTIVES

DOCS = Path(__file__).parents[1] / "docs"
HTML = DOCS / "weights.html"


def load_atlas() -> Any:
    spec = importlib.util.spec_from_file_location("atlas_page", DOCS / "atlas.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ATLAS = load_atlas()
NUMBERS = json.loads(ATLAS.NUMBERS.read_text())


# --- the page -----------------------------------------------------------------------------------


def test_every_rule_has_its_picture_and_nothing_else_is_there():
    assert list(NUMBERS) == list(OBJECTIVES), "run `python docs/atlas.py`"
    assert {path.name for path in ATLAS.PICTURES.iterdir()} == ATLAS.pictures()
    sizes = [path.stat().st_size for path in ATLAS.PICTURES.glob("*.png")]
    assert max(sizes) < 80_000 and sum(sizes) < 3_000_000
    assert ATLAS.PAGE.read_text() == ATLAS.page(NUMBERS), "run `python docs/atlas.py`"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_drawn_numbers_are_the_rules(name):
    """What is compared is what was drawn, not how: renderers differ by their versions."""
    found, drawn = ATLAS.numbers_of(ATLAS.rules()[name]), NUMBERS[name]
    remedy = f"run `python docs/atlas.py {name}`"
    words = [
        [{k: v[k] for k in ("label", "caption", "shows", "reads")} for v in x]
        for x in (found, drawn)
    ]
    assert words[0] == words[1], remedy
    for new, old in zip(found, drawn, strict=True):
        for kind in ("curves", "maps"):
            assert list(new[kind]) == list(old[kind]), remedy
            for key, values in new[kind].items():
                pair = (np.array(x, float) for x in (values, old[kind][key]))
                np.testing.assert_allclose(*pair, rtol=2e-3, atol=1e-5, err_msg=remedy)


# --- the interactive page -----------------------------------------------------------------------

FORMULAS = re.search(r'<script id="rules">(.*?)</script>', HTML.read_text(), re.DOTALL)
PLACES = np.sqrt(np.linspace(0.0131, 0.9307, 7))  # no two are a bound apart
# Evaluated beside the page's formulas: every rule under several settings, over curves and a map.
ASK = """
const asked = %s;
const answer = asked.map(({name, settings, points}) =>
  points.map(([r, sign, old]) => weightOf(name, settings, r, sign, old)));
const known = Object.fromEntries(Object.entries(RULES).map(([name, rule]) =>
  [name, {of: rule.of, view: rule.view, settings: rule.settings, choices: rule.choices ?? {}}]));
"""
TELL = "JSON.stringify({answer, known})"


def points() -> list[tuple[float, int, float]]:
    on_curves = [(r, s, CURVE_AT[0]) for s in (1, -1) for r in RATIOS]
    first, second = (x.ravel() for x in np.meshgrid(PLACES, PLACES))
    return on_curves + [(b / a, s, a) for s in (1, -1) for a, b in zip(first, second, strict=True)]


def numbers(name: str, view: str, settings: dict[str, Any]) -> np.ndarray:
    """The library's weights at `points`."""
    rule = OBJECTIVES[name](**settings)
    (chosen,) = [v for v in views_of(rule) if v.label == view]
    found = chart(rule, chosen, PLACES)
    curves = [found.curves[s][CURVE_AT[0]] for s in (1, -1)]
    return np.concatenate([*curves, *(found.maps[s].ravel() for s in (1, -1))])


def settings_of(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The defaults, other numbers, and each choice."""
    given = rule["settings"]
    other = {k: v if isinstance(v, str) else 0.75 * v for k, v in given.items()}
    return [{}, other, *({k: v} for k, choices in rule["choices"].items() for v in choices)]


def node(script: str) -> Any:
    command = shutil.which("node") or shutil.which("nodejs")
    if command is None:
        pytest.skip("no node to evaluate the page's formulas; `pytest -m slow` asks a browser")
    ran = subprocess.run([command, "-"], input=script, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def check(ask: Any) -> None:
    """The page's rules have the library's defaults and weights. ask: a script -> its answer."""
    known = ask(ASK % "[]")["known"]
    assert len(known) >= 12
    cases = [(name, s) for name, rule in known.items() for s in settings_of(rule)]
    asked = [{"name": name, "settings": s, "points": points()} for name, s in cases]
    answers = ask(ASK % json.dumps(asked))["answer"]
    for (name, settings), answer in zip(cases, answers, strict=True):
        rule = known[name]
        defaults = inspect.signature(OBJECTIVES[rule["of"]]).parameters
        assert {k: defaults[k].default for k in rule["settings"]} == rule["settings"], name
        expected = numbers(rule["of"], rule["view"], settings)
        is_known = ~np.isnan(expected)
        found = np.array(answer, float)[is_known]
        np.testing.assert_allclose(found, expected[is_known], rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_formulas_of_the_page_are_the_librarys():
    assert FORMULAS
    formulas = FORMULAS[1]
    check(lambda script: node(f"{formulas}{script}console.log({TELL})"))


def test_the_page_asks_nobody_for_anything():
    assert re.findall(r"https?://|\bfetch\(|\bimport\b|\bsrc=", HTML.read_text()) == []


LISTEN = "<script>onerror = (text) => { document.title = `error: ${text}`; };</script>"
ACT = """
const sum = (canvas) => canvas.getContext("2d")
  .getImageData(0, 0, canvas.width, canvas.height).data
  .reduce((a, b) => (a * 31 + b) % 1e9, 7);
const sums = () => [...document.querySelectorAll("canvas")].map(sum);
const seen = [sums()];
const rule = document.querySelector("#rule-1 select");
rule.value = "cispo"; rule.dispatchEvent(new Event("change")); seen.push(sums());
const setting = document.querySelectorAll("#rule-1 input")[1];
setting.value = "2"; setting.dispatchEvent(new Event("input")); seen.push(sums());
const shown = document.createElement("pre");
shown.textContent = JSON.stringify({answer, known, seen, title: document.title});
document.body.replaceChildren(shown);
"""


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    """It draws without an error, anew when a rule or a setting changes, and computes right."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    place = tmp_path / "page.html"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{place}"]

    def ask(script: str) -> Any:
        page = HTML.read_text().replace("<head>", f"<head>{LISTEN}")
        place.write_text(page.replace("</body>", f"<script>{script}{ACT}</script></body>"))
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = re.search(r"<pre>(.*?)</pre>", ran.stdout, re.DOTALL)
        assert found, ran.stdout[-2000:] + ran.stderr
        answer = json.loads(html.unescape(found[1]))
        assert answer["title"] == "Two objectives side by side"  # no error took its place
        steps = itertools.pairwise(answer["seen"])
        changed = [[a != b for a, b in zip(x, y, strict=True)] for x, y in steps]
        # Per sign the first rule's map, the second's, the difference; two curves and the key. Where
        # A > 0 the other cap is out of sight: aspo masks what it changes.
        assert changed[0] == [False, True, True, False, True, True, True, True, False]
        assert changed[1] == [False, True, False, False, True, True, True, True, False]
        return answer

    check(ask)
