"""The worker and its processes, on the null backend: the same tokens in every layout, and failures that are named."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import worker_cases
from drill import left_in_shared_memory, lives, shared_memory
from own_worker import refuse
from soon import SOON, soon
from worker_cases import MODEL, Driver, executor, ints

from hal.config import Topology, WorkerConfig
from hal.errors import BackendError, CapacityError, ConfigError, InputError, StateError, WorkerError
from workers.executors.driver import DriverExecutor
from workers.executors.processes import RankProcess, Ranks
from workers.worker.base import WorkerBase
from workers.worker.consistency import agree, facts_of

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3], [42] * 13]
STEPS = 9
on_each_torch = pytest.mark.torch_release


def children(of: DriverExecutor) -> list[int]:
    return [p.process.pid for p in of._ranks.processes]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture(scope="module")
def opened_once() -> None:
    """What gloo and the store open once in a process, and keep."""
    executor(tp=2).shutdown()
    gc.collect()


def descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # listdir's own
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def descendants() -> set[str]:
    """Ids of this process's children, those that ended and were not waited for among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            if path.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(path.parent.name)
    return found


@pytest.fixture(autouse=True)
def _nothing_left(opened_once: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No descriptor (pipe, socket, shared memory), process or file stays behind a test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before, shared, others = descriptors(), shared_memory(), descendants()  # other tests' compilers, say
    yield
    # Raised errors keep frames alive, and those the groups: until the collector sees them.
    assert soon(lambda: gc.collect() >= 0 and descriptors().items() <= before.items()), descriptors()
    assert not list(tmp_path.iterdir()) and not left_in_shared_memory(shared)
    assert descendants() <= others


def run(temperature: float = 0.0, **options: Any) -> list[list[int]]:
    made = executor(**options)
    try:
        return Driver(made, PROMPTS, temperature=temperature).run(STEPS)
    finally:
        pids = children(made)
        made.shutdown()
        made.shutdown()
        assert gone(pids)


@pytest.mark.slow
def test_local_tokens_are_the_models() -> None:
    """Against the model's definition, without cache, batch or worker."""
    for tokens, prompt in zip(run(), PROMPTS, strict=True):
        assert len(tokens) > len(prompt)
        for end in range(len(prompt), len(tokens)):
            total = sum((t + 7) * (p * 31 + layer + 11) % 65521 for layer in range(MODEL.num_layers)
                        for p, t in enumerate(tokens[:end]))
            assert tokens[end] == total % MODEL.vocab_size


@pytest.mark.slow
@on_each_torch
@pytest.mark.parametrize(("layout", "wire", "plane", "temperature"), [
    ({"tp": 2}, "model-input", "auto", 0.0), ({"tp": 2}, "request", "gloo", 0.7), ({"pp": 2}, "request", "auto", 0.0),
    ({"pp": 2}, "model-input", "gloo", 0.7)], ids=str)
def test_layouts_agree(layout: dict[str, int], wire: str, plane: str, temperature: float) -> None:
    assert run(temperature, wire=wire, control_plane=plane, **layout) == run(temperature)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "wire", "plane"), [
    ({"tp": 2, "pp": 2}, "model-input", "shm"), ({"pp": 3}, "request", "gloo")], ids=str)
def test_larger_layouts_agree(layout: dict[str, int], wire: str, plane: str) -> None:
    assert run(0.7, wire=wire, control_plane=plane, **layout) == run(0.7) != run()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=str)
