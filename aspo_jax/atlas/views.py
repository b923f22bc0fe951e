"""One token of a rule's mini-batch moves, everything else that the rule reads stands still.

A rule is a function of many numbers; a picture has two axes. `views_of` finds out what a rule
reads, by changing it, and holds what is not on an axis at values that a caption states:

    one response of one token, alone in its mini-batch, |A| = 1
    pi_sampler = pi_reference = pi_teacher = pi_old; entropies 1 nat; the token is the first
    rules that read their whole mini-batch: 12 more responses, the same for every point
    rules that read entropies: a token below and one above the others of its response
    rules that read positions: the first token and the 1000th
    rules that do not read pi_theta but the sampler: pi_sampler and pi_old move instead
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax.losses import Objective, Tokens, coefficient_of, response_only

OTHERS = ("sampler_logp_BT", "ref_logp_BT", "teacher_logp_BT")  # as the old policy unless they move
ENTROPIES = ("entropy_BT", "old_entropy_BT")
LATE = 999  # the 1000th token of a response
CURVE_AT = (0.05, 0.5)  # pi_old of the curves; the second where a rule reads probabilities

Shows = Literal["weight", "coefficient", "bias"]


class View(NamedTuple):
    """A slice through a rule.

    label: which of a rule's views, "" where there is one.
    reads: what the rule was found to read, names of `_CHANGES`.
    moves: the policies on the axes: pi_old and pi_theta, or pi_sampler and pi_old.
    entropy, position: of the token that moves.
    """

    label: str
    reads: frozenset[str]
    moves: Literal["policy", "sampler"] = "policy"
    entropy: float = 1.0
    position: int = 0

    @property
    def axes(self) -> tuple[str, str]:
        """What is divided by, and what is divided."""
        return ("pi_old", "pi_theta") if self.moves == "policy" else ("pi_sampler", "pi_old")

    @property
    def caption(self) -> str:
        """What is held, and at what, as far as the rule reads it."""
        said = {
            "advantage": "A = +1 and -1",
            "probability": f"curves at {self.axes[0]} = {CURVE_AT[0]} (thick) and {CURVE_AT[1]}",
            "response": "a response of this one token",
            "minibatch": "12 other responses, near ratio 1, in its mini-batch",
            "sampler": "" if self.moves == "sampler" else "pi_sampler = pi_old",
            "reference": "pi_reference = pi_old",
            "teacher": "pi_teacher = pi_old",
            "entropy": f"entropy {self.entropy:g} nats, beside 4 tokens of its response of ratio 1 "
            "and 0.5 to 1.5 nats",
            "position": f"token {self.position + 1} of its response",
        }
        if "entropy" in self.reads:
            del said["response"]
        return "; ".join(text for what, text in said.items() if what in self.reads and text)


# --- what a rule reads --------------------------------------------------------------------------


def _scene() -> dict[str, np.ndarray]:
    """Four responses of six tokens, in pairs of one prompt, in general position."""
    rng = np.random.default_rng(0)
    shape = (4, 6)
    old_BT = -rng.uniform(0.5, 3.0, shape)
    old_BT[0, 0] = -0.6  # a likely token: its probability has far to fall
    moved = {name: old_BT + rng.normal(0, 0.2, shape) for name in ("logp_BT", *OTHERS)}
    sign_B1 = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    return {
        **{name: np.minimum(x, -0.01) for name, x in moved.items()},
        **{name: rng.uniform(0.5, 1.5, shape) for name in ENTROPIES},
        "old_logp_BT": old_BT,
        "old_square_BT": _squares(old_BT),
        "advantage_BT": np.broadcast_to(sign_B1, shape).copy(),
        "is_response_BT": np.ones(shape, bool),
        "position_BT": np.broadcast_to(np.arange(6, dtype=np.int32), shape).copy(),
        "group_id_BT": np.repeat(np.array([0, 0, 1, 1], np.int32), 6).reshape(shape),
    }


def _squares(old_BT: np.ndarray) -> np.ndarray:
    """Squared probabilities of a policy that has one other token."""
    return np.exp(2 * old_BT) + (1 - np.exp(old_BT)) ** 2


def _own(*names: str, by: float) -> Mapping[str, Any]:
    """A change of the first response's first token."""
    return {name: (np.s_[0, 0], by) for name in names}


def _sampler_gap() -> np.ndarray:
    """What makes the first response's sampler the old policy: some bounds hold nothing else."""
    scene = _scene()
    return scene["old_logp_BT"][0] - scene["sampler_logp_BT"][0]


