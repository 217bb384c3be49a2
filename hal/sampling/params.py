"""What a request asks of sampling and of stopping. Torch-free; refused at construction when it makes no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hal.errors import RequestError

_LARGEST = 3.4e38  # what float32 holds
MAX_STOP_TEXTS, MAX_STOP_LENGTH = 64, 1024  # how many stop texts, of how many characters each


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
        """Raises RequestError, naming the parameter."""
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _number("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, 1000)
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (str, int, list, tuple, set, frozenset)):
                raise RequestError(f"{name} is not usable", got=repr(value), expected="a list")
            object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos is not usable", got=repr(self.ignore_eos), expected="true or false")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError("stop holds something that is not a text", got=repr(self.stop), expected="non-empty str")
        if len(self.stop) > MAX_STOP_TEXTS:
            raise RequestError("there are too many stop texts", got=len(self.stop),
                               expected=f"at most {MAX_STOP_TEXTS}")
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_LENGTH:
            raise RequestError("a stop text is too long", got=f"{longest} characters",
                               expected=f"at most {MAX_STOP_LENGTH}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if not good or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        span = f"a finite number {'above' if open_low else 'of at least'} {low:g}" if low > -math.inf else "finite"
        raise RequestError(f"{name} is not usable", got=repr(value),
                           expected=span + (f", at most {high:g}" if high < math.inf else ""))


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is not usable", got=repr(value), expected=f"an integer from {low} to {high}")
