"""Run the trainer; the last line says how many programs were compiled before each update ended."""

from __future__ import annotations

import json
import sys

import jax

from aspo_jax import train

EVENT = "/jax/core/compile/backend_compile_duration"  # also when the cache on disk had it
compiled: list[str] = []
after_updates: list[int] = []
update = train.update


def counted_update(*args):
    result = update(*args)
    after_updates.append(len(compiled))
    return result


def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == EVENT:
        compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(count)
train.update = counted_update
status = train.main(sys.argv[1:])
print(json.dumps({"after_updates": after_updates}))
sys.exit(status)
