"""The prompt tokens that a step may take while sequences decode, so that their inter-token latency keeps a target."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

_KEPT = 0.98  # of the weight of the earlier steps, with each new one
_PRIOR = 1.0  # weight of the costs so far, in steps of one token: they stay where the steps say nothing about them
_MARGIN = 3.0  # mean errors of the expectation, as a share of it, that are kept free below the target
_GAIN = 0.1  # of the newest error in the mean error


class Pace:
    """Learns what steps cost from the times of the steps that had decodes, and bounds the next step's prompt tokens.

    The model of a step's time is linear: a cost of the step, one of each decode, and one of each prompt token. The
    costs are the least squares over the steps so far, older ones with less weight. A time that is more than twice what
    was expected counts as twice that, so that one pause changes little while a lasting change is learnt in some steps.
    At first one floor of prompt tokens is taken to cost the whole target, and no step gets more than twice the prompt
    tokens that some step before had.

    Args:
        target: seconds that a step with decodes shall take at most.
        floor: prompt tokens that every step may take, also where the target cannot be kept, so that prompts go on.
        clock: seconds. The same times give the same bounds.
    """

    def __init__(self, target: float, floor: int, clock: Callable[[], float]) -> None:
        self._target, self._floor, self._clock = target, floor, clock
        self._costs = np.array([0.0, 0.0, target / floor])  # seconds of a step, of a decode, of a prompt token
        self._squares, self._products = np.zeros((3, 3)), np.zeros(3)  # of the least squares
        self._error, self._most = 0.0, floor
        self._begun: deque[tuple[float, int, int]] = deque()
        self._ended = float("-inf")  # when the last step did

    def most(self, decodes: int) -> int:
        """Prompt tokens that a step beside so many decodes may take."""
        step, decode, token = self._costs.tolist()
        room = self._target / (1 + _MARGIN * self._error) - step - decode * decodes
        return max(min(int(room / token), 2 * self._most), self._floor)

    def begin(self, decodes: int, tokens: int) -> None:
        """A step is issued. Steps end in the order in which they are issued."""
        self._begun.append((self._clock(), decodes, tokens))

    def end(self) -> None:
        """The oldest step has ended. Its time is the time since it was issued or the step before it ended."""
        begun, decodes, tokens = self._begun.popleft()
        begun, self._ended = max(begun, self._ended), self._clock()
        if not decodes:
            return
        step = np.array([1.0, decodes, tokens])
        expected = float(self._costs @ step)
        seconds = min(self._ended - begun, 2 * max(expected, self._target))
        self._error += _GAIN * (abs(seconds - expected) / max(seconds, expected) - self._error)
        self._squares = _KEPT * self._squares + np.outer(step, step)
        self._products = _KEPT * self._products + step * seconds
        costs = np.linalg.solve(self._squares + _PRIOR * np.eye(3), self._products + _PRIOR * self._costs)
        self._costs = np.maximum(costs, (0.0, 0.0, 1e-9))
        self._most = max(self._most, tokens)
