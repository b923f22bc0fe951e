r"""The final answer of a response: what it says after its thoughts, and where it says it.

The official chain (arXiv 2510.06062, released code): the text after the last thinking block, in it
the last brace-matched ``\boxed{}``. A response without a box is searched further, in the order of
`_FINDERS`; the first source that is there counts, also where it turns out to be wrong.

Boxes make one answer in parts where something enumerates them: a comma, a semicolon, ``&``, 'and'
or 'or', a label such as (b), or TeX spacing (``\quad``, ``\;``, ``\\``). Boxes with nothing but
white space, dollars and full stops between them, or with other words, are one answer said again:
the last counts.

Everything here looks at each character a bounded number of times: texts come from a policy, and a
policy that falls into repetition writes any delimiter a hundred thousand times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_END_OF_THOUGHT = "</think>"
_START_OF_THOUGHT = "<think>"
_LONGEST = 400_000  # characters of a response that are searched, its end
_TAIL = 20_000  # characters that are searched for an answer without a box, a tag or hashes

_BRACES = re.compile(r"(\\{1,2}(?:boxed|fbox)(?![a-zA-Z])\s*)|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"(?:\\[a-zA-Z]{1,20}|[^\s$\\])[^\s$\\]{0,200}")
_GAP = 80  # characters between two boxes of one answer
_BETWEEN_BOXES = re.compile(
    r"(?P<part>\(?(?:[a-h]|[ivx]{1,4}|\d)\)|[,;&]|\b(?:and|or)\b"
    r"|\\(?:quad|qquad|hspace\{[^{}]*\})(?![a-zA-Z])|\\[,;: \\])"
    r"|[\s$.{}()\[\]]|\\[()\[\]]|\\(?:text|mbox|textrm|mathrm)(?![a-zA-Z])"
    r"|(?P<name>\\?[A-Za-z](?:_\{?\w{1,9}\}?)?(?:\([A-Za-z]\))?\s*=)"
)
_TAG = re.compile("<(/?)answer>", re.IGNORECASE)
_PHRASE = re.compile(
    r"(?<![a-z])answers?(?![a-z])[*_\s]{0,9}"
    r"(?:[^.:=\n]{0,60}?\b(?:is|are|be|equals)\b[ \t]{0,9}:?|=>|->|[:=→])[*_\"']{0,9}",
    re.IGNORECASE,
)
_HASHES = re.compile(r"^####[ \t]*", re.MULTILINE)
_DELIMITER = re.compile(r"\\[()\[\]]|\\.|\$\$?|\n", re.DOTALL)
_CLOSING = {r"\[": r"\]", r"\(": r"\)", "$": "$", "$$": "$$"}
_BETWEEN_SPANS = re.compile(r"\s*(?:,\s*(?:and|or)?|and|or)\s*")
_PERCENT = re.compile(r"\s*(?:\\?%|percent|pct)")
_SENTENCE_END = re.compile(r"[.!?]?(?:\s*$|[.!?]\s+(?=[A-Z\\(*])|\n)|\.\s|\*\*")
_DIGITS = r"(?:[1-9]\d{0,2}(?:[ ,]\d{3})+(?!\d)|\d+)(?:[.,]\d+)?|\.\d+"
_FRACTION = r"\\[dt]?frac\{[^{}]{1,50}\}\{[^{}]{1,50}\}"
_NUMBER = re.compile(
    rf"(?<![\w.])[-−]?(?:{_FRACTION}|(?:{_DIGITS})(?:\s{{0,2}}[-+*/^]\s{{0,2}}[-(]?(?:{_DIGITS})\)?)*)"
    r"(?:\s{0,2}\\?%|\s{1,2}percent\b)?"
)
_ABBREVIATION = re.compile(r"\b(?:i\.e|e\.g|approx|resp)\.")
_START_OF_PLAIN = re.compile(r"[\s$*]*((?:[a-zA-Z](?:_?\w)?\s?[-+*/^=(]|[-+−]?[\d.,(\[{\\])[^\n]*)")
_START_OF_PROSE = re.compile(r"(?!(?:and|or|sqrt|pi|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}")
_CONNECTOR = re.compile(r"\b(?:is|are|be|equals|equal to|get|gives|obtain)\b|[:=]")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
_LATEX = re.compile(r"\\[a-zA-Z]+\s*|\{[^{}]*\}")
_LINK = re.compile(r"and|or|percent|pct|sqrt|pi|sin|cos|tan|log|ln")
_WORDS = re.compile(r"(?<![^\s(])[A-Za-z]{2,}(?=[\s.,;:!?)']|$)")
_LABEL = re.compile(r"[A-Z][a-z]{0,9}:\s+")
_WRAPPER = re.compile(r"\\(?:text|mbox|textbf|mathrm)\b|[{}]")
_VARIABLE = re.compile(r"\s*\\?[a-zA-Z]+(?:_(?:\w|\{\w{1,9}\}))?\s*")


class Span(NamedTuple):
    """A formula between dollars or brackets: where it starts and ends with them, what is in it."""

    start: int
    end: int
    text: str


def conclusion(text: str) -> str:
    """What follows the last thinking block; nothing where a block was never closed."""
    said = text[-_LONGEST:].rpartition(_END_OF_THOUGHT)[2]
    return said.partition(_START_OF_THOUGHT)[0]


# --- boxes ----------------------------------------------------------------------------------------


class _Box(NamedTuple):
    """Places in a text: of a box, and of what is in it (nothing, where it was never closed)."""

    start: int
    end: int
    inner: slice


def _boxes(text: str) -> list[_Box]:
    """All boxes in the order of their starts."""
    boxes: list[_Box] = []
    opened: list[int | None] = []  # the box that a brace opened, by its place in `boxes`
    brace = -1  # of the last command
    for found in _BRACES.finditer(text):
        if found[1]:
            brace = found.end()
            inner = None if text.startswith("{", brace) else _UNBRACED.match(text, brace)
            end = inner.end() if inner else brace
            boxes.append(_Box(found.start(), end, slice(brace, end)))
        elif found[0] == "{":
            opened.append(len(boxes) - 1 if found.start() == brace else None)
        elif found[0] == "}" and opened and (number := opened.pop()) is not None:
            start, before, _ = boxes[number]
            boxes[number] = _Box(start, found.end(), slice(before + 1, found.start()))
    return boxes


def _are_parts(text: str, start: int, end: int) -> bool:
    """Whether what stands between two boxes makes them parts of one answer (see the module)."""
    if not 0 <= end - start <= _GAP:
        return False
    enumerates, place = False, start
    while place < end:
        found = _BETWEEN_BOXES.match(text, place, end)
        if found is None or (found["name"] and not enumerates):
            return False
        enumerates = enumerates or bool(found["part"])
        place = found.end()
    return enumerates


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, and of those before it that are parts of one answer.

    None without a box, '' where the last one is empty or never closed.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    start, _, inner = boxes.pop()
    contents = {text[inner]: None}  # the last first, each once
    while boxes and _are_parts(text, boxes[-1].end, start):
        start, _, inner = boxes.pop()
        if not text[inner]:
            break
        contents.setdefault(text[inner])
    return ", ".join(reversed(contents)).strip()


# --- formulas and numbers -------------------------------------------------------------------------


def spans(text: str) -> list[Span]:
    """The formulas of a text, none within another; a dollar that is a currency opens none."""
    last = {opening: text.rfind(closing) for opening, closing in _CLOSING.items()}
    found: list[Span] = []
    opened: re.Match[str] | None = None
    for sign in _DELIMITER.finditer(text):
        kind = sign[0]
        if opened is None or kind == opened[0] in (r"\[", r"\("):
            opened = sign if last.get(kind, -1) >= sign.end() else None
        elif kind == "\n":
            opened = None if opened[0] == "$" else opened
        elif kind == _CLOSING[opened[0]] or (kind, opened[0]) == ("$$", "$"):
            inner = text[opened.end() : sign.start()]
            if opened[0] == "$" and _is_prose(inner, text[sign.end() : sign.end() + 1]):
                opened = sign
                continue
            if inner.strip():
                found.append(Span(opened.start(), sign.end(), inner.strip()))
            opened = None
    return found


def _is_prose(inner: str, after: str) -> bool:
    """Whether two dollars are prices: words between them, or '$3 of $5'."""
    if inner[:1].isdigit() and (inner[-1:].isspace() or after.isdigit()):
        return True
    return len(_WORD.findall(_LATEX.sub(" ", inner))) >= 3


def _telling(formulas: Sequence[Span]) -> list[Span]:
    """Formulas that say more than the name of a variable."""
    return [span for span in formulas if not _VARIABLE.fullmatch(span.text)]


def _numbers(text: str, formulas: Sequence[Span]) -> list[Span]:
    """Numbers, and arithmetic on them, outside the formulas."""
    pieces, place = [], 0
    for span in formulas:
        pieces += [text[place : span.start], "\0" * (span.end - span.start)]
        place = span.end
    outside = "".join([*pieces, text[place:]])
    return [Span(n.start(), n.end(), n[0].strip()) for n in _NUMBER.finditer(outside)]


def _joined(text: str, listed: Sequence[Span]) -> str:
    """The first formula with those that follow it as in '$1$, $2$ and $3$'."""
    parts, end = [listed[0].text], listed[0].end
    for span in listed[1:]:
        if not _BETWEEN_SPANS.fullmatch(text, end, span.start):
            break
        parts.append(span.text)
        end = span.end
    return ", ".join(parts) + ("%" if _PERCENT.match(text, end) else "")


# --- sources --------------------------------------------------------------------------------------


def _boxed(text: str) -> str | None:
    """`last_box`; of a box with a sentence in it, the answer of that sentence."""
    said = last_box(text)
    return (_phrased(_WRAPPER.sub(" ", said)) or said) if said and "nswer" in said else said


def last_tagged(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``; None without one."""
    start, inner = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            inner, start = text[start : tag.start()].strip(), None
    return inner


