"""Losses as others write them, right and wrong, in JAX and in torch: for test_conform.py.

They are published surrogates and common slips, with no line of this package. ``x`` is one of the
two array libraries; all return values per token, and `averaged` makes a scalar of them.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

JAX = types.SimpleNamespace(
    exp=jnp.exp,
    clip=jnp.clip,
    where=jnp.where,
    minimum=jnp.minimum,
    maximum=jnp.maximum,
    sigmoid=jax.nn.sigmoid,
    sg=jax.lax.stop_gradient,
)


def torch_library() -> Any:
    import torch

    return types.SimpleNamespace(
        exp=torch.exp,
        clip=torch.clamp,
        where=torch.where,
        minimum=lambda a, b: torch.minimum(a, torch.as_tensor(b, dtype=a.dtype)),
        maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b, dtype=a.dtype)),
        sigmoid=torch.sigmoid,
        sg=lambda value: value.detach(),
    )


def ratio(x: Any, logp: Any, old: Any) -> Any:
    return x.exp(x.clip(logp - old, -20, 20))


def aspo(x: Any, e: Any = 0.2, c: float = 3.0) -> Callable[..., Any]:
    """The order of operations of the released code."""

    def loss(logp, old, adv, mask):
        r = ratio(x, logp, old)
        n, p = x.maximum(r, 1 - e), x.minimum(r, 1 + e)
        negative = x.where(n > c, -adv * c * logp, -adv * n)
        positive = x.where(1 / p > c, -adv * c * logp, -adv * (p / x.sg(p)) / x.sg(p))
        return x.where(adv < 0, negative, positive)

    return loss


def split_aspo(x: Any, low: float = 0.2, high: float = 0.4) -> Callable[..., Any]:
    """Another width for the token of highest entropy of a response, which has 5 tokens here."""

    def loss(logp, old, adv, mask, entropy):
        wide = (entropy >= 0.9) & (entropy < 1)
        e = x.where(wide, logp * 0 + high, logp * 0 + low)
        return aspo(x, x.sg(e))(logp, old, adv, mask)

    return loss


def weighted(x: Any, positive: Callable[[Any], Any], negative: Callable[[Any], Any]) -> Any:
    """-A sg(w) log pi, with the weights of the two signs as functions of the ratio."""

    def loss(logp, old, adv, mask):
        r = ratio(x, logp, old)
        return -adv * x.sg(x.where(adv > 0, positive(r), negative(r))) * logp

    return loss


def slip(
    x: Any, high: str = "mask", low: str = "mask", cap: str = "soft", negative_cap: str = "soft"
) -> Callable[..., Any]:
    """ASPO with a gate or a cap left out, or of another kind."""

    def bounded(weight, kind):
        soft = x.minimum(weight, 3.0)
        return {"soft": soft, "none": weight, "hard": x.where(weight > 3, 0 * weight, weight)}[kind]

    def gated(r, is_out, kind, bound):
        """The ratio, and the factor of its weight."""
        return {
            "mask": (r, x.where(is_out, 0 * r, 0 * r + 1)),
            "open": (r, 0 * r + 1),
            "cap": (x.where(is_out, 0 * r + bound, r), 0 * r + 1),
        }[kind]

    def positive(r):
        seen, gate = gated(r, r > 1.2, high, 1.2)
        return gate * bounded(1 / seen, cap)

    def negative(r):
        seen, gate = gated(r, r < 0.8, low, 0.8)
        return gate * bounded(seen, negative_cap)

    return weighted(x, positive, negative)


def naive(x: Any) -> Callable[..., Any]:
    """1/r as it stands in the paper's picture, differentiated."""

    def loss(logp, old, adv, mask):
        r = ratio(x, logp, old)
        return -adv * x.where(adv > 0, 1 / x.minimum(r, 1.2), x.maximum(r, 0.8))

    return loss


def ppo(x: Any, low: float = 0.2, high: float = 0.2, dual: float = 0.0) -> Callable[..., Any]:
    def loss(logp, old, adv, mask):
        r = ratio(x, logp, old)
        values = x.maximum(-adv * r, -adv * x.clip(r, 1 - low, 1 + high))
        return x.where(adv < 0, x.minimum(values, -adv * dual), values) if dual else values

    return loss


def unclamped(x: Any) -> Callable[..., Any]:
    """PPO's clip whose exponential overflows."""

    def loss(logp, old, adv, mask):
        r = x.exp(logp - old)
        return x.maximum(-adv * r, -adv * x.clip(r, 0.8, 1.2))

    return loss


