"""Validating, packing and unpacking a decode step's input, beside pickle protocol 5 of the same tensors.

    python benchmarks/codec.py
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable

import torch

from hal.contracts.inputs import PagedModelInput

SEQS, BLOCKS = 256, 64


def interleaved_us(functions: dict[str, Callable[[], object]], rounds: int = 400, calls: int = 5) -> dict[str, float]:
    """Median time of a call of each, all of them measured in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter_ns()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter_ns() - start) / calls / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    def ints(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1000, shape, dtype=torch.int32)

    step = PagedModelInput(input_ids=ints(SEQS), positions=ints(SEQS), slot_mapping=ints(SEQS),
                           query_start_loc=ints(SEQS + 1), seq_lens=ints(SEQS), block_tables=ints(SEQS, BLOCKS),
                           logits_indices=ints(SEQS), block_size=16, num_decode_seqs=SEQS)
    device, wire = torch.device("cpu"), step.to_buffer()
    tensors = {name: value for name, value in step.__dict__.items() if value is not None}
    pickled = pickle.dumps(tensors, protocol=5)
    source = {f.name: step[f.name].numpy() for f in PagedModelInput.schema.replicated if step[f.name] is not None}
    dims = step.dims

    def fill() -> object:
        """What `prepare` does: arrays written straight into the buffer that travels."""
        packed = PagedModelInput.schema.allocate(dims, block_size=16, num_decode_seqs=SEQS, num_samples=SEQS)
        for name, array in source.items():
            packed.arrays[name][...] = array
        return packed.message

    us = interleaved_us({
        "fill a buffer": fill,
        "validate": lambda: step.validate(device),
        "to_buffer": step.to_buffer,
        "from_buffer": lambda: PagedModelInput.from_buffer(wire),
        "pickle.dumps": lambda: pickle.dumps(tensors, protocol=5), "pickle.loads": lambda: pickle.loads(pickled)})
    print(f"torch {torch.__version__}; {SEQS} sequences, {BLOCKS} block ids each, {wire.nbytes} bytes; median us")
    for name, value in us.items():
        print(f"{name:<14}{value:8.1f}")
    print(f"to_buffer is {us['pickle.dumps'] / us['to_buffer']:.1f} times faster than pickle, "
          f"from_buffer {us['pickle.loads'] / us['from_buffer']:.1f} times")


if __name__ == "__main__":
    main()
