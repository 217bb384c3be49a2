"""Run as a script: an engine whose process forks a child for each action, one after the other. It prints what the child
got, and whether the parent goes on as before.

    python forking.py CONTROL_PLANE TP ACTION ...
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path

from hal import LLM, SamplingParams
from hal.errors import StateError
from workers.executors.driver import DriverExecutor

plane, tp, actions = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
PROMPTS: list[str | list[int]] = [[5, 6, 7], [1, 2, 3, 4]]


def tokens(of: LLM) -> list[list[int]]:
    return [o.token_ids for o in of.generate(PROMPTS, SamplingParams(max_tokens=10, ignore_eos=True))]


def use(of: LLM) -> None:
    """What a child may try; each is a StateError that names the parent."""
    of.shutdown()
    for call in (lambda: of.generate(PROMPTS), of.step, lambda: next(of.stream(PROMPTS[0])), of.executor.check):
        try:
            call()
        except StateError as error:
            print("told", str(os.getppid()) in str(error), flush=True)
        else:
            print("no error", flush=True)


def ranks(of: LLM) -> list[int]:
    assert isinstance(of.executor, DriverExecutor)
    return [process.process.pid for process in of.executor._ranks.processes]


def own_engine() -> None:
    with LLM(device="null", tp=tp, control_plane=plane, max_model_len=64) as mine:
        print(tokens(mine) == expected, flush=True)


def child(action: str) -> None:
    """Ends the process, unless the child has left the `with` block in another way."""
    match action:
        case "exit":
            sys.exit(0)  # through the `with` block and the exit handlers
        case "collect":
            del globals()["llm"]
            gc.collect()
            sys.exit(0)
        case "use" | "ahead":
            use(llm)
            os._exit(0)
        case "own":
            own_engine()
            sys.exit(0)
        case "restart":
            llm.restart()
            print(tokens(llm) == expected, flush=True)
            llm.shutdown()
            sys.exit(0)
        case "stay":
            threading.Event().wait()


with LLM(device="null", tp=tp, control_plane=plane, max_model_len=64) as llm:
    expected = tokens(llm)
    for action in actions:
        print(action, flush=True)
        if action == "ahead":  # a step is in flight, and its request unfinished
            llm.add_request([9, 9], SamplingParams(max_tokens=20, ignore_eos=True))
            llm.step()
        if (pid := os.fork()) == 0:
            child(action)
        if action == "stay":
            print(pid, *ranks(llm), flush=True)
            sys.stdin.read()
        _, status = os.waitpid(pid, 0)
        print("status", status, "parent", tokens(llm) == expected, flush=True)
    started = ranks(llm)
print("left", [pid for pid in started if Path(f"/proc/{pid}").exists()])
