"""Prompts and parameters of a call, converted to one form: texts, lists of Python integers, SamplingParams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from hal.engine.sequence import derive_seed
from hal.errors import LengthError, RequestError
from hal.sampling.params import SamplingParams
from hal.values import ArrayLike, described, is_array, plain

# A text, or token ids: a list, tuple or range of integers, or a one-dimensional array of numpy or torch.
Prompt: TypeAlias = str | Sequence[int] | ArrayLike
Prompts: TypeAlias = Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Prompt]
_EXPECTED = "a text, or a list, tuple, range or one-dimensional array of token ids"


def as_prompts(prompts: Prompts) -> list[Prompt]:
    """A list of prompts: one prompt becomes a list of one. The prompts are not checked yet.

    Raises:
        RequestError: neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts, "prompts are not usable", f"{_EXPECTED}; or a list of these")
    first = plain(items[0]) if len(items) else None
    return [prompts] if isinstance(first, (int, float)) else list(items)  # type: ignore[list-item, arg-type]


def as_params(params: SamplingParams | Iterable[SamplingParams] | None, count: int,
              default: SamplingParams) -> list[SamplingParams]:
    """The parameters of each of `count` prompts; None stands for `default`. Raises RequestError."""
    if params is None or isinstance(params, SamplingParams):
        return [default if params is None else params] * count
    if not isinstance(params, (list, tuple)):
        raise RequestError("params are not usable", got=described(params), expected="SamplingParams, or a list of them")
    for i, each in enumerate(params):
        if not isinstance(each, SamplingParams):
            raise RequestError(f"params of prompt {i} are not usable", got=described(each), expected="SamplingParams")
    if len(params) != count:
        raise RequestError("there are not as many params as prompts", got=len(params), expected=count)
    return list(params)


def samples(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each of a prompt's `n` outputs. The first has the seed of the request, the others seeds that
    follow from it."""
    seeds = [params.seed, *(params.seed if params.seed is None else derive_seed(params.seed, i)
                            for i in range(1, params.n))]
    return [params] if params.n == 1 else [replace(params, n=1, seed=seed) for seed in seeds]


def as_token_ids(prompt: Prompt, most: int, vocab_size: int, hint: str | None = None) -> list[int]:
    """The token ids of a prompt that is no text.

    Args:
        most: tokens that it may have. hint: what to do about a longer one.

    Raises:
        RequestError: it is empty, too long, or holds something that is not an id of the vocabulary.
    """
    items = _items(prompt, "a prompt is neither a text nor token ids", _EXPECTED)
    check_length(len(items), most, hint)
    ids = []
    for item in items:
        token = plain(item)
        if not isinstance(token, int) or isinstance(token, bool):
            raise RequestError("a token id is not an integer", got=described(item), expected=_EXPECTED)
        if not 0 <= token < vocab_size:
            raise RequestError("a token id is out of the vocabulary", got=described(item),
                               expected=f"an integer from 0 to {vocab_size - 1}")
        ids.append(int(token))
    return ids


def require_text(tokenizer: Any, text: str, directory: str) -> None:
    """Raises RequestError: there is no tokenizer, or the text is not valid UTF-8."""
    if tokenizer is None:
        raise RequestError("the model has no tokenizer", got="a text prompt", expected="token ids",
                           hint=f"add tokenizer files to {directory}, or give prompt_token_ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: how Python shows bytes that are not UTF-8
        raise RequestError("the prompt is not a text", got=str(error), expected="text in UTF-8") from None


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError: a tokenizer's id has no row in the embedding table."""
    if ids and max(ids) >= vocab_size:
        raise RequestError("the tokenizer has a token that the model does not have", got=f"the token id {max(ids)}",
                           expected=f"below the vocabulary's size, {vocab_size}",
                           hint="the tokenizer's files belong to another model, or have tokens that were added later")


def check_length(count: int, most: int, hint: str | None = None) -> None:
    """Raises RequestError when a prompt has no token, and LengthError when it has more than `most`."""
    if not count:
        raise RequestError("the prompt is empty", expected="at least one token")
    if count > most:
        raise LengthError("the prompt is longer than the context", got=f"{count} tokens",
                          expected=f"at most {most}, so that one more fits", hint=hint)


def _items(value: object, what: str, expected: str) -> Sequence[object]:
    """The items of an ordered collection. An array of more than one dimension is refused: its rows may be padded."""
    if is_array(value) and value.ndim == 1:
        try:
            found: list[object] = value.tolist()
        except (RuntimeError, NotImplementedError):  # a tensor without data
            raise RequestError(what, got=described(value), expected=expected) from None
        return found
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return value
    raise RequestError(what, got=described(value), expected=expected)
