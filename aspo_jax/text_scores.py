"""What a policy says of whole texts, by the trainer's own forward pass.

Of every token but the first: log-probability and entropy, over the whole vocabulary at temperature
1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from aspo_jax.head import Head
from aspo_jax.learner import make_old_policy, place
from aspo_jax.model import Model
from aspo_jax.model.sharding import row_shards
from aspo_jax.rows import BatchShape, answered, fill
from aspo_jax.structs import OldPolicy

_ROW = 128  # tokens of a row are a multiple


def make_rescore(model: Model, head: Head, mesh: Mesh) -> Callable[..., OldPolicy]:
    """`aspo_jax.learner.make_old_policy` with a head that forbids no id and divides by nothing."""
    every = np.ones(model.config.vocab_size, bool)
    return make_old_policy(model, head._replace(temperature=1.0, is_allowed_V=every), mesh)


def score_texts(
    rescore: Callable[..., OldPolicy], params: Any, mesh: Mesh, texts: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probability and entropy, in nats, of each text of at least two tokens; T = L - 1 of L.

    rescore: see `make_rescore`.
    """
    shards = row_shards(mesh)
    shape = BatchShape(
        minibatches=1,
        microbatches=1,
        rows=math.ceil(len(texts) / shards) * shards,
        row_tokens=math.ceil(max(map(len, texts)) / _ROW) * _ROW,
        sequences=1,
    )
    rows = fill([answered(t[:1].tolist(), t[1:], 0.0, 1.0, 0) for t in texts], shape)
    scores = rescore(params, None, place(mesh, rows))
    logp_BT, entropy_BT = np.asarray(scores.old_logp_BT)[0], np.asarray(scores.old_entropy_BT)[0]
    return [
        (logp_BT[row, : len(text) - 1], entropy_BT[row, : len(text) - 1])
        for row, text in enumerate(texts)
    ]