# What a rule may read -> the fields that are changed to find out, where, and by how much. An
# entropy leaves its neighbours' range on either side, a ratio every usual clip range.
_CHANGES: dict[str, list[Mapping[str, Any]]] = {
    "policy": [_own("logp_BT", by=x) for x in (-1.5, -0.1, 0.1, 0.4)],
    "probability": [_own("logp_BT", "old_logp_BT", *OTHERS, by=x) for x in (-3.0, -0.5, 0.3)],
    "response": [{"logp_BT": (np.s_[0, 1:], x)} for x in (-0.8, 0.4)],
    "minibatch": [
        {"logp_BT": (np.s_[1:], -0.8)},
        {"logp_BT": (np.s_[1:], 0.4)},
        {"advantage_BT": (np.s_[1:], 1.5)},
        {name: (np.s_[1:], -0.45) for name in ENTROPIES},
    ],
    "sampler": [
        *(_own("sampler_logp_BT", by=x) for x in (-2.0, 0.1, 0.5)),
        *({"sampler_logp_BT": (np.s_[0], x)} for x in (-5.0, -2.0, 2.0)),
        {"sampler_logp_BT": (np.s_[0], _sampler_gap())},
    ],
    "reference": [_own("ref_logp_BT", by=x) for x in (-2.0, 0.1)],
    "teacher": [_own("teacher_logp_BT", by=x) for x in (-2.0, 0.1)],
    "entropy": [_own(*ENTROPIES, by=x) for x in (-0.04, 0.3, 2.0)],
    "position": [{"position_BT": (np.s_[0], LATE)}],
}


# Log-ratios of the token: on both sides of 0 between the bounds that are in use, and beyond them.
_MOVES = (-0.5, -0.3, -0.1, 0.0, 0.1, 0.25, 0.5)


def reads_of(objective: Objective) -> frozenset[str]:
    """What a rule's weight and bias of a token depend on, found by changing it: of `_CHANGES`."""
    scenes, names = [], []
    for sign, ratio, entropy in itertools.product((1, -1), _MOVES, (0.05, 1.0, 3.0)):
        scene = _scene()
        scene["advantage_BT"] *= sign
        scene["logp_BT"][0, 0] = scene["old_logp_BT"][0, 0] + ratio
        for name in ENTROPIES:
            scene[name][0, 0] = entropy
        scenes.append(scene)
        names.append("")
        for name, changes in _CHANGES.items():
            for change in changes:
                scenes.append(_changed(scene, change))
                names.append(name)
    stacked = {k: jnp.asarray(np.stack([scene[k] for scene in scenes])) for k in scenes[0]}
    found = np.stack(_coefficients(objective, Tokens(**stacked)))
    read, base = set(), found[:, 0]
    for i, name in enumerate(names):
        if not name:
            base = found[:, i]
        elif not np.allclose(found[:, i], base, rtol=1e-5, atol=1e-6):
            read.add(name)
    return frozenset(read)


def _changed(scene: dict[str, np.ndarray], change: Mapping[str, Any]) -> dict[str, np.ndarray]:
    changed = dict(scene)
    for name, (where, by) in change.items():
        changed[name] = scene[name].copy()
        changed[name][where] += by
    return changed


