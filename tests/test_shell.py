"""What is printed to be copied into a shell is read back there."""

from __future__ import annotations

import itertools
import shlex
import subprocess

import pytest

from aspo_jax.shell import join, quote

SPECIAL = ["'", '"', "$", "`", "\\", "!", "\n", " ", "*", ";", "#", "~", "é", "{a,b}", "a=b"]
NASTY = [
    *("", "plain", "Model.path='/models/a b'", "it's", "''", "'", "Run.folder='~/a'", "x='$HOME'"),
    *("a'b\"c", "'\\'", "'`id`'", "'!!'", "-n", "'%s'", "'\t'", "Suite.sets=('a', 'b')"),
    *map("".join, itertools.product(SPECIAL, repeat=2)),
]


def test_words_are_read_back():
    assert shlex.split(join(NASTY)) == NASTY
    assert [shlex.split(quote(word)) for word in NASTY] == [[word] for word in NASTY]


def test_words_are_read_back_by_a_shell():
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {join(NASTY)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\0")[:-1] == NASTY


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("Train.iterations=3", "Train.iterations=3"),
        ("Model.path='/models/a'", "\"Model.path='/models/a'\""),
        ("my runs/a", "'my runs/a'"),
        ("", "''"),
        ("x='$HOME'", shlex.quote("x='$HOME'")),
        ("x='wow!'", shlex.quote("x='wow!'")),
    ],
)
def test_single_quotes_alone_are_put_between_double_ones(word, quoted):
    assert quote(word) == quoted
