"""Requests from a file: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hal.errors import ConfigError, HalError, RequestError
from hal.sampling.params import SamplingParams

_PARAMETERS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Job:
    """Attributes: prompt: a text or token ids. origin: where it was given, for errors; "" on the command line."""

    prompt: str | list[int]
    params: SamplingParams
    origin: str = ""


def read_jobs(path: str, options: dict[str, Any]) -> list[Job]:
    """The requests in a JSON Lines file, "-" for standard input. Blank lines are skipped.

    Args:
        options: sampling parameters of lines that do not give their own.

    Raises:
        ConfigError: the file cannot be read. RequestError: a line is not a request; names the line.
    """
    try:
        if path == "-":
            return list(_parse("standard input", sys.stdin, options))
        with Path(path).open(encoding="utf-8") as lines:
            return list(_parse(path, lines, options))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the input file cannot be read", got=f"{path}: {error}",
                          expected='a JSON Lines file in UTF-8, or "-" for standard input') from None


def _parse(name: str, lines: Iterable[str], options: dict[str, Any]) -> Iterator[Job]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{name}, line {number}"
            try:
                yield _job(json.loads(line), options, origin)
            except HalError as error:
                raise at(error, origin) from None
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
                raise RequestError(f"{origin}: this is not JSON", got=f"{line.strip()[:80]!r}: {error}",
                                   expected='an object, such as {"prompt": "37+85=", "max_tokens": 8}') from None


def at(error: HalError, origin: str) -> HalError:
    """The same error, with the request's place in front."""
    error.what = f"{origin}: {error.what}"
    return error


def _job(data: object, options: dict[str, Any], origin: str) -> Job:
    if not isinstance(data, dict):
        raise RequestError("this is not an object", got=type(data).__name__, expected="an object with prompt or "
                           "prompt_token_ids")
    given = [name for name in ("prompt", "prompt_token_ids") if name in data]
    if len(given) != 1:
        raise RequestError("a request has either prompt or prompt_token_ids", got=" and ".join(given) or
                           f"neither, in {sorted(data)}")
    prompt = data.pop(given[0])
    if given[0] == "prompt" and not isinstance(prompt, str):
        raise RequestError("prompt is not a text", got=repr(prompt)[:80])
    if given[0] == "prompt_token_ids" and not (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
        raise RequestError("prompt_token_ids is not a list of integers", got=repr(prompt)[:80])
    unknown = sorted(data.keys() - _PARAMETERS)
    if unknown:
        raise RequestError("a request has keys that mean nothing here", got=", ".join(unknown),
                           expected=f"prompt, prompt_token_ids, {', '.join(sorted(_PARAMETERS))}")
    return Job(prompt, SamplingParams(**{**options, **data}), origin)
