"""L2: each operation of a model (runner.ops), against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hal.config import Topology
from hal.conformance import reference
from hal.conformance.case import case
from hal.conformance.context import Context, these_schemes_alone
from hal.contracts.communicator import LocalCommunicator
from hal.model_config import RopeConfig
from hal.models.layers import Build, Linear
from hal.models.ops import HeadNorms
from hal.models.rope import cos_sin_table
from hal.weights import Dim, LinearSpec, Projection, Scheme, WeightTensor

_ROWS = (1, 2, 7, 33)  # decoding alone, a small batch, sizes that no vector width divides


def _ops(ctx: Context) -> tuple[Any, torch.device]:
    session = ctx.session(warm=False)
    return ctx.part(session, "ops"), session.device


def _pure(ctx: Context, what: str, call: Callable[..., Any], *args: Any) -> Any:
    """The result of an operation. The arguments must be unchanged, and share no memory with the result."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    result = call(*args)
    for a, b in zip(args, before, strict=True):
        ctx.check(not isinstance(a, torch.Tensor) or a.equal(b), f"{what} changed an argument")
    first = result[0] if isinstance(result, tuple) else result
    ctx.check(all(not isinstance(a, torch.Tensor) or a.device.type == "meta" or not a.numel()
                  or a.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for a in args),
              f"{what} returns memory of an argument")
    return result


def _layer(build: Build, in_size: int, out_size: int, bias: bool) -> Linear:
    return Linear(build, LinearSpec(in_size, (Projection("x", out_size),), "out"), bias=bias)


