"""The output of a request, as the user of an engine reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hal.errors import HalError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprob:
    """Attributes:
        logprob: natural, of the raw logits. rank: of the token by its raw logit; 1 is the most likely.
        top: (token id, logprob) of the most likely tokens that were asked for, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """Attributes:
        index: place of the prompt in the call.
        token_ids: of the output; the engine's own list, to be read only.
        text: of the output alone; "" without a tokenizer. Stop texts are cut from it.
        finish_reason: "stop" (end of sequence, stop text or id), "length", "abort", "error"; None while it runs.
        stop_reason: where the finish_reason is "stop", the stop text that was found, or the token id of stop_token_ids;
            None: an end-of-sequence token.
        error: why it ended with "error"; the tokens before the error are kept.
        drafted_tokens, accepted_tokens: of speculative decoding: drafts that were verified for the request, and how
            many of them its output got.
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
    stop_reason: str | int | None = None
    error: HalError | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
