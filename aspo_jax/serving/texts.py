"""Texts of tokens while they come: no half characters, nothing that later changes, stop strings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character (yet)
_CONTEXT = 5  # tokens before the first that decide how it is spelled
_LONGEST, _LEAST = 12, 5  # tokens kept while no character comes of them; a character has at most 4


class Detokenizer:
    """Token by token, the text that is sure by then.

    Pieces of text add up to what decoding all tokens at once gives, with the same spaces: a token
    is decoded behind those before it. Only where a run of byte tokens (``<0xE4>``) breaks off
    within a character, what was given stays, and what is broken follows.

    decode: tokens -> text. context: what the first token follows, for instance the prompt.
    hidden: ids that are not part of the text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        context: Sequence[int] = (),
        hidden: Collection[int] = (),
    ):
        self._decode, self._hidden = decode, hidden
        self._window = list(context[-_CONTEXT:])  # its text is compared with and without one more
        self._known = len(self._window)  # so many of them ended in a whole character
        self._given = len(decode(self._window).rstrip(_BROKEN))  # characters of their text

    def add(self, token: int) -> str:
        """The text that is sure with one more token, often none."""
        if token in self._hidden:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        sure = text.rstrip(_BROKEN)
        if len(sure) <= self._given:
            return self._give_up(text)
        piece, self._given = sure[self._given :], len(sure)
        if sure == text:
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def rest(self) -> str:
        """What remains when no token follows."""
        text = self._decode(self._window)
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    def _give_up(self, text: str) -> str:
        """The broken text before the last tokens, where too many came for one character."""
        if len(self._window) - self._known <= _LONGEST:
            return ""
        for count in range(_LEAST, _LONGEST):
            last = self._decode(self._window[-count:])
            if text.endswith(last) and len(text) - len(last) >= self._given:
                piece = text[self._given : len(text) - len(last)]
                self._window = self._window[-count:]
                self._known = self._given = 0
                return piece
        return ""


class StopScanner:
    """Text that passes through, until one of some strings is complete in it.

    is_shown: whether that string itself is passed on.
    """

    def __init__(self, strings: Sequence[str], is_shown: bool = False):
        self._strings, self._is_shown = strings, is_shown
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What of the text so far is no beginning of a stop string, and was not passed on yet."""
        text = self._held + text
        ends = [(at + len(s), -len(s), s) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            end, _, self.found = min(ends)  # the first complete one; of two, the longer
            self._held = ""
            return text[: end if self._is_shown else end - len(self.found)]
        held = begun(text, self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when no text follows."""
        text, self._held = self._held, ""
        return text


def begun(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of the text that one of the strings begins with but is not."""
    longest = min(len(text), max(map(len, strings), default=1) - 1)
    for length in range(longest, 0, -1):
        end = text[-length:]
        if any(len(s) > length and s.startswith(end) for s in strings):
            return length
    return 0


class Vocabulary:
    """What single tokens are in texts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._core = tokenizer.backend_tokenizer  # ten times as fast, and tidies no spaces away
        self.size = len(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(i for i, token in added.items() if token.special)
        self._added = tokenizer.get_added_vocab()
        self.spell = functools.lru_cache(2**16)(self._spell)
        self._before = self._letter()

    def decode(self, tokens: Sequence[int], shows_special: bool = False) -> str:
        """The text of tokens, every space kept."""
        return self._core.decode(list(tokens), skip_special_tokens=not shows_special)

    def detokenizer(self, context: Sequence[int], shows_special: bool = False) -> Detokenizer:
        """A detokenizer of what follows the context."""
        decode = functools.partial(self.decode, shows_special=shows_special)
        return Detokenizer(decode, context, () if shows_special else self.special)

    def bytes_of(self, token: int) -> list[int]:
        """The bytes that a token adds to a text."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None or piece in self._added:
            return list(self.spell(token).encode())
        if len(piece) == 6 and piece.startswith("<0x"):
            return [int(piece[3:5], 16)]
        if _BROKEN in self.spell(token) and all(c in _byte_of() for c in piece):
            return [_byte_of()[c] for c in piece]
        return list(self.spell(token).encode())

    def _letter(self) -> list[int]:
        """A token that another can follow, else the first of a text may lose its space."""
        try:
            return self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        except Exception:  # tokenizers raises bare Exceptions where a vocabulary lacks a character
            return []

    def _spell(self, token: int) -> str:
        """The text of one token within a text, special tokens shown."""
        before = self.decode(self._before, True)
        both = self.decode([*self._before, token], True)
        return both.removeprefix(before)


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of byte-level vocabularies stands for."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}
