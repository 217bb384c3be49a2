"""What a request asks of sampling and of stopping. Torch-free; refused at construction when it makes no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hal.errors import RequestError
from hal.values import described, is_array, plain

_LARGEST = 3.4e38  # what float32 holds
MAX_STOP_TEXTS, MAX_STOP_LENGTH = 64, 1024  # how many stop texts, of how many characters each
_INTEGERS = {"top_k": (0, 2**31 - 1), "max_tokens": (1, 2**31 - 1), "seed": (-(2**63), 2**63 - 1),
             "logprobs": (0, 1000), "prompt_logprobs": (0, 1000)}
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Greedy by default.

    Attributes:
        temperature: 0 is greedy. top_k: 0 keeps all tokens. top_p: nucleus, 1 keeps all. min_p: tokens below this
            share of the best one's probability are dropped. Applied in that order to the scaled, penalised logits.
        repetition_penalty: divides positive logits (multiplies negative ones) of tokens in prompt or output; 1 is none.
        presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once or per occurrence.
        seed: the request's own; None derives one from the engine's seed and the request's number.
        max_tokens: at most this many new tokens. ignore_eos: do not end at the model's end-of-sequence token.
        stop: texts that end the output (and are cut from it), at most 64 of at most 1,024 characters. The name of a
            special token, which a text does not show, ends the output as stop_token_ids do.
        stop_token_ids: tokens that end the output (and are kept out of the text).
        logprobs: None, or the number of most likely tokens reported beside the chosen one, from the raw logits.
        prompt_logprobs: the same for each prompt token after the first.

    Numbers may also be scalars of numpy or torch, and stop_token_ids an array: they are kept as plain Python values.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 128
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises RequestError, naming the parameter. Numbers of numpy and torch become Python's own."""
        _number(self, "temperature", 0.0, math.inf)
        _number(self, "top_p", 0.0, 1.0, open_low=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "repetition_penalty", 0.0, math.inf, open_low=True)
        _number(self, "presence_penalty", -math.inf, math.inf)
        _number(self, "frequency_penalty", -math.inf, math.inf)
        for name, (low, high) in _INTEGERS.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                _set(self, name, _integer(name, getattr(self, name), low, high))
        ignore_eos = plain(self.ignore_eos)
        if not isinstance(ignore_eos, bool):
            raise RequestError("ignore_eos is not usable", got=described(self.ignore_eos), expected="true or false")
        _set(self, "ignore_eos", ignore_eos)
        stop = tuple(plain(s) for s in _items("stop", self.stop))
        if not all(isinstance(s, str) and s for s in stop):
            raise RequestError("stop holds something that is not a text", got=described(stop), expected="non-empty str")
        if len(stop) > MAX_STOP_TEXTS:
            raise RequestError("there are too many stop texts", got=len(stop), expected=f"at most {MAX_STOP_TEXTS}")
        longest = max((len(s) for s in stop if isinstance(s, str)), default=0)
        if longest > MAX_STOP_LENGTH:
            raise RequestError("a stop text is too long", got=f"{longest} characters",
                               expected=f"at most {MAX_STOP_LENGTH}")
        _set(self, "stop", stop)
        ids = _items("stop_token_ids", self.stop_token_ids)
        _set(self, "stop_token_ids", tuple(_integer("stop_token_ids", token, 0, 2**31 - 1) for token in ids))

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _set(params: SamplingParams, name: str, value: object) -> None:
    object.__setattr__(params, name, value)  # the dataclass is frozen


def _number(params: SamplingParams, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    given = getattr(params, name)
    value = plain(given)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if not good or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        span = f"a finite number {'above' if open_low else 'of at least'} {low:g}" if low > -math.inf else "finite"
        raise RequestError(f"{name} is not usable", got=described(given),
                           expected=span + (f", at most {high:g}" if high < math.inf else ""))
    _set(params, name, float(value))  # type: ignore[arg-type]


def _integer(name: str, given: object, low: int, high: int) -> int:
    value = plain(given)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is not usable", got=described(given), expected=f"an integer from {low} to {high}")
    return value


def _items(name: str, value: object) -> list[object]:
    """What a parameter that takes one or several holds."""
    single = plain(value)
    if isinstance(single, (str, int)):
        return [single]
    if isinstance(single, (list, tuple, set, frozenset)):
        return list(single)
    if is_array(single) and single.ndim == 1:
        return list(single.tolist())
    raise RequestError(f"{name} is not usable", got=described(value), expected="one, or a list")
