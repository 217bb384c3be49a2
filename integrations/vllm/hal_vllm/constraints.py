"""Parameters that forbid tokens: allowed_token_ids, min_tokens and bad_words. They become token masks, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams

from hal.features.masks import WORD

Words = np.ndarray[Any, np.dtype[np.int32]]  # token i is bit i % 32 of word i // 32


class Constraints:
    """The tokens that one request may get. A mask depends on the number of output tokens (min_tokens), and on the last
    output tokens where a bad word has several tokens.

    Attributes:
        reads_tokens: a mask depends on the last output tokens.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        always = np.ones(vocab_size, np.bool_)
        if params.allowed_token_ids is not None:
            always[:] = False
            always[list(params.allowed_token_ids)] = True
        words = params._bad_words_token_ids or []
        always[[word[0] for word in words if len(word) == 1]] = False
        early = always.copy()
        early[[token for token in params._all_stop_token_ids if token < vocab_size]] = False
        self._always, self._early = always, early
        self._always_words, self._early_words = to_words(always), to_words(early)
        self._every = ~to_words(np.zeros(vocab_size, np.bool_))  # the bits of the vocabulary, without those behind it
        self._several = [word for word in words if len(word) > 1]
        self._min_tokens = params.min_tokens
        self._only_early = params.allowed_token_ids is None and not words
        self.reads_tokens = bool(self._several)

    @staticmethod
    def of(params: SamplingParams, vocab_size: int) -> Constraints | None:
        """None if the request forbids no token."""
        if params.allowed_token_ids is None and not params._bad_words_token_ids and not (
                params.min_tokens and params._all_stop_token_ids):
            return None
        return Constraints(params, vocab_size)

    def mask(self, num_output: int, output: Sequence[int], grammar: Words | None = None) -> Words | None:
        """The mask of the next token, or None if every token is allowed.

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
        ended = [word[-1] for word in self._several if list(output[-len(word) + 1:]) == list(word[:-1])]
        if ended:
            allowed = (self._early if early else self._always).copy()
            allowed[ended] = False
            return to_words(allowed)
        return self._early_words if early else self._always_words


def to_words(allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> Words:
    """bool [vocab_size] -> int32 [words]. The bits behind the vocabulary are set, as in vLLM's masks."""
    bits = np.ones(-(-len(allowed) // WORD) * WORD, np.bool_)
    bits[:len(allowed)] = allowed
    words: Words = np.packbits(bits, bitorder="little").view("<i4")
    return words
