"""Which rule was measured: a name, why it is or is not ASPO, and what else is to be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aspo_jax.conformance.asking import close
from aspo_jax.conformance.probes import Measured
from aspo_jax.conformance.single import Direction, Side

# What a verdict may be called, and with --expect must be called.
NAMES: Mapping[str, str] = {
    "aspo": "ASPO as in the paper",
    "archer2": "ASPO as in the released code (Archer2.0)",
    "aspo_other_epsilon": "ASPO with other clip widths",
    "aspo_gate_missing": "ASPO without its hard mask",
    "aspo_cap_missing": "ASPO without its cap",
    "aspo_hard_cap": "ASPO with a hard cap on A > 0",
    "aspo_split_inverted": "ASPO with the entropy split upside down",
    "sign_flipped": "1/r without the stop-gradient: good tokens are pushed down",
    "loss_negated": "an objective to maximise, not a loss",
    "ppo_clip": "PPO's clip",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "clip_higher": "DAPO's clip, averaged in another way",
    "dual_clip": "PPO's clip with a hard dual clip",
    "soft_dual_clip": "PPO's clip with a soft dual clip",
    "importance_sampling": "the plain importance ratio, without a clip",
    "grpo_without_is": "GRPO without importance sampling",
    "reinforce": "REINFORCE",
    "cispo": "CISPO",
    "gspo": "GSPO",
    "luspo": "LUSPO",
    "gmpo": "GMPO",
    "positive_response_mean": "GRPO with the response's mean ratio on A > 0",
    "other": "another rule",
}
ASPO = ("aspo", "archer2")

# What makes a loss of any name unfit; `--allow` takes them.
DEFECTS = ("mask ignored", "depends on probability", "non-finite", "not linear in A")


class Verdict(NamedTuple):
    """names: of `NAMES`, that fit, the most telling first. details: numbers. not_aspo: why not."""

    names: tuple[str, ...]
    details: str = ""
    not_aspo: str = ""

    @property
    def title(self) -> str:
        return NAMES[self.names[0]] + (f": {self.details}" if self.details else "")


def judge(m: Measured) -> Verdict:
    """The first name that what was measured fits."""
    laws = (m.positive.law, m.negative.law)
    if m.curved:
        return _other(m, "the coefficient is not linear in the advantage")
    if laws[0] and laws[1] and laws[0][0] == laws[1][0] == "-":
        return Verdict(("loss_negated",), "return its negative", "the update goes the wrong way")
    if laws[0] == "-1/r":
        return Verdict(("sign_flipped",), not_aspo="A > 0: w = -1/r; the paper's w is +1/r")
    if laws == ("1/r", "r") and _is_per_token(m):
        return _aspo(m)
    if laws == ("r", "r"):
        return _ratio(m)._replace(not_aspo="the flip is lost, w = r for A > 0 and not 1/r")
    if laws == ("1", "1"):
        return _without_ratio(m)._replace(not_aspo="w = 1 near r = 1, there is no ratio")
    return _other(m)


def _other(m: Measured, why: str = "") -> Verdict:
    if not why:
        shown = [law or "no law that is known" for law in (m.positive.law, m.negative.law)]
        why = f"near r = 1, w is {shown[0]} for A > 0 and {shown[1]} for A < 0"
    if m.positive.law == m.negative.law == "1/r":
        why = "negative tokens are flipped too"
    return Verdict(("other",), why, "the weights of ASPO are 1/r for A > 0 and r for A < 0")


def _is_per_token(m: Measured) -> bool:
    return all(coupling.ratio == "token" for coupling in m.coupling)


def _near(x: float, y: float) -> bool:
    return bool(close(x, y))


def widths(m: Measured) -> tuple[float, float]:
    """(low, high): how far the gates are from 1; NaN where there is none."""
    return 1 - _edge(m.negative.down), _edge(m.positive.up) - 1


def _edge(direction: Direction) -> float:
    return direction.edge if direction.kind == "zero" else math.nan


def _show(m: Measured) -> str:
    low, high = widths(m)
    return f"clip {low:.4g} below and {high:.4g} above"


# --- ASPO and its mistakes ----------------------------------------------------------------------


def _aspo(m: Measured) -> Verdict:
    """The ratio of positive tokens is upside down: gates first, then caps, then widths."""
    outward = {"A > 0": m.positive.up, "A < 0": m.negative.down}
    inward = {"A > 0": m.positive.down, "A < 0": m.negative.up}
    if "other" in {d.kind for d in (*outward.values(), *inward.values())}:
        return _other(m, f"ASPO near r = 1, further out {_further(m)}")
    uncapped = " and ".join(sign for sign, d in inward.items() if d.kind == "law")
    if open_gates := [sign for sign, d in outward.items() if d.kind != "zero"]:
        details = " and ".join(open_gates)
        if {outward[sign].kind for sign in open_gates} == {"level"}:
            details += ", caps in its place"
        details += f"; no cap on {uncapped}" if uncapped else ""
        if "A > 0" in open_gates and (below := inward["A > 0"]).kind == "zero":
            details += f"; it is on the flipped ratio, which drops r below {below.edge:.4g}"
        return Verdict(("aspo_gate_missing",), details, "tokens beyond the clip keep a gradient")
    if uncapped:
        return Verdict(("aspo_cap_missing",), uncapped, "the weight grows without bound")
    if inward["A > 0"].kind == "zero":
        why = "the paper's cap is soft: the gradient stays, with the cap as its weight"
        return Verdict(("aspo_hard_cap",), f"c = {inward['A > 0'].value:.4g}", why)
    return _whole_aspo(m, inward["A > 0"].value, inward["A < 0"])


def _whole_aspo(m: Measured, cap: float, negative: Direction) -> Verdict:
    soft = "soft" if negative.kind == "level" else "hard"
    details = f"{_show(m)}, soft cap {cap:.4g} on A > 0, {soft} cap {negative.value:.4g} on A < 0"
    split = m.split and [*map(_width, m.split)]
    if split == [0.4, 0.2]:
        why = "tokens of high entropy have the narrower clip; the released code widens theirs"
        return Verdict(("aspo_split_inverted",), details, why)
    if split == [0.2, 0.4] and soft == "soft" and _near(cap, 3) and _near(negative.value, 3):
        details = "clip 0.2 on low-entropy tokens and 0.4 on high-entropy ones, soft caps 3"
        return Verdict(("archer2",), details)
    if {_width(widths(m)), *(split or [])} == {0.2}:
        return Verdict(("aspo",), details)
    return Verdict(("aspo_other_epsilon",), details, "the paper's clip is 0.2 for every token")


def _width(low_high: tuple[float, float]) -> float:
    """0.2 or 0.4 if both widths are that, else NaN."""
    return next((w for w in (0.2, 0.4) if all(_near(x, w) for x in low_high)), math.nan)


# --- the others -----------------------------------------------------------------------------------


def _ratio(m: Measured) -> Verdict:
    """w = r near 1: by its gates, then by which ratio it is."""
    if any(d.kind == "level" for d in (m.positive.up, m.negative.down)):
        return _cispo(m)
    gates = (m.positive.up.kind, m.negative.down.kind)
    if gates == ("law", "law"):
        plain = all(d.kind == "law" for d in (m.positive.down, m.negative.up))
        return Verdict(("importance_sampling",)) if plain and _is_per_token(m) else _other(m)
    if gates != ("zero", "zero") or m.positive.down.kind != "law":
        return _other(m, f"w = r near 1, further out {_further(m)}")
    if m.negative.up.kind == "other":
        return _other(m, "PPO's clip near r = 1, but another rule for A < 0 further up")
    return _clipped(m)


def _further(m: Measured) -> str:
    return f"{_describe(m.positive)} for A > 0, {_describe(m.negative)} for A < 0"


def _describe(side: Side) -> str:
    up, down = ("no known shape" if d.kind == "other" else d.kind for d in (side.up, side.down))
    return f"{up} upwards and {down} downwards"


def _cispo(m: Measured) -> Verdict:
    """The ratio within absolute bounds, the same for both signs, and no gate."""
    sides = (m.positive, m.negative)
    kinds = {d.kind for side in sides for d in (side.up, side.down)}
    (low, high), other = ((s.down.value, s.up.value) for s in sides)
    is_same = np.allclose((low, high), other, rtol=1e-3, equal_nan=True)
    if not kinds <= {"law", "level"} or not is_same or not _is_per_token(m):
        return _other(m, "the ratio is bounded, but not as CISPO's")
    shown = [f"at least {low:.4g}"] * (not math.isnan(low))
    shown += [f"at most {high:.4g}"] * (not math.isnan(high))
    return Verdict(("cispo",), "the weight is r, " + " and ".join(shown))


def _clipped(m: Measured) -> Verdict:
    """PPO's gate on both sides."""
    ratios = tuple(coupling.ratio for coupling in m.coupling)
    aggregation = m.aggregation.name if m.aggregation else None
    if ratios == ("geometric", "geometric"):
        if m.coupling[0].gate == "token":
            return Verdict(("gmpo",), _show(m))
        is_sum = aggregation in ("sequence_sum", "sum")
        return Verdict(("luspo", "gspo") if is_sum else ("gspo",), _show(m))
    if ratios == ("arithmetic", "token"):
        return Verdict(("positive_response_mean",), _show(m))
    if ratios != ("token", "token"):
        return _other(m, "PPO's clip of a ratio that is not the token's own")
    low, high = widths(m)
    dual = m.negative.up
    names = _clip_names(high > low and not _near(high, low), dual.kind, aggregation)
    details = _show(m)
    if dual.kind != "law":
        details += f", {'hard' if dual.kind == 'zero' else 'soft'} dual clip {dual.value:.4g}"
    return Verdict(names, details)


