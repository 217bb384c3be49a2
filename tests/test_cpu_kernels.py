"""The CPU's compiled kernels, at every level of instructions that this processor has, against plain PyTorch."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ConfigError
from hal.models.layers import Build, Linear
from hal.models.ops import Ops
from hal.weights import LinearSpec, Projection, Scheme
from hal.weights.eight_bits import EightBits
from hal.weights.gguf import GgufBlocks
from hal.weights.groups import Awq, Gptq, Packed
from runners.cpu import choice, compiled
from runners.cpu.grids import GridWeight
from runners.cpu.invariant import InvariantOps
from runners.cpu.linears import BLOCKS, BUCKETS, PACKED, WAYS, DenseWeight, Kernels, can_pack
from runners.cpu.ops import CpuOps

LEVELS = compiled.available()
ROWS = st.integers(1, 9) | st.sampled_from([16, 33])


def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    assert LEVELS or shutil.which("cc") is None or "AVX2" in compiled.load()[1], (
        f"{compiled.load()[1]}: run `pip install -e .`")
    assert compiled.described() and (not LEVELS or compiled.threaded() is not None)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.torch_release
@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=ROWS, inputs=st.integers(1, 200), outputs=st.integers(1, 70), bias=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), gap=st.integers(0, 3), threads=st.integers(1, 3))
def test_a_dense_product(data: Any, rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, gap: int,
                         threads: int) -> None:
    """Odd sizes, rows of x with gaps, weights that are a view. What lies behind a row of the weight has no effect."""
    if not LEVELS:
        pytest.skip("no kernels here")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(rows, inputs + gap, generator=generator).to(dtype)[:, :inputs]
    storage = torch.full((outputs, inputs + gap), float("nan"), dtype=dtype)
    weight = storage[:, :inputs].copy_(torch.randn(outputs, inputs, generator=generator))
    b = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    for level in LEVELS:
        got = DenseWeight(weight, b, Kernels(level), ("kernel",) * len(BUCKETS))(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=3e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(33, 60), inputs=st.integers(1, 100) | st.just(1024),
       outputs=st.integers(1, 50), bias=st.booleans(), gap=st.integers(0, 3), threads=st.integers(1, 3))
def test_a_product_in_blocks(seed: int, rows: int, inputs: int, outputs: int, bias: bool, gap: int, threads: int,
                             ) -> None:
    """Odd sizes, rows of x with gaps, weights that are a view, and a gate behind the product. What lies behind a row of
    the weight or of x has no effect."""
    if not LEVELS:
        pytest.skip("no kernels here")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.full((n, inputs + gap), float("nan"), dtype=torch.bfloat16)[:, :inputs].copy_(
        torch.randn(n, inputs, generator=generator)) for n in (rows, 2 * outputs))
    b = torch.randn(2 * outputs, generator=generator).bfloat16() if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    for level in LEVELS:
        layer = DenseWeight(weight, b, Kernels(level), ("kernel",) * (len(BUCKETS) - 1) + (BLOCKS,))
        got = layer(x)
        assert layer.in_blocks(rows) and not layer.in_blocks(32)
        torch.testing.assert_close(got.double(), expected, rtol=8e-3, atol=3e-5)
        torch.testing.assert_close(layer.gated(x), Ops().silu_mul(got), rtol=8e-3, atol=1e-6)


def test_a_large_product_with_several_threads_and_values_that_are_not_finite() -> None:
    torch.set_num_threads(3)
    weight, x = torch.randn(700, 320).bfloat16(), torch.randn(12, 320).bfloat16()
    x[3, 5], x[4, 5] = float("nan"), float("inf")
    expected = F.linear(x.float(), weight.float())
    for level in LEVELS:
        got = DenseWeight(weight, None, Kernels(level), ("kernel",) * len(BUCKETS))(x)
        torch.testing.assert_close(got.float(), expected, rtol=8e-3, atol=1e-3, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows, inputs, outputs", [(33, 9001, 70), (2100, 64, 40), (150, 140_000, 3)])
def test_a_row_has_the_same_bits_in_any_block(rows: int, inputs: int, outputs: int, threads: int) -> None:
    """Rows are computed in slices of what the cache holds, and the last of them may be computed twice."""
    if not LEVELS:
        pytest.skip("no kernels here")
    torch.set_num_threads(threads)
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    x[20, 3], x[-1, 60] = float("nan"), float("inf")
    for level in LEVELS:
        layer = DenseWeight(weight, None, Kernels(level), (BLOCKS,) * len(BUCKETS))
        assert torch.equal(bits_of(layer(x)), torch.cat([bits_of(layer(part)) for part in x.split(20)]))
        assert layer(x)[20].isnan().all() and layer(x)[:20].isfinite().all()


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), rows=ROWS | st.just(70), groups=st.integers(1, 5), short=st.integers(0, 31),
       group=st.sampled_from([0, 32, 64, 96, 128, 320, 512, 1024, 2048]), outputs=st.integers(1, 70),
       bits=st.sampled_from([4, 8]), bias=st.booleans(), own_zeros=st.booleans(),
       scale_type=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), gap=st.integers(0, 3),
       threads=st.integers(1, 3))
def test_a_product_with_few_bits(data: Any, rows: int, groups: int, short: int, group: int, outputs: int, bits: int,
                                 bias: bool, own_zeros: bool, scale_type: torch.dtype, gap: int, threads: int) -> None:
    """Only inputs are rounded, to 16 bits in groups. The levels give the same bits, and so does a row by itself."""
    if not LEVELS:
        pytest.skip("no kernels here")
    torch.set_num_threads(threads)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs = max((group or 300) * min(groups, 2400 // (group or 300)), group or 300) - short
    values = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    of_groups = (outputs, -(-inputs // group) if group else 1)
    scales = (torch.rand(of_groups) * 0.1 + 0.01).to(scale_type).float()
    zeros = torch.randint(0, 1 << bits, of_groups, dtype=torch.uint8) if own_zeros else None
    x = (torch.randn(rows, inputs + gap) * torch.rand(rows, 1).exp2()).bfloat16()[:, :inputs]
    x[:, data.draw(st.integers(0, inputs - 1))] *= 50
    b = torch.randn(outputs).bfloat16() if bias else None

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.double().repeat_interleave(group or inputs, 1)[:, :inputs]

    weight = (values.double() - (1 << bits - 1 if zeros is None else wide(zeros))) * wide(scales)
    expected = F.linear(x.double(), weight, None if b is None else b.double())
    found = {}
    for level in LEVELS:
        layer = GridWeight(values, scales, zeros, b, Kernels(level), bits=bits, group=group)
        found[level] = layer(x)
        # Half a step of each input, where a step is a part of the largest input of its group; then bfloat16.
        wide_group = layer.native.x_group
        assert wide_group <= 1024
        step = torch.stack([each.abs().amax(1).double() for each in x.split(wide_group, 1)], 1) / 32767
        allowed = 0.5 * step.repeat_interleave(wide_group, 1)[:, :inputs] @ weight.abs().T
        allowed += expected.abs() * 2**-8 + 1e-4
        assert ((found[level].double() - expected).abs() <= allowed).all(), level
        assert torch.equal(bits_of(layer(x[rows // 2:rows // 2 + 1])), bits_of(found[level][rows // 2:rows // 2 + 1]))
    assert all(torch.equal(bits_of(got), bits_of(found[LEVELS[0]])) for got in found.values())


def test_threads_of_a_caller_can_compute_ranges_of_the_outputs_of_few_bits() -> None:
    x, outputs = torch.randn(3, 320).bfloat16(), 50
    for level in LEVELS:
        layer = GridWeight(torch.randint(0, 16, (outputs, 320), dtype=torch.uint8), torch.rand(outputs, 5), None, None,
                           Kernels(level), bits=4, group=64)
        library, weight = layer.kernels, ctypes.byref(layer.native)
        size = library.hal_few_bits_ready_bytes(weight)
        ready = torch.zeros(3, size + 64, dtype=torch.uint8)
        y = torch.full((3, outputs + 2), 7.0).bfloat16()
        for row in range(3):
            library.hal_few_bits_ready(weight, x[row].data_ptr(), ready.data_ptr() + row * size)
        library.hal_few_bits_range(weight, ready.data_ptr(), 3, y.data_ptr(), outputs + 2, 1, 4)
        library.hal_few_bits_range(weight, ready.data_ptr(), 3, y.data_ptr(), outputs + 2, 0, 1)
        assert torch.equal(y[:, :outputs], layer(x)) and (y[:, outputs:] == 7).all()


SCHEMES = [EightBits("int8", "channel"), EightBits("int8", "channel", "token"), EightBits("int8", "tensor"),
           EightBits("int8", "block"), Packed(4, 64), Packed(4, 32, symmetric=False), Packed(8, 64), Packed(8, 32),
           Packed(8, 64, symmetric=False), Packed(4, 96), Packed(4, None),
           Packed(4, 128, symmetric=False, on_load=True), Gptq(4, 64), Gptq(4, 32), Awq(64),
           GgufBlocks("Q8_0"), GgufBlocks("Q4_0")]


def layer_of(scheme: Scheme, inputs: int, outputs: int, ops: Ops, dtype: torch.dtype) -> Linear:
    """With random content."""
    torch.manual_seed(0)
    spec = LinearSpec(inputs, (Projection("a", outputs), Projection("b", 32)), "out")
    layer = Linear(Build(Topology(), LocalCommunicator(), ops, dtype, torch.device("cpu"), lambda name: scheme), spec,
                   bias=True)
    for name, parameter in layer.named_parameters():
        if parameter.dtype.is_floating_point:
            parameter.data.copy_(torch.rand(parameter.shape) * 0.1 + 0.01)
        elif isinstance(scheme, GgufBlocks):
            blocks = torch.randint(0, 256, (len(parameter), inputs // 32, parameter.shape[1] * 32 // inputs))
            blocks[..., 1] = 30  # the upper byte of the scale in fp16
            parameter.data.copy_(blocks.flatten(1))
        else:
            info = torch.iinfo(parameter.dtype)
            low, high = (0, 15) if name == "weight_zero_point" and parameter.dtype == torch.uint8 else (
                info.min + 1, info.max)
            parameter.data.copy_(torch.randint(low, high, parameter.shape))
    return layer


@pytest.mark.torch_release
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.name}-{getattr(s, 'group', '')}")
def test_a_product_with_quantised_weights(scheme: Scheme) -> None:
    """Nearer to the exact product than plain PyTorch is, which rounds the weights to bfloat16."""
    for inputs in (64, 128, 832):
        plain = layer_of(scheme, inputs, 128, Ops(), torch.bfloat16)
        exact = layer_of(scheme, inputs, 128, Ops(), torch.float32)
        for rows, threads in ((1, 2), (9, 3)):
            torch.set_num_threads(threads)
            x = torch.randn(rows, inputs).bfloat16()
            rounded = x if not hasattr(scheme, "rounded") else scheme.rounded(x)
            expected = F.linear(rounded.double(), scheme.dequantize(exact).double(), plain.bias.double())
            allowed = (scheme.linear(x, plain).double() - expected).abs().max() + 1e-3
            for level in LEVELS:
                ops = CpuOps(Kernels(level))
                layer = layer_of(scheme, inputs, 128, ops, torch.bfloat16)
                ops.pack_linear(layer)
                assert isinstance(layer.packed, GridWeight), ops.described()
                got = ops.linear(x, layer)
                assert (got.double() - expected).abs().max() <= allowed * 1.2, (level, rows, inputs)


OTHER_SCHEMES = [EightBits("fp8", "channel"), EightBits("fp8", "channel", "token"), EightBits("fp8", "block", "group"),
                 EightBits("fp8", "tensor", "static"), GgufBlocks("Q4_K")]


@pytest.mark.slow
@pytest.mark.torch_release
@pytest.mark.parametrize("scheme", [*SCHEMES, *OTHER_SCHEMES], ids=lambda s: f"{s.name}-{getattr(s, 'group', '')}")
def test_a_row_has_the_same_bits_among_any_others(scheme: Scheme) -> None:
    """With batch_invariant: alone and at each place among others; with any number of threads, where the product is our
    own. PyTorch's in float32 follows that number on some processors."""
    inputs = 256 if scheme in OTHER_SCHEMES else 832
    for level, dtype in [*((level, torch.bfloat16) for level in LEVELS or [None]), (None, torch.float32)]:
        ops = InvariantOps(Kernels(level))
        layer = layer_of(scheme, inputs, 128, ops, dtype)
        ops.pack_linear(layer)
        rows = torch.randn(40, inputs).to(dtype) * torch.logspace(-2, 2, 40)[:, None].to(dtype)
        for count, threads in ((2, 1), (7, 2), (16, 3), (33, 1), (40, 2)):
            torch.set_num_threads(threads if level is None else 1)
            alone = torch.cat([ops.linear(row, layer) for row in rows.split(1)])
            torch.set_num_threads(threads)
            order = torch.randperm(40)[:count]
            got = ops.linear(rows[order], layer)
            assert torch.equal(got, alone[order]), (level, count, threads)


