"""Servers in a process of their own, one after another, for tests that send it signals.

Reads lines "DRAIN DELAY IS_PAUSED" (seconds, seconds, 0 or 1) from stdin. For each it serves,
prints its port, then "ended" and how many sequences run still.
"""

import sys

from wire_toy import ScriptedEngine, app_of, byte_tokenizer, says

from aspo_jax.serving.server import run_server


def serve(drain: float, delay: float, is_paused: float) -> None:
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(says(tokenizer, "abcdefghijklmnop", 2), delay=delay)
    if is_paused:
        engine.go.clear()
    run_server(
        app_of(engine, tokenizer),
        port=0,
        drain=drain,
        on_bound=lambda host, port: print(port, flush=True),
    )
    print("ended", engine.running, flush=True)


for line in sys.stdin:
    serve(*map(float, line.split()))
