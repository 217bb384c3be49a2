"""Ranks with a GPU each, over NCCL: right tokens in every mode, and failures that are named in time and leave the
process usable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import parity
import pytest
import torch

from hal.config import BUNDLED_MODEL
from hal.engine.llm import LLM
from hal.errors import WorkerError
from runners.cuda import CudaBackend

if TYPE_CHECKING:
    from runners.cuda.runner import CudaModelRunner

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROBLEMS = [json.loads(line) for line in (BUNDLED_MODEL / "heldout.jsonl").read_text().splitlines()]
HEARTBEAT = 3.0
RAISED_AT = "TEST_RAISED_AT"  # a file, where the rank that raises writes when
SMALL: dict[str, Any] = {"max_num_seqs": 8, "num_blocks": 2000}


@pytest.mark.parametrize("options", [{n: 2, **more} for n in ("tp", "pp") for more in (
    {}, {"graphs": False}, {"control_plane": "collectives"})], ids=str)
def test_the_bundled_model_adds(options: dict[str, Any]) -> None:
    with LLM(device="cuda", num_blocks=2100, **options) as llm:
        assert bool(llm.executor._worker.runner.graphs) == options.get("graphs", True)
        outputs = llm.generate([p["prompt"] for p in PROBLEMS])
    assert sum(o.text == p["answer"] for o, p in zip(outputs, PROBLEMS, strict=True)) >= 990


@pytest.mark.parametrize("layout", ["tp", "pp"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_fp32_is_transformers(checkpoint: Callable[[str], Path], name: str, layout: str) -> None:
    """As one GPU is (test_engine.py): the same greedy tokens."""
    outputs, _ = parity.run(checkpoint(name), "cuda", max_num_seqs=8, num_blocks=600, **{layout: 2})
    parity.assert_parity(checkpoint(name), outputs, atol=5e-4)


@pytest.mark.parametrize("command", [["-m", "hal", "generate", "--tp", "2"],
                                     ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hal", "generate",
                                      "--tp", "2", "--wire", "none"]], ids=["strict", "torchrun"])
def test_programs_are_right_and_end(command: list[str]) -> None:
    environment = os.environ | ({} if "torch.distributed.run" in command else {"HAL_STRICT": "1"})
    done = subprocess.run([sys.executable, *command, "--device", "cuda", "--num-blocks", "500", "37+85="],
                          env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0 and "122" in done.stdout, done.stdout + done.stderr


def run(llm: LLM, steps: int = 10_000) -> dict[int, str]:
    """The texts of requests that finished."""
    found: dict[int, str] = {}
    while llm.unfinished and steps:
        found |= {output.request_id: output.text for output in llm.step() if output.finish_reason}
        steps -= 1
    return found


def signalled(llm: LLM, number: int) -> tuple[WorkerError, float]:
    """What the driver raises when rank 1 gets this signal in the middle of requests, and after how many seconds."""
    sent = time.monotonic()
    os.kill(llm.executor._ranks.processes[0].process.pid, number)
    with pytest.raises(WorkerError) as error:
        run(llm)
    took = time.monotonic() - sent
    assert not llm.executor._ranks.processes
    return error.value, took


@pytest.mark.parametrize("options", [{"tp": 2}, {"pp": 2}, {"tp": 2, "graphs": False},
                                     {"pp": 2, "control_plane": "collectives"}], ids=str)
def test_a_killed_rank_is_named_and_the_process_goes_on(options: dict[str, Any]) -> None:
    problems = PROBLEMS[:200]
    with LLM(device="cuda", **SMALL, **options) as llm:
        ids = [llm.add_request(problem["prompt"]) for problem in problems]
        texts = run(llm, steps=30)
        assert llm.unfinished
        error, took = signalled(llm, signal.SIGKILL)
        assert (error.rank, error.cause) == (1, "died") and took < 2, (error, took)
        llm.restart()
        texts |= run(llm)
    assert sum(texts[i] == p["answer"] for i, p in zip(ids, problems, strict=True)) >= 198


def test_a_stopped_rank_is_reported() -> None:
    with LLM(device="cuda", tp=2, heartbeat=HEARTBEAT, **SMALL) as llm:
        for problem in PROBLEMS[:200]:
            llm.add_request(problem["prompt"])
        run(llm, steps=30)
        error, took = signalled(llm, signal.SIGSTOP)
    assert (error.rank, error.cause) == (1, "silent") and took < 1.5 * HEARTBEAT + 1, (error, took)
    assert torch.ones(1000, device="cuda").sum().item() == 1000


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_an_exception_of_a_rank_in_a_step_reaches_the_driver(layout: str, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it, on the device, in collectives that never end."""
    monkeypatch.setenv(RAISED_AT, str(tmp_path / "at"))
    with LLM(device="test_two_gpus:failing", **SMALL, **{layout: 2}) as llm:
        with pytest.raises(WorkerError, match="planned") as error:
            llm.generate([p["prompt"] for p in PROBLEMS[:200]])
        took = time.time() - float((tmp_path / "at").read_text())
        assert (error.value.rank, error.value.cause) == (1, "KeyError") and "in step" in str(error.value)
        assert took < 1, took
    with LLM(device="cuda", **SMALL, **{layout: 2}) as llm:
        assert llm.generate(["37+85="])[0].text == "122"


class FailingBackend(CudaBackend):
    """Rank 1 raises in the tenth step of requests."""

    def make_runner(self, *args: Any) -> CudaModelRunner:
        from runners.cuda.runner import CudaModelRunner

        class FailingRunner(CudaModelRunner):
            steps = -1

            def warmup(self, *args: Any) -> None:
                super().warmup(*args)
                self.steps = 0

            def execute_model(self, *args: Any) -> Any:
                self.steps += self.steps >= 0
                if self.steps == 10 and self.config.topology.rank == 1:
                    Path(os.environ[RAISED_AT]).write_text(repr(time.time()))
                    raise KeyError("planned")
                return super().execute_model(*args)

        return FailingRunner(*args)


failing = FailingBackend()