def test_inputs_that_are_not_finite_reach_every_output_of_a_quantised_weight() -> None:
    for level in LEVELS:
        ops = CpuOps(Kernels(level))
        layer = layer_of(Packed(4, 64), 128, 16, ops, torch.bfloat16)
        ops.pack_linear(layer)
        x = torch.randn(2, 128).bfloat16()
        x[1, 3] = float("inf")
        got = ops.linear(x, layer)
        assert got[0].isfinite().all() and not got[1].isfinite().any()


def test_what_the_kernels_cannot_read_is_computed_by_plain_pytorch() -> None:
    for scheme, dtype in ((Packed(4, 64), torch.float32), (Packed(4, 64, act_order=True), torch.bfloat16),
                          (Packed(4, 16), torch.bfloat16), (GgufBlocks("Q4_K"), torch.bfloat16)):
        ops, inputs = CpuOps(), 256
        layer = layer_of(scheme, inputs, 48, ops, dtype)
        if isinstance(scheme, Packed) and scheme.act_order:
            layer.get_parameter("weight_g_idx").data.copy_(torch.randint(0, 4, (2, inputs)))
        ops.pack_linear(layer)
        assert layer.packed is None and "plain PyTorch" in ops.described()
        x = torch.randn(2, inputs).to(dtype)
        torch.testing.assert_close(ops.linear(x, layer), scheme.linear(x, layer), equal_nan=True)


