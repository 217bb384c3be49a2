"""Text of a checkpoint's tokenizer: loading it, text to token ids, token ids to text as they come, and stop texts.

Streamed text, final text and the text in which stop texts are searched have one definition. Each token stands for
bytes, which do not depend on the tokens around it, and a text is the UTF-8 decoding of its tokens' bytes. `TextStream`
says what follows from that.

Most incremental decoders, such as the DecodeStream of tokenizers, compare the decoded text of n tokens with that of
n + 1. This has two faults. A decoder with byte fallback turns a whole run of bytes into U+FFFD when one invalid byte
follows, so text changes that was already shown. And an output that goes on ending in U+FFFD is held back without a
limit, and decoded again with each token.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hal.checkpoints.gguf import is_gguf, open_gguf
from hal.checkpoints.tokenizer import known_class, own_code, settings_of
from hal.engine.stops import Stop
from hal.errors import ModelLoadError, RequestError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_LOOKS_AHEAD = ("BPEDecoder", "CTC")  # decoders in which a token's text depends on its neighbours
_SEARCHED = 4096  # one of the first token ids is an ordinary word or character
_REPLACED = "\ufffd"  # replaces bytes that are not UTF-8
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # the name of a byte, in vocabularies with byte fallback
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Byte-level vocabularies name a byte by its Latin-1 character, or by one from U+0100 on where that is not printable.
_ALPHABET = {chr(byte): byte for byte in _SHOWN} | {
    chr(0x100 + i): byte for i, byte in enumerate(b for b in range(256) if b not in _SHOWN)}


def load_tokenizer(directory: str, *, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of a checkpoint, or None when the directory has none. Standard input is not read. Of a
    GGUF file, tokenizer files beside it come first, and then the file's own vocabulary.

    The tokenizer does not clean up spaces, whatever the checkpoint says. That clean-up rewrites text that was already
    shown (" n" and "'t" become "n't"), and releases of transformers differ in which tokenizers do it.

    Args:
        trust_remote_code: run the checkpoint's own Python where its tokenizer is made of that.

    Raises:
        ModelLoadError: the files are damaged, or need code that is not trusted.
    """
    file = Path(directory).name if is_gguf(directory) else None
    directory = directory if file is None else str(Path(directory).parent)
    found: dict[str, Any] = {}
    settings = settings_of(Path(directory))
    if not any((Path(directory) / name).is_file() for name in _FILES):
        if file is None or open_gguf(Path(directory) / file).get("tokenizer.ggml.tokens") is None:
            return None
        found["gguf_file"] = file
    else:
        found = known_class(Path(directory), *settings)
    from transformers import AutoTokenizer

    own = None if trust_remote_code else own_code(*settings)
    if own is not None:
        raise ModelLoadError("the tokenizer is Python code of the checkpoint, and that code is not trusted",
                             got=f"{directory}: {own}",
                             hint="read that code; to run it, give --trust-remote-code (trust_remote_code=True); "
                                  "or remove the tokenizer's files and give token ids")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code,
                                                  **found)
        tokenizer.clean_up_tokenization_spaces = False
        kinds = _decoder_kinds(tokenizer)
        TokenBytes.of(tokenizer)
    except Exception as error:  # a damaged file may make a tokenizer raise any error
        raise ModelLoadError("the tokenizer cannot be read", got=f"{directory}: {type(error).__name__}: {error}",
                             hint="copy the checkpoint's tokenizer files again, or remove them and give token ids"
                             ) from error
    if unusable := kinds.intersection(_LOOKS_AHEAD):
        raise ModelLoadError("the tokenizer's decoder cannot give a token's text without the tokens around it",
                             got=", ".join(sorted(unusable)), expected="ByteLevel, ByteFallback, Metaspace, WordPiece",
                             hint="remove the tokenizer's files and give token ids")
    return tokenizer


