"""Level S: how fast a backend is, as shares of the bandwidth and the matrix rate that its device has in this process.
Nothing here is part of the verdict, which says whether a backend is right."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hal.conformance.case import NotApplicable
from hal.conformance.context import Context, drive
from hal.contracts.attention import AttentionSpec
from hal.contracts.executor import make_executor
from hal.contracts.inputs import PagedModelInput
from hal.engine.scheduler import Scheduler
from hal.errors import ConfigError, HalError
from hal.models import floors
from hal.sampling.params import SamplingParams
from hal.schema.packed import as_tensor

# Large enough that reading weights takes longer than starting kernels on most devices.
_SHAPE = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816,
          "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 1024,
          "tie_word_embeddings": False, "eos_token_id": None, "bos_token_id": None}
_PROMPT, _STEPS, _CONTEXT, _SEQS = 256, 12, 1024, 8


@dataclass(frozen=True, slots=True)
class Speed:
    """A measurement. `seconds`: of one step or call. `share`: of the bandwidth or matrix rate, None where there is no
    such floor. `least`: the share that the vendor declares, None if none is."""

    name: str
    dtype: str
    seconds: float
    share: float | None = None
    least: float | None = None

    @property
    def text(self) -> str:
        """Such as "decode of 8 sequences (bfloat16): 3.21 ms, 0.71 of the floor"."""
        declared = "" if self.least is None else f"; declared {self.least:g}" + (
            ", and MISSED" if (self.share or 0.0) < self.least else "")
        floor = "" if self.share is None else f", {self.share:.2f} of the floor"
        return f"{self.name} ({self.dtype}): {self.seconds * 1e3:.3f} ms{floor}{declared}"


def read_thresholds(path: str) -> dict[str, float]:
    """JSON: the least share by name of a measurement. Raises ConfigError: the file is something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        return {str(name): float(share) for name, share in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError("the file of speed thresholds cannot be used", got=f"{path}: {error}",
                          expected='JSON such as {"decode of 8 sequences": 0.6}') from None


def measure(ctx: Context, thresholds: dict[str, float]) -> list[Speed]:
    """All measurements in the context's dtype. One that cannot be made here is left out."""
    device, found = floors.measure(ctx.backend, ctx.dtype), list[Speed]()

    def add(name: str, seconds: float, share: float | None = None) -> None:
        found.append(Speed(name, ctx.dtype, seconds, share, thresholds.get(name)))

    add("copying 1 GB", 1e9 / device.bandwidth)
    add("10**12 operations of matrix products", 1e12 / device.arithmetic)
    for part in (_steps, _attention, _ranks):
        try:
            part(ctx, device, add)
        except (NotApplicable, HalError):
            continue
    return found


def _steps(ctx: Context, device: floors.Device, add: Callable[..., None]) -> None:
    path = ctx.scratch / f"speed-{ctx.seed}"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(_SHAPE))
    start = time.perf_counter()
    session = ctx.session("speed", random_weights=True, max_model_len=_CONTEXT, num_blocks=_SEQS * 20 + 1,
                          max_num_batched_tokens=_SEQS * _PROMPT)
    add("start-up", time.perf_counter() - start)
    model = session.config.model
    for epoch, n in enumerate((1, _SEQS)):
        times: dict[bool, list[float]] = {True: [], False: []}

        def step(request: Any, times: dict[bool, list[float]] = times) -> Any:
            start = time.perf_counter()
            output = session.step(request)
            times[int(request.num_scheduled.max()) == 1].append(time.perf_counter() - start)
            return output

        scheduler = session.scheduler()
        scheduler.epoch = epoch
        prompts = [ctx.rng.integers(0, model.vocab_size, _PROMPT).tolist() for _ in range(n)]
        drive(step, scheduler, prompts, SamplingParams(max_tokens=_STEPS, ignore_eos=True))
        decode, prefill = float(np.median(times[True])), sum(times[False])
        moved = floors.bytes_per_step(model, ctx.dtype, "auto", n, _PROMPT + _STEPS // 2)
        add(f"decode of {n} sequences", decode, moved / device.bandwidth / decode)
        add(f"prefill of {n} x {_PROMPT} tokens", prefill,
            floors.operations(model, n, _PROMPT, new=_PROMPT) / device.arithmetic / prefill)


def _attention(ctx: Context, device: floors.Device, add: Callable[..., None]) -> None:
    """Decode attention alone, of one layer."""
    session, size = ctx.session(warm=False), 16
    spec, blocks = AttentionSpec(16, 4, 64, 0.125), _CONTEXT // size
    attention = ctx.part(session, "make_attention")([spec], device=session.device, dtype=ctx.torch_dtype)
    cache = ctx.normal(*attention.cache_shape(spec, _SEQS * blocks + 1, size)).to(session.device)
    tables = 1 + ctx.rng.permutation(_SEQS * blocks).reshape(_SEQS, blocks)
    arrays = {"input_ids": np.zeros(_SEQS), "positions": np.full(_SEQS, _CONTEXT - 1), "seq_lens": np.full(
        _SEQS, _CONTEXT), "query_start_loc": np.arange(_SEQS + 1), "logits_indices": np.arange(_SEQS),
        "slot_mapping": tables[:, -1] * size + size - 1, "block_tables": tables}
    fields: dict[str, Any] = {n: as_tensor(np.ascontiguousarray(a, np.int32), "int32") for n, a in arrays.items()}
    made = PagedModelInput(block_size=size, num_decode_seqs=_SEQS, num_samples=_SEQS, max_query_len=1, **fields)
    step = attention.begin(PagedModelInput.from_buffer(made.to_buffer(), session.device), [cache])
    q, k, v = (ctx.normal(_SEQS, heads, 64).to(session.device) for heads in (16, 4, 4))
    seconds = floors.timed(ctx.backend, lambda: step(0, q, k, v), 10)
    moved = 2 * _SEQS * _CONTEXT * 4 * 64 * ctx.torch_dtype.itemsize
    add(f"decode attention of {_SEQS} x {_CONTEXT}", seconds, moved / device.bandwidth / seconds)


def _ranks(ctx: Context, device: floors.Device, add: Callable[..., None]) -> None:
    """A step of a tiny model on one rank and on two: the difference is that of collectives and the control plane."""
    can = ctx.backend.capabilities
    for tp in (1, 2)[:1 if can.spmd else can.max_tp]:  # a compiler shards tensors for a whole process
        config, times = ctx.config(tp=tp), list[float]()
        executor = make_executor(config.engine, config.model, ctx.backend)

        def step(request: Any, executor: Any = executor, times: list[float] = times) -> Any:
            start = time.perf_counter()
            output = executor.execute_model(request).result()
            times.append(time.perf_counter() - start)
            return output

        try:
            drive(step, Scheduler(config.engine, executor.num_blocks), ctx.prompts(3, 5),
                  SamplingParams(max_tokens=40, ignore_eos=True))
        finally:
            executor.shutdown()
        add(f"step of a tiny model on {tp} rank{'s' if tp > 1 else ''}", float(np.median(times[1:])))
