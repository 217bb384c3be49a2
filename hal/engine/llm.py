"""LLM: a model, its workers and a scheduler behind one object."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from hal import backend as backends
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.engine.outputs import RequestOutput
from hal.engine.progress import LoadProgress, RequestProgress
from hal.engine.requests import Logprobs, Request
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence, derive_seed
from hal.engine.step import Step
from hal.engine.text import TextStream, encode, hidden_stops, load_tokenizer
from hal.errors import CapacityError, ConfigError, HalError, RequestError, StateError
from hal.executor import StepHandle, make_executor
from hal.models.hf_config import read_config
from hal.runner import no_progress
from hal.sampling.params import SamplingParams

Prompt = str | list[int]
Prompts = Prompt | list[str] | list[list[int]] | list[Prompt]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the engine started.

    Attributes:
        steps: submitted. prefill_tokens: computed in chunks of prompts, also anew after a preemption. decode_tokens:
            sampled. cached_tokens: of prompts, found in the prefix cache.
        running, waiting: requests now.
    """

    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    running: int
    waiting: int


class LLM:
    """An engine for one model.

        with LLM("path/to/checkpoint", tp=2) as llm:
            outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))

    Not thread-safe, and of the process that made it: in a forked child `step` and what uses it raise a StateError, and
    leaving the `with` block does nothing. For an engine of one's own: `add_request`, and `step` while `unfinished`.

    Args:
        model: checkpoint directory in Hugging Face format; by default the bundled one, which adds numbers. Without
            tokenizer files prompts are token ids, and outputs have no text.
        progress: show bars while loading and warming up.
        options: the fields of EngineConfig.

    Raises:
        ConfigError, ModelLoadError, BackendError, CapacityError, WorkerError.
    """

    def __init__(self, model: str = str(BUNDLED_MODEL), *, progress: bool = False, **options: Any) -> None:
        self.config = config = EngineConfig(model=str(model), **options)
        self.model_config = read_config(config.model, weights=not config.random_weights)
        self.max_model_len = config.max_model_len or self.model_config.max_position
        if self.max_model_len > self.model_config.max_position:
            raise ConfigError("max_model_len is longer than the model's context", got=self.max_model_len,
                              expected=f"at most {self.model_config.max_position}")
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        self.backend = backends.select(config.device)
        bars = LoadProgress() if progress else None
        try:
            self.executor = make_executor(config, self.model_config, self.backend, bars or no_progress)
        finally:
            if bars is not None:
                bars.close()
        ahead = backends.resolve_async(self.backend, config.async_scheduling, config.pp)
        self.scheduler = Scheduler(config, self.executor.num_blocks, self.executor.num_cpu_blocks, depth=config.pp,
                                   eos_token_ids=self.model_config.eos_token_ids, ahead=ahead)
        self._steps_in_flight = 2 if ahead else config.pp
        self._pending: deque[tuple[Step, StepHandle]] = deque()
        self._requests: dict[int, Request] = {}
        self._next_id = 0
        self._stop_texts = 0  # unfinished requests that have such
        self._counts = dict.fromkeys(("steps", "prefill_tokens", "decode_tokens", "cached_tokens", "preemptions"), 0)

    def generate(self, prompts: Prompts, params: SamplingParams | list[SamplingParams] | None = None, *,
                 progress: bool = False) -> list[RequestOutput]:
        """Complete all prompts.

        Args:
            prompts: a text, a list of token ids, or a list of these. params: of all, or one for each; None is greedy.
            progress: show a bar with prefill and decode tokens/s.

        Returns:
            In the order of the prompts. One whose logits were NaN or infinite ended with finish_reason "error", and its
            `error` is a NumericsError; the others are as without it.

        Raises:
            RequestError, CapacityError: a prompt is refused (named by its index); then none is run.
            WorkerError: a rank failed; the engine is shut down.
        """
        several = _as_list(prompts)
        requests = self._add_all(several, _as_many(params, len(several)))
        bar = RequestProgress(len(requests), progress)
        try:
            waiting = {r.output.request_id for r in requests}
            while waiting:
                before = self._counts.copy()
                done = waiting & {r.seq.request_id for r in self._advance(text=False)[1]}
                waiting -= done
                prefill, decode = (self._counts[n] - before[n] for n in ("prefill_tokens", "decode_tokens"))
                bar.step(prefill, decode, len(done))
        finally:
            bar.close()
            self._abandon(requests)
        return [r.output for r in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The output each time it has grown, and where it ends with an error once more: the same object, whose text
        never shows part of a stop text. Closing the iterator aborts the request. Several streams may take turns. Raises
        as `generate`, at once."""
        params = params or SamplingParams()
        return self._stream(prompt, self.check(prompt, params), params)

    def _stream(self, prompt: Prompt, ids: list[int], params: SamplingParams) -> Iterator[RequestOutput]:
        request, seen = self._add(0, prompt, ids, params), 0  # here: an iterator that nobody starts enqueues nothing
        output = request.output
        try:
            while True:
                while len(output.token_ids) == seen and output.finish_reason is None:
                    self.step()
                if len(output.token_ids) == seen:
                    if output.error is not None:
                        yield output
                    return
                seen = len(output.token_ids)
                request.write_text()  # it may have grown in the steps of another call
                yield output
        finally:
            self._abandon([request])

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> list[int]:
        """The prompt's token ids.

        Raises:
            RequestError: this model cannot do it. CapacityError: the KV cache cannot hold it.
        """
        params, vocab = params or SamplingParams(), self.model_config.vocab_size
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the model has no tokenizer", got="a text prompt", expected="token ids",
                                   hint=f"add tokenizer files to {self.config.model}, or give prompt_token_ids")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:  # half a surrogate pair: how Python shows bytes that are not UTF-8
                raise RequestError("the prompt is not a text", got=str(error), expected="text in UTF-8") from None
            ids = encode(self.tokenizer, prompt)
        elif isinstance(prompt, Iterable):
            ids = list(prompt)
        else:
            raise RequestError("a prompt is neither a text nor token ids", got=repr(prompt))
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
                raise RequestError("a token id is out of the vocabulary", got=repr(token),
                                   expected=f"an integer from 0 to {vocab - 1}")
        if not ids:
            raise RequestError("the prompt is empty", expected="at least one token")
        if len(ids) >= self.max_model_len:
            raise RequestError("the prompt is longer than the context", got=f"{len(ids)} tokens",
                               expected=f"at most {self.max_model_len - 1}, so that one more fits",
                               hint=None if self.max_model_len == self.model_config.max_position else
                               f"max_model_len may be up to {self.model_config.max_position}")
        if params.stop and self.tokenizer is None:
            raise RequestError("the model has no tokenizer", got="stop texts", expected="stop_token_ids")
        if params.stop:
            hidden_stops(self.tokenizer, params.stop)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab:
                raise RequestError(f"{name} is larger than the vocabulary", got=getattr(params, name), expected=vocab)
        self.scheduler.check(len(ids), self._limit(ids, params))
        return ids

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Enqueue a request; its number. Raises as `check`."""
        return self._add_all([prompt], [params or SamplingParams()])[0].output.request_id

    def abort(self, request_id: int) -> None:
        """End a request now; one that is finished or unknown stays as it is. Its output appears in no further step."""
        request = self._requests.get(request_id)
        if request is not None:
            self.scheduler.finish(request.seq, "abort")
            self._complete(request)

    @property
    def unfinished(self) -> bool:
        return bool(self._requests)

    def step(self, *, text: bool = True) -> list[RequestOutput]:
        """Submit a step where one can be, and take over the oldest one's output once enough are in flight.

        Args:
            text: bring the texts of running requests up to date. Complete ones have theirs in any case.

        Returns:
            The outputs that grew; those with a finish_reason are complete.

        Raises:
            WorkerError: a rank failed; the engine is shut down.
        """
        return [request.output for request in self._advance(text)[0]]

    def _advance(self, text: bool) -> tuple[list[Request], list[Request]]:
        self.executor.check()
        step = self.scheduler.schedule()
        if step is not None:
            self._pending.append((step, self.executor.execute_model(step.request)))
            self._counts["steps"] += 1
        if not self._pending:
            if self.scheduler.unfinished:
                raise StateError("requests wait, and none can run", hint="this is a defect of the scheduler: report it")
            return [], []
        if step is None or len(self._pending) >= self._steps_in_flight:
            return self._take_over(*self._pending.popleft(), text)
        return [], []

    def stats(self) -> Stats:
        live = [r.seq for r in self._requests.values()]
        counts = self._counts.copy()
        counts["cached_tokens"] += sum(s.num_cached for s in live)
        counts["preemptions"] += sum(s.preemptions for s in live)
        return Stats(**counts, running=len(self.scheduler.running), waiting=len(self.scheduler.waiting))

    def restart(self) -> None:
        """New workers after a WorkerError, or at any time. Unfinished requests keep the tokens that they have and go on
        from them; steps in flight are void, and give the same tokens again.

        Raises:
            As making an LLM; CapacityError also where a request no longer fits. The engine is then shut down.
        """
        self.executor.shutdown()
        self._pending.clear()
        self.executor = make_executor(self.config, self.model_config, self.backend)
        scheduler = self.scheduler
        scheduler.num_blocks, scheduler.num_cpu_blocks = self.executor.num_blocks, self.executor.num_cpu_blocks
        try:
            for seq in scheduler.restart():
                seq.finish_reason, seq.num_computed, seq.blocks, seq.host_blocks = None, 0, [], []
                scheduler.add(seq)
        except CapacityError:
            self.executor.shutdown()
            raise

    def shutdown(self) -> None:
        """End the workers. Idempotent."""
        self.executor.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()

    def _limit(self, ids: list[int], params: SamplingParams) -> int:
        return min(len(ids) + params.max_tokens, self.max_model_len)

    def _add_all(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[Request]:
        """All or none."""
        token_ids = []
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            try:
                token_ids.append(self.check(prompt, each))
            except HalError as error:
                error.what = f"prompt {i}: {error.what}" if len(prompts) > 1 else error.what
                raise
        return [self._add(*args) for args in zip(range(len(prompts)), prompts, token_ids, params, strict=True)]

    def _add(self, index: int, prompt: Prompt, ids: list[int], params: SamplingParams) -> Request:
        if params.stop and (hidden := hidden_stops(self.tokenizer, params.stop)):
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *hidden))
        number, self._next_id = self._next_id, self._next_id + 1
        seed = derive_seed(self.config.seed, number) if params.seed is None else params.seed
        seq = Sequence(request_id=number, prompt_ids=ids, params=params, seed=seed, limit=self._limit(ids, params))
        output = RequestOutput(index, number, prompt if isinstance(prompt, str) else None, ids.copy(), seq.output_ids,
                               logprobs=None if params.logprobs is None else [],
                               prompt_logprobs=None if params.prompt_logprobs is None else [None])
        text = None if self.tokenizer is None else TextStream(self.tokenizer, ids, params.stop)
        request = self._requests[number] = seq.owner = Request(seq, output, text)
        self._stop_texts += bool(params.stop)
        self.scheduler.add(seq)
        return request

    def _take_over(self, step: Step, handle: StepHandle, text: bool) -> tuple[list[Request], list[Request]]:
        """The requests that grew, and those of them that are complete."""
        result = handle.result()
        tokens = result.token_ids.numpy()
        self._counts["prefill_tokens"] += step.num_prefill
        self._counts["decode_tokens"] += len(tokens)
        if step.prompt_targets:
            self._take_prompt_logprobs(step, Logprobs.prompt(result))
        grown: list[Request] = [seq.owner for seq in step.sampled if seq.finish_reason is None]
        logprobs = Logprobs.sampled(result)
        asked = [] if logprobs is None else [row for row, seq in enumerate(step.sampled) if seq.finish_reason is None
                                             and seq.params.logprobs is not None]
        complete: list[Request] = [seq.owner for seq in self.scheduler.update(step, tokens)]
        for row in asked:
            seq = step.sampled[row]
            assert logprobs is not None
            if seq.finish_reason == "error":
                continue  # there is no token
            seq.owner.output.logprobs.append(logprobs.of(row, int(tokens[row]), seq.params.logprobs or 0))
        if text or self._stop_texts:
            for request in grown:
                if request.text is not None and (text or request.seq.params.stop):
                    request.write_text(show=text)
                    if request.text.stopped and request.seq.finish_reason is None:
                        self.scheduler.finish(request.seq, "stop")
                        complete.append(request)
        for request in complete:
            self._complete(request)
        return grown, complete

    def _take_prompt_logprobs(self, step: Step, logprobs: Logprobs | None) -> None:
        row = 0
        for seq, first, end in step.prompt_targets:
            request = self._requests.get(seq.request_id)
            for at in range(first, end):
                # Told again only when a preempted prompt is computed anew.
                if request is not None and logprobs is not None and request.output.prompt_logprobs is not None \
                        and len(request.output.prompt_logprobs) == at:
                    request.output.prompt_logprobs.append(
                        logprobs.of(row, seq.prompt_ids[at], seq.params.prompt_logprobs or 0))
                row += 1

    def _complete(self, request: Request) -> None:
        seq = request.seq
        del self._requests[seq.request_id]
        seq.owner = None  # else the two hold each other
        self._stop_texts -= bool(seq.params.stop)
        request.write_text()
        request.output.finish_reason = "stop" if request.text and request.text.stopped else seq.finish_reason
        if request.output.finish_reason == "error":
            request.output.error = request.numerics_error(
                backends.resolve_dtype(self.backend, self.config.dtype, self.model_config.dtype))
        self._counts["cached_tokens"] += seq.num_cached
        self._counts["preemptions"] += seq.preemptions

    def _abandon(self, requests: list[Request]) -> None:
        for request in requests:
            self.abort(request.output.request_id)


def _as_list(prompts: Prompts) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    return list(cast(list[Prompt], prompts))


def _as_many(params: SamplingParams | list[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError("there are not as many params as prompts", got=len(params), expected=count)
    return list(params)
