"""How regions nest and end, what install() changes and uninstall() puts back, and what is patched when."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import inspect
import logging.handlers
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from guard_cases import CASES
from guard_env import Env
from torch.distributed import distributed_c10d

from hal.errors import GuardError
from hal.guard import Phase, allow, always, current, data_plane, install, installed_tier, phase, strict, uninstall
from hal.guard.always import guarded_names

pytestmark = [pytest.mark.torch_release, pytest.mark.filterwarnings("ignore::FutureWarning")]
PREPARE, EXECUTE, WORKER = Phase.PREPARE, Phase.EXECUTE, Phase.WORKER


@pytest.fixture(autouse=True)
def _uninstalled(env: Env) -> Iterator[None]:
    uninstall()
    yield
    uninstall()


def now() -> tuple[Phase, int, bool | None] | None:
    region = current()
    return None if region is None else (region.phase, region.rank, region.open)


# Regions


@pytest.mark.slow
def test_phases_nest_and_restore() -> None:
    assert now() is None
    with phase(WORKER, 1):
        with phase(PREPARE, 1):
            assert now() == (PREPARE, 1, False)
            with phase(EXECUTE, 2), data_plane("op"):
                assert now() == (EXECUTE, 2, True)
            assert now() == (PREPARE, 1, False)
        assert now() == (WORKER, 1, True)
    assert now() is None


def test_an_exception_restores() -> None:
    with phase(PREPARE, 1):
        with pytest.raises(KeyError), phase(EXECUTE), data_plane("op"):
            raise KeyError
        assert now() == (PREPARE, 1, False)
        with pytest.raises(GuardError), data_plane("op"):
            pass
        with pytest.raises(KeyError), allow("test"):
            raise KeyError
        assert now() == (PREPARE, 1, False)
    assert now() is None


def test_a_phase_closes_an_allow_region_again(env: Env) -> None:
    install(strict=False)
    with phase(PREPARE), allow("test"), data_plane("op"):  # data_plane has nothing to refuse here
        env.store.set("k", "v")
        with phase(EXECUTE), pytest.raises(GuardError):
            env.store.set("k", "v")
        env.store.set("k", "v")


def test_regions_outside_a_phase_change_nothing() -> None:
    with data_plane("op"), allow("test"):
        assert now() is None


def test_allow_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        allow(" ")


def test_other_threads_and_tasks_are_not_in_the_phase() -> None:
    seen: list[object] = []

    async def one(step: Phase) -> None:
        with phase(step):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(current().phase is step)  # type: ignore[union-attr]

    async def both() -> None:
        await asyncio.gather(one(PREPARE), one(EXECUTE))
        assert now() is None

    asyncio.run(both())
    with phase(PREPARE):
        thread = threading.Thread(target=lambda: seen.append(current() is None))  # always tier: not carried
        thread.start()
        thread.join()
    assert seen == [True] * 7


def test_a_context_that_outlives_its_region_falls_back_to_the_one_around(env: Env) -> None:
    install(strict=False)
    with phase(EXECUTE, 7):
        with data_plane("op"):
            opened = contextvars.copy_context()
            assert opened.run(now) == (EXECUTE, 7, True)
        with pytest.raises(GuardError):  # the opening does not leak into what it left behind
            opened.run(env.store.set, "k", "v")
    assert opened.run(now) is None
    opened.run(env.store.set, "k", "v")


def test_a_thread_that_outlives_its_phase_is_free(env: Env) -> None:
    install(strict=True)
    begun, over = threading.Event(), threading.Event()
    results: list[object] = []

    def body() -> None:
        results.append(now())
        begun.set()
        assert over.wait(20)
        env.near.send(b"x")
        results.append(now())

    with phase(PREPARE, 1):
        thread = threading.Thread(target=body)
        thread.start()
        assert begun.wait(20)
    over.set()
    thread.join()
    assert results == [(PREPARE, 1, False), None]


def test_a_thread_of_an_allow_region_may_outlive_it() -> None:
    """Such as the feeder thread of a queue, which writes after put() has returned."""
    install(strict=True)
    queue: Any = multiprocessing.Queue()
    with phase(PREPARE):
        with allow("test"):
            queue.put("x")
        queue._thread.join(0.2)
    assert queue.get(timeout=20) == "x"
    queue.close()
    queue.join_thread()


def test_a_pool_thread_works_in_the_phase_of_who_submitted() -> None:
    install(strict=True)
    with ThreadPoolExecutor(1) as pool:
        with phase(PREPARE, 1):
            assert pool.submit(now).result() == (PREPARE, 1, False)  # its thread starts here
            assert contextvars.Context().run(lambda: pool.submit(now).result()) is None
            with allow("test"):
                assert pool.submit(now).result() is None
        assert pool.submit(now).result() is None


def test_refusal_without_a_frame_to_name(env: Env) -> None:
    """A thread below threading, in a copied context, whose first frame is the refused operation itself."""
    install(strict=True)
    caught: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, caught.append
    try:
        with phase(PREPARE):
            _thread.start_new_thread(contextvars.copy_context().run, (env.near.send, b"x"))
            for _ in range(200):
                if caught:
                    break
                threading.Event().wait(0.05)
    finally:
        sys.unraisablehook = hook
    assert isinstance(caught[0].exc_value, GuardError) and caught[0].exc_value.site == "<no Python caller>"


def test_site_of_an_operation_handed_to_a_thread_is_where_it_was_handed_over(env: Env) -> None:
    install(strict=True)
    with ThreadPoolExecutor(1) as pool, phase(EXECUTE), pytest.raises(GuardError) as refused:
        pool.submit(env.near.send, b"x").result()
    assert refused.value.site.startswith(f"{__file__}:")


def test_a_thread_class_that_refuses_new_attributes_starts_in_a_phase(env: Env) -> None:
    class Frozen(threading.Thread):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "run":
                raise AttributeError("frozen")
            super().__setattr__(name, value)

    install(strict=True)
    seen: list[object] = []
    with phase(EXECUTE, 1):
        thread = Frozen(target=lambda: seen.append(now()))
        thread.start()
        thread.join()
    assert seen == [(EXECUTE, 1, False)]


def test_a_suspended_generator_leaves_its_caller_in_its_phase() -> None:
    """A limitation that docs/guard.md lists: Python gives a generator no context of its own."""

    def steps() -> Iterator[int]:
        with phase(EXECUTE, 4):
            yield 1

    generator = steps()
    next(generator)
    assert now() == (EXECUTE, 4, False)
    with phase(WORKER, 5):
        next(generator, None)
        assert now() is None  # its end restores what was there when it began, even inside another phase
    assert now() is None


# Logging

REFUSED_HANDLERS = {
    "socket.connect": lambda: logging.handlers.SocketHandler("127.0.0.1", 9),
    "socket.sendto": lambda: logging.handlers.DatagramHandler("127.0.0.1", 9),
    "multiprocessing.Queue.put": lambda: logging.handlers.QueueHandler(multiprocessing.Queue()),
}


@pytest.mark.parametrize("operation", REFUSED_HANDLERS)
def test_a_refused_logging_handler_says_so_once(operation: str, capfd: pytest.CaptureFixture[str]) -> None:
    install(strict=True)
    logger = logging.Logger("refused")
    handler = REFUSED_HANDLERS[operation]()
    logger.addHandler(handler)
    for step in (PREPARE, EXECUTE):
        for number in range(3):
            with phase(step, 1):
                logger.warning("record %d", number)
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "Traceback" not in told
    assert type(handler).__name__ in told and "phase prepare" in told and f"({operation} at {__file__}:" in told
    assert "Use a handler that writes to a file" in told
    handler.close()


def test_other_errors_of_a_logging_handler_are_reported_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                raise KeyError("mine")
            except KeyError:
                self.handleError(record)

    install(strict=True)
    logger = logging.Logger("broken")
    logger.addHandler(Broken())
    with phase(EXECUTE):
        logger.warning("one")
        logger.warning("two")
    assert capfd.readouterr().err.count("KeyError: 'mine'") == 2


def test_a_handler_that_a_store_refuses_is_told_in_the_always_on_tier(env: Env,
                                                                      capfd: pytest.CaptureFixture[str]) -> None:
    class ToStore(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                env.store.set("log", record.getMessage())
            except Exception:
                self.handleError(record)

    install(strict=False)
    logger = logging.Logger("store")
    logger.addHandler(ToStore())
    with phase(EXECUTE):
        logger.warning("one")
        logger.warning("two")
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "ToStore" in told and "Store.set" in told


# install and uninstall


def owners() -> list[Any]:
    c10d = torch._C._distributed_c10d
    found: list[Any] = [c10d._ControlCollectives, c10d._SymmetricMemory]
    pending: list[type] = [dist.ProcessGroup, c10d.Backend, dist.Store]
    while pending:
        found.append(pending.pop())
        pending.extend(type.__subclasses__(found[-1]))
    found += [getattr(multiprocessing.queues, name) for name in ("Queue", "JoinableQueue", "SimpleQueue")]
    found += [multiprocessing.connection._ConnectionBase, socket.socket, threading.Thread, ThreadPoolExecutor,
              logging.Handler]
    return [*found, dist, distributed_c10d, sys.modules["ssl"].SSLSocket, sys.modules["ray"], sys.modules["ray.actor"]]


def snapshot() -> list[dict[str, object]]:
    op = "_c10d_functional::all_reduce"
    rest: dict[str, object] = {
        "meta_path": tuple(sys.meta_path), "kernel": torch._C._dispatch_has_kernel_for_dispatch_key(op, "BackendSelect")
    }  # fmt: skip
    return [dict(vars(owner)) for owner in owners()] + [rest]


def same(a: list[dict[str, object]], b: list[dict[str, object]]) -> bool:
    def equal(x: object, y: object) -> bool:
        return x is y or (isinstance(x, tuple) and x == y)

    return all(x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x) for x, y in zip(a, b, strict=True))


def left_behind() -> list[str]:
    """Attributes that are functions of the guard, whoever put them there."""
    members = [(owner, name, getattr(member, "__func__", member))
               for owner in owners() for name, member in vars(owner).items()]  # fmt: skip
    return [f"{owner.__name__}.{name}" for owner, name, member in members
            if str(getattr(member, "__globals__", {}).get("__name__")).startswith("hal.guard")]  # fmt: skip


@pytest.mark.parametrize("tiers", [[False], [True], [False, True], [True, False, True]], ids=str)
def test_uninstall_puts_the_originals_back(tiers: list[bool]) -> None:
    original = snapshot()
    for strict_ in tiers:
        install(strict=strict_)
    assert installed_tier() == ("strict" if any(tiers) else "always")
    installed = snapshot()
    install(strict=tiers[0])
    assert same(installed, snapshot()), "installing twice wraps twice"
    assert not same(original, installed) and left_behind()
    uninstall()
    assert installed_tier() is None and same(original, snapshot()) and left_behind() == []


@pytest.mark.parametrize(("value", "tier"), [("1", "strict"), ("0", "always"), (None, "always")])
def test_tier_from_the_environment(value: str | None, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_STRICT", value) if value else monkeypatch.delenv("HAL_STRICT", raising=False)
    install()
    assert installed_tier() == tier


def test_a_failing_install_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    original = snapshot()
    monkeypatch.setattr(strict, "_patch_dispatcher", lambda patches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        install(strict=True)
    assert installed_tier() is None and same(original, snapshot())


# What is patched


def test_every_method_that_communicates_is_refused(env: Env) -> None:
    """The guard acts before arguments are looked at, so none are needed."""
    c10d = torch._C._distributed_c10d
    install(strict=False)
    for root, objects in (
        (dist.ProcessGroup, [env.world]),
        (c10d.Backend, [env.backend]),
        (dist.Store, [env.store, env.tcp_store, env.file_store, env.prefix_store]),
        (c10d._ControlCollectives, [env.control]),
    ):
        names = guarded_names(root)
        assert len(names) >= 8
        for step in (PREPARE, EXECUTE):
            for obj in objects:
                for name in names:
                    with phase(step), pytest.raises(GuardError) as refused:
                        getattr(obj, name)()
                    assert refused.value.operation.endswith(f".{name}")
    with phase(PREPARE):
        assert (env.world.rank(), env.world.size(), env.backend.name()) == (0, 1, "gloo")
        with pytest.raises(GuardError):
            c10d._SymmetricMemory.rendezvous(env.t())


def test_every_constructor_that_connects_is_refused(env: Env) -> None:
    """Of all classes that this torch has, so that a backend added by a new torch is caught."""
    c10d = torch._C._distributed_c10d
    connecting = {cls for cls in owners() if isinstance(cls, type) and issubclass(cls, (c10d.Backend, dist.Store))}
    connecting -= {c10d.Backend, dist.Store}
    connecting = {cls for cls in connecting
                  if "__init__" in vars(cls) and cls.__name__ not in always._LOCAL_CONSTRUCTORS}
    assert {dist.ProcessGroupGloo, dist.TCPStore, dist.FileStore} <= connecting
    install(strict=False)
    for step in (PREPARE, EXECUTE):
        for cls in connecting:
            with phase(step), pytest.raises(GuardError) as refused:
                cls()
            assert refused.value.operation == f"{cls.__name__}.__init__"


def test_constructors_written_in_python_are_guarded(env: Env) -> None:
    """A plug-in's store or group connects where it is made. Calls of the base's constructor do not recurse."""
    install(strict=False)

    class Mine(dist.ProcessGroup):
        def __init__(self, rank: int, size: int) -> None:
            super().__init__(rank, size)
            self.made = True

    mine: Any = Mine
    assert mine(0, 1).made
    with phase(EXECUTE), pytest.raises(GuardError) as refused:
        mine(0, 1)
    assert refused.value.operation == "Mine.__init__"
    with phase(EXECUTE), data_plane("op"):
        assert mine(0, 1).rank() == 0


LOCAL = {
    "get_backend", "get_backend_config", "get_default_backend_for_device", "get_rank", "get_world_size", "get_pg_count",
    "get_group_rank", "get_global_rank", "get_process_group_ranks", "get_node_local_rank", "get_debug_level",
    "is_initialized", "is_backend_available", "is_gloo_available", "is_mpi_available", "is_nccl_available",
    "is_ucc_available", "is_xccl_available", "is_torchelastic_launched", "supports_complex", "record_comm",
}  # fmt: skip


def test_every_public_function_of_torch_distributed_has_a_case() -> None:
    public = {name for name in distributed_c10d.__all__ if inspect.isfunction(getattr(distributed_c10d, name))}
    tested = {case.name.partition("(")[0] for case in CASES if case.family.startswith("torch.distributed")}
    assert public - tested - LOCAL == set(), "new in this torch: add a case to guard_cases.py, or to LOCAL above"


@pytest.mark.parametrize("when", ["before", "after"])
def test_process_groups_written_in_python_are_guarded(when: str, env: Env) -> None:
    """As plug-ins (torch_xla's) write them. A C++ virtual must not take the guard for an override of itself."""
    if when == "after":
        install(strict=False)

    class Mine(dist.ProcessGroup):
        def allreduce(self, *args: Any) -> Any:
            return "mine"

        def barrier(self, *args: Any) -> Any:
            return super().barrier()  # of the base: no backend is registered

    install(strict=False)
    mine_type: Any = Mine
    mine = mine_type(0, 1)
    assert mine.allreduce([env.t()]) == "mine"
    with pytest.raises(RuntimeError) as plain:
        mine.broadcast(env.t(), 0)
    assert not isinstance(plain.value, RecursionError)
    with pytest.raises(RuntimeError) as overridden:
        mine.barrier()
    assert not isinstance(overridden.value, RecursionError)
    for name in ("allreduce", "barrier", "broadcast"):
        with phase(EXECUTE), pytest.raises(GuardError):
            getattr(mine, name)([env.t()])
    with phase(EXECUTE), data_plane("op"):
        assert mine.allreduce([env.t()]) == "mine"
    uninstall()
    with phase(EXECUTE):
        assert mine.allreduce([env.t()]) == "mine"


def test_modules_imported_later(env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("def get(ref):\n    return ref\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray")
    install(strict=True)
    assert "ray" not in sys.modules
    with phase(PREPARE):
        import ray

        assert ray.__file__ == str(tmp_path / "ray.py")
        with pytest.raises(GuardError) as refused:
            ray.get("x")
    assert refused.value.operation == "ray.get"
    uninstall()
    with phase(PREPARE):
        assert ray.get("x") == "x"
    monkeypatch.delitem(sys.modules, "ray")
    install(strict=True)
    uninstall()
    import ray as again

    assert again is not ray and not hasattr(again.get, "__wrapped__")


@pytest.mark.skipif(find_spec("torch_xla") is None, reason="requires torch_xla")
def test_torch_xla_itself() -> None:
    """In its own process: loading it here would change what the other tests run on."""
    code = """if True:
        from hal.errors import GuardError
        from hal.guard import Phase, install, phase
        install(strict=True)
        import torch, torch_xla.core.xla_model as xm
        from torch_xla.distributed.xla_backend import ProcessGroupXla
        t = torch.ones(2, device="xla")
        group = ProcessGroupXla(None, 0, 1, None)
        for call in (lambda: xm.all_reduce("sum", t), lambda: xm.rendezvous("x"), lambda: group.barrier(None),
                     lambda: group.allreduce([t], None)):
            try:
                with phase(Phase.EXECUTE):
                    call()
            except GuardError as error:
                print(error.operation)
        xm.all_reduce("sum", t)
    """
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PJRT_DEVICE": "CPU"}, text=True,
                         capture_output=True, check=False, timeout=120)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        "torch_xla.core.xla_model.all_reduce", "torch_xla.core.xla_model.rendezvous",
        "ProcessGroupXla.barrier", "ProcessGroupXla.allreduce",
    ]  # fmt: skip


# torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_first_call_of_compiled_code_in_a_phase(backend: str, env: Env) -> None:
    """Compiling traces the collective without running it, and GuardError is not wrapped into the compiler's error."""

    def collective(x: torch.Tensor) -> Any:
        return funcol.all_reduce(x, "sum", env.world)

    install(strict=True)
    compiled: Any = torch.compile(collective, backend=backend, fullgraph=True)
    for _ in range(2):
        with phase(EXECUTE), pytest.raises(GuardError) as refused:
            compiled(env.t())
        assert refused.value.operation.startswith("_c10d_functional::all_reduce")
        assert refused.value.site.startswith(f"{__file__}:")
    with phase(EXECUTE), data_plane("all_reduce"):
        assert compiled(env.t()).tolist() == [1.0] * 4


def test_a_custom_op_carries_data_plane_into_compiled_code(env: Env) -> None:
    """What a Communicator does: its data_plane() runs when the operator runs, not when it is traced."""

    @torch.library.custom_op("hal_guard_test::all_reduce", mutates_args=())
    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        with data_plane("all_reduce"):
            dist.all_reduce(out)
        return out

    all_reduce.register_fake(torch.empty_like)

    def plus_one(x: torch.Tensor) -> Any:
        return all_reduce(x) + 1

    compiled: Any = torch.compile(plus_one, backend="aot_eager", fullgraph=True)
    install(strict=True)
    with phase(EXECUTE):
        assert compiled(env.t()).tolist() == [2.0] * 4
    with phase(PREPARE), pytest.raises(GuardError) as refused:
        compiled(env.t())
    assert refused.value.operation == "all_reduce"
