"""The allow-lists of what vLLM's scheduler sends. A field that is on no list must have no content."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from hal.errors import RequestError

# Fields that the translation reads.
READ = {
    "SchedulerOutput": {
        "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens",
        "finished_req_ids", "preempted_req_ids", "has_structured_output_requests", "kv_cache_block_copies"},
    "NewRequestData": {"req_id", "prompt_token_ids", "sampling_params", "block_ids", "num_computed_tokens",
                       "prefill_token_ids"},
    "CachedRequestData": {"req_ids", "resumed_req_ids", "all_token_ids", "new_block_ids", "num_computed_tokens"},
    "GrammarOutput": {"structured_output_request_ids", "grammar_bitmask"}}
# Fields whose content means nothing to hal's ranks: counts, tokens that ranks know already, and vLLM's encoder cache,
# which they do not have.
IDLE = {
    "SchedulerOutput": {
        "pending_structured_output_tokens", "scheduled_encoder_input_stats", "num_common_prefix_blocks",
        "free_encoder_mm_hashes", "ec_manager_metadata"},
    "NewRequestData": {"prompt_is_token_ids"}, "CachedRequestData": {"new_token_ids", "num_output_tokens"},
    "GrammarOutput": {"num_acceptable_drafts"}}
_NOTHING = object()


def refuse_unknown(source: Any) -> None:
    """Raises RequestError: a field has content that would be ignored. It names the field."""
    for name, default in must_be_empty(type(source)):
        value = getattr(source, name)
        if value is not None and value is not default and _has_content(value, default):
            raise RequestError(f"vLLM's {type(source).__name__}.{name} is not supported under hal",
                               got=repr(value)[:200], expected="nothing")


@cache
def must_be_empty(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    """The fields of a class of vLLM that are on no list, with their defaults."""
    name = next(base.__name__ for base in kind.__mro__ if base.__name__ in READ)
    return tuple((field.name, _NOTHING if field.default is dataclasses.MISSING else field.default)
                 for field in dataclasses.fields(kind) if field.name not in READ[name] | IDLE[name])


def _has_content(value: Any, default: Any) -> bool:
    try:
        return bool(value) and not bool(value == default)
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors of several elements
        return True