_NEEDS = "requires a CPU with AVX512BW, VL and DQ, on which oneDNN has a layout of bfloat16 weights"


@pytest.mark.parametrize("way", [*WAYS, PACKED])
@pytest.mark.torch_release
def test_every_way_gives_the_same(way: str) -> None:
    if way in ("kernel", "one thread", BLOCKS) and not LEVELS:
        pytest.skip("no kernels here")
    if way == PACKED and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip(_NEEDS)
    weight, bias = torch.randn(200, 96).bfloat16(), torch.randn(200).bfloat16()
    layer = DenseWeight(weight, bias, Kernels(), (way,) * len(BUCKETS))
    for rows in (0, 1, 5, 32, 33, 300, 2060):
        x = torch.randn(rows, 96).bfloat16()
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=2e-2, atol=2e-2)


def test_a_profile_names_the_kernels() -> None:
    if not LEVELS:
        pytest.skip("no kernels here")
    x, weight = torch.randn(40, 32).bfloat16(), torch.randn(8, 32).bfloat16()
    with torch.profiler.profile() as profile:
        for way, rows in (("kernel", 2), (BLOCKS, 40)):
            DenseWeight(weight, None, Kernels(), (way,) * len(BUCKETS))(x[:rows])
    assert {"hal_linear", "hal_blocks"} <= {event.key for event in profile.key_averages()}


