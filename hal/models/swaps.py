"""Parts of transformers' modelling code in whose place operations of ours compute: norms, gated MLPs, and the rotary
embedding. A part is swapped where a trial on random numbers shows that it computes the same. Sources differ: some norms
add 1 to the weight, some rotary embeddings pair other entries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hal.models.ops import Ops

_ROTARY = "apply_rotary_pos_emb"  # the function of most modelling files
# By the id of a step's cosines, these and the value of Ops.begin_rotary.
Rotaries = dict[int, tuple[torch.Tensor, Any]]


def swap(module: Any, ops: Ops, rotaries: Rotaries) -> None:
    """Let operations of ours compute what a module computes itself, where they can. `rotaries` is emptied in each step.
    """
    kind: Any = type(module)
    if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and _is_rms_norm(kind):
        module.forward = _Norm(ops, module)
    elif _is_merged_pair(module) and _is_silu(module) and _is_gated_mlp(kind):
        module.forward = _GatedMLP(ops, module)
    elif isinstance(kind.forward, FunctionType) and _ROTARY in kind.forward.__code__.co_names:
        made = _with_rotary(kind.forward, ops)
        if made is not None:
            forward, rotary = made
            rotary.begun = rotaries
            module.forward = MethodType(forward, module)


def by_token(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, num_tokens, dim] -> [num_tokens, heads, dim], whose heads lie side by side."""
    x = x[0].transpose(0, 1)
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class _Norm:
    """The forward pass of an RMSNorm as one of our operations."""

    def __init__(self, ops: Ops, module: Any) -> None:
        self.ops, self.weight, self.eps = ops, module.weight, module.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim > 2 and len(x) == 1:
            return self.ops.rms_norm(x[0], self.weight, self.eps)[None]
        return self.ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


@cache
def _is_rms_norm(kind: Any) -> bool:
    """Whether a class of transformers computes what Ops.rms_norm does."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 3, 16, generator=generator).to(dtype)
        weight = torch.rand(16, generator=generator).to(dtype)
        try:
            theirs = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=1e-5), x)
        except (AttributeError, TypeError):
            return False
        if not torch.allclose(theirs, Ops().rms_norm(x, weight, 1e-5), rtol=1e-6, atol=1e-6):
            return False
    return True


class _GatedMLP:
    """The forward pass of down(silu(gate(x)) * up(x)), whose first two layers are merged."""

    def __init__(self, ops: Ops, module: Any) -> None:
        self.ops, self.merged, self.down = ops, module.gate_proj, module.down_proj

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.merged.all(x)
        out: torch.Tensor = self.down(self.ops.silu_mul(y.view(-1, y.shape[-1])).view(*y.shape[:-1], -1))
        return out


def _is_merged_pair(module: Any) -> bool:
    gate: Any = getattr(module, "gate_proj", None)
    return hasattr(gate, "all") and len(gate.outputs) == 2 and getattr(module.up_proj, "first", None) == (gate,)


def _is_silu(module: Any) -> bool:
    act, x = getattr(module, "act_fn", None), torch.linspace(-4, 4, 9)
    return isinstance(act, nn.Module) and not list(act.parameters()) and torch.allclose(act(x), F.silu(x))


@cache
def _is_gated_mlp(kind: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(shape, generator=generator) for shape in ((1, 3, 8), (8, 8), (8, 8), (8, 8)))
    stub = SimpleNamespace(gate_proj=lambda x: x @ gate, up_proj=lambda x: x @ up, down_proj=lambda x: x @ down,
                           act_fn=nn.SiLU(), config=SimpleNamespace(pretraining_tp=1))
    try:
        return torch.allclose(kind.forward(stub, x), F.silu(x @ gate) * (x @ up) @ down, rtol=1e-5, atol=1e-5)
    except (AttributeError, TypeError):
        return False


class _Rotary:
    """Stands for apply_rotary_pos_emb in the forward pass of attention: one operation embeds queries and keys."""

    begun: Rotaries

    def __init__(self, ops: Ops, theirs: Callable[..., Any]) -> None:
        self.ops, self.theirs = ops, theirs
        self.halves: bool | None = None  # whether angles of the two halves are equal; unknown before the first step

    def __call__(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any,
                 **options: Any) -> Any:
        _, heads, tokens, dim = q.shape
        if args or options or len(q) != 1 or cos.shape != (1, tokens, dim) or self.ops.traced:
            return self.theirs(q, k, cos, sin, *args, **options)
        half = dim // 2
        if self.halves is None:
            self.halves = all(torch.equal(x[..., :half], x[..., half:]) for x in (cos, sin))
        if not self.halves:
            return self.theirs(q, k, cos, sin)
        found = self.begun.get(id(cos))
        if found is None:
            places = torch.arange(tokens, dtype=torch.int32, device=q.device)
            table = torch.cat((cos[0, :, :half], sin[0, :, :half]), -1).float()
            found = self.begun[id(cos)] = cos, self.ops.begin_rotary(places, table, q.dtype)
        first, second = by_token(q), by_token(k)
        if second.data_ptr() == first.data_ptr() + heads * dim * q.itemsize and first.stride() == second.stride():
            both = first.as_strided((tokens, heads + k.shape[1], dim), first.stride())
            first, second = torch.split(self.ops.rotary(both, found[1]), [heads, k.shape[1]], 1)
        else:
            first, second = self.ops.rotary(first, found[1]), self.ops.rotary(second, found[1])
        return first.transpose(0, 1)[None], second.transpose(0, 1)[None]


def _with_rotary(forward: FunctionType, ops: Ops) -> tuple[FunctionType, _Rotary] | None:
    """A copy of the forward pass whose rotary embedding is ours. The module of transformers stays as it is."""
    theirs = forward.__globals__.get(_ROTARY)
    if theirs is None or forward.__closure__ or not _is_rotary(theirs):
        return None
    rotary = _Rotary(ops, theirs)
    made = FunctionType(forward.__code__, {**forward.__globals__, _ROTARY: rotary}, forward.__name__,
                        forward.__defaults__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made, rotary


@cache
def _is_rotary(theirs: Any) -> bool:
    """Whether a function pairs the entries i and i + head_dim / 2."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    table, ops, places = torch.randn(3, 8, generator=generator), Ops(), torch.arange(3)
    cos, sin = (x.repeat(1, 2)[None] for x in table.chunk(2, -1))
    try:
        found = theirs(q, k, cos, sin)
        begun = ops.begin_rotary(places, table, q.dtype)
        return all(torch.allclose(by_token(theirs), ops.rotary(by_token(x), begun), rtol=1e-5, atol=1e-5)
                   for x, theirs in zip((q, k), found, strict=True))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
