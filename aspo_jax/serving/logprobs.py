"""Log-probabilities of tokens in the forms that the routes answer with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from aspo_jax.serving.seam import PromptScore, TopIds
from aspo_jax.serving.texts import Vocabulary

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


class Spelling(NamedTuple):
    """How tokens are named in an answer: by their text, or as ``token_id:5``."""

    vocabulary: Vocabulary
    is_by_id: bool = False

    def name(self, token: int) -> str:
        """What a token is called."""
        return f"token_id:{token}" if self.is_by_id else self.vocabulary.spell(token)


class Scored(NamedTuple):
    """Some tokens with their log-probabilities; None: nothing comes before that token.

    top: the likeliest ids at each token. offsets: characters before each.
    """

    tokens: Sequence[int]
    logp: Sequence[float | None]
    top: Sequence[TopIds]
    offsets: Sequence[int]

    def __add__(self, other: Any) -> Scored:
        return Scored(*([*a, *b] for a, b in zip(self, other, strict=True)))


def scored_prompt(tokens: Sequence[int], score: PromptScore, offsets: Sequence[int]) -> Scored:
    """A prompt with its score: nothing is known of its first token."""
    return Scored(tokens, [None, *score.logp], [[], *score.top], offsets)


def finite(logp: float) -> float:
    """A log-probability that JSON can hold."""
    return logp if math.isfinite(logp) else LOWEST


def likeliest(token: int, logp: float, top: TopIds, count: int) -> list[tuple[int, float]]:
    """The token itself, with the very same float, and the ``count`` likeliest."""
    return [(token, logp), *((i, p) for i, p in top[:count] if i != token)]


def completion_logprobs(scored: Scored, count: int, spelling: Spelling) -> dict[str, Any]:
    """The object of `/v1/completions`. count: of the likeliest ids.

    Where two tokens have one spelling, the larger log-probability is kept.
    """
    return {
        "text_offset": list(scored.offsets),
        "token_logprobs": [None if p is None else finite(p) for p in scored.logp],
        "tokens": [spelling.name(token) for token in scored.tokens],
        "top_logprobs": [
            None if p is None else _by_name(likeliest(token, p, top, count), spelling)
            for token, p, top in zip(scored.tokens, scored.logp, scored.top, strict=True)
        ],
    }


def _by_name(pairs: Iterable[tuple[int, float]], spelling: Spelling) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logp in pairs:
        name = spelling.name(token)
        found[name] = max(found.get(name, -math.inf), finite(logp))
    return found


def chat_logprobs(
    tokens: Sequence[int], logp: Sequence[float], top: Sequence[TopIds], spelling: Spelling
) -> dict[str, Any]:
    """The object of `/v1/chat/completions`."""
    return {
        "content": [
            _chat_entry(token, p, spelling)
            | {"top_logprobs": [_chat_entry(i, q, spelling) for i, q in _own(token, p, likely)]}
            for token, p, likely in zip(tokens, logp, top, strict=True)
        ]
    }


def _own(token: int, logp: float, top: TopIds) -> TopIds:
    """The likeliest ids; of the token itself the very same float as everywhere."""
    return [(i, logp if i == token else p) for i, p in top]


def _chat_entry(token: int, logp: float, spelling: Spelling) -> dict[str, Any]:
    return {
        "token": spelling.name(token),
        "logprob": finite(logp),
        "bytes": spelling.vocabulary.bytes_of(token),
    }


def generate_logprobs(
    tokens: Sequence[int], logp: Sequence[float], top: Sequence[TopIds]
) -> dict[str, Any]:
    """The object of `/inference/v1/generate`: tokens by id, in the old key and the new one."""
    return {
        "content": [
            _generate_entry(token, p)
            | {
                "rank": None,
                "bytes": None,
                "top_logprobs": [_generate_entry(i, q) for i, q in _own(token, p, likely)],
            }
            for token, p, likely in zip(tokens, logp, top, strict=True)
        ]
    }


def _generate_entry(token: int, logp: float) -> dict[str, Any]:
    return {"token": f"token_id:{token}", "token_id": token, "logprob": finite(logp)}


def prompt_logprobs(
    scored: Scored, count: int, vocabulary: Vocabulary
) -> list[dict[str, dict[str, Any]] | None]:
    """The list that ``prompt_logprobs`` asks for: per token of the prompt, by id."""
    return [
        None if p is None else _by_id(token, p, top, count, vocabulary)
        for token, p, top in zip(scored.tokens, scored.logp, scored.top, strict=True)
    ]


def _by_id(
    token: int, logp: float, top: TopIds, count: int, vocabulary: Vocabulary
) -> dict[str, dict[str, Any]]:
    ranks = {i: rank for rank, (i, _) in enumerate(top[:count], 1)}
    return {
        str(i): {
            "logprob": finite(p),
            "rank": ranks.get(i),
            "decoded_token": vocabulary.spell(i),
        }
        for i, p in likeliest(token, logp, top, count)
    }
