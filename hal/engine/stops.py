"""The search for a stop text, one character at a time. The length of the stop text does not change the cost."""

from __future__ import annotations

import functools


class Stop:
    """One stop text, searched for by the algorithm of Knuth, Morris and Pratt (1977).

    Attributes:
        text: the stop text, not empty.
        seen: the length of the longest beginning of the stop text that the text so far ends with. The search is over
            when this is the whole stop text.
    """

    def __init__(self, text: str) -> None:
        self.text, self.seen, self._borders = text, 0, _borders(text)

    def advance(self, char: str) -> int:
        """`seen` after one more character of the text."""
        while self.seen and self.text[self.seen] != char:
            self.seen = self._borders[self.seen - 1]
        self.seen += self.text[self.seen] == char
        return self.seen


@functools.lru_cache(maxsize=128)
def _borders(text: str) -> list[int]:
    """For each end within `text`: the length of its longest proper beginning that is also an end of it."""
    borders = [0] * len(text)
    for at in range(1, len(text)):
        length = borders[at - 1]
        while length and text[length] != text[at]:
            length = borders[length - 1]
        borders[at] = length + (text[length] == text[at])
    return borders
