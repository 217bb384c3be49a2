"""The constraints of an engine's requests, and their masks for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hal.constrained.grammars import Grammars, TokenTable, threads
from hal.constrained.rules import TokenRules, Words
from hal.errors import RequestError
from hal.features.masks import WORD
from hal.sampling.params import GRAMMARS, SamplingParams


@dataclass(slots=True, eq=False)
class Constraint:
    """Of one sequence.

    Attributes:
        matcher: llguidance's state of the grammar, or None without a grammar. taken: output tokens that it has seen.
        rules: rules beside the grammar. problem: why the grammar cannot go on, such as a state that is too complex.
    """

    matcher: Any
    rules: TokenRules | None
    taken: int = 0
    problem: str | None = None

    def follows(self, output: Sequence[int]) -> bool:
        """Bring the grammar up to these output tokens. Returns whether it has a mask for the next token."""
        if self.matcher is None or self.problem is not None:
            return False
        new, self.taken = output[self.taken:], len(output)
        if new:
            self.matcher.consume_tokens(list(new))
        if self.matcher.is_error():
            self.problem = self.matcher.get_error()
        return self.problem is None


class Constraints:
    """Makes the constraints of an engine's requests.

    Args:
        vocab_size: token ids lie below it. eos: tokens that end a request.
        table: the tokenizer's tokens; None: there is no tokenizer.
    """

    def __init__(self, vocab_size: int, eos: Sequence[int], table: TokenTable | None) -> None:
        self._vocab_size, self._eos, self._table = vocab_size, eos, table
        self._grammars = Grammars(vocab_size, eos, table)

    def of(self, params: SamplingParams) -> Constraint | None:
        """The constraint of a request, or None for a request that has none.

        Raises:
            RequestError: see Grammars.matcher; or a token id is out of the vocabulary, or there are bad words and no
                tokenizer.
        """
        kind = next((kind for kind in GRAMMARS if getattr(params, kind)), None)
        rules = self._rules(params)
        if kind is None:
            return None if rules is None else Constraint(None, rules)
        return Constraint(self._grammars.matcher(kind, getattr(params, kind)), rules)

    def _rules(self, params: SamplingParams) -> TokenRules | None:
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos)) if params.min_tokens else ()
        allowed = params.allowed_token_ids
        if allowed is not None and max(allowed) >= self._vocab_size:
            raise RequestError("allowed_token_ids has a token out of the vocabulary", got=max(allowed),
                               expected=f"at most {self._vocab_size - 1}", param="allowed_token_ids")
        if params.bad_words and self._table is None:
            raise RequestError("the model has no tokenizer", got="bad_words", expected="logit_bias of token ids",
                               param="bad_words")
        if allowed is None and not params.bad_words and not stops:
            return None
        words = [] if self._table is None else [self._table.plain(before + word.lstrip())
                                                for word in params.bad_words for before in ("", " ")]
        return TokenRules(self._vocab_size, allowed=allowed, words=words, stops=stops, min_tokens=params.min_tokens)


def masks(asked: Sequence[tuple[Constraint, Sequence[int], Sequence[int]]], vocab_size: int) -> list[Words]:
    """The masks of a step.

    Args:
        asked: for each constrained sequence its constraint, its output so far, and the drafts that the step verifies.

    Returns:
        For each of these int32 [1 + drafts, words]: the mask behind the output's last token, and behind each draft.
        Behind a draft that is not allowed the masks mean nothing, since no token can be accepted there.
    """
    starts = np.cumsum([0, *(1 + len(drafts) for _, _, drafts in asked)]).tolist()
    found = np.full((starts[-1], -(-vocab_size // WORD)), -1, np.int32)
    followed = [(constraint, at, list(drafts)) for at, (constraint, output, drafts) in zip(starts, asked, strict=False)
                if constraint.follows(output)]
    where = found.ctypes.data, found.shape[1] * found.itemsize, len(found)
    if alone := [(one.matcher, at) for one, at, drafts in followed if not drafts]:
        threads().unsafe_compute_mask_ptr(alone, *where)
    if several := [(one.matcher, at, drafts) for one, at, drafts in followed if drafts]:
        threads().unsafe_compute_mask_ptr_with_draft_token(several, *where)
    for one, at, _ in followed:
        if one.matcher.is_error() or not found[at].any():
            one.problem = one.matcher.get_error() or "no token of the vocabulary goes on"
    each = [found[at:end] for at, end in pairwise(starts)]
    for of_one, (constraint, output, drafts) in zip(each, asked, strict=True):
        if constraint.rules is not None:
            for place in range(len(of_one)):
                before = output if not place else [*output, *drafts[:place]]
                mask = constraint.rules.mask(len(before), before, of_one[place] if constraint.matcher else None)
                if mask is not None:
                    of_one[place] = mask
    return each
