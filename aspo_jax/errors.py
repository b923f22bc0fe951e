"""One way to say a user's mistake: what such errors have in common, and what a command does."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn


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


class CommandParser(argparse.ArgumentParser):
    """A parser whose mistakes read like all others: one line, with the remedy, exit status 2."""

    def __init__(self, **arguments: Any):
        super().__init__(allow_abbrev=False, **arguments)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("; ".join(map(self._unknown, unknown)))
        return found

    def _unknown(self, word: str) -> str:
        """What a word that is no argument was meant to be."""
        shown = f"unknown argument {word[:80]!r}"
        if (
            re.fullmatch(r"-*\w+\.\w+=.*", word, re.DOTALL)
            and "--set" in self._option_string_actions
        ):
            return f"{shown}: write --set {shlex.quote(word.lstrip('-')[:80])}"
        flag = word.partition("=")[0]
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
        if flag.startswith("-") and close:
            return f"{shown} (did you mean {close[0]}?)"
        if word.endswith(".gin") and "--config" in self._option_string_actions:
            return f"{shown}: write --config {shlex.quote(word[:80])}"
        return f"{shown}; expected one of {', '.join(sorted(self._option_string_actions))}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the arguments)\n")
