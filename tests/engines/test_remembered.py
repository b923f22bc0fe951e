"""What was drawn is not drawn again: the journal in front of a sampler, and what a kill leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy import on, random_params, toy_mesh, toy_model

from aspo_jax.engines.remembered import Remembered, fingerprint
from aspo_jax.sampler import EVALUATE, LENGTH, NONFINITE, STOP, TRAIN, Choice, Completion, Request


class Forgetful:
    """Draws otherwise each time it is asked; counts what it is asked for."""

    def __init__(self, full: bool = False):
        self.rng, self.full = np.random.default_rng(), full
        self.asked: list[Request] = []
        self.calls: list[str] = []

    def start(self, params: Any) -> None:
        self.calls.append("start")

    def release(self) -> None:
        self.calls.append("release")

    def drawing(self, temperature: float, choice: Choice) -> Forgetful:
        return self

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for number, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            length = self.rng.integers(1, 9)
            logp_T = -self.rng.exponential(size=length).astype(np.float32)
            tokens_T = self.rng.integers(0, 99, length).astype(np.int32)
            ending = (STOP, LENGTH, NONFINITE)[number % 3]
            yield Completion(number, tokens_T, logp_T, ending, 2 * logp_T if self.full else None)


def weights(x: float) -> dict[str, np.ndarray]:
    return {"w": np.full((3, 4), x, np.float32)}


def asked(count: int = 4, domain: int = TRAIN) -> list[Request]:
    return [Request((5, 6), (domain, 10 + i // 2, 0, i % 2)) for i in range(count)]


def plain(completions: Iterable[Completion]) -> list[tuple]:
    return sorted(
        (
            c.request,
            c.tokens_T.tolist(),
            c.logp_T.tobytes(),
            c.ending,
            None if c.full_logp_T is None else c.full_logp_T.tobytes(),
        )
        for c in completions
    )


OPEN: list[Remembered] = []


def remembered(folder: Path, inner: Any = None, keep: int = 3) -> Remembered:
    OPEN.append(Remembered(inner or Forgetful(), folder / "drawn", keep, temperature=1.0))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.mark.parametrize("full", [False, True])
def test_another_process_gets_what_was_drawn(tmp_path, full):
    first = remembered(tmp_path, Forgetful(full))
    first.start(weights(1.0))
    expected = plain(first.sample(asked()))
    first.close()
    inner = Forgetful()
    second = remembered(tmp_path, inner)
    second.start(weights(1.0))
    assert plain(second.sample(asked())) == expected
    assert not inner.asked and inner.calls == [], "the engine is not even given the weights"
    second.release()


def test_only_what_is_missing_is_asked_for(tmp_path):
    sampler = remembered(tmp_path)
    sampler.start(weights(1.0))
    some = plain(sampler.sample(asked(2)))
    inner = sampler.sampler = Forgetful()
    found = plain(sampler.sample(asked(4)))
    assert [r.identity for r in inner.asked] == [(TRAIN, 11, 0, 1), (TRAIN, 11, 0, 0)]
    assert found[:2] == some and [c[0] for c in found] == [0, 1, 2, 3]


def test_what_is_dropped_is_kept_as_far_as_it_came(tmp_path):
    sampler = remembered(tmp_path)
    sampler.start(weights(1.0))
    drawn: Any = sampler.sample(asked(4))
    first = next(drawn)
    drawn.close()
    inner = sampler.sampler = Forgetful()
    found = {c.request: c for c in sampler.sample(asked(4))}
    assert len(inner.asked) == 3 and found[3].tokens_T.tolist() == first.tokens_T.tolist()


def test_other_draws_are_other_draws(tmp_path):
    """Of other weights, prompts, lengths, names, temperatures or truncations."""
    inner = Forgetful()
    sampler = remembered(tmp_path, inner)
    one = Request((5, 6), (TRAIN, 1, 0, 0))
    sampler.start(weights(1.0))
    others = [
        one,
        one._replace(tokens=(5, 7)),
        one._replace(max_tokens=3),
        one._replace(identity=(EVALUATE, 1, 0, 0)),
    ]
    for request in others:
        list(sampler.sample([request]))
    list(sampler.sample([one._replace(tokens=np.array([5, 6]))]))  # the same
    assert len(inner.asked) == 4
    for temperature, choice in ((0.5, Choice()), (1.0, Choice(top_k=2))):
        other = sampler.drawing(temperature, choice)
        other.start(weights(1.0))
        list(other.sample([one]))
        list(other.sample([one]))
    assert len(inner.asked) == 6
    sampler.start(weights(2.0))
    list(sampler.sample([one]))
    assert len(inner.asked) == 7


def test_the_last_policies_are_kept(tmp_path):
    sampler = remembered(tmp_path, keep=2)
    for x in (1.0, 2.0, 3.0):
        sampler.start(weights(x))
        list(sampler.sample(asked()))
    files = {path.stem for path in (tmp_path / "drawn").iterdir()}
    assert files == {fingerprint(weights(2.0)), fingerprint(weights(3.0))}


@pytest.mark.parametrize("damage", ["torn", "changed", "not a line"])
def test_what_is_not_whole_is_drawn_again(tmp_path, damage):
    sampler = remembered(tmp_path)
    sampler.start(weights(1.0))
    expected = plain(sampler.sample(asked()))
    sampler.close()
    (path,) = (tmp_path / "drawn").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    last = {"torn": lines[3][:-7], "changed": lines[3].replace(b"A", b"B"), "not a line": b"\0\n"}
    path.write_bytes(b"".join(lines[:3]) + last[damage])
    inner = Forgetful()
    sampler = remembered(tmp_path, inner)
    sampler.start(weights(1.0))
    found = plain(sampler.sample(asked()))
    assert len(inner.asked) == 1 and found[1:] == expected[1:]  # 0 was drawn last
    sampler.close()
    sampler = remembered(tmp_path, Forgetful())
    sampler.start(weights(1.0))
    assert plain(sampler.sample(asked())) == found, "the new line stands behind whole ones"


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_remembered import asked, remembered, weights
sampler = remembered(Path({folder!r}))
sampler.start(weights(1.0))
for number, completion in enumerate(sampler.sample(asked(6))):
    print(completion.request, completion.tokens_T.tolist(), flush=True)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_between_two_groups(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = KILLED.format(paths=paths, folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    drawn = dict(line.split(" ", 1) for line in killed.stdout.splitlines())
    inner = Forgetful()
    sampler = remembered(tmp_path, inner)
    sampler.start(weights(1.0))
    found = {str(c.request): str(c.tokens_T.tolist()) for c in sampler.sample(asked(6))}
    assert drawn.items() <= found.items() and len(drawn) == 4
    assert [request.identity[1] for request in inner.asked] == [10, 10], "of one group, the last"


# --- which weights --------------------------------------------------------------------------------


def test_a_fingerprint_is_of_all_weights_and_their_places():
    model = toy_model()
    params = random_params(model)
    known = fingerprint(params)
    assert known == fingerprint(jax.tree.map(np.copy, params)) and len(known) == 16
    leaves, tree = jax.tree.flatten(params)
    found = {known}
    for number, leaf in enumerate(leaves):
        for place in (0, leaf.size - 1):
            changed = [np.copy(x) for x in leaves]
            flat = changed[number].reshape(-1)
            flat[place] = np.nextafter(flat[place], np.float32(9))
            found.add(fingerprint(jax.tree.unflatten(tree, changed)))
    swapped = [np.copy(x) for x in leaves]
    swapped[0].reshape(-1)[:2] = leaves[0].reshape(-1)[1::-1]
    found.add(fingerprint(jax.tree.unflatten(tree, swapped)))
    assert len(found) == 2 * len(leaves) + 2


def test_a_fingerprint_does_not_depend_on_the_devices():
    model = toy_model()
    params = random_params(model)
    whole = fingerprint(params)
    assert fingerprint(on(toy_mesh(fsdp=2, tensor=2), model, params)) == whole
    assert fingerprint(jax.tree.map(lambda x: x.astype("bfloat16"), params)) != whole
