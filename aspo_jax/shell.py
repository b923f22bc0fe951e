"""Words of a command as a person would write them, for messages to copy from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

_SPECIAL = frozenset('"$`\\!')  # within double quotes


def quote(word: str) -> str:
    """The word for a shell, in double quotes where it holds single ones and nothing special.

    ``"Model.path='a b'"``, of which `shlex.quote` makes four pieces.
    """
    if "'" in word and _SPECIAL.isdisjoint(word):
        return f'"{word}"'
    return shlex.quote(word)


def join(words: Iterable[str]) -> str:
    """The command of these words, each as `quote` writes it."""
    return " ".join(map(quote, words))
