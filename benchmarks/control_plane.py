"""Control planes: from the driver's start to the last rank that holds a validated input.

    python benchmarks/control_plane.py [receivers ...] [--with peer.py]

The payload is a decode step of 256 sequences with 64 block ids each, or the request that leads to it. Ours is valid
when it is unpacked, since its structure follows from its head; peers' fields are put together and validated. Mechanisms
take turns within one run. Hot: the next message follows as soon as all have acknowledged the last; paced: at 100 Hz. A
file given by --with has make(rank, world, store) -> (send, receive): a peer that does not belong in this repository.
"""

from __future__ import annotations

import importlib.util
import pickle
import struct
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from time import perf_counter, perf_counter_ns, process_time, sleep
from typing import Any

import numpy as np
import torch
from ranks import as_rank, on_ranks, quantiles

from hal.config import Topology
from hal.contracts.inputs import PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.features import COLUMNS
from hal.testing.null import backend as null
from workers.control.planes import make_plane
from workers.links.groups import Store, dist
from workers.links.memory import Segment
from workers.links.ring import Ring
from workers.worker.wire_policy import MessageReader

SEQS, BLOCKS = 256, 64
ROUNDS, HOT, PACED, WARM = 6, 80, 25, 5
CPU = torch.device("cpu")
IDS = [f"request-{i:012d}" for i in range(SEQS)]
Mechanism = tuple[Callable[[], object], Callable[[], object]]  # send, receive


def step() -> PagedModelInput:
    packed = PagedModelInput.schema.allocate(
        {"num_tokens": SEQS, "num_seqs": SEQS, "max_blocks": BLOCKS, "num_logits": SEQS}, block_size=16,
        num_decode_seqs=SEQS, num_samples=SEQS)
    rng = np.random.default_rng(0)
    for array in packed.arrays.values():
        array[...] = rng.integers(0, 1000, array.shape)
    return packed.to(CPU)


def diff() -> ExecuteModelRequest:
    """The request of such a step: every row gained a token, one in sixteen a block."""
    rows = np.arange(SEQS, dtype=np.int32)
    none, ones = np.zeros(0, np.int32), np.ones(SEQS, np.int32)
    return ExecuteModelRequest(
        step=1, finished_rows=none, new_rows=none, new_lens=none, new_prompt_lens=none, new_tokens=none,
        new_floats=np.zeros((0, len(COLUMNS["float"])), np.float32),
        new_ints=np.zeros((0, len(COLUMNS["int"])), np.int64), append_rows=rows,
        append_tokens=rows, block_rows=rows[::16].copy(), block_starts=rows[::16].copy(),
        block_counts=ones[::16].copy(), new_blocks=rows[::16] + 1, rows=rows, num_scheduled=ones, num_computed=ones)


def ours(rank: int, world: int, store: Store) -> dict[str, Mechanism]:
    topology, model_input, request = Topology(tp=world, rank=rank), step(), diff()
    shm, gloo = (make_plane(name, topology, store, null, CPU) for name in ("shm", "gloo"))
    read = MessageReader(PagedModelInput, CPU)

    def receive(plane: Any) -> object:
        return read(plane.receive()[0])

    def send_ids() -> None:
        shm.broadcast([model_input.to_buffer(), np.frombuffer("\n".join(IDS).encode(), np.uint8)])

    def receive_owned() -> object:
        model, names = shm.receive()
        owned = {name: value.clone() if isinstance(value, torch.Tensor) else value
                 for name, value in read(model).__dict__.items() if name != "_packed"}
        made = PagedModelInput.__new__(PagedModelInput)
        made.__dict__.update(owned)
        return made, names.tobytes().decode().split("\n")

    def receive_request() -> object:
        return ExecuteModelRequest.from_buffer(shm.receive()[0])

    return {"shm": (lambda: shm.broadcast([model_input.to_buffer()]), lambda: receive(shm)),
            "shm, ids and copies": (send_ids, receive_owned),
            "shm, request diff": (lambda: shm.broadcast([request.to_buffer()]), receive_request),
            "gloo, flat": (lambda: gloo.broadcast([model_input.to_buffer()]), lambda: receive(gloo))}


