"""The command line: `hal COMMAND`. Nothing loads torch before a command needs it."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hal.errors import ConfigError, HalError, WorkerError

_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE


class _Version(argparse.Action):
    """Looked up when asked for: reading the installed version takes longer than the rest of the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        try:
            print("hal", version("hal-runtime"))
        except PackageNotFoundError:
            print("hal (a source tree that is not installed)")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    from hal.cli import bench, bisect, conformance, env, generate, record, replay

    parser = argparse.ArgumentParser(prog="hal", description="Run language models on any device with a hal backend.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (generate, env, bench, conformance, record, replay, bisect):
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
        0; 1 after an error, which is on stderr; 2 for wrong usage; 130 when interrupted; 141 when the reader of stdout
        went away.
    """
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a model says need not fit the terminal's encoding
    if getattr(args, "wire", None) == "none" and os.environ.get("RANK", "0") != "0":
        sys.stdout = io.StringIO()  # every rank runs this; the first one speaks
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # of usage_error
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return _BROKEN_PIPE
    except (HalError, ImportError, OSError) as error:
        shown = _explain(error)
        if shown is None:
            raise
        if args.traceback or os.environ.get("HAL_DEBUG") == "1":
            traceback.print_exception(error)
            if isinstance(error, WorkerError) and error.remote_traceback:
                print(f"on rank {error.rank}:\n{error.remote_traceback}", file=sys.stderr)
        print(f"hal: error: {shown}", file=sys.stderr)
        return 1


def _explain(error: Exception) -> HalError | None:
    if isinstance(error, OSError):
        _forget_stdout()
        return ConfigError("the system refuses", got=error, hint="--traceback shows where")
    return error if isinstance(error, HalError) else _foreign_package()


def _foreign_package() -> HalError | None:
    """The likely reason of a failed import: one of our packages was replaced by another distribution's."""
    from hal.cli.identity import check_packages

    for package in check_packages():
        if package.problem:
            return ConfigError(package.problem, got=package.location, expected=package.expected, hint=package.hint)
    return None


def _forget_stdout() -> None:
    """Where nobody takes it, let the interpreter's last flush go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["build_parser", "main"]
