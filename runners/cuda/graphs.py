"""Steps as CUDA graphs, all in one memory pool: decode steps, one for each prepared batch size, in an engine that
speculates the steps of a few tokens a sequence, and steps with prompts, by numbers of tokens and sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hal.contracts.inputs import IntermediateTensors, PagedModelInput
from hal.paged.shape_plan import ShapePlan
from hal.schema.packed import Packed
from runners.cuda.staging import end_of

_SEGMENT = 24 << 20  # bytes that the allocator may take beyond a request
_TOKENS = 512  # of the largest graph with several tokens a sequence; above it launching hardly counts
# Tokens of graphs of prompts: 128 take about the time of one, and above that padding is at most half of a step.
_PROMPTS = 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192
_LAUNCH = 6e11  # operations of a layer that take as long as launching it: about 1 ms, on an H200
_FEW_SEQS = 32  # of every other graph of prompts: with more, fewer programs share a decoding sequence's context
PENDING = ("pending_rows", "sampled_rows")  # optional fields that the input of a graph has, but for several tokens

Results = IntermediateTensors | tuple[torch.Tensor, torch.Tensor]
Run = Callable[[PagedModelInput, IntermediateTensors | None], Results]


@dataclass(frozen=True, slots=True)
class StepGraph:
    """Attributes:
        num_seqs, queries: the sequences, and the most tokens of one; 0: as many as the step has. A step may have fewer
            of both: its tokens lie side by side, and padding lies behind them.
        dims: the sizes of a step that it runs, by symbol.
        input: the input that it reads, as views of `staged`.
        staged: uint8 on the device. The graph reads its first `size` bytes, a packed input. Behind them is room for the
            sampling fields of a step, which the graph does not read.
        received: the tensors of the previous pipeline stage, which the graph reads; None on the first stage.
        results: the tensors that a replay writes: on the last stage the logits [num_logits, vocab_size] and the most
            likely tokens, int32 [num_logits]; on other stages the tensors for the next stage.
        seconds, bytes: the time and memory that the capture took.
    """

    num_seqs: int
    queries: int
    dims: Mapping[str, int]
    input: PagedModelInput
    staged: torch.Tensor
    size: int
    graph: Any
    received: IntermediateTensors | None
    results: Results
    seconds: float
    bytes: int

    @property
    def pending(self) -> tuple[str, ...]:
        """The optional fields that a step needs to run as this graph."""
        return () if self.input.pending_rows is None else PENDING


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 up to 64, every 16 up to 256 and every 32 from there; and the limit."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return (*(n for n in steps if n < max_num_seqs), max_num_seqs)


def prompt_sizes(layer_params: float, most: int) -> tuple[int, ...]:
    """Tokens of the graphs of steps with prompts, of up to `most` tokens: as long as launching takes longer than the
    products of a layer, of which this rank computes so many parameters for a token. It follows from what all ranks
    know, since their steps must have the same sizes."""
    fits = int(min(_LAUNCH / (2 * layer_params), _PROMPTS[-1]))
    return (*(n for n in _PROMPTS if n < most and n <= fits), *((most,) if most <= fits else ()))


def graph_plan(max_num_seqs: int, queries: tuple[int, ...] = (), prompts: tuple[int, ...] = ()) -> ShapePlan:
    """A graph for each batch size of decode steps, for each of these `queries` a sequence (PagedModelRunner.queries),
    and for steps with prompts of these numbers of tokens."""
    kinds = {"decode": {"num_seqs": batch_sizes(max_num_seqs)}}
    if queries:
        kinds["several"] = {"num_seqs": batch_sizes(max(min(max_num_seqs, _TOKENS // queries[-1]), 1)),
                            "queries": queries}
    if prompts:
        kinds["prompts"] = {"num_tokens": prompts,
                            "num_seqs": tuple(sorted({min(_FEW_SEQS, max_num_seqs), max_num_seqs}))}
    return ShapePlan(kinds)


def graph_dims(num_seqs: int, max_blocks: int, queries: int = 1, logits: int | None = None) -> dict[str, int]:
    """The sizes of a decode step of which every sequence is sampled, or of a step of `queries` tokens and `logits` rows
    to sample a sequence, whose sampling fields the graph does not read."""
    dims = {"num_tokens": num_seqs * queries, "num_seqs": num_seqs, "max_blocks": max_blocks}
    if logits is None:
        return {**dims, "num_logits": num_seqs, "num_sampled": num_seqs}
    return {**dims, "num_logits": num_seqs * logits}


def capture(empty: Packed[Any], dims: Mapping[str, int], received: IntermediateTensors | None, run: Run, pool: Any,
            room: int, device: torch.device) -> StepGraph:
    """`empty`: an input of the sizes `dims` in which every sequence is padding. `run`: what is captured."""
    begin, free = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
    with torch.inference_mode(False):  # it is written in every step, without entering that mode
        staged = torch.empty(empty.buffer.size + room, dtype=torch.uint8, device=device)
    staged[:empty.buffer.size].copy_(torch.from_numpy(empty.buffer))
    m: PagedModelInput = empty.over(staged)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(m, received)  # kernels are compiled and libraries set up before anything is captured
    torch.cuda.synchronize(device)
    # A capture that runs out of memory cannot be undone (PyTorch ends the process), so that is found out here.
    torch.empty(torch.cuda.max_memory_allocated(device) - before + _SEGMENT, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = run(m, received)
    torch.cuda.synchronize(device)
    spent = time.perf_counter() - begin, max(free - torch.cuda.mem_get_info(device)[0], 0)
    size = max(end_of(empty, name) for name in empty.arrays)
    return StepGraph(dims["num_seqs"], m.max_query_len, dims, m, staged, size, graph, received, results, *spent)
