"""One request's tokens, and where its KV cache lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from hal.engine.request_output import FinishReason
from hal.features.declare import Column
from hal.sampling.params import SamplingParams


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Attributes:
        request_id: grows with arrival; smaller ones go first.
        prompt_ids, output_ids: its tokens; the scheduler appends to the latter.
        needs_tokens: it is scheduled only when its last token is known on the host, as a mask that follows from the
            token needs it.
        owner: what the engine keeps beside it, until it is complete.
        limit: length at which it ends (prompt + max_tokens, at most the context).
        row: in the ranks' batch state while it runs, else -1.
        num_computed: tokens in the cache when it last entered a row (0 after a preemption that dropped its blocks).
            While it runs the scheduler's `computed` counts on.
        blocks: its block table while it runs. host_blocks: where it was swapped to.
        hashes: prefix addresses of its leading full blocks. distrusted: its prefix is that of a sequence that ended
            with NaN, so the prefix cache takes none of its blocks.
        started: it has run. num_cached: prompt tokens that the prefix cache had when it started. tokens_computed: in
            all rows that it has left. preemptions: how often it was made to leave one.
    """

    request_id: int
    prompt_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    params: SamplingParams
    seed: int
    limit: int
    needs_tokens: bool = False
    owner: Any = field(default=None, repr=False)
    row: int = -1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    distrusted: bool = False
    finish_reason: FinishReason | None = None
    started: bool = False
    num_cached: int = 0
    tokens_computed: int = 0
    preemptions: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, as a new list."""
        return self.prompt_ids + self.output_ids

    def tokens(self, start: int, end: int) -> list[int]:
        """token_ids[start:end], without the rest."""
        at = len(self.prompt_ids)
        if start >= at:
            return self.output_ids[start - at:end - at]
        return self.prompt_ids[start:end] + self.output_ids[:max(end - at, 0)]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some prompt logprobs are still to come: they are complete once the first token is sampled."""
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
