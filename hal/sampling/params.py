"""The parameters of a request: sampling and stopping. They are checked at construction. This loads no torch."""

from __future__ import annotations

from typing import Annotated

from hal.features import FEATURES
from hal.features.bias import LogitBiasParams
from hal.features.drawing import DrawParams, MinPParams, TopKParams, TopPParams
from hal.features.logprobs import LogprobParams
from hal.features.params import Param, Params
from hal.features.penalties import PenaltyParams

MAX_STOP_TEXTS, MAX_STOP_LENGTH = 64, 1024  # the largest number of stop texts, and of characters of each
_INTEGERS = {"top_k": (0, 2**31 - 1), "max_tokens": (1, 2**31 - 1), "seed": (-(2**63), 2**63 - 1),
             "logprobs": (0, 1000), "prompt_logprobs": (0, 1000)}
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


class StopParams(Params):
    """When an output ends. The engine alone reads these parameters; a step does not carry them."""

    max_tokens: Annotated[int, Param(help="at most this many new tokens", low=1, high=2**31 - 1)] = 128
    ignore_eos: Annotated[bool, Param(help="do not end at the model's end-of-sequence token")] = False
    stop: Annotated[tuple[str, ...], Param(
        help="texts that end the output and are cut from it; the name of a special token, which a text does not show, "
             "ends the output as stop_token_ids do", most=MAX_STOP_TEXTS, longest=MAX_STOP_LENGTH)] = ()
    stop_token_ids: Annotated[tuple[int, ...], Param(
        help="tokens that end the output and are kept out of the text", low=0, high=2**31 - 1)] = ()


class _BuiltIn(StopParams, LogprobParams, PenaltyParams, LogitBiasParams, MinPParams, TopPParams, TopKParams,
               DrawParams):  # a dataclass takes the fields of its bases in reverse order
    pass


_FURTHER = tuple(p for p in dict.fromkeys(f.params for f in FEATURES)
                 if p is not Params and not issubclass(_BuiltIn, p))


class SamplingParams(*_FURTHER, _BuiltIn):  # type: ignore[misc]  # the types of third parties are not known here
    """Greedy by default. The parameters of the library and of every installed step feature; docs/parameters.md lists
    them. Filters are applied in the order top_k, top_p, min_p to the scaled, penalised and biased logits.

    Raises:
        RequestError: a value does not fit its parameter. The error names the parameter.
    """
