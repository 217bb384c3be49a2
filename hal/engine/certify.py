"""Whether the Transformers backend runs an architecture right: the engine against transformers' own forward pass."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hal.engine.tiny import SHORT, VOCAB, save_tiny, tiny_config
from hal.errors import HalError
from hal.sampling.params import SamplingParams

TOLERANCE = 1e-4  # of logprobs in fp32
_LENGTHS, _DECODED = (53, 23, 2 * SHORT + 1), 16  # every prompt is longer than twice a window
_SENSITIVE = 100  # times the tolerance: a run that ignores its cache must be further off
certifying: ContextVar[bool] = ContextVar("certifying", default=False)


@dataclass(slots=True)
class Certificate:
    """What held for an architecture in small.

    Attributes:
        type: model_type. architecture: the class of transformers.
        admitted: the engine's logprobs and tokens are right, and the negative control is not.
        reason: why it is not admitted; empty where it is.
        error: the largest difference of a logprob from transformers in fp64. control: the same of a run that ignores
            its cache.
        tp2, pp2: "held", "not tried", or why not.
        options: the settings of the configuration beside its sizes (see `hal.engine.certificates`).
        seconds: that it took.
    """

    type: str
    architecture: str = ""
    admitted: bool = False
    reason: str = ""
    error: float | None = None
    control: float | None = None
    tp2: str = "not tried"
    pp2: str = "not tried"
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        return asdict(self)


def certify(kind: str, source: dict[str, Any] | None = None, *, device: str = "cpu",
            topologies: Sequence[str] = ()) -> Certificate:
    """Build an architecture in small, and compare the engine with transformers over chunked prefill, mixed steps,
    decoding and cached prefixes.

    Args:
        kind: model_type of transformers. source: a config.json whose options the small model has; None: the defaults.
        topologies: of "tp2" and "pp2", which are compared too.
    """
    from hal.engine.certificates import options_of

    found, began = Certificate(kind), time.monotonic()
    with _certifying(), tempfile.TemporaryDirectory(prefix="hal-certify-") as scratch:
        try:
            config = tiny_config(kind, source)
            found.options = options_of(config)
            oracle = save_tiny(config, Path(scratch))
            found.architecture = type(oracle).__name__
            found.error, found.control = _compare(scratch, oracle, device)
        except HalError as error:
            found.reason = _reason(error)
        except Exception as error:  # transformers' code of any architecture
            found.reason = f"{type(error).__name__}: {error!s:.160}".split("\n")[0]
        else:
            found.reason = judge(found.error, found.control)
            if found.reason and not _begins_at_zero(oracle):
                found.reason = "transformers counts its positions from another number than 0"
            found.admitted = not found.reason
        for name in topologies if found.admitted else ():
            try:
                off, _ = _compare(scratch, oracle, device, **{name[:-1]: int(name[-1])})
                held = "held" if off <= TOLERANCE else f"logprobs differ from transformers by {off:.1e}"
            except HalError as problem:
                held = _reason(problem)
            setattr(found, name, held.replace(scratch, "the checkpoint"))
        found.reason = found.reason.replace(scratch, "the checkpoint")
    found.seconds = round(time.monotonic() - began, 1)
    return found


@contextlib.contextmanager
def _certifying() -> Iterator[None]:
    token = certifying.set(True)
    try:
        yield
    finally:
        certifying.reset(token)


def _reason(error: HalError) -> str:
    text = str(error).split("\n")
    return "; ".join(line.strip() for line in text if not line.strip().startswith("to do:"))[:300]


def judge(error: float, control: float) -> str:
    """Why an architecture is refused; empty where it is admitted."""
    if not error <= TOLERANCE:
        return f"logprobs differ from transformers by {error:.1e}"
    if not control > _SENSITIVE * TOLERANCE:
        return f"a run that ignores its cache differs by only {control:.1e}"
    return ""


@torch.no_grad()
def _begins_at_zero(oracle: Any) -> bool:
    tokens = list(range(3, 3 + SHORT))
    given = oracle(input_ids=torch.tensor([tokens]), position_ids=torch.arange(SHORT)[None], use_cache=False)
    return torch.allclose(given.logits[0].double().log_softmax(-1), _logprobs(oracle, tokens))


def _compare(directory: str, oracle: Any, device: str, **topology: Any) -> tuple[float, float]:
    """The largest difference of a logprob, and that of the negative control, which is made without a topology. A greedy
    token counts as right where transformers' own best in fp64 is no better than it by twice the tolerance; else the
    difference is that lead."""
    from hal.engine.llm import LLM

    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in _LENGTHS]
    params = SamplingParams(max_tokens=_DECODED, logprobs=1, ignore_eos=True)
    first = SamplingParams(max_tokens=_DECODED, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    worst = control = 0.0
    with LLM(directory, device=device, dtype="float32", block_size=4, max_num_batched_tokens=13, max_num_seqs=4,
             num_blocks=160, model_impl="transformers", **topology) as llm:
        for attempt in (first, params):
            before = llm.stats().cached_tokens
            for prompt, output in zip(prompts, llm.generate(prompts, attempt), strict=True):
                tokens = list(output.token_ids)
                ours = [entry.logprob for entry in output.logprobs or ()]
                right = _logprobs(oracle, prompt + tokens)
                decoded = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
                worst = max(worst, _difference(tokens, ours, right[decoded.start:decoded.stop]))
                if attempt is first:
                    listed = [entry.logprob for entry in (output.prompt_logprobs or ()) if entry is not None]
                    at = right[:len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
                    worst = max(worst, float((at - torch.tensor(listed, dtype=torch.float64)).abs().max()))
                if attempt is first and not topology:
                    blind = torch.cat([_logprobs(oracle, [(prompt + tokens)[i]], i) for i in decoded])
                    blindly = blind.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
                    control = max(control, _difference(tokens, blindly, right[decoded.start:decoded.stop]))
        if llm.stats().cached_tokens <= before:
            raise HalError("the second pass found no cached prefix", got=llm.stats().cached_tokens)
    return worst, control


def _difference(tokens: list[int], logprobs: list[float], right: torch.Tensor) -> float:
    chosen = right.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    lead = float((right.max(-1).values - chosen).max())
    off = float((chosen - torch.tensor(logprobs, dtype=torch.float64)).abs().nan_to_num(torch.inf).max())
    return max(off, lead if lead > 2 * TOLERANCE else 0.0)


@torch.no_grad()
def _logprobs(oracle: Any, token_ids: list[int], first: int = 0) -> torch.Tensor:
    """[len(token_ids), VOCAB] fp64 of transformers, for tokens from position `first` on. From the first position on,
    transformers counts them itself, since some architectures begin at another number than 0."""
    positions = {"position_ids": torch.arange(first, first + len(token_ids))[None]} if first else {}
    found = oracle(input_ids=torch.tensor([token_ids]), use_cache=False, **positions)
    logits: torch.Tensor = found.logits[0]
    return logits.double().log_softmax(-1)
