r"""The final answer of a response: what it says after its thoughts, and where it says it.

The official chain (arXiv 2510.06062, released code): the text after the last thinking block, in it
the last brace-matched ``\boxed{}``. A response without a box is searched further, in the order of
`SOURCES`; the first source that is there counts, also where it turns out to be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_END_OF_THOUGHT = "</think>"
_START_OF_THOUGHT = "<think>"
_LONGEST = 400_000  # characters of a response that are searched, its end

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{]))")
_BETWEEN_BOXES = re.compile(r"[\s$,;.&]*(?:\\text\{)?\s*(?:and|or)?\s*\}?[\s$,;.&\\()\[\]]*")
_TAG = re.compile(r"<answer>(.{0,5000}?)</answer>", re.DOTALL | re.IGNORECASE)
_PHRASE = re.compile(
    r"\b(?:final\s+)?answers?\b(?:\*\*)?(?:[^.:=\n]{0,60}?\b(?:is|are|be)\b\s*:?|\s*[:=])"
    r"(?:\*\*)?\s*(?!\s*$)",
    re.IGNORECASE,
)
_HASHES = re.compile(r"^####\s*(.+)$", re.MULTILINE)
_SPANS = re.compile(
    r"\$\$(.{1,5000}?)\$\$|\\\[(.{1,5000}?)\\\]|(?<!\\)\$([^$\n]{1,5000}?)(?<!\\)\$"
    r"|\\\((.{1,5000}?)\\\)",
    re.DOTALL,
)
_BETWEEN_SPANS = re.compile(r"\s*(?:,\s*(?:and|or)?|and|or)\s*")
_SENTENCE_END = re.compile(r"[.!?]?(?:\s*$|[.!?]\s+(?=[A-Z\\(*])|\n)|\.\s|\*\*")
_NUMBER = re.compile(
    r"-?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:[.,]\d+)?(?:\s*/\s*\d+)?(?:\s*\\?%|\s+percent\b)?"
    r"|-?\.\d+"
)
_START_OF_PLAIN = re.compile(r"[\s$*]*([-+]?[\d.,(\[{\\][^\n]*)")
_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{3,}")
_LATEX = re.compile(r"\\[a-zA-Z]+\s*|\{[^{}]*\}")


class Found(NamedTuple):
    """An answer and the source that it was found in, one of `SOURCES`."""

    text: str
    source: str


def conclusion(text: str) -> str:
    """What follows the last thinking block; nothing where a block was never closed."""
    said = text[-_LONGEST:].rpartition(_END_OF_THOUGHT)[2]
    return said.partition(_START_OF_THOUGHT)[0]


def _close(text: str, start: int) -> int | None:
    """Index of the brace that closes the one just before ``start``."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # the next character is escaped
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
        i += 1
    return None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last boxes in their order; an unclosed box has content ''."""
    boxes = []
    for found in list(_BOX.finditer(text))[-8:]:
        start = found.end()
        if found[0].endswith("{"):
            end = _close(text, start)
            boxes.append((found.start(), (end or start) + 1, text[start:end] if end else ""))
        else:  # \boxed 5
            stop = re.compile(r"[\s$]|$").search(text, start)
            end = stop.start() if stop else len(text)
            boxes.append((found.start(), end, text[start:end]))
    return boxes


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``; of several with nothing but 'and' between them, all.

    None without a box, '' where the last one is empty or never closed.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    start, _, content = boxes.pop()
    contents = [content]
    while boxes and content:
        before, end, content = boxes.pop()
        if end > start or not _BETWEEN_BOXES.fullmatch(text, end, start):
            break
        if content not in contents:
            contents.insert(0, content)
        start = before
    return ", ".join(contents).strip()


def _tagged(text: str) -> str | None:
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def _joined_spans(text: str, spans: list[re.Match[str]]) -> str:
    """The first span with those that follow it as in '$1$, $2$ and $3$'."""
    parts, end = [], None
    for span in spans:
        if end is not None and not _BETWEEN_SPANS.fullmatch(text, end, span.start()):
            break
        parts.append(next(group for group in span.groups() if group is not None).strip())
        end = span.end()
    percent = re.compile(r"\s*(?:\\?%|percent|pct)").match(text, end or 0)
    return ", ".join(parts) + ("%" if percent and parts else "")


def _plain(line: str) -> str:
    """The beginning of a line that can be an answer: before the sentence or the words go on."""
    line = _SENTENCE_END.split(line.strip().strip("*\"'"), maxsplit=1)[0].strip().strip("*\"' ")
    start = _START_OF_PLAIN.match(line)
    hidden = _LATEX.sub(lambda m: "#" * len(m[0]), start[1]) if start else ""
    if start and (word := _WORD.search(hidden)) and word.start() > 0:
        head = start[1][: word.start()].strip(" ,;:(")
        return head or line
    return line


def _phrased(text: str) -> str | None:
    """'The answer is ...', ``Answer: ...``."""
    found = list(_PHRASE.finditer(text[-20_000:]))
    if not found:
        return None
    rest = text[-20_000:][found[-1].end() :]
    spans = list(_SPANS.finditer(rest[:5000]))
    if spans and spans[0].start() < 60 and "\n\n" not in rest[: spans[0].start()].strip():
        return _joined_spans(rest[:5000], spans)
    return _plain(rest.lstrip().partition("\n")[0]) or None


def _hashed(text: str) -> str | None:
    found = _HASHES.findall(text)
    return found[-1].strip() if found else None


def _last_math(text: str) -> str | None:
    tail = text[-20_000:]
    spans = list(_SPANS.finditer(tail))
    if not spans:
        return None
    first = len(spans) - 1
    while first and _BETWEEN_SPANS.fullmatch(tail, spans[first - 1].end(), spans[first].start()):
        first -= 1
    return _joined_spans(tail, spans[first:])


def _whole(text: str) -> str | None:
    """A text that is nothing but an answer: one short line of mathematics, or a word or two."""
    line = text.strip()
    if not 0 < len(line) <= 200 or "\n" in line:
        return None
    words = len(_WORD.findall(_LATEX.sub("", line)))
    is_answer = words == 0 or (words <= 2 and not any(map(str.isdigit, line)))
    return line.rstrip(".").strip() if is_answer else None


def _last_number(text: str) -> str | None:
    found = [
        n
        for n in _NUMBER.finditer(text[-20_000:])
        if not text[-20_000:][max(0, n.start() - 1) : n.start()].isalnum()
    ]
    return found[-1][0].strip() if found else None


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "box": last_box,
    "tag": _tagged,
    "phrase": _phrased,
    "hashes": _hashed,
    "math": _last_math,
    "whole": _whole,
    "number": _last_number,
}
SOURCES = tuple(_FINDERS)


def find_answer(text: str) -> Found | None:
    """The final answer of a response; None if it gives none."""
    said = conclusion(text)
    for source, find in _FINDERS.items():
        answer = find(said)
        if answer is not None:
            return Found(answer, source) if answer else None
    return None
