"""Counter-based random numbers: a token's noise depends on the request's seed, the position and the token, and on
nothing else. So a request's tokens do not depend on its batch, the device or the layout. There is no generator with a
state, only integer arithmetic that wraps.
"""

from __future__ import annotations

import torch

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as int64; odd, so multiples of it visit every value


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """x >> by, as a copy. (The operator itself divides, towards zero, in torch_xla 2.8, and this one widens there.)"""
    return torch.bitwise_right_shift(x, by).to(x.dtype)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of int64 in which each bit of the
    argument changes half of the result's."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (_shifted(x, shift) & (1 << (64 - shift)) - 1)) * factor
    return x ^ (_shifted(x, 31) & (1 << 33) - 1)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """seeds [n] int64, positions [n] (of the tokens to be drawn) -> [n] int64, one independent key each."""
    return _mix64(_mix64(seeds + _GOLDEN) + positions.long() * _GOLDEN)


def exponential(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Exp(1) noise, fp32, in [2^-32, 17).

    Args:
        keys: [n] of `row_keys`. token_ids: [n, k] or [1, k] int32.
    """
    low, high = _shifted(keys << 32, 32).int()[:, None], _shifted(keys, 32).int()[:, None]
    # Two rounds of multiply and xor-shift, a key before each. Constants: lowbias32 of Chris Wellons' hash prospector.
    x = token_ids ^ low
    x ^= _shifted(x, 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= _shifted(x, 15).bitwise_and_(0x1FFFF)
    x += high
    x *= -0x7B935975
    x ^= _shifted(x, 16).bitwise_and_(0xFFFF)
    # -log(1 - v) keeps all 31 bits of the smallest values, which decide the draw.
    v = x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_()
