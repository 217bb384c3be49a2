"""Each collective along each axis of a mesh, against numpy: any shape and split, on every data plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nccl_stand_in import StandInBackend
from rank_threads import on_ranks

from hal.config import AXES, Topology
from hal.contracts.communicator import Communicator
from hal.contracts.fingerprint import OPERATIONS
from hal.errors import ConfigError, InputError, StateError, WorkerError
from hal.testing.null import backend as null
from workers.data.shared_memory import ShmCommunicator
from workers.executors.connections import over_groups

CPU = torch.device("cpu")
MESHES = [Topology(tp=2), Topology(tp=2, pp=2, ep=2), Topology(tp=4, ep=2)]
WORLDS = [pytest.param((kind, mesh), id=f"{kind}-tp{mesh.tp}-pp{mesh.pp}-ep{mesh.ep}")
          for kind in ("shm", "gloo", "stand-in") for mesh in MESHES]
DTYPES = ["float32", "bfloat16", "int64", "uint8", "bool", "float8_e4m3fn"]
SUMMED = ["float32", "bfloat16", "int64"]


class World:
    """The communicators of all ranks of a mesh, in rank order."""

    def __init__(self, kind: str, mesh: Topology) -> None:
        self.mesh = mesh.every_rank()
        backend = StandInBackend() if kind == "stand-in" else null
        self.ranks: list[Communicator] = on_ranks(mesh.world_size, lambda rank, store: ShmCommunicator(
            self.mesh[rank], CPU, store) if kind == "shm" else over_groups(self.mesh[rank], backend, CPU, store, True))

    def run(self, call: Callable[[Communicator], Any]) -> list[Any]:
        return on_ranks(len(self.ranks), lambda rank, _: call(self.ranks[rank]))

    def close(self) -> None:
        self.run(lambda communicator: communicator.close())


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(*request.param)
    yield made
    made.close()


def values(rank: int, shape: list[int], dtype: str) -> torch.Tensor:
    """Small integers, so that every sum is exact in every dtype."""
    found = np.random.default_rng([rank, *shape]).integers(0, 2 if dtype == "bool" else 8, shape)
    return torch.from_numpy(found).to(getattr(torch, dtype))


def plain(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """An operation with its tensors' shape; the sizes are drawn when the axis's size is known."""
    operation = draw(st.sampled_from(OPERATIONS))
    dtype = draw(st.sampled_from(SUMMED if operation in ("all_reduce", "reduce_scatter") else DTYPES))
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    return {"operation": operation, "dtype": dtype, "shape": shape, "axis": draw(st.sampled_from(AXES)),
            "dim": draw(st.integers(-len(shape), len(shape) - 1)), "source": draw(st.integers(0, 3)),
            "large": draw(st.sampled_from([0] * 9 + [1])), "even": draw(st.booleans()),
            "sizes": draw(st.lists(st.integers(0, 4), min_size=16, max_size=16))}


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_a_collective_along_an_axis_gives_what_numpy_gives(world: World, case: dict[str, Any]) -> None:
    operation, axis, dtype, dim = case["operation"], case["axis"], case["dtype"], case["dim"]
    places = [topology.axis(axis) for topology in world.mesh]
    n = places[0].size
    table = np.array(case["sizes"][:n * n]).reshape(n, n)  # rows that i sends to j
    shape = [*case["shape"]]
    if case["large"]:  # more than a rank shows at once in shared memory
        shape[-1] = 300_000
        table *= 3
    if operation == "reduce_scatter":
        shape[dim] *= n
    if operation == "all_to_all" and case["even"]:
        table[:] = case["sizes"][0]

    def given_to(rank: int) -> torch.Tensor:
        if operation == "all_to_all":
            return values(rank, [int(table[places[rank].rank].sum()), *shape[1:]], dtype)
        return values(rank, shape, dtype)

    def call(communicator: Communicator) -> torch.Tensor:
        rank = communicator.topology.rank
        x, at = given_to(rank), places[rank].rank
        if operation in ("all_gather", "reduce_scatter"):
            return getattr(communicator, operation)(x, axis, dim)
        if operation == "broadcast":
            return communicator.broadcast(x, axis, case["source"] % n)
        if operation == "all_to_all" and not case["even"]:
            return communicator.all_to_all(x, axis, table[at].tolist(), table[:, at].tolist())
        return getattr(communicator, operation)(x, axis)

    results = world.run(call)
    for place, result in zip(places, results, strict=True):
        parts = [plain(given_to(rank)) for rank in place.ranks]
        if operation == "all_reduce":
            expected = np.sum(parts, 0)
        elif operation == "all_gather":
            expected = np.concatenate(parts, dim)
        elif operation == "reduce_scatter":
            expected = np.split(np.sum(parts, 0), n, dim)[place.rank]
        elif operation == "broadcast":
            expected = parts[case["source"] % n]
        else:
            expected = np.concatenate([np.split(part, np.cumsum(row)[:-1])[place.rank]
                                       for part, row in zip(parts, table, strict=True)])
        assert result.dtype == getattr(torch, dtype) and result.shape == expected.shape
        np.testing.assert_array_equal(plain(result), expected)


def test_the_callers_tensor_stays_as_it_was_but_for_sums_and_broadcasts(world: World) -> None:
    def call(communicator: Communicator) -> None:
        x = torch.full((4, 4), communicator.topology.rank + 1.0)
        before = x.clone()
        for axis in AXES:
            communicator.reduce_scatter(x, axis, 0)
            communicator.all_to_all(x, axis)
            communicator.all_gather(x, axis, 0)
        assert torch.equal(x, before)
        assert communicator.all_reduce(x) is x and communicator.broadcast(x) is x

    world.run(call)


def test_what_cannot_be_cut_is_refused_before_anything_is_sent(world: World) -> None:
    def call(communicator: Communicator) -> None:
        x = torch.ones(3, 5)
        for refused, error in ((lambda: communicator.all_reduce(x, "dp"), ConfigError),
                               (lambda: communicator.reduce_scatter(x), InputError),
                               (lambda: communicator.all_to_all(x), InputError),
                               (lambda: communicator.all_to_all(x, "tp", [1, 1], [1, 1]), InputError),
                               (lambda: communicator.all_to_all(x, "tp", [4, -1], [4, -1]), InputError)):
            with pytest.raises(error):
                refused()
        assert communicator.all_reduce(torch.ones(2)).tolist() == [float(communicator.topology.tp)] * 2

    world.run(call)


@pytest.mark.parametrize("kind", ["shm", "gloo", "stand-in"])
@pytest.mark.parametrize(("calls", "words"), [
    (lambda c, r: c.all_to_all(torch.ones(2 + r, 2), "tp", [1, 1 + r], [1 + 2 * r, 2]), "another number of rows"),
    (lambda c, r: c.all_to_all(torch.ones(2, 2 + r)), "bytes"),
    (lambda c, r: c.reduce_scatter(torch.ones(4)) if r else c.all_reduce(torch.ones(4)), "operation"),
    (lambda c, r: c.broadcast(torch.ones(4)) if r else c.all_to_all(torch.ones(4)), "operation")],
    ids=["sizes", "row", "reduce_scatter", "broadcast"])
def test_ranks_that_call_different_collectives_are_named(kind: str, calls: Any, words: str) -> None:
    world = World(kind, Topology(tp=2))

    def call(communicator: Communicator) -> None:
        communicator.fingerprint.begin(3, 5)
        rank = communicator.topology.rank
        try:
            calls(communicator, rank)
        except StateError as error:
            assert words in str(error) and f"rank {1 - rank}" in str(error)
            raise

    try:
        with pytest.raises((StateError, WorkerError)) as error:
            world.run(call)
        assert isinstance(error.value, StateError)
    finally:
        world.close()


def test_a_closed_data_plane_says_so(world: World) -> None:
    """Runs last of its world, which it closes."""
    world.close()
    for communicator in world.ranks:
        with pytest.raises(WorkerError, match="closed"):
            communicator.all_reduce(torch.ones(1), "tp")
