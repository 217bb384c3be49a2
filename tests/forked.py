"""Python programs in processes of their own, without the seconds in which each would load torch and the library: one
process has loaded them, and is forked for every program. `Popen` is subprocess's otherwise: the new process is a child
of the caller, with its own standard streams, environment and arguments."""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import gc
import json
import os
import platform
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from subprocess import PIPE, TimeoutExpired  # noqa: F401  (this module stands in for subprocess)
from typing import Any, NoReturn

_CLONE_PARENT, _CLONE = 0x8000, {"x86_64": 56, "aarch64": 220}.get(platform.machine())
_MOST = 16  # descriptors of one program
# Names of the environment that libraries read when they are loaded. A program for which one differs from the loaded
# process is started as subprocess would start it.
_EARLY = ("HAL_", "OMP_", "PYTHON", "TORCH", "LD_", "MKL_", "TRITON_")
_LATE = ("HAL_STRICT", "HAL_RECORD_ON_ERROR", "PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")  # torch.compile sets the last


def _early(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_EARLY) and name not in _LATE}


_ENVIRONMENT = dict(os.environ)  # conftest.py imports this module before any test changes it


class _Loaded:
    """The process that is forked. It ends when this one closes its socket or ends."""

    def __init__(self) -> None:
        self.environment, self.owner, self.lock = _early(_ENVIRONMENT), os.getpid(), threading.Lock()
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                                            pass_fds=[theirs.fileno()], env=_ENVIRONMENT)

    def fork(self, program: dict[str, Any], descriptors: list[int]) -> int:
        """The new process's id, or 0 where the system allows no such fork."""
        with self.lock:
            data = json.dumps(program).encode()
            socket.send_fds(self.socket, [len(data).to_bytes(4, "little")], descriptors)
            self.socket.sendall(data)
            return int.from_bytes(self.socket.recv(4, socket.MSG_WAITALL), "little")


_loaded: _Loaded | None = None


def stays() -> str:
    """The id of the process that is forked, or ""."""
    return "" if _loaded is None else str(_loaded.process.pid)


def loaded() -> _Loaded:
    global _loaded
    if _loaded is None or _loaded.owner != os.getpid():
        _loaded = _Loaded()
        atexit.register(close)
    return _loaded


def close() -> None:
    global _loaded
    if _loaded is not None and _loaded.owner == os.getpid():
        _loaded.socket.close()
        _loaded.process.wait()
    _loaded = None


class Popen(subprocess.Popen[Any]):
    """For `[sys.executable, script, ...]`, `-c` and `-m`."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, *rest: Any) -> None:
        environment, pid = dict(os.environ if env is None else env), 0
        # Libraries start no thread in the loaded process: threads would not be there after a fork.
        if (_CLONE is not None and os.environ.get("OMP_NUM_THREADS") == "1" and args[0] == sys.executable
                and _early(environment) == loaded().environment):
            streams = [0 if p2cread < 0 else p2cread, 1 if c2pwrite < 0 else c2pwrite, 2 if errwrite < 0 else errwrite]
            program = {"args": [os.fspath(a) for a in args[1:]], "cwd": os.fspath(cwd or os.getcwd()),
                       "environment": environment, "targets": [0, 1, 2, *pass_fds]}
            pid = loaded().fork(program, [*streams, *pass_fds])
        if pid == 0:
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest)
            return
        self.pid, self._child_created = pid, True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(*args: Any, capture_output: bool = False, input: Any = None, timeout: float | None = None,
        check: bool = False, **options: Any) -> subprocess.CompletedProcess[Any]:
    """subprocess.run with this Popen."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    if input is not None:
        options["stdin"] = PIPE
    with Popen(*args, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _serve(connection: socket.socket) -> None:
    sys.path[:1] = []  # this script's folder
    import workers.executors.connections
    import workers.executors.driver
    import workers.links.groups
    import workers.worker.consistency
    import workers.worker.generic  # noqa: F401
    from hal.checkpoints import loader  # noqa: F401
    from hal.contracts.backend import select

    for name in ("null", "cpu"):
        backend = select(name)
        backend.device(0)
    here = list(sys.path)
    libc = ctypes.PyDLL(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        size, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_LEN(_MOST * 4))
        if not size:
            return
        received = array.array("i")
        for _, _, data in ancillary:
            received.frombytes(data[:len(data) - len(data) % 4])
        length, data = int.from_bytes(size, "little"), b""
        while len(data) < length:
            data += connection.recv(length - len(data))
        # What os.fork does, but the parent of the new process is this process's own parent, which can wait for it.
        ctypes.pythonapi.PyOS_BeforeFork()
        pid = libc.syscall(_CLONE, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
            connection.close()
            _become(json.loads(data), list(received), here)
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        for descriptor in received:
            os.close(descriptor)
        connection.sendall(max(pid, 0).to_bytes(4, "little"))


def _become(program: dict[str, Any], received: list[int], path: list[str]) -> NoReturn:
    from hal import extensions

    signal.signal(signal.SIGINT, signal.default_int_handler)
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1 << 9) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, target in zip(high, program["targets"], strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(program["cwd"])
    os.environ.clear()
    os.environ.update(program["environment"])
    tempfile.tempdir = None
    extensions._installed.cache_clear()  # its path may be another
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, errors=errors, closefd=False)  # noqa: SIM115
        for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace")))
    first, *others = program["args"]
    wanted = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in path]
    status = 1
    try:
        if first == "-c":
            sys.argv, sys.path[:] = ["-c", *others[1:]], ["", *wanted, *path]
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(others[0], "<string>", "exec"), main.__dict__)
        elif first == "-m":
            sys.argv, sys.path[:] = others, [os.getcwd(), *wanted, *path]
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:] = [first, *others], [str(Path(first).resolve().parent), *wanted, *path]
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    # The interpreter's own end would collect all objects of the process, which takes seconds after a fork.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    if status == -signal.SIGINT:  # Python ends by the signal too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _connection:
        _serve(_connection)