def _check_linear(ctx: Context, layer: Linear, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Compare a layer, whose weight has the fp64 values `w`, with fp64. Its bias, if it has one, becomes `b`."""
    ops, device = layer.ops, layer.weight.device
    if layer.bias is not None:
        layer.bias.data.copy_(b)
    ops.pack_linear(layer)
    got = _pure(ctx, "linear", lambda y: ops.linear(y, layer), x.to(device))
    expected = F.linear(x.double(), w, None if layer.bias is None else b.double())
    ctx.close("linear", got, expected, f"linear [{len(x)}, {w.shape[1]}] to {len(w)}{what}")


@case(2, "linear", "checkpoints")
def linear(ctx: Context) -> None:
    """Packed and not packed, with and without bias, for one row and for many."""
    ops, device = _ops(ctx)
    build = Build(Topology(), LocalCommunicator(), ops, ctx.torch_dtype, device)
    for rows in _ROWS:
        for in_size, out_size, bias in ((64, 96, True), (96, 40, False), (256, 64, False)):
            layer = _layer(build, in_size, out_size, bias)
            x, w = ctx.normal(rows, in_size), ctx.normal(out_size, in_size, scale=in_size**-0.5)
            b = ctx.normal(out_size)
            layer.weight.data.copy_(w)
            _check_linear(ctx, layer, x, w.double(), b, "")


class _RowScales(Scheme):
    """int8 values and a scale for each output: a scheme that no backend can know."""

    name = "conformance"

    def tensors(self, spec: LinearSpec) -> Sequence[WeightTensor]:
        return (WeightTensor("weight", (Dim("out"), Dim("in")), "int8"),
                WeightTensor("scales", (Dim("out"),), "float32"))

    def dequantize(self, layer: Linear) -> torch.Tensor:
        return (layer.weight.float() * layer.stored("scales")[:, None]).to(layer.dtype)


@case(2, "linear", "checkpoints")
def of_another_weight_scheme(ctx: Context) -> None:
    """A weight of a scheme that the backend does not know, where its operations take every scheme."""
    ops, device = _ops(ctx)
    if ops.schemes is not None:
        raise these_schemes_alone(ops)
    scheme = _RowScales()
    build = Build(Topology(), LocalCommunicator(), ops, ctx.torch_dtype, device, lambda name: scheme)
    for rows in _ROWS:
        for in_size, out_size, bias in ((64, 96, True), (96, 40, False)):
            layer = _layer(build, in_size, out_size, bias)
            x, b = ctx.normal(rows, in_size), ctx.normal(out_size)
            # Powers of two: the products have at most 7 significant bits, so every dtype holds them exactly.
            scales = torch.from_numpy(2.0 ** ctx.rng.integers(-11, -8, out_size)).float()
            values = torch.from_numpy(ctx.rng.integers(-127, 128, (out_size, in_size))).to(torch.int8)
            layer.weight.data.copy_(values)
            layer.get_parameter("scales").data.copy_(scales)
            _check_linear(ctx, layer, x, values.double() * scales.double()[:, None], b, " of an int8 weight")


@case(2, "norm", "checkpoints")
def rms_norm(ctx: Context) -> None:
    """The norm alone, over heads, of q and k beside v, and after a residual is added; small and large values."""
    ops, device = _ops(ctx)
    for kv in (1, 2):
        qkv, weights = ctx.normal(5, 3 + 2 * kv, 32), [ctx.normal(32), ctx.normal(32)]
        got = _pure(ctx, "norm_heads", lambda x, q, k: ops.norm_heads(x, HeadNorms(q, k, 1e-6), kv),  # noqa: B023
                    qkv.to(device), *(w.to(device) for w in weights))
        normed = [reference.rms_norm(x.double(), w.double(), 1e-6) for x, w in zip(
            (qkv[:, :3], qkv[:, 3:-kv]), weights, strict=True)]
        ctx.close("norm", got[:, :-kv], torch.cat(normed, 1), f"norm_heads with {kv} heads of k")
        ctx.check(got[:, -kv:].cpu().equal(qkv[:, -kv:]), "norm_heads changed v")
    for shape in ((1, 64), (7, 64), (33, 256), (5, 4, 32)):
        for scale in (1e-3, 1.0, 30.0):
            x, r, w = ctx.normal(*shape, scale=scale), ctx.normal(*shape, scale=scale), ctx.normal(shape[-1])
            got = _pure(ctx, "rms_norm", ops.rms_norm, x.to(device), w.to(device), 1e-6)
            ctx.close("norm", got, reference.rms_norm(x.double(), w.double(), 1e-6), f"rms_norm {shape} of {scale:g}")
            args = (*(y.to(device) for y in (x, r, w)), 1e-6)
            normed, total = _pure(ctx, "add_rms_norm", ops.add_rms_norm, *args)
            ctx.close("norm", total.div(scale), (x.double() + r.double()) / scale, f"residual {shape} of {scale:g}")
            expected = reference.rms_norm(total.cpu().double(), w.double(), 1e-6)
            ctx.close("norm", normed, expected, f"add_rms_norm {shape}")


@case(2, "norm", "checkpoints")
def layer_norm(ctx: Context) -> None:
    """Values far from zero too: the mean must be subtracted before the squares are taken."""
    ops, device = _ops(ctx)
    for rows, mean in ((1, 0.0), (7, 1.0), (33, 20.0)):
        x, w, b = ctx.normal(rows, 64) + mean, ctx.normal(64), ctx.normal(64)
        got = _pure(ctx, "layer_norm", ops.layer_norm, *(y.to(device) for y in (x, w, b)), 1e-5)
        expected = F.layer_norm(x.double(), (64,), w.double(), b.double(), 1e-5)
        ctx.close("norm", got, expected, f"layer_norm around {mean}")


@case(2, "rotary", "checkpoints")
def rotary(ctx: Context) -> None:
    """Any positions in any order, with the first and the last of the table, for heads that are a view."""
    ops, device = _ops(ctx)
    rope, length = RopeConfig(theta=10000.0), 512
    for heads, dim in ((6, 16), (3, 32), (5, 64)):
        at = ctx.rng.integers(0, length, 40)
        at[:7] = 0, length - 1, 63, 64, 127, 128, 255
        positions = torch.from_numpy(at).int()
        x = ctx.normal(40, heads + 2, dim)
        table = cos_sin_table(rope, dim, length, device)
        begun = ops.begin_rotary(positions.to(device), table, ctx.torch_dtype)
        got = ops.rotary(x.to(device)[:, :heads], begun)
        expected = reference.rotate(x[:, :heads].double(), table.cpu()[positions].double())
        ctx.close("rotary", got, expected, f"rotary of {heads} heads of {dim}")


@case(2, "activation", "checkpoints")
def silu_mul(ctx: Context) -> None:
    """The gate comes first; large values neither overflow nor turn into NaN."""
    ops, device = _ops(ctx)
    for rows in _ROWS:
        x = ctx.normal(rows, 192, scale=4.0)
        x[0, :2] = torch.tensor([90.0, -90.0])
        gate, up = x.double().chunk(2, -1)
        ctx.close("activation", _pure(ctx, "silu_mul", ops.silu_mul, x.to(device)), F.silu(gate) * up, "silu_mul")


@case(2, "activation", "checkpoints")
def activation(ctx: Context) -> None:
    """The kinds that models name: relu, gelu, gelu_tanh."""
    ops, device = _ops(ctx)
    x = ctx.normal(33, 64, scale=3.0)
    for kind, expected in (("relu", F.relu(x.double())), ("gelu", F.gelu(x.double())),
                           ("gelu_tanh", F.gelu(x.double(), approximate="tanh"))):
        ctx.close("activation", ops.activation(x.to(device), kind), expected, kind)
