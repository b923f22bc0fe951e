"""What the tests of the routes share."""

from __future__ import annotations

import pytest
from wire_toy import ScriptedEngine, byte_tokenizer, client_of, says


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, see `byte_tokenizer`."""
    return byte_tokenizer()


@pytest.fixture
def hello(tokenizer):
    """An engine that always says hello world, and its client."""
    engine = ScriptedEngine(says(tokenizer, "hello world", 2))
    return engine, client_of(engine, tokenizer)
