"""Parts that all data planes share: a group for each axis of the mesh, and checks of shapes and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from hal.config import AXES, Axis, Topology
from hal.contracts.inputs import IntermediateTensors
from hal.errors import InputError, StateError, WorkerError

G = TypeVar("G")


class ByAxis(dict[str, "G | None"]):
    """A group for each axis, made once; None where the axis has one rank. "ep" has the group of "tp" where both have
    the same ranks.

    Raises (look-ups):
        ConfigError: the mesh has no such axis. WorkerError: the data plane was closed, and has no groups any more.
    """

    def __init__(self, topology: Topology, make: Callable[[Axis], G]) -> None:
        super().__init__()
        self._topology = topology
        for name in AXES:
            axis = topology.axis(name)
            same = name == "ep" and axis.ranks == topology.axis("tp").ranks
            self[name] = None if axis.size == 1 else self["tp"] if same else make(axis)

    def __missing__(self, name: str) -> G | None:
        self._topology.axis(name)
        raise WorkerError("the data plane is closed", rank=-1, cause="closed")

    def groups(self) -> list[G]:
        """Each group once; that of "pp", which no graph captures, first."""
        return list(dict.fromkeys(group for name in ("pp", *AXES) if (group := self[name]) is not None))


def cut(x: torch.Tensor, dim: int, ranks: int) -> torch.Tensor:
    """x as [ranks, part of dimension `dim`, other dimensions], contiguous. Raises InputError: it has no equal parts."""
    if not x.ndim or x.shape[dim] % ranks:
        raise InputError("reduce_scatter cuts a dimension into equal parts", got=f"{list(x.shape)}, dim={dim}",
                         expected=f"a multiple of {ranks} there", fields=("x",))
    first = x if dim in (0, -x.ndim) else x.movedim(dim, 0)
    return first.contiguous().view(ranks, x.shape[dim] // ranks, *first.shape[1:])


def rows(x: torch.Tensor, ranks: int, send_sizes: Sequence[int] | None,
         recv_sizes: Sequence[int] | None) -> tuple[Sequence[int], Sequence[int]]:
    """The numbers of rows that go to each rank, and that come from each. Raises InputError: they do not fit x or the
    axis."""
    if send_sizes is None:
        if not x.ndim or len(x) % ranks:
            raise InputError("all_to_all without sizes cuts the rows into equal parts", got=list(x.shape),
                             expected=f"a multiple of {ranks} rows", fields=("x",),
                             hint="pass send_sizes and recv_sizes")
        send_sizes = [len(x) // ranks] * ranks
    if recv_sizes is None:
        recv_sizes = send_sizes
    if not x.ndim or len(send_sizes) != ranks or sum(send_sizes) != len(x) or min(send_sizes) < 0:
        raise InputError("send_sizes do not cut the rows", got=f"{list(send_sizes)} of {list(x.shape)}",
                         expected=f"{ranks} sizes from 0 whose sum is the number of rows", fields=("send_sizes",))
    if len(recv_sizes) != ranks or min(recv_sizes) < 0:
        raise InputError("recv_sizes are not one for each rank", got=list(recv_sizes),
                         expected=f"{ranks} sizes from 0", fields=("recv_sizes",))
    return send_sizes, recv_sizes


def all_tensors(tensors: IntermediateTensors) -> list[torch.Tensor]:
    """The tensors that a stage sends to the next one, in the order of their fields. Raises InputError: one is missing.
    """
    found = {field.name: tensors[field.name] for field in type(tensors).schema.fields}
    for name, tensor in found.items():
        if tensor is None:
            raise InputError(f"{type(tensors).__name__}.{name} is missing", fields=(name,),
                             expected="all tensors, since the next stage waits for each")
    return list(found.values())


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of x as one row; the same memory where x is contiguous."""
    # Not view(-1): a tensor of one element, or of none, may have any stride, and then cannot be viewed as bytes.
    return x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)


def row_bytes(x: torch.Tensor) -> int:
    """Bytes of one row, which all ranks have in common."""
    return x.itemsize * x.shape[1:].numel()


def check_received(peer: int, sent: int, expected: int) -> None:
    """Raises StateError: `peer` sends this rank another number of bytes than it asks for."""
    if sent != expected:
        raise StateError(f"rank {peer} sends another number of rows in all_to_all than this rank receives",
                         got=f"{sent} bytes", expected=f"{expected} bytes",
                         hint="recv_sizes of a rank are the send_sizes of the others that name it")
