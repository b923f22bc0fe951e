"""Stop strings: after which token does the text of a response hold one?"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence


def stop_length(
    decode: Callable[[Sequence[int]], str], strings: Sequence[str], tokens: Sequence[int]
) -> int | None:
    """The least number of tokens whose text holds one of the strings; None if all of it has none.

    decode: tokens -> text.
    """

    def is_over(count: int) -> bool:
        text = decode(tokens[:count])
        return any(string in text for string in strings)

    if not is_over(len(tokens)):
        return None
    return bisect.bisect_left(range(len(tokens) + 1), True, key=is_over)