def _tagged(text: str) -> str | None:
    """`last_tagged`; of a sentence in it, its answer."""
    inner = last_tagged(text)
    if not inner or _whole(inner) is not None:
        return inner
    return _phrased(inner) or _last_math(inner) or _last_number(inner) or inner


def _phrased(text: str) -> str | None:
    """'The answer is ...', ``Answer: ...``: the last that has something behind it."""
    text = text[-_TAIL:].rstrip()
    for phrase in reversed(list(_PHRASE.finditer(text))):
        rest = text[phrase.end() : phrase.end() + 5000].lstrip()
        if rest.strip("*_. "):
            return _after_phrase(rest)
    return None


def _after_phrase(rest: str) -> str | None:
    formulas = spans(rest)
    if formulas and not re.search(r"[\w(]", rest[: formulas[0].start]):
        return _joined(rest, formulas)
    line = rest.partition("\n")[0]
    if _START_OF_PROSE.match(line) and (said := _stated(line)):
        return said
    is_near = formulas and formulas[0].start < 60 and "\n\n" not in rest[: formulas[0].start]
    if is_near and not _START_OF_PLAIN.match(line):
        return _joined(rest, formulas)
    return _plain(line) or None


def _stated(line: str) -> str | None:
    """The value that the first sentence gives: what its last 'is' with a value behind it says."""
    sentence = _SENTENCE_END.split(_ABBREVIATION.sub("   ", line), maxsplit=1)[0]
    formulas = spans(sentence)
    values = sorted([*_telling(formulas), *_numbers(sentence, formulas)])
    if not values:
        return None
    places = [c.end() for c in _CONNECTOR.finditer(sentence) if c.end() <= values[-1].start]
    behind = [v for v in values if v.start >= places[-1]] if places else values[-1:]
    return _joined(sentence, behind)