def _clip_names(is_higher: bool, dual: str, aggregation: str | None) -> tuple[str, ...]:
    """By clip widths, dual clip and, where it is the loss's own, how tokens are averaged."""
    if dual == "level":
        return ("soft_dual_clip",)
    if is_higher:
        return ("dapo",) if aggregation in (None, "token_mean") else ("clip_higher",)
    if dual == "zero":
        return ("dual_clip",)
    if aggregation is None:
        return ("ppo_clip", "grpo", "dr_grpo")
    if aggregation == "sequence_mean":
        return ("grpo", "ppo_clip")
    is_fixed = aggregation == "fixed_length" or aggregation.startswith("mean over all slots")
    return ("dr_grpo", "ppo_clip") if is_fixed else ("ppo_clip",)


def _without_ratio(m: Measured) -> Verdict:
    """w = 1: REINFORCE, or with PPO's gate the paper's ablation."""
    gates = (m.positive.up.kind, m.negative.down.kind)
    if {m.positive.down.kind, m.negative.up.kind} == {"law"}:
        if gates == ("law", "law"):
            return Verdict(("reinforce",))
        if gates == ("zero", "zero"):
            return Verdict(("grpo_without_is",), _show(m))
    return _other(m, f"w = 1 near r = 1, further out {_further(m)}")


# --- what holds beside the name -------------------------------------------------------------------


def suffixes(m: Measured) -> list[str]:
    """Independent findings, each beginning with the word that names it."""
    found = []
    if m.bias:
        number = "" if math.isnan(m.bias.coefficient) else f", {m.bias.coefficient:.4g}"
        found.append(f"+ {m.bias.kind}{number}")
    if m.aggregation:
        found.append(f"aggregation: {describe_aggregation(m)}")
    shown = zip(DEFECTS, (m.masked, m.moved, m.not_finite, m.curved), strict=True)
    return found + [f"{name}: {why}" for name, why in shown if why]


def describe_aggregation(m: Measured) -> str:
    """Name and number of the average."""
    if m.aggregation is None:
        return "its caller's: it gives no mean of its own"
    name, number, shares = m.aggregation
    if name == "fixed_length":
        return f"fixed_length, {number:.6g}"
    if name == "other":
        return f"other, a token of 3 and one of 1 have {shares}"
    return name if _near(number, 1) else f"{name}, times {number:.4g}"
