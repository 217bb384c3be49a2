"""Grammars of requests (regex, JSON schema, choice, Lark), compiled and followed by llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Protocol

from hal.errors import RequestError

_KEPT = 64  # compiled grammars that are kept for later requests
# Where a text is certain, llguidance would force the tokens into which its tokenizer divides it. Without that a mask
# allows every token that goes on with the text, and does not depend on how a tokenizer treats a text's beginning.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# Whitespace of any length would let a model write spaces for ever. "x-guidance" in a schema changes this.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class TokenTable(Protocol):
    """The bytes of each token (hal.engine.text.TokenBytes). Attributes: size: their number. hidden: special
    tokens by their names. plain: the ids of a text."""

    @property
    def size(self) -> int: ...

    @property
    def hidden(self) -> dict[str, int]: ...

    def plain(self, text: str) -> list[int]: ...

    def __getitem__(self, token: int) -> bytes: ...


class Grammars:
    """The grammars of one tokenizer's vocabulary.

    Args:
        vocab_size: of the model. eos: the tokens that end a request.
        table: the bytes of each token of the tokenizer; None: there is no tokenizer.
    """

    def __init__(self, vocab_size: int, eos: Sequence[int], table: TokenTable | None) -> None:
        self._vocab_size, self._eos, self._table = vocab_size, eos, table
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def matcher(self, kind: str, value: str | tuple[str, ...]) -> Any:
        """A new llguidance.LLMatcher at the beginning of an output.

        Raises:
            RequestError: the grammar is not valid, or is too complex; or this model has no tokenizer, or nothing ends
                its outputs; or llguidance is not installed.
        """
        return self._compiled(kind, value).deep_copy()

    def _compile(self, kind: str, value: Any) -> Any:
        llguidance()
        if self._table is None:
            raise RequestError("the model has no tokenizer", got=kind, expected="a request without a grammar",
                               hint="add tokenizer files to the model's directory", param=kind)
        if not self._eos:
            raise RequestError("a grammar needs a token that ends the output, and this model has none", got=kind,
                               expected="an eos_token_id in config.json or generation_config.json", param=kind)
        try:
            made = llguidance().LLMatcher(self._vocabulary, _OPTIONS + _lark(kind, value), log_level=0,
                                       limits=llguidance().LLParserLimits(verbose_errors=False))
            problem = made.get_error() or None
            if problem is None and (not any(made.compute_bitmask()) or made.is_error()):
                problem = "no token of the vocabulary begins a text of this grammar"
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise RequestError(f"{kind} is not usable", got=" ".join(problem.split())[:300],
                               hint="docs/constrained.md says which grammars there are", param=kind)
        return made

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """llguidance's view of the vocabulary. It takes each token's bytes from this library's own table, so a grammar
        sees the text that the user sees, with every kind of tokenizer."""
        assert self._table is not None
        special = {number: name for name, number in self._table.hidden.items() if number < self._vocab_size}
        names = [special[i].encode() if i in special else self._table[i]
                 for i in range(min(self._table.size, self._vocab_size))]
        names += [b""] * (self._vocab_size - len(names))  # no text has these tokens
        wrapper = _Vocabulary(names, sorted(special), self._eos[0])
        return llguidance().LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=sorted(self._eos))


def _lark(kind: str, value: Any) -> str:
    """A request's grammar as a Lark grammar. Raises ValueError: it is not JSON."""
    matcher = llguidance().LLMatcher
    if kind == "json_schema":
        made = json.loads(matcher.grammar_from_json_schema(value, defaults=_JSON))
        return "start: %json " + json.dumps(made["grammars"][0]["json_schema"])
    if kind == "choice":
        return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in value)
    if kind == "regex":
        text: str = json.loads(matcher.grammar_from_regex(value))["grammars"][0]["lark_grammar"]
        return text
    return str(value)


class _Vocabulary:
    """What llguidance asks of a tokenizer. Without forcing it compares bytes, and tokenizes no text."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos

    def __call__(self, text: str) -> list[int]:
        return []


@functools.cache
def llguidance() -> Any:
    """llguidance. Raises RequestError: it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise RequestError("a grammar needs llguidance, which is not installed", got=error,
                           hint='pip install "hal-runtime[constrained]"') from None
    return llguidance


@functools.cache
def threads() -> Any:
    """The threads of this process that compute masks; they wait without a load when there are none to compute."""
    return llguidance().LLExecutor()
