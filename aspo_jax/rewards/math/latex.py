r"""One spelling for a mathematical answer, and its exact value where that is a plain number.

`normalise` removes what carries no value (layout, units, text wrappers); `number` reads integers,
decimals, fractions, mixed numbers, percentages and arithmetic on them as exact fractions. Both are
linear in the text and know no sympy: most answers of a training batch are decided here.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

_STOPS = " .,;:\\"  # at the end of an answer, whose other white space has become blanks
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ",
    "·": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "√": r"\sqrt ", "≈": r"\approx ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "γ": r"\gamma ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "ℝ": r"\mathbb{R}",
    "⟨": r"\langle ", "⟩": r"\rangle ", "ℤ": r"\mathbb{Z}",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_TRANSLATED = str.maketrans(_CHARACTERS)

_LAYOUT = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|quad|qquad|hfill"
    r"|bf|rm|it|sf|tt|large|Large|LARGE|huge|Huge|small|(?:text)?color\{[a-zA-Z]*\}"
    r"|phantom\{[^{}]*\}|hspace\{[^{}]*\}|,|;|:|>)(?![a-zA-Z])"
)
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal|sc)?|math(?:rm|bf|it|sf|tt|cal|normal)|mbox|hbox|bm"
    r"|boldsymbol|emph|operatorname\*?|underline|textnormal|ensuremath)\s*\{([^{}]*)\}"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)\b)|\\degree\b")
_LEAD = re.compile(
    r"(?:[=≈∴⇒\s]|=>|\\(?:approx|therefore|Rightarrow|implies|Longrightarrow)(?![a-zA-Z])"
    r"|(?:\\text\s?\{\s?)?(?:approximately|about|roughly)\b\s?\}?)*"
)
_ROWS = re.compile(
    r"(?:\{|\\\{)?\s?\\begin\{(aligned|align|cases|gathered|gather|split|equation|array)\*?\}"
    r"(?:\{[lcr|]*\})?(.*)\\end\{\1\*?\}\.?",
    re.DOTALL,
)
_MARKS = re.compile(r"\\[$()\[\]]|[$£€]")
_CLOSER = re.compile(r"\s?(?<!\\)\\!\s?")
_ROW_GAP = re.compile(r"\\\\\[[^\[\]]{0,12}\]")
_GREEK = r"\\(?:pi|alpha|beta|gamma|theta|phi|omega|lambda|mu)(?![a-zA-Z])"
_TOKEN_ARGUMENT = rf"([0-9a-zA-Z]|{_GREEK})"
_SYNONYMS = (  # pattern, replacement: one command for several
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\\langle(?![a-zA-Z])\s?"), "("),
    (re.compile(r"\s?\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\lbrace(?![a-zA-Z])\s?"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\log_(?:e(?![a-zA-Z])|\{e\})"), r"\\ln "),
    (re.compile(r"\\mathbb\s?([A-Z])(?![a-zA-Z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\bar\s?\{(\d+)\}"), r"\\overline{\1}"),
    (re.compile(r"\\(max|min|gcd)\s?\\\{([^{}]*)\\\}"), r"\\\1(\2)"),
    (re.compile(r"(?<![0-9a-zA-Z])([0-9]+|[a-zA-Z])!\^"), r"(\1!)^"),
    (re.compile(r"\\pmod\s?(\w)"), r"\\pmod{\1}"),
    (re.compile(rf"\\(frac|binom)\s?{_TOKEN_ARGUMENT}\s?(?=[0-9a-zA-Z{{\\])"), r"\\\1{\2}"),
    (re.compile(rf"(\\(?:frac|binom)\{{[^{{}}]*\}})\s?{_TOKEN_ARGUMENT}"), r"\1{\2}"),
)
_SHORT_ROOT = re.compile(r"\\sqrt\s?(\[[^\[\]{}]{0,20}\])?\s?([0-9a-zA-Z])")
_UNIT_NAMES = (
    r"cm|mm|km|kg|mg|ml|mi|ft|in|inch(?:es)?|feet|foot|yards?|miles?|meters?|metres?|centimeters?|"
    r"kilometers?|liters?|litres?|grams?|kilograms?|pounds?|ounces?|seconds?|secs?|minutes?|mins?|"
    r"hours?|hrs?|days?|weeks?|months?|years?|degrees?|radians?|units?|square|sq|cubic|cents?|"
    r"dollars?|euros?|rupees?|mph|kph|points?|people|students?|ways?|times|apples?|books?|cats?|"
    r"dogs?|toys?|coins?|cards?|marbles?|tickets?|boxes|pieces?|pages?|questions?|eggs?|games?|"
    r"percent|percentage|pct|per|hour|m|s|g|L"
)
_UNITS = re.compile(
    rf"(?:(?<=[0-9}})!\]])\s+|(?<=\d)(?=[a-z]{{2}}))((?:(?:{_UNIT_NAMES})\b\.?"
    r"(?:\s*\^\s*(?:\{\s*[23]\s*\}|[23]))?[\s/]*)+)$"
)
_WRAPPED_UNIT = re.compile(
    r"(?:(?<=[0-9}\])])|(?<=\\pi)|(?<=\\pi ))\s*"
    r"\\(?:text|mbox|mathrm|textrm|textbf|textit|textnormal|operatorname)\s*"
    r"\{(?!\s*(?:[ei]|[apAP]\.?[mM]\.?)\s*\})[^{}0-9,]*\}(?:\s*\^\s*(?:\{\s*[23]\s*\}|[23]))?$"
)
_PERCENT_WORD = re.compile(r"\s*\b(?:percent(?:age)?|pct)\b\.?\s*$")
_THOUSANDS = re.compile(r"(?<![\d.,(\[])\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d|,\d|\s*[)\]])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3}(?:\s\d{3})+)(?![\d])")
_DECIMAL_COMMA = re.compile(r"-?\d+(?:,|\{,\})\d+")
_ASSIGNMENT = re.compile(
    r"^\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\([a-zA-Z]\))?\s*(?:=|\\approx)\s*(?=[^=])"
    r"|(?<=\d)\s?=\s?[a-zA-Z]$"
)
_TUPLE_NAME = re.compile(r"^\(\s*\\?[a-zA-Z]+(?:\s*,\s*\\?[a-zA-Z]+)+\s*\)\s*=\s*(?=\()")
_ORDINAL = re.compile(
    r"(?<=\d)\s?(?:\^\s?)?\{?\s?(?:\\(?:text|mathrm)\{)?(?:st|nd|rd|th)\}?\s?\}?$"
)
_ARTICLE = re.compile(r"^(?:an?|the) (?=[a-z]+$)", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2}:\d\d)([ap])\.?m\.?", re.IGNORECASE)
_MIXED = re.compile(r"(?<![\d.}])(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}|\s+(\d+)\s*/\s*(\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_NAMED_BY_LETTERS = re.compile(r"\\(?:overline|angle|triangle)\s*\{?\s*([A-Z]{2,3})\s*\}?")


def clean(text: str) -> str:
    """The same LaTeX with one spelling per sign: no invisible characters, no layout commands."""
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text.translate(_TRANSLATED)))
    text = re.sub(r"\s+", " ", text.translate(_TRANSLATED))
    text = _CLOSER.sub("", _ROW_GAP.sub(r"\\\\", text))
    text = _MARKS.sub("", text).replace(r"\%", "%").replace("{:}", ":")
    text = re.sub(r"(?<!\\)\\ ", " ", _LAYOUT.sub(" ", text)).replace("~", " ")
    text = re.sub(r"\s+", " ", text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _without_rows(_LEAD.sub("", text, count=1).strip())
    text = _SHORT_ROOT.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2]}}}", text)
    return text.rstrip(_STOPS).strip()


def _without_rows(text: str) -> str:
    """Rows of equations as a list; a row that goes on with '=' takes the place of the one above."""
    found = _ROWS.fullmatch(text)
    if found is None or (found[1] == "array" and "=" not in found[2]):
        return text
    parts: list[str] = []
    for row in found[2].split(r"\\"):
        said = row.replace("&", "").strip(" ,;")
        if said.startswith("=") and parts:
            parts[-1] = said[1:].strip()
        elif said:
            parts.append(said)
    return ", ".join(parts)


def without_units(text: str) -> str:
    r"""``5 cm``, ``5\text{ cm}^2`` as 5; ``5m`` stays, for m may be a variable."""
    text = _UNITS.sub("", _PERCENT_WORD.sub("%", _ORDINAL.sub("", text)))
    return _WRAPPED_UNIT.sub("", text).strip()


def unwrap(text: str) -> str:
    r"""Contents of ``\text{}``, ``\mathrm{}`` and the like; degrees and trailing units dropped."""
    for _ in range(4):  # wrappers in wrappers
        text, count = _WRAPPER.subn(r" \1 ", text)
        if not count:
            break
    text = _NAMED_BY_LETTERS.sub(r"\1", _DEGREES.sub("", text))
    text = re.sub(r"\s+", " ", text).strip()
    return without_units(text).rstrip(_STOPS).strip()


def plain_thousands(text: str) -> str:
    """``1,234`` as 1234, but for the edge of a tuple or interval: ``(12,102)`` are two numbers."""
    return _THOUSANDS.sub(lambda m: m[0].replace("{,}", "").replace(",", ""), text)


def variable(text: str) -> str | None:
    """``x`` of ``x = 5``; None where a text assigns nothing to a plain variable."""
    found = re.match(r"\s*\\?([a-zA-Z]+(?:_\{?\w+\}?)?)\s*=(?!=)", clean(text))
    return found[1] if found else None


def normalise(text: str) -> str:
    """The form in which two spellings of an answer are compared as strings."""
    text = unwrap(clean(text))
    text = _ARTICLE.sub("", _ASSIGNMENT.sub("", _TUPLE_NAME.sub("", text)))
    text = plain_thousands(text)
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"_\{(\w)\}", r"_\1", text))
    text = re.sub(r"(?<=[\s(\[{,])\.(?=\d)|^\.(?=\d)|(?<=^-)\.(?=\d)", "0.", text)
    text = re.sub(r"\s+", "", text)
    text = _without_outer_braces(text)
    text = _TIME.sub(lambda m: f"{m[1]}{m[2].lower()}m", text)
    if text.lower() in ("infinity", "+infinity", r"+\infty"):
        return r"\infty"
    return text.lower() if re.fullmatch(r"[A-Za-z,]{2,}", text) else text


def depths(text: str) -> list[int]:
    """How many brackets are open behind each character."""
    return list(itertools.accumulate((c in "([{") - (c in ")]}") for c in text))


def _without_outer_braces(text: str) -> str:
    depth, length = depths(text), len(text)
    before, after = length - len(text.lstrip("{")), length - len(text.rstrip("}"))
    if not before or depth[-1] != 0:
        return text
    outer = max(0, min(before, after, *depth[before : length - after]))
    return text[outer : length - outer]


# --- plain numbers --------------------------------------------------------------------------------

_LONGEST = 800  # characters; longer ones are left to others
_DIGITS = 400  # of a number
_BITS = 4096  # largest power that is worked out
_PRODUCT = re.compile(r"(?<=[\d.)}!])\s*(?=\(|\\frac)")  # 2(3)
_TOKEN = re.compile(
    r"((?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d{1,2}(?!\d))?)"
    r"|\\(?:times|cdot|div|frac)(?![a-zA-Z])|\*\*|\S"
)
_PYTHON = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\frac": "F", "^": "**", "!": ".f"}
_PYTHON |= {"{": "[", "}": "]", "**": "**"} | {sign: sign for sign in "+-*/()"}


class Number(NamedTuple):
    """An exact value and how it was written."""

    value: Fraction
    is_decimal: bool = False
    is_percent: bool = False


def number(text: str) -> Number | None:
    """The exact value of a text that is arithmetic on rational numbers; None for any other text."""
    text = plain_thousands(_ASSIGNMENT.sub("", unwrap(clean(text))))
    if len(text) > _LONGEST:
        return None
    if _DECIMAL_COMMA.fullmatch(text):
        text = text.replace("{,}", ".").replace(",", ".")
    if _SPACED_THOUSANDS.fullmatch(text.removeprefix("-")):
        text = text.replace(" ", "")
    text = _REPEATING.sub(_repeating, text)
    text = _MIXED.sub(lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})", text)
    try:
        said = _TOKEN.sub(_in_python, _PRODUCT.sub("*", text.removesuffix("%")))
        value = _value(ast.parse(said.strip(), mode="eval").body)
    except (ValueError, KeyError, SyntaxError, ZeroDivisionError, MemoryError, RecursionError):
        return None
    return Number(value, "." in text, text.endswith("%"))


def _repeating(found: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` as a fraction."""
    whole, fixed, period = found.groups()
    top = int(whole + fixed + period) - int(whole + fixed or "0")
    return f"({top}/{(10 ** len(period) - 1) * 10 ** len(fixed)})"


