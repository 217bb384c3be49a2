"""The printed results of a command's requests, each written as soon as it is known."""

from __future__ import annotations

import json
import math
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hal.cli import streams
from hal.cli.batch import RequestId
from hal.errors import HalError

if TYPE_CHECKING:
    from hal.engine.request_output import RequestOutput, TokenLogprob


class Results:
    """Context manager that writes the results of several requests to the standard output: each one when it is known, or
    all in the order of the requests. In the second case, results that still wait for an earlier one are written when
    the block ends, also when an error ends it.

    Args:
        total: the number of requests. as_json: write one object a line. ordered: write in the order of the requests.
        with_traceback: show where errors were raised.

    Attributes:
        failures: the number of requests that have no result, or whose output ended with an error.
    """

    def __init__(self, total: int, *, as_json: bool, ordered: bool, with_traceback: bool = False) -> None:
        self.total, self.as_json, self.ordered, self.with_traceback = total, as_json, ordered, with_traceback
        self.failures = 0
        self._held: dict[int, str] = {}
        self._next = 0

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if not isinstance(error, OSError):  # this one may say that the output cannot be written
            for index in sorted(self._held):
                sys.stdout.write(self._held.pop(index))
            sys.stdout.flush()

    def finish(self, index: int, output: RequestOutput, name: RequestId | None = None) -> None:
        """Write an output. `index`: the request's place. `name`: the user's own id, of a line's key "id". For an output
        that ended with an error see `report`."""
        self.report(output)
        if self.as_json:
            self._put(index, self._line(index, name, to_json(output)))
        elif self.total == 1:
            self._put(index, text(output) + "\n")
        else:
            prompt = output.prompt if output.prompt is not None else _ids(output.prompt_token_ids)
            self._put(index, f"> {prompt}\n{text(output)}\n")

    def write(self, index: int, name: RequestId | None, content: dict[str, Any]) -> None:
        """Write a result of another kind than an output of tokens, as JSON."""
        self._put(index, self._line(index, name, content))

    def report(self, output: RequestOutput) -> None:
        """Count an output that ended with an error, and say why."""
        if output.error is not None:
            self.failures += 1
            streams.complain(output.error, with_traceback=self.with_traceback)

    def fail(self, index: int, error: HalError, name: RequestId | None = None) -> None:
        """Write an error to the standard error, and with `as_json` into the request's line too."""
        self.failures += 1
        streams.complain(error, with_traceback=self.with_traceback)
        self._put(index, self._line(index, name, {"finish_reason": "error", "error": str(error)})
                  if self.as_json else "")

    def _line(self, index: int, name: RequestId | None, content: dict[str, Any]) -> str:
        whole = {"index": index, **({} if name is None else {"id": name}), **content}
        return json.dumps(whole, ensure_ascii=not streams.takes_all_characters(), allow_nan=False) + "\n"

    def _put(self, index: int, lines: str) -> None:
        if not self.ordered:
            sys.stdout.write(lines)
        else:
            self._held[index] = lines
            while self._next in self._held:
                sys.stdout.write(self._held.pop(self._next))
                self._next += 1


def text(output: RequestOutput) -> str:
    """The text of an output, or its token ids if there is no tokenizer."""
    return output.text or (_ids(output.token_ids) if output.prompt is None else "")


def _ids(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def to_json(output: RequestOutput) -> dict[str, Any]:
    """The JSON object of an output, with logprobs if they were asked for, and with the error if there was one."""
    line: dict[str, Any] = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids,
                            "token_ids": output.token_ids, "text": output.text, "finish_reason": output.finish_reason}
    if output.stop_reason is not None:
        line["stop_reason"] = output.stop_reason
    if output.error is not None:
        line["error"] = str(output.error)
    if output.logprobs is not None:
        line["logprobs"] = [_logprob(entry) for entry in output.logprobs]
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [entry and _logprob(entry) for entry in output.prompt_logprobs]
    return line


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"token_id": entry.token_id, "logprob": _finite(entry.logprob), "rank": entry.rank,
            "top": [[token, _finite(value)] for token, value in entry.top]}


def _finite(value: float) -> float | None:
    """A number that JSON can hold: JSON has no infinity."""
    return value if math.isfinite(value) else None
