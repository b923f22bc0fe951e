"""One way to say a user's mistake: what such errors have in common, and what a command does."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something outside the program is wrong and a person can mend it.

    The message names the file and line or the field, what was found, what was expected and the
    remedy: it is all that the person is shown, without a traceback.
    """


def run_command(command: Callable[[], int]) -> int:
    """The exit status of a command; 2, with the message on stderr, after a `UserError`."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