def _in_python(token: re.Match[str]) -> str:
    """A piece of an expression to be parsed, not evaluated, by Python: its precedence is ours.

    The number 4 is ``('4')``, 4! is ``('4').f``, braces are ``[a]``, a fraction ``F[a][b]``.
    """
    return f" ({token[1]!r}) " if token[1] else f" {_PYTHON[token[0]]} "


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(str(digits)) if len(digits) <= _DIGITS:
            return Fraction(digits)
        case ast.List([inner]):
            return _value(inner)
        case ast.BinOp(left, sign, right):
            return _OPERATIONS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(sign, operand):
            return _OPERATIONS[type(sign)](_value(operand))
        case ast.Attribute(operand):
            return _factorial(_value(operand))
        case ast.Subscript(ast.Subscript(ast.Name(), above), below):
            return _value(above) / _value(below)
    raise ValueError("no arithmetic")


def _raise_to(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent.numerator) > _BITS:
        raise ValueError("too large, or no whole number")
    return base**exponent.numerator


def _factorial(n: Fraction) -> Fraction:
    if n.denominator != 1 or not 0 <= n <= 100:
        raise ValueError("too large, or no whole number")
    return Fraction(math.factorial(n.numerator))


_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _raise_to,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}

_ABSOLUTE = Fraction(1, 10**6)
_RELATIVE = Fraction(1, 10**5)


def are_equal_numbers(gold: Number, given: Number) -> bool:
    """Exact, but for decimals (`_equal`) and percent signs (28 % is 28 and 0.28)."""
    if gold.is_percent and not given.is_percent:
        return _equal(gold, given) or (given.is_decimal and _equal(_share(gold), given))
    if given.is_percent and not gold.is_percent:
        return _equal(gold, given) or _equal(gold, _share(given))
    return _equal(gold, given)


def _share(percentage: Number) -> Number:
    return Number(percentage.value / 100, percentage.is_decimal)


def _equal(a: Number, b: Number) -> bool:
    """A decimal stands for values that are equal to six places, and to five digits."""
    gap = abs(a.value - b.value)
    if a.is_decimal or b.is_decimal:
        return gap <= _ABSOLUTE and gap <= _RELATIVE * max(abs(a.value), abs(b.value))
    return gap == 0