def without_is(x: Any) -> Callable[..., Any]:
    def loss(logp, old, adv, mask):
        r = ratio(x, logp, old)
        keep = x.where(adv > 0, r <= 1.2, r >= 0.8)
        return -adv * x.where(keep, logp, 0 * logp)

    return loss


def reinforce(x: Any) -> Callable[..., Any]:
    return lambda logp, old, adv, mask: -adv * logp


def cispo(x: Any, low: float = 0.0, high: float = 5.0) -> Callable[..., Any]:
    return weighted(x, lambda r: x.clip(r, low, high), lambda r: x.clip(r, low, high))


def sapo(x: Any) -> Callable[..., Any]:
    def loss(logp, old, adv, mask):
        return -adv * 4 * x.sigmoid(ratio(x, logp, old) - 1)

    return loss


def gspo(x: Any, low: float = 3e-4, high: float = 4e-4) -> Callable[..., Any]:
    """The token form, in which a sequence's ratio stands on each of its tokens."""

    def loss(logp, old, adv, mask):
        l = x.clip(logp - old, -20, 20) * mask
        mean = l.sum(-1)[:, None] / x.maximum(mask.sum(-1)[:, None], 1.0)
        s = x.exp(x.sg(mean) + logp - x.sg(logp))
        return x.maximum(-adv * s, -adv * x.clip(s, 1 - low, 1 + high))

    return loss


def gmpo(x: Any) -> Callable[..., Any]:
    """The geometric mean of ratios that are clipped one by one, times the tokens of a row."""

    def loss(logp, old, adv, mask):
        l = x.clip(logp - old, -20, 20)
        l = x.where(adv > 0, x.minimum(l, 0.4), x.maximum(l, -0.4)) * mask
        s = x.exp(l.sum(-1)[:, None] / x.maximum(mask.sum(-1)[:, None], 1.0))
        return -adv * s * (0 * logp + 1)

    return loss


def response_mean(x: Any) -> Callable[..., Any]:
    """The positive tokens share their response's mean ratio, under a stop-gradient."""

    def loss(logp, old, adv, mask):
        r = ratio(x, logp, old)
        shared = (r * mask).sum(-1)[:, None] / x.maximum(mask.sum(-1)[:, None], 1.0)
        keep = x.where(adv > 0, r <= 1.2, r >= 0.8)
        w = x.where(adv > 0, shared + 0 * r, r)
        return -adv * x.sg(x.where(keep, w, 0 * r)) * logp

    return loss


def forgets_rare(x: Any) -> Callable[..., Any]:
    """A small number in a denominator, which rare tokens notice."""

    def loss(logp, old, adv, mask):
        p, q = x.exp(logp), x.exp(old)
        return -adv * p * q / (q * q + 1e-10)

    return loss


def squared(x: Any) -> Callable[..., Any]:
    return lambda logp, old, adv, mask: -adv * abs(adv) * ratio(x, logp, old)


def with_kl(
    base: Callable[..., Any], kind: str, beta: float, x: Any, ref: float | None = None
) -> Callable[..., Any]:
    """A KL term, to the old policy or to a reference under which all tokens have one log-prob."""

    def loss(logp, old, adv, mask):
        d = (old if ref is None else ref) - logp
        k3 = x.exp(d) - d - 1
        kl = {
            "odd": x.sigmoid(d),
            "k1": -d,
            "k2": d * d / 2,
            "k3": k3,
            "k3_is": k3 * x.exp(logp - old),
        }[kind]
        return base(logp, old, adv, mask) + beta * kl

    return loss


def averaged(base: Callable[..., Any], how: str, factor: float = 1.0) -> Callable[..., Any]:
    """The scalar loss, by the ways in which libraries average."""

    def loss(logp, old, adv, mask):
        values = base(logp, old, adv, mask)
        kept = values * mask
        return (
            factor
            * {
                "token_mean": lambda: kept.sum() / mask.sum(),
                "sequence_mean": lambda: (kept.sum(-1) / mask.sum(-1)).mean(),
                "sequence_sum": lambda: kept.sum(-1).mean(),
                "sum": lambda: kept.sum(),
                "fixed_length": lambda: kept.sum(-1).mean() / 7,
                "all slots": lambda: kept.mean(),
                "without mask": lambda: values.mean(),
                "sum of means": lambda: (kept.sum(-1) / mask.sum(-1)).sum(),
                "by root": lambda: (kept.sum(-1) / mask.sum(-1) ** 0.5).mean(),
            }[how]()
        )

    return loss
