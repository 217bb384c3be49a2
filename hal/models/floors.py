"""What a step must read and compute, and how fast this device reads and computes: the floors of a step's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hal.contracts.backend import Backend
from hal.model_config import ModelConfig
from hal.weights.formats import schemes

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SIDES = {"cpu": (256, 1024)}  # of the matrices that are multiplied: a short trial, then the measurement
_SLOW = 0.02  # seconds of the trial after which the larger product would take too long


@dataclass(frozen=True, slots=True)
class Device:
    """Rates that were measured in this process. bandwidth: bytes/s read. arithmetic: operations/s of matrix products,
    a multiplication and an addition counting as two."""

    bandwidth: float
    arithmetic: float

    def limit(self, seconds: float, moved: float, operations: float) -> tuple[str, float]:
        """What keeps work from taking less than `seconds`, and the share of that rate that the work reached. "neither"
        where it reached less than half of both."""
        memory, arithmetic = moved / self.bandwidth / seconds, operations / self.arithmetic / seconds
        share = max(memory, arithmetic)
        return ("neither" if share < 0.5 else "memory" if share == memory else "arithmetic"), share


def measure(backend: Backend, dtype: str) -> Device:
    return Device(read_bandwidth(backend), matrix_rate(backend, dtype))


def read_bandwidth(backend: Backend) -> float:
    """Bytes/s of reading a large tensor: the best of a sum, a dot product and a copy (which reads and writes)."""
    device = backend.device(0)
    size = min(1 << (27 if device.type == "cpu" else 30), backend.free_memory(device) // 4)
    x, y = (torch.ones(size // 4, device=device) for _ in range(2))
    candidates: list[tuple[Callable[[], object], int]] = [
        (x.sum, size), (lambda: torch.dot(x, y), 2 * size), (lambda: y.copy_(x), 2 * size)]
    return max(moved / timed(backend, call, 3) for call, moved in candidates)


def matrix_rate(backend: Backend, dtype: str) -> float:
    """Operations/s of a square matrix product, in the model's dtype or in float32, whichever is faster here."""
    device, best = backend.device(0), 0.0
    for kind in dict.fromkeys((dtype, "float32")):
        for side in _SIDES.get(device.type, (1024, 8192)):
            x = torch.ones(side, side, dtype=getattr(torch, kind), device=device)
            seconds = timed(backend, lambda x=x: x @ x, 2)  # type: ignore[misc]
            best = max(best, 2 * side**3 / seconds)
            if seconds > _SLOW:
                break
    return best


def timed(backend: Backend, call: Callable[[], object], repeats: int) -> float:
    """Of one call, the shortest of `repeats` after a first one."""
    times = []
    for _ in range(1 + repeats):
        backend.runtime.synchronize(backend.device(0))
        start = time.perf_counter()
        call()
        backend.runtime.synchronize(backend.device(0))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bytes_per_step(model: ModelConfig, dtype: str, kv_dtype: str, batch: int, context: int, *, new: int = 1) -> float:
    """Bytes of weights, KV cache and states of rows that a step has to read, over all ranks, for sequences of `context`
    tokens of which `new` are computed. A step reads only its tokens' rows of the input embedding, unless the embedding
    is the output head as well. Each layer reads its window of the context, and those experts that the tokens choose if
    they choose at random."""
    item = _BYTES[dtype]
    one_table = model.tie_embeddings and not schemes(model.quantization)("lm_head").on_load
    unread = 0 if one_table else max(model.vocab_size - batch * new, 0) * model.hidden_size
    weights, few_bits = float(item * model.num_params), 0
    if model.quantization is not None:
        from hal.models.memory import EXPERTS, weight_bytes

        held = weight_bytes(model, dtype)
        weights, few_bits = (sum(h.bytes for name, h in held.items() if name.startswith(start))
                             for start in ("", EXPERTS))
    if (e := model.experts) is not None:
        left = (1 - e.per_token / e.count) ** (batch * new)  # the share of the experts that no token chooses
        if few_bits:
            weights -= left * few_bits
        else:
            unread += round(left * e.count * 3 * e.size * model.hidden_size * len(e.layers))
    kv_item = 1 if kv_dtype == "fp8" else item
    if (d := model.delta) is not None:  # states in fp32
        weights += 4 * batch * len(d.layers) * d.values * d.key_dim
    return float(weights - item * unread + kv_item * batch * _seen(model, context) * model.kv_entries)


def operations(model: ModelConfig, batch: int, context: int, *, new: int = 1) -> float:
    """Operations of the matrix products and of attention, over all ranks, for sequences of `context` tokens of which
    the last `new` are computed. The output head is computed for one token of each sequence."""
    head = model.vocab_size * model.hidden_size
    body = model.num_active_params - head * (1 if model.tie_embeddings else 2)
    seen = _seen(model, context - (new - 1) // 2)
    return 2.0 * batch * (new * body + head + 2 * new * seen * model.num_heads * model.head_dim)


def _seen(model: ModelConfig, context: int) -> int:
    """Tokens that the attention of all layers sees for one token."""
    stateful = () if model.delta is None else model.delta.layers
    return sum(min(context, window or context) for i, window in enumerate(model.windows) if i not in stateful)
