"""Messages and recordings with something wrong in them: each must be refused by a named error, or be a valid one.

    python tests/fuzz.py                             # 100,000 messages, 2,000 recordings, of a seed that is printed
    python tests/fuzz.py --wire 0 --recordings 500 --seed 7

A `HalError` is the only exception that a mutation may end in. The address space of the process is limited, so that an
allocation by a claimed size fails instead of passing unseen. For messages, memory of Python and numpy is counted too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import random
import resource
import secrets
import struct
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hal.config import Topology, WorkerConfig
from hal.conformance.cases.guard import GOLDEN
from hal.contracts import backend as backends
from hal.contracts.inputs import IntermediateTensors, PagedModelInput, SamplingInput, WorkerInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.engine.llm import LLM
from hal.errors import HalError, WireError
from hal.features import COLUMNS
from hal.recording.bisect import bisect
from hal.recording.format import Recording
from hal.recording.record import RecordingExecutor
from hal.recording.replay import replay
from hal.sampling.params import SamplingParams
from hal.schema import Array, Declared, Doc
from hal.schema.layout import HEAD_SIZE

INTS = (0, 1, 2, 3, 7, 63, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63,
        2**64 - 1)
ROOM = 1 << 30  # bytes of address space that the fuzzed code may take beside what the process has


class Everything(Declared):
    """All kinds of fields, optional and not, with texts behind the arrays."""

    ids: Annotated[torch.Tensor, Array("int32", "n", low=0)]
    edges: Annotated[torch.Tensor, Array("int64", "2 * n + 1", "m", 3)]
    hidden: Annotated[torch.Tensor | None, Array("bfloat16", "n", 8)] = None
    mask: Annotated[torch.Tensor | None, Array("bool", "k")] = None
    own: Annotated[torch.Tensor | None, Array("float32", "m", "l", scope="driver")] = None
    score: float | None = None
    count: Annotated[int, Doc("a number")] = 0
    flag: bool = False
    switch: bool | None = None
    name: str = ""
    note: str | None = None
    names: tuple[str, ...] = ()


Handed = IntermediateTensors.declare("Handed", hidden=Array("bfloat16", "num_tokens", 16),
                                     residual=Array("float32", "num_tokens", 16))


def limit_memory(room: int = ROOM) -> None:
    """Bound the address space of this process, for the rest of its life."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def instances(rng: np.random.Generator) -> list[Declared]:
    """Valid instances of all types that cross a wire, of several sizes."""
    def ints(*shape: int, low: int = 0, high: int = 9) -> np.ndarray:
        return rng.integers(low, high, shape, dtype=np.int32)

    made: list[Declared] = [WorkerInput(), WorkerInput(blocks_to_copy=ints(3, 2, low=1), blocks_to_swap_in=ints(1, 2))]
    for n in (0, 1, 5):
        tensor = lambda *shape: torch.from_numpy(ints(*shape))  # noqa: E731
        made.append(Everything(ids=tensor(n), edges=tensor(2 * n + 1, 2, 3).long(), name="some text", count=n,
                               names=("a", "", "öß漢"), flag=n > 0))
        made.append(Everything(ids=tensor(n), edges=tensor(2 * n + 1, 0, 3).long(), note="", score=0.5, switch=True,
                               hidden=torch.zeros(n, 8, dtype=torch.bfloat16), mask=torch.ones(4, dtype=torch.bool),
                               own=torch.zeros(0, 7)))
        made.append(Handed(hidden=torch.zeros(n, 16, dtype=torch.bfloat16), residual=torch.zeros(n, 16)))
        made.append(SamplerOutput(token_ids=tensor(n), logprobs=torch.zeros(n), top_ids=tensor(n, 5),
                                  top_logprobs=torch.zeros(n, 5)))
        lens = np.arange(1, n + 1)
        bias: Any = {"bias_rows": ints(n), "bias_counts": np.ones(n, np.int32), "bias_ids": ints(n),
                     "bias_values": np.zeros(n, np.float32), "mask_rows": ints(1), "token_masks": ints(1, 7)}
        made.append(SamplingRequest(step=n, **bias))
        made.append(SamplingInput(bias_ids=tensor(n, 2), bias_values=torch.zeros(n, 2), token_mask=tensor(n, 7)))
        made.append(ExecuteModelRequest(
            step=n, finished_rows=ints(0), new_rows=np.arange(n, dtype=np.int32), new_lens=lens.astype(np.int32),
            new_prompt_lens=lens.astype(np.int32), new_tokens=ints(int(lens.sum())),
            new_floats=np.zeros((n, len(COLUMNS["float"])), np.float32),
            new_ints=np.zeros((n, len(COLUMNS["int"])), np.int64), append_rows=ints(0), **bias,
            append_tokens=ints(0), block_rows=np.arange(n, dtype=np.int32), block_starts=np.zeros(n, np.int32),
            block_counts=np.ones(n, np.int32), new_blocks=np.arange(1, n + 1, dtype=np.int32),
            rows=np.arange(n, dtype=np.int32), num_scheduled=lens.astype(np.int32), num_computed=np.zeros(n, np.int32)))
        starts = torch.from_numpy(np.concatenate([[0], lens.cumsum()]).astype(np.int32))
        positions = torch.from_numpy(np.concatenate([np.arange(0), *map(np.arange, lens)]).astype(np.int32))
        rows = torch.from_numpy(np.repeat(np.arange(n), lens))
        made.append(PagedModelInput(
            input_ids=tensor(int(starts[-1])), positions=positions, slot_mapping=(positions + 8 * (rows + 1)).int(),
            query_start_loc=starts, seq_lens=torch.from_numpy(lens).int(), num_decode_seqs=min(n, 1),
            block_tables=torch.arange(1, n + 1, dtype=torch.int32)[:, None].contiguous(), block_size=8,
            logits_indices=starts[1:] - 1, num_samples=n, temperature=torch.ones(n),
            seed=torch.zeros(n, dtype=torch.int64), bias_ids=tensor(n, 2), bias_values=torch.zeros(n, 2),
            token_mask=tensor(n, 7)))
    for instance in made:
        instance.validate()
        instance.check()
    return made


