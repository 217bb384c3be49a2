"""The argument of a case: the backend, the dtype, random numbers, and methods that run and compare."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.conformance import checkpoint, compilers
from hal.conformance.case import Mismatch, NotApplicable
from hal.conformance.reference import Reference, race
from hal.contracts.backend import Backend
from hal.contracts.block_moves import load_adapters
from hal.contracts.communicator import AxisName, LocalCommunicator
from hal.contracts.executor import Executor, make_executor
from hal.contracts.inputs import ModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest, SamplingRequest
from hal.contracts.runner import ModelRunnerBase
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence as EngineSequence
from hal.errors import BackendError
from hal.features.adapter import Adapter
from hal.guard import Phase, data_plane, phase
from hal.sampling.params import SamplingParams
from hal.testing.tolerance import Tolerances

Execute = Callable[[ExecuteModelRequest], SamplerOutput]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
BLOCK_SIZE = 16
_TIMES = 4.0  # the error of the reference in the device's dtype that a device may have
# The default options of a run: small, and the same for every device.
ENGINE = {"block_size": BLOCK_SIZE, "num_blocks": 65, "max_num_seqs": 8, "max_num_batched_tokens": checkpoint.LENGTH,
          "max_model_len": checkpoint.LENGTH, "prefix_caching": False, "async_scheduling": False}
# Options that only the scheduler gets, so that a device which compiles its shapes need not compile again.
_SCHEDULING = ("num_blocks", "max_num_batched_tokens", "max_num_seqs", "prefix_caching")


@dataclass
class Run:
    """The result of one prompt.

    Attributes:
        tokens: prompt and output. logprobs: those of the output tokens, if they were asked for. cached: prompt tokens
            that the prefix cache had. preemptions: how often the sequence was preempted. accepted: drafts that its
            output got.
    """

    tokens: list[int]
    prompt: int
    params: SamplingParams
    seed: int
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0
    preemptions: int = 0
    accepted: int = 0

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt:]


class GuardedCommunicator(LocalCommunicator):
    """The communicator of a single rank that is as strict as one of several: it refuses calls in phase prepare."""

    def all_reduce(self, x: torch.Tensor, axis: AxisName = "tp") -> torch.Tensor:
        with data_plane("all_reduce"):
            return x

    def all_gather(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        with data_plane("all_gather"):
            return x

    def reduce_scatter(self, x: torch.Tensor, axis: AxisName = "tp", dim: int = -1) -> torch.Tensor:
        with data_plane("reduce_scatter"):
            return x

    def all_to_all(self, x: torch.Tensor, axis: AxisName = "tp", send_sizes: Sequence[int] | None = None,
                   recv_sizes: Sequence[int] | None = None) -> torch.Tensor:
        with data_plane("all_to_all"):
            return x

    def broadcast(self, x: torch.Tensor, axis: AxisName = "tp", source: int = 0) -> torch.Tensor:
        with data_plane("broadcast"):
            return x


class Session:
    """One rank in this process, driven step by step. A case can reach every part of the backend.

    Attributes:
        late: what steps after the warm-up have compiled, a text for each.
        caches: of the runner. blocks: the numbers of all their blocks.
        inputs: the inputs of the steps so far. compiled: how much the runner had compiled after its warm-up.
    """

    def __init__(self, backend: Backend, config: WorkerConfig, late: list[str] | None = None) -> None:
        self.backend, self.config = backend, config
        self.late, self.warmed = [] if late is None else late, False
        self.device = backend.device(0)
        self.runner: ModelRunnerBase[Any] = backend.make_runner(config, self.device, GuardedCommunicator())
        self.runner.load_model()
        self.caches: Any = self.runner.make_kv_caches(config.engine.num_blocks or 65)
        self.blocks = torch.arange(config.engine.num_blocks or 65)
        self.inputs: list[ModelInput] = []
        compilers.watch()

    def warm(self) -> Session:
        self.runner.warmup(self.caches)
        self.backend.runtime.synchronize(self.device)
        self.warmed = True
        return self

    def programs(self) -> int:
        """Programs that the runner says it has made (not counting those that the user's time limit left for later), and
        those that the loaded compilers have made in this process."""
        return self.runner.compiled - self.runner.late + compilers.programs()

    @contextmanager
    def _part(self, which: Phase) -> Iterator[None]:
        """A part of a step. If it makes programs after the warm-up, `late` says so."""
        before = self.programs()
        with phase(which):
            yield
        if self.warmed and self.programs() > before:
            self.late.append(f"{self.programs() - before} in {which.value} of step {len(self.inputs)} of a session")

    def prepare(self, request: ExecuteModelRequest) -> Any:
        with self._part(Phase.PREPARE):
            model_input = self.runner.prepare_model_input(request)
        model_input.validate(self.device)
        model_input.check()
        return model_input

    def execute(self, model_input: Any) -> Any:
        """The output as the runner returned it."""
        with self._part(Phase.EXECUTE):
            return self.runner.execute_model(model_input, self.caches)

    def fetch(self, output: Any) -> SamplerOutput:
        """An output on the host, in memory of its own. A runner that does not sample has another type of output."""
        fetched, kind = self.runner.fetch(output)(), self.runner.output_type
        if not isinstance(fetched, kind):
            raise Mismatch(f"fetch gave {type(fetched).__name__}, not a {kind.__name__}")
        fetched.validate("cpu")
        return cast(SamplerOutput, kind.from_buffer(fetched.to_buffer()))

    def read_cache(self) -> list[torch.Tensor]:
        """All blocks of the caches, on the host."""
        return [values.cpu().clone() for values in self.runner.read_blocks(self.caches, self.blocks)]

    def fill_cache(self, value: float, first: int = 0) -> None:
        """Fill the blocks from `first` on; 1 in place of a fraction where a cache holds integers."""
        there = [x[:, first:] for x in self.read_cache()]
        self.runner.write_blocks(self.caches, self.blocks[first:], [
            torch.full_like(x, value if x.is_floating_point() or not value else 1) for x in there])

    def step_in_two_phases(self, request: ExecuteModelRequest, columns: dict[str, Any]) -> SamplerOutput:
        """On the host; `columns` arrive when the forward pass has begun. Raises NotApplicable: the runner computes a
        step in one part."""
        runner, model_input = self.runner, self.prepare(request)
        if not runner.two_phase:
            raise NotApplicable(f"{type(runner).__name__} computes a step in one part (two_phase)")
        with self._part(Phase.EXECUTE):
            forwarded = runner.execute_forward(model_input, self.caches)
        with phase(Phase.PREPARE):
            sampling = runner.prepare_sampling_input(SamplingRequest.of(request, columns, self.config.model.vocab_size))
        model_input.join(sampling)
        model_input.validate(self.device)
        model_input.check()
        with self._part(Phase.EXECUTE):
            output = runner.execute_sampling(forwarded, model_input)
        return self.fetch(output)

    def step(self, request: ExecuteModelRequest) -> SamplerOutput:
        """The output on the host, as `fetch` gives it."""
        load_adapters(request, self.runner)
        self.inputs.append(self.prepare(request))
        return self.fetch(self.execute(self.inputs[-1]))

    def scheduler(self, **options: Any) -> Scheduler:
        """A scheduler whose steps the runner was made for; options may only narrow its limits."""
        engine = replace(self.config.engine, **options)
        return Scheduler(engine, engine.num_blocks or 65, steps=engine.steps_per_message)


class Context:
    """Attributes:
        device: the name of the backend, which other ranks are told. dtype: the dtype of this run of the case.
        rng: seeded by the run's seed and the case's name. examples: the number of examples of a property.
        errors: (operation, dtype) -> every measured error, in units of `close`; the report draws them.
        late: what steps have compiled after a warm-up, over all cases of the run; each with the name of its case.
        shapes: the path of a recording whose shapes a case repeats, if one was given.
        own: names of parts of the library that stood in for a part of the backend.
        report: the run's folder, where a case may leave files; None if there is none.
    """

    def __init__(self, backend: Backend, device: str, dtype: str, seed: int, *, name: str = "", examples: int = 25,
                 tolerances: Tolerances | None = None, scratch: Path,
                 errors: dict[tuple[str, str], list[np.ndarray]] | None = None,
                 late: dict[str, list[str]] | None = None, shapes: str | None = None) -> None:
        self.shapes = shapes
        self.backend, self.device, self.dtype, self.seed = backend, device, dtype, seed
        self.name, self.examples, self.scratch = name, examples, scratch
        self.tolerances, self.errors = tolerances or Tolerances(), {} if errors is None else errors
        self.late, self.own = {} if late is None else late, list[str]()
        self.rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        self.torch_dtype: torch.dtype = getattr(torch, dtype)

    # Comparisons.

    def check(self, right: bool, text: str) -> None:
        """Raises Mismatch."""
        if not right:
            raise Mismatch(text)

    def equal(self, what: str, got: object, expected: object) -> None:
        """Raises Mismatch."""
        self.check(got == expected, f"{what}: got {_short(got)}, expected {_short(expected)}")

    def close(self, op: str, got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """`got`, in any dtype on any device, against an fp64 reference. Raises Mismatch."""
        got = got.detach().cpu().double()
        self.equal(f"{what}: shape", list(got.shape), list(expected.shape))
        error = ((got - expected).abs() / (1 + expected.abs())).nan_to_num(nan=torch.inf).flatten()
        if not len(error):
            return
        self.errors.setdefault((op, self.dtype), []).append(error.numpy())
        limit, worst = self.tolerances(op, self.dtype), int(error.argmax())
        if float(error[worst]) > limit:
            at = [int(i) for i in np.unravel_index(worst, tuple(expected.shape))]
            raise Mismatch(f"{what}: error {float(error[worst]):.3g} above {limit:g} ({op}, {self.dtype}) at {at}: got "
                           f"{float(got.flatten()[worst]):.6g}, expected {float(expected.flatten()[worst]):.6g}; "
                           f"{int((error > limit).sum())} of {len(error)} elements are off")

    def no_worse(self, got: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, what: str) -> None:
        """`got` against an fp64 reference, and against that reference computed in this dtype: what the dtype costs is
        not the device's fault, and what it does not cost is, however far below a tolerance. Root mean squares, since
        single errors scatter. Raises Mismatch."""
        mine, dtypes = (float((x.detach().cpu().double() - exact).square().mean().sqrt()) for x in (got, rounded))
        self.check(mine <= _TIMES * dtypes + 1e-9, f"{what}: the error is {mine:.3g}, {mine / max(dtypes, 1e-30):.1f} "
                   f"times that of the reference in {self.dtype} ({dtypes:.3g}); {_TIMES:g} times are allowed")

    # Runs.

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Random values in this dtype, on the host."""
        return torch.from_numpy(self.rng.normal(0.0, scale, shape)).to(self.torch_dtype)

    def prompts(self, *lengths: int) -> list[list[int]]:
        return [self.rng.integers(0, checkpoint.VOCAB, n).tolist() for n in lengths]

    def model(self, shape: str) -> Path:
        path = self.scratch / f"{shape}-{self.seed}"
        return path if path.exists() else checkpoint.save(shape, path, self.seed)

    def config(self, shape: str = "llama", **options: Any) -> WorkerConfig:
        path = self.model(shape)
        engine = EngineConfig(**{**ENGINE, "model": str(path), "device": self.device, "dtype": self.dtype, **options})
        return WorkerConfig(engine, read_config(path, pooling=engine.pooling), Topology())

    def session(self, shape: str = "llama", *, warm: bool = True, **options: Any) -> Session:
        session = Session(self.backend, self.config(shape, **options), self.late.setdefault(self.name, []))
        return session.warm() if warm else session

    def part(self, session: Session, name: str) -> Any:
        """A component of the runner. Raises NotApplicable: the runner has no component of this name."""
        part = getattr(session.runner, name, None)
        if part is None:
            raise NotApplicable(f"{type(session.runner).__name__} is not composed with a part {name!r}")
        kind = type(part)
        if kind.__module__.startswith("hal.") and session.device.type == "cpu":  # so the kernels are torch's
            self.own.append(f"{kind.__module__}.{kind.__qualname__}")
        return part

    def executor(self, config: WorkerConfig) -> Executor:
        """An engine's ranks. Raises NotApplicable: this machine has too few devices for them."""
        try:
            return make_executor(config.engine, config.model, self.backend)
        except BackendError as error:
            ranks = config.engine.tp * config.engine.pp
            if ranks == 1:
                raise
            reason = str(error).replace("\n  ", "; ")
            raise NotApplicable(f"needs {ranks} devices: {reason}. Where they are: hal conformance --backend "
                                f"{self.device} --level 5") from None

    def engine(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams] = GREEDY, *,
               shape: str = "llama", apart: int = 0, **options: Any) -> list[Run]:
        """Run prompts through the executor. Each enters `apart` steps after the one before it."""
        narrowed = {name: options.pop(name) for name in _SCHEDULING if name in options}
        config = self.config(shape, **options)
        executor = self.executor(config)
        try:
            engine, ahead = replace(config.engine, **narrowed), bool(config.engine.async_scheduling)
            scheduler = Scheduler(engine, engine.num_blocks or 65, executor.num_cpu_blocks, ahead=ahead)
            if ahead:
                return drive(lambda r: executor.execute_model(r), scheduler, prompts, params, apart, in_flight=2)
            return drive(lambda r: executor.execute_model(r).result(), scheduler, prompts, params, apart)
        finally:
            executor.shutdown()

    def alone(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams] = GREEDY, *,
              shape: str = "llama") -> list[Run]:
        """Run the same prompts one after another, each unchunked, with a cache that nothing else uses."""
        many = params if isinstance(params, list) else [params] * len(prompts)
        longest = max(len(prompt) + each.max_tokens for prompt, each in zip(prompts, many, strict=True))
        room = {"max_model_len": longest, "max_num_batched_tokens": longest, "num_blocks": 2 + longest // BLOCK_SIZE}
        session, runs = self.session(shape, **(room if longest > 1024 else {})), []
        for i, (prompt, each) in enumerate(zip(prompts, many, strict=True)):
            session.fill_cache(0)
            scheduler = session.scheduler()
            scheduler.epoch = i
            runs += drive(session.step, scheduler, [prompt], each, first_seed=i)
        return runs

    # Checks of runs.

    def verify(self, runs: list[Run], shape: str = "llama", what: str = "") -> None:
        """Check that each token is the right choice after the tokens before it, and that its logprob is right. The fp64
        reference decides; if the backend has arithmetic of its own, its result for each prompt alone decides. Raises
        Mismatch."""
        if not self.backend.capabilities.checkpoints:
            alone = self.alone([r.tokens[:r.prompt] for r in runs], [r.params for r in runs], shape=shape)
            for i, (run, own) in enumerate(zip(runs, alone, strict=True)):
                self.equal(f"{what} sequence {i}: tokens", run.output, own.output)
            return
        path = self.model(shape)
        reference = Reference(path, read_config(path), self.dtype)
        for i, run in enumerate(runs):
            logits = reference.logits(run.tokens, len(run.output) + 1)[:-1]
            self.verify_choices(logits, run, f"{what} sequence {i} of {len(runs)}")
            if run.logprobs:
                expected = logits.log_softmax(-1).gather(1, torch.tensor(run.output)[:, None])[:, 0]
                self.close("model", torch.tensor(run.logprobs), expected, f"{what} sequence {i}: logprobs")

    def verify_choices(self, logits: torch.Tensor, run: Run, what: str, op: str = "model") -> None:
        """Check chosen tokens against logits [output tokens, vocab] fp64. Raises Mismatch: another token should have
        been
    chosen."""
        for at, token in enumerate(run.output):
            slack = self.tolerances(op, self.dtype) * (1 + float(logits[at].abs().max()))
            history = run.tokens[:run.prompt + at]
            values, sure, possible = race(logits[at], run.params, run.seed, len(history), history, run.prompt, slack)
            best = int(values.masked_fill(~sure, -torch.inf).argmax())
            margin = 3 * slack / (run.params.temperature or 1.0) + 1e-5 * (run.params.temperature > 0)
            if not possible[token] or float(values[best] - values[token]) > margin:
                raise Mismatch(f"{what}: output token {at} is {token}, which {best} beats by "
                               f"{float(values[best] - values[token]):.3g} (tolerance {margin:.2g})"
                               + ("" if possible[token] else "; a filter should have dropped it"))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def drive(execute: Callable[[ExecuteModelRequest], Any], scheduler: Scheduler, prompts: list[list[int]],
          params: SamplingParams | list[SamplingParams], apart: int | list[int] = 0, *, first_seed: int = 0,
          in_flight: int = 1, propose: Callable[[int, list[int]], list[int]] | None = None,
          adapters: Sequence[Adapter | None] = ()) -> list[Run]:
    """Run a scheduler's steps until all sequences have ended. A sequence enters every `apart` steps, or each at a step.

    Args:
        execute: returns a SamplerOutput on the host or, with `in_flight` > 1, a StepHandle.
        propose: gives the drafts of a sequence, by its number and its output so far.
        adapters: of each prompt; empty for none.
    """
    many = params if isinstance(params, list) else [params] * len(prompts)
    runs = [Run(list(p), len(p), each, each.seed if each.seed is not None else first_seed + i)
            for i, (p, each) in enumerate(zip(prompts, many, strict=True))]
    seqs = [EngineSequence(request_id=i, prompt_ids=r.tokens, params=r.params, seed=r.seed,
                           limit=r.prompt + r.params.max_tokens, adapter=adapters[i] if adapters else None)
            for i, r in enumerate(runs)]
    entering, steps = deque(seqs), 0
    arrivals = apart if isinstance(apart, list) else [apart * i for i in range(len(seqs))]
    pending: deque[tuple[Any, Any]] = deque()
    while scheduler.unfinished or entering or pending:
        while entering and (steps >= arrivals[len(seqs) - len(entering)] or not scheduler.unfinished):
            scheduler.add(entering.popleft())
        step = scheduler.schedule()
        if step is not None:
            pending.append((step, execute(step.request)))
            steps += 1
        if pending and (step is None or len(pending) >= in_flight):
            step, result = pending.popleft()
            output = result if in_flight == 1 else result.result()
            if output.logprobs is not None:
                width, rows = len(output.token_ids) // max(len(step.sampled), 1), output.rows()
                for i, seq in enumerate(step.sampled):
                    if seq.finish_reason is None and seq.params.logprobs is not None:
                        at = i * width
                        runs[seq.request_id].logprobs += output.logprobs[at:at + len(rows[i])].tolist()
            counts, computed = (None if x is None else x.numpy() for x in (output.counts, output.num_computed))
            scheduler.update(step, output.token_ids.numpy(), counts, computed)
            for seq in step.sampled:
                if propose is not None and seq.finish_reason is None:
                    seq.drafts = propose(seq.request_id, seq.output_ids)
        if steps > 5000:
            raise Mismatch("the sequences do not end: 5,000 steps")
    for run, seq in zip(runs, seqs, strict=True):
        run.tokens, run.cached, run.preemptions = seq.token_ids, seq.num_cached, seq.preemptions
        run.accepted = seq.accepted
        del run.logprobs[len(run.output):]  # of tokens behind the end
    return runs


def these_schemes_alone(ops: Any) -> NotApplicable:
    """The outcome of a case whose weight schemes the device's operations do not take."""
    return NotApplicable(f"{type(ops).__name__} takes weights of these schemes alone: {', '.join(ops.schemes)}")
