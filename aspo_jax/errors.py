"""One way to say a user's mistake: what such errors have in common, and what a command does."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator

from aspo_jax.streams import unbreakable_streams

_ROOM = "make room there"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM + " or have the quota raised",
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
            if (said := refusal(error)) is None:
                raise
            message = said
        print(f"error: {message}", file=sys.stderr)
        return 2


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