def test_block_moves_reach_every_rank(layout: dict[str, Any]) -> None:
    """A sequence's blocks go to the host, then to other blocks, one of them by way of a copy; its tokens stay right."""
    made = executor(num_cpu_blocks=4, **layout)
    assert made.num_cpu_blocks == 4
    driver = Driver(made, PROMPTS)
    driver.run(4)
    seq = driver.seqs[2]
    first, second = seq.blocks[:2]
    driver.run(1, blocks_to_swap_out=ints([first, 3, second, 1]).reshape(-1, 2))
    driver.next_block += 3
    a, b, c = range(driver.next_block - 3, driver.next_block)
    # From here on the sequence's table names the new blocks, while the old ones are overwritten by another's.
    seq.blocks[:2] = [a, c]
    request, sampled = driver.request(blocks_to_swap_in=ints([3, a, 1, b]).reshape(-1, 2),
                                      blocks_to_copy=ints([b, c, driver.seqs[0].blocks[0], first,
                                                           driver.seqs[0].blocks[0], second]).reshape(-1, 2))
    request.block_rows = ints([*request.block_rows, 2])
    request.block_starts = ints([*request.block_starts, 0])
    request.block_counts = ints([*request.block_counts, len(seq.blocks)])
    request.new_blocks = ints([*request.new_blocks, *seq.blocks])
    driver.digest = request.chain()
    for i, token in zip(sampled, made.execute_model(request).result().token_ids.tolist(), strict=True):
        driver.seqs[i].tokens.append(token)
        driver.appended.append((i, token))
    tokens = driver.run(STEPS - 6)
    made.shutdown()
    assert tokens == run()


@pytest.mark.slow
@on_each_torch
def test_steps_may_be_submitted_ahead() -> None:
    """Outputs of the last stage wait for the driver while it announces the next step."""
    made = executor(pp=2)
    driver = Driver(made, [[1, 2, 3, 4, 5, 6, 7, 8]], chunk=2)
    handles = [made.execute_model(driver.request()[0]) for _ in range(4)]
    outputs = [handle.result().token_ids.tolist() for handle in (handles[3], handles[0], handles[1], handles[2])]
    assert [len(o) for o in outputs] == [1, 0, 0, 0] and handles[3].result().token_ids.tolist() == outputs[0]
    made.shutdown()


@pytest.mark.slow
@on_each_torch
def test_start_passes_through_no_main_module_and_keeps_stdout_clean(tmp_path: Path) -> None:
    """A script without a main guard, in a folder with a workers/ of its own, whose output is its result alone."""
    (tmp_path / "folder" / "workers").mkdir(parents=True)
    (tmp_path / "folder" / "workers" / "__init__.py").write_text("raise SystemExit('the wrong workers')")
    script = tmp_path / "folder" / "script.py"
    script.write_text("import sys\nsys.path.pop(0)\n"
                      f"sys.path.append({str(Path(worker_cases.__file__).parent)!r})\n"
                      "from worker_cases import Driver, executor\n"
                      "made = executor(tp=2)\n"
                      "print(len(Driver(made, [[1, 2, 3]]).run(2)[0]))\n")  # ends without shutdown
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path / "folder", capture_output=True, text=True,
                          timeout=600)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr
    shutil.rmtree(tmp_path / "folder")


@pytest.mark.slow
def test_dropping_an_executor_ends_its_processes() -> None:
    made = executor(tp=2)
    pids = children(made)
    del made
    gc.collect()
    assert gone(pids)


@pytest.mark.slow
def test_killing_the_driver_ends_the_others() -> None:
    script = ("import sys, time; sys.path.append(sys.argv[1])\n"
              "from worker_cases import executor\n"
              "made = executor(tp=2)\n"
              "print(*[p.process.pid for p in made._ranks.processes], flush=True)\n"
              "time.sleep(60)\n")
    path = str(Path(worker_cases.__file__).parent)
    with forked.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1 and not gone(pids)
        process.kill()
        assert soon(lambda: not any(map(lives, pids)))


def failing(monkeypatch: pytest.MonkeyPatch, fault: str, **options: Any) -> DriverExecutor:
    monkeypatch.setenv("TEST_FAULT", fault)
    return executor(device="worker_cases:faulty", **options)


def step_error(made: DriverExecutor, steps: int = 5) -> tuple[WorkerError, float]:
    """The error that the driver gets, and the seconds from the failing step's submission to it."""
    pids, driver, start = children(made), Driver(made, PROMPTS), 0.0
    with pytest.raises(WorkerError) as error:
        for _ in range(steps):
            start = time.monotonic()
            driver.run(1)
    seconds = time.monotonic() - start
    assert gone(pids)
    with pytest.raises(WorkerError) as again:
        driver.run(1)
    assert again.value is error.value
    made.shutdown()
    return error.value, seconds


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "cause", "text", "options"), [
    ("execute-bug", "KeyError", "execute-bug", {}), ("execute-bug", "KeyError", "execute-bug", {"tp": 2}),
    ("execute-talk", "GuardError", "Store.set at", {}), ("execute-nothing", "StateError", "got int", {})])
