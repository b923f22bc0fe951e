"""The equations can be used without the trainer."""

import inspect
import subprocess
import sys

import aspo_jax.losses as losses

HEAVY = ("flax", "transformers", "grain", "orbax", "optax", "pydantic", "tensorboardX")


def test_importing_the_losses_loads_jax_alone():
    code = f"import sys, aspo_jax.losses; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    for name in losses.__all__:
        value = getattr(losses, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, name


def test_tables_are_sorted_and_public():
    assert list(losses.OBJECTIVES) == sorted(losses.OBJECTIVES)
    assert all(getattr(losses, name) is make for name, make in losses.OBJECTIVES.items())
    assert all(
        callable(make(length=3) if "fixed" in name else make())
        for name, make in losses.AGGREGATES.items()
    )
