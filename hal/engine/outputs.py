"""What a user gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hal.errors import HalError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprob:
    """A token's logprob (natural, of the raw logits) and, as (token id, logprob) best first, those asked for beside."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """Attributes:
        index: place of the prompt in the call.
        token_ids: of the output; the engine's own list, to be read only.
        text: of the output alone; "" without a tokenizer. Stop texts are cut from it.
        finish_reason: "stop" (end of sequence, stop text or id), "length", "abort", "error"; None while it runs.
        error: why it ended with "error"; the tokens before the error are kept.
        logprobs: one per output token. prompt_logprobs: one per prompt token, None for the first.
    """

    index: int
    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: HalError | None = None