def peers(rank: int, world: int, store: Store, pipes: list[Connection]) -> dict[str, Mechanism]:
    dist.init_process_group("gloo", store=dist.PrefixStore("peers", store), rank=rank, world_size=world)
    model_input = step()
    tensors = {name: value for name, value in model_input.__dict__.items()
               if not name.startswith("_") and value is not None}
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}

    def built(fields: dict[str, Any]) -> object:
        made = PagedModelInput(**{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                                  for name, value in fields.items()})
        made.validate(CPU)
        return made

    def objects() -> object:
        box = [tensors if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return None if rank == 0 else built(box[0])

    def tensor_dict() -> object:
        """As serving engines of mid-2024 did it: pickled metadata, then a broadcast for each tensor."""
        box: list[Any] = [[(n, (v.dtype, v.shape) if isinstance(v, torch.Tensor) else v) for n, v in tensors.items()]
                          if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        found, works = {}, []
        for name, value in box[0]:
            if isinstance(value, tuple):
                tensor = tensors[name] if rank == 0 else torch.empty(value[1], dtype=value[0])
                works.append(dist.broadcast(tensor, src=0, async_op=True))
                value = tensor
            found[name] = value
        for work in works:
            work.wait()
        return None if rank == 0 else built(found)

    def pipe(content: dict[str, Any]) -> Mechanism:
        def send() -> None:
            data = pickle.dumps(content, protocol=5)
            for connection in pipes:
                connection.send_bytes(data)

        return send, lambda: built(pickle.loads(pipes[0].recv_bytes()))

    slots = 8, 1 << 20
    segment = Segment("queue", rank, world, store, slots[0] * slots[1])
    ring = Ring(segment, 0, range(1, world), *slots)

    def put() -> None:
        ring.send([np.frombuffer(pickle.dumps((IDS, arrays), protocol=5), np.uint8)])

    return {"gloo, objects": (objects, objects), "gloo, tensor dict": (tensor_dict, tensor_dict),
            "pipe, pickled tensors": pipe(tensors), "pipe, pickled numpy": pipe(arrays),
            "pickle in our ring": (put, lambda: built(pickle.loads(ring.receive()[0])[1]))}


def connections(rank: int, world: int, folder: str) -> list[Connection]:
    """The driver's with each receiver, or a receiver's with the driver."""
    if rank:
        while not (path := Path(folder) / f"{rank}").exists():
            sleep(0.01)
        return [Client(str(path))]
    listeners = [Listener(str(Path(folder) / f"{r}")) for r in range(1, world)]
    return [listener.accept() for listener in listeners]


def run(rank: int, world: int, store: Store, folder: str, extra: str) -> None:
    acks, pipes = connections(rank, world, folder + "/a"), connections(rank, world, folder + "/b")
    mechanisms = ours(rank, world, store) | peers(rank, world, store, pipes)
    if extra:
        spec = importlib.util.spec_from_file_location("peer", extra)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        mechanisms[Path(extra).stem] = module.make(rank, world, store)
    times: dict[tuple[str, bool], list[float]] = {(n, paced): [] for n in mechanisms for paced in (False, True)}
    cpu = dict.fromkeys(times, 0.0)
    for _ in range(ROUNDS):
        for (name, paced), found in times.items():
            send, receive = mechanisms[name]
            for i in range(WARM + (PACED if paced else HOT)):
                if rank:
                    held = receive()
                    acks[0].send_bytes(struct.pack("q", perf_counter_ns()))
                    del held
                    continue
                if paced:
                    sleep(0.01)
                used, start = process_time(), perf_counter_ns()
                send()
                used = process_time() - used
                last = max(struct.unpack("q", ack.recv_bytes())[0] for ack in acks)
                if i >= WARM:
                    found.append((last - start) / 1e3)
                    cpu[name, paced] += used
    if rank == 0:
        size = step().to_buffer().nbytes, diff().to_buffer().nbytes
        print(f"\n{world - 1} receiver(s); step {size[0]} bytes, request {size[1]}; us")
        print(f"  {'':<24}{'hot p50':>10}{'p99':>10}{'paced p50':>12}{'p99':>10}{'driver CPU hot':>16}{'paced':>8}")
        for name in mechanisms:
            (h, h99), (p, p99) = quantiles(times[name, False]), quantiles(times[name, True])
            each = [cpu[name, paced] / len(times[name, paced]) * 1e6 for paced in (False, True)]
            print(f"  {name:<24}{h:>10.1f}{h99:>10.1f}{p:>12.1f}{p99:>10.1f}{each[0]:>16.1f}{each[1]:>8.1f}")
    for name in ("shm", "gloo, flat"):
        send, receive = mechanisms[name]
        if rank:
            used, start = process_time(), perf_counter()
            receive()
            acks[0].send_bytes(struct.pack("d", (process_time() - used) / (perf_counter() - start)))
        else:
            sleep(3)
            send()
            worst = max(struct.unpack("d", ack.recv_bytes())[0] for ack in acks)
            print(f"  a rank that waits for 3 s, {name}: {100 * worst:.2f}% of a core")
    dist.destroy_process_group()


def main() -> None:
    arguments = sys.argv[1:]
    extra = arguments.pop(arguments.index("--with") + 1) if "--with" in arguments else ""
    for receivers in [int(a) for a in arguments if a != "--with"] or (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            for part in "ab":
                (Path(folder) / part).mkdir()
            on_ranks(run, receivers + 1, folder, extra)


if __name__ == "__main__" and not as_rank(run):
    main()