def test_failure_in_execute_is_named(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], fault: str, cause: str,
                                     text: str) -> None:
    rank = options.get("tp", 1) * options.get("pp", 1) - 1
    error, seconds = step_error(failing(monkeypatch, f"{fault} {rank} 3", **options))
    assert (error.rank, error.cause) == (rank, cause) and text in str(error)
    assert "step 3 (PagedModelInput of num_tokens=" in str(error)
    assert cause in error.remote_traceback
    assert seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "cause", "text", "options", "rank"), [
    ("prepare-bug", "KeyError", "prepare-bug", {}, 0), ("prepare-invalid", "InputError", "slot_mapping", {}, 0),
    ("prepare-bug", "KeyError", "prepare-bug", {"tp": 2, "wire": "request"}, 1),
    ("prepare-talk", "GuardError", "worker_cases.py:", {"tp": 2}, 0)])
def test_failure_in_prepare_is_named(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], rank: int, fault: str,
                                     cause: str, text: str) -> None:
    error, seconds = step_error(failing(monkeypatch, f"{fault} {rank} 3", **options))
    assert (error.rank, error.cause) == (rank, cause) and text in str(error) and "step 3" in str(error)
    assert seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "text", "options"), [
    ("prepare-differ 1 3", "differ in input digest", {"tp": 2, "wire": "request"}),
    ("prepare-differ 1 3", "differ in input digest", {"pp": 2, "wire": "request"}),
    ("prepare-differ 1 3", "differ in input digest", {"pp": 2, "wire": "request", "control_plane": "gloo"}),
    ("execute-more 1 3", "differ in (bytes|number)", {"tp": 2}),
    ("execute-more 0 3", "differ in (bytes|number)", {"tp": 2, "control_plane": "gloo"}),
    ("execute-last 0 3", "rank 1 .*collective", {"tp": 2}),
    ("execute-last 1 3", "rank [01] (went another way|ended step)", {"tp": 2}),
    ("execute-last 0 3", "rank 1 .*collective", {"tp": 2, "control_plane": "gloo"})], ids=str)
def test_ranks_that_diverge_are_named(monkeypatch: pytest.MonkeyPatch, fault: str, text: str,
                                                options: dict[str, Any]) -> None:
    """With an input of its own, or a collective that the others do not call: it would hang, or give a wrong token."""
    monkeypatch.setenv("HAL_STRICT", "1")  # gloo ends the process otherwise
    error, seconds = step_error(failing(monkeypatch, fault, **options))
    assert error.cause == "StateError" and re.search(text, str(error)), str(error)
    assert re.search("step [34]", str(error)) and seconds < SOON


@pytest.mark.slow
@on_each_torch
@pytest.mark.parametrize("options", [{"tp": 2}, {"pp": 2}, {"tp": 2, "control_plane": "gloo"}], ids=str)
def test_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    error, seconds = step_error(failing(monkeypatch, "execute-die 1 3", **options))
    assert (error.rank, error.cause) == (1, "died") and "signal 9" in str(error) and seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rank", "cause"), [("execute-bug", 2, "KeyError"), ("execute-die", 1, "died")])
def test_first_failure_is_told_from_those_that_follow(monkeypatch: pytest.MonkeyPatch, fault: str, rank: int,
                                                      cause: str) -> None:
    error, seconds = step_error(failing(monkeypatch, f"{fault} {rank} 3", tp=3))
    assert (error.rank, error.cause) == (rank, cause) and seconds < SOON


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "cause"), [("execute-bug 2 3", "KeyError"), ("execute-die 2 3", "died")])
def test_first_failure_is_told_where_a_library_hides_those_that_follow(monkeypatch: pytest.MonkeyPatch, fault: str,
                                                                      cause: str) -> None:
    """Ranks 0 and 1 lose rank 2 inside a compiled program, which ends with a RuntimeError of the library."""
    monkeypatch.setenv("TEST_FAULT", fault)
    error, _ = step_error(executor(device="worker_cases:wrapping", tp=3))
    assert (error.rank, error.cause) == (2, cause)


