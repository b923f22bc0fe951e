"""Which training questions are test questions too.

    python -m aspo_jax.overlap TRAIN TEST --train-prompt problem --test-prompt problem

TRAIN and TEST are what ``Data.train_path`` takes: files, folders, patterns, hub data sets. The exit
status is 1 if any question is in both, 0 if none is, and 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from aspo_jax.data.overlap import questions, shared_questions
from aspo_jax.errors import CommandParser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("overlap", __doc__)
    parser.add_argument("train", metavar="TRAIN", help="training prompts")
    parser.add_argument("test", metavar="TEST", help="test prompts")
    for which in ("train", "test"):
        parser.add_argument(
            f"--{which}-prompt",
            metavar="FIELD",
            help="holds the question; without it 'prompt' or 'messages'",
        )
    parser.add_argument(
        "--words",
        type=_count,
        metavar="N",
        help="count questions that share N words in a row; without it, all words",
    )
    given = parser.parse_args(arguments)
    return run_command(lambda: _report(given))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: expected a whole number of 1 or more")
    return int(text)


def _report(given: argparse.Namespace) -> int:
    train = questions(given.train, given.train_prompt)
    test = questions(given.test, given.test_prompt)
    shared = shared_questions(train, test, given.words)
    for question, other in shared:
        print(f"{question.where} is {other.where}")
    how = f"share {given.words} words in a row with" if given.words else "are"
    print(f"{len(shared):,} of {len(train):,} training questions {how} one of {len(test):,} others")
    return 1 if shared else 0


if __name__ == "__main__":
    sys.exit(main())
