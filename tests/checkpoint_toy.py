"""Small programs that the tests of `aspo_jax.run.checkpoint` start, kill and start again.

python tests/checkpoint_toy.py PROGRAM FOLDER [...]: each says on stdout where it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aspo_jax.run import checkpoint, stop
from aspo_jax.run import folder as run_folder


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start one of the toy programs."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_line(program: subprocess.Popen[str], beginning: str) -> str:
    assert program.stdout
    for line in program.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"never said {beginning!r}: {program.stderr and program.stderr.read()}")


def state_at(step: int) -> dict:
    """A state whose every bit follows from the step: typed key, bf16, int, nan, nested, empty."""
    key = jax.random.fold_in(jax.random.key(7), step)
    return {
        "params": {
            "w": jax.random.normal(key, (64, 128)),
            "half": jax.random.normal(key, (33,), jnp.bfloat16),
        },
        "opt": (jnp.full((3,), jnp.nan).at[0].set(step), ()),
        "step": jnp.int32(step),
        "key": key,
        "none": None,
    }


def meta_at(step: int) -> dict:
    return {"draws": step * 32, "text": "a = 'é\n'", "cursor": [step, 0.1, None], "seed": 2**53 + 1}


def bits(tree) -> list[tuple[str, str, bytes]]:
    """Paths, dtypes and bytes of all leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p), str(x.dtype), _raw(x).tobytes()) for p, x in leaves]


def _raw(x) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def say(text: str) -> None:
    print(text, flush=True)


def save_for_ever(folder: str) -> None:
    """Resume, check every bit, then save step after step until killed."""
    with checkpoint.Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore(state_at(0))
        start = restored.step if restored else 0
        if restored and (bits(restored.state), restored.meta) != (
            bits(state_at(start)),
            meta_at(start),
        ):
            raise SystemExit(f"step {start} came back with other values")
        say(f"start {start}")
        for step in range(start + 1, sys.maxsize):
            say(f"saving {step}")
            checkpoints.save(step, state_at(step), meta_at(step))


def hold_lock(folder: str) -> None:
    """Lock the run folder and stay."""
    with run_folder.lock_run(folder):
        say("locked")
        time.sleep(60)


def run_until_stopped(folder: str, phase: str) -> None:
    """One iteration in the given phase, then the orderly stop of `stop.StopRequest`."""
    with checkpoint.Checkpoints(folder, keep=2) as checkpoints, stop.StopRequest() as request:
        rollouts = updates = 0
        try:
            with request.interruptible():
                if phase == "sampling":
                    say("ready")
                    time.sleep(60)
                rollouts += 1
            if phase == "update":
                say("ready")
                time.sleep(0.5)
            if phase == "long update":
                say("ready")
                time.sleep(5)
            if phase == "compiled":
                minutes = jax.jit(partial(jax.lax.fori_loop, 0, 2**31 - 1, lambda _, x: jnp.sin(x)))
                say("ready")
                minutes(jnp.ones(1000)).block_until_ready()
            updates += 1
        except stop.Interrupted:
            say("interrupted")
        checkpoints.save(1, state_at(1), {"rollouts": rollouts, "updates": updates})
    sys.exit(stop.EXIT_SAVED if request.requested else os.EX_OK)


def restore_on_four(folder: str) -> None:
    """Restore what one device saved onto four, sharded; say whether the bits are the same."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

    def spread(x):
        spec = PartitionSpec("fsdp") if x.shape and x.shape[0] % 4 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with checkpoint.Checkpoints(folder, keep=2) as checkpoints:
        step, state, _ = checkpoints.restore(jax.tree.map(spread, state_at(0))) or (0, {}, {})
    devices = {len(x.sharding.device_set) for x in jax.tree.leaves(state)}
    shard = state["params"]["w"].addressable_shards[0].data.shape
    say(f"step {step} devices {devices} shard {shard} same {bits(state) == bits(state_at(step))}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
