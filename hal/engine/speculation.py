"""The engine's part of speculative decoding: where drafts come from between two steps, and how many are worth a step.

The number of drafts follows from counts, and from times that the ranks have measured before the first request
(Executor.round_times), or else from the costs that backend and proposer declare. It does not follow from the times of
steps: with wire="none" every rank has an engine, and all of them must schedule alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from hal.config import EngineConfig
from hal.contracts.backend import Backend
from hal.contracts.outputs import SamplerOutput
from hal.contracts.proposer import HostProposer, proposer_class
from hal.engine.scheduled_step import ScheduledStep

_MEMORY = 0.95  # a verified draft counts this much less with each later step that verifies some
_PRIOR = 4.0, 5.0  # accepted drafts and trials before the first step
_PROBE = 32  # resting speculation tries one draft a sequence in every so many steps


class Speculation:
    """Args: token_cost: see Capabilities.

    Attributes:
        count: the number of tokens to propose for each sequence at the end of the next step.
        drafted, accepted: drafts that steps have verified, and how many of them the target has drawn too.
        on_ranks: the proposer runs on the ranks; steps bring its proposals.
    """

    def __init__(self, config: EngineConfig, backend: Backend) -> None:
        assert config.speculate is not None
        kind = proposer_class(config.speculate)
        self._host = kind(config) if issubclass(kind, HostProposer) else None
        self.on_ranks = self._host is None
        self._most, self._cost, self._token_cost = config.speculative_tokens, kind.cost, backend.capabilities.token_cost
        self.count, self.drafted, self.accepted = self._most, 0, 0
        self._right, self._trials = _PRIOR
        self._rested = 0
        self._times: dict[int, list[float]] = {}  # of a round with 0, 1, ... drafts, by its number of sequences

    def take_times(self, measured: Sequence[Sequence[float]]) -> None:
        """The executor's `round_times`. Fewer drafts than were measured take the time of the next larger number, whose
        program they run as."""
        for rows in sorted({int(rows) for rows, _, _ in measured}):
            times = sorted((drafts, seconds) for n, drafts, seconds in measured if n == rows)
            self._times[rows] = [next(t for n, t in times if n >= k) for k in range(self._most + 1)]

    def before(self, step: ScheduledStep) -> None:
        """Called before the step is executed. Its proposals may still be on their way until here."""
        if not self.on_ranks:
            return
        step.request.num_proposals = self.count
        if step.request.draft_tokens is None:
            return
        given, tokens = dict[int, list[list[int]]](), list[int]()
        for row, seq in zip(step.sampled_rows.tolist(), step.sampled, strict=True):
            count = step.drafts.get(row)
            if count:
                output, i = seq.proposed
                if id(output) not in given:
                    given[id(output)] = output.draft_tokens.clamp(min=0).tolist()
                tokens += given[id(output)][i][:count]
        step.request.draft_tokens[...] = tokens

    def after(self, step: ScheduledStep, output: SamplerOutput) -> None:
        """Called when the step's tokens are taken over: give the sequences that go on their drafts. Where the ranks
        propose, the scheduler gets their number alone, and `before` reads them: the device may still compute them."""
        if step.drafts and output.counts is not None:
            self._observe(step, output.counts.tolist())
        self._choose(len(step.sampled))
        for i, seq in enumerate(step.sampled):
            if seq.finish_reason is not None:
                continue
            most = self.count if self._host is not None else step.request.num_proposals
            most = most if seq.max_drafts is None else min(most, seq.max_drafts)
            if self._host is not None:
                if seq.propose is None:
                    seq.propose = self._host.begin(seq.prompt_ids)
                seq.drafts = seq.propose(seq.output_ids, most) if most else []
            else:
                seq.drafts, seq.proposed = [0] * most, (output, i)

    def _observe(self, step: ScheduledStep, counts: list[int]) -> None:
        right = trials = 0
        for row, count in zip(step.sampled_rows.tolist(), counts, strict=True):
            drafts = step.drafts.get(row, 0)
            self.drafted += drafts
            right += count - 1
            trials += min(count, drafts)  # what lies behind the first wrong draft shows nothing
        self.accepted += right
        self._right, self._trials = self._right * _MEMORY + right, self._trials * _MEMORY + trials

    def _choose(self, rows: int) -> None:
        """Set `count` to where a step's expected tokens per time are the most. A step that verifies k drafts of each of
        n sequences gives 1 + p + ... + p^k tokens of each, where p is the share of right drafts."""
        if not rows:
            return
        times = self._round_times(rows)
        if times is None:
            self.count = 0
            return
        rate, tokens, best, self.count = self._right / self._trials, 1.0, 1 / times[0], 0
        for k in range(1, self._most + 1):
            tokens += rate**k
            if tokens / times[k] > best:
                best, self.count = tokens / times[k], k
        self._rested = 0 if self.count else self._rested + 1
        if self._rested == _PROBE:
            self.count, self._rested = 1, 0

    def _round_times(self, rows: int) -> list[float] | None:
        """The time of a round of `rows` sequences with 0, 1, ... drafts of each, in any unit. None where times were
        measured, but not for so many sequences: then no program is prepared for a round."""
        if self._times:
            return next((times for n, times in self._times.items() if n >= rows), None)
        each = self._cost + self._token_cost * rows / (1 + self._token_cost * (rows - 1))
        return [1 + each * k for k in range(self._most + 1)]
