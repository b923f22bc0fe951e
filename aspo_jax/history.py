"""What each prompt's rewards were at its earlier visits, for advantages that ask for their past."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aspo_jax.losses import Past, visited

Key = bytes
KEY_BYTES = 8  # among a million prompts two share a key once in 4e7 runs


def key_of(prompt_id: str) -> Key:
    """What a prompt is known by, on all processes: fixed in size, so that they can exchange it."""
    return hashlib.sha256(prompt_id.encode()).digest()[:KEY_BYTES]


class History:
    """Visits, mean and standard deviation of the rewards of each prompt, by its key."""

    def __init__(self) -> None:
        self._past: dict[Key, tuple[int, float, float]] = {}

    def past(self, keys: Sequence[Key]) -> Past:
        """Of some prompts, float32; zeros of those that were not visited."""
        found = [self._past.get(key, (0, 0.0, 0.0)) for key in keys]
        return Past(*np.array(found, np.float32).reshape(-1, 3).T)

    def add(self, keys: Sequence[Key], reward_PG: np.ndarray, is_valid_PG: np.ndarray) -> None:
        """A visit of each; of a prompt that comes twice one after the other."""
        turns: dict[int, list[int]] = defaultdict(list)
        seen: dict[Key, int] = defaultdict(int)
        for p, key in enumerate(keys):
            turns[seen[key]].append(p)
            seen[key] += 1
        for numbers in turns.values():
            own = [keys[p] for p in numbers]
            past = visited(self.past(own), reward_PG[numbers], is_valid_PG[numbers])
            new = zip(own, *(np.asarray(x).tolist() for x in past), strict=True)
            self._past |= {key: (int(i), mean, std) for key, i, mean, std in new if i}

    def state(self) -> dict[str, list[float]]:
        """All of it, as plain JSON, which keeps every digit."""
        return {key.hex(): list(past) for key, past in self._past.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave."""
        self._past = {bytes.fromhex(key): (i, mean, std) for key, (i, mean, std) in state.items()}
