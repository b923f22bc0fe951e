"""The arrows between rooms: an import goes down, never up and never sideways."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aspo_jax

PACKAGE = Path(aspo_jax.__file__).parent
FLOORS = [  # top to bottom; strangers on one floor do not import each other
    ["evaluate", "replay", "serve"],
    [
        *("train", "plan", "export", "check", "library", "overlap", "scoring", "conform"),
        *("replaying", "serving"),
    ],
    ["plot", "steps", "warmstart", "planning", "loading"],
    ["rounding", "atlas"],
    ["build", "rules"],
    ["parts", "weights"],
    ["engines"],
    ["policy"],
    ["evaluation", "refill", "origin", "recording", "text_scores"],
    ["suites"],
    ["inputs", "rollout", "learner", "run"],
    ["runtime", "sampler", "agreement"],
    ["head", "optimizers", "outcomes", "rows", "hub", "history", "conformance"],
    ["losses", "model", "rewards", "data"],
    ["structs", "config", "files"],
    ["paths"],
    ["errors"],
    ["streams", "allocator", "compiler", "imports", "shell", "statistics"],
]
FLOOR = {room: len(FLOORS) - i for i, rooms in enumerate(FLOORS) for room in rooms}
NARROW = {
    "losses": {"structs"},
    "rewards": {"errors", "imports"},
}  # usable without the rest of the house
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    """Rooms named in any import of the file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("aspo_jax."))


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    for other in set(imported_rooms(path)) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"
        assert other in NARROW.get(room, FLOOR), f"{room} imports {other}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("aspo_jax", "jax numpy flax transformers grain orbax optax pydantic tensorboardX"),
        ("aspo_jax.losses", "flax transformers grain orbax optax pydantic tensorboardX"),
        ("aspo_jax.config", "jax numpy flax transformers grain orbax optax"),
        ("aspo_jax.config.suites", "jax numpy flax transformers grain orbax optax"),
        ("aspo_jax.statistics", "jax flax transformers grain orbax optax pydantic pyarrow"),
        ("aspo_jax.rewards.pool.worker", "jax numpy pydantic"),
        ("aspo_jax.train", "matplotlib"),
        ("aspo_jax.engines.fleet", "jax flax transformers grain orbax optax pydantic"),
        ("aspo_jax.conform", "jax torch flax transformers grain orbax optax pydantic"),
    ],
)
def test_light_imports(module, absent):
    code = f"import sys, {module}; print([m for m in {absent.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
