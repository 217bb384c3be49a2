"""hal chat: talk with a model in the terminal"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hal.checkpoints.chat import require_template
from hal.cli import options, streams
from hal.cli.generate import with_defaults
from hal.errors import ConfigError, HalError
from hal.sampling.params import SamplingParams

if TYPE_CHECKING:
    from hal.engine.llm import LLM

EPILOG = """Ctrl-C ends a reply, and what there is of it stays in the conversation. /reset forgets the conversation,
/exit or Ctrl-D leaves. Without a terminal, each line of standard input is a message, and the exit code is 1 if one
was refused or its reply failed. A reply may take the rest of the context, unless --max-tokens is given."""
_MOST = 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the message of the system, before all others")
    parser.add_argument("--tools", type=options.path, metavar="FILE",
                        help="JSON file: a list of tools, which the chat template shows to the model")
    options.add_engine_options(parser, skip=())
    options.add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    tools = None if args.tools is None else _tools(args.tools)
    params = SamplingParams(**{"max_tokens": _MOST, **with_defaults(args)})
    from hal.engine.llm import LLM

    with LLM(**options.engine_options(args), progress=sys.stderr.isatty()) as llm:
        llm.generate([])  # refuses a model of embeddings
        require_template(llm.tokenizer, llm.config.model)
        options.load_adapters(llm, args)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # at the prompt, Ctrl-C may come again
        try:
            return _converse(llm, params, tools, args.system)
        finally:
            signal.signal(signal.SIGINT, before)


def _tools(path: str) -> list[Any]:
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("the file of tools cannot be read", got=f"{path}: {error}", expected="JSON") from None
    if not isinstance(tools, list):
        raise ConfigError("the file of tools holds no list", got=path, expected="a list of tools in JSON")
    return tools


def _converse(llm: LLM, params: SamplingParams, tools: list[Any] | None, system: str | None) -> int:
    """Returns the exit code. At a terminal it is 0, since the user has seen each error and could go on."""
    first = [] if system is None else [{"role": "system", "content": system}]
    messages, code = [*first], 0
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines and remembers them
        streams.say("Ctrl-C ends a reply, /reset forgets the conversation, /exit leaves.")
    while (text := _ask()) is not None:
        if text == "/exit":
            break
        if text == "/reset":
            messages = [*first]
        elif text.startswith("/") and " " not in text:
            streams.say(f"hal: there is no command {text}; there are /reset and /exit")
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": _reply(llm, messages, params, tools)})
            except HalError as error:
                if llm.health() is not None:
                    raise
                messages.pop()
                streams.complain(error)
                code = int(not sys.stdin.isatty())
    return code


def _ask() -> str | None:
    """The next message, without the spaces around it; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            streams.say("\n(Ctrl-D or /exit leaves)")


def _reply(llm: LLM, messages: list[dict[str, str]], params: SamplingParams, tools: list[Any] | None) -> str:
    """Print a reply as it grows. Returns its text. Raises the error of a reply that failed."""
    shown, text = 0, ""
    with _noted() as stopped:
        replies = llm.stream(llm.chat_ids(messages, tools=tools), params)
        for output in replies:
            text = output.text
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
            if stopped:
                replies.close()  # type: ignore[attr-defined]  # a generator
                break
    print(" [stopped]" if stopped else "")
    if output.error is not None:
        raise output.error
    return text


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Within the block SIGINT is noted in the list, and interrupts nothing: an engine whose call is interrupted in the
    middle would have to be restarted. The third one ends the program."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) == 3:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["EPILOG", "add_arguments", "run"]
