"""Recording of a run, step by step; and recording of a step that fails, with the steps that rebuild its KV cache."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from hal.config import BUNDLED_MODEL, DType, Topology, WorkerConfig
from hal.contracts.backend import Backend, resolve_dtype
from hal.contracts.block_moves import move_blocks
from hal.contracts.executor import Executor, StepHandle
from hal.contracts.inputs import ModelInput, PagedModelInput, WorkerInput
from hal.contracts.request import ExecuteModelRequest
from hal.engine.scheduled_step import Changes
from hal.engine.sequence import Sequence
from hal.errors import HalError, WireError, WorkerError
from hal.features import FEATURES
from hal.features.adapter import Adapter
from hal.paged.batch import BatchState
from hal.recording.format import RecordedStep, Recording
from hal.sampling.params import SamplingParams

if TYPE_CHECKING:
    from hal.engine.llm import LLM
    from hal.engine.request_output import RequestOutput


def batch_state(config: WorkerConfig) -> BatchState:
    """A batch state that makes the input which a request means, without a device."""
    engine = config.engine
    return BatchState(engine.max_num_seqs, config.max_model_len, engine.block_size, config.model.vocab_size)


def describe(config: WorkerConfig, backend: Backend) -> dict[str, Any]:
    """Recording.info of a run in this process."""
    return {"device": backend.name, "versions": {"torch": torch.__version__, **backend.versions()},
            "seed": config.engine.seed}


class RecordingExecutor:
    """An executor that keeps every step which passes through it (see hal.contracts.executor.Executor)."""

    def __init__(self, executor: Executor, config: WorkerConfig, backend: Backend) -> None:
        self.executor, self.num_blocks, self.num_cpu_blocks = executor, executor.num_blocks, executor.num_cpu_blocks
        self.input_type, self.output_type = executor.input_type, executor.output_type
        self.has_row_states = executor.has_row_states
        self.tokens_per_row, self.multi_step = executor.tokens_per_row, executor.multi_step
        self.kv_bytes_per_block, self.round_times = executor.kv_bytes_per_block, executor.round_times
        dtype = cast(DType, resolve_dtype(backend, config.engine.dtype, config.model.dtype))
        # A recorded request has its drafts, so no run of the recording needs the proposer.
        speculate = None if config.engine.speculate is None else "ngram"
        engine = replace(config.engine, num_blocks=executor.num_blocks or None, async_scheduling=False, dtype=dtype,
                         speculate=speculate, draft_model=None)
        self.recording = Recording(engine, config.model, describe(config, backend),
                                   output_name=self.output_type.__name__)
        self._state = batch_state(config) if issubclass(self.input_type, PagedModelInput) else None

    def check(self) -> None:
        self.executor.check()

    def health(self) -> HalError | None:
        return self.executor.health()

    def expert_loads(self) -> np.ndarray[Any, Any] | None:
        return self.executor.expert_loads()

    def on_failure(self, listener: Callable[[WorkerError], None]) -> None:
        self.executor.on_failure(listener)

    def execute_model(self, request: ExecuteModelRequest, *, sampling_follows: bool = False) -> StepHandle:
        step = None if sampling_follows else self.keep(request)
        return _Handle(self, request, self.executor.execute_model(request, sampling_follows=sampling_follows), step)

    def keep(self, request: ExecuteModelRequest) -> RecordedStep:
        """A step whose request is whole."""
        step = RecordedStep(without_paths(request))
        if self._state is not None:
            self._state.apply(request)
            step.input = self._state.prepare(request).to()
        self.recording.steps.append(step)
        return step

    def shutdown(self) -> None:
        self.executor.shutdown()

    def save(self, path: Path) -> None:
        self.recording.save(path)


def record_run(llm: LLM, prompts: list[str], params: SamplingParams, path: Path) -> list[RequestOutput]:
    """Generate, and write every step to a file. The engine must not schedule ahead (async_scheduling=False)."""
    recorder = RecordingExecutor(llm.executor, WorkerConfig(llm.config, llm.model_config, Topology()), llm.backend)
    llm.executor = recorder
    outputs = llm.generate(prompts, params)
    recorder.save(path)
    return outputs


class _Handle:
    def __init__(self, recorder: RecordingExecutor, request: ExecuteModelRequest, handle: StepHandle,
                 step: RecordedStep | None) -> None:
        self._recorder, self._request, self._handle, self._step = recorder, request, handle, step

    def sample(self, columns: Mapping[str, Any] | None = None) -> None:
        self._handle.sample(columns)
        self._step = self._recorder.keep(self._request)  # which has the columns now

    def result(self) -> Any:
        output = self._handle.result()
        if self._step is not None:
            kept = output
            if getattr(output, "draft_tokens", None) is not None:
                kept = copy.copy(output)
                kept.draft_tokens = None
            self._step.output = kept
        return output


class FlightRecorder:
    """Knows the token of every slot of the KV cache. When a step fails, the recorder writes it, after requests that
    rebuild the cache, in the layout of any device. It reads each step's tokens back from the device.

    Attributes: note: the words about the recording for the error message; "" before there is one.
    """

    note = ""

    def __init__(self, directory: str, config: WorkerConfig, backend: Backend) -> None:
        self.directory, self.config, self.backend = Path(directory), config, backend
        self.slots, self.host = np.zeros((2, 0, config.engine.block_size), np.int64)
        self.last: PagedModelInput | None = None
        self.adapters: dict[int, Adapter] = {}  # by slot

    def moved(self, step: WorkerInput, num_blocks: int) -> None:
        """The cache moves blocks, so the tokens of these blocks move too. Slots get adapters."""
        if step["adapters_to_load"] is not None:
            slots = step["adapters_to_load"].tolist()
            self.adapters |= {slot: Adapter(name, path, slot, b"") for slot, name, path in
                              zip(slots, step["adapter_names"], step["adapter_paths"], strict=True)}
        if len(self.slots) != num_blocks:
            size = self.config.engine.block_size
            self.slots = np.full((num_blocks, size), -1)
            self.host = np.full((self.config.engine.num_cpu_blocks, size), -1)
        move_blocks(step, [torch.from_numpy(self.slots[None])], len(self.slots), [torch.from_numpy(self.host[None])])

    def began(self, m: ModelInput, runner: Any) -> None:
        """Note the tokens of a step that is about to run. When it has failed, nothing can be read from the device."""
        self.last = None
        if isinstance(m, PagedModelInput):
            ids = m.input_ids if m.pending_rows is None else runner.pending.input_ids(m)
            self.last = type(m).from_buffer(m.to_buffer())
            real = int(self.last.query_start_loc[-1])
            self.slots.reshape(-1)[self.last.slot_mapping[:real].numpy()] = ids[:real].cpu().numpy()

    def took(self, output: Any) -> None:
        """Note the tokens with which the later decode steps of a message began. Only the rank that samples has them:
        on the others these slots hold -1, and a step that reads them cannot be recorded there."""
        m = self.last
        if m is None or m.num_steps == 1:
            return
        n, size = m.num_samples, m.block_size
        counts = m.max_new[:n] if output is None else output.counts.cpu()
        tokens = torch.full((n, m.num_steps), -1) if output is None else output.token_ids.cpu().view(n, -1)
        for row in range(n):
            at = int(m.seq_lens[row]) + np.arange(int(counts[row]) - 1)
            blocks = m.block_tables[row].numpy()[at // size]
            self.slots[blocks, at % size] = tokens[row, :len(at)].numpy()

    def joined(self, m: ModelInput) -> None:
        """The second part of a step in two phases has come."""
        if self.last is not None and isinstance(m, PagedModelInput):
            self.last = type(m).from_buffer(m.to_buffer())

    def save(self, step: int, error: Exception) -> None:
        """Write the step that failed to a file, and set `note`."""
        try:
            path = self._save(step, error)
            self.note = f"; to run it again: hal replay {path} {' '.join(self._options())}"
        except Exception as other:  # an error here must not hide the error of the step
            self.note = f"; it could not be recorded: {type(other).__name__}: {other}"

    def _options(self) -> list[str]:
        """Options of `hal replay`, which takes neither the checkpoint nor the number of processes from a file."""
        engine = self.config.engine
        given = [f"--device {engine.device}", *(f"--{n} {getattr(engine, n)}" for n in ("tp", "pp")
                                                if getattr(engine, n) > 1)]
        if engine.random_weights:
            given.append("--random-weights")
        elif Path(engine.model) != BUNDLED_MODEL:
            given.append(f"--model {shlex.quote(engine.model)}")
        return given + [f"--adapter {shlex.quote(f'{a.name}={a.path}')}" for a in self.adapters.values()]

    def _save(self, step: int, error: Exception) -> Path:
        config, m = self.config, self.last
        if m is None:
            raise WireError("only paged inputs can be recorded")
        engine = replace(config.engine, num_blocks=len(self.slots), async_scheduling=False, num_cpu_blocks=0,
                         speculate=None if config.engine.speculate is None else "ngram", draft_model=None)
        recording = Recording(engine, config.model, {**describe(config, self.backend), "rank": config.topology.rank,
                                                     "step": step, "error": f"{type(error).__name__}: {error}"})
        state = batch_state(config)
        for request in map(without_paths, rebuild(m, self.slots, engine.max_num_batched_tokens, self.adapters)):
            state.apply(request)
            recording.steps.append(RecordedStep(request, state.prepare(request).to()))
        path = self.directory / f"step-{step}-rank-{config.topology.rank}-{os.getpid()}.safetensors"
        recording.save(path)
        return path


def without_paths(request: ExecuteModelRequest) -> ExecuteModelRequest:
    """The request without the directories of adapters. A file names adapters, and whoever replays it says where they
    lie."""
    if request["adapters_to_load"] is None:
        return request
    named = copy.copy(request)
    setattr(named, "adapter_paths", ("",) * len(request["adapter_names"]))
    return named


def rebuild(m: PagedModelInput, slots: np.ndarray, most: int, adapters: Mapping[int, Adapter],
            ) -> list[ExecuteModelRequest]:
    """Requests that prefill the tokens which a step's sequences had in the cache, at most `most` tokens in each, and
    then the step itself.

    Args:
        slots: [num_blocks, block_size], the token of each slot. adapters: by their slots.
    """
    starts, lens, tables = (x.cpu().numpy() for x in (m.query_start_loc, m.seq_lens, m.block_tables))
    queries, size = np.diff(starts), m.block_size
    ends = m.logits_indices[:m.num_samples].tolist()
    # Of each sequence with drafts, by its last token: their number. Its parameters are those of its first place.
    drafts: dict[int, int] = {}
    if m.sample_counts is not None:
        counts = m.sample_counts.tolist()
        drafts = {ends[last]: count - 1 for last, count in zip(np.cumsum(counts) - 1, counts, strict=True) if count > 1}
    last: list[tuple[Sequence, int, int]] = []
    drafted: list[list[int]] = []
    requests: list[ExecuteModelRequest] = []
    digest, entered = 0, set[int]()

    def issue(run: list[tuple[Sequence, int, int]], arrays: dict[str, Any] | None = None) -> None:
        nonlocal digest
        loads = [] if requests or m.adapter_slots is None else list(adapters.values())
        changes = Changes(entered=[s for s, _, _ in run if s.row not in entered], loads=loads)
        entered.update(s.row for s, _, _ in run)
        none = np.zeros(0, np.int32)
        rows, counts, computed = (np.array(column) for column in zip(*((s.row, n, c) for s, n, c in run), strict=True))
        request = changes.request(rows, counts, computed, none, none, step=len(requests), digest=digest)
        for name, array in (arrays or {}).items():
            setattr(request, name, array)
        digest = request.chain()
        requests.append(request)

    for row in np.flatnonzero(queries).tolist():
        length, count = int(lens[row]), int(queries[row])
        reached = length if m.max_new is None else length + int(m.max_new[row]) - 1
        blocks = tables[row, :-(-reached // size)].tolist()
        tokens = slots[blocks].reshape(-1)[:length].tolist()
        if min(tokens) < 0:
            raise WireError("this rank does not know the tokens that a message of several steps gave",
                            got=f"a sequence of {length} tokens, {tokens.count(-1)} of them unknown",
                            expected="the rank that samples", hint="the recording of rank 0 has them")
        end, prompt, params, seed = int(starts[row + 1]) - 1, length, SamplingParams(), 0
        proposed, tokens = tokens[length - drafts.get(end, 0):], tokens[:length - drafts.get(end, 0)]
        if end in ends:
            params, seed = _params(m, ends.index(end))
            prompt = length if m.prompt_lens is None else int(m.prompt_lens[ends.index(end)])
        else:
            tokens.append(0)  # the sequence goes on, so it is not sampled in this request
        seq = Sequence(request_id=row, prompt_ids=tokens[:prompt], output_ids=tokens[prompt:], params=params, seed=seed,
                       limit=length + 1, row=row, blocks=blocks, adapter=(
                           None if m.adapter_slots is None else adapters.get(int(m.adapter_slots[int(starts[row])]))))
        last.append((seq, count, length - count))
        drafted.append(proposed)
        for at in range(0, length - count, most):
            issue([(seq, min(most, length - count - at), at)])
    sampled = np.array([s.row for s, count, _ in last if int(starts[s.row + 1]) - 1 in ends], np.int32)
    arrays: dict[str, Any] = {} if not drafts else {"draft_counts": np.array([len(some) for some in drafted], np.int32),
                                    "draft_tokens": np.array([t for some in drafted for t in some], np.int32)}
    sampled = np.repeat(sampled, [1 + drafts.get(int(starts[row + 1]) - 1, 0) for row in sampled])
    if m.num_steps > 1:
        arrays["num_steps"] = m.num_steps
    issue(last, arrays | {name: array for f in FEATURES for name, array in f.restore_request(m, sampled).items()})
    return requests


def _params(m: PagedModelInput, i: int) -> tuple[SamplingParams, int]:
    """The parameters of a sampled row, from the sampling fields of a step's input, and its seed."""
    values = {name: value for feature in FEATURES for name, value in feature.restore(m, i).items()}
    return SamplingParams(**values), values.get("seed") or 0
