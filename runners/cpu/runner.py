"""The CPU's runner: the default one with the CPU's parts."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from functools import partial

import torch

from hal.config import WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors, PagedModelInput
from hal.contracts.runner import Progress, no_progress
from hal.embedding.runner import EmbeddingRunner
from hal.models.layers import VocabEmbedding
from hal.paged.runner import Forwarded, PagedModelRunner
from runners.cpu.attention import CpuAttention
from runners.cpu.choice import once
from runners.cpu.invariant import InvariantAttention, InvariantOps
from runners.cpu.linears import BUCKETS
from runners.cpu.memory import anonymous
from runners.cpu.ops import CpuOps
from runners.cpu.sampler import CpuSampler
from runners.cpu.tape import ROWS, Recorder, Tape, Untaped, replaced

_SMALL = 1 << 24  # parameters of a model of which nothing is measured
_ROUNDS = 3


class CpuModelInput(PagedModelInput):
    """A paged batch, without further fields."""


class CpuModelRunner(PagedModelRunner):
    """Attributes:
        tape: the recorded decode step; None where there is none, for the reason `untaped`.
    """

    input_type = CpuModelInput
    selects_rows = True
    ops: CpuOps
    tape: Tape | None = None
    untaped = "there was no warm-up"

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        alike = config.engine.batch_invariant
        super().__init__(config, device, communicator, attention=InvariantAttention if alike else CpuAttention,
                         sampler=CpuSampler())
        self.ops = (InvariantOps if alike else CpuOps)()

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        logging.getLogger("hal").info(self.ops.described())

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        """The system gives zeroed pages when they are first touched. `torch.zeros` writes all of them, which takes
        seconds, and drops files from memory that the next start would have found there."""
        dtype = self.kv_dtype
        return [torch.frombuffer(anonymous(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
                for shape in self.cache_shapes(num_blocks)]

    @torch.inference_mode()
    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        super().warmup(kv_caches, progress)
        try:
            self.tape, self.taped_caches = self._record(kv_caches), kv_caches
            self._choose(self.tape, kv_caches)
            text = f"decode steps of {self.tape.described()} sequences run as one call"
        except Untaped as reason:
            self.tape, self.untaped = None, str(reason)
            text = f"decode steps run operation by operation: {reason}"
        logging.getLogger("hal").info(text)

    def _record(self, kv_caches: Sequence[torch.Tensor]) -> Tape:
        """Raises Untaped: the step has what a tape has not."""
        engine, topology = self.config.engine, self.config.topology
        if not self.ops.kernels:
            raise Untaped("there are no compiled kernels")
        if engine.batch_invariant or topology.pp > 1 or self.taps or self.loads is not None:
            raise Untaped("batch_invariant, pipeline stages, taps of a proposer or counted experts")
        m, communicator = self.dummy_input(min(engine.max_num_seqs, ROWS), 1), self.communicator
        context, recorder = self.forward_context(m, kv_caches), Recorder(m, self.dtype, communicator)
        self.ops.recorder = recorder
        try:
            with contextlib.ExitStack() as standing_in:
                if topology.tp > 1:
                    standing_in.enter_context(replaced(communicator, all_reduce=recorder.all_reduce,
                                                       all_gather=recorder.all_gather))
                for layer in self.model.modules() if topology.tp > 1 else ():
                    if isinstance(layer, VocabEmbedding):
                        shared = partial(recorder.embed_shared, layer.forward, layer.weight.shape[1])
                        standing_in.enter_context(replaced(layer, forward=shared))
                standing_in.enter_context(recorder)
                hidden = self.model(m.input_ids, m.positions, context, None)
                assert isinstance(hidden, torch.Tensor)
                logits = self.model.compute_logits(hidden)
        finally:
            self.ops.recorder = None
        return Tape(recorder, logits, self.ops.kernels)

    def _choose(self, tape: Tape, kv_caches: Sequence[torch.Tensor]) -> None:
        """Measure for which numbers of sequences the tape is faster. A small model always takes it. So do several
        ranks: what a rank finds in the file differs from what another found, and then only one would call collectives.
        """
        c, sizes = self.config.model, sorted({*(n for n in BUCKETS if n < tape.rows), tape.rows})
        if c.num_params < _SMALL or self.config.topology.tp > 1:
            return

        def measure() -> tuple[str, ...]:
            return tuple("tape" if self._gains(tape, kv_caches, n) else "operations" for n in sizes)

        ways = ", ".join(sorted(self.ops.counts))
        shape = f"decode steps of {c.architecture}, {c.num_params} parameters, {self.dtype}, {ways}, up to {sizes[-1]}"
        found = once(shape, self.ops.kernels.name,
                     lambda known: isinstance(known, list) and len(known) == len(sizes), measure)
        for n in range(1, tape.rows + 1):
            tape.taken[n] = found[next(i for i, most in enumerate(sizes) if n <= most)] == "tape"

    def _gains(self, tape: Tape, kv_caches: Sequence[torch.Tensor], num_seqs: int) -> bool:
        m, times = self.dummy_input(num_seqs, 1), ([math.inf], [math.inf])
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            tape.run(m.input_ids, m)
            between = time.perf_counter()
            super().forward(m, kv_caches, None)
            times[0].append(between - start)
            times[1].append(time.perf_counter() - between)
        return min(times[0]) < min(times[1])

    def forward(self, m: PagedModelInput, kv_caches: Sequence[torch.Tensor],
                intermediate: IntermediateTensors | None) -> Forwarded | IntermediateTensors:
        tape = self.tape
        if tape is None or kv_caches is not self.taped_caches or not tape.takes(m):
            return super().forward(m, kv_caches, intermediate)
        return Forwarded(tape.run(self.pending.input_ids(m), m))


class CpuEmbeddingRunner(EmbeddingRunner):
    ops: CpuOps

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        self.ops = CpuOps()

    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        logging.getLogger("hal").info(self.ops.described())
