"""Every rule is published under a name, every published name is a config, every docstring whole."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from aspo_jax.library import configure
from aspo_jax.losses import ADVANTAGES, OBJECTIVES, trace
from aspo_jax.parts import build_advantage, build_goal

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
catalogue, page = map(importlib.import_module, ("catalogue", "objectives_page"))
PUBLISHED = [each for _, rows in page.TABLES for each in rows]
OURS = {"low_entropy_kl", "none", "nll_bonus"}  # of no published name of their own


@pytest.mark.parametrize("each", PUBLISHED, ids=lambda each: each.name)
def test_a_published_rule_is_its_settings(each):
    config = configure("countdown_tiny", *each.lines)
    trace(build_goal(config).objective)
    assert callable(build_advantage(config))


def test_every_rule_and_advantage_has_a_published_name():
    named = {name for each in PUBLISHED for name in page.rules_of(each)}
    assert {*OBJECTIVES, *ADVANTAGES} - named - OURS == set()


@pytest.mark.parametrize("name", [*OBJECTIVES, *ADVANTAGES])
def test_a_docstring_says_where_it_is_from_and_how_sure_that_is(name):
    doc = page.read_doc({**OBJECTIVES, **ADVANTAGES}[name])
    assert doc.equations or name == "none"
    if name != "none":
        assert re.match(r"(high|medium|low)\b", doc.labels["Confidence"])
        assert doc.labels["Source"]
    if doc.first.startswith("Experimental") and name != "fipo":
        assert doc.labels["Unverified"]


def test_what_others_call_an_argument_is_an_argument_here():
    for each in PUBLISHED:
        arguments = {
            a for name in page.rules_of(each)[:1] for a in page.arguments(page.known(name))
        }
        for ours in each.theirs.values():
            assert ours in arguments or "." in ours or ours in ADVANTAGES, (each.name, ours)
