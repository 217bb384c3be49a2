"""What the engine yields, in the form of OpenAI's responses and chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from hal.engine.llm import LLM
from hal.engine.request_output import RequestOutput, TokenLogprob
from hal.engine.text import TokenBytes
from hal.serve.protocol import Call
from hal.serve.tools import CallReader


class Answer:
    """A choice of a response, which grows.

    Args:
        call: of the request. index: of the choice. chat: whether it is a message or a text.
    """

    def __init__(self, llm: LLM, call: Call, index: int, chat: bool) -> None:
        self.llm, self.call, self.index, self.chat = llm, call, index, chat
        self.output: RequestOutput | None = None
        self._calls = None if call.tools.form is None else CallReader(call.tools)
        self._text = self._tokens = self._offset = 0  # of which chunks have been made
        self._is_text = self._calls is None and call.top is None and llm.tokenizer is not None
        before, after = ('"delta": {"content": ', "}") if chat else ('"text": ', "")
        self._before = f'{{"index": {index}, {before}'
        self._after = f'{after}, "logprobs": null, "finish_reason": null}}'

    def json(self, output: RequestOutput) -> str | None:
        """`chunk` as JSON. Most chunks hold a text alone, for which a general encoder would take several times as long.
        """
        if not self._is_text or self.output is None or output.finish_reason is not None:
            choice = self.chunk(output)
            return None if choice is None else json.dumps(choice)
        text, self.output = output.text[self._text:], output
        self._text, self._tokens = len(output.text), len(output.token_ids)
        return self._before + encode_basestring_ascii(text) + self._after if text else None

    def chunk(self, output: RequestOutput) -> dict[str, Any] | None:
        """The part of the choice that is new; None where there is nothing to show."""
        first, self.output = self.output is None, output
        text, tokens = output.text[self._text:], output.token_ids[self._tokens:]
        logprobs = output.logprobs[self._tokens:] if output.logprobs is not None else []
        self._text, self._tokens = len(output.text), len(output.token_ids)
        if first and self.call.echo:
            prompt = output.prompt_token_ids
            text = self._prompt_text(output) + text
            known = [] if output.prompt_logprobs is None else output.prompt_logprobs
            logprobs = [*(each or TokenLogprob(prompt[0], float("nan"), 0) for each in known), *logprobs]
        calls: list[dict[str, Any]] = []
        if self._calls is not None:
            text, calls = self._calls.read(text, output.finish_reason is not None)
        bare = tokens if self.llm.tokenizer is None else []  # then nothing but token ids can be shown
        if not (text or calls or bare or logprobs or first or output.finish_reason):
            return None
        choice: dict[str, Any] = {"index": self.index}
        if self.chat:
            choice["delta"] = {**({"role": "assistant"} if first else {}), **({"tool_calls": calls} if calls else {}),
                               "content": text if text or not calls else None}
        else:
            choice["text"] = text
        choice["logprobs"] = None if self.call.top is None else self._logprobs(logprobs)
        called = self._calls is not None and self._calls.count and output.finish_reason == "stop"
        choice["finish_reason"] = "tool_calls" if called else output.finish_reason
        if bare:
            choice["token_ids"] = bare
        if output.stop_reason is not None:
            choice["stop_reason"] = output.stop_reason
        return choice

    def choice(self, output: RequestOutput) -> dict[str, Any]:
        """The whole choice."""
        choice = self.chunk(output)
        assert choice is not None
        if self.chat:
            choice["message"] = choice.pop("delta")
            for call in choice["message"].get("tool_calls", ()):
                del call["index"]
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        tokenizer = self.llm.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode(output.prompt_token_ids))

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.chat:
            return {"content": [{**self._token(each.token_id, each.logprob), "top_logprobs": [
                self._token(*pair) for pair in each.top]} for each in found]}
        tokens = [self._name(each.token_id) for each in found]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        known = [each.rank > 0 for each in found]  # the first token of a prompt has none
        return {"tokens": tokens, "text_offset": offsets,
                "token_logprobs": [each.logprob if ok else None for each, ok in zip(found, known, strict=True)],
                "top_logprobs": [{self._name(token): logprob for token, logprob in each.top} if ok else None
                                 for each, ok in zip(found, known, strict=True)]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": logprob, "bytes": list(self._bytes(token))}

    def _bytes(self, token: int) -> bytes:
        return b"" if self.llm.tokenizer is None else TokenBytes.of(self.llm.tokenizer)[token]

    def _name(self, token: int) -> str:
        """A token's text; its name where it has no text, such as a special token."""
        shown = self._bytes(token).decode(errors="replace")
        if shown or self.llm.tokenizer is None:
            return shown or f"token_id:{token}"
        return str(self.llm.tokenizer.convert_ids_to_tokens(token))


def usage(outputs: Sequence[RequestOutput], num_prompts: int) -> dict[str, Any]:
    """The numbers of tokens. Each prompt counts once, however many choices it has."""
    each = len(outputs) // num_prompts
    prompt = sum(len(output.prompt_token_ids) for output in outputs[::each])
    made = sum(len(output.token_ids) for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
