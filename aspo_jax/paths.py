"""Paths that a person gives: checked and expanded once, shown in one form, read in one way."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from aspo_jax.errors import UserError

_NAME_BYTES, _PATH_BYTES = 255, 4095  # what Linux allows
# First bytes of files that are taken for text -> what they are and how to make text of them.
_FORMATS = {
    b"\xef\xbb\xbf": ("a byte-order mark", "save it as UTF-8 without BOM"),
    b"\xff\xfe": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    b"\xfe\xff": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    b"\x1f\x8b": ("gzip", "unpack it with gunzip, or let a data file's name end in .gz"),
    b"PAR1": ("Parquet", "let a data file's name end in .parquet"),
    b"ARROW1": ("Arrow", "convert it: datasets.Dataset.from_file(OLD).to_json(NEW)"),
    b"PK\x03\x04": ("a zip archive", "unpack it with unzip"),
    b"BZh": ("bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("xz", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unpack it with unzstd"),
    b"version https://git-lfs": ("a pointer of git-lfs", "fetch what it stands for: git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


class PathError(UserError):
    """A path that cannot be one, or a file that cannot be read as text."""


def shorten(text: str, limit: int = 80) -> str:
    """A text that a message can repeat: its start alone where it is long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def user_path(text: str | Path, what: str = "") -> Path:
    """The path that a person wrote, ``~`` expanded.

    what: where it was written, for the message: ``Run.folder``, ``--config``.

    Raises:
        PathError: it is blank, holds what no path can hold, is longer than a path can be, names
            the home of a user that there is not, or is an address.
    """
    if problem := path_problem(str(text)):
        start = f"{what} = " if what else ""
        raise PathError(f"{start}{shorten(repr(str(text)), 120)}: {problem}")
    return Path(text).expanduser()


def path_argument(text: str) -> Path:
    """`user_path` as the ``type`` of an argument of a command."""
    try:
        return user_path(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_problem(text: str) -> str | None:
    """What is wrong with a text as a path, expectation and remedy; None if it can be one."""
    if not text.strip():
        return "found no path, expected the path of a file or folder; fill it in or leave it out"
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return (
            "found a NUL or half a surrogate pair in a path, expected UTF-8 text; write the name "
            "anew, or rename the file"
        )
    if "://" in text:
        return "found an address, expected a path on this machine; copy or mount it here"
    if len(text.encode()) > _PATH_BYTES or any(
        len(part.encode()) > _NAME_BYTES for part in text.split("/")
    ):
        return f"found a path of {len(text)} characters, longer than a path can be; shorten it"
    if os.path.expanduser(Path(text)).startswith("~"):
        return f"no home folder is known for {text.partition('/')[0]}; write the folder in full"
    return None


def shown(path: str | Path) -> str:
    """A path as messages show it: relative to the current folder if it is in there, else whole."""
    try:
        whole, here = Path(os.path.abspath(path)), Path.cwd()
    except OSError:  # the current folder was deleted
        return str(path)
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def read_bytes(path: Path) -> bytes:
    """What a regular file holds. Opening a pipe or a device could wait for ever: refused.

    Raises:
        PathError: there is no such file, it is no regular one, or the system refuses it.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise PathError(f"{shown(path)}: cannot be read: a folder, expected a file")
        if not stat.S_ISREG(mode):
            raise PathError(
                f"{shown(path)}: cannot be read: a pipe or a device, expected a file; write its "
                "content to one"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PathError(f"{shown(path)}: cannot be read: {reason}; check the path") from error


def decode(data: bytes, path: Path) -> str:
    """The text of a file.

    Raises:
        PathError: another encoding or format, which is named.
    """
    check_format(data, path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PathError(
            f"{shown(path)}:{line}: found bytes that are not UTF-8 ({error.reason} at byte "
            f"{error.start}), expected UTF-8 text; convert the file: iconv -f latin1 -t UTF-8 "
            "OLD > NEW if it came from an old system"
        ) from error


def format_of(data: bytes) -> tuple[str, str] | None:
    """What the bytes of a file begin like, and what to do then; None: nothing that is known."""
    return next((known for start, known in _FORMATS.items() if data.startswith(start)), None)


def check_format(data: bytes, path: Path) -> None:
    """Raise a PathError that names the format if the bytes begin like one that is no UTF-8 text."""
    if found := format_of(data):
        name, remedy = found
        raise PathError(f"{shown(path)}:1: found {name}, expected plain UTF-8 text; {remedy}")
    if b"\0" in data[:4096]:
        raise PathError(
            f"{shown(path)}: found NUL bytes, expected plain UTF-8 text; this is a binary file, or "
            "UTF-16 (convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW)"
        )


def page(name: str) -> str:
    """Where a page of the documentation is: inside an installed package, or in the checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "docs" / name
    return shown(inside if inside.is_file() else package.parent / "docs" / name)
