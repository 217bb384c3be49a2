"""vLLM's parameters that forbid tokens (allowed_token_ids, min_tokens and bad_words) as hal's rules of tokens."""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from hal.constrained.rules import TokenRules


def rules_of(params: SamplingParams, vocab_size: int) -> TokenRules | None:
    """None if the request forbids no token."""
    words, stops = params._bad_words_token_ids or [], params._all_stop_token_ids if params.min_tokens else ()
    if params.allowed_token_ids is None and not words and not stops:
        return None
    return TokenRules(vocab_size, allowed=params.allowed_token_ids, words=words, stops=stops,
                      min_tokens=params.min_tokens)
