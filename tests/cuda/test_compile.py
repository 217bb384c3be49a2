"""The Triton kernels compile for a GPU, on a machine that has none: the interpreter knows nothing of types."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hal.models.ops import HeadNorms

pytestmark = [pytest.mark.torch_release, pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="requires Triton, not interpreted")]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches end where the machine code (sm_90) is made."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from runners.cuda.kernels import attention, launch

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert "cubin" in kernel.asm and kernel.metadata.shared <= 227 << 10  # bytes of a multiprocessor's memory
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "_supported", lambda device: True)
    monkeypatch.setattr(attention, "program_memory", lambda device: 227 << 10)
    driver.set_active(Hopper())
    yield
    driver.reset_active()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [896, 1100])  # a tile has whole rows, or not
def test_gemv(size: int, gated: bool) -> None:
    from runners.cuda.kernels.gemv import Norm, Tile, gemv

    weight, x = torch.ones(64, size, dtype=torch.bfloat16), torch.ones(1, size, dtype=torch.bfloat16)
    for norm, bias in ((None, None), (Norm(x[0], 1e-5), None), (Norm(x[0].float(), 1e-5, x), None),
                       (Norm(x[0], 1e-5, x), weight[:, 0].contiguous())):
        for some in (weight, weight[:2]):  # an argument that is 1 is a constant of the kernel
            gemv(x, some, bias, Tile(4, 1024, 4), gated=gated, norm=norm)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 64)], ids=str)
def test_attention(dtype: torch.dtype, dim: int, fp8: bool) -> None:
    from runners.cuda.kernels import attention

    q, k, v = torch.ones(3, 8, dim, dtype=dtype).split([4, 2, 2], 1)
    cache = torch.zeros(2, 5, 2, 16, dim).to(torch.float8_e4m3fn if fp8 else dtype)
    ints, tables, out = torch.zeros(4, dtype=torch.int32), torch.zeros(3, 4, dtype=torch.int32), torch.empty_like(q)
    norms, turned = HeadNorms(q[0, 0], k[0, 0].float(), 1e-5), (ints, torch.zeros(9, dim))
    for new, window, splits in ((attention.New(k, v, ints), 7, 1), (attention.New(k, v, ints, turned), None, 4),
                                (attention.New(k, v, ints, turned, norms), None, 4)):
        attention.write_kv(q, new, cache)
        for given in (None, new):
            attention.decode(q, cache, tables, ints, out, scale=0.1, window=window, new=given,
                             how=attention.Division(splits, 128 // splits, True))
        for first in (0, -1):
            attention.prefill(q, cache, tables, ints, ints, out, first_seq=first, max_queries=99, scale=0.1,
                              window=window)
    if not fp8 and dim == 128:
        how: dict[str, Any] = {"scale": 0.1, "window": None, "softcap": 50.0, "sinks": q[0, :, 0].contiguous()}
        attention.decode(q, cache, tables, ints, out, how=attention.Division(4, 128, True),
                         new=attention.New(k, v, ints), **how)
        attention.prefill(q, cache, tables, ints, ints, out, first_seq=0, max_queries=99, **how)


@pytest.mark.parametrize(("dtype", "fp8"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_latents(dtype: torch.dtype, fp8: bool) -> None:
    """Of the sizes of DeepSeek V3."""
    from runners.cuda.kernels import latent

    q, cache = torch.ones(3, 16, 576, dtype=dtype), torch.zeros(1, 5, 1, 16, 576)
    cache = cache.to(torch.float8_e4m3fn if fp8 else dtype)
    ints, tables = torch.zeros(4, dtype=torch.int32), torch.zeros(3, 4, dtype=torch.int32)
    latent.write(q[:, :1], cache, ints)
    for starts, splits in ((None, 1), (None, 9), (ints, 1)):
        latent.attend(q, cache, tables, ints[:3], starts, scale=0.1, value=512, splits=splits)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1), (torch.bfloat16, 1700), (torch.float32, 200)],
                         ids=str)
def test_experts(dtype: torch.dtype, tokens: int) -> None:
    """Of the sizes of Qwen3-30B-A3B, but for the number of experts."""
    from runners.cuda.kernels import experts

    hidden, size, count, k = 2048, 768, 16, 8
    x, gate_up, down = (torch.zeros(*shape, dtype=dtype) for shape in (
        (tokens, hidden), (2 * count * size, hidden), (count, hidden, size)))
    weights, chosen = experts.route(x[:, :count].contiguous(), k, True, 1.0)
    chosen.zero_()  # nothing was computed
    biases = gate_up[:, 0].contiguous(), down.view(-1)[:count * hidden]
    experts.experts(x, weights, chosen, experts.Held(gate_up, down, *biases, 0, count, 7.0))


@pytest.mark.parametrize(("hidden", "size", "count", "k", "biased"), [(2048, 768, 128, 8, False), (130, 1, 1, 1, True),
                                                                      (2880, 2880, 32, 4, True)])
def test_one_token_of_experts(hidden: int, size: int, count: int, k: int, biased: bool) -> None:
    from runners.cuda.kernels import experts, one_token

    kind = {"dtype": torch.bfloat16}
    x, gate_up, down = (torch.empty(*shape, **kind) for shape in (
        (1, hidden), (2 * count * size, hidden), (count, hidden, size)))
    biases = (gate_up[:, 0].contiguous(), down[:, :, 0].flatten()) if biased else (None, None)
    one_token.experts(x, torch.empty(1, count, **kind), experts.Held(
        gate_up, down, *biases, 0, count, 7.0 if biased else None), k, True, 1.0)


@pytest.mark.parametrize(("dtype", "kind", "group"), [
    (torch.bfloat16, torch.uint8, 64), (torch.bfloat16, torch.float8_e4m3fn, 1024), (torch.float16, torch.uint8, 32),
    (torch.float32, torch.int8, 1024)], ids=str)
def test_one_row_of_few_bits(dtype: torch.dtype, kind: torch.dtype, group: int) -> None:
    """Zero points and MXFP4 as in the next test; a tile has all inputs, or not."""
    from hal.weights.grid import Grid
    from runners.cuda.kernels.few_bits import few_bits, one_row
    from runners.cuda.kernels.gemv import Norm, Tile

    scales, x = torch.ones(64, 1024 // group), torch.ones(1, 1024, dtype=dtype)
    weight = few_bits(Grid(torch.zeros(64, 1024).to(kind), scales, group, (64,), scales if group == 64 else None),
                      group == 32)
    assert weight is not None
    one_row(x, weight, x[0, :64].contiguous(), norm=Norm(x[0], 1e-5, x) if weight.takes_norm else None)
    one_row(x, weight, None, tile=Tile(4, 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind", "group", "tokens"), [
    (torch.bfloat16, torch.uint8, 64, 1), (torch.bfloat16, torch.uint8, 64, 64), (torch.bfloat16, torch.uint8, 64, 700),
    (torch.bfloat16, torch.int8, 1024, 700), (torch.bfloat16, torch.float8_e4m3fn, 128, 700),
    (torch.float16, torch.uint8, 32, 64), (torch.float32, torch.int8, 1024, 200)], ids=str)
def test_experts_in_few_bits(dtype: torch.dtype, kind: torch.dtype, group: int, tokens: int) -> None:
    """Of 4 bits those with groups of 64 have zero points, and those with groups of 32 are MXFP4."""
    from hal.weights.grid import Grid
    from runners.cuda.kernels.few_bit_experts import Stacks, experts
    from runners.cuda.kernels.few_bits import few_bits

    hidden, count, k = 1024, 4, 8
    up, down = (few_bits(Grid(torch.zeros(rows, hidden).to(kind), torch.ones(rows, hidden // group), group, (rows,),
                              torch.ones(rows, hidden // group) if group == 64 else None), group == 32)
                for rows in (count * 2 * hidden, count * hidden))
    assert up is not None and down is not None
    chosen = torch.zeros(tokens, k, dtype=torch.int32)
    experts(torch.ones(tokens, hidden, dtype=dtype), torch.ones(tokens, k), chosen, Stacks(
        up, down, None, None, 0, count, 7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_rest(dtype: torch.dtype) -> None:
    from runners.cuda.kernels import elementwise, sampling

    x, ints, floats = torch.ones(3, 1000, dtype=dtype), torch.zeros(3, dtype=torch.int32), torch.ones(3)
    sampling.greedy(x, ints, ints)
    for limits in ((None, None), (floats, floats)):
        sampling.greedy(x, draw=(floats, *limits, ints.long(), ints, ints))
    sampling.thresholds(x, floats, ints, floats, floats)
    elementwise.resolve(ints, ints, ints)
    for gains in (x[0], x[0].float()):
        elementwise.rms_norm(x, gains, 1e-5)
        elementwise.add_rms_norm(x, x, gains, 1e-5)
    elementwise.silu_mul(x)
    elementwise.rotary(x.view(3, 10, 100), ints, torch.zeros(9, 100))


@pytest.mark.parametrize("count", [4096, 524288])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_over_peer_memory(dtype: torch.dtype, count: int) -> None:
    from runners.cuda.kernels.sums import PROGRAMS, peer_sum

    addresses, epochs = torch.zeros(4, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int32)
    peer_sum(torch.zeros(count // dtype.itemsize * 2, dtype=dtype), addresses, addresses, epochs, epochs[:1], 1, 4)


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adapters(dtype: torch.dtype, tokens: int) -> None:
    from runners.cuda.kernels.adapters import by_slot, expand, inner_of, shrink, tiles_of

    x, y, a, b = (torch.ones(*shape, dtype=dtype) for shape in (
        (tokens, 1024), (tokens, 1536), (4, 32, 1024), (4, 1536, 16)))
    slots = torch.zeros(tokens, dtype=torch.int32)
    inner, step = inner_of(x, a), by_slot(slots, 4)
    shrink(x, a, step, inner)
    expand(y, inner, b, step, tiles_of((1024, 512), x.device))
