"""What the worker tests share: a scheduler of a few lines, and a null backend that fails on request."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # `by_hand`, also in scripts that import this module

from by_hand import numbers

from hal.config import BUNDLED_MODEL, EngineConfig
from hal.contracts import backend as backends
from hal.contracts.device import GLOO, Collectives
from hal.contracts.inputs import PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.errors import CapacityError, WorkerError
from hal.model_config import ModelConfig
from hal.testing.null import NullBackend, NullRunner
from workers.executors.driver import GENERIC_WORKER, DriverExecutor, make_executor
from workers.worker.generic import Worker

MODEL = ModelConfig(family="llama", architecture="Null", vocab_size=97, hidden_size=8, num_layers=3, num_heads=2,
                    num_kv_heads=2, head_dim=4, intermediate_size=8, max_position=64, dtype="float32")
SIZE = 4  # tokens per block


def engine(**options: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(BUNDLED_MODEL), "device": "hal.testing.null:backend", "block_size": SIZE,
                           "max_num_seqs": 8, "max_num_batched_tokens": 64, **options})


def executor(model: ModelConfig = MODEL, worker: str = GENERIC_WORKER, **options: Any) -> DriverExecutor:
    config = engine(**options)
    return make_executor(config, model, backends.select(config.device), worker=worker)


@dataclass
class Seq:
    tokens: list[int]
    prompt: int
    temperature: float = 0.0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


def ints(values: Any) -> np.ndarray:
    return np.array(list(values), np.int32)


class Driver:
    """Runs sequences in lockstep through an executor: prompts in chunks of `chunk` tokens, each block by itself from a
    counter, one row each."""

    def __init__(self, to: DriverExecutor, prompts: list[list[int]], chunk: int = 5, temperature: float = 0.0) -> None:
        self.executor, self.chunk, self.step, self.digest, self.next_block = to, chunk, 0, 0, 1
        self.seqs = [Seq(list(p), len(p), temperature) for p in prompts]
        self.fresh = True
        self.appended: list[tuple[int, int]] = []

    def request(self, **moves: np.ndarray) -> tuple[ExecuteModelRequest, list[int]]:
        new = self.seqs if self.fresh else []
        queries = [min(len(s.tokens) - s.computed, self.chunk) for s in self.seqs]
        order = sorted(range(len(self.seqs)), key=lambda i: queries[i] != 1)
        starts, counts, blocks = [], [], []
        for i in order:
            s = self.seqs[i]
            need = -(-(s.computed + queries[i]) // SIZE) - len(s.blocks)
            starts.append(len(s.blocks))
            counts.append(need)
            blocks += (mine := list(range(self.next_block, self.next_block + need)))
            s.blocks += mine
            self.next_block += need
        request = ExecuteModelRequest(
            step=self.step, digest=self.digest, finished_rows=ints([]), new_rows=ints(range(len(new))),
            new_lens=ints(len(s.tokens) for s in new), new_prompt_lens=ints(s.prompt for s in new),
            new_tokens=ints(t for s in new for t in s.tokens),
            new_floats=numbers("float", [{"temperature": s.temperature} for s in new]),
            new_ints=numbers("int", [{"seed": i} for i, _ in enumerate(new)]),
            append_rows=ints(r for r, _ in self.appended), append_tokens=ints(t for _, t in self.appended),
            block_rows=ints(order), block_starts=ints(starts), block_counts=ints(counts), new_blocks=ints(blocks),
            rows=ints(order), num_scheduled=ints(queries[i] for i in order),
            num_computed=ints(self.seqs[i].computed for i in order), **moves)
        self.fresh, self.appended = False, []
        self.step, self.digest = self.step + 1, request.chain()
        sampled = []
        for i in order:
            self.seqs[i].computed += queries[i]
            if self.seqs[i].computed == len(self.seqs[i].tokens):
                sampled.append(i)
        return request, sampled

    def run(self, steps: int, **moves: np.ndarray) -> list[list[int]]:
        """The sequences' tokens after some steps; `moves` are of the first of them."""
        for _ in range(steps):
            request, sampled = self.request(**moves)
            moves = {}
            output = self.executor.execute_model(request).result()
            for i, token in zip(sampled, output.token_ids.tolist(), strict=True):
                self.seqs[i].tokens.append(token)
                self.appended.append((i, token))
        return [s.tokens for s in self.seqs]


