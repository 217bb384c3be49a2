"""Proposals without a model: the tokens that followed the last occurrence of a sequence's last tokens (prompt lookup
decoding, Saxena 2023). It pays where the output copies from the prompt or repeats itself. This loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from hal.contracts.proposer import HostProposer, Propose

LONGEST, SHORTEST = 4, 2  # tokens of a match; a longer match is preferred


class NgramProposer(HostProposer):
    def begin(self, prompt_ids: Sequence[int]) -> Propose:
        return _Lookup(prompt_ids)


class _Lookup:
    """Attributes: tokens: prompt and output. ends: of each n-gram with a token behind it, the place of that token."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.tokens = list(prompt_ids)
        self.prompt, self._indexed = len(prompt_ids), 0
        self.ends: dict[tuple[int, ...], int] = {}

    def __call__(self, output_ids: Sequence[int], count: int) -> list[int]:
        tokens, ends = self.tokens, self.ends
        tokens += output_ids[len(tokens) - self.prompt:]
        for at in range(max(self._indexed, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, at) + 1):
                ends[tuple(tokens[at - n:at])] = at
        self._indexed = len(tokens)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            found = ends.get(tuple(tokens[-n:]))
            if found is not None:
                # A match that overlaps the end goes on with the period that it shows.
                period = len(tokens) - found
                return [tokens[found + i % period] for i in range(count)]
        return []
