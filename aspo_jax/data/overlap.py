"""Which texts share a run of words with others: training problems that are test problems too."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aspo_jax.data.formats import records
from aspo_jax.data.rows import DataError, question_of
from aspo_jax.paths import PathError

# A word, or a sign without which '12+30' would be '12-30'.
_WORD = re.compile(r"[^\W_]+|[+\-*/=<>^!]")


def words_of(text: str) -> list[str]:
    """The words of a text: letters and digits, in one case and one Unicode form, and signs."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlaps(texts: Sequence[str], others: Sequence[str], words: int | None) -> list[int | None]:
    """For each text the first of the others that shares so many words in a row; None if none does.

    A text with fewer words is compared whole; words = None compares all so. n-gram
    decontamination, as of arXiv 2005.14165, appendix C.
    """
    first_use: dict[tuple[str, ...], int] = {}
    for index, other in enumerate(others):
        for gram in _grams(words_of(other), words):
            first_use.setdefault(gram, index)
    return [_first(first_use, _grams(words_of(text), words)) for text in texts]


def _first(first_use: dict[tuple[str, ...], int], grams: Iterator[tuple[str, ...]]) -> int | None:
    return min((first_use[gram] for gram in grams if gram in first_use), default=None)


def _grams(words: list[str], length: int | None) -> Iterator[tuple[str, ...]]:
    """Every run of ``length`` words, or all words of a shorter text."""
    length = length or len(words)
    for start in range(max(len(words) - length, 0) + 1):
        yield tuple(words[start : start + length])


class Question(NamedTuple):
    """A question of a data file, and its place there."""

    where: str
    text: str


def questions(path: str | Path, prompt: str | None = None) -> list[Question]:
    """The questions of data files, whatever else their records hold.

    prompt: the field that holds them; None: 'prompt' or 'messages'.

    Raises:
        DataError: a file cannot be read, or one of its records has no question.
    """
    try:
        return [
            Question(place.where, question_of(place, value, prompt))
            for place, value in records(path)
        ]
    except PathError as error:
        raise DataError(str(error)) from error


def shared_questions(
    train: Sequence[Question], test: Sequence[Question], words: int | None = None
) -> list[tuple[Question, Question]]:
    """Each training question that a test question shares, with the first such; see `overlaps`."""
    found = overlaps([q.text for q in train], [q.text for q in test], words)
    pairs = zip(train, found, strict=True)
    return [(question, test[index]) for question, index in pairs if index is not None]
