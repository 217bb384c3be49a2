"""Run a recording again, on any device, and compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from hal.config import EngineConfig
from hal.contracts.backend import Backend
from hal.contracts.executor import make_executor
from hal.contracts.inputs import PagedModelInput
from hal.errors import WireError
from hal.recording.format import RecordedStep, Recording
from hal.schema import Declared

_LAYOUT = ("tp", "pp", "executor", "wire", "control_plane")


@dataclass(frozen=True, slots=True)
class Compared:
    """One step.

    Attributes:
        tokens: the number of sampled tokens; 0 if the output is not tokens.
        flips: (row, recorded token, token here, margin) of each token that differs. The margin is the recorded logprob
            of the recorded token minus that of the token here. It is infinity if the token here is not among the best
            recorded ones, or only one of the runs has a token, and None for drawn tokens.
        error: the largest |difference| / (1 + |recorded|) of the logprobs of equal tokens or, if the output is not
            tokens, of all its numbers. It is infinity if integers differ.
        exact: all values are equal to the last bit.
    """

    step: int
    tokens: int
    flips: list[tuple[int, int, int, float | None]]
    error: float
    exact: bool


@dataclass(slots=True)
class Comparison:
    """Attributes:
        recorded, here: the places of the two runs. dtype: the dtype of the run here.
        error: the recorded error of the last step, if it failed then. failure: its error here, or None if it ran.
        ignored: options of the recorded run that only a caller may choose, and that differ here.
    """

    recorded: str
    here: str
    dtype: str
    steps: list[Compared] = field(default_factory=list)
    error: str | None = None
    failure: str | None = None
    ignored: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return all(s.exact for s in self.steps) and (self.error is None) == (self.failure is None)

    def wrong(self, tolerance: float) -> list[Compared]:
        """The steps that differ by more than the tolerance. Each step gets the recorded tokens, so an earlier
        difference does not cause a later one. A drawn token may differ wherever the logprobs differ at all."""
        return [s for s in self.steps if s.error > tolerance
                or any(gap is not None and gap > 4 * tolerance for _, _, _, gap in s.flips)
                or (any(gap is None for _, _, _, gap in s.flips) and tolerance < 1e-3)]

    def table(self) -> str:
        lines = [f"recorded on {self.recorded}, run again on {self.here}",
                 *([f"not taken from the recording: {', '.join(f'{n}={v}'[:100] for n, v in self.ignored.items())} "
                    "(options choose them)"] if self.ignored else []), "",
                 "step | tokens | other | largest logprob error | first other token (row: recorded -> here, margin)",
                 "---- | ------ | ----- | --------------------- | -------------------------------------------------"]
        for s in self.steps:
            row, old, new, gap = s.flips[0] if s.flips else (0, 0, 0, 0.0)
            first = "" if not s.flips else f"{row}: {old} -> {new}, " + ("drawn" if gap is None else f"{gap:.3g}")
            lines.append(f"{s.step:4} | {s.tokens:6} | {len(s.flips):5} | {s.error:21.3g} | {first}".rstrip())
        tokens, flips = sum(s.tokens for s in self.steps), sum(len(s.flips) for s in self.steps)
        lines += ["", f"{tokens - flips} of {tokens} tokens equal; largest logprob error "
                  f"{max((s.error for s in self.steps), default=0.0):.3g}"
                  + ("; equal to the last bit" if self.steps and all(s.exact for s in self.steps) else "")]
        if self.error:
            lines.append(f"the last step failed when it was recorded ({self.error}); here: {self.failure or 'it ran'}")
        return "\n".join(lines)


def replay(path: Path, backend: Backend, device: str, *, model: str | None = None, **options: Any) -> Comparison:
    """Run all steps of a recording on `backend`. Each step gets the tokens of the recording.

    Args:
        device: the name of the backend. model: the checkpoint; without it, only the bundled model is read.
        options: engine options that replace recorded ones. The file does not choose tp, pp, executor, wire and
            control_plane: without options, one rank in this process runs the steps.

    Raises:
        ConfigError, WireError: see Recording.load and Recording.config. BackendError, ModelLoadError, CapacityError,
        WorkerError.
    """
    recording = Recording.load(path)
    config = recording.config(backend, device=device, model=model, **options)
    info = recording.info
    result = Comparison(_where(info["device"], recording.engine, info["versions"].get("torch")),
                        _where(backend.name, config.engine, torch.__version__), config.engine.dtype,
                        error=info.get("error"), ignored={n: recording.ignored[n] for n in _LAYOUT if n in
                                                          recording.ignored and recording.ignored[n] != getattr(
                                                              config.engine, n)})
    executor = make_executor(config.engine, config.model, backend)
    try:
        if issubclass(executor.input_type, PagedModelInput) != recording.paged:
            raise WireError("the recording is of another kind of runner", got=f"paged inputs: {recording.paged}",
                            expected=f"steps of {executor.input_type.__name__}")
        recording.restore_outputs(executor.output_type)
        for i, step in enumerate(recording.steps):
            try:
                output = executor.execute_model(step.request).result()
            except Exception as error:
                if not result.error or i + 1 < len(recording.steps):
                    raise
                result.failure = f"{type(error).__name__}: {error}".split("\n")[0]
                break
            if step.output is not None:
                result.steps.append(_compare(i, step, step.output, output))
    finally:
        executor.shutdown()
    return result


def _where(device: str, engine: EngineConfig, version: str | None) -> str:
    cache = "" if engine.kv_dtype == "auto" else f"{engine.kv_dtype} KV cache, "
    return f"{device} ({engine.dtype}, {cache}torch {version})"


def _compare(number: int, step: RecordedStep, old: Any, new: Any) -> Compared:
    """Two outputs of the class that the runner declares; those with token ids are compared as tokens."""
    fields = type(old).schema.fields
    exact = all(_equal(old[f.name], new[f.name]) if f.array else old[f.name] == new[f.name] for f in fields)
    if step.input is None or "token_ids" not in type(old).schema.by_name:
        error = max(_error(old, new, f.name) for f in fields if f.array)
        return Compared(number, 0, [], error, exact)
    flips: list[tuple[int, int, int, float | None]] = []
    counts = step.input.sample_counts
    # Of each row, its first place among the sampled ones.
    first = range(old.num_rows) if counts is None else (counts.cumsum(0) - counts).tolist()
    width, found = len(old.token_ids) // max(old.num_rows, 1), new.rows()
    for row, tokens in enumerate(old.rows()):
        for place, (a, b) in enumerate(zip_longest(tokens, found[row], fillvalue=-1)):
            if a != b:
                drawn = step.input.temperature is not None and float(step.input.temperature[first[row]]) > 0
                gap = torch.inf if min(a, b) < 0 else None if drawn else _margin(old, row * width + place, b)
                flips.append((row, a, b, gap))
    error = 0.0
    if old.logprobs is not None and new.logprobs is not None and len(old.logprobs) == len(new.logprobs):
        same = (old.token_ids == new.token_ids) & (old.token_ids >= 0)
        worst = ((old.logprobs - new.logprobs).abs() / (1 + old.logprobs.abs()))[same]
        error = float(worst.nan_to_num(nan=torch.inf).max()) if len(worst) else 0.0
    return Compared(number, sum(map(len, old.rows())), flips, error, exact)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two arrays are equal to the last bit; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _error(old: Declared, new: Declared, name: str) -> float:
    """Compared.error of one array."""
    a, b = old[name], new[name]
    if _equal(a, b) or a is None or b is None or a.shape != b.shape or not a.is_floating_point():
        return 0.0 if _equal(a, b) else torch.inf
    a, b = a.double(), b.double()
    return float(((a - b).abs() / (1 + a.abs())).nan_to_num(nan=torch.inf).max())


def _margin(old: Any, place: int, token: int) -> float:
    """The recorded logprob of a place's recorded token minus that of another token."""
    if old.top_ids is None or old.top_logprobs is None or old.logprobs is None:
        return torch.inf
    at = (old.top_ids[place] == token).nonzero()
    return float(old.logprobs[place] - old.top_logprobs[place, int(at[0])]) if len(at) else torch.inf
