"""From token ids to text as they come, and the texts that end an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hal.errors import ModelLoadError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_CONTEXT = 6  # tokens of the prompt that the first output tokens are decoded with
_HALF = "\ufffd"  # what a tokenizer makes of bytes that are no whole character


def load_tokenizer(directory: str) -> Any:
    """transformers' tokenizer of a checkpoint, or None when the directory has none. Raises ModelLoadError."""
    if not any((Path(directory) / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes a tokenizer raise
        raise ModelLoadError("the tokenizer cannot be read", got=f"{directory}: {type(error).__name__}: {error}",
                             hint="copy the checkpoint's tokenizer files again, or remove them and give token ids"
                             ) from error


class TextStream:
    """The text of one output. Tokens are decoded with those before them, since a tokenizer may join them with a space
    or into one character.

    Args:
        stops: texts that end the output.

    Attributes:
        text: complete characters so far, cut before a stop text.
        stopped: a stop text was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.stopped = "", False
        starts = [max(len(prompt) - _CONTEXT - more, 0) for more in range(4)]  # a character has up to 4 bytes
        whole = (prompt[at:] for at in starts if not self._decode(prompt[at:]).startswith(_HALF))
        self._ids = list(next(whole, prompt[starts[0]:]))
        self._begin, self._read = 0, len(self._ids)  # text up to `_read` is out; decoding starts at `_begin`

    @property
    def safe(self) -> str:
        """`text` without an end that may turn out to be the beginning of a stop text."""
        if self.stopped or not self.stops:
            return self.text
        held = max(n for stop in self.stops for n in range(len(stop)) if self.text.endswith(stop[:n]))
        return self.text[:len(self.text) - held]

    def append(self, token_ids: Sequence[int], *, last: bool = False) -> None:
        """`last`: nothing follows, so half a character is shown as what it is."""
        if self.stopped:
            return
        self._ids += token_ids
        known = self._decode(self._ids[self._begin:self._read])
        now = self._decode(self._ids[self._begin:])
        begin = self._read
        if not now.startswith(known):  # the prompt ended in a character that the output completes
            known, begin = known.rstrip(_HALF), self._begin
        if len(now) <= len(known) or (now.endswith(_HALF) and not last):
            return
        before = len(self.text)
        self.text += now[len(known):]
        self._begin, self._read = begin, len(self._ids)
        found = [at for stop in self.stops if (at := self.text.find(stop, max(before - len(stop) + 1, 0))) >= 0]
        if found:
            self.text, self.stopped = self.text[:min(found)], True

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