def _plain(line: str) -> str:
    """The beginning of a line that can be an answer: before the sentence or the words go on."""
    line = _SENTENCE_END.split(line.strip().strip("*\"'"), maxsplit=1)[0].strip().strip("*\"' ")
    start = _START_OF_PLAIN.match(line)
    if start is None:
        return line
    hidden = _LATEX.sub(lambda m: "#" * len(m[0]), start[1])
    words = (w for w in _WORD.finditer(hidden) if not _LINK.fullmatch(w[0]))
    word = next(words, None)
    if word is None or word.start() == 0:
        return line
    head = start[1][: word.start()].rstrip(" ,;:(")
    return head.removesuffix(" and").removesuffix(" or").rstrip(" ,;") or line


def _hashed(text: str) -> str | None:
    """What follows the last ``####`` that begins a line."""
    marks = list(_HASHES.finditer(text))
    rest = text[marks[-1].end() :].lstrip() if marks else ""
    return rest.partition("\n")[0].strip() or None


def _last_math(text: str) -> str | None:
    """The last formula, if no number stands behind it; a lone variable if there is nothing else."""
    text = text[-_TAIL:]
    formulas = spans(text)
    numbers = _numbers(text, formulas)
    telling = _telling(formulas) or ([] if numbers else formulas)
    if not telling or (numbers and numbers[-1].start > telling[-1].start):
        return None
    first = len(telling) - 1
    while first and _BETWEEN_SPANS.fullmatch(text, telling[first - 1].end, telling[first].start):
        first -= 1
    return _joined(text, telling[first:])


def _whole(text: str) -> str | None:
    """A text that is nothing but an answer: one short line of mathematics, or a word or two."""
    line = _LABEL.sub("", text.strip().strip("*`").strip()).lstrip("=>∴⇒ ")
    if not 0 < len(line) <= 200 or "\n" in line or "<<" in line:
        return None
    words = [w for w in _WORDS.findall(_LATEX.sub(" ", line)) if not _LINK.fullmatch(w)]
    is_answer = not words or (len(words) <= 2 and not any(map(str.isdigit, line)))
    return line.rstrip(".").strip() if is_answer else None


def _last_number(text: str) -> str | None:
    """A formula without dollars that ends the text, after '=' or 'is'; else the last number."""
    text = text[-_TAIL:].rstrip(" \n.*`")
    line = text[text.rfind("\n") + 1 :]
    places = [connector.end() for connector in _CONNECTOR.finditer(line)]
    end = line[places[-1] :].strip(" *`") if places else ""
    if end and not set("$>") & set(end) and not _WORDS.search(_LATEX.sub(" ", end)):
        return end
    numbers = _NUMBER.findall(text)
    return numbers[-1].strip() if numbers else None


_EXPLICIT = (_boxed, _tagged, _phrased, _hashed)
_FINDERS = (*_EXPLICIT, _last_math, _whole, _last_number)


def find_answer(text: str, is_explicit: bool = False) -> str | None:
    """The final answer of a response; None if it gives none.

    is_explicit: only what the text itself calls its answer counts, not what merely stands last.
    """
    said = conclusion(text)
    found = (find(said) for find in (_EXPLICIT if is_explicit else _FINDERS))
    return next((answer for answer in found if answer is not None), None) or None
