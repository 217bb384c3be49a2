"""vLLM's SamplingParams as hal reads them. Every field is on one of the lists here; a field that is on none of them, in
a later vLLM, is refused by name as soon as a request uses it."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from hal.features import COLUMNS
from hal.features.bias import MOST_TOKENS
from hal.features.logprobs import MOST

# Fields that become something of a step.
CARRIED = frozenset((
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed",
    "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "min_tokens", "_all_stop_token_ids",
    "_bad_words_token_ids", "structured_outputs"))
# Fields that vLLM's front end or scheduler handles by itself, so ranks need not know them.
ENGINE = frozenset((
    "n", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "flat_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone",
    "output_text_buffer_length", "_eos_token_id", "bad_words", "skip_reading_prefix_cache", "repetition_detection",
    "_watermarking_skipped", "truncate_prompt_tokens"))
# Fields whose effect hal's ranks do not have: refused unless they are unset.
REFUSED = frozenset((
    "watermarking", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "extra_args",
    "thinking_token_budget", "routed_experts_prompt_start", "trace_decode_token_ids"))

_OFF = {"watermarking": False, "extra_args": {}}  # other values that ask for nothing
_GREEDY_BELOW = 1e-5  # the temperature below which vLLM samples greedily
_PENALTIES = (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0))


def check_params(params: Any, vocab_size: int) -> None:
    """Refuse a request that asks for something that hal's ranks would not honour.

    Raises:
        VLLMValidationError: it names the parameter. The API server answers 400.
    """
    if not isinstance(params, SamplingParams):
        raise VLLMValidationError(f"hal's ranks generate text, and the request asks for {type(params).__name__}")
    for name, default in must_be_unset(type(params)):
        value = getattr(params, name)
        if not same(value, default) and not same(value, _OFF.get(name, default)) and not _derived(params, name):
            known = "is not supported under hal" if name in REFUSED else "is not known to this version of hal-vllm"
            raise VLLMValidationError(f"the sampling parameter {name!r} {known}", parameter=name, value=repr(value))
    for name in ("logprobs", "prompt_logprobs"):
        if (asked := number_of_logprobs(getattr(params, name), vocab_size)) > MOST:
            raise VLLMValidationError(f"{name} is {asked}, and hal reports at most {MOST} tokens", parameter=name,
                                      value=getattr(params, name))
    if len(params.logit_bias or ()) > MOST_TOKENS:
        raise VLLMValidationError(f"logit_bias names {len(params.logit_bias)} tokens, and hal takes at most "
                                  f"{MOST_TOKENS}", parameter="logit_bias")
    if params.logit_bias and any(not 0 <= int(token) < vocab_size for token in params.logit_bias):
        raise VLLMValidationError(f"logit_bias names a token outside the vocabulary of {vocab_size}",
                                  parameter="logit_bias", value=sorted(params.logit_bias))


@cache
def must_be_unset(kind: type[SamplingParams]) -> tuple[tuple[str, Any], ...]:
    """The parameters that are on no list of supported ones, and their defaults. Private ones follow from others."""
    defaults = kind()
    return tuple((name, getattr(defaults, name)) for name in kind.__struct_fields__
                 if name not in CARRIED | ENGINE and not name.startswith("_"))


def _derived(params: SamplingParams, name: str) -> bool:
    """Whether vLLM derives the value of an unknown parameter from supported ones."""
    if name in REFUSED:
        return False
    own = {field: getattr(params, field) for field in type(params).__struct_fields__
           if field in CARRIED | ENGINE and not field.startswith("_")}
    return same(getattr(type(params)(**own), name), getattr(params, name))


def same(one: Any, other: Any) -> bool:
    """Equality that is False for arrays, since a value beside an array asks for something."""
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError):
        return False


def number_of_logprobs(asked: int | None, vocab_size: int) -> int:
    """The number of most likely tokens to report; -1 if none is reported. vLLM's -1 asks for the whole vocabulary."""
    return -1 if asked is None else vocab_size if asked < 0 else asked


def needs_tokens(params: SamplingParams) -> bool:
    """Whether a step of the sequence can only be made when the host knows all its tokens: for penalties, and for bad
    words of several tokens."""
    return any(getattr(params, name) != default for name, default in _PENALTIES) or any(
        len(word) > 1 for word in params._bad_words_token_ids or ())


def columns(params: SamplingParams, seed: int, prompt_logprobs: int, vocab_size: int) -> tuple[list[float], list[int]]:
    """A row of ExecuteModelRequest.new_floats and of new_ints.

    Args:
        seed: the request's own or a derived one. prompt_logprobs: how many to report beside each prompt token, or -1.
    """
    own = {"temperature": 0.0 if params.temperature < _GREEDY_BELOW else params.temperature,
           "top_k": max(params.top_k, 0), "seed": seed, "prompt_logprobs": prompt_logprobs,
           "logprobs": number_of_logprobs(params.logprobs, vocab_size)}
    floats, ints = ([own[c.name] if c.name in own else getattr(params, c.name, c.default) for c in COLUMNS[kind]]
                    for kind in ("float", "int"))
    return floats, [int(number) for number in ints]
