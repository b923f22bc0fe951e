"""Dynamic sampling: draw prompts until enough groups carry a signal (DAPO, 2503.14476, §3.2).

A round is a step's worth of prompts. While fewer groups carry a signal than a step may train on,
another round is drawn, up to a bound; the step then has what there is. The step takes the first
such groups in the order of the stream, never in the order in which answers arrive, so that it is
the same at any speed and for any number of processes. Prompts of the last round behind the one
that filled the step are left out: whatever of them was sampled is dropped, and as far as verdicts
tell in time, they are not sampled at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from aspo_jax.history import History, key_of
from aspo_jax.losses import Advantage
from aspo_jax.outcomes import ROLLOUT, part_figures
from aspo_jax.rollout import (
    ALONE,
    Collector,
    Enough,
    Judged,
    Peers,
    Rollout,
    Selection,
    Signal,
    advantages,
    by_reward,
    gather,
    groups_of,
    shaped,
)
from aspo_jax.structs import Prompt

# (prompts, enough) -> the judged samples of each prompt: `aspo_jax.rollout.judge`
Ask = Callable[[Sequence[Prompt], Enough], Sequence[list[Judged]]]


def refill(
    collector: Collector,
    ask: Ask,
    draw_prompts: Callable[[], Sequence[Prompt]],
    rounds: int,
    advantage: Advantage,
    peers: Peers = ALONE,
    history: History | None = None,
    signal: Signal = by_reward,
) -> tuple[Rollout, Selection]:
    """The rollout of a step from at most ``rounds`` rounds, and which of its groups train.

    It holds this process's share of the prompts up to the one that filled the step.

    ask: samples and grades by the collector.
    draw_prompts: this process's share of the next round, of as many prompts as a step trains on.
    advantage, history, signal: tell whether a group has a signal, see `Watch`.
    """
    groups: list[list[Judged]] = []
    has_signal_P = np.zeros(0, bool)
    wanted = 0
    for _ in range(rounds):
        prompts = draw_prompts()
        wanted = len(prompts) * peers.count
        watch = Watch(
            collector, advantage, wanted - int(has_signal_P.sum()), history=history, signal=signal
        )
        groups += watch.over(ask(prompts, watch.is_enough))
        own_P = np.zeros(len(prompts), bool)
        own_P[: len(watch.has_signal)] = watch.has_signal
        has_signal_P = np.concatenate([has_signal_P, peers.whole(own_P, wanted)])
        if has_signal_P.sum() >= wanted:
            break
    trained = np.flatnonzero(has_signal_P)[:wanted]
    asked = len(has_signal_P)
    drawn = int(trained[-1]) + 1 if len(trained) == wanted else asked
    own = groups[: len(range(peers.index, drawn, peers.count))]
    return shaped(collector, own, len(own[0])), Selection(asked, drawn, wanted, trained)


class Watch:
    """Which groups of a round have a signal, from the first on, until there are enough.

    Its verdicts are shaped, and its advantages computed, as if the group were alone.

    needed: how many are enough. has_signal: of the groups that were looked at.
    """

    def __init__(
        self,
        collector: Collector,
        advantage: Advantage,
        needed: int,
        history: History | None = None,
        signal: Signal = by_reward,
    ):
        self._collector, self._advantage, self._needed = collector, advantage, needed
        self._history, self._signal = history, signal
        self.has_signal: list[bool] = []

    def is_enough(self, group: Callable[[int], list[Judged] | None]) -> bool:
        """Look at the next groups as far as they are judged; whether there are enough now.

        group: number -> its samples; None: not judged yet, or there is none.
        """
        while sum(self.has_signal) < self._needed:
            if (judged := group(len(self.has_signal))) is None:
                return False
            self.has_signal.append(self._judge(judged))
        return True

    def over(self, groups: Sequence[list[Judged]]) -> Sequence[list[Judged]]:
        """Those of the groups, all of which are judged, that it takes to have enough."""
        self.is_enough(lambda p: groups[p] if p < len(groups) else None)
        return groups[: len(self.has_signal)]

    def _judge(self, group: list[Judged]) -> bool:
        alone = shaped(self._collector, [group], len(group))
        parts = part_figures(alone.parts)
        keys = [key_of(group[0][0].prompt.id)]
        past = None if self._history is None else self._history.past(keys)
        counted = gather(alone, {"length": ROLLOUT["response_length"], **parts})
        groups = groups_of(alone, counted, parts, past)
        return bool(self._signal(advantages(self._advantage, groups), groups.is_valid_PG)[0])