def sealed(message: bytearray, head_size: int) -> bytearray:
    """The message with the CRC that its head and texts have: what somebody who knows the format would send."""
    if len(message) >= head_size:
        texts = min(struct.unpack_from("<Q", message, 32)[0], len(message) - head_size)
        crc = zlib.crc32(message[8:head_size])
        struct.pack_into("<I", message, 4, zlib.crc32(message[len(message) - texts:], crc) if texts else crc)
    return message


def mutated(message: bytes, head_size: int, symbols: int, rng: random.Random) -> bytearray:
    """One to three things changed; usually with the CRC made right again."""
    out = bytearray(message)
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(9)
        if kind == 0:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[rng.randrange(min(head_size, len(out)))] = rng.choice((0, 1, 2, 127, 128, 255))
        elif kind == 2:  # size, presence bits, size of the texts
            struct.pack_into("<Q", out, rng.choice((16, 24, 32)), rng.choice((*INTS, len(out), 1 << rng.randrange(64))))
        elif kind == 3 and symbols:
            struct.pack_into("<Q", out, HEAD_SIZE + 8 * rng.randrange(symbols), rng.choice(INTS))
        elif kind == 4 and head_size > HEAD_SIZE + 8 * symbols:
            out[rng.randrange(HEAD_SIZE + 8 * symbols, head_size)] = rng.randrange(256)
        elif kind == 5 and len(out) > head_size:  # a value of an array, or the counts of a text
            at = rng.randrange(head_size, len(out))
            out[at:at + 4] = struct.pack("<I", rng.choice(INTS) & 0xFFFFFFFF)[:len(out) - at]
        elif kind == 6 and rng.random() < 0.5:
            del out[rng.randrange(head_size, len(out) + 1):]
            struct.pack_into("<Q", out, 16, len(out))
        elif kind == 7:
            out += rng.randbytes(rng.choice((1, 8, 64)))
            if rng.random() < 0.5:
                struct.pack_into("<Q", out, 16, len(out))
        elif kind == 8 and symbols > 1:  # two symbols at once: a product that overflows, beside a 0
            for _ in range(2):
                struct.pack_into("<Q", out, HEAD_SIZE + 8 * rng.randrange(symbols), rng.choice(INTS[-12:]))
    if rng.random() < 0.1:  # cut anywhere
        del out[rng.randrange(len(out) + 1):]
    return sealed(out, head_size) if rng.random() < 0.85 else out


