"""L0: the backend is found, its declared capabilities are true, and it makes a runner."""

from __future__ import annotations

from typing import Any

import torch

from hal.conformance.case import case
from hal.conformance.context import Context
from hal.contracts import backend as backends
from hal.contracts.backend import Backend
from hal.contracts.inputs import ModelInput
from hal.contracts.runner import ModelRunnerBase
from hal.errors import BackendError
from hal.schema import Declared


@case(0, "registration", once=True)
def loads_by_name(ctx: Context) -> None:
    """The backend's name gives this backend, always the same object."""
    found = backends.load(ctx.device)
    ctx.check(found is backends.load(ctx.device), "two loads give two backends")
    ctx.check(isinstance(found.name, str) and found.name != "", f"name is {found.name!r}")
    if ":" not in ctx.device:
        ctx.equal("name", found.name, ctx.device)


@case(0, "registration", once=True)
def is_small(ctx: Context) -> None:
    """The backend has no public method beside those of the interface."""
    extra = [n for n in vars(type(ctx.backend)) if not n.startswith("_") and n not in dir(Backend)
             and n not in Backend.__annotations__]
    ctx.equal("public members that no backend has", extra, [])


@case(0, "capabilities", once=True)
def are_well_formed(ctx: Context) -> None:
    """The library knows the declared sizes and dtypes."""
    can = ctx.backend.capabilities
    ctx.check(bool(can.dtypes) and set(can.dtypes) <= {"float32", "bfloat16", "float16"}, f"dtypes are {can.dtypes}")
    ctx.check(can.max_tp >= 1 and can.max_pp >= 1, f"max_tp={can.max_tp}, max_pp={can.max_pp}")
    ctx.check(can.batch_invariant in ("no", "option", "always"), f"batch_invariant is {can.batch_invariant!r}")
    ctx.check(all(isinstance(k, str) and isinstance(v, str) for k, v in ctx.backend.versions().items()),
              "versions() is not a mapping of texts")


@case(0, "capabilities", once=True)
def what_is_not_declared_is_refused(ctx: Context) -> None:
    """A configuration beyond the declared capabilities fails before anything is made, with an error that names it."""
    can = ctx.backend.capabilities
    asked: list[dict[str, Any]] = [{"tp": can.max_tp + 1}, {"pp": can.max_pp + 1}, {"dtype": "float64"}]
    asked += [] if can.swap else [{"num_cpu_blocks": 1}]
    asked += [] if can.fp8_kv else [{"kv_dtype": "fp8"}]
    asked += [] if can.batch_invariant != "no" else [{"batch_invariant": True}]
    plain: dict[str, Any] = {"dtype": can.dtypes[0], "kv_dtype": "auto", "tp": 1, "pp": 1, "num_cpu_blocks": 0}
    for options in asked:
        try:
            backends.require(ctx.backend, **(plain | options))
        except BackendError as error:
            named = error.got is not None and error.expected is not None
            ctx.check(named, f"{options}: the error names no alternative")
        else:
            ctx.check(False, f"{options} was not refused")


@case(0, "device", once=True)
def is_there(ctx: Context) -> None:
    """The first device can hold a tensor, and reports its free memory."""
    device = ctx.backend.device(0)
    ctx.check(isinstance(device, torch.device), f"device(0) is {device!r}")
    x = torch.arange(5, device=device)
    ctx.backend.runtime.synchronize(device)
    ctx.equal("a tensor's values", x.tolist(), [0, 1, 2, 3, 4])
    free = ctx.backend.free_memory(device)
    ctx.check(isinstance(free, int) and free > 1 << 20, f"free_memory is {free!r} bytes")


@case(0, "runner")
def keeps_its_contract(ctx: Context) -> None:
    """A model loads in this dtype. Its caches have the declared size and are zeroed. A block is read as it was written,
    and the blocks beside it stay as they are."""
    session = ctx.session()
    runner, caches = session.runner, session.runner.make_kv_caches(7)
    ctx.check(isinstance(runner, ModelRunnerBase), f"{type(runner).__name__} is not a ModelRunnerBase")
    ctx.check(issubclass(runner.input_type, ModelInput), f"input_type is {runner.input_type}")
    ctx.check(issubclass(runner.output_type, Declared), f"output_type is {runner.output_type}")
    blocks = torch.arange(7)
    values = [v.cpu() for v in runner.read_blocks(caches, blocks)]
    ctx.check(all(v.shape[1] == 7 for v in values), f"7 blocks were read as {[list(v.shape) for v in values]}")
    ctx.check(not any(bool(v.ne(0).any()) for v in values), "new caches are not zeroed")
    ctx.equal("7 blocks in bytes", sum(v.numel() * v.itemsize for v in values), 7 * runner.kv_bytes_per_block())
    runner.write_blocks(caches, torch.tensor([5, 2]), [
        torch.stack([torch.full_like(v[:, 0], x) for x in (1, 3)], 1) for v in values])
    found = [[sorted(set(v[:, i].flatten().tolist())) for i in range(7)] for v in runner.read_blocks(caches, blocks)]
    ctx.equal("blocks after 5 and 2 were written", found, [[[x] for x in (0, 0, 3, 0, 0, 1, 0)]] * len(values))
    ctx.check(runner.reserve_bytes() >= 0, f"reserve_bytes is {runner.reserve_bytes()}")
