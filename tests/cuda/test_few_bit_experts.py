"""Kernels of experts in few bits against the dequantised experts of hal.weights in plain PyTorch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_kernels import DEVICE, DTYPES, close

from hal.checkpoints.hf_config import parse_config
from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.models.experts import ExpertNames, Experts
from hal.models.layers import Build
from hal.models.ops import Ops
from hal.weights.base import Scheme
from hal.weights.configs import ON_LOAD
from hal.weights.eight_bits import EightBits
from hal.weights.groups import Awq, Gptq, Packed
from hal.weights.mxfp4 import Mxfp4, Mxfp4Blocks

ON_GPU = DEVICE.type == "cuda"
HIDDEN, SIZE, COUNT, K = (1096, 408, 32, 4) if ON_GPU else (136, 72, 6, 2)  # no tile divides the sizes
TOKENS = [(1, 1024), (2, 1024), (20, 1024), (20, 1)] + ([(1700, 1024)] if ON_GPU else [])  # with few choices up to
BLOCKS = EightBits("fp8", "block", "exact", (24, 128))
FORMS = {"int4": ON_LOAD["int4"], "packed": Packed(4, 128, symmetric=False), "gptq": Gptq(4, 64), "awq": Awq(None),
         "int8": ON_LOAD["int8"], "fp8": ON_LOAD["fp8"], "fp8-tensor": EightBits("fp8", "tensor"), "fp8-blocks": BLOCKS,
         "mxfp4": Mxfp4(), "mxfp4-blocks": Mxfp4Blocks()}
CASES = [(name, dtype) for name in FORMS for dtype in DTYPES] if ON_GPU else [
    pytest.param(name, dtype, marks=[pytest.mark.slow] if slow else []) for name, dtype, slow in (
        ("int4", torch.float32, True), ("packed", torch.float16, True),
        ("gptq", torch.float32, True), ("int8", torch.float32, True), ("fp8", torch.float16, True),
        ("fp8-tensor", torch.float32, True), ("fp8-blocks", torch.float32, False), ("mxfp4", torch.float16, True),
        ("mxfp4-blocks", torch.float32, True))]
WHOLE, RANK = Topology(), Topology(2, 1, 1, 2)  # it holds the second half of the experts
GENERATOR = torch.Generator()


def made(scheme: Scheme, dtype: torch.dtype, biased: bool, topology: Topology = WHOLE) -> tuple[Experts, Experts]:
    """The same experts for CUDA in the dtype and, dense and in fp32, for the reference."""
    from runners.cuda.ops import CudaOps

    config = parse_config({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "num_experts": COUNT,
                           "num_experts_per_tok": K, "moe_intermediate_size": SIZE, "num_attention_heads": 4,
                           "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64})
    assert config.experts is not None
    config = dataclasses.replace(config, experts=dataclasses.replace(
        config.experts, bias=biased, limit=0.5 if biased else None))
    ours, plain = (Experts(config, Build(topology, LocalCommunicator(), ops, kind, device, lambda _: scheme),
                           "layers.0.mlp", ExpertNames())
                   for ops, kind, device in ((CudaOps(), dtype, DEVICE), (Ops(), torch.float32, torch.device("cpu"))))
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(drawn(scheme, name.rpartition(".")[2], parameter.data))
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(plain.get_parameter(name).data)
    plain.decode()
    return ours, plain


def drawn(scheme: Scheme, name: str, like: torch.Tensor) -> torch.Tensor:
    """Content of a tensor, such that products are about as large as their inputs."""
    shape = tuple(like.shape)
    if name == "weight_g_idx":
        return (torch.randperm(shape[-1], generator=GENERATOR) // 64).expand(shape)
    if scheme.name == "mxfp4" and "scale" in name:
        return torch.randint(121, 124, shape, generator=GENERATOR)
    if not like.is_floating_point():
        info = torch.iinfo(like.dtype)
        high = 16 if name == "weight_zero_point" and like.dtype == torch.uint8 else info.max
        return torch.randint(info.min, high, shape, generator=GENERATOR, dtype=torch.int64)
    if "scale" in name:
        step = {"fp8": 0.05, "int": 0.001, "gpt": 0.01, "awq": 0.01}[scheme.name[:3]]
        step *= 10 if scheme.name.startswith("int4") else 1
        return (torch.rand(shape, generator=GENERATOR) + 0.5) * step
    return torch.randn(shape, generator=GENERATOR) * (0.3 if "bias" in name else 1.0)


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and chosen experts. Most tokens choose one of two experts, and none chooses the second last."""
    scores = torch.rand(tokens, COUNT, generator=GENERATOR)
    for expert, more in ((0, 1.0), (COUNT // 2, 0.8), (COUNT - 2, -9.0)):
        scores[:, expert] += more
    return (torch.randn(tokens, HIDDEN, generator=GENERATOR) / 2, torch.rand(tokens, K, generator=GENERATOR),
            scores.topk(K).indices.int())


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_experts_are_computed_from_weights_as_they_are_stored(name: str, dtype: torch.dtype,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """One token; a program for each choice, for each expert, and for each tile of sorted choices; with all experts on
    the rank or half of them, with and without biases. The scales of an expert that no token chooses are not read."""
    from runners.cuda.kernels import experts

    scheme = FORMS[name]
    GENERATOR.manual_seed(0)
    for topology, biased in ((WHOLE, False), (RANK, True)):
        if biased and not ON_GPU and (name, dtype) not in (("fp8", torch.float16), ("mxfp4-blocks", torch.float32)):
            continue
        ours, plain = made(scheme, dtype, biased, topology)
        ours.ops.pack_experts(ours)
        assert ours.packed is not None and not any(name.startswith("layers.") for name, _ in ours.named_parameters())
        for weight in (ours.packed.gate_up, ours.packed.down):
            weight.scales.view(-1, ours.count, len(weight.values) // ours.count)[:, COUNT - 2 - ours.first] = torch.nan
        for tokens, few in TOKENS:
            monkeypatch.setattr(experts, "FEW", few)
            x, weights, chosen = routed(tokens)
            expected = Ops().experts(x.to(dtype).float(), weights, chosen, plain)
            got = ours.ops.experts(x.to(DEVICE, dtype), weights.to(DEVICE), chosen.to(DEVICE), ours)
            largest = expected.abs().max()
            close(got / largest.to(DEVICE), expected / largest, dtype)


def test_experts_without_a_kernel_keep_the_stored_tensors() -> None:
    """GPTQ with act order: an order of inputs belongs to one expert."""
    GENERATOR.manual_seed(0)
    ours, plain = made(Packed(4, 64, act_order=True), torch.float32, False)
    stored = {name: value.clone() for name, value in ours.named_parameters()}
    ours.ops.pack_experts(ours)
    assert ours.packed is None and all(torch.equal(stored[name], value) for name, value in ours.named_parameters())
    x, weights, chosen = routed(3)
    got = ours.ops.experts(x.to(DEVICE), weights.to(DEVICE), chosen.to(DEVICE), ours)
    close(got, Ops().experts(x, weights, chosen, plain), torch.float32)
