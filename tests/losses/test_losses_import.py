"""The equations can be used without the trainer."""

import doctest
import inspect

import aspo_jax.losses as losses


def test_the_example_of_the_package_is_true():
    failed, attempted = doctest.testmod(losses)
    assert attempted and not failed


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
