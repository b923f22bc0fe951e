"""One sequence's answer as it grows: which tokens count, what text they are, why it ended.

What comes out does not depend on how many tokens the engine draws at once: a sequence is cut at the
token that completed a stop string, or at the first stop id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from aspo_jax.sampler import ABORTED, STOP
from aspo_jax.serving.seam import Grown, TopIds
from aspo_jax.serving.texts import Detokenizer, StopScanner


class Ends(NamedTuple):
    """What ends a sequence, beside the engine and its limit.

    ids: stop ids of the request. strings: its stop strings. is_shown: the text of what ended it,
        be it the model's own stop id, belongs to the answer.
    """

    ids: Collection[int] = ()
    strings: tuple[str, ...] = ()
    is_shown: bool = False


class Piece(NamedTuple):
    """What an answer grew by. A field per token has one entry for each of ``tokens``.

    text: more of the answer; what may be part of a stop string or half a character waits.
    offsets: characters of the answer before each token.
    finish: None while it goes on; "stop", "length", "nonfinite", "abort".
    reason: the stop id or stop string of the request that ended it.
    versions: of the weights that drew each token.
    """

    text: str
    tokens: list[int]
    logp: list[float]
    top: list[TopIds]
    offsets: list[int]
    versions: list[str]
    finish: str | None = None
    reason: int | str | None = None


class Answer:
    """The state of one sequence.

    detokenizer: None: texts are not wanted. offset: characters before the answer.
    """

    def __init__(self, ends: Ends, detokenizer: Detokenizer | None, offset: int = 0):
        self._ends, self._texts, self._offset = ends, detokenizer, offset
        self._scanner = StopScanner(ends.strings, ends.is_shown)
        self.finish: str | None = None
        self._reason: int | str | None = None
        self.count = 0  # tokens so far

    def add(self, grown: Grown) -> Piece:
        """What more of the engine's tokens add; none are taken behind the one that ended it."""
        text, offsets = "", []
        for token in grown.tokens:
            offsets.append(self._offset)
            text += self._take(token, grown.ending == STOP and len(offsets) == len(grown.tokens))
            if self.finish:
                break
        if self.finish is None and grown.ending is not None:
            text += self._end(grown.ending)
        count = len(offsets)
        self.count += count
        return Piece(
            text,
            grown.tokens[:count],
            grown.logp[:count],
            grown.top[:count] if grown.top else [[] for _ in offsets],
            offsets,
            [grown.version] * count,
            self.finish,
            self._reason,
        )

    def end(self, finish: str = ABORTED) -> Piece:
        """The last piece of an answer that ends without another token."""
        return Piece(self._end(finish), [], [], [], [], [], finish)

    def _take(self, token: int, is_last: bool) -> str:
        """The text that a token adds; sets why the answer ended, if that was it.

        is_last: the model's own stop id.
        """
        if is_last or token in self._ends.ids:
            self._reason = token if token in self._ends.ids else None
            return (self._read(token) if self._ends.is_shown else "") + self._end(STOP)
        return self._read(token)

    def _read(self, token: int) -> str:
        """The text of a token, as far as it is sure and begins no stop string."""
        if self._texts is None:
            return ""
        return self._scan(self._texts.add(token))

    def _scan(self, text: str) -> str:
        self._offset += len(text)
        shown = self._scanner.add(text)
        if self._scanner.found is not None and self.finish is None:
            self.finish, self._reason = STOP, self._scanner.found
        return shown

    def _end(self, finish: str) -> str:
        """Set why it ended; the text that waited."""
        text = ""
        if self._texts is not None and self.finish is None:
            text = self._scan(self._texts.rest())
            text += self._scanner.rest()
        self.finish = self.finish or finish
        return text


class Span(NamedTuple):
    """Tokens [start, end) of one sequence, drawn by one version of the weights."""

    version: str
    start: int
    end: int


def spans(versions: Sequence[str]) -> list[Span]:
    """The spans of a sequence's tokens; together they cover it."""
    found: list[Span] = []
    for at, version in enumerate(versions):
        if found and found[-1].version == version:
            found[-1] = found[-1]._replace(end=at + 1)
        else:
            found.append(Span(version, at, at + 1))
    return found


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one answer as one."""
    last = pieces[-1]
    return Piece(
        "".join(piece.text for piece in pieces),
        [x for piece in pieces for x in piece.tokens],
        [x for piece in pieces for x in piece.logp],
        [x for piece in pieces for x in piece.top],
        [x for piece in pieces for x in piece.offsets],
        [x for piece in pieces for x in piece.versions],
        last.finish,
        last.reason,
    )
