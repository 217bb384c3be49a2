"""Programs dequantise weights of few bits: the reference of every scheme is traced, and none of its operations leaves
the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hal.config import Topology
from hal.conformance.cases.weights import _drawn
from hal.contracts.communicator import LocalCommunicator
from hal.models.layers import Build, Linear
from hal.models.ops import Ops
from hal.weights import LinearSpec, Projection, Scheme
from hal.weights.eight_bits import EightBits
from hal.weights.gguf import GgufBlocks
from hal.weights.groups import Awq, Gptq, Packed
from hal.weights.mxfp4 import Mxfp4

pytestmark = [pytest.mark.torch_release, pytest.mark.usefixtures("xla")]
SCHEMES: list[Scheme] = [
    EightBits("fp8", "tensor", "static"), EightBits("fp8", "block", "group", (8, 64)),
    EightBits("int8", "channel", "token"), Packed(4, 64, act_order=True), Packed(4, 64, symmetric=False, on_load=True),
    Gptq(4, 64), Awq(64), Mxfp4(), GgufBlocks("Q8_0"), GgufBlocks("Q4_K"), GgufBlocks("Q6_K")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_scheme_is_traced(scheme: Scheme) -> None:
    from runners.tpu import lowering
    from runners.tpu.spmd import TpuOps

    spec = LinearSpec(256, (Projection("a", 24), Projection("b", 16)), "out")
    ctx: Any = SimpleNamespace(rng=np.random.default_rng(0))
    layers = [Linear(Build(Topology(), LocalCommunicator(), ops, torch.float32, torch.device("cpu"), lambda _: scheme),
                     spec, bias=False) for ops in (Ops(), TpuOps(1))]
    plain, layer = layers
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(_drawn(ctx, scheme, name, parameter.data))
        delattr(layer, name)  # as runners.tpu.spmd places a model's parameters
        setattr(layer, name, parameter.data.to(lowering.device()))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    expected = plain(x)
    program = lowering.Program(lambda arguments, state: ((), (layer(arguments[0]),)), [x.to(lowering.device())])
    got, = program([x.to(lowering.device())])
    allowed = 2e-2 if scheme.name.startswith("fp8") else 1e-3 if "int8" in scheme.name else 1e-4  # of a rounded input
    torch.testing.assert_close(got.cpu(), expected, rtol=allowed, atol=allowed)