class OtherInput(PagedModelInput):
    """Of another version of the library."""


def fault(phase: str, rank: int, count: int = 0) -> str | None:
    """Fail as TEST_FAULT says: "phase-kind rank count". Returns a kind that is not the same everywhere."""
    what, at_rank, at_count = os.environ["TEST_FAULT"].split()
    where, _, kind = what.partition("-")
    if (where, at_rank, at_count) != (phase, str(rank), str(count)):
        return None
    match kind:
        case "bug":
            raise KeyError(what)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "oom":
            run_out_of_memory()
    return kind


def run_out_of_memory() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
    try:
        torch.ones(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class FaultyRunner(NullRunner):
    """Fails as `fault` says."""

    executed = prepared = 0

    def fault(self, phase: str, count: int = 0) -> str | None:
        return fault(phase, self.config.topology.rank, count)

    def load_model(self, *args: Any) -> None:
        match self.fault("load"):
            case "capacity":
                raise CapacityError("weights do not fit", got="3 bytes", expected="4 bytes", hint="buy one")
            case "differ":
                self.input_type = OtherInput

    def warmup(self, *args: Any) -> None:
        self.fault("warmup")
        self.communicator.all_reduce(torch.ones(1))

    def prepare_model_input(self, request: ExecuteModelRequest) -> Any:
        self.prepared += 1
        match self.fault("prepare", self.prepared):
            case "talk":
                self.communicator.all_reduce(torch.ones(1))
            case "invalid":
                made = super().prepare_model_input(request)
                made.slot_mapping = made.slot_mapping[:-1]
                return made
            case "differ":
                made = super().prepare_model_input(request)
                made.input_ids = (made.input_ids + 1) % 97
                return made
        return super().prepare_model_input(request)

    def execute_model(self, *args: Any) -> Any:
        self.executed += 1
        match self.fault("execute", self.executed):
            case "talk":
                dist.HashStore().set("a", "b")
            case "nothing":
                super().execute_model(*args)
                return 3
            case "more":
                self.communicator.all_reduce(torch.ones(1))
            case "last":
                output = super().execute_model(*args)
                self.communicator.all_reduce(torch.ones(1))
                return output
        return super().execute_model(*args)


class WrappingRunner(FaultyRunner):
    """Communicates from inside a compiled program, whose library gives the text of an exception alone, as XLA does."""

    def execute_model(self, *args: Any) -> Any:
        try:
            return super().execute_model(*args)
        except WorkerError as error:
            text = f"INTERNAL: CpuCallback error: {error}"
        raise RuntimeError(text)


class FaultyWorker(Worker):
    """Fails at its end."""

    def shutdown(self) -> None:
        fault("shutdown", self.topology.rank)
        super().shutdown()


class FaultyBackend(NullBackend):
    name = "faulty"
    rank = 0

    def device(self, local_rank: int) -> torch.device:
        self.rank = local_rank
        return super().device(local_rank)

    @property
    def collectives(self) -> Collectives:  # asked for while ranks connect to each other
        fault("connect", self.rank)
        return GLOO

    def make_runner(self, *args: Any) -> FaultyRunner:
        return FaultyRunner(*args)


class WrappingBackend(FaultyBackend):
    name = "wrapping"

    def make_runner(self, *args: Any) -> WrappingRunner:
        return WrappingRunner(*args)


faulty, wrapping = FaultyBackend(), WrappingBackend()
