"""Messages over transfers of a size that both ends guess, reports that become errors, and the choice of a plane."""

from __future__ import annotations

import json
from collections import deque
from typing import Annotated

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal import errors
from hal.config import Topology
from hal.contracts.device import Collectives
from hal.errors import BackendError, CapacityError, ConfigError, GuardError, HalError, StateError, WorkerError
from hal.schema import Array, Declared
from hal.testing.null import backend as null
from workers.control.channel import Channel
from workers.control.collectives import CPU
from workers.control.planes import make_plane
from workers.links.groups import lost, make_group
from workers.links.reports import Failure
from workers.worker.wire_policy import MessageReader


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20_000), max_size=6), min_size=1, max_size=8))
def test_channel_carries_any_sizes(messages: list[list[int]]) -> None:
    """A transfer must be asked for with the same size at both ends: here that is checked, gloo would fail or hang."""
    wire: deque[torch.Tensor] = deque()
    sender, receiver = Channel(), Channel()
    rng = np.random.default_rng(1)

    def take(tensor: torch.Tensor) -> None:
        sent = wire.popleft()
        assert len(sent) == len(tensor)
        tensor.copy_(sent)

    for sizes in messages:
        parts = [rng.integers(0, 256, size, np.uint8) for size in sizes]
        sender.send(parts, lambda t: wire.append(t.clone()))
        received = receiver.receive(take)
        assert not wire and [r.tobytes() for r in received] == [p.tobytes() for p in parts]
        assert all(r.__array_interface__["data"][0] % 64 == 0 for r in received if r.size)


def test_channel_takes_one_transfer_when_sizes_hardly_change() -> None:
    channel, count = Channel(), []
    for size in (100, 70_000, 70_100, 70_200):
        count.append(0)

        def transfer(tensor: torch.Tensor) -> None:
            count[-1] += 1

        channel.send([np.zeros(size, np.uint8)], transfer)
    assert count == [1, 2, 1, 1]


@pytest.mark.parametrize("error", [
    CapacityError("too big", got=3, expected=4, hint="smaller"), ConfigError("no"), BackendError("gone", got="x"),
    StateError("late")])
def test_start_failure_is_the_same_error(error: HalError) -> None:
    failure = Failure.of(2, error)
    sent = json.loads(json.dumps({name: getattr(failure, name) for name in Failure.__slots__}))
    raised = Failure(**sent).at_start()
    assert type(raised) is type(error) and raised.what == f"rank 2: {error.what}"
    assert [str(v) for v in (raised.got, raised.expected, raised.hint)] == [
        str(v) for v in (error.got, error.expected, error.hint)]


def test_other_failures_are_worker_errors() -> None:
    guard = GuardError("talked", phase="execute", operation="all_reduce", site="x.py:1")
    for error in (KeyError("x"), guard, errors.InputError("odd", fields=("a",), got=1)):
        raised = Failure.of(3, error, "step 7").at_start()
        assert isinstance(raised, WorkerError) and raised.rank == 3 and raised.cause == type(error).__name__
        in_step = Failure.of(3, error, "step 7").in_step()
        assert "step 7" in str(in_step) and type(error).__name__ in in_step.remote_traceback
    assert "all_reduce at x.py:1" in str(Failure.of(3, guard).in_step())
    assert "signal 9" in str(Failure.death(1, -9).in_step())


def test_a_lost_connection_is_not_the_cause_of_a_failure_even_when_wrapped() -> None:
    try:
        try:
            raise lost("all_reduce", RuntimeError("Connection closed\nsecond line"))
        except WorkerError as error:
            raise ValueError("the model failed") from error
    except ValueError as error:
        assert Failure.of(1, error).lost
    assert not Failure.of(1, ValueError("the model failed"), losses=WorkerError.losses).lost


def test_plane_is_chosen_by_name() -> None:
    assert type(make_plane("auto", Topology(), None, null, CPU)).__name__ == "LocalPlane"
    with pytest.raises(ConfigError, match="unknown control_plane") as error:
        make_plane("pigeon", Topology(), None, null, CPU)
    assert "gloo" in error.value.expected
    with pytest.raises(ConfigError, match="one rank only"):
        make_plane("local", Topology(tp=2), None, null, CPU)
    with pytest.raises(BackendError, match="no such collectives"):
        make_group(Collectives("pigeon"), torch.distributed.HashStore(), "x", 0, 1)


class Words(Declared):
    ids: Annotated[torch.Tensor, Array("int32", "n")]
    flags: Annotated[torch.Tensor | None, Array("int64", "n")] = None
    limit: int = 0


class Named(Words):
    names: tuple[str, ...] = ()


@pytest.mark.parametrize("kind", [Words, Named])
def test_a_message_reader_gives_what_from_buffer_gives(kind: type[Words]) -> None:
    """Over places that are written again, by messages of the same head and of others, changed instances in between."""
    rng = np.random.default_rng(0)
    places, read = [np.zeros(1024, np.uint8) for _ in range(2)], MessageReader(kind, torch.device("cpu"))
    views: dict[tuple[int, int], np.ndarray] = {}  # as a ring keeps them, by place and size
    for i in range(200):
        n, ids = int(rng.integers(3)), torch.from_numpy(rng.integers(0, 99, 3, np.int32))
        extra = {"names": (f"name{rng.integers(10, 99)}",)} if kind is Named else {}
        flags = ids[:n].long() if rng.random() < 0.3 else None
        made = kind(ids=ids[:n], flags=flags, limit=int(rng.integers(2)), **extra)
        size = made.to_buffer().size
        place = views.setdefault((i % 2, size), places[i % 2][:size])
        place[:] = made.to_buffer()
        found, expected = read(place), kind.from_buffer(place)
        found.validate("cpu")
        assert repr(found) == repr(expected) and found.to_buffer().tobytes() == made.to_buffer().tobytes()
        assert all(torch.equal(found[f], made[f]) for f in ("ids", "flags") if made[f] is not None)
        found.limit, found.ids = 77, torch.zeros(9)  # a runner's own business
    place[4] ^= 1
    with pytest.raises(errors.WireError, match="corrupt"):
        read(place)