def same(one: Declared, other: Declared) -> bool:
    return one.checksum() == other.checksum() and repr(one) == repr(other)


def fuzz_wire(count: int, seed: int) -> str:
    """Decode, validate, check and encode `count` mutated messages; returns what came of them.

    Raises:
        AssertionError: a message was accepted that is not encoded again as it was, or one took more memory than a
            small multiple of its size. Any exception but a HalError passes through.
    """
    rng, found = random.Random(seed), collections.Counter[str]()
    made = instances(np.random.default_rng(seed))
    wires = [bytes(instance.to_buffer()) for instance in made]
    tracemalloc.start()
    try:
        for _ in range(count):
            i = rng.randrange(len(made))
            kind, schema = type(made[i]), type(made[i]).schema
            # An array, as planes give; torch warns of memory that it may not write.
            message = np.frombuffer(mutated(wires[i], HEAD_SIZE + schema.head.size, len(schema.symbols), rng), np.uint8)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                result = kind.from_buffer(message)
                result.validate()
                assert same(kind.from_buffer(result.to_buffer()), result)
                found["unpacked"] += 1
                result.check()
            except WireError:
                found["refused by from_buffer"] += 1
            except HalError:
                found["refused by check"] += 1
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= (1 << 16) + 32 * len(message), f"{peak:,} bytes for a message of {len(message)}"
    finally:
        tracemalloc.stop()
    assert not count or (found["unpacked"] and found["refused by from_buffer"] and found["refused by check"]), found
    return f"{count} messages: {dict(found)}"


def recordings(directory: Path) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Head and tensors of good recordings: drawn tokens and penalties; and blocks that are copied and swapped."""
    with LLM(device="null", dtype="float32", num_blocks=34, num_cpu_blocks=40, block_size=4, max_model_len=128,
             max_num_seqs=8, async_scheduling=False) as llm:
        config = WorkerConfig(llm.config, llm.model_config, Topology())
        llm.executor = recorder = RecordingExecutor(llm.executor, config, llm.backend)
        prompt = [7 + i % 5 for i in range(40)]
        llm.generate([prompt], SamplingParams(max_tokens=1))  # from here on its last block is cached, so it is copied
        llm.generate([prompt, [*prompt[:37], 1, 2], prompt, prompt[5:]], SamplingParams(max_tokens=24, ignore_eos=True))
        recorder.save(directory / "moves.safetensors")
    found = []
    for path in (directory / "moves.safetensors", GOLDEN / "cpu-float32-drawn.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.append((json.loads(file.metadata()["hal"]), {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    assert any("swap_in" in name for name in found[0][1]) and any("to_copy" in name for name in found[0][1])
    return found


VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2, 50, 1000, 2**15, 2**16 + 1, 10**6, 2**31, 2**40, 2**63,
                           10**25, 1.5, float("nan"), float("inf"), "", "x", "/etc", "auto", "ray", "none",
                           "evilmodule:backend", "\x1b[2J", [], [1], [[1]], {}, {"a": 1})
NUMBERS = (-2**63, -2**31, -2, -1, 0, 1, 3, 15, 16, 17, 70, 127, 128, 129, 1000, 10**6, 2**31 - 1, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-45, 1.5, 3e38)


def change_head(head: dict[str, Any], rng: random.Random) -> None:
    """One value of the JSON replaced, removed or renamed."""
    at: Any = head
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.9:
            at = at[key]
            continue
        kind = rng.randrange(8)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, dict):
            at[rng.choice(("x", "tp", "rows", key))] = at.pop(key)
        else:
            at[key] = rng.choice(VALUES)
        return


def change_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """A value, the shape, the dtype or the name of one tensor."""
    name = rng.choice([n for n in tensors if "request" in n] if rng.random() < 0.8 else list(tensors))
    tensor, kind = tensors[name].clone(), rng.randrange(10)
    if kind < 7 and tensor.numel():
        value = rng.choice(FLOATS if tensor.dtype.is_floating_point else NUMBERS)
        if not tensor.dtype.is_floating_point:
            value = max(min(value, torch.iinfo(tensor.dtype).max), torch.iinfo(tensor.dtype).min)
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
    elif kind == 7:
        tensor = rng.choice((tensor[:0], tensor[None], torch.cat([tensor, tensor]), torch.zeros(0, 2**31)))
    elif kind == 8:
        tensor = tensor.to(rng.choice((torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn)))
    else:
        del tensors[name]
        name = rng.choice((name + "x", "x", name.replace("request", "output")))
    if rng.random() < 0.95:
        tensors[name] = tensor.contiguous()


def chained(head: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Each step's digest made that of the steps before it, as far as they can be read."""
    digest = 0
    with contextlib.suppress(Exception):
        for i, step in enumerate(head["steps"]):
            step["request"]["digest"] = digest
            start = f"{i:05}.request."
            arrays: Any = {n[len(start):]: t.numpy() for n, t in tensors.items() if n.startswith(start)}
            digest = ExecuteModelRequest(**arrays, **step["request"]).chain()


