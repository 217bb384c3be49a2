"""vLLM's API servers as processes of their own. Run as a script, this imports vLLM once, and makes each server by a
fork, which saves a server the dozen seconds of its imports. Orders come as lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Server:
    """A server that a `Servers` has started. `pid` is also the number of its session."""

    def __init__(self, servers: Servers, pid: int, port: int, directory: Path) -> None:
        self.servers, self.pid, self.directory = servers, pid, directory
        self.root = f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.root}/v1", api_key="none", **{"max_retries": 0, "timeout": 60, **options})

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.root + path, timeout=10) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> str:
        content = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), content)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def wait_until_ready(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # also HTTP errors
                self.get("/health")
                return
            if (status := self.exit_status(0)) is not None:
                raise AssertionError(f"the server has ended with status {status}: {self.log()[-3000:]}")
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready after {seconds} s: {self.log()[-3000:]}")

    def exit_status(self, seconds: float = 120) -> int | None:
        """The exit status, or None if the server has not ended after so many seconds."""
        answer = self.servers.order(wait=self.pid, seconds=seconds)["status"]
        return None if answer is None else int(answer)

    def processes(self) -> dict[int, str]:
        """The command lines of its session's processes, without those that only wait for init to take their status."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (directory / "stat").read_text().rpartition(") ")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def ranks(self) -> list[int]:
        return [pid for pid, command in self.processes().items() if "rank_process" in command]

    def shared_memory(self) -> list[str]:
        """That was not there before the servers, without what other programs of this machine use."""
        found = set(os.listdir("/dev/shm")) - self.servers.shared_memory
        for directory in Path("/proc").glob("[0-9]*") if found else ():
            with contextlib.suppress(OSError):
                if int((directory / "stat").read_text().rpartition(") ")[2].split()[3]) != self.pid:
                    maps = (directory / "maps").read_text(errors="replace")
                    found -= set(re.findall("/dev/shm/([^\n/]+)$", maps, re.MULTILINE))
        return sorted(found)

    def left_behind(self, seconds: float = 30) -> list[str]:
        """What of the server is still there after so many seconds: processes, shared memory, files and sockets."""
        end = time.monotonic() + seconds
        while True:
            found = [*self.processes().values(), *map(str, (self.directory / "tmp").iterdir()), *self.shared_memory()]
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Servers:
    """Starts servers. Their logs and temporary files go below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.shared_memory = directory, set(os.listdir("/dev/shm"))
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                 "VLLM_WORKER_MULTIPROC_METHOD": "fork", "VLLM_LOGGING_LEVEL": "INFO", "HAL_DEVICE": "null",
                 # The client keeps a connection for 5 seconds. So does vLLM, which might close one that is in use.
                 "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"})
        self._started = 0

    def order(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))

    @contextlib.contextmanager
    def server(self, device: str, *options: str, environment: dict[str, str] | None = None,
               hal: dict[str, Any] | None = None) -> Iterator[Server]:
        """A server, which may not be ready yet. It is killed at the end if it still runs."""
        from hal.config import BUNDLED_MODEL

        self._started += 1
        directory = self.directory / f"server{self._started}"
        (directory / "tmp").mkdir(parents=True)
        template = directory / "chat.jinja"
        template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        # The port stays taken, so that nothing else of this machine gets it before the server is there. The server may
        # have it all the same, since it sets SO_REUSEADDR too and nobody listens.
        taken = socket.socket()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        arguments = ["vllm", "--model", str(BUNDLED_MODEL), "--served-model-name", "add", "--host", "127.0.0.1",
                     "--port", str(port), "--max-model-len", "96", "--max-num-seqs", "8", "--dtype", "float32",
                     "--num-gpu-blocks-override", "64", "--chat-template", str(template), "--additional-config",
                     json.dumps({"hal": {"device": device, **(hal or {})}}), *options]
        pid = self.order(start=arguments, log=str(directory / "log"), environment={
            "HAL_DEVICE": device, "TMPDIR": str(directory / "tmp"), **(environment or {})})["pid"]
        server = Server(self, pid, port, directory)
        try:
            yield server
        finally:
            server.kill()
            server.exit_status(60)
            taken.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def take_orders() -> bool:
    """Follow the orders until there are no more. Returns True in a fork, which is to serve."""
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
                for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
                    os.dup2(file, number)
                os.environ.update(order["environment"])
                sys.argv = order["start"]
                return True
            answer = {"pid": pid}
        else:
            answer = {"status": wait_for(order["wait"], order["seconds"])}
        print(json.dumps(answer), flush=True)
    return False


statuses: dict[int, int] = {}


def wait_for(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while pid not in statuses:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            statuses[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            return None
        else:
            time.sleep(0.02)
    return statuses[pid]


if __name__ == "__main__":
    from vllm.entrypoints.launchers import launcher
    from vllm.entrypoints.launchers.api_server.entry import main

    # When it is told to stop, vLLM names another process that holds its port. After a fork its own engine does, and if
    # that ends in the meantime, vLLM fails. `vllm serve` spawns its engine, which does not inherit the port.
    launcher.find_process_using_port = lambda port: None
    if take_orders():
        main()