def _decoder_kinds(tokenizer: Any) -> set[str]:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    declared = json.loads(decoder.__getstate__())
    return {part["type"] for part in declared.get("decoders", [declared])}


class TokenBytes(dict[int, bytes]):
    """The bytes that each token adds to a text that has begun. Special tokens add none: a text does not show them.

    An entry is made when it is first asked for: it is the text that the tokenizer's decoder appends to one ordinary
    token. Where that text has U+FFFD, because the token holds part of a character, the token's name gives the bytes.
    """

    _known: weakref.WeakKeyDictionary[Any, TokenBytes] = weakref.WeakKeyDictionary()

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = weakref.proxy(tokenizer)  # the table lives as long as the tokenizer
        self._ordinary = next(([i] for i in range(_SEARCHED) if self._decode([i]).isalnum()), [])
        self._begun = self._decode(self._ordinary)

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """The tokenizer's only table."""
        if tokenizer not in cls._known:
            cls._known[tokenizer] = cls(tokenizer)
        return cls._known[tokenizer]

    def __missing__(self, token: int) -> bytes:
        text = self._decode([*self._ordinary, token])
        begun = text.startswith(self._begun)  # false where an invalid run of bytes took the ordinary token
        self[token] = found = self._encode(token, text[len(self._begun):] if begun else self._decode([token]))
        return found

    def first(self, token: int) -> bytes:
        """The bytes of a token that begins a text: decoders drop a space there."""
        return self._encode(token, self._decode([token]))

    def plain(self, text: str) -> list[int]:
        """The ids of a text, without those that the tokenizer puts before it."""
        return token_ids(self._tokenizer, text, add_special_tokens=False)

    @property
    def size(self) -> int:
        """The number of the tokenizer's tokens."""
        return len(self._tokenizer)

    @functools.cached_property
    def hidden(self) -> dict[str, int]:
        """Special tokens, which a text does not show, by their names."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        ids = {*self._tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return {self._tokenizer.convert_ids_to_tokens(i): i for i in sorted(ids) if not self._decode([i])}

    @functools.cached_property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        whole = token_ids(self._tokenizer, "a")
        plain = self.plain("a")
        starts = (at for at in range(len(whole) - len(plain) + 1) if whole[at:at + len(plain)] == plain)
        return whole[:next(starts, 0)] if plain else []

    def _encode(self, token: int, text: str) -> bytes:
        if _REPLACED in text:
            name = self._tokenizer.convert_ids_to_tokens(token)
            if isinstance(name, bytes):  # a checkpoint's own tokenizer that is made from tiktoken's
                return name
            if byte := _BYTE.fullmatch(name):
                return bytes([int(byte[1], 16)])
            if all(char in _ALPHABET for char in name):
                return bytes(_ALPHABET[char] for char in name)
        return text.encode()

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """What the tokenizer gives for a text. Raises RequestError: it has no tokens for it."""
    try:
        return list(tokenizer(text, verbose=False, **options).input_ids)
    except Exception as error:  # tokenizers raises Exception itself, and a checkpoint's own code anything
        raise RequestError("the tokenizer cannot encode the text", got=f"{type(error).__name__}: {error!s:.200}",
                           expected="text of which the vocabulary has every part",
                           hint="give token ids, or copy the checkpoint's tokenizer files again") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids, with the special tokens that the tokenizer puts before it (most often one, BOS). A text that
    begins with the names of these tokens, as chat templates write it, gets no second ones."""
    ids, prefix = token_ids(tokenizer, text), TokenBytes.of(tokenizer).prefix
    again = prefix and ids[:2 * len(prefix)] == 2 * prefix
    return ids[len(prefix):] if again else ids


