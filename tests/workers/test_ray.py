"""Ranks as Ray actors: two nodes simulated on this host."""

from __future__ import annotations

import builtins
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch_case import alone, generate, generated_by_launched
from messages_case import counted
from rank_threads import on_ranks
from soon import SOON
from test_messages import check as check_rounds
from worker_cases import MODEL, Driver, executor

from hal.config import Topology
from hal.errors import BackendError, CapacityError, WorkerError
from hal.testing.null import backend as null
from workers.control.collectives import CPU
from workers.control.planes import make_plane
from workers.executors.ray_actors import RayRanks
from workers.links.reports import FailureListeners

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3]]
LONG = dataclasses.replace(MODEL, max_position=1 << 14)  # for steps until a failure is noticed


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.cluster_utils import Cluster

    os.environ["TEST_FAULT"] = "load-capacity 1 0"  # of the backend `faulty` alone; nodes pass it on to their actors
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield ray
    ray.shutdown()
    cluster.shutdown()
    del os.environ["TEST_FAULT"]


def gone(pids: list[int], seconds: float = 30.0) -> bool:
    """Ended, or ended and not yet waited for by Ray's own process."""
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def pids(made: Any, ray: Any) -> list[int]:
    return [pid for rank in made._ranks.processes for pid in ray.get(rank._actor.pids.remote())]


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["auto", "gloo"])
def test_bundled_model_is_right_on_two_nodes(ray: Any, plane: str) -> None:
    from hal import LLM, SamplingParams

    llm = LLM(executor="ray", tp=2, device="cpu", control_plane=plane)
    try:
        found = pids(llm.executor, ray)
        outputs = llm.generate(["37+85=", "123+456=", "999+1="], SamplingParams(max_tokens=8))
        assert [o.text.strip() for o in outputs] == ["122", "579", "1000"]
    finally:
        llm.shutdown()
    assert gone(found)


@pytest.mark.slow
def test_steps_through_ray_give_the_tokens_of_one_process(ray: Any) -> None:
    assert generate(tp=2, pp=2, wire="request", executor="ray", control_plane="ray") == alone()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "wire"), [("steps", "model-input"), ("drafts", "request")])
def test_a_round_through_ray_is_one_message(ray: Any, mode: str, wire: str) -> None:
    check_rounds(mode, counted(mode, tp=2, wire=wire, executor="ray", control_plane="ray"))


@pytest.mark.slow
def test_steps_through_ray_of_ranks_that_torchrun_starts(ray: Any, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    assert generated_by_launched(tmp_path, "ray", tp=2, pp=1) == [{"ray": alone()}] * 2


@pytest.mark.slow
def test_a_killed_rank_is_named_in_time_though_the_driver_waits_for_its_output(ray: Any) -> None:
    made = executor(LONG, pp=2, executor="ray", control_plane="ray")
    driver, found = Driver(made, PROMPTS), pids(made, ray)
    driver.run(2)
    start = time.monotonic()
    os.kill(found[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 1 died"):
        while time.monotonic() < start + SOON:
            driver.run(1)
    assert time.monotonic() - start < SOON
    made.shutdown()


@pytest.mark.slow
def test_ray_outlives_the_thread_that_started_it() -> None:
    """The system ends what a thread started when that thread ends: the driver connects in one of its own."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    script = ("import threading, time; from workers.links.ray_cluster import join_cluster\n"
              "t = threading.Thread(target=join_cluster, args=('this test',)); t.start(); t.join(); time.sleep(0.5)\n"
              "import ray; print(sum(node['Alive'] for node in ray.nodes()), ray.get(ray.put(7)))\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "RAY_ADDRESS": "local"})  # not that of another test
    assert done.stdout == "1 7\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["actor", "process"])
def test_killed_actor_is_named(ray: Any, victim: int) -> None:
    made = executor(LONG, tp=3, executor="ray")
    driver, found = Driver(made, PROMPTS), pids(made, ray)
    driver.run(2)
    start = time.monotonic()
    os.kill(found[2 + victim], signal.SIGKILL)  # rank 2's
    with pytest.raises(WorkerError, match="rank 2 died") as error:
        while time.monotonic() < start + SOON:
            driver.run(1)
    seconds = time.monotonic() - start
    print(f"named after {seconds:.2f} s: {error.value}")
    assert (error.value.rank, error.value.cause) == (2, "died") and seconds < SOON
    made.shutdown()
    assert gone(found)


@pytest.mark.slow
def test_load_failure_is_named(ray: Any) -> None:
    with pytest.raises(CapacityError, match="rank 1: weights do not fit"):
        executor(tp=2, executor="ray", device="worker_cases:faulty")


def test_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"hal-runtime\[ray\]"):
        RayRanks(FailureListeners())

    def plane(rank: int, store: Any) -> str:
        with pytest.raises(BackendError) as error:
            make_plane("ray", Topology(tp=2, rank=rank), store, null, CPU)
        return str(error.value)

    first, second = on_ranks(2, plane)
    assert "hal-runtime[ray]" in first and "the driver could not" in second  # which need not wait for it