def _coefficients(objective: Objective, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """w and b of the first token of each of N mini-batches, ``[N, B, T] -> [N]`` each."""

    def of_minibatch(tokens: Tokens):
        made = coefficient_of(objective, response_only(tokens))
        return made.weight_BT[0, 0], made.bias_BT[0, 0]

    weight_N, bias_N = jax.vmap(of_minibatch)(tokens)
    return np.asarray(weight_N, np.float64), np.asarray(bias_N, np.float64)


# --- the views of a rule ------------------------------------------------------------------------


def views_of(objective: Objective) -> list[View]:
    """The slices that show a rule; see the top of this file."""
    reads = reads_of(objective)
    reads |= {"advantage"} if _bends(objective, reads) else set()
    moves = "sampler" if "sampler" in reads and "policy" not in reads else "policy"
    entropies = {"": 1.0}
    if "entropy" in reads:
        entropies = {"low entropy": 0.05, "high entropy": 3.0}
    positions = {"first token": 0, "1000th token": LATE} if "position" in reads else {"": 0}
    return [
        View(", ".join(filter(None, (of_entropy, of_position))), reads, moves, entropy, position)
        for of_entropy, entropy in entropies.items()
        for of_position, position in positions.items()
    ]


def _bends(objective: Objective, reads: frozenset[str]) -> bool:
    """Whether a coefficient is not linear in the advantage's size."""
    view, r = View("", reads), np.exp(np.linspace(-1, 1, 9))
    for sign in (1, -1):
        small, large = (_at(objective, view, np.full(9, 0.1), 0.1 * r, sign * x) for x in (0.5, 1))
        if not np.allclose(small, large, rtol=1e-5, atol=1e-6):
            return True
    return False


def _tokens_at(view: View, first_N: np.ndarray, second_N: np.ndarray, advantage: float) -> Tokens:
    """N mini-batches, of which the first token has these probabilities under the two policies."""
    companions = {(False, False): (1, 1), (True, False): (13, 4), (False, True): (1, 5)}
    key = ("minibatch" in view.reads, "entropy" in view.reads)
    rows, length = companions.get(key, (13, 5))
    rng = np.random.default_rng(1)  # the same companions for every point
    old_BT = np.log(rng.uniform(0.1, 0.9, (rows, length)))
    ratio_BT = rng.normal(0, 0.08, (rows, length))
    ratio_BT[0] = 0
    fields: dict[str, np.ndarray] = {
        "old_logp_BT": old_BT,
        "logp_BT": old_BT + ratio_BT,
        **dict.fromkeys(OTHERS, old_BT),
        **dict.fromkeys(ENTROPIES, rng.uniform(0.5, 1.5, (rows, length))),
        "advantage_BT": np.where(np.arange(rows) % 2, -1.0, 1.0)[:, None] + 0 * old_BT,
        "is_response_BT": np.ones((rows, length), bool),
        "position_BT": np.arange(length, dtype=np.int32) + np.zeros((rows, 1), np.int32),
        "group_id_BT": np.arange(rows, dtype=np.int32)[:, None] // 4 + np.zeros_like(old_BT, int),
    }
    fields["is_response_BT"][0, 1:] = "entropy" in view.reads
    count = len(first_N)
    stacked = {k: np.repeat(x[None], count, axis=0) for k, x in fields.items()}
    first, second = np.log(first_N), np.log(second_N)
    is_policy = view.moves == "policy"
    own = {
        "logp_BT": second,
        "old_logp_BT": first if is_policy else second,
        "ref_logp_BT": first if is_policy else second,
        "teacher_logp_BT": first if is_policy else second,
        "sampler_logp_BT": first,
        **dict.fromkeys(ENTROPIES, view.entropy),
        "position_BT": view.position,
    }
    for name, value in own.items():
        stacked[name][:, 0, 0] = value
    stacked["advantage_BT"][:, 0, :] = advantage
    stacked["old_square_BT"] = _squares(stacked["old_logp_BT"])
    stacked["group_id_BT"] = stacked["group_id_BT"].astype(np.int32)
    return Tokens(**{k: jnp.asarray(x) for k, x in stacked.items()})


# --- the numbers --------------------------------------------------------------------------------

RATIOS = np.exp2(np.linspace(-4, 4, 513))  # of the curves; 1 is among them
PLACES = (np.arange(96) + 0.5) / 96  # probabilities of a map's axes
BLOCK = 1024  # grid points at once, always so many: one shape, which is compiled once


class Charted(NamedTuple):
    """A view's numbers.

    shows: "weight" w where the rule has no bias; "bias" b where w is constant; else
        "coefficient", (w A + b) / A: what stands where w stands without a bias. At A = +-1.
    maps: sign of A -> [second policy, first policy], over `PLACES`.
    curves: sign -> {pi of the first policy: values over `RATIOS`, NaN beyond probability 1}.
    """

    view: View
    shows: Shows
    maps: Mapping[int, np.ndarray]
    curves: Mapping[int, Mapping[float, np.ndarray]]

    @property
    def is_of_ratio(self) -> bool:
        """Whether the value is a function of the ratio alone."""
        return "probability" not in self.view.reads


def chart(objective: Objective, view: View, places: np.ndarray = PLACES) -> Charted:
    """The numbers of a view."""
    levels = CURVE_AT if "probability" in view.reads else CURVE_AT[:1]
    found = {
        (sign, p): _at(objective, view, np.full(len(RATIOS), p), p * RATIOS, sign)
        for sign in (1, -1)
        for p in levels
    }
    shows = _shows(found.values())
    first, second = (x.ravel() for x in np.meshgrid(places, places))
    maps = {
        sign: _shown(shows, _at(objective, view, first, second, sign), sign).reshape(
            len(places), len(places)
        )
        for sign in (1, -1)
    }
    curves: dict[int, dict[float, np.ndarray]] = {1: {}, -1: {}}
    for (sign, p), values in found.items():
        curves[sign][p] = np.where(p * RATIOS <= 1, _shown(shows, values, sign), np.nan)
    return Charted(view, shows, maps, curves)


def _at(
    objective: Objective, view: View, first_N: np.ndarray, second_N: np.ndarray, advantage: float
) -> tuple[np.ndarray, np.ndarray]:
    """w and b where the first token has these probabilities, by blocks of a fixed size."""
    count, room = len(first_N), (0, -len(first_N) % BLOCK)
    first_N = np.pad(first_N, room, mode="edge")
    second_N = np.pad(np.minimum(second_N, 1.0), room, mode="edge")
    blocks = [
        _coefficients(objective, _tokens_at(view, first, second, float(advantage)))
        for first, second in zip(
            first_N.reshape(-1, BLOCK), second_N.reshape(-1, BLOCK), strict=True
        )
    ]
    weight_N, bias_N = (np.concatenate(x)[:count] for x in zip(*blocks, strict=True))
    return weight_N, bias_N


def _shows(found: Any) -> Shows:
    pairs = list(found)
    if all(not bias.any() for _, bias in pairs):
        return "weight"
    weights = np.concatenate([weight for weight, _ in pairs])
    return "bias" if np.ptp(weights) == 0 else "coefficient"


def _shown(shows: Shows, values: tuple[np.ndarray, np.ndarray], sign: int) -> np.ndarray:
    weight_N, bias_N = values
    return {"weight": weight_N, "bias": bias_N, "coefficient": weight_N + bias_N / sign}[shows]


class Edges(NamedTuple):
    """Ratios where a curve changes its course: it jumps, or its slope does (a cap begins)."""

    jumps: list[float]
    bends: list[float]


def edges(values: np.ndarray) -> Edges:
    """The jumps and bends of a curve over `RATIOS`.

    A slope is one of log w against log r, or of w where it is not positive.
    """
    known = np.flatnonzero(~np.isnan(values))
    x, y = np.log(RATIOS[known]), values[known]
    steps = np.diff(y)
    usual = 0.05 * np.maximum(np.abs(y[1:]), np.abs(y[:-1])) + 1e-6
    is_jump = (np.abs(steps) > usual) & _stands_out(steps)
    safe = np.where(y > 0, y, np.nan)
    slope = np.diff(np.log(safe)) / np.diff(x)
    turns = np.diff(slope)
    turn = (np.abs(turns) > 0.3) & _stands_out(np.nan_to_num(turns))
    near = is_jump[1:] | is_jump[:-1]
    jumps = [float(np.sqrt(RATIOS[known][i] * RATIOS[known][i + 1])) for i in _firsts(is_jump)]
    bends = [float(RATIOS[known][i + 1]) for i in _firsts(turn & ~near)]
    return Edges(jumps, bends)


def _stands_out(x: np.ndarray) -> np.ndarray:
    """True where |x| is thrice what it is two places before and after: not where a curve is steep.

    Next to it may lie the other part of a change that falls between two points.
    """
    size = np.pad(np.abs(x), 2, mode="edge")
    return size[2:-2] > 3 * np.maximum(size[:-4], size[4:])


def _firsts(is_true: np.ndarray) -> np.ndarray:
    """Where each stretch of True begins."""
    return np.flatnonzero(is_true & ~np.concatenate([[False], is_true[:-1]]))


FEW = PLACES[8::16]  # of a map, for `summary`


def summary(objective: Objective, view: View) -> dict[str, Any]:
    """A view's numbers in short, for a page to keep: every 31st of a curve, a map over `FEW`."""
    found = chart(objective, view, FEW)
    signs = {1: "+", -1: "-"}
    return {
        "label": view.label,
        "caption": view.caption,
        "shows": found.shows,
        "reads": sorted(view.reads),
        "curves": {
            f"{signs[sign]} {p:g}": _rounded(values[8::31])
            for sign, of in found.curves.items()
            for p, values in of.items()
        },
        "maps": {signs[sign]: _rounded(x.ravel()) for sign, x in found.maps.items()},
    }


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else float(f"{x:.4g}") for x in values]
