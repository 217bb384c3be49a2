"""The parameters of a request: sampling and stopping. They are checked at construction. This loads no torch."""

from __future__ import annotations

from typing import Annotated

from hal.errors import RequestError
from hal.features import FEATURES
from hal.features.adapter import AdapterParams
from hal.features.bias import LogitBiasParams
from hal.features.drawing import DrawParams, MinPParams, TopKParams, TopPParams
from hal.features.logprobs import LogprobParams
from hal.features.params import Param, Params
from hal.features.penalties import PenaltyParams

MAX_STOP_TEXTS, MAX_STOP_LENGTH = 64, 1024  # the largest number of stop texts, and of characters of each
GRAMMARS = ("regex", "json_schema", "choice", "grammar")  # a request has at most one of these
MAX_GRAMMAR = 1 << 18  # characters of a regular expression, a schema or a grammar


class StopParams(Params):
    """When an output ends. The engine alone reads these parameters; a step does not carry them."""

    max_tokens: Annotated[int, Param(help="at most this many new tokens; 0 computes the prompt alone, for its "
                                     "prompt_logprobs", low=0, high=2**31 - 1)] = 128
    min_tokens: Annotated[int, Param(help="before so many new tokens no token ends the output; a stop text still does, "
                                     "and so does a grammar that is complete", low=0, high=2**31 - 1)] = 0
    ignore_eos: Annotated[bool, Param(help="do not end at the model's end-of-sequence token")] = False
    stop: Annotated[tuple[str, ...], Param(
        help="texts that end the output and are cut from it; the name of a special token, which a text does not show, "
             "ends the output as stop_token_ids do", most=MAX_STOP_TEXTS, longest=MAX_STOP_LENGTH)] = ()
    stop_token_ids: Annotated[tuple[int, ...], Param(
        help="tokens that end the output and are kept out of the text", low=0, high=2**31 - 1)] = ()
    include_stop_str_in_output: Annotated[bool, Param(
        help="show what ended the output, a stop text or a token, in its text")] = False
    skip_special_tokens: Annotated[bool, Param(help="do not show special tokens by their names")] = True
    n: Annotated[int, Param(help="outputs of each prompt, each drawn by a seed of its own", low=1, high=128)] = 1


class ConstraintParams(Params):
    """What an output may be (docs/constrained.md). From these parameters the engine makes a token mask for each step.
    """

    allowed_token_ids: Annotated[tuple[int, ...] | None, Param(
        help="the only tokens that the output may have", low=0, high=2**31 - 1, unset="all")] = None
    bad_words: Annotated[tuple[str, ...], Param(
        help="texts that the output may not have, as the tokenizer divides them at the beginning and behind a space",
        most=256, longest=MAX_STOP_LENGTH)] = ()
    regex: Annotated[str | None, Param(
        help="the output matches this regular expression as a whole", longest=MAX_GRAMMAR, unset="none")] = None
    json_schema: Annotated[str | None, Param(
        help="the output is JSON that this schema allows; JSONL and Python may give it as an object",
        longest=MAX_GRAMMAR, json=True, unset="none")] = None
    choice: Annotated[tuple[str, ...], Param(help="the output is one of these texts", most=1024,
                                             longest=MAX_STOP_LENGTH)] = ()
    grammar: Annotated[str | None, Param(
        help="the output is a text of this grammar, in Lark's notation", longest=MAX_GRAMMAR, unset="none")] = None


class _BuiltIn(ConstraintParams, StopParams, AdapterParams, LogprobParams, PenaltyParams, LogitBiasParams, MinPParams,
               TopPParams, TopKParams, DrawParams):  # a dataclass takes the fields of its bases in reverse order
    pass


_FURTHER = tuple(p for p in dict.fromkeys(f.params for f in FEATURES)
                 if p is not Params and not issubclass(_BuiltIn, p))


class SamplingParams(*_FURTHER, _BuiltIn):  # type: ignore[misc]  # the types of third parties are not known here
    """Greedy by default. The parameters of the library and of every installed step feature; docs/parameters.md lists
    them. Filters are applied in the order top_k, top_p, min_p to the scaled, penalised and biased logits.

    Raises:
        RequestError: a value does not fit its parameter, or two parameters contradict each other. The error names them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in GRAMMARS if getattr(self, name)]
        if len(given) > 1:
            raise RequestError("an output follows one grammar", got=" and ".join(given), expected="one of them",
                               param=given[1])
        if given and self.ignore_eos:
            raise RequestError("an output that follows a grammar ends when the grammar is complete",
                               got=f"ignore_eos with {given[0]}", expected="ignore_eos=False", param="ignore_eos")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty, so no output is possible", expected="at least one token id",
                               param="allowed_token_ids")
        if self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens is above max_tokens", got=self.min_tokens,
                               expected=f"at most {self.max_tokens}", param="min_tokens")
