r"""Grader ``math``: the final answer equals a gold answer, as mathematics and not as text.

Three looks, each dearer than the one before: equal strings after `latex.normalise`; exact values
where both are plain numbers (`latex.number`), which decides either way; else Math-Verify, part by
part, in a child process with a time limit. Two of Math-Verify's errors are kept out: numbers of
different bases are different, and numbers without a decimal point are equal only where they are.

Gold answers: a string, a number, or a list of those, any of which will do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Sequence
from typing import Any

from aspo_jax.rewards.answers import find_answer, last_box
from aspo_jax.rewards.math.fork import in_child
from aspo_jax.rewards.math.latex import (
    are_equal_numbers,
    clean,
    depths,
    normalise,
    number,
    plain_thousands,
    unwrap,
    variable,
    without_units,
)
from aspo_jax.rewards.verdict import BAD_GOLD, CRASH, Verdict, compared

_LONGEST = 1500  # characters of an answer, beyond four times the gold's
_MOST_DIGITS = 4000  # of a whole number; Python turns no longer ones into text


def find_problem(answer: Any) -> str | None:
    """What is wrong with a gold answer; None if it can be used.

    The law: a gold answer must match itself in a box. A word does; an empty text, braces that do
    not balance or a thinking tag do not, and no response could ever match them.
    """
    listed = answer if isinstance(answer, list) else [answer]
    if not listed:
        return "found an empty list of answers, expected at least one"
    return next(filter(None, map(_problem, listed)), None)


def _problem(answer: Any) -> str | None:
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    is_small = is_number and abs(answer) < 10**_MOST_DIGITS
    if not isinstance(answer, str) and not is_small:
        is_long = is_number and isinstance(answer, int)
        shown = f"a number of over {_MOST_DIGITS} digits" if is_long else f"{answer!r:.60}"
        return f"found the answer {shown}, expected a string, a number (finite), or a list of those"
    gold = _gold(answer)
    if _matches_itself(gold):
        return None
    return (
        f"found the answer {gold!r:.60}, which no response can match: expected a text that stays "
        "the same in \\boxed{...}; balance its braces, or take out the row"
    )


@functools.lru_cache(1024)
def _matches_itself(gold: str) -> bool:
    found = find_answer(rf"\boxed{{{gold}}}")
    return found is not None and normalise(found) == normalise(gold) != ""


def read_golds(answer: Any) -> list[str]:
    """The gold answers as strings; empty where one cannot be used (`find_problem`)."""
    if find_problem(answer) is not None:
        return []
    return [_gold(one) for one in (answer if isinstance(answer, list) else [answer])]


def _gold(answer: str | int | float) -> str:
    text = str(answer).rpartition("####")[2].strip()
    return last_box(text) or text


def grade(
    text: str, answer: Any, is_finished: bool, limit_s: float = 5.0, grade_truncated: bool = False
) -> Verdict:
    """1 for an answer equal to a gold, else 0 and why.

    A text that was cut off is judged by what it calls its answer: a box, a tag, 'the answer is',
    hashes. What merely stands last in it is whatever it was busy with: ``truncated``.

    limit_s: seconds for the semantic comparison, after which the answer is wrong: ``timeout``.
    grade_truncated: judge also such a text by the formula or number that stands last.
    """
    golds = read_golds(answer)
    if not golds:
        return BAD_GOLD
    given = find_answer(text, is_explicit=not is_finished and not grade_truncated)
    if given is None:
        return Verdict(0.0, "no_answer" if is_finished else "truncated")
    if len(given) > _LONGEST + 4 * max(map(len, golds)):  # before anything whose cost grows with it
        return compared(False)
    verdicts = [compare_cheaply(gold, given) for gold in golds]
    open_golds = [gold for gold, said in zip(golds, verdicts, strict=True) if said is None]
    if True in verdicts or not open_golds:
        return compared(True in verdicts)
    result = in_child(lambda: any(_means(gold, given) for gold in open_golds), limit_s)
    if isinstance(result, str):
        return CRASH if result == "crash" else Verdict(0.0, result)
    return compared(bool(result))


def compare_cheaply(gold: str, given: str) -> bool | None:
    """Whether two answers are equal as strings or as plain numbers; None where that is open."""
    names = variable(gold), variable(given)
    if None not in names and names[0] != names[1]:
        return None
    if normalise(gold) == normalise(given):
        return True
    if (wanted := _choice(gold)) is not None:
        chosen = _label(given)[0] or _choice(given)
        return None if chosen is None else wanted == chosen
    given = _without_label(gold, given)
    if (based := _compare_bases(gold, given)) is not None:
        return based
    a, b = number(gold), number(given)
    return are_equal_numbers(a, b) if a is not None and b is not None else None


_BASED = re.compile(r"([0-9A-Za-z]+)_\{?([0-9]+)\}?")


def _compare_bases(gold: str, given: str) -> bool | None:
    a, b = (_BASED.fullmatch(normalise(text)) for text in (gold, given))
    if a is not None and b is not None:
        return a[1].upper() == b[1].upper() and a[2] == b[2]
    return None


_CHOICE = re.compile(r"[(\[]?([A-Ja-j])[)\].:]?")
_LABEL = re.compile(r"(?:\(([A-J])\)|([A-J])[).:])\s+(\S.*)", re.DOTALL)


def _choice(text: str) -> str | None:
    """The letter of an answer that is a letter, as of multiple choice."""
    found = _CHOICE.fullmatch(unwrap(clean(text)))
    return found[1].upper() if found else None


def _label(text: str) -> tuple[str | None, str]:
    """The letter before an answer, as in '(B) 12', and the text that it stands for."""
    text = unwrap(clean(text))
    found = _LABEL.fullmatch(text)
    return (found[1] or found[2], found[3]) if found else (None, text)


def _without_label(gold: str, given: str) -> str:
    """An answer without the letter of a choice, where the gold has none."""
    letter, text = _label(given)
    return text if letter and not _label(gold)[0] else given


# --- semantic, in the child -----------------------------------------------------------------------

_MATRIX = re.compile(
    r"^\\begin\{[pb]?(?:matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{[pb]?(?:matrix|array)\}$",
    re.DOTALL,
)
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*)?\b(?:and|or)\b\s*\}?\s*")


def split(text: str) -> tuple[str, list[str]] | None:
    """The kind of brackets (a matrix: its shape) and the parts of a list; None for other texts."""
    text = _AND.sub(",", clean(text)).strip()
    if (matrix := _MATRIX.match(text)) is not None:
        rows = [row.split("&") for row in matrix[1].split(r"\\") if row.strip()]
        shape = f"{len(rows)} x {[len(row) for row in rows]}"
        return shape, [entry.strip() for row in rows for entry in row]
    kind, inner = "", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        kind, inner = "{", text[2:-2]
    elif text.startswith(("(", "[")) and text.endswith((")", "]")):
        kind, inner = text[0] + text[-1], text[1:-1]
    parts = _parts(inner)
    return (kind, parts) if parts and (len(parts) > 1 or kind == "{") else None


def _parts(text: str) -> list[str]:
    """The text cut at its outer commas; nothing where its brackets do not match."""
    depth = depths(text)
    if min(depth, default=0) < 0 or depth[-1:] != [0]:
        return []
    cuts = [i for i, c in enumerate(text) if c in ",;" and depth[i] == 0]
    parts = [text[a + 1 : b].strip() for a, b in itertools.pairwise([-1, *cuts, len(text)])]
    return parts if all(parts) else []


def _means(gold: str, given: str) -> bool:
    """`are_equal`; a text that makes sympy stumble means nothing."""
    try:
        return are_equal(gold, given)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return False


def are_equal(gold: str, given: str) -> bool:
    """Whether two answers mean the same. May take any time: call it in a child."""
    if "=" not in given and len(_DOTS.findall(gold)) != len(_DOTS.findall(given)):
        return False
    gold, given = _only_element(gold), _only_element(_without_label(gold, given))
    said = compare_cheaply(gold, given)
    if said is not None:
        return said
    a, b = split(gold), split(given)
    if a is not None and b is not None and len(a[1]) == len(b[1]):
        if a[0] in ("{", "") and b[0] in ("{", ""):
            return _equal_in_any_order(a[1], b[1])
        # A tuple may be written without brackets.
        fits = a[0] == b[0] or {a[0], b[0]} == {"()", ""}
        return fits and all(map(are_equal, a[1], b[1]))
    return (
        _equal_to_math_verify(gold, given)
        or _equal_as_solutions(gold, given)
        or _is_value(gold, given)
    )


def _is_value(gold: str, given: str) -> bool:
    r"""Whether an equation says that something, whatever it is, is the gold: ``|A \cap B| = 1``."""
    quantity, _, value = clean(given).rpartition("=")
    if not quantity.strip() or quantity.rstrip()[-1] in "<>!" or "=" in gold or split(given):
        return False
    return are_equal(gold, value)


def _only_element(text: str) -> str:
    """A set of one element is that element."""
    parts = split(text)
    return parts[1][0] if parts is not None and parts[0] == "{" and len(parts[1]) == 1 else text


_DOTS = re.compile(r"\\[lc]?dots(?![a-zA-Z])")
_RELATION = re.compile(r"(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|[<>])")
_OR = re.compile(r"\\(?:text|mbox|mathrm)\s?\{\s?or\s?\}|\bor\b|\\(?:lor|vee)(?![a-zA-Z])")
_NAME = re.compile(r"\\?[a-zA-Z]+")


def _solutions(text: str) -> tuple[str, str] | None:
    """The variable of inequalities such as 'x < -2 or 3 > x > 1' and the intervals they allow."""
    found = [_interval(part) for part in _OR.split(clean(text))]
    names = {name for name, _ in filter(None, found)}
    if None in found or len(names) != 1:
        return None
    return names.pop(), r" \cup ".join(interval for _, interval in filter(None, found))


def _interval(text: str) -> tuple[str, str] | None:
    sides = [side.strip() for side in _RELATION.split(text)]
    if len(sides) in (3, 5) and all(sign in (">", r"\ge") for sign in sides[1::2]):
        sides = [{">": "<", r"\ge": r"\le"}.get(side, side) for side in reversed(sides)]
    if not all(sides) or not all(sign in ("<", r"\le") for sign in sides[1::2]):
        return None
    if len(sides) == 3:
        sides = [r"-\infty", "<", *sides] if _NAME.fullmatch(sides[0]) else [*sides, "<", r"\infty"]
    if len(sides) != 5 or not _NAME.fullmatch(sides[2]):
        return None
    low, first, name, second, high = sides
    return name, f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"


def _equal_as_solutions(gold: str, given: str) -> bool:
    """Inequalities compared by the sets that they describe."""
    a, b = _solutions(gold), _solutions(given)
    if (a is None and b is None) or (a is not None and b is not None and a[0] != b[0]):
        return False
    return _equal_to_math_verify(a[1] if a else gold, b[1] if b else given)


def _equal_in_any_order(golds: Sequence[str], given: Sequence[str]) -> bool:
    left = list(given)
    for gold in golds:
        match = next((text for text in left if are_equal(gold, text)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # "Timeout is disabled": ours is on
    # LaTeX only: the other kind of extraction hands text to sympy's parse_expr, which evaluates it.
    # Units are ours to remove (`prepare`): theirs include the variables m, s and t.
    spelling = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)]
    return parse(rf"\boxed{{{text}}}", config, parsing_timeout=0)


def _equal_to_math_verify(gold: str, given: str) -> bool:
    from math_verify import verify

    golds, givens = _parse(prepare(gold)), _parse(prepare(given))
    for a in golds:
        for b in givens:
            said = _compare_constants(a, b, "." in gold or "." in given)
            if said is None:
                said = verify(a, b, strict=True, timeout_seconds=0, allow_set_relation_comp=True)
            if said:
                return True
    return False


_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))")


def prepare(text: str) -> str:
    """What Math-Verify is given: one spelling per sign, angles in radians, plain thousands."""
    text = without_units(plain_thousands(clean(text)))
    if _TRIGONOMETRY.search(text):
        text = _IN_DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", text)
    return text


def _compare_constants(a: Any, b: Any, is_decimal: bool) -> bool | None:
    """Numbers without variables, to 50 digits; None where one is not such a number."""
    import sympy

    a, b = (_with_imaginary_unit(x) for x in (a, b))
    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (a, b)):
        return None
    x, y = (sympy.N(value.doit(), 50) for value in (a, b))
    if not all(value.is_number and value.is_finite for value in (x, y)):
        return None
    scale = max(abs(x), abs(y))
    if abs(x - y) <= scale * sympy.Float("1e-30", 50):
        return True
    if is_decimal:
        return bool(abs(x - y) <= 1e-6 and abs(x - y) <= 1e-5 * scale)
    return False


def _with_imaginary_unit(x: Any) -> Any:
    """``i`` as a number where it is the only variable."""
    import sympy

    names = [symbol.name for symbol in getattr(x, "free_symbols", ())]
    return x.subs(next(iter(x.free_symbols)), sympy.I) if names == ["i"] else x


def warm_up() -> None:
    """Import what the comparison needs and fill its caches, for all children to inherit."""
    for gold, given in (
        (r"\frac{x}{2}+1", r"\frac{x+2}{2}"),
        (r"(1,\sqrt{2})", r"(1, 2^{1/2})"),
        (r"x \ge 5", r"[5,\infty)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    ):
        are_equal(gold, given)
