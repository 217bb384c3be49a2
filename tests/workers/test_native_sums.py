"""The sum over ranks that compiled code calls, beside the one that Python calls."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from rank_threads import on_ranks
from soon import SOON
from test_communicators import CPU, random, wait_for_a_killed_peer
from test_cpu_tape import HEADS, decode_input

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.engine.llm import LLM
from hal.errors import GuardError, StateError, WorkerError
from hal.guard import Phase, phase
from hal.sampling.params import SamplingParams
from runners.cpu import backend, compiled
from runners.cpu.runner import CpuModelRunner
from workers.data import native_sums
from workers.data.shared_memory import ShmCommunicator

pytestmark = [pytest.mark.torch_release,
              pytest.mark.skipif(native_sums.load() is None, reason="no compiler when the package was installed")]
no_tape = pytest.mark.skipif(not compiled.available() or compiled.level() == "off", reason="no kernels here")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def add(communicator: ShmCommunicator, x: torch.Tensor, late: float = 0.0) -> int:
    """As a tape does it. Whether Python had to go on."""
    sums = communicator.native_sums
    assert sums is not None
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *(ctypes.c_void_p,) * 2, ctypes.c_int64, ctypes.c_int32)(sums.function)
    with sums:
        time.sleep(late)
        left: int = function(sums.state, x.data_ptr(), x.numel(), x.dtype == torch.bfloat16)
    if left:
        sums.finish(x)
    return left


def on(tp: int, call: Callable[[ShmCommunicator], Any]) -> list[Any]:
    def run(rank: int, store: Any) -> Any:
        communicator = ShmCommunicator(Topology(tp, 1, rank), CPU, store)
        try:
            return call(communicator)
        finally:
            communicator.close()

    return on_ranks(tp, run)


@pytest.mark.parametrize("tp", [2, 3])
def test_sums_of_c_and_of_python_are_the_same_bits(tp: int) -> None:
    """Each rank sums by C or in Python, in every combination. Counters wrap in between."""
    shapes = [(1,), (63,), (7, 65), (16, 896), (60_000,), (600_000,)]  # the last is too large for C

    def call(communicator: ShmCommunicator, ways: Sequence[bool]) -> list[torch.Tensor]:
        found, rank = [], communicator.topology.rank
        for dtype in (torch.bfloat16, torch.float32):
            for turn, shape in enumerate(shapes):
                x = random(rank + 10 * turn, *shape, dtype=dtype)
                if ways[rank]:
                    add(communicator, x)
                else:
                    communicator.all_reduce(x)
                found.append(x)
                assert communicator.fingerprint.nbytes == x.nbytes
        assert communicator.fingerprint.collectives == len(found)
        return found

    expected = on(tp, lambda c: call(c, (False,) * tp))[0]
    for ways in range(1, 2**tp):
        for found in on(tp, lambda c, ways=ways: call(c, [bool(ways >> rank & 1) for rank in range(tp)])):
            assert all(map(torch.equal, found, expected))


def test_values_that_are_infinite_or_not_numbers_stay_so() -> None:
    values = [torch.tensor([[1e38, torch.inf, torch.nan, 3e38]]), torch.tensor([[1e38, -torch.inf, 1.0, 3e38]])]
    for dtype in (torch.bfloat16, torch.float32):
        def call(communicator: ShmCommunicator, native: bool, dtype: torch.dtype = dtype) -> torch.Tensor:
            x = values[communicator.topology.rank].to(dtype)
            if native:
                add(communicator, x)
            return x if native else communicator.all_reduce(x)
        ours, plain = (on(2, lambda c, native=native: call(c, native))[0] for native in (True, False))
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


def test_python_goes_on_where_a_rank_comes_late() -> None:
    def call(communicator: ShmCommunicator) -> tuple[int, list[float]]:
        x = torch.ones(3)
        return add(communicator, x, late=0.2 * communicator.topology.rank), x.tolist()

    first, second = on(2, call)
    assert first == (1, [2.0] * 3) and second == (0, [2.0] * 3)


@pytest.mark.parametrize("other", ["operation", "step", "bytes"])
def test_ranks_that_differ_are_told(other: str) -> None:
    """A rank in C and one in Python each name the field."""
    def call(communicator: ShmCommunicator) -> None:
        communicator.fingerprint.begin(4 + (other == "step") * communicator.topology.rank, 7)
        with pytest.raises(StateError, match=f"they differ in {other}"):
            if communicator.topology.rank == 0:
                add(communicator, torch.ones(3))
            elif other == "operation":
                communicator.all_gather(torch.ones(3))
            else:
                communicator.all_reduce(torch.ones(4 if other == "bytes" else 3))

    on(2, call)


def test_a_rank_that_ends_its_step_before_is_told() -> None:
    def call(communicator: ShmCommunicator) -> None:
        communicator.fingerprint.begin(4, 7)
        if communicator.topology.rank:
            communicator.end_step()
            done.wait(SOON)
        else:
            with pytest.raises(StateError, match="ended step 4 while rank 0 is in one more collective"):
                add(communicator, torch.ones(3))
            done.set()

    done = threading.Event()
    on(2, call)


def test_the_guard_and_the_end_hold_for_it() -> None:
    def call(communicator: ShmCommunicator) -> None:
        sums = communicator.native_sums
        assert sums is not None
        with phase(Phase.PREPARE), pytest.raises(GuardError, match="prepare has no communication"):
            sums.__enter__()
        with phase(Phase.PREPARE), pytest.raises(GuardError):
            sums.finish(torch.ones(3))
        with phase(Phase.EXECUTE):
            add(communicator, torch.ones(3))
        communicator.close()
        with pytest.raises(WorkerError, match="closed"):
            sums.__enter__()

    on(2, call)


def test_one_rank_and_an_older_library_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on(1, lambda c: c.native_sums) == [None]
    for name, value in (("ABI", -1), ("Path", lambda _: Path(__file__))):
        with monkeypatch.context() as patch:
            patch.setattr(native_sums, name, value)
            assert native_sums.load.__wrapped__() is None


def test_a_killed_peer_is_named(tmp_path: Path) -> None:
    wait_for_a_killed_peer(tmp_path, lambda communicator: add(communicator, torch.ones(3)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save_model("qwen3", HEADS, tmp_path_factory.mktemp("qwen3"))


@no_tape
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_on_a_tape_have_the_bits_of_sums_from_python(model: Path, dtype: Any, threads: int) -> None:
    """Both ranks sum within the tape, one of them, or none."""
    @torch.inference_mode()
    def step(communicator: ShmCommunicator, native: Sequence[bool]) -> list[torch.Tensor]:
        topology = communicator.topology
        torch.set_num_threads(threads)  # of this thread
        if not native[topology.rank]:
            communicator.native_sums = None
        engine = EngineConfig(model=str(model), tp=2, dtype=dtype, block_size=4, max_num_seqs=4)
        runner = backend.make_runner(WorkerConfig(engine, read_config(model), topology), CPU, communicator)
        runner.load_model()
        caches = runner.make_kv_caches(40)
        runner.warmup(caches)
        for i, cache in enumerate(caches):
            cache.normal_(generator=torch.Generator().manual_seed(2 * i + topology.rank))
        communicator.fingerprint.begin(1, 0)
        with phase(Phase.EXECUTE):
            logits = [runner.execute_forward(decode_input(runner, n), caches).logits.clone() for n in (1, 3, 4)]
        assert runner.tape is not None and runner.tape.steps == 3
        assert communicator.fingerprint.collectives == 3 * (2 + 2 * runner.config.model.num_layers)
        return logits

    expected = on(2, lambda c: step(c, (False, False)))[0]
    for native in ((True, True), (True, False), (False, True)):
        for found in on(2, lambda c, native=native: step(c, native)):
            assert all(map(torch.equal, found, expected)), native


@no_tape
def test_an_engine_gives_the_same_tokens_without_the_library(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(native_sums, "load", lambda: None)  # of the driver's rank; the other sums in C
        with LLM(str(model), device="cpu", tp=2, block_size=4, dtype="bfloat16") as llm:
            outputs = llm.generate(checkpoints.prompts(), SamplingParams(max_tokens=20, ignore_eos=True))
            worker: Any = llm.executor._worker  # type: ignore[attr-defined]
            assert worker.runner.tape.steps > 10 and (worker.communicator.native_sums is not None) == native
        found.append([o.token_ids for o in outputs])
    assert found[0] == found[1]


@no_tape
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_ends_or_stops_within_a_tape_is_named(model: Path, kind: signal.Signals) -> None:
    """In the middle of decode steps, most of whose time is within a tape."""
    with LLM(str(model), device="cpu", tp=2, block_size=4, heartbeat=2.0, max_model_len=256) as llm:
        peer = llm.executor._ranks.processes[0].process.pid  # type: ignore[attr-defined]
        runner: CpuModelRunner = llm.executor._worker.runner  # type: ignore[attr-defined]
        tape = runner.tape
        assert tape is not None
        hit: list[float] = []
        threading.Timer(0.4, lambda: (hit.append(time.monotonic()), os.kill(peer, kind))).start()
        with pytest.raises(WorkerError) as error:
            while True:
                llm.generate(checkpoints.prompts(), SamplingParams(max_tokens=200, ignore_eos=True))
        took = time.monotonic() - hit[0]
        assert tape.steps > 10
    assert (error.value.rank, error.value.cause) == (1, "died" if kind == signal.SIGKILL else "silent")
    assert took < (2.0 if kind == signal.SIGKILL else 8.0), took
