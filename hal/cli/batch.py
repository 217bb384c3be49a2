"""Requests from a file: one JSON object a line."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from hal.engine.prompts import samples
from hal.errors import ConfigError, HalError, RequestError
from hal.sampling.params import SamplingParams

_PARAMETERS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_LONGEST_LINE = 1 << 26  # bytes; a binary file may have no line end at all
_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
RequestId = str | int


@dataclass(frozen=True, slots=True)
class Job:
    """Attributes:
        prompt: a text or token ids. origin: the place of the request in its file, for errors; "" on the command line.
        id: the user's name of the request, repeated in the output.
    """

    prompt: str | list[int]
    params: SamplingParams
    origin: str = ""
    id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that is not a request. Attributes: error: names the line. id: the line's id, if it has a usable one."""

    error: HalError
    id: RequestId | None = None


def argument_jobs(prompts: list[str], params: SamplingParams | None) -> list[Job]:
    """The requests of the command line. Python leaves the bytes of a character as they are when the locale's encoding
    does not have it; they are decoded as UTF-8 here."""
    return [Job(_decoded(prompt), params or SamplingParams()) for prompt in prompts]


def one_output_each(job: Job | Refused) -> list[Job | Refused]:
    """A job for each of the `n` outputs that a job asks for."""
    return [job] if isinstance(job, Refused) else [dataclasses.replace(job, params=one) for one in samples(job.params)]


def _decoded(argument: str) -> str:
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:  # the prompt is not UTF-8, or the locale's encoding has read other characters
        return argument


def read_jobs(path: str, options: dict[str, Any] | None, *, plain: bool = False) -> list[Job | Refused]:
    """The requests in a JSON Lines file, "-" for standard input: UTF-8 in any locale, with or without a byte order
    mark. Blank lines are skipped.

    Args:
        options: sampling parameters of lines that do not give their own; None: a line gives none.
        plain: a line is a text, and no JSON.

    Raises:
        ConfigError: the file cannot be read, or does not consist of lines.
    """
    try:
        if path != "-":
            with open(path, "rb") as file:
                return list(_parse(path, file, options, plain))
        if sys.stdin is None:
            raise ConfigError("the standard input is closed", expected="requests, since --input - was given")
        return list(_parse("standard input", sys.stdin.buffer, options, plain))
    except OSError as error:
        raise ConfigError("the input file cannot be read", got=f"{path}: {error}",
                          expected='a JSON Lines file in UTF-8, or "-" for standard input') from None


def _parse(name: str, file: BinaryIO, options: dict[str, Any] | None, plain: bool) -> Iterator[Job | Refused]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if number == 1 and line.startswith(_UTF16):
            raise ConfigError("the input file is not UTF-8", got=f"{name}: UTF-16, by its first two bytes",
                              expected="a JSON Lines file in UTF-8")
        if len(line) == _LONGEST_LINE:
            raise ConfigError("the input file has a line that is too long", got=f"{name}, line {number}",
                              expected=f"less than {_LONGEST_LINE >> 20} MiB")
        line = line.strip()
        if line and line != codecs.BOM_UTF8:
            origin = f"{name}, line {number}"
            yield _plain(line, origin) if plain else _line(line, options, origin)


def _plain(line: bytes, origin: str) -> Job | Refused:
    try:
        return Job(_text(line), SamplingParams(), origin)
    except RequestError as error:
        return Refused(at(error, origin))


def _line(line: bytes, options: dict[str, Any] | None, origin: str) -> Job | Refused:
    found: RequestId | None = None
    try:
        data = _object(line)
        found = _id(data)
        return Job(*_request(data, options), origin, found)
    except HalError as error:
        return Refused(at(error, origin), found)
    except RecursionError:  # raised by the parser, or by an error text that shows a deep value
        return Refused(RequestError(f"{origin}: this is nested too deeply", got=repr(line[:80])), found)


def at(error: HalError, origin: str) -> HalError:
    """The same error, whose text begins with the place of the request."""
    if origin:
        error.what = f"{origin}: {error.what}"
    return error


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")  # in a file joined from several, any line may begin with a byte order mark
    except UnicodeDecodeError as error:
        raise RequestError("this is not UTF-8", got=f"byte 0x{line[error.start]:02x} at {error.start}: "
                           f"{line[max(error.start - 20, 0):error.start + 20]!r}") from None


def _object(line: bytes) -> dict[str, Any]:
    text = _text(line)
    try:
        data = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RequestError:
        raise
    except ValueError as error:  # a number of thousands of digits raises this too
        raise RequestError("this is not JSON", got=f"{text[:80]!r}: {error}",
                           expected='an object, such as {"prompt": "37+85=", "max_tokens": 8}') from None
    if not isinstance(data, dict):
        raise RequestError("this is not an object", got=type(data).__name__, expected="an object with prompt or "
                           "prompt_token_ids")
    return data


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise RequestError("a key occurs twice", got=next(repr(n)[:80] for n in names if names.count(n) > 1))
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _id(data: dict[str, Any]) -> RequestId | None:
    found = data.pop("id", None)
    if isinstance(found, bool) or not isinstance(found, str | int | None):
        raise RequestError("id is neither a text nor an integer", got=repr(found)[:80])
    return found


def _request(data: dict[str, Any], options: dict[str, Any] | None) -> tuple[str | list[int], SamplingParams]:
    given = [name for name in ("prompt", "prompt_token_ids") if name in data]
    if len(given) != 1:
        raise RequestError("a request has either prompt or prompt_token_ids", got=" and ".join(given) or
                           f"neither, in {sorted(data)}")
    prompt = data.pop(given[0])
    if given[0] == "prompt" and not isinstance(prompt, str):
        raise RequestError("prompt is not a text", got=repr(prompt)[:80])
    if given[0] == "prompt_token_ids" and not (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
        raise RequestError("prompt_token_ids is not a list of integers", got=repr(prompt)[:80])
    known = _PARAMETERS if options is not None else frozenset[str]()
    unknown = sorted(data.keys() - known)
    if unknown:
        raise RequestError("a request has keys that mean nothing here", got=", ".join(unknown),
                           expected=", ".join(["id", "prompt", "prompt_token_ids", *sorted(known)]))
    return prompt, SamplingParams(**{**(options or {}), **data})
