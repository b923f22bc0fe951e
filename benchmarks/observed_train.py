"""`aspo_jax.train` with an observer: what `main_job.py` needs and the run does not log.

    python benchmarks/observed_train.py OUT.json [arguments of aspo_jax.train]

The run is the real one. Compilations are heard through `jax.monitoring`; the minibatches of each
update are kept by reference and counted after the run has ended, so that nothing is timed twice.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aspo_jax import train

COMPILED = "/jax/core/compile/backend_compile_duration"


def count(minibatches: list[Any]) -> dict[str, int]:
    """Work of one pass over an iteration's minibatches.

    tokens: real tokens; responses: those the policy chose; slots: tokens and padding of the rows
    that are computed; pairs: (query, visible key) pairs, L (L + 1) / 2 for a sequence of L tokens.
    """
    total = {"tokens": 0, "responses": 0, "slots": 0, "pairs": 0}
    for minibatch in minibatches:
        used = int(minibatch.count)
        id_BT = np.asarray(minibatch.rows.sequence_id_BT)[:used]
        id_BT = id_BT.reshape(-1, id_BT.shape[-1])
        length_BN = (id_BT[:, :, None] == np.arange(1, id_BT.max(initial=0) + 1)).sum(axis=1)
        total["tokens"] += int(length_BN.sum())
        total["responses"] += int(np.asarray(minibatch.rows.is_response_BT)[:used].sum())
        total["slots"] += id_BT.size
        total["pairs"] += int((length_BN * (length_BN + 1) // 2).sum())
    return total


def peak_memory_mib() -> float:
    """Largest resident memory of this process (Linux)."""
    # Not getrusage: its maximum is handed down from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def main(out: str, argv: list[str]) -> int:
    seen: list[list[Any]] = []
    compiles: list[tuple[int, float]] = []  # (updates finished before it, seconds)
    update = train.update

    def observed(run, state, minibatches):
        result = update(run, state, minibatches)
        seen.append(list(minibatches))
        return result

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            compiles.append((len(seen), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    train.update = observed
    start = time.perf_counter()
    status = train.main(argv)
    seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "memory_mib": peak_memory_mib(),
        "compiles": compiles,
        "work": [count(minibatches) for minibatches in seen],
    }
    Path(out).write_text(json.dumps(figures))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
