"""The data plane over torch.distributed's process groups."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions

from hal.config import Topology
from hal.contracts.fingerprint import STEP, Fingerprint
from hal.contracts.inputs import IntermediateTensors
from hal.errors import InputError
from hal.guard import data_plane
from workers.links.groups import lost
from workers.links.liveness import LINGER, Lifelines

I = TypeVar("I", bound=IntermediateTensors)  # noqa: E741


class TorchCommunicator:
    """A hal.contracts.communicator.Communicator.

    Args:
        tp_group: of this stage's ranks, by tp_rank; None when tp is 1. world_group: of all ranks; None when pp is 1.
        carrier: the device whose memory the world group sends: of another one the host relays.
        check_group: gloo's, of this stage's ranks, which compare fingerprints over it before each collective and at the
            end of a step; None does without. On the data plane's own group a check would meet another's collective.
        strict: stages compare theirs too. Gloo ends a process that is sent another size than it expects.
        lifelines: where the groups are NCCL's, which is then told at once that a rank is gone. Closed with the rest.

    Raises (all methods):
        WorkerError: of rank -1, when another rank is gone.
        StateError: another rank is at another place (see check_group).
    """

    def __init__(self, topology: Topology, device: torch.device, tp_group: Any, world_group: Any, carrier: torch.device,
                 check_group: Any = None, strict: bool = False, lifelines: Lifelines | None = None) -> None:
        self.topology, self.device, self.fingerprint = topology, device, Fingerprint()
        self._tp, self._world, self._carrier = tp_group, world_group, carrier
        self._checks, self._strict, self._lifelines = check_group, strict, lifelines
        self.capturable = lifelines is not None
        # NCCL's then run on the current stream, in order with all else there, captured or not; nothing is waited for.
        self._sums, self._gathers = AllreduceOptions(), AllgatherOptions()
        self._sums.asyncOp = self._gathers.asyncOp = False
        if lifelines is not None:
            try:
                # First what no graph captures: aborting the other may have to wait for graphs.
                lifelines.guard([group for group in (world_group, tp_group) if group is not None])
                self._meet()
            except BaseException:
                self.close()
                raise

    def check(self) -> None:
        if self._lifelines is not None:
            self._lifelines.check()

    def end_step(self) -> None:
        self.check()
        self._compare()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        with data_plane("all_reduce"):
            if self.topology.tp > 1:
                self._begin("all_reduce", x)
                x = x.contiguous()
                self._run("all_reduce", lambda: [self._tp.allreduce([x], self._sums)])
            return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        with data_plane("all_gather"):
            tp = self.topology.tp
            if tp == 1:
                return x
            self._begin("all_gather", x)
            flat = x.new_empty(tp * x.numel())
            self._run("all_gather", lambda: [self._tp._allgather_base(flat, x.reshape(-1), self._gathers)])
            return torch.cat(flat.view(tp, *x.shape).unbind(), -1)

    def send(self, tensors: IntermediateTensors) -> None:
        with data_plane("send"):
            to = self.topology.rank + self.topology.tp
            found = {f.name: tensors[f.name] for f in type(tensors).schema.fields}
            for name, tensor in found.items():
                if tensor is None:
                    raise InputError(f"{type(tensors).__name__}.{name} is missing", fields=(name,),
                                     expected="all tensors, since the next stage waits for each")
            sent = [*([self._seal()] if self._strict else []), *found.values()]
            # With NCCL the current stream waits until they have gone: a replay that writes them again comes after.
            self._run("send", lambda: [self._world.send([t.to(self._carrier)], to, 0) for t in sent])

    def recv(self, kind: type[I], dims: dict[str, int]) -> I:
        with data_plane("recv"):
            source = self.topology.rank - self.topology.tp
            if self._strict:
                theirs = torch.empty_like(self._seal(), device=self._carrier)
                self._run("recv", lambda: [self._world.recv([theirs], source, 0)])
                arrived = theirs.cpu().numpy()
                self.check()
                self.fingerprint.compare(arrived, f"rank {source}", STEP)
            found: dict[str, torch.Tensor] = {}
            for field in kind.schema.fields:
                assert field.array is not None  # `declare` takes arrays only
                shape = tuple(d.size(dims) for d in field.array.dims)
                found[field.name] = torch.empty(shape, dtype=getattr(torch, field.array.dtype), device=self._carrier)
            self._run("recv", lambda: [self._world.recv([t], source, 0) for t in found.values()])
            return kind(**{name: tensor.to(self.device) for name, tensor in found.items()})

    def _seal(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.fingerprint.pack()), dtype=torch.uint8)

    def close(self) -> None:
        lifelines, self._lifelines = self._lifelines, None
        if lifelines is not None:
            with contextlib.suppress(RuntimeError):  # the device has failed
                stream, end = torch.cuda.current_stream(self.device), time.monotonic() + LINGER
                while not (stream.query() or lifelines.lost or time.monotonic() > end):
                    time.sleep(1e-3)  # others need this rank's part; and their kernels must not find its memory freed
        self._tp = self._world = self._checks = None
        if lifelines is not None:
            lifelines.close()

    def _meet(self) -> None:
        """NCCL makes a communicator at the first operation, and waits there for its ranks: here, where all come, from
        the first stage to the last, and not in a step or while a graph is captured."""
        topology, tensor = self.topology, torch.zeros(1, device=self.device)
        self.all_reduce(tensor)
        if not topology.is_first_stage:
            self._run("connecting", lambda: [self._world.recv([tensor], topology.rank - topology.tp, 0)])
        if not topology.is_last_stage:
            self._run("connecting", lambda: [self._world.send([tensor], topology.rank + topology.tp, 0)])

    def _begin(self, kind: str, x: torch.Tensor) -> None:
        self.fingerprint.count(kind, x.nbytes)
        self._compare()

    def _compare(self) -> None:
        """Where ranks check, find out whether all are at the same collective, or at the end of the step. Not of what a
        graph does, which no rank counts: a step ends with the same count on all that replay it."""
        if self._checks is None or (self.capturable and torch.cuda.is_current_stream_capturing()):
            return
        own = self._seal()
        found = own.new_empty(self.topology.tp * len(own))
        self._run("check", lambda: [self._checks._allgather_base(found, own)])
        first = self.topology.rank - self.topology.tp_rank
        for i, theirs in enumerate(found.view(self.topology.tp, -1)):
            self.fingerprint.compare(theirs.numpy(), f"rank {first + i}")

    def _run(self, what: str, launch: Callable[[], list[Any]]) -> None:
        try:
            for work in launch() if self._lifelines is None else self._lifelines.issue(launch):
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise lost(what, error) from error
