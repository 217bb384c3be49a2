"""One worker process. Run as a script by workers.ranks: the standard input brings its configuration as JSON lines, and
its end says that the driver is gone; reports leave through another pipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import IO, Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what an interrupt ends
    inbox: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    start = json.loads(inbox.get())
    sys.path[:] = start["path"]  # the driver's, before anything is imported that may be found there
    os.set_inheritable(start["reports"], False)  # else a child of this process would hide its death
    reports, writing = os.fdopen(start["reports"], "w", buffering=1), threading.Lock()
    threading.Thread(target=_beat, args=(reports, writing, start["beat"]), daemon=True).start()
    run(start, inbox, reports, writing)


def run(start: dict[str, Any], inbox: SimpleQueue[str], reports: IO[str], writing: threading.Lock) -> None:
    from hal import guard
    from hal.config import WorkerConfig
    from workers.agreement import facts_of
    from workers.base import make_worker
    from workers.links import connect
    from workers.reports import Failure

    def report(event: str, **content: Any) -> None:
        with writing:
            reports.write(json.dumps({"event": event, **content}) + "\n")

    config = WorkerConfig.from_json(start["config"])
    worker = None
    try:
        guard.install()
        worker = make_worker(start["worker"], config)
        device = worker.init_device()
        report("up", rank=config.topology.rank, facts=facts_of(config))
        worker.connect(*connect(config, worker.backend, device, start["store"]))
        worker.load_model()
        report("sized", rank=config.topology.rank, facts=worker.facts(), blocks=worker.determine_num_blocks())
        worker.initialize_cache(json.loads(inbox.get())["blocks"])
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


def _listen(inbox: SimpleQueue[str]) -> None:
    for line in os.fdopen(0):
        inbox.put(line)
    os._exit(1)


if __name__ == "__main__":
    main()
