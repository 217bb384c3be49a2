"""L2: linear layers of every scheme of hal.weights, against the scheme's reference in plain PyTorch."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from hal.checkpoints.hf_config import parse_config
from hal.config import Topology
from hal.conformance import reference
from hal.conformance.case import case
from hal.conformance.context import Context, these_schemes_alone
from hal.contracts.communicator import LocalCommunicator
from hal.models.experts import ExpertNames, Experts
from hal.models.layers import Build, Linear
from hal.models.ops import Ops
from hal.weights import LinearSpec, Projection, Scheme
from hal.weights.dense import DENSE
from hal.weights.eight_bits import EightBits
from hal.weights.gguf import GgufBlocks
from hal.weights.groups import Awq, Gptq, Packed
from hal.weights.mxfp4 import Mxfp4, Mxfp4Blocks

_IN, _OUT, _ROWS = 256, (24, 16), (1, 7, 33)
_HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # places of fp16 in a block
_FACTOR = {"Q8_0": 1e-3, "Q4_0": 1e-2, "Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 3e-5}


@case(2, "weights", "checkpoints")
def eight_bits(ctx: Context) -> None:
    """FP8 and INT8 with scales of projections, outputs and blocks, and exact inputs."""
    _compare(ctx, "weights", [EightBits("fp8", "tensor"), EightBits("fp8", "channel"), EightBits("fp8", "block",
             block=(8, 64)), EightBits("int8", "channel"), EightBits("int8", "tensor")])


@case(2, "weights", "checkpoints")
def rounded_inputs(ctx: Context) -> None:
    """Schemes that round the inputs of layers. A device may keep them exact."""
    _compare(ctx, "weights_fp8", [EightBits("fp8", "channel", "token"), EightBits("fp8", "tensor", "static"),
                                  EightBits("fp8", "block", "group", (8, 64), "weight_scale_inv")])
    _compare(ctx, "weights_int8", [EightBits("int8", "channel", "token")])


@case(2, "weights", "checkpoints")
def four_bits_in_groups(ctx: Context) -> None:
    """Groups of different sizes, with and without zero points and act order."""
    _compare(ctx, "weights", [Packed(4, 64), Packed(4, 32, symmetric=False), Packed(8, 64), Packed(4, None),
                              Packed(4, 64, symmetric=False, on_load=True), Packed(4, 64, act_order=True), Gptq(4, 64),
                              Gptq(4, 32, True), Gptq(4, 128, False, 0), Awq(64)])


@case(2, "weights", "checkpoints")
def blocks(ctx: Context) -> None:
    """MXFP4, and the blocks of GGUF."""
    _compare(ctx, "weights", [Mxfp4(), *map(GgufBlocks, _HALVES)])


@case(2, "experts", "checkpoints")
def in_few_bits(ctx: Context) -> None:
    """The weighted sum of a token's experts, whose weights are dense or of a scheme of each kind."""
    ops, device = _ops(ctx)
    schemes = [DENSE, EightBits("fp8", "block", block=(8, 64)), EightBits("int8", "channel"), Packed(4, 64),
               Gptq(4, 64, True), Awq(64), Mxfp4(), Mxfp4Blocks(), GgufBlocks("Q4_0"), GgufBlocks("Q6_K")]
    config = parse_config({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": _IN, "num_experts": 5,
                           "num_experts_per_tok": 2, "moe_intermediate_size": _IN, "num_attention_heads": 4,
                           "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64})
    for scheme in [s for s in schemes if ops.schemes is None or s.name in ops.schemes]:
        schemes_of = partial(_always, scheme)
        plain, layer = (Experts(config, Build(Topology(), LocalCommunicator(), each, dtype, on, schemes_of),
                                "layers.0.mlp", ExpertNames())
                        for each, dtype, on in ((Ops(), torch.float32, torch.device("cpu")),
                                                (ops, ctx.torch_dtype, device)))
        for name, parameter in plain.named_parameters():
            if name.startswith("layers."):
                for entry in parameter.data:
                    entry.copy_(_drawn(ctx, scheme, name.rpartition(".")[2], entry))
            else:
                parameter.data.copy_(ctx.normal(*parameter.shape, scale=1 / 16))
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(plain.get_parameter(name).data)
        if plain.few_bits:
            plain.decode()
            ops.pack_experts(layer)
        up, down = plain.gate_up.double().view(5, -1, _IN), plain.down.double()

        def expected(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            gate, other = torch.einsum("ni,eoi->neo", x.double(), up).chunk(2, -1)  # noqa: B023
            each = torch.einsum("nei,eoi->neo", F.silu(gate) * other, down)  # noqa: B023
            return (torch.zeros(len(x), 5).double().scatter(1, chosen, weights.double()).unsqueeze(-1) * each).sum(1)

        for rows in _ROWS:
            x, weights = ctx.normal(rows, _IN), torch.from_numpy(ctx.rng.uniform(0.1, 1.0, (rows, 2))).float()
            chosen = torch.from_numpy(ctx.rng.permuted(np.tile(np.arange(5), (rows, 1)), axis=1)[:, :2])
            got = ops.experts(x.to(device), weights.to(device), chosen.int().to(device), layer)
            ctx.close("experts", got, expected(x, weights, chosen), f"{rows} rows of {scheme.name}")
            # With what comes before: the norm, and the choice of the best.
            residual, gains = ctx.normal(rows, _IN), ctx.normal(_IN)
            got, normed, total, chosen = (t.cpu() for t in ops.mixture(
                x.to(device), residual.to(device), gains.to(device), layer))
            ctx.close("norm", total, x.double() + residual.double(), f"the sum of {rows} rows")
            ctx.close("norm", normed, reference.rms_norm(total.double(), gains.double(), layer.eps), f"{rows} rows")
            logits = (normed.double() @ plain.router.double().t()).to(ctx.torch_dtype).double()  # as routers round
            chosen = chosen.long()
            ctx.close("linear", logits.gather(1, chosen), logits.topk(2).values, f"choices of {rows} rows")
            ctx.close("experts", got, expected(normed, logits.softmax(-1).gather(1, chosen), chosen),
                      f"{rows} rows of {scheme.name} with the norm and the router")


def _ops(ctx: Context) -> tuple[Ops, torch.device]:
    session = ctx.session(warm=False)
    return ctx.part(session, "ops"), session.device


def _compare(ctx: Context, op: str, schemes: list[Scheme]) -> None:
    ops, device = _ops(ctx)
    can = [scheme for scheme in schemes if ops.schemes is None or scheme.name in ops.schemes]
    if not can:
        raise these_schemes_alone(ops)
    spec = LinearSpec(_IN, tuple(Projection(f"p{i}", size) for i, size in enumerate(_OUT)), "out")
    for scheme in can:
        schemes_of = partial(_always, scheme)
        plain, layer = (Linear(Build(Topology(), LocalCommunicator(), each, dtype, on, schemes_of), spec, bias=True)
                        for each, dtype, on in ((Ops(), torch.float32, torch.device("cpu")),
                                                (ops, ctx.torch_dtype, device)))
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(_drawn(ctx, scheme, name, parameter.data))
        plain.bias.data.copy_(plain.bias.data.to(ctx.torch_dtype))  # type: ignore[union-attr]
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(plain.get_parameter(name).data)
        weight, bias = scheme.dequantize(plain).double(), plain.bias
        ops.pack_linear(layer)
        for rows in _ROWS:
            x = ctx.normal(rows, _IN)
            got = ops.linear(x.to(device), layer)
            expected = F.linear(x.double(), weight, None if bias is None else bias.double())
            ctx.close(op, got, expected, f"{rows} rows of {scheme.name} ({scheme})")


def _always(scheme: Scheme, name: str) -> Scheme:
    return scheme


def _drawn(ctx: Context, scheme: Scheme, name: str, like: torch.Tensor) -> torch.Tensor:
    """Random content of a scheme's tensor, such that the weight's values are of the order of 1 / 16."""
    shape = tuple(like.shape)
    if name.endswith("g_idx"):
        count = int(getattr(scheme, "group", 0) or _IN)
        return torch.stack([torch.from_numpy(ctx.rng.permutation(shape[1]) // count) for _ in range(shape[0])])
    if isinstance(scheme, GgufBlocks) and name == "weight":
        bytes_ = ctx.rng.integers(0, 256, shape).astype("uint8")
        size = shape[1] // (_IN // (32 if "K" not in scheme.kind else 256))
        found = bytes_.reshape(shape[0], -1, size)
        for at in _HALVES[scheme.kind]:
            halves = (ctx.rng.uniform(0.5, 1.5, found.shape[:2]) * _FACTOR[scheme.kind]).astype("float16")
            found[:, :, at:at + 2] = halves[..., None].view("uint8")
        return torch.from_numpy(bytes_)
    if scheme.name == "mxfp4" and name in ("weight_scale", "scales"):
        return torch.from_numpy(ctx.rng.integers(119, 124, shape))
    if not like.is_floating_point():
        info = torch.iinfo(like.dtype)
        high = 16 if name == "weight_zero_point" and like.dtype == torch.uint8 else info.max
        return torch.from_numpy(ctx.rng.integers(max(info.min, -127) if info.bits == 8 else info.min, high, shape))
    if name.endswith(("scale", "scale_inv", "scales")):
        each = 0.02 if name == "input_scale" else {1: 1 / 16, 4: 1 / 128, 8: 1 / 2048}[
            1 if "fp8" in scheme.name else 8 if "int8" in scheme.name else 4]
        return torch.from_numpy(ctx.rng.uniform(0.5, 1.5, shape) * each).bfloat16()
    return torch.from_numpy(ctx.rng.normal(0.0, 1.0, shape))
