"""The loop of steps: schedule one, execute it, and give the requests the tokens of the oldest one."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict

from hal.config import EngineConfig
from hal.constrained.constraint import masks
from hal.contracts.backend import Backend, resolve_async, resolve_dtype
from hal.contracts.executor import Executor, StepHandle
from hal.engine.request_state import Logprobs, RequestState
from hal.engine.request_table import RequestTable
from hal.engine.scheduled_step import ScheduledStep
from hal.engine.scheduler import Scheduler
from hal.engine.speculation import Speculation
from hal.engine.stats import Counts, Stats
from hal.errors import CapacityError, RequestError, StateError
from hal.model_config import ModelConfig


class EngineCore:
    """The part of an engine that stands and falls with its workers: LLM.restart makes a new one.

    Args:
        executor: its workers have loaded the model.

    Attributes:
        executor: may be replaced between two calls by one that wraps it, such as hal.recording's.
        speculation: where drafts come from; None: steps have none. pending: the steps in flight, the oldest first.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, backend: Backend, executor: Executor,
                 requests: RequestTable, counts: Counts, speculation: Speculation | None) -> None:
        self.executor, self._requests, self._counts, self.speculation = executor, requests, counts, speculation
        ahead = executor.tokens_per_row == 1 and resolve_async(backend, config)
        steps = config.steps_per_message
        if steps == "auto" and (config.pp > 1 or config.speculate is not None or not executor.multi_step):
            steps = 1
        self.scheduler = Scheduler(config, executor.num_blocks, executor.num_cpu_blocks, depth=config.pp, steps=steps,
                                   eos_token_ids=model.eos_token_ids, ahead=ahead,
                                   has_row_states=executor.has_row_states)
        self.pending: deque[tuple[ScheduledStep, StepHandle]] = deque()
        self._most_pending = 2 if ahead else config.pp
        self._vocab_size, self._dtype = model.vocab_size, resolve_dtype(backend, config.dtype, model.dtype)
        self._loads_at_start = executor.expert_loads() if config.expert_loads else None  # of the warm-up

    def advance(self, text: bool) -> tuple[list[RequestState], list[RequestState]]:
        """Submit a step when the scheduler has one, and take the output of the oldest step over when enough steps are
        in flight.

        Args:
            text: bring the texts of requests that go on up to date.

        Returns:
            The requests that grew, and those of them that are complete.
        """
        self.executor.check()
        while self._requests.cancelled:
            self.abort(self._requests.cancelled.popleft())
        step = self.scheduler.schedule()
        if step is not None:
            if self.speculation is not None:
                self.speculation.before(step)
            self._counts.steps += 1
            if self._requests.constrained and any(seq.constraint is not None for seq in step.sampled):
                return self._advance_masked(step, text)
            self.pending.append((step, self.executor.execute_model(step.request)))
        if not self.pending:
            if self.scheduler.unfinished:
                raise StateError("requests wait, and none can run", hint="this is a defect of the scheduler: report it")
            return [], []
        if step is None or len(self.pending) >= self._most_pending:
            return self.take_over(*self.pending.popleft(), text)
        return [], []

    def _advance_masked(self, step: ScheduledStep, text: bool) -> tuple[list[RequestState], list[RequestState]]:
        """`advance` for a step with token masks. They are computed while its forward pass runs, from tokens of which
        the step before may still have the last."""
        handle = self.executor.execute_model(step.request, sampling_follows=True)
        self.pending.append((step, handle))
        earlier, failed = len(self.pending) - 1, list[RequestState]()
        taken = self.take_over(*self.pending.popleft(), text) if earlier else ([], [])
        asked = [(seq, drafts) for seq, drafts in zip(step.sampled, step.draft_tokens(), strict=True)
                 if seq.constraint is not None and seq.finish_reason is None]
        if asked:
            found = masks([(seq.constraint, seq.output_ids, drafts) for seq, drafts in asked if seq.constraint],
                          self._vocab_size)
            step.restrict({seq.request_id: mask for (seq, _), mask in zip(asked, found, strict=True)},
                          self._vocab_size, handle)
        else:
            handle.sample()
        for seq, _ in asked:
            if seq.constraint is not None and seq.constraint.problem is not None:
                seq.owner.output.error = RequestError(
                    f"request {seq.request_id} ended: its grammar does not go on", got=seq.constraint.problem,
                    hint="a simpler grammar, or other tokens: see docs/constrained.md")
                failed.append(seq.owner)
                self.scheduler.finish(seq, "error")
        self._requests.keep(failed)
        for request in failed:
            self._complete(request)
        if not earlier and self._most_pending == 1:
            taken = self.take_over(*self.pending.popleft(), text)
        return taken[0] + failed, taken[1] + failed

    def take_over(self, step: ScheduledStep, handle: StepHandle,
                  text: bool) -> tuple[list[RequestState], list[RequestState]]:
        """Wait for a step, and give the requests its tokens. Arguments and results are those of `advance`."""
        result = handle.result()
        tokens = result.token_ids.numpy()
        counts, computed = (None if x is None else x.numpy() for x in (result.counts, result.num_computed))
        self._counts.prefill_tokens += step.num_prefill
        self._counts.decode_tokens += len(tokens) if counts is None else int(counts.sum())
        if step.prompt_targets:
            self._take_prompt_logprobs(step, Logprobs.prompt(result))
        grown: list[RequestState] = [seq.owner for seq in step.sampled if seq.finish_reason is None]
        logprobs = Logprobs.sampled(result)
        asked = [] if logprobs is None else [(row, len(seq.output_ids)) for row, seq in enumerate(step.sampled)
                                             if seq.finish_reason is None and seq.params.logprobs is not None]
        complete: list[RequestState] = [seq.owner for seq in self.scheduler.update(step, tokens, counts, computed)]
        for request in complete:
            if not request.seq.params.max_tokens and request.seq.finish_reason != "error":
                request.output.token_ids.clear()
                request.seq.finish_reason = "length"
        for row, before in asked:
            seq, width = step.sampled[row], len(tokens) // len(step.sampled)
            assert logprobs is not None
            for place, token in enumerate(seq.output_ids[before:], row * width):
                seq.owner.output.logprobs.append(logprobs.of(place, token, seq.params.logprobs or 0))
        if text or self._requests.stop_texts:
            for request in grown:
                if request.text is not None and (text or request.seq.params.stop):
                    request.write_text(show=text)
                    if request.text.stopped and request.seq.finish_reason is None:
                        self.scheduler.finish(request.seq, "stop")
                        complete.append(request)
        if self.speculation is not None:
            self.speculation.after(step, result)
            for request in grown:
                output, seq = request.output, request.seq
                output.drafted_tokens, output.accepted_tokens = seq.drafted, seq.accepted
        self._requests.keep(complete)  # if this call is interrupted, a later one returns these outputs
        for request in complete:
            self._complete(request)
        return grown, complete

    def _take_prompt_logprobs(self, step: ScheduledStep, logprobs: Logprobs | None) -> None:
        row = 0
        for seq, first, end in step.prompt_targets:
            request = self._requests.live.get(seq.request_id)
            for at in range(first, end):
                # A step repeats a token's logprobs only when a preempted prompt is computed again.
                if request is not None and logprobs is not None and request.output.prompt_logprobs is not None \
                        and len(request.output.prompt_logprobs) == at:
                    request.output.prompt_logprobs.append(
                        logprobs.of(row, seq.prompt_ids[at], seq.params.prompt_logprobs or 0))
                row += 1

    def _complete(self, request: RequestState) -> None:
        seq = request.seq
        request.write_text()
        request.output.finish_reason = "stop" if request.text and request.text.stopped else seq.finish_reason
        request.output.stop_reason = request.stop_reason()
        if request.output.finish_reason == "error" and request.output.error is None:
            request.output.error = request.numerics_error(self._dtype)
        if self._requests.remove(request):  # last, since LLM.restart completes the request again until then
            self._counts.cached_tokens += seq.num_cached
            self._counts.preemptions += seq.preemptions

    def abort(self, request: RequestState) -> None:
        """End a request now. A complete one stays as it is."""
        if request.seq.owner is not None:
            self.scheduler.finish(request.seq, "abort")
            self._complete(request)

    def resume(self, request: RequestState) -> None:
        """Enqueue a recovered request with the tokens that it has, or complete it if it needs no more.

        Raises:
            CapacityError: it no longer fits.
        """
        seq = request.seq
        if seq.finish_reason is None:
            seq.finish_reason = self.scheduler.ending(seq)
            if seq.params.stop:
                request.write_text()
                if request.text is not None and request.text.stopped:
                    seq.finish_reason = "stop"
        if seq.finish_reason is None:
            try:
                self.scheduler.add(seq)
            except CapacityError as error:
                error.what = f"request {seq.request_id}: {error.what}"
                raise
        else:
            self._requests.keep([request] if seq.finish_reason != "abort" else [])
            self._complete(request)

    def stats(self) -> Stats:
        """See LLM.stats."""
        live = [r.seq for r in list(self._requests.live.values())]  # list() copies in one operation
        counts = asdict(self._counts)
        counts["cached_tokens"] += sum(s.num_cached for s in live)
        counts["preemptions"] += sum(s.preemptions for s in live)
        running = sum(s.row >= 0 for s in live)
        drafts, blocks = self.speculation, self.scheduler.blocks
        loads = None if self._loads_at_start is None else self.executor.expert_loads()
        drafted, accepted = (0, 0) if drafts is None else (drafts.drafted, drafts.accepted)
        return Stats(**counts, drafted_tokens=drafted, accepted_tokens=accepted, running=running,
                     waiting=len(live) - running, used_blocks=max(blocks.num_blocks - 1, 0) - blocks.num_free,
                     num_blocks=max(blocks.num_blocks - 1, 0),
                     expert_loads=None if loads is None else loads - self._loads_at_start)
