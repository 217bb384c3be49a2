"""Runs of the installed `hal` command in processes with standard streams of their own, without the seconds that each
would take to load torch: one process has loaded it, and is forked for every run."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

SCRIPT = Path(sysconfig.get_path("scripts")) / "hal"
CLOSED, BROKEN = "closed", "broken"  # a descriptor that is not open; a pipe that nobody reads
READ_ONLY = "read-only"  # a null device that is open for reading


@dataclass(frozen=True, slots=True)
class Ended:
    status: int  # negative: the signal's number
    out: bytes
    err: str


class Forks:
    """`run(*args)` as a shell would run `hal` with these arguments."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        import forked  # not where this file is a script

        self._server = forked.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True)

    def run(self, *args: str, cwd: Path | None = None, stdin: str = os.devnull, stdout: str = "", stderr: str = "",
            encoding: str = "utf-8", kill: signal.Signals | None = None,
            when: Callable[[bytes, int], bool] = lambda out, pid: out != b"") -> Ended:
        """
        Args:
            stdin, stdout, stderr: a path, CLOSED, BROKEN or READ_ONLY; by default the outputs go to files that are read
                here.
            encoding: of the standard streams, as the locale or PYTHONIOENCODING would choose it.
            kill: a signal to send once `when` is true of what has come on stdout and of the process's id.
        """
        out, err = self.scratch / "stdout", self.scratch / "stderr"
        for path in (out, err):
            path.write_bytes(b"")
        streams = [stdin, stdout or str(out), stderr or str(err)]
        request = {"args": args, "cwd": str(cwd or self.scratch), "streams": streams, "encoding": encoding}
        self._send(request)
        pid = self._receive()
        if kill is not None:
            end = time.monotonic() + 120
            while not when(out.read_bytes(), pid) and time.monotonic() < end:
                time.sleep(0.01)
            os.kill(pid, kill)
        self._send("wait")
        return Ended(self._receive(), out.read_bytes(), err.read_text())

    def _send(self, value: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(value) + "\n")
        self._server.stdin.flush()

    def _receive(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _serve() -> None:
    # What takes seconds to load: all that these commands import, and what a step imports.
    from hal import LLM
    from hal.cli import measure  # noqa: F401
    from hal.conformance.case import all_cases
    from hal.contracts.backend import survey
    from hal.recording import record, replay  # noqa: F401

    survey()
    all_cases()
    with LLM(device="null", num_blocks=64) as llm:
        llm.generate("1+1=")
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
        print(pid, flush=True)
        assert json.loads(sys.stdin.readline()) == "wait"
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(request: dict[str, Any]) -> NoReturn:
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and background jobs have signals ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for descriptor, (where, flags) in enumerate(zip(request["streams"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY),
                                                    strict=True)):
        if where == CLOSED:
            os.close(descriptor)
            continue
        if where == READ_ONLY:
            opened = os.open(os.devnull, os.O_RDONLY)
        elif where == BROKEN:
            reading, opened = os.pipe()
            os.close(reading)
        else:
            opened = os.open(where, flags)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (
        _stream(descriptor, mode, errors, request["encoding"])
        for descriptor, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace")))
    sys.argv = [str(SCRIPT), *request["args"]]
    sys.path[0] = str(SCRIPT.parent)
    status = 1
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    # The interpreter's own end would collect all objects of the process, which takes seconds after a fork.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = 120
    os._exit(status)


def _stream(descriptor: int, mode: str, errors: str, encoding: str) -> IO[str] | None:
    """As Python makes it when it starts."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    return open(descriptor, mode, encoding=encoding, errors=errors, closefd=False)


def lines(out: bytes) -> Sequence[dict[str, Any]]:
    """JSON Lines, of which every line is whole."""
    assert out == b"" or out.endswith(b"\n")
    return [json.loads(line) for line in out.decode().splitlines()]


if __name__ == "__main__":
    _serve()
