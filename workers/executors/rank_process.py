"""One worker process, run as a script by `workers.executors.processes`. The standard input brings its configuration and
the entries that other ranks have set in the rendezvous, as JSON lines. Reports leave through another pipe. The process
ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from workers.links.rendezvous import Rendezvous


class Report(Protocol):
    def __call__(self, event: str, **content: Any) -> None: ...


_LOOK = 0.5  # seconds between checks that the parent lives, if the system cannot signal it


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles interrupts
    messages = _messages(int(sys.argv[1]))
    start = next(messages)
    sys.path[:] = start["path"]  # the driver's, before anything is imported that may be found there
    os.set_inheritable(start["reports"], False)  # otherwise a child of this process could hold it open
    reports, writing = os.fdopen(start["reports"], "w", buffering=1), threading.Lock()

    def report(event: str, **content: Any) -> None:
        with writing:
            reports.write(json.dumps({"event": event, **content}) + "\n")

    from workers.links.rendezvous import Rendezvous

    rendezvous = Rendezvous(start["host"], lambda key, value: report("entry", key=key, value=value))
    orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(messages, orders, rendezvous), daemon=True).start()
    threading.Thread(target=_beat, args=(reports, writing, start["beat"]), daemon=True).start()
    run(start, orders, rendezvous, report)


def run(start: dict[str, Any], orders: SimpleQueue[dict[str, Any]], rendezvous: Rendezvous, report: Report) -> None:
    from hal import guard
    from hal.config import WorkerConfig
    from workers.executors.connections import connect
    from workers.links.groups import RendezvousStore
    from workers.links.reports import Failure
    from workers.worker.base import make_worker
    from workers.worker.consistency import facts_of

    config = WorkerConfig.from_json(start["config"])
    worker = None
    try:
        guard.install()
        worker = make_worker(start["worker"], config)
        device = worker.init_device()
        report("up", rank=config.topology.rank, facts=facts_of(config))
        store = RendezvousStore(rendezvous)  # kept here, since PyTorch uses the Python object but does not keep it
        worker.connect(*connect(config, worker.backend, device, store))
        worker.load_model()
        report("sized", rank=config.topology.rank, facts=worker.facts(), blocks=worker.determine_num_blocks(),
               block=worker.kv_bytes_per_block)
        worker.initialize_cache(orders.get()["blocks"])
        worker.warmup()
        report("ready")
        worker.serve()
        worker.shutdown()
        os._exit(0)  # no thread of a library keeps the process alive
    except BaseException as error:
        failure = Failure.of(config.topology.rank, error, worker.describe_step() if worker else "")
        report("failed", **{name: getattr(failure, name) for name in Failure.__slots__})
        # At once, whatever threads still run: closed connections free the ranks that wait for this one.
        os._exit(1)


def _beat(reports: IO[str], writing: threading.Lock, seconds: float) -> None:
    while True:
        time.sleep(seconds)
        with writing:
            reports.write("\n")


def _messages(parent: int) -> Iterator[dict[str, Any]]:
    """Ends this process when its parent ends or says so. The end of the standard input alone would not tell: a process
    that the parent forked keeps it open."""
    buffer, watched = b"", [0]
    with contextlib.suppress(OSError, AttributeError):  # an older system: poll now and then
        watched.append(os.pidfd_open(parent))
    while os.getppid() == parent:
        if 0 in select.select(watched, [], [], _LOOK)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "end" in message:
                    os._exit(1)
                yield message
    os._exit(1)


def _listen(messages: Iterator[dict[str, Any]], orders: SimpleQueue[dict[str, Any]], rendezvous: Rendezvous) -> None:
    for message in messages:
        if "key" in message:
            rendezvous.arrived(**message)
        else:
            orders.put(message)


if __name__ == "__main__":
    main()
