import jax
import pytest


@pytest.fixture(autouse=True)
def strict_ranks():
    """Broadcasting between different ranks is an error: every shape in a rule is meant."""
    with jax.numpy_rank_promotion("raise"):
        yield
