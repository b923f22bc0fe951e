"""The one noun: a token coefficient. Every policy objective here has the gradient

    grad L = - sum_t a_t c_t grad log pi(y_t)        c_t = w_t A_t + b_t

    w  weight     multiplies the advantage: importance ratio, gate, flip, cap
    b  bias       does not see the advantage: KL to a reference, a trust-region pull
    a  aggregate  how tokens are averaged, from counts of the whole optimizer mini-batch

with a, b, w constants of the differentiation. An `Objective` is to policy gradients what
``optax.GradientTransformation`` is to gradients: a named tuple of pure functions, made by a
factory that closes over its hyper-parameters, composed with `chain` and `select`.

    objective = chain(aspo(clip_low=0.2, clip_high=0.2, cap=3.0), kl_penalty(beta=1e-3))
    loss, aux = policy_loss(objective, tokens, aggregate=sequence_mean)

A rule needs no ``stop_gradient`` and no care for padding: `policy_loss` hands it constants, with
zeros at masked tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from aspo_jax.losses.aggregate import Aggregate, Totals, count_totals, token_mean
from aspo_jax.losses.report import WEIGHT_BIN_EDGES, surrogate_metric, weight_metrics
from aspo_jax.structs import Histogram, Max, Mean, Metric, Metrics, Tokens, merge_metrics

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in every dtype used, and far outside every clip range

# The policies that a ratio may be taken to, and where their log-probabilities are.
ANCHORS: Mapping[str, str] = {"old": "old_logp_BT", "sampler": "sampler_logp_BT"}
AnchorName = Literal["old", "sampler"]

Value = TypeVar("Value")
Predicate = Callable[[Tokens], Array]  # tokens -> boolean [B, T]


class Coefficient(NamedTuple):
    """What a rule says about each token, ``[B, T]``.

    weight_BT: w, multiplies the advantage.
    bias_BT: b, added to w A.
    metrics: the rule's own metrics.
    surrogate_BT: value of the published per-token loss, for reports only; None: not reported.
    """

    weight_BT: Array
    bias_BT: Array
    metrics: Metrics
    surrogate_BT: Array | None = None


class Objective(NamedTuple):
    """A policy objective.

    coefficient: ``(tokens, state, stats) -> Coefficient``, of any part of the mini-batch.
    prepare: ``(tokens, state) -> stats``, what the rule must know of the mini-batch as a whole:
        it sees all of its tokens at once, before the update. None when the rule has no use for
        any, and then no pass over the data is made.
    init: ``() -> state``; ``()`` for rules without one.
    update: ``(state, stats) -> state``, once per optimizer update, never on a skipped one.
    """

    coefficient: Callable[[Tokens, Any, Any], Coefficient]
    prepare: Callable[[Tokens, Any], Any] | None = None
    init: Callable[[], Any] = lambda: ()
    update: Callable[[Any, Any], Any] = lambda state, stats: state


# --- what rules share -------------------------------------------------------------------------


class MissingField(ValueError):
    """A rule needs a field of the tokens that is None."""

    def __init__(self, rule: str, field: str):
        super().__init__(f"{rule} needs Tokens.{field}, which is None; compute it and pass it in")
        self.field = field


def require(tokens: Tokens, field: str, rule: str) -> Array:
    """A field that a rule cannot do without; a ValueError names both when it is None."""
    value = getattr(tokens, field)
    if value is None:
        raise MissingField(rule, field)
    return value


def choose(table: Mapping[str, Value], name: str, field: str) -> Value:
    """Look a named variant up; ValueError names the field, what was found and what is known."""
    if name not in table:
        raise ValueError(f"{field} = {name!r}; expected one of {sorted(table)}")
    return table[name]


def _numbers(
    is_right: Callable[[float], bool], expected: str, what: str = "a number"
) -> Callable[..., None]:
    def check(rule: str, **values: float) -> None:
        """Raise a ValueError naming the first hyper-parameter out of range, or NaN."""
        for name, value in values.items():
            if not is_right(value):
                raise ValueError(f"{rule}.{name} = {value}; expected {what} {expected}")

    return check


require_non_negative = _numbers(lambda x: x >= 0, ">= 0")
require_positive = _numbers(lambda x: x > 0, "> 0")
require_share = _numbers(lambda x: 0 <= x <= 1, "from 0 to 1")
require_above_one = _numbers(lambda x: x > 1, "above 1", "a ratio")
require_decay = _numbers(lambda x: 0 <= x < 1, "from 0 to below 1")


def ratio_bounds(rule: str, clip_low: float, clip_high: float) -> tuple[float, float]:
    """1 - clip_low and 1 + clip_high, the range of a ratio; ValueError where there is none."""
    require_share(rule, clip_low=clip_low)
    require_non_negative(rule, clip_high=clip_high)
    return 1 - clip_low, 1 + clip_high


def accurate(x: Array) -> Array:
    """x in the precision of all coefficients: at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def anchor_logp(tokens: Tokens, anchor: str, rule: str) -> Array:
    """Log-probabilities of a policy in `ANCHORS`, at least float32; see `require`."""
    return accurate(require(tokens, ANCHORS[anchor], rule))


