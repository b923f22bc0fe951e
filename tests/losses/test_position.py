"""The optimal token baseline by hand."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import coefficient, lay_out, one_per_row, sequences

from aspo_jax.losses import Tokens, otb, policy_loss, reads, token_mean


def pair() -> Tokens:
    """Two responses to a prompt, of three and two tokens, and one to another; ratio 1."""
    logp = jnp.log(jnp.array([[0.5, 0.8, 0.5], [0.2, 0.5, 1.0], [0.5, 1.0, 1.0]]))
    return Tokens(
        logp_BT=logp,
        old_logp_BT=logp,
        advantage_BT=jnp.array([[0.5] * 3, [-0.5] * 3, [1.0] * 3]),
        is_response_BT=jnp.array([[True] * 3, [True, True, False], [True, False, False]]),
        position_BT=jnp.array([[0, 1, 2]] * 3),
        group_id_BT=jnp.array([[0] * 3, [0] * 3, [1] * 3]),
        old_square_BT=jnp.array([[0.5, 0.7, 0.5], [0.4, 0.5, 1.0], [0.5, 1.0, 1.0]]),
    )


def test_the_baseline_of_each_position():
    """1 - 2 q + sum q^2 is 0.5, 0.1, 0.5 and 1.0, 0.5; summed up 0.5, 0.6, 1.1 and 1.0, 1.5."""
    first, second = 0.5 * (0.5 - 1.0) / 1.5, 0.5 * (0.6 - 1.5) / 2.1
    found = coefficient(otb(), pair())
    mask = pair().is_response_BT
    np.testing.assert_allclose(found.weight_BT[mask], 1)
    expected = [[-first, -second, 0], [-first, -second, 0], [0, 0, 0]]
    np.testing.assert_allclose(found.bias_BT[mask], np.array(expected)[mask], atol=1e-6)


def test_a_tail_without_a_baseline_is_left_out_on_request():
    found = coefficient(otb(keep_tail=False), pair())
    shared = [[True, True, False], [True, True, False], [False] * 3]
    np.testing.assert_array_equal(np.asarray(found.weight_BT) > 0, shared)
    assert (np.asarray(found.bias_BT)[~np.array(shared)] == 0).all()


def test_certain_tokens_have_no_weight_in_it():
    """Where q is 1 for all that reach a position, there is no baseline and nothing to divide by."""
    tokens = pair()
    sure = dataclasses.replace(
        tokens,
        old_logp_BT=jnp.zeros((3, 3)),
        logp_BT=jnp.zeros((3, 3)),
        old_square_BT=jnp.ones((3, 3)),
    )
    np.testing.assert_array_equal(coefficient(otb(), sure).bias_BT, np.zeros((3, 3)))


def test_what_an_advantage_takes_off_a_group_changes_nothing_where_it_is_shared():
    """The coefficient is that of the bare reward, whatever constant came off it before."""
    tokens, found = one_per_row(sequences(3, spread=0.0), garbage=False), []
    for constant in (0.0, 5.0):
        advantage_BT = tokens.advantage_BT + constant
        moved = dataclasses.replace(tokens, advantage_BT=advantage_BT)
        rule = coefficient(otb(keep_tail=False, clip_low=1.0, clip_high=1e9), moved)
        found.append(rule.weight_BT * advantage_BT + rule.bias_BT)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_two_prompts_share_a_position_and_no_baseline():
    seqs = sequences(4)
    whole = coefficient(otb(), lay_out(seqs, [[0, 3, 1], [4, 2, 5]], 48))
    alone = coefficient(otb(), lay_out(seqs[:3], [[0, 1], [2]], 48))
    n = len(seqs[0]["logp_BT"])
    np.testing.assert_allclose(whole.bias_BT[0, :n], alone.bias_BT[0, :n], rtol=1e-5, atol=1e-6)


def test_it_says_what_it_reads():
    assert reads(otb(), "old_square_BT") and reads(otb(), "group_id_BT")
    bare = dataclasses.replace(pair(), old_square_BT=None)
    with pytest.raises(ValueError, match=r"otb needs Tokens\.old_square_BT"):
        policy_loss(otb(), bare, aggregate=token_mean)
