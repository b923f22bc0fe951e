"""What was found, as a table of facts with the tokens that prove them, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from aspo_jax.conformance.asking import close
from aspo_jax.conformance.calling import Loss
from aspo_jax.conformance.probes import Measured
from aspo_jax.conformance.single import Direction, Side
from aspo_jax.conformance.verdict import Verdict, describe_aggregation, suffixes


class Fact(NamedTuple):
    """One thing that was looked at.

    tokens: which, by ratio and advantage. aspo: what ASPO gives. found: what the loss gave.
    agrees: whether that is ASPO's; None where the paper leaves it open.
    """

    what: str
    tokens: str
    aspo: str
    found: str
    agrees: bool | None


def facts(m: Measured) -> list[Fact]:
    """Every probe, in the order in which the verdict asks for them."""
    return [*_of_laws(m), *_of_directions(m), *_of_terms(m), *_of_batches(m)]


def _at(side: Side, *ratios: float) -> str:
    return _numbers(side.weights[r] for r in ratios)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value + 0.0:.4g}" for value in values)  # + 0.0: no minus zero


def _of_laws(m: Measured) -> Iterator[Fact]:
    for sign, side, law in (("A > 0", m.positive, "1/r"), ("A < 0", m.negative, "r")):
        found = f"{side.law or 'no known law'} ({_at(side, 0.91, 1.0, 1.09)})"
        yield Fact("weight near 1", f"{sign}, r = 0.91, 1, 1.09", law, found, side.law == law)


def _of_directions(m: Measured) -> Iterator[Fact]:
    up, down = (1.52, 5.1, 400.0), (0.51, 0.11, 0.0025)
    yield _gate("A > 0", m.positive, m.positive.up, up, "0 above 1.2", 1.2)
    yield _gate("A < 0", m.negative, m.negative.down, down, "0 below 0.8", 0.8)
    positive, negative = m.positive.down, m.negative.up
    yield Fact(
        "cap",
        "A > 0, r = 0.11, 0.021, 0.0025",
        "a soft cap (3 in the released code)",
        f"{_say(positive)} ({_at(m.positive, 0.11, 0.021, 0.0025)})",
        positive.kind == "level",
    )
    yield Fact(
        "cap",
        "A < 0, r = 5.1, 10.2, 400",
        "a cap, soft or hard (soft 3 in the released code)",
        f"{_say(negative)} ({_at(m.negative, 5.1, 10.2, 400.0)})",
        negative.kind in ("level", "zero"),
    )


def _gate(
    sign: str, side: Side, direction: Direction, ratios: tuple[float, ...], aspo: str, edge: float
) -> Fact:
    is_as_aspo = direction.kind == "zero" and bool(close(direction.edge, edge))
    found = f"{_say(direction)} ({_at(side, *ratios)})"
    tokens = f"{sign}, r = {', '.join(f'{r:g}' for r in ratios)}"
    return Fact("gate", tokens, aspo, found, is_as_aspo)


def _say(direction: Direction) -> str:
    """A direction in words."""
    if direction.kind == "zero":
        return f"0 beyond r = {direction.edge:.4f}, where w = {direction.value:.4g}"
    if direction.kind == "level":
        return f"{direction.value:.4g} beyond r = {direction.edge:.4g}"
    return {"law": "goes on as near 1", "other": "neither that, nor 0, nor constant"}[
        direction.kind
    ]


def _of_terms(m: Measured) -> Iterator[Fact]:
    bias = "none"
    if m.bias:
        has_number = not math.isnan(m.bias.coefficient)
        bias = m.bias.kind + (f", coefficient {m.bias.coefficient:.4g}" if has_number else "")
    yield Fact("term without A", "r = 0.26 ... 5.1", "none, or a KL", bias, None)
    off = m.zero_advantage
    yield Fact(
        "A = 0", "r = 0.51 ... 2.05", "nothing but that term", f"off by {off:.2g}", off < 1e-6
    )
    yield _holds("linear in A", "A = 0.5, 1, 2 and minus these", m.curved)
    tokens = "r = 0.71 ... 2.9, log pi = -0.5, -2, -6, -12"
    yield _holds("same at every probability", tokens, m.moved)


def _holds(what: str, tokens: str, broken: str) -> Fact:
    return Fact(what, tokens, "yes", f"no: {broken}" if broken else "yes", not broken)


def _of_batches(m: Measured) -> Iterator[Fact]:
    ratios = {coupling.ratio for coupling in m.coupling}
    gates = {"token": "token gate", "sequence": "sequence gate", "none": "no gate"}
    found = "; ".join(f"{c.ratio} ratio, {gates[c.gate]}" for c in dict.fromkeys(m.coupling))
    yield Fact(
        "whose ratio", "two tokens, one moved", "the token's own", found, ratios == {"token"}
    )
    average = describe_aggregation(m)
    is_mean = m.aggregation is not None and m.aggregation.name == "sequence_mean"
    yield Fact("average", "lengths 3 and 1", "sequence_mean", average, is_mean or None)
    yield _holds("mask kept", "a hole and padding", m.masked)
    if m.split:
        low, high = (" / ".join(f"{w:.4g}" for w in widths) for widths in m.split)
        found = f"{low} at the lowest, {high} at the highest"
    else:
        found = "cannot be seen: it takes no argument `entropy`"
    aspo = "one width; released code 0.2 and 0.4"
    yield Fact("clip by entropy", "five tokens", aspo, found, None)
    weights = _numbers(m.extremes.values())
    tokens = "l = -21, -19, 19, 21, each with A = 1, -1"
    yield Fact("far out", tokens, "c, 0, c, 0, 0, c, 0, c", weights, None)
    yield _holds("finite", "all, and l = +-1000", m.not_finite)


def as_text(name: str, loss: Loss, m: Measured, verdict: Verdict) -> str:
    """Verdict, what else holds, and the table."""
    mark = {True: "yes", False: "NO", None: ""}
    lines = [f"{name} ({loss.how})", "", f"verdict: {verdict.title}"]
    lines += [f"not ASPO: {verdict.not_aspo}"] if verdict.not_aspo else []
    lines += [f"- {suffix}" for suffix in suffixes(m)]
    lines += ["", "| probe | tokens | ASPO | found | as ASPO |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {f.what} | {f.tokens} | {f.aspo} | {f.found} | {mark[f.agrees]} |" for f in facts(m)
    ]
    if not close(m.scale, 1):
        lines += [
            "",
            f"All weights are divided by the one at r = 1, A > 0, which is {m.scale:.6g}.",
        ]
    return "\n".join(lines)


def as_json(name: str, loss: Loss, m: Measured, verdict: Verdict) -> Mapping[str, Any]:
    """The same for programs."""
    return {
        "loss": name,
        "called": loss.how,
        "names": list(verdict.names),
        "verdict": verdict.title,
        "not_aspo": verdict.not_aspo,
        "findings": suffixes(m),
        "scale": m.scale,
        "facts": [f._asdict() for f in facts(m)],
    }
