"""Files that are whole or not there: atomic writes, digests, texts sealed by their own digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from aspo_jax.errors import writing


class Damaged(Exception):
    """Why a file or folder cannot be used: the file and what is wrong with it."""


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is of this machine's file system, not of an object store (``gs://``)."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, ``~`` resolved; addresses of object stores as they are."""
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def write_text_atomic(path: epath.PathLike, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old or the new text, never a part.

    Local paths: temporary file beside it, fsync, rename, fsync of the folder. Object stores
    (``gs://``): one write, which is atomic there.

    Raises:
        WriteError: no room, no right; the old text stays.
    """
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: epath.PathLike, data: bytes) -> None:
    """`write_text_atomic` of a file that is no text."""
    path = epath.Path(path)
    with writing(path):
        if not is_local(path):
            path.write_bytes(data)
            return
        temporary = path.parent / f".{path.name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            if temporary.is_file():
                temporary.unlink()
            raise
        fsync(path.parent)


def fsync(path: epath.PathLike) -> None:
    """Make a file's bytes, or a folder's names, safe against a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file below a folder, in a fixed order; each subfolder follows its own files."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from walk(path)
        yield path


# --- digests -------------------------------------------------------------------------------------


def digest(path: epath.Path) -> dict[str, Any]:
    """A file's size in bytes and sha256; about a second per GB."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return {"bytes": path.stat().length, "sha256": sha256.hexdigest()}


def digests(
    folder: epath.PathLike, is_wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, dict[str, Any]]:
    """`digest` of each file below a folder, by its path in there."""
    folder = epath.Path(folder)
    named = {p.relative_to(folder).as_posix(): p for p in walk(folder) if not p.is_dir()}
    return {name: digest(path) for name, path in named.items() if is_wanted(name)}


def check_digests(folder: epath.PathLike, files: Any) -> None:
    """Compare a folder's files with the `digests` read from a file; others are ignored.

    Raises:
        Damaged: the first bad one and what is wrong with it, or the digests are none.
    """
    if not isinstance(files, dict) or not files:
        raise Damaged("no digests of its files were kept")
    for name, expected in files.items():
        path = epath.Path(folder) / name
        try:
            if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
                raise Damaged(f"the digest of {name} is none: {expected!r:.80}")
            size = path.stat().length
            if size != expected["bytes"]:
                raise Damaged(f"{name} has {size} bytes, expected {expected['bytes']}")
            if digest(path) != expected:
                raise Damaged(f"{name} is damaged: its sha256 is not {expected['sha256']}")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error})") from error


# --- sealed texts --------------------------------------------------------------------------------


def sealed_text(body: Mapping[str, Any]) -> str:
    """JSON that holds its own digest; `read_sealed` gives the body back."""
    text = json.dumps(body, sort_keys=True)
    own_digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"manifest": body, "sha256": own_digest}, indent=1, sort_keys=True) + "\n"


def read_sealed(path: epath.PathLike) -> dict[str, Any]:
    """The body of a file of `sealed_text`.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: it is not what was written.
    """
    path = epath.Path(path)
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)["manifest"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read ({error!r})") from error
    if not isinstance(body, dict) or text != sealed_text(body):
        raise Damaged(f"{path.name} is damaged: its text does not match its own digest")
    return body
