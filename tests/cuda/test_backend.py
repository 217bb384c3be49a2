"""Where the CUDA backend cannot be used, and which models it does not have: named, with what to do. Needs no GPU."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import forked
import pytest
import torch

import runners.cuda
from hal.contracts import backend as backends
from hal.contracts.attention import AttentionSpec
from hal.engine.llm import LLM
from hal.errors import BackendError, ConfigError

pytestmark = pytest.mark.torch_release
REASONS = {  # torch.version.cuda, torch.cuda.is_available(), whether Triton is there
    "torch": (None, False, True, r"PyTorch .* is built without CUDA: install a CUDA build of torch"),
    "driver": ("13.0", False, True, r"PyTorch .*CUDA 13\.0\) finds no usable GPU: check `nvidia-smi`.*driver"),
    "triton": ("13.0", True, False, r"Triton is not installed.*pip install triton")}


@pytest.mark.parametrize("reason", REASONS)
def test_a_missing_requirement_is_named_and_the_process_goes_on(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, available, triton, words = REASONS[reason]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(runners.cuda, "find_spec", lambda name: object() if triton else None)
    with pytest.raises(BackendError, match=rf"(?s)device 'cuda' is not available here.*got: {words}.*one of: .*cpu"):
        LLM(device="cuda")
    assert backends.select("auto").name != "cuda"
    with LLM(device="cpu") as llm:
        assert llm.generate(["37+85="])[0].text == "122"


def test_a_gpu_with_all_packages_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runners.cuda, "find_spec", lambda name: object())
    assert runners.cuda.backend.unavailable() is None


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendError, match=r"(?s)more ranks on this host than GPUs.*at most 1.*shared_gpu"):
        runners.cuda.backend.device(1)


def test_graphs_of_prompts_hold_as_many_tokens_as_are_computed_faster_than_launched() -> None:
    from runners.cuda.graphs import prompt_sizes

    assert prompt_sizes(8e9 / 32, 2048) == (128, 256, 384, 512, 768, 1024)
    assert prompt_sizes(5e8 / 24, 2048)[-2:] == (1536, 2048) and prompt_sizes(5e8 / 24, 1 << 20)[-1] == 8192
    assert prompt_sizes(8e9 / 32, 16) == (16,) and prompt_sizes(4e11 / 100, 2048) == ()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["generate", "1+1="], ["bench"], ["conformance", "--level", "0"]], ids=str)
def test_a_command_without_a_gpu_ends_with_one_error(command: list[str]) -> None:
    """This very torch, which has no CUDA or, its GPUs hidden, finds none."""
    device = "--backend" if command[0] == "conformance" else "--device"
    done = forked.run([sys.executable, "-m", "hal", *command, device, "cuda"], capture_output=True, text=True,
                      timeout=120, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    reason = "is built without CUDA: install" if torch.version.cuda is None else "finds no usable GPU: check"
    assert done.returncode == 1 and done.stdout == "", done
    assert "hal: error: " in done.stderr and reason in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="requires Triton, in which the attention kernels are written")
@pytest.mark.parametrize(("dim", "runs"), [(33, False), (320, False), (512, False), (256, True), (80, True)])
def test_a_head_dim_that_the_kernels_do_not_have(dim: int, runs: bool) -> None:
    from runners.cuda.attention import CudaAttention

    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=dim, scale=1.0)
    if runs:
        attention = CudaAttention([spec], device=torch.device("cpu"), dtype=torch.float32)
        assert attention.cache_shape(spec, 3, 16)[1] == 3
    else:
        with pytest.raises(ConfigError, match=rf"(?s)head_dim.*got: {dim}.*even, at most 256.*--device cpu"):
            CudaAttention([spec], device=torch.device("cpu"), dtype=torch.float32)


def test_its_ranks_mark_spans_for_nsight_and_page_lock_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal import profiling

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(profiling, "_marks", [])
    device = runners.cuda.backend.device(0)
    assert profiling._marks == [torch.cuda.nvtx.range]
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "zeros", lambda shape, **options: asked.append(options))
    runners.cuda.backend.runtime.host_memory(device, (3,), torch.uint8)
    assert asked == [{"dtype": torch.uint8, "pin_memory": True}]