@on_each_torch
def test_rank_killed_between_steps_is_named() -> None:
    made = executor(tp=2)
    driver = Driver(made, PROMPTS)
    driver.run(2)
    os.kill(children(made)[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 1 died"):
        driver.run(1)


@pytest.mark.slow
def test_a_failure_while_no_step_runs_is_told_once() -> None:
    """Each listener hears of it, also one that comes later or that raises. A shutdown is no failure."""
    told: queue.SimpleQueue[WorkerError] = queue.SimpleQueue()
    made = executor(tp=2)
    made.on_failure(lambda error: 1 / 0)
    made.on_failure(told.put)
    assert made.health() is None
    os.kill(children(made)[0], signal.SIGKILL)
    error = told.get(timeout=SOON)
    assert error.rank == 1 and "rank 1 died between steps" in error.what and str(made.health()) == str(error)
    with pytest.raises(WorkerError, match="rank 1 died"):
        Driver(made, PROMPTS).run(1)
    made.on_failure(told.put)
    assert told.get_nowait().rank == 1 and told.empty()
    sound = executor()
    sound.on_failure(told.put)
    sound.shutdown()
    assert isinstance(sound.health(), StateError) and told.empty()


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["shm", "gloo"])
def test_ranks_that_end_before_a_slow_driver_does_are_no_failure(monkeypatch: pytest.MonkeyPatch, plane: str) -> None:
    told: list[WorkerError] = []
    made = executor(tp=3, control_plane=plane)
    made.on_failure(told.append)
    processes, broadcast = [rank.process for rank in made._ranks.processes], made._plane.broadcast

    def slowly(parts: Any) -> None:
        broadcast(parts)
        assert made._ranks._listener is not None
        made._ranks._listener.join(60)  # until it has seen all ranks end

    monkeypatch.setattr(made._plane, "broadcast", slowly)
    made.shutdown()
    assert told == [] and [process.returncode for process in processes] == [0, 0]


def test_a_failure_of_the_only_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[WorkerError] = []
    made = failing(monkeypatch, "execute-bug 0 2")
    made.on_failure(told.append)
    error, _ = step_error(made)
    assert told == [error] and made.health() is error


def test_executor_knows_the_bytes_of_a_block() -> None:
    alone, stages = executor(), executor(pp=2)
    try:  # the null backend keeps 4 bytes a token and layer; of 3 layers the first stage has 2
        assert (alone.kv_bytes_per_block, stages.kv_bytes_per_block) == (3 * 4 * 4, 2 * 4 * 4)
    finally:
        alone.shutdown()
        stages.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kind", "text"), [
    ("load-capacity 1 0", CapacityError, "rank 1: weights do not fit"),
    ("load-die 1 0", WorkerError, "rank 1 died"),
    ("warmup-bug 1 0", WorkerError, "rank 1 failed while it started: 'warmup-bug'")])
def test_start_failure_is_named(monkeypatch: pytest.MonkeyPatch, fault: str, kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        failing(monkeypatch, fault, tp=2)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "text"), [
    ({"tp": 3}, "tp=3 does not divide the model's num_heads"), ({"pp": 9}, "more pipeline stages than layers"),
    ({"tp": 2, "ep": 2}, "expert parallelism needs a model with experts")])
def test_a_topology_that_the_model_cannot_have_is_refused_before_a_rank_starts(
        monkeypatch: pytest.MonkeyPatch, options: dict[str, int], text: str) -> None:
    monkeypatch.setattr(Ranks, "start", lambda *args: pytest.fail("a rank starts"))
    with pytest.raises(ConfigError, match=text):
        executor(device="cpu", **options)


def test_unusable_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="wire='none'"):
        executor(tp=2, wire="none")
    with pytest.raises(ConfigError, match="unknown control_plane"):
        executor(control_plane="pigeon")
    with pytest.raises(CapacityError, match="too small for one sequence"):
        executor(num_blocks=3)
    with pytest.raises(BackendError, match="cannot split tensors"):
        executor(tp=65)


@pytest.mark.slow
def test_a_worker_of_ones_own_replaces_the_generic_one() -> None:
    made = executor(tp=2, worker="own_worker:OwnWorker")
    assert made.num_blocks == 40 and isinstance(made._worker, WorkerBase)
    Driver(made, PROMPTS).run(2)
    made.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("plane", "wire"), [("shm", "request"), ("gloo", "model-input")])
