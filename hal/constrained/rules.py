"""Rules that forbid tokens whatever a grammar says: allowed_token_ids, bad_words and min_tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hal.features.masks import WORD

Words = np.ndarray[Any, np.dtype[np.int32]]  # of a mask: token i is bit i % 32 of word i // 32


class TokenRules:
    """The tokens that one request may get. A mask depends on the number of output tokens (min_tokens), and on the last
    output tokens where a bad word has several tokens.

    Args:
        vocab_size: token ids lie below it.
        allowed: the only tokens that the output may have; None allows all.
        words: token ids of texts that may not occur in the output.
        stops, min_tokens: the tokens that end the request are forbidden before the output has so many tokens.

    Attributes:
        reads_tokens: a mask depends on the last output tokens.
    """

    def __init__(self, vocab_size: int, *, allowed: Iterable[int] | None = None, words: Iterable[Sequence[int]] = (),
                 stops: Iterable[int] = (), min_tokens: int = 0) -> None:
        always = np.full(vocab_size, allowed is None, np.bool_)
        always[[] if allowed is None else list(allowed)] = True
        words = [list(word) for word in words if len(word)]
        always[[word[0] for word in words if len(word) == 1]] = False
        early = always.copy()
        early[[token for token in stops if token < vocab_size]] = False
        self._always, self._early = always, early
        self._always_words, self._early_words = to_words(always), to_words(early)
        self._every = ~to_words(np.zeros(vocab_size, np.bool_))  # the bits of the vocabulary, without those behind it
        self._several = [word for word in words if len(word) > 1]
        self._min_tokens = min_tokens
        self._only_early = allowed is None and not words
        self.reads_tokens = bool(self._several)

    def mask(self, num_output: int, output: Sequence[int], grammar: Words | None = None) -> Words | None:
        """The mask of the next token, int32 [words], or None if every token is allowed.

        Args:
            num_output: output tokens that the sequence has. output: these tokens; read if `reads_tokens`.
            grammar: what a grammar allows. Where it allows only tokens that end the request, min_tokens does not hold.
        """
        early = num_output < self._min_tokens
        own = self._own(early, output)
        if grammar is None or own is None:
            return own if grammar is None else grammar
        both = grammar & own
        if early and not (both & self._every).any():
            late = self._own(False, output)
            return grammar if late is None else grammar & late
        return both

    def _own(self, early: bool, output: Sequence[int]) -> Words | None:
        if not early and self._only_early:
            return None
        ended = [word[-1] for word in self._several if list(output[-len(word) + 1:]) == word[:-1]]
        if ended:
            allowed = (self._early if early else self._always).copy()
            allowed[ended] = False
            return to_words(allowed)
        return self._early_words if early else self._always_words


def to_words(allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> Words:
    """bool [vocab_size] -> int32 [words]. The bits behind the vocabulary are set."""
    bits = np.ones(-(-len(allowed) // WORD) * WORD, np.bool_)
    bits[:len(allowed)] = allowed
    words: Words = np.packbits(bits, bitorder="little").view("<i4")
    return words
