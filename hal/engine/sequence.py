"""One request's tokens, and where its KV cache lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from hal.constrained.constraint import Constraint
from hal.engine.blocks import extend_hashes
from hal.engine.request_output import FinishReason
from hal.features.adapter import Adapter
from hal.features.declare import Column
from hal.sampling.params import SamplingParams


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Attributes:
        request_id: the number of the request; a smaller number arrived earlier and has precedence.
        prompt_ids, output_ids: its tokens. The scheduler appends to output_ids.
        needs_tokens: the sequence is scheduled only when its last token is known on the host. A mask that depends on
            the token needs this, unless the step is in two phases (`ScheduledStep.restrict` with a handle).
        constraint: a mask of the tokens that it may get comes with each of its steps; None: with none of them.
        adapter: the one with which its tokens are computed, or None.
        owner: the engine's RequestState, until the sequence is complete.
        limit: the length at which it ends (prompt + max_tokens, at most the model's context).
        row: its row in the ranks' batch state while it runs, else -1.
        num_computed: tokens in the cache when it last entered a row (0 after a preemption that dropped its blocks).
            While the sequence runs, the scheduler's `computed` has the current number.
        blocks: its block table while it runs. host_blocks: the host blocks that it was swapped to. host_row: the same
            for the state of its row; -1 where there is none.
        hashes: prefix addresses of its leading full blocks. distrusted: another sequence with the same prefix ended
            with NaN, so the prefix cache takes no block of this one.
        started: it has run. num_cached: prompt tokens that the prefix cache had when it started. tokens_computed: the
            tokens computed in all rows that it has left. preemptions: how often it was preempted.
        drafts: tokens that it may have next, for its next step to verify. max_drafts: the most that are proposed at a
            time; None: as many as for other sequences. drafted, accepted: drafts so far. propose: see
            hal.contracts.proposer.HostProposer. proposed: where the ranks propose, the output that has the values of
            `drafts`, and the place in it.
    """

    request_id: int
    prompt_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    params: SamplingParams
    seed: int
    limit: int
    needs_tokens: bool = False
    constraint: Constraint | None = field(default=None, repr=False)
    adapter: Adapter | None = None
    owner: Any = field(default=None, repr=False)
    row: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    host_row: int = -1
    hashes: list[bytes] = field(default_factory=list)
    distrusted: bool = False
    finish_reason: FinishReason | None = None
    started: bool = False
    num_cached: int = 0
    tokens_computed: int = 0
    preemptions: int = 0
    drafts: list[int] = field(default_factory=list)
    max_drafts: int | None = None
    drafted: int = 0
    accepted: int = 0
    propose: Any = field(default=None, repr=False)
    proposed: Any = field(default=None, repr=False)

    def extend_hashes(self, block_size: int, count: int) -> None:
        """Grow `hashes` to the first `count` full blocks."""
        extend_hashes(self.hashes, self.tokens, block_size, count, b"" if self.adapter is None else self.adapter.key)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, as a new list."""
        return self.prompt_ids + self.output_ids

    def tokens(self, start: int, end: int) -> list[int]:
        """token_ids[start:end], without making the whole list."""
        at = len(self.prompt_ids)
        if start >= at:
            return self.output_ids[start - at:end - at]
        return self.prompt_ids[start:end] + self.output_ids[:max(end - at, 0)]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs are still missing. They are complete when the first token is sampled."""
        return self.params.prompt_logprobs is not None and not self.output_ids

    def numbers(self, columns: Iterable[Column]) -> list[float]:
        """A row of ExecuteModelRequest.new_floats or new_ints."""
        prompt = self.params.prompt_logprobs if self.wants_prompt_logprobs else None
        own = {"seed": self.seed, "prompt_logprobs": prompt}
        return [c.number(own[c.name] if c.name in own else getattr(self.params, c.name)) for c in columns]


def derive_seed(engine_seed: int, request_id: int) -> int:
    """The seed of a request that gives none: the first 8 bytes of BLAKE2b over both numbers in decimal, as int64."""
    digest = blake2b(f"{engine_seed} {request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