def test_nothing_is_pickled(monkeypatch: pytest.MonkeyPatch, plane: str, wire: str) -> None:
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)  # and again in the other ranks
    made = executor(tp=2, pp=2, worker="own_worker:NoPickleWorker", control_plane=plane, wire=wire)
    tokens = Driver(made, PROMPTS).run(STEPS)
    made.shutdown()
    assert tokens == run()


def test_use_after_shutdown_is_refused() -> None:
    made = executor()
    driver = Driver(made, PROMPTS)
    handle = made.execute_model(driver.request()[0])
    made.shutdown()
    with pytest.raises(StateError, match="shut down"):
        handle.result()
    with pytest.raises(StateError, match="shut down"):
        driver.run(1)


@pytest.mark.slow
def test_two_engines_and_a_users_own_group_live_side_by_side(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        first, second = executor(tp=2), executor(pp=2)
        drivers = [Driver(first, PROMPTS), Driver(second, PROMPTS)]
        for _ in range(3):
            for driver in drivers:
                driver.run(1)
        assert drivers[0].seqs == drivers[1].seqs
        first.shutdown()
        drivers[1].run(1)
        second.shutdown()
    finally:
        torch.distributed.destroy_process_group()
        del store
        (tmp_path / "store").unlink(missing_ok=True)


def test_bad_block_moves_are_a_named_failure() -> None:
    made = executor()
    with pytest.raises(WorkerError, match="blocks_to_copy") as error:
        Driver(made, PROMPTS).run(1, blocks_to_copy=np.array([[1, 10**6]], np.int32))
    assert error.value.cause == "InputError" and isinstance(error.value.__cause__, InputError)


def silent_once_started(monkeypatch: pytest.MonkeyPatch, **options: Any) -> DriverExecutor:
    """An executor with a short heartbeat, which counts from the end of the start on: a rank that loads torch on a busy
    machine holds the interpreter's lock for as long."""
    counts: list[bool] = []
    monkeypatch.setattr(RankProcess, "missed", property(
        lambda rank: vars(rank)["missed"], lambda rank, n: vars(rank).update(missed=n if counts else 0)), raising=False)
    made = executor(**options)
    counts.append(True)
    return made


@pytest.mark.slow
@on_each_torch
@pytest.mark.parametrize("plane", ["shm", "gloo"])
def test_stopped_rank_is_named_within_the_heartbeat(monkeypatch: pytest.MonkeyPatch, plane: str) -> None:
    made = silent_once_started(monkeypatch, tp=2, heartbeat=3.0, control_plane=plane)
    driver, pids = Driver(made, PROMPTS), children(made)
    driver.run(2)
    os.kill(pids[0], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 .* no sign of life for 3 s") as error:
        driver.run(1)
    assert (error.value.rank, error.value.cause) == (1, "silent") and time.monotonic() - start < SOON and gone(pids)


@pytest.mark.slow
def test_an_idle_rank_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    made = silent_once_started(monkeypatch, tp=2, heartbeat=2.0)
    driver = Driver(made, PROMPTS)
    driver.run(1)
    time.sleep(4.5)
    driver.run(1)
    made.shutdown()


@pytest.mark.slow
def test_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateError, match=r"rank 1 differs from the driver in schema (PagedModelInput|OtherInput)"):
        failing(monkeypatch, "load-differ 1 0", tp=2)
    config = worker_cases.engine()
    own = facts_of(WorkerConfig(config, MODEL, Topology(2, 1, 0)))
    other = facts_of(WorkerConfig(dataclasses.replace(config, block_size=8), MODEL, Topology(2, 1, 1)))
    agree(own, [{"rank": 1, "facts": own}])
    monkeypatch.setenv("HAL_STRICT", "0")
    with pytest.raises(StateError, match="rank 1 differs from the driver in HAL_STRICT"):
        agree(own, [{"rank": 1, "facts": facts_of(WorkerConfig(config, MODEL, Topology(2, 1, 1)))}])
    with pytest.raises(StateError, match=r"rank 2 differs from the driver in engine\.block_size"):
        agree(own, [{"rank": 1, "facts": own}, {"rank": 2, "facts": other}])
