"""The nouns that travel between rooms, and the one alignment of all per-token arrays.

Dimension key; a tensor's name ends in its dimensions (Shazeer's convention):

    B rows of tokens      T predicted positions    N sequences (samples)   P prompts
    G samples per prompt  S slots of a cache page  V vocabulary            D model width
    H query heads         K key/value heads        C head width            F feed-forward width
    Y layers              M micro-batches          A prompts at once       J pages of a row
    X pages of a cache    E shards of the devices  L tokens of a sequence

Alignment: index ``t`` means *the token that was predicted*. A sequence of L tokens occupies L-1
slots: the model reads ``input = x[:-1]``, and ``logp``, ``advantage``, ``is_response``, ... at
slot t all speak of ``target = x[1:][t]``. Only `rollout` shifts, where it fills the rows.

A row may hold one sequence (padded) or several (packed). ``sequence_id_BT`` is row-local: 1, 2, ...
for the sequences of a row in order, 0 for padding. A boolean is named for what is True in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def struct(cls):
    """Make a class a frozen dataclass and a JAX pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


# --- metrics that add up over micro-batches and devices ---------------------------------------


class Mean(NamedTuple):
    """A mean kept as its sum and its count, so that it is exact under any split."""

    total: Array
    count: Array


class Max(NamedTuple):
    """A maximum."""

    value: Array


class Histogram(NamedTuple):
    """Counts over fixed bins; the bin edges belong to the metric's name, not to the data."""

    counts: Array


Metric = Mean | Max | Histogram
Metrics = Mapping[str, Metric]


def merge_metrics(a: Metrics, b: Metrics) -> dict[str, Metric]:
    """Combine the metrics of two disjoint parts of a batch (same names on both sides)."""

    def merge(x: Metric, y: Metric) -> Metric:
        if isinstance(x, Max) and isinstance(y, Max):
            return Max(jnp.maximum(x.value, y.value))
        return jax.tree.map(jnp.add, x, y)

    return {name: merge(a[name], b[name]) for name in a}


def empty_metrics(like: Metrics) -> dict[str, Metric]:
    """The neutral element of `merge_metrics` for metrics shaped as ``like`` (arrays or shapes)."""

    def empty(metric: Metric) -> Metric:
        fill = -jnp.inf if isinstance(metric, Max) else 0
        return jax.tree.map(lambda x: jnp.full(x.shape, fill, x.dtype), metric)

    return jax.tree.map(empty, dict(like), is_leaf=lambda x: isinstance(x, Metric))


# --- what flows, in the order of a step (design: prompt -> rollout -> rows -> update) ------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question.

    draw: index in the data stream; with the run seed it names every random draw made for this
        prompt, so a completion is the same wherever and whenever it is sampled.
    text, tokens: what the model reads, chat template already applied, and its ids.
    answer: what the grader needs (a gold answer, the numbers of a puzzle, ...); opaque to others.
    kind: which grader judges it.
    columns: what else its row holds, for graders that ask for it.
    """

    id: str
    draw: int
    text: str
    tokens: tuple[int, ...]
    answer: Any
    kind: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


INTEGERS = {"dtype": "int32"}


@struct
class Tokens:
    """Everything a loss rule may read about the predicted tokens. Absent fields are None.

    A rule that needs an absent field raises a ValueError that names the rule and the field. A
    field whose metadata name no dtype is floating.

    logp_BT: log pi_theta of the predicted token; the only field that carries a gradient.
    old_logp_BT: the same under the policy that the update started from.
    advantage_BT: the sequence's advantage on each of its tokens (any value on padding).
    is_response_BT: True where the policy chose the token; nothing else may enter a loss.
    sequence_id_BT: row-local sequence number, 0 = padding. None: one sequence per row.
    position_BT: 0-based number of the predicted token among its sequence's response tokens.
    group_id_BT: prompt number of the sequence within the mini-batch.
    entropy_BT: entropy of the current policy at the position, in nats.
    old_entropy_BT: the same under the old policy.
    old_square_BT: sum over the vocabulary of the old policy's squared probabilities.
    sampler_logp_BT: log-probability reported by the sampler that drew the token.
    ref_logp_BT: log-probability under the frozen reference policy.
    teacher_logp_BT: log-probability under a teacher, another policy with the same tokens.
    """

    logp_BT: Array
    old_logp_BT: Array
    advantage_BT: Array
    is_response_BT: Array = dataclasses.field(metadata={"dtype": "bool"})
    sequence_id_BT: Array | None = dataclasses.field(default=None, metadata=INTEGERS)
    position_BT: Array | None = dataclasses.field(default=None, metadata=INTEGERS)
    group_id_BT: Array | None = dataclasses.field(default=None, metadata=INTEGERS)
    entropy_BT: Array | None = None
    old_entropy_BT: Array | None = None
    old_square_BT: Array | None = None
    sampler_logp_BT: Array | None = None
    ref_logp_BT: Array | None = None
    teacher_logp_BT: Array | None = None


@struct
class Rows:
    """Token rows of fixed shape, ready for the model; leading axes may be added (micro-batches).

    Made on the host as NumPy arrays, placed on the devices as they are.
    """

    input_BT: Array
    target_BT: Array
    position_BT: Array  # RoPE position of the input token within its sequence
    sequence_id_BT: Array
    response_position_BT: Array  # the target's number among the response tokens of its sequence
    is_response_BT: Array
    advantage_BT: Array
    sampler_logp_BT: Array
    group_id_BT: Array


@struct
class OldPolicy:
    """What the update compares itself with, known once per rollout of the very same rows.

    Entropies and squared probabilities are those that a forward pass gave; log-probabilities may be
    the sampler's own.
    """

    old_logp_BT: Array
    old_entropy_BT: Array | None = None
    ref_logp_BT: Array | None = None
    teacher_logp_BT: Array | None = None
    old_square_BT: Array | None = None


@struct
class Minibatch:
    """One update's data: M micro-batches of B rows, of which the first ``count`` are real.

    ``count`` is traced: dropped groups cost no compute, yet every update has one compiled shape.
    """

    rows: Rows  # leaves [M, B, T]
    count: Array | np.integer  # int32 []
    old: OldPolicy | None = None  # leaves [M, B, T]


@struct
class TrainState:
    """All that an update changes."""

    params: Any
    opt_state: Any
    objective_state: Any
    step: Array  # updates applied, int32 []