def log_ratio(tokens: Tokens, anchor: str = "old", rule: str = "log_ratio") -> Array:
    """``log pi_theta - log pi_old``, clamped to +-20 nats; ``[B, T]``.

    anchor: another policy of `ANCHORS` in place of pi_old. rule: who asks, see `require`.
    """
    difference_BT = accurate(tokens.logp_BT) - anchor_logp(tokens, anchor, rule)
    return jnp.clip(difference_BT, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ratio(tokens: Tokens, anchor: str = "old", rule: str = "ratio") -> Array:
    """The importance ratio ``r = pi_theta / pi_old``, at most e^20; ``[B, T]``. See `log_ratio`."""
    return jnp.exp(log_ratio(tokens, anchor, rule))


def weight_only(weight_BT: Array, surrogate_BT: Array, **metrics: Metric) -> Coefficient:
    """The coefficient of a rule without a bias."""
    return Coefficient(weight_BT, jnp.zeros_like(weight_BT), metrics, surrogate_BT)


def response_only(tokens: Tokens) -> Tokens:
    """Zeros wherever the policy did not choose the token; floating fields at least float32.

    Masked slots may hold anything, NaN included, and ``0 * NaN`` is NaN: blanking the inputs,
    not the outputs, is what makes their influence and their gradient exactly zero.
    """

    def blank(x_BT: Array) -> Array:
        if not jnp.issubdtype(x_BT.dtype, jnp.floating):
            return x_BT
        return jnp.where(tokens.is_response_BT, accurate(x_BT), 0)

    return jax.tree.map(blank, tokens)


def reads(objective: Objective, field: str) -> bool:
    """Whether the objective cannot do without a field of `Tokens`, e.g. ``"ref_logp_BT"``."""
    try:
        trace(objective, token_mean, **{field: None})
    except MissingField as missing:
        return missing.field == field
    return False


def trace(objective: Objective, aggregate: Aggregate = token_mean, **changes: Any) -> Metrics:
    """Run an objective on shapes alone, all fields of `Tokens` given but for the changes.

    Returns:
        The shapes of its metrics.

    Raises:
        ValueError: what the whole of it has wrong: two rules with one metric's name, a weight that
            is not ``[B, T]``, a metric that does not add up.
    """
    fields = {
        field.name: jax.ShapeDtypeStruct((2, 8), field.metadata.get("dtype", "float32"))
        for field in dataclasses.fields(Tokens)
    }

    def loss(tokens: Tokens) -> tuple[Array, dict[str, Metric]]:
        return policy_loss(objective, tokens, aggregate=aggregate)

    return jax.eval_shape(loss, Tokens(**{**fields, **changes}))[1]


def _checked(objective: Objective, tokens: Tokens, state: Any, stats: Any) -> Coefficient:
    """The coefficient of one rule, with the shapes that it must have.

    Broadcasting would hide a weight per row or per sequence, a metric would fail much later.
    """
    rule, expected = objective.coefficient(tokens, state, stats), tokens.logp_BT.shape
    for name in ("weight_BT", "bias_BT", "surrogate_BT"):
        found = getattr(rule, name)
        if found is not None and jnp.shape(found) != expected:
            raise ValueError(f"the rule's {name} has shape {jnp.shape(found)}, expected {expected}")
    for name, metric in rule.metrics.items():
        bins = (len(WEIGHT_BIN_EDGES) + 1,) if isinstance(metric, Histogram) else ()
        if not isinstance(metric, Mean | Max | Histogram) or any(
            jnp.shape(x) != bins for x in metric
        ):
            raise ValueError(
                f"the rule's metric {name!r} is {metric!r:.80}, expected a Mean or Max of scalars, "
                "or a Histogram from weight_histogram"
            )
    return rule


# --- combinators ------------------------------------------------------------------------------


def _each(stats: Any, parts: tuple[Objective, ...]) -> tuple[Any, ...]:
    """Each part's share of combined statistics; None where no part prepares any."""
    return (None,) * len(parts) if stats is None else stats


def _combine(
    parts: tuple[Objective, ...], coefficient: Callable[[Tokens, Any, Any], Coefficient]
) -> Objective:
    """Objective over several parts whose states and statistics are tuples, one entry per part."""

    def prepare(tokens, state):
        return tuple(
            part.prepare(tokens, own) if part.prepare else None
            for part, own in zip(parts, state, strict=True)
        )

    def update(state, stats):
        shares = zip(parts, state, _each(stats, parts), strict=True)
        return tuple(part.update(*share) for part, *share in shares)

    return Objective(
        coefficient=lambda tokens, state, stats: coefficient(tokens, state, _each(stats, parts)),
        prepare=prepare if any(part.prepare for part in parts) else None,
        init=lambda: tuple(part.init() for part in parts),
        update=update,
    )


def _join_metrics(metrics: list[Metrics]) -> dict[str, Metric]:
    """Union of the metrics; a name used twice is a ValueError that names it."""
    joined: dict[str, Metric] = {}
    for part in metrics:
        for name, metric in part.items():
            if name in joined:
                raise ValueError(f"metric {name!r} is emitted twice; rename it in one of the rules")
            joined[name] = metric
    return joined


def chain(*objectives: Objective) -> Objective:
    """A rule and, behind it, what corrects it or is added to it: weights multiply, biases add.

        w = prod_k w_k        b = sum_k b_k        surrogate = s_1 prod_{k>1} w_k + sum_{k>1} s_k

    A correction is a weight with surrogate 0, a penalty has weight 1. So the surrogate is the
    published value in a flat chain that begins with its rule (one without a bias, if there is a
    correction); the gradient knows no order. The surrogate is None if one of them is. States and
    statistics are tuples, one entry per rule.

    Raises:
        ValueError: no rule is given; later, when two rules emit a metric of one name.
    """
    if not objectives:
        raise ValueError("chain() needs at least one objective")

    def coefficient(tokens, state, stats):
        shares = zip(objectives, state, stats, strict=True)
        parts = [_checked(rule, tokens, *share) for rule, *share in shares]
        weight_BT, bias_BT, _, surrogate_BT = parts[0]
        for part in parts[1:]:
            weight_BT = weight_BT * part.weight_BT
            bias_BT = bias_BT + part.bias_BT
            surrogate_BT = _both(jnp.multiply, surrogate_BT, part.weight_BT)
        for part in parts[1:]:
            surrogate_BT = _both(jnp.add, surrogate_BT, part.surrogate_BT)
        metrics = _join_metrics([part.metrics for part in parts])
        return Coefficient(weight_BT, bias_BT, metrics, surrogate_BT)

    return _combine(objectives, coefficient)


def select(predicate: Predicate, a: Objective, b: Objective) -> Objective:
    """Choose per token: rule a where the predicate of the tokens is True, rule b elsewhere.

    Each rule sees the whole sequences (a sequence-level ratio is not cut in two), but its metrics
    speak of its own tokens; a metric that both emit is merged. State and statistics are pairs.
    """

    def coefficient(tokens, state, stats):
        is_a_BT = predicate(tokens)

        def own_metrics(i: int, rule: Objective, is_own_BT: Array) -> Metrics:
            own = dataclasses.replace(tokens, is_response_BT=tokens.is_response_BT & is_own_BT)
            return rule.coefficient(own, state[i], stats[i]).metrics

        of_a = _checked(a, tokens, state[0], stats[0])
        of_b = _checked(b, tokens, state[1], stats[1])
        metrics_a, metrics_b = own_metrics(0, a, is_a_BT), own_metrics(1, b, ~is_a_BT)
        common = {name: metric for name, metric in metrics_a.items() if name in metrics_b}

        def pick(a_BT: Array, b_BT: Array) -> Array:
            return jnp.where(is_a_BT, a_BT, b_BT)

        return Coefficient(
            pick(of_a.weight_BT, of_b.weight_BT),
            pick(of_a.bias_BT, of_b.bias_BT),
            {**metrics_a, **metrics_b, **merge_metrics(common, metrics_b)},
            _both(pick, of_a.surrogate_BT, of_b.surrogate_BT),
        )

    return _combine((a, b), coefficient)


def per_microbatch(rule: Objective) -> Objective:
    """The rule with what `prepare` says of the tokens at hand, not of the whole mini-batch.

    For parity with published code, which takes the statistics of a coupled rule from each
    micro-batch. Saves the forward pass, and makes the update depend on how the rows are split. To
    be put around the whole of a rule, `chain` and `select` included.

    Raises:
        ValueError: the rule has a state: it would be updated by none of these statistics.
    """
    if jax.tree.leaves(jax.eval_shape(rule.init)):
        raise ValueError(
            "per_microbatch: the rule has a state, which is updated by statistics of the whole "
            "mini-batch; expected a rule without one, leave per_microbatch out"
        )
    prepare = rule.prepare
    if prepare is None:
        return rule
    return Objective(
        lambda tokens, state, stats: rule.coefficient(tokens, state, prepare(tokens, state)),
        init=rule.init,
    )


def coefficient_of(
    objective: Objective, tokens: Tokens, state: Any = (), stats: Any = None
) -> Coefficient:
    """What an objective says of tokens as `response_only` shows them; see `policy_loss`.

    state: ``()`` means a fresh one. stats: None where the tokens are a whole mini-batch.
    """
    if isinstance(state, tuple) and not state:
        state = objective.init()
    if objective.prepare and stats is None:
        stats = objective.prepare(tokens, state)
    return _checked(objective, tokens, state, stats)


def _both(
    function: Callable[[Array, Array], Array], x: Array | None, y: Array | None
) -> Array | None:
    return None if x is None or y is None else function(x, y)


# --- the loss ---------------------------------------------------------------------------------


def policy_loss(
    objective: Objective,
    tokens: Tokens,
    *,
    aggregate: Aggregate,
    totals: Totals | None = None,
    state: Any = (),
    stats: Any = None,
) -> tuple[Array, dict[str, Metric]]:
    """The policy loss and its metrics.

        L = - sum_t a_t sg(w_t A_t + b_t) log pi(y_t)

    Only the gradient of L means something; the value of the published loss is the metric
    ``surrogate``. `report` lists the metrics that every rule gets.

    tokens: fields ``[B, T]``; masked tokens may hold anything and change nothing.
    totals: counts of the whole mini-batch (`count_totals`); parts of it then return summands
        that add up to its loss. None: these tokens are the whole mini-batch.
    state: the objective's state; ``()`` means a fresh one.
    stats: what ``objective.prepare`` says of the whole mini-batch. None: it is asked about these
        tokens, which is right only if they are the whole mini-batch.

    Returns:
        ``(loss, aux)``: a scalar, at least float32, and ``{name: Mean | Max | Histogram}``.

    Raises:
        ValueError: a rule needs a field that is None, what it returns has another shape, or two
            rules emit a metric of one name.
    """
    tokens = response_only(tokens)
    constants = jax.tree.map(jax.lax.stop_gradient, tokens)
    totals = count_totals(constants) if totals is None else totals

    rule = coefficient_of(objective, constants, state, stats)
    a_BT = aggregate(constants, totals)
    c_BT = rule.weight_BT * constants.advantage_BT + rule.bias_BT
    c_BT = jnp.where(constants.is_response_BT, c_BT, 0)
    loss = -jnp.sum(jax.lax.stop_gradient(a_BT * c_BT) * tokens.logp_BT)

    common = weight_metrics(rule.weight_BT, constants, log_ratio(constants))
    if rule.surrogate_BT is not None:
        common["surrogate"] = surrogate_metric(rule.surrogate_BT, a_BT, constants, totals.tokens)
    return loss, _join_metrics([common, rule.metrics])
