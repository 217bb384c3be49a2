"""The command line: `hal COMMAND`. Nothing loads torch before a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hal.cli import streams
from hal.cli.interrupts import WORDS, raised_once
from hal.errors import ConfigError, HalError

_SIGNALLED = 128  # a shell adds the number of the signal that ended a command to this


class _Version(argparse.Action):
    """Looked up when asked for: reading the installed version takes longer than the rest of the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        try:
            print("hal", version("hal-runtime"))
        except PackageNotFoundError:
            print("hal (a source tree that is not installed)")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    from hal.cli import (
        bench,
        bisect,
        certify,
        chat,
        compile,
        conformance,
        embed,
        env,
        generate,
        record,
        reduce,
        replay,
        serve,
    )

    parser = argparse.ArgumentParser(prog="hal", description="Run language models on any device with a hal backend.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (generate, chat, serve, embed, env, bench, compile, certify, conformance, record, replay, bisect,
                   reduce):
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").split("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=summary, description=summary, epilog=module.EPILOG,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("--traceback", action="store_true", help="show where an error was raised (or HAL_DEBUG=1)")
        module.add_arguments(command)
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 after an error, which is on stderr; 2 for wrong usage; 128 + the signal's number after SIGINT, SIGTERM or
        SIGHUP; 141 when the reader of stdout went away.
    """
    args = argparse.Namespace(traceback=False)
    with raised_once() as received:
        try:
            streams.fill()
            status = _run(args, argv)
            sys.stdout.flush()
            return status
        except BaseException as error:
            if received:  # the interrupt may have become another exception on its way here
                streams.forget(sys.stdout)
                streams.say(f"hal: {WORDS[received[0]]}")
                return _SIGNALLED + received[0]
            if isinstance(error, KeyboardInterrupt):
                return _SIGNALLED + signal.SIGINT
            if isinstance(error, BrokenPipeError) and streams.reader_is_gone():
                streams.forget(sys.stdout)
                return _SIGNALLED + signal.SIGPIPE
            shown = _explain(error)
            if shown is None:
                raise
            streams.complain(shown, with_traceback=args.traceback)
            return 1
        finally:
            streams.forget(sys.stderr)


def _run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        parser.parse_args(argv, args)
        if not hasattr(args, "run"):
            parser.print_help()
            return 0
        args.traceback = args.traceback or os.environ.get("HAL_DEBUG") == "1"
        if getattr(args, "wire", None) == "none" and os.environ.get("RANK", "0") != "0":
            sys.stdout = io.StringIO()  # every rank of a launcher runs this; rank 0 alone reports
        if any(":" in (getattr(args, name, None) or "") for name in ("device", "backend", "against")):
            _look_here()
        status: int = args.run(args)
        return status
    except SystemExit as stop:  # of usage_error, --help and --version
        return stop.code if isinstance(stop.code, int) else 2


def _look_here() -> None:
    """Let "module:attribute" name a module of the current folder, as with `python -m hal`."""
    if getattr(sys.flags, "safe_path", False):  # `python -P` or PYTHONSAFEPATH forbids it (Python 3.11)
        return
    with contextlib.suppress(FileNotFoundError):  # the folder was deleted
        here = os.getcwd()
        if sys.path[:1] not in ([""], [here]):
            sys.path.insert(0, here)


def _explain(error: BaseException) -> HalError | None:
    if isinstance(error, OSError):
        streams.forget(sys.stdout)
        return ConfigError("the system refuses", got=error, hint="--traceback shows where")
    if isinstance(error, ImportError):
        return _foreign_package()
    return error if isinstance(error, HalError) else None


def _foreign_package() -> HalError | None:
    """The likely reason of a failed import: one of our packages was replaced by another distribution's."""
    from hal.cli.identity import check_packages

    for package in check_packages():
        if package.problem:
            return ConfigError(package.problem, got=package.location, expected=package.expected, hint=package.hint)
    return None


__all__ = ["build_parser", "main"]
