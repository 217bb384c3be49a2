"""Programs dequantise weights of few bits: the reference of every scheme is traced, and none of its operations leaves
the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hal.checkpoints.hf_config import parse_config
from hal.config import Topology
from hal.conformance.cases.weights import _drawn
from hal.contracts.communicator import LocalCommunicator
from hal.models.experts import ExpertNames, Experts
from hal.models.layers import Build, Linear
from hal.models.ops import Ops
from hal.weights import LinearSpec, Projection, Scheme
from hal.weights.eight_bits import EightBits
from hal.weights.gguf import GgufBlocks
from hal.weights.groups import Awq, Gptq, Packed
from hal.weights.mxfp4 import Mxfp4, Mxfp4Blocks

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


@pytest.mark.parametrize("scheme", [EightBits("fp8", "block", block=(8, 64)), EightBits("int8", "channel", "token"),
                                    Gptq(4, 64, True), Mxfp4Blocks(), GgufBlocks("Q4_K")], ids=lambda s: s.name)
def test_experts_are_traced(scheme: Scheme) -> None:
    """Every expert computes every token, by weights that the program dequantises."""
    from runners.tpu import lowering
    from runners.tpu.spmd import TpuOps

    config = parse_config({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "num_experts": 3,
                           "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_attention_heads": 4,
                           "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64})
    ctx: Any = SimpleNamespace(rng=np.random.default_rng(0))
    plain, layer = (Experts(
        config, Build(Topology(), LocalCommunicator(), ops, torch.float32, torch.device("cpu"), lambda _: scheme),
        "layers.0.mlp", ExpertNames()) for ops in (Ops(), TpuOps(1)))
    for ours, theirs in zip(plain.layers, layer.layers, strict=True):
        for name, parameter in list(ours.named_parameters()):
            for entry in parameter.data:
                entry.copy_(_drawn(ctx, scheme, name, entry))
            delattr(theirs, name)  # as runners.tpu.spmd places a model's parameters
            setattr(theirs, name, parameter.data.to(lowering.device()))
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(4, 256, generator=generator), torch.rand(4, 2, generator=generator)
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]])
    expected = plain.ops.experts(x, weights, chosen, plain)
    given = [t.to(lowering.device()) for t in (x, weights, chosen)]
    program = lowering.Program(lambda arguments, state: ((), (layer.ops.experts(*arguments, layer),)), given)
    got, = program(given)
    allowed = 2e-2 if "int8" in scheme.name else 1e-4
    torch.testing.assert_close(got.cpu(), expected, rtol=allowed, atol=allowed)
