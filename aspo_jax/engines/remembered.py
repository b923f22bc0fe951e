"""A journal of what was drawn, so that an iteration that is done again draws nothing again.

An external engine does not draw the same ids twice, whatever its seeds: its kernels depend on what
runs beside a request. So what it gave is written down as it comes, in a file for each policy, and
a run that was killed reads it back: the same weights, prompts and names of draws get the same
completions. Files are kept for as many policies as lie between two checkpoints.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aspo_jax.errors import writing
from aspo_jax.sampler.choice import EVERYTHING, Choice
from aspo_jax.sampler.seam import Completion, Request, Sampler

_SYNC_S = 1.0  # a crash of the machine, not of the process, may lose what is younger


class Remembered:
    """A sampler that asks another only for what is not in its journal.

    folder: of the journal, made when it is needed. keep: policies whose files stay.
    description: of what is drawn from, for a person.
    """

    def __init__(
        self,
        sampler: Sampler,
        folder: Path,
        keep: int,
        temperature: float,
        description: str = "",
    ):
        self.sampler, self._journal = sampler, Journal(folder, keep)
        self.description = description
        self._drawing = (temperature, EVERYTHING)
        self._params: Any = None

    def drawing(self, temperature: float, choice: Choice) -> Remembered:
        """One with the same journal that draws otherwise."""
        other = copy.copy(self)
        other.sampler = self.sampler.drawing(temperature, choice)
        other._drawing, other._params = (temperature, choice), None
        return other

    def start(self, params: Any) -> None:
        """Use these parameters; the other sampler is given them when it is asked for something."""
        self._params = params
        self._journal.open(fingerprint(params))

    def release(self) -> None:
        self._params = None
        self._journal.sync()
        self.sampler.release()

    def sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """What is known, then what the other sampler gives, each written down before it is used."""
        asked = list(requests)
        names = [_name(request, self._drawing) for request in asked]
        missing = []
        for number, name in enumerate(names):
            if (known := self._journal.known.get(name)) is None:
                missing.append(number)
            else:
                yield known._replace(request=number)
        if not missing:
            return
        self.sampler.start(self._params)
        for completion in self.sampler.sample([asked[number] for number in missing]):
            number = missing[completion.request]
            completion = completion._replace(request=number)
            self._journal.add(names[number], completion)
            yield completion
        self._journal.sync()

    def close(self) -> None:
        """Close the journal, and the other sampler where it can be closed."""
        self._journal.close()
        if (close := getattr(self.sampler, "close", None)) is not None:
            close()


class Journal:
    """Completions by name, in one file per policy.

    known: those of the policy that is open.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder, keep
        self._policy, self._synced_s = "", 0.0
        self._file: IO[bytes] | None = None
        self.known: dict[str, Completion] = {}

    def open(self, policy: str) -> None:
        """Read what is known of a policy, and add to it from now on."""
        if policy == self._policy:
            return
        self.close()
        path = self._folder / f"{policy}.jsonl"
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._forget(path)
            self._file = path.open("a+b")
            self.known = self._read(self._file)
        self._policy = policy

    def _forget(self, path: Path) -> None:
        """Remove the oldest files, so that with this one there are ``keep``."""
        others = [p for p in self._folder.glob("*.jsonl") if p != path]
        others.sort(key=lambda p: p.stat().st_mtime_ns)
        for old in others[: max(len(others) + 1 - self._keep, 0)]:
            old.unlink()

    @staticmethod
    def _read(file: IO[bytes]) -> dict[str, Completion]:
        """All whole lines; what a kill left of the last one is cut off."""
        known, end = {}, 0
        file.seek(0)
        for line in file:
            try:
                name, completion = _parsed(line)
            except (ValueError, KeyError, TypeError):
                break
            known[name] = completion
            end += len(line)
        file.truncate(end)
        return known

    def add(self, name: str, completion: Completion) -> None:
        """Write one down; it survives this process at once, the machine after a second."""
        if self._file is None:
            raise ValueError("no policy's journal is open")
        self.known[name] = completion
        with writing(self._file.name):
            self._file.write(_line(name, completion))
            self._file.flush()
        if time.monotonic() - self._synced_s > _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Make all of it safe against a crash of the machine."""
        if self._file is not None:
            with writing(self._file.name):
                os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
        self._file, self._policy, self.known = None, "", {}


def _name(request: Request, drawing: tuple[float, Choice]) -> str:
    """Tells a draw from all others of the same policy."""
    temperature, choice = drawing
    tokens: Sequence[int] = [int(token) for token in request.tokens]
    identity = [int(number) for number in request.identity]
    own = (request.max_tokens, request.drawing, request.written)
    text = json.dumps([identity, tokens, own, temperature, choice])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _line(name: str, c: Completion) -> bytes:
    arrays = {"tokens": c.tokens_T, "logp": c.logp_T, "full_logp": c.full_logp_T}
    body = {key: _text(x_T) for key, x_T in arrays.items() if x_T is not None}
    body = {"name": name, "ending": c.ending, **body}
    seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:8]
    return json.dumps(body | {"seal": seal}).encode() + b"\n"


def _parsed(line: bytes) -> tuple[str, Completion]:
    body = json.loads(line)
    seal = body.pop("seal")
    if seal != hashlib.sha256(json.dumps(body).encode()).hexdigest()[:8] or line[-1:] != b"\n":
        raise ValueError("not what was written")
    full = body.get("full_logp")
    tokens_T, logp_T = _array(body["tokens"], "<i4"), _array(body["logp"], "<f4")
    full_logp_T = None if full is None else _array(full, "<f4")
    return body["name"], Completion(0, tokens_T, logp_T, body["ending"], full_logp_T)


def _text(x_T: np.ndarray) -> str:
    kind = "<i4" if x_T.dtype.kind == "i" else "<f4"
    return base64.b64encode(x_T.astype(kind).tobytes()).decode()


def _array(text: str, kind: str) -> np.ndarray:
    x_T = np.frombuffer(base64.b64decode(text), kind)
    return x_T.astype(np.dtype(kind).newbyteorder("="))


# --- which policy ---------------------------------------------------------------------------------


def fingerprint(params: Any) -> str:
    """64 bits of all weights, whatever devices they lie on; equal weights have equal ones."""
    return "".join(f"{int(part):08x}" for part in _digest(params))


@jax.jit
def _digest(params: Any) -> Array:
    """Sums over all weights of their bits, mixed with their place."""
    total = jnp.zeros(2, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(params)):
        leaf = jnp.asarray(leaf)
        narrow = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, narrow).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        seeds = (0x9E3779B9, 0x85EBCA77)
        parts = [jnp.sum(_mix(bits, place, seed + 2 * number)) for seed in seeds]
        total = total + jnp.stack(parts)
    return total


def _mix(bits: Array, place: Array, seed: int) -> Array:
    """Integers that look unrelated for any two places, bits or seeds."""
    x = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(seed & 0xFFFFFFFF))
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 0x9E3779B1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 15)
