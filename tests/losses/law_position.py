"""Laws of the baselines that differ from position to position."""

import dataclasses

import numpy as np
from law import Law
from law_ppo import ppo

from aspo_jax.losses import otb


def baseline(t):
    """By the book: for each prompt and position, over its responses that reach it."""
    mask = np.asarray(t.is_response_BT)
    A, q, squares = (
        np.asarray(x, np.float64) for x in (t.advantage_BT, t.old_logp_BT, t.old_square_BT)
    )
    energy = np.where(mask, 1 - 2 * np.exp(q) + squares, 0)
    W = np.cumsum(energy, -1)
    group, position = np.asarray(t.group_id_BT), np.asarray(t.position_BT)
    B = np.zeros(mask.shape)
    is_shared = np.zeros(mask.shape, bool)
    for g in np.unique(group[mask]):
        for p in np.unique(position[mask & (group == g)]):
            here = mask & (group == g) & (position == p)
            if here.sum() > 1:
                B[here] = (A[here] * W[here]).sum() / W[here].sum()
                is_shared |= here
    return B, is_shared


def surrogate(keep_tail):
    def published(logp, t):
        B, is_shared = baseline(t)
        own = dataclasses.replace(t, advantage_BT=t.advantage_BT - B.astype(logp.dtype))
        return ppo()(logp, own) * (True if keep_tail else is_shared)

    return published


LAWS = {
    "otb": Law(otb(), surrogate(True), bias_at_one=lambda t: -baseline(t)[0]),
    "otb_cut": Law(
        otb(keep_tail=False),
        surrogate(False),
        at_one=lambda t: baseline(t)[1].astype(np.float32),
        bias_at_one=lambda t: -baseline(t)[0],
    ),
}