def hidden_stops(tokenizer: Any, stops: Iterable[str]) -> tuple[int, ...]:
    """The ids of those stop texts that are the names of special tokens. No text shows them, so they end an output by
    their ids.

    Raises:
        RequestError: a stop text holds such a name beside other text, and could never be found.
    """
    hidden = TokenBytes.of(tokenizer).hidden
    for stop in stops:
        name = None if stop in hidden else next((name for name in hidden if name in stop), None)
        if name is not None:
            raise RequestError(f"a stop text holds the special token {name}, which a text does not show",
                               got=repr(stop), expected="text without special tokens, or one special token by itself",
                               param="stop")
    return tuple(hidden[stop] for stop in stops if stop in hidden)


class TextStream:
    """The text of one output, from its tokens as they come.

    The text is that of the output's bytes, decoded as UTF-8 with one U+FFFD for each invalid sequence. Where the bytes
    are valid, prompt and output together read as the tokenizer decodes them at once. A character that the prompt begins
    and the output completes belongs to the output; one that the output does not complete belongs to the prompt.

    How the tokens are split over calls of `append` makes no difference. `text` holds back an incomplete character,
    which is at most three bytes, until it is complete, or is found to be invalid, or nothing follows. `safe` also holds
    back an end that may be the beginning of a stop text, which is at most the length of that stop text less one
    character. A stop text ends the text before it. Where there are several, the one that is complete at the earliest
    character counts, and of those the longest.

    The time is linear in the number of tokens, and with stop texts in the number of characters times that of stop
    texts; the lengths of stop texts do not matter. Reading `text` or `safe` copies the text.

    Args:
        prompt: the ids of the tokens before the output.
        stops: texts that end the output.
        special: show special tokens by their names. keep_stop: the text has the stop text that ended it.

    Attributes:
        stop: the stop text that was found, or None. `stopped`: there is one; later tokens are ignored.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Iterable[str], *, special: bool = False,
                 keep_stop: bool = False) -> None:
        self.tokenizer, self._keep_stop = tokenizer, keep_stop
        self.stop: str | None = None
        self._bytes = TokenBytes.of(tokenizer)
        self._names = {i: name.encode() for name, i in self._bytes.hidden.items()} if special else {}
        self._parts: list[str] = []
        self._stops = [Stop(stop) for stop in stops]
        self._first_chars = {stop.text[0] for stop in self._stops}
        self._held = 0  # characters that may begin a stop text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token in reversed(prompt):
            tail = self._bytes[token] + tail
            if len(tail) >= 3:  # the longest incomplete character
                break
        self._begun = bool(tail)
        self._utf8.decode(tail)
        # What the prompt shows of a character that it ends inside.
        self._split = self._utf8.getstate()[0].decode(errors="replace")

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    @property
    def text(self) -> str:
        """Complete characters so far, up to a stop text."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    @property
    def safe(self) -> str:
        """`text` without an end that may turn out to be the beginning of a stop text."""
        text = self.text
        return text[:len(text) - self._held]

    def append(self, token_ids: Sequence[int], *, last: bool = False) -> None:
        """Add the text of some tokens. `last`: no token follows, so an incomplete character is shown as U+FFFD."""
        if self.stopped:
            return
        new = self._utf8.decode(b"".join(map(self._take, token_ids)), last)
        if self._split and new:
            new, self._split = new.removeprefix(self._split), ""
        if self._held or not self._first_chars.isdisjoint(new):
            new = self._up_to_stop(new)
        self._parts.append(new)
        if self.stopped:
            self._parts, self._held = [self.text if self._keep_stop else self.safe], 0

    def _take(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token]
        if self._begun:
            return self._bytes[token]
        self._begun = bool(self._bytes[token])
        return self._bytes.first(token)

    def _up_to_stop(self, new: str) -> str:
        """`new` up to the end of the first stop text; that stop text is then held back."""
        for at, char in enumerate(new):
            self._held = max(stop.advance(char) for stop in self._stops)
            found = max((stop.text for stop in self._stops if stop.seen == len(stop.text)), default=None, key=len)
            if found is not None:
                self.stop, self._held = found, len(found)
                return new[:at + 1]
        return new
