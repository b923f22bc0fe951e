"""One way to say a user's mistake: what such errors have in common, and what a command does."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from aspo_jax.shell import quote
from aspo_jax.streams import unbreakable_streams

_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there or have the quota raised",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you have the right to use, or have it granted",
    errno.EPERM: "choose a place that you have the right to use, or have it granted",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "expected a file; check the path",
    errno.EEXIST: "move away what is there",
    errno.ENOTEMPTY: "move away what is there",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check the links of the path",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the file system again",
}
# How Python, Rust and tensorstore write it into a message.
_SAID = re.compile(r"(?:\[Errno |\(os error |\[os_error_code=')(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something outside the program is wrong and a person can mend it.

    The message names the file and line or the field, what was found, what was expected and the
    remedy: it is all that the person is shown, without a traceback.
    """


class WriteError(UserError):
    """A file or folder could not be written: no room, no right, a limit."""


def run_command(command: Callable[[], int]) -> int:
    """The exit status of a command; 2, with a message on stderr, for what a person can mend.

    That is every `UserError`, and the operating system's refusal of a path (an OSError that names
    one) or of more room. Any other error is a mistake of the program's and keeps its traceback. A
    reader of stdout or stderr that goes away ends nothing.
    """
    with unbreakable_streams():
        try:
            return command()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = refusal(error)
            if message is None:
                raise
        print(f"error: {message}", file=sys.stderr)
        return 2


class CommandParser(argparse.ArgumentParser):
    """A parser whose mistakes read like all others: one line, with the remedy, exit status 2.

    module: of this package, which is the command. about: its first line is what ``--help`` says.
    """

    def __init__(self, module: str, about: str | None, **arguments: Any):
        prog, description = f"python -m aspo_jax.{module}", (about or "").partition("\n")[0]
        super().__init__(prog=prog, description=description, allow_abbrev=False, **arguments)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("; ".join(map(self._unknown, unknown)))
        return found

    def _unknown(self, word: str) -> str:
        """What a word that is no argument was meant to be."""
        shown, known = f"unknown argument {word[:80]!r}", self._option_string_actions
        if re.fullmatch(r"-*\w+\.\w+=.*", word, re.DOTALL) and "--set" in known:
            return f"{shown}: write --set {quote(word.lstrip('-')[:80])}"
        if word.startswith("-") and (meant := nearest(word.partition("=")[0], known)):
            return f"{shown}{meant}"
        if word.endswith(".gin") and "--config" in known:
            return f"{shown}: write --config {quote(word[:80])}"
        return f"{shown}; expected one of {', '.join(sorted(known))}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the arguments)\n")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one was most likely meant to be, whatever their case."""
    by_folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A suggestion for a mistyped name, or nothing."""
    meant = closest(name, known)
    return f" (did you mean {prefix}{meant}?)" if meant else ""


def refusal(error: OSError) -> str | None:
    """What to say of an OSError that comes from outside: it names a path, or says there is no room.

    None for any other, which a traceback must explain.
    """
    if error.filename is None and error.errno not in (*_FULL, errno.EFBIG, errno.EMFILE):
        return None
    return describe(error, error.filename)


def describe(error: BaseException, path: str | os.PathLike[str] | None) -> str | None:
    """Path, what the operating system says, room left where that matters, and the remedy.

    None if the error is not one of the outside world's.
    """
    number = _errno(error)
    if number is None:
        return None
    where = f"{os.fspath(path)}: " if path is not None else ""
    room = f" ({_room(os.fspath(path))})" if path is not None and number in _FULL else ""
    return f"{where}{os.strerror(number)}{room}; {_REMEDIES[number]}"


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a refusal of the operating system while the body writes ``path`` into a `WriteError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # writers in other languages raise types of their own
        if (message := describe(error, path)) is None:
            raise
        raise WriteError(f"cannot write {message}") from error


def _errno(error: BaseException | None) -> int | None:
    """Its number, also where a library says it in words only; None: nothing that we know."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            return error.errno
        said = _SAID.search(str(error))
        if said and int(said[1]) in _REMEDIES:
            return int(said[1])
        error = error.__cause__
    return None


def _room(path: str) -> str:
    """How much room is left where a path is, or would be."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        usage = shutil.disk_usage(path or ".")
    except OSError:
        return "room left unknown"
    return f"{usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB free"