def test_the_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a" / "choices.json"
    monkeypatch.setenv("HAL_CPU_CHOICES", str(file))
    monkeypatch.setattr(choice, "_SMALL", 0)
    monkeypatch.setattr(choice, "_COPIES", 2)
    weight, measured = torch.randn(64, 48), choice._measured
    found = choice.choose(weight, Kernels())
    assert len(found) == len(BUCKETS) and json.loads(file.read_text())
    monkeypatch.setattr(choice, "_measured", lambda *_: pytest.fail("measured again"))
    assert choice.choose(weight, Kernels()) == found
    monkeypatch.setattr(choice, "_measured", measured)
    if LEVELS:  # what another level chose is not taken over
        choice.choose(weight, Kernels("off"))
        assert len(json.loads(file.read_text())) == 2
    for content in ("", "[]", '{"a": 1}', file.read_text().replace("torch", "other").replace("oneDNN", "other")):
        file.write_text(content)
        assert choice.choose(weight, Kernels())


def test_the_fastest_way_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[str, float] = {}
    monkeypatch.setattr(choice, "_times", lambda layers, x: {name: times[name] for name in layers})
    monkeypatch.setattr(choice, "_COPIES", 1)
    times |= {"torch": 2.0, "kernel": 1.0, "one thread": 1.5, "fp32 tiles": 3.0, BLOCKS: 3.0,
              PACKED: 0.99 if LEVELS else 1.98}
    weight = torch.randn(64, 64).bfloat16()
    assert set(choice._measured(weight, Kernels())) == {"kernel" if LEVELS else "torch"}
    times[PACKED] = 0.9 if LEVELS else 1.8
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip(_NEEDS)
    assert set(choice._measured(weight, Kernels())) == {PACKED}


def test_the_level_can_be_restricted_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "off")
    assert compiled.level() == "off" and not Kernels()
    if LEVELS:
        monkeypatch.setenv(compiled.VARIABLE, "avx2")
        assert compiled.level() == "avx2" and Kernels()
    monkeypatch.setenv(compiled.VARIABLE, "sse")
    with pytest.raises(ConfigError, match="names no level"):
        compiled.level()


@pytest.mark.torch_release
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednns_layout_is_there(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip(_NEEDS)
    assert can_pack(dtype), "the operators are there in every supported release on this kind of machine"