def change_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    size = struct.unpack_from("<Q", data)[0] + 8
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(size if rng.random() < 0.7 else len(data))] = rng.randrange(256)
    path.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.2 else data)


def fuzz_recordings(count: int, seed: int) -> str:
    """Load `count` mutated recordings, and run those that load: on the null backend, some on the CPU, some by bisect;
    returns what came of them.

    Raises:
        AssertionError: a recording made the process run out of its memory, or start another one. Any exception but a
            HalError passes through.
    """
    rng, found = random.Random(seed), collections.Counter[str]()
    null, cpu = backends.load("null"), backends.load("cpu")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    with tempfile.TemporaryDirectory() as directory:
        good, path, began = recordings(Path(directory)), Path(directory) / "bad.safetensors", children.read_text()
        for _ in range(count):
            source, source_tensors = rng.choice(good)
            head, tensors = copy.deepcopy(source), dict(source_tensors)
            kind = rng.randrange(10)
            for _ in range(rng.randint(1, 2)):
                if kind < 4:
                    change_head(head, rng)
                elif kind < 9:
                    change_tensors(tensors, rng)
            if rng.random() < 0.8:
                chained(head, tensors)
            save_file(tensors, str(path), {"hal": json.dumps(head)})
            if kind == 9:
                change_bytes(path, rng)
            try:
                Recording.load(path)
                found["loaded"] += 1
                replay(path, null, "null")
                if rng.random() < 0.2:
                    replay(path, cpu, "cpu")
                if rng.random() < 0.03:
                    bisect(path, "cpu", "cpu")
                found["run"] += 1
            except HalError as error:
                found[type(error).__name__] += 1
                assert "llocate" not in str(error), error
            assert children.read_text() == began, "a recording started a process"
    assert not count or (found["run"] and found["WireError"]), found
    return f"{count} recordings: {dict(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="mutated messages and recordings")
    parser.add_argument("--wire", type=int, default=100_000, metavar="N", help="messages")
    parser.add_argument("--recordings", type=int, default=2_000, metavar="N", help="recordings")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), metavar="N")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    limit_memory()
    for fuzz, count in ((fuzz_wire, args.wire), (fuzz_recordings, args.recordings)):
        start = time.perf_counter()
        text: Any = fuzz(count, args.seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter() - start
        print(f"{text}; {seconds:.0f} s, peak memory of the process {peak / 1024:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
