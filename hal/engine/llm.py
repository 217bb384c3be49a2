"""LLM: a model, its workers and a scheduler behind one object."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from hal.adapters.table import AdapterTable
from hal.checkpoints.chat import Message, read_template, rendered, require_template
from hal.checkpoints.generation import generation_defaults, stated
from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.constrained.constraint import Constraint, Constraints, masks
from hal.contracts import backend as backends
from hal.contracts.embedding import EmbeddingOutput
from hal.contracts.executor import StepHandle, make_executor
from hal.contracts.outputs import SamplerOutput
from hal.contracts.runner import no_progress
from hal.embedding.steps import require_finite
from hal.engine.calls import Calls
from hal.engine.certificates import admit
from hal.engine.embedder import Embedder
from hal.engine.progress import LoadProgress, RequestProgress
from hal.engine.prompts import (
    Prompt,
    Prompts,
    as_params,
    as_prompts,
    as_token_ids,
    check_length,
    check_vocabulary,
    require_text,
    samples,
)
from hal.engine.request_output import RequestOutput
from hal.engine.request_state import Logprobs, RequestState
from hal.engine.scheduled_step import ScheduledStep
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence, derive_seed
from hal.engine.speculation import Speculation
from hal.engine.text import TextStream, TokenBytes, encode, hidden_stops, load_tokenizer
from hal.errors import CapacityError, ConfigError, HalError, RequestError, StateError
from hal.features.adapter import Adapter
from hal.sampling.params import SamplingParams
from hal.torch_state import TorchState
from hal.values import described, plain


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the engine started.

    Attributes:
        steps: submitted steps. prefill_tokens: tokens computed in chunks of prompts, with those that are computed again
            after a preemption. decode_tokens: sampled tokens. cached_tokens: prompt tokens found in the prefix cache.
        drafted_tokens, accepted_tokens: drafts of speculative decoding that steps have verified, and how many of them
            were right.
        running, waiting: requests at this moment.
        expert_loads: with EngineConfig.expert_loads, of each layer with experts the tokens that each expert was chosen
            for since the workers started; reading them waits for the device. None without it.
        used_blocks, num_blocks: KV blocks that running requests hold at this moment, and that there are for requests.
    """

    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    running: int
    waiting: int
    used_blocks: int
    num_blocks: int
    expert_loads: np.ndarray | None = field(default=None, compare=False)

    @property
    def expert_imbalance(self) -> float | None:
        """The load of a layer's most loaded expert over that of its average one, as a mean over the layers: 1.0 is
        balanced. None without expert_loads, and before any load."""
        loads = self.expert_loads
        if loads is None or not loads.sum(1).all():
            return None
        return float((loads.max(1) / loads.mean(1)).mean())


class LLM:
    """An engine for one model.

        with LLM("path/to/checkpoint", tp=2) as llm:
            outputs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))

    To drive requests yourself, call `add_request`, and then `step` while `unfinished`.

    An LLM belongs to the process that made it: in a forked child every call that runs steps raises a StateError, and
    leaving the `with` block does nothing. It is not thread-safe: a call while another thread is in a call raises a
    StateError. An exception that ends a call in the middle (KeyboardInterrupt, an exception of a signal handler, a
    WorkerError) leaves the engine's state unknown: every later call is refused with an error that says so, until
    `restart`.

    Args:
        model: checkpoint directory in Hugging Face format, or a GGUF file; by default the bundled one, which adds
            numbers. Without tokenizer files prompts are token ids, and outputs have no text.
        progress: show bars while loading and warming up.
        options: the fields of EngineConfig.

    Attributes:
        defaults: the parameters of a request that gives none, as far as they differ from those of SamplingParams. They
            come from the checkpoint's generation_config.json, unless generation_config="none". SamplingParams that a
            caller gives hold as they are.

    Raises:
        ConfigError, ModelLoadError, BackendError, CapacityError, WorkerError.
    """

    def __init__(self, model: str | os.PathLike[str] = str(BUNDLED_MODEL), *, progress: bool = False,
                 **options: Any) -> None:
        self.config = config = _config(model, options)
        self.model_config = read_config(config.model, weights=not config.random_weights, impl=config.model_impl,
                                        trust_remote_code=config.trust_remote_code, quantize=config.quantize,
                                        pooling=config.pooling)
        admit(self.model_config)
        self.defaults = generation_defaults(config.model) if config.generation_config == "auto" else {}
        if self.defaults:
            logging.getLogger("hal").info(stated(self.defaults))
        self._default = SamplingParams(**self.defaults)
        with TorchState():  # transformers loads modules that make tensors
            self.tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        if config.chat_template is not None and self.tokenizer is not None:
            self.tokenizer.chat_template = read_template(config.chat_template)
        table = None if self.tokenizer is None else TokenBytes.of(self.tokenizer)
        self._constraints = Constraints(self.model_config.vocab_size, self.model_config.eos_token_ids, table)
        self.backend = backends.select(config.device)
        self._speculation = None if config.speculate is None else Speculation(config, self.backend)
        if progress and (self.model_config.quantization is not None or self.model_config.delta is not None
                         or config.kv_dtype != "auto"):
            from hal.models.memory import memory_line

            print(memory_line(config, self.model_config, backends.resolve_dtype(
                self.backend, config.dtype, self.model_config.dtype)), file=sys.stderr)
        bars = LoadProgress() if progress else None
        try:
            self.executor = make_executor(config, self.model_config, self.backend, bars or no_progress)
        finally:
            if bars is not None:
                bars.close()
        if self.executor.has_row_states and config.prefix_caching:
            logging.getLogger("hal").info("prefix caching is off: layers of this model keep a state per row, and the "
                                          "state after a prefix is not kept")
        embeds = self.model_config.embedding is not None
        wanted = EmbeddingOutput if embeds else SamplerOutput
        if not issubclass(self.executor.output_type, wanted):
            self.executor.shutdown()
            raise ConfigError(f"LLM {'makes embeddings' if embeds else 'generates tokens'}, and this device's model "
                              "runner does not", got=f"a runner that yields {self.executor.output_type.__name__}",
                              expected=f"a runner that yields {wanted.__name__}",
                              hint="drive its executor yourself: hal.contracts.executor.make_executor")
        if config.async_scheduling and self.executor.tokens_per_row > 1:
            self.executor.shutdown()
            raise ConfigError("async_scheduling prepares a step before it is known how many tokens a sequence gained",
                              got=f"a model runner that gives up to {self.executor.tokens_per_row} tokens a step",
                              expected="async_scheduling=None or False: then steps are scheduled one after another")
        if self._speculation is not None:
            self._speculation.take_times(self.executor.round_times)
        if config.expert_loads and self.executor.expert_loads() is None:
            self.executor.shutdown()
            raise ConfigError("expert_loads counts the experts of a native model, where the device can",
                              got=f"{self.model_config.architecture} on {config.device}", expected="expert_loads=False")
        self._adapters = AdapterTable(config, self.model_config)
        self._begin()
        self._steps_in_flight = 2 if self.scheduler.ahead else config.pp
        self._calls = Calls()
        self._pending: deque[tuple[ScheduledStep, StepHandle]] = deque()
        self._requests: dict[int, RequestState] = {}  # unfinished requests; restart() needs nothing else
        self._kept: dict[int, RequestState] = {}  # requests that grew; the next step() returns their outputs
        # A finalizer may cancel a request in the middle of a call. Such requests end in the next step.
        self._cancelled: deque[RequestState] = deque()
        self._next_id = 0
        self._stop_texts = self._constrained = 0  # unfinished requests with stop texts, and with token masks
        self._counts = dict.fromkeys(("steps", "prefill_tokens", "decode_tokens", "cached_tokens", "preemptions"), 0)

    def _begin(self) -> None:
        """The engine's own part for new workers: a scheduler, and for a model of embeddings an Embedder."""
        self.scheduler = self._make_scheduler()
        self._loads_at_start = self.executor.expert_loads() if self.config.expert_loads else None  # of the warm-up
        self.max_model_len = longest = self.config.longest_sequence(self.model_config)
        held = (self.executor.num_blocks - 1) * self.config.block_size
        if self.config.max_model_len is None and 0 < held < longest:
            self.max_model_len = held
            logging.getLogger("hal").warning("the context is %s tokens, and not the model's %s: the KV cache has no "
                                             "room for more (memory_fraction, kv_cache_bytes)", held, longest)
        self._embedder = None if self.model_config.embedding is None else Embedder(
            self.executor, self.config, self.model_config, self.tokenizer)

    def _make_scheduler(self) -> Scheduler:
        ahead = self.executor.tokens_per_row == 1 and backends.resolve_async(self.backend, self.config)
        steps, config = self.config.steps_per_message, self.config
        if steps == "auto" and (config.pp > 1 or config.speculate is not None or not self.executor.multi_step):
            steps = 1
        return Scheduler(self.config, self.executor.num_blocks, self.executor.num_cpu_blocks, depth=self.config.pp,
                         steps=steps,
                         eos_token_ids=self.model_config.eos_token_ids, ahead=ahead,
                         has_row_states=self.executor.has_row_states)

    def generate(self, prompts: Prompts, params: SamplingParams | Several[SamplingParams] | None = None, *,
                 progress: bool = False) -> list[RequestOutput]:
        """Complete all prompts. Requests of add_request and stream go on at the same time; the next `step` returns the
        outputs of add_request that grew.

        Args:
            prompts: a text, token ids (a list, tuple, range or one-dimensional array), or a list of these. params: of
                all, or one for each; None: see `defaults`.
            progress: show a bar with prefill and decode tokens/s.

        Returns:
            The outputs, in the order of the prompts, `n` of each one. A request whose logits were NaN or infinite has
            the finish_reason "error", and its `error` is a NumericsError; it does not change the others.

        Raises:
            RequestError, CapacityError: a prompt is refused, which the error names by its index. No prompt is run.
            WorkerError: a rank failed. StateError: see the class.
        """
        several = as_prompts(prompts)
        each = as_params(params, len(several), self._default)
        checked = self._checked(several, each)
        wanted = [(i, sample) for i, of_prompt in enumerate(each) for sample in samples(of_prompt)]
        with self._calls.begin():
            requests, first = list[RequestState](), self._next_id
            bar = RequestProgress(len(wanted), progress)
            try:
                for i, sample in wanted:
                    requests.append(self._add(i, several[i], checked[i], sample, polled=False))
                waiting = {r.output.request_id for r in requests}
                while waiting:
                    before = self._counts.copy()
                    grown, complete = self._advance(text=False)
                    self._keep(grown)
                    done = waiting & {r.seq.request_id for r in complete}
                    waiting -= done
                    prefill, decode = (self._counts[n] - before[n] for n in ("prefill_tokens", "decode_tokens"))
                    bar.step(prefill, decode, len(done))
            except BaseException:
                self._drop_since(first)
                raise
            finally:
                bar.close()
        return [r.output for r in requests]

    def chat(self, messages: Several[Message] | Several[Several[Message]],
             params: SamplingParams | Several[SamplingParams] | None = None, *, tools: Several[Any] | None = None,
             options: Mapping[str, Any] | None = None, progress: bool = False) -> list[RequestOutput]:
        """Continue conversations, by `generate`.

        Args:
            messages: of a conversation, each a mapping with "role" and "content"; or a list of conversations.
            params, progress: see `generate`. tools, options: see `chat_ids`.

        Raises:
            The errors of `generate` and `chat_ids`.
        """
        several = [messages] if len(messages) and isinstance(messages[0], Mapping) else messages
        return self.generate([self.chat_ids(each, tools=tools, options=options) for each in several],  # type: ignore
                             params, progress=progress)

    def chat_ids(self, messages: Several[Message], *, tools: Several[Any] | None = None,
                 options: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids of a conversation, by the chat template: where a reply of the model begins. As `prepare`, it
        may run beside another call.

        Args:
            tools: JSON schemas of functions, or Python functions, for the template.
            options: further variables of the template, such as enable_thinking.

        Raises:
            RequestError: the checkpoint has no tokenizer or no chat template, or the template refuses the messages.
        """
        require_template(self.tokenizer, self.config.model)
        return TokenBytes.of(self.tokenizer).plain(rendered(self.tokenizer, messages, tools, options or {}))

    def embed(self, texts: Prompts, *, prompt_name: str | None = None, truncate: bool = True) -> np.ndarray:
        """The embeddings of texts, fp32 [num_texts, dim], in their order.

        Args:
            texts: a text, token ids (a list, tuple, range or one-dimensional array), or a list of these.
            prompt_name: of the model's prompts, the one that is put before each text; None: its default, if it has one.
                Token ids stay as they are.
            truncate: cut longer texts to the model's longest one; False refuses them.

        Raises:
            RequestError: a text is refused, which the error names by its index; or this model makes no embeddings.
            NumericsError: a vector is not finite. WorkerError: a rank failed. StateError: see the class.
        """
        several = as_prompts(texts)
        embedder = self._require_embedder()
        prompt = embedder.prompt(prompt_name)
        ids = self._each(several, [(prompt, truncate)] * len(several), embedder.token_ids)
        with self._calls.begin():
            vectors = embedder.steps.run(ids, embedder.dim)
        return require_finite(vectors)  # after the call, since the engine's state is sound

    def _require_embedder(self) -> Embedder:
        if self._embedder is None:
            raise RequestError("this model generates tokens and makes no embeddings",
                               got=self.model_config.architecture, expected="a sentence-transformers directory, or a "
                               "pooling", hint="LLM(..., pooling=\"last\") pools the model's hidden states (--pooling)")
        return self._embedder

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the output each time it has grown, and when it has ended. It is the same object each time, and its text
        never shows a part of a stop text. Closing the iterator aborts the request. Several streams may take turns. This
        call itself, not the iterator, raises the errors of `generate`."""
        chosen = self._of_one(params)
        ids, = self._checked([prompt], [chosen])
        return self._stream(prompt, ids, chosen)

    def _stream(self, prompt: Prompt, ids: list[int], params: SamplingParams) -> Iterator[RequestOutput]:
        request = self.enqueue(prompt, ids, params, polled=False)  # not before somebody reads the iterator
        output, seen, told = request.output, 0, None
        try:
            while True:
                with self._calls.begin():
                    while len(output.token_ids) <= seen and output.finish_reason is None:
                        self._keep(self._advance(text=True)[0])
                    if len(output.token_ids) <= seen and output.finish_reason == told:
                        return
                    seen, told = len(output.token_ids), output.finish_reason
                    request.write_text()  # the output may have grown in the steps of another call
                yield output
        finally:
            self._cancel(request)

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> list[int]:
        """The prompt's token ids.

        Raises:
            RequestError: this model cannot serve the request. CapacityError: the KV cache cannot hold it.
        """
        chosen, = as_params(params, 1, self._default)
        return self._checked([prompt], [chosen])[0]

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None) -> tuple[list[int], SamplingParams]:
        """A request's token ids and parameters for `enqueue`. Raises the errors of `check`. It reads only what no call
        changes, so a thread may call it while another one is in a call: the text of a long prompt then delays no step.
        """
        chosen = self._of_one(params)
        self._require_generation()
        return self._check(prompt, chosen), chosen

    def _of_one(self, params: SamplingParams | None) -> SamplingParams:
        """The parameters of a request with one output. Raises RequestError."""
        chosen, = as_params(params, 1, self._default)
        if chosen.n > 1:
            raise RequestError("this call makes one output", got=f"n={chosen.n}", expected="n=1",
                               hint="LLM.generate takes n; hal.engine.prompts.samples divides a request")
        return chosen

    def text_ids(self, texts: Prompts, *, prompt_name: str | None = None, truncate: bool = True) -> list[list[int]]:
        """The token ids of texts for `embed`. Raises its errors. As `prepare`, it may run beside another call."""
        embedder = self._require_embedder()
        prompt = embedder.prompt(prompt_name)
        return [embedder.token_ids(text, prompt, truncate) for text in as_prompts(texts)]

    def _checked(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[list[int]]:
        """The token ids of all prompts, none of which is enqueued yet."""
        self._require_generation()
        return self._each(prompts, [(each,) for each in params], self._check)

    def _require_generation(self) -> None:
        if self._embedder is not None:
            raise RequestError("this model makes embeddings and generates no tokens",
                               got=self.model_config.architecture, expected="a call of embed",
                               hint="LLM(..., pooling=\"none\") lets a model generate that has a head")

    def _each(self, prompts: list[Prompt], options: Several[tuple[Any, ...]], ids_of: Callable[..., list[int]],
              ) -> list[list[int]]:
        """The token ids of each prompt; an error names the prompt."""
        token_ids = []
        with self._calls.begin(reads=True):
            for i, (prompt, each) in enumerate(zip(prompts, options, strict=True)):
                try:
                    token_ids.append(ids_of(prompt, *each))
                except HalError as error:
                    error.what = f"prompt {i}: {error.what}" if len(prompts) > 1 else error.what
                    raise
        return token_ids

    def _check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        vocab = self.model_config.vocab_size
        hint = None if self.max_model_len == self.model_config.max_position else (
            f"max_model_len may be up to {self.model_config.max_position}")
        if isinstance(prompt, str):
            require_text(self.tokenizer, prompt, self.config.model)
            ids = encode(self.tokenizer, prompt)
            check_vocabulary(ids, vocab)
            check_length(len(ids), self.max_model_len - 1, hint)
        else:
            ids = as_token_ids(prompt, self.max_model_len - 1, vocab, hint)
        if params.stop and self.tokenizer is None:
            raise RequestError("the model has no tokenizer", got="stop texts", expected="stop_token_ids")
        if params.stop and params.skip_special_tokens:
            hidden_stops(self.tokenizer, params.stop)
        self._constrain(params)
        if (most := max((token for token, _ in params.logit_bias), default=0)) >= vocab:
            raise RequestError("logit_bias has a token out of the vocabulary", got=most, expected=f"below {vocab}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab:
                raise RequestError(f"{name} is larger than the vocabulary", got=getattr(params, name), expected=vocab)
        if params.adapter is not None:
            self._adapters.find(params.adapter)
        self.scheduler.check(len(ids), self._limit(ids, params))
        return ids

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Enqueue a request. Returns its number. Raises the errors of `generate`."""
        chosen = self._of_one(params)
        ids, = self._checked([prompt], [chosen])
        return self.enqueue(prompt, ids, chosen, polled=True).output.request_id

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load an adapter (LoRA), in PEFT's files, so that requests can name it (`SamplingParams.adapter`). It is
        checked at once; the ranks read the directory at the beginning of the next step, so it must be there for all of
        them. Requests go on meanwhile.

        Raises:
            RequestError: the name is in use. CapacityError: no slot is free (max_adapters). ModelLoadError: the adapter
            cannot be read, does not fit the model, or asks for something that is not supported. StateError: see the
            class.
        """
        with self._calls.begin(reads=True):
            adapter = self._adapters.make(name, path, self._used_adapters())
        with self._calls.begin():
            self._adapters.named[name] = adapter
            self.scheduler.load_adapter(adapter)

    def unload_adapter(self, name: str, *, wait: bool = False) -> None:
        """Unload an adapter: no new request can name it, and its slot can be given to another one.

        Args:
            wait: unfinished requests that use the adapter keep it, and the slot is free when the last of them has
                ended; the call itself returns at once. False refuses to unload an adapter in use.

        Raises:
            RequestError: there is no such adapter, or it is in use. StateError: see the class.
        """
        with self._calls.begin(reads=True):
            self._adapters.check_unload(name, self._used_adapters(), wait=wait)
        with self._calls.begin():
            del self._adapters.named[name]

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters, the oldest first."""
        return list(self._adapters.named)

    def _used_adapters(self) -> list[Adapter]:
        return [r.seq.adapter for r in self._requests.values() if r.seq.adapter is not None]

    def abort(self, request_id: int) -> None:
        """End a request now. Its output appears in no further step. A finished or unknown request stays as it is. A
        request can be aborted after a failure too: then `restart` does not bring it back.

        Raises:
            RequestError: not a number. StateError: another thread is in a call.
        """
        number = plain(request_id)
        if not isinstance(number, int):
            raise RequestError("a request's number is not an integer", got=described(request_id))
        self._calls.refuse_other_threads()
        self._kept.pop(number, None)
        request = self._requests.get(number)
        if request is not None:
            self._cancel(request)

    @property
    def unfinished(self) -> bool:
        """Whether a request is not complete, or `step` has not returned all outputs."""
        return bool(self._requests or self._kept)

    def step(self, *, text: bool = True) -> list[RequestOutput]:
        """Return the outputs that grew during calls of `generate` and `stream`. If there is none, submit a step when
        the scheduler has one, and take the output of the oldest submitted step when enough steps are in flight.

        Args:
            text: bring the texts of running requests up to date. A complete request has its text in any case.

        Returns:
            The outputs of add_request that grew. An output with a finish_reason is complete.

        Raises:
            WorkerError: a rank failed. StateError: see the class.
        """
        with self._calls.begin():
            if self._kept:
                grown = list(self._kept.values())
                for request in grown:
                    if text and request.seq.finish_reason is None:
                        request.write_text()
            else:
                grown = self._advance(text)[0]
            outputs = [request.output for request in grown if request.polled]
        self._kept = {}
        return outputs

    def _advance(self, text: bool) -> tuple[list[RequestState], list[RequestState]]:
        self.executor.check()
        while self._cancelled:
            self._end(self._cancelled.popleft())
        step = self.scheduler.schedule()
        if step is not None:
            if self._speculation is not None:
                self._speculation.before(step)
            self._counts["steps"] += 1
            if self._constrained and any(seq.constraint is not None for seq in step.sampled):
                return self._advance_masked(step, text)
            self._pending.append((step, self.executor.execute_model(step.request)))
        if not self._pending:
            if self.scheduler.unfinished:
                raise StateError("requests wait, and none can run", hint="this is a defect of the scheduler: report it")
            return [], []
        if step is None or len(self._pending) >= self._steps_in_flight:
            return self._take_over(*self._pending.popleft(), text)
        return [], []

    def _advance_masked(self, step: ScheduledStep, text: bool) -> tuple[list[RequestState], list[RequestState]]:
        """`_advance` for a step with token masks. They are computed while its forward pass runs, from tokens of which
        the step before may still have the last."""
        handle = self.executor.execute_model(step.request, sampling_follows=True)
        self._pending.append((step, handle))
        earlier, failed = len(self._pending) - 1, list[RequestState]()
        taken = self._take_over(*self._pending.popleft(), text) if earlier else ([], [])
        asked = [(seq, drafts) for seq, drafts in zip(step.sampled, step.draft_tokens(), strict=True)
                 if seq.constraint is not None and seq.finish_reason is None]
        if asked:
            found = masks([(seq.constraint, seq.output_ids, drafts) for seq, drafts in asked if seq.constraint],
                          self.model_config.vocab_size)
            step.restrict({seq.request_id: mask for (seq, _), mask in zip(asked, found, strict=True)},
                          self.model_config.vocab_size, handle)
        else:
            handle.sample()
        for seq, _ in asked:
            if seq.constraint is not None and seq.constraint.problem is not None:
                seq.owner.output.error = RequestError(
                    f"request {seq.request_id} ended: its grammar does not go on", got=seq.constraint.problem,
                    hint="a simpler grammar, or other tokens: see docs/constrained.md")
                failed.append(seq.owner)
                self.scheduler.finish(seq, "error")
        self._keep(failed)
        for request in failed:
            self._complete(request)
        if not earlier and self._steps_in_flight == 1:
            taken = self._take_over(*self._pending.popleft(), text)
        return taken[0] + failed, taken[1] + failed

    def health(self) -> HalError | None:
        """The error that a step would raise now, or None while the engine can run steps. A rank that died while no step
        ran is found too. May be called from any thread, also while another one is in a call."""
        return self._calls.refusal or self.executor.health()

    def stats(self) -> Stats:
        """Counts and states at this moment. May be called from any thread, also while another one is in a call."""
        live = [r.seq for r in list(self._requests.values())]  # list() copies in one operation
        counts = self._counts.copy()
        if self._embedder is not None:
            counts |= {"steps": self._embedder.steps.steps, "prefill_tokens": self._embedder.steps.tokens}
        counts["cached_tokens"] += sum(s.num_cached for s in live)
        counts["preemptions"] += sum(s.preemptions for s in live)
        running = sum(s.row >= 0 for s in live)
        drafts, blocks = self._speculation, self.scheduler.blocks
        loads = None if self._loads_at_start is None else self.executor.expert_loads()
        drafted, accepted = (0, 0) if drafts is None else (drafts.drafted, drafts.accepted)
        return Stats(**counts, drafted_tokens=drafted, accepted_tokens=accepted, running=running,
                     waiting=len(live) - running, used_blocks=max(blocks.num_blocks - 1, 0) - blocks.num_free,
                     num_blocks=max(blocks.num_blocks - 1, 0),
                     expert_loads=None if loads is None else loads - self._loads_at_start)

    def restart(self) -> None:
        """Start new workers, after a failure or at any other time. Unfinished requests keep their tokens and go on from
        them. The steps in flight are void; new steps give the same tokens again.

        Raises:
            The errors of making an LLM. A CapacityError may also name a request that no longer fits: abort it, or make
            room, and restart again. After an error no workers run, and the requests stay.
            StateError: another thread is in a call.
        """
        with self._calls.begin_anew():
            self.executor.shutdown()
            self._pending.clear()
            while self._cancelled:
                self._drop(self._cancelled.popleft())
            self.executor = make_executor(self.config, self.model_config, self.backend)
            self._begin()
            for adapter in dict.fromkeys((*self._adapters.named.values(), *self._used_adapters())):
                self.scheduler.load_adapter(adapter)
            self._stop_texts = sum(bool(r.seq.params.stop) for r in self._requests.values())
            self._constrained = sum(r.seq.constraint is not None for r in self._requests.values())
            try:
                for request in list(self._requests.values()):
                    self._resume(request)
            except CapacityError:
                self.executor.shutdown()
                raise

    def _resume(self, request: RequestState) -> None:
        """Enqueue a request with the tokens that it has, or complete it if it needs no more."""
        seq = request.seq
        request.recover(self._make_text(seq.prompt_ids, seq.params))
        seq.constraint = self._constrain(seq.params)  # the state of the old one may be ahead of the tokens
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
            self._keep([request] if seq.finish_reason != "abort" else [])
            self._complete(request)

    def shutdown(self) -> None:
        """End the workers. Idempotent. Raises StateError: another thread is in a call."""
        self._calls.shut_down()
        self.executor.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()

    def _limit(self, ids: list[int], params: SamplingParams) -> int:
        return min(len(ids) + max(params.max_tokens, 1), self.max_model_len)  # of max_tokens=0, the token is dropped

    def enqueue(self, prompt: Prompt, ids: list[int], params: SamplingParams, *, polled: bool) -> RequestState:
        """Enqueue a request that `prepare` has checked. Raises CapacityError, WorkerError, StateError.

        Args:
            polled: `step` returns its outputs.
        """
        with self._calls.begin():
            first = self._next_id
            try:
                return self._add(0, prompt, ids, params, polled)
            except BaseException:
                self._drop_since(first)
                raise

    def _add(self, index: int, prompt: Prompt, ids: list[int], params: SamplingParams, polled: bool) -> RequestState:
        if params.stop and params.skip_special_tokens and (hidden := hidden_stops(self.tokenizer, params.stop)):
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *hidden))
        number, self._next_id = self._next_id, self._next_id + 1
        seed = derive_seed(self.config.seed, number) if params.seed is None else params.seed
        seq = Sequence(request_id=number, prompt_ids=ids, params=params, seed=seed, limit=self._limit(ids, params),
                       constraint=self._constrain(params),
                       adapter=None if params.adapter is None else self._adapters.find(params.adapter))
        output = RequestOutput(index, number, prompt if isinstance(prompt, str) else None, ids.copy(), seq.output_ids,
                               logprobs=None if params.logprobs is None else [],
                               prompt_logprobs=None if params.prompt_logprobs is None else [None])
        request = self._requests[number] = seq.owner = RequestState(seq, output, self._make_text(ids, params), polled)
        self._stop_texts += bool(params.stop)
        self._constrained += seq.constraint is not None
        self.scheduler.add(seq)
        return request

    def _constrain(self, params: SamplingParams) -> Constraint | None:
        """The constraint of a request with these parameters. Raises RequestError: they cannot be served."""
        made = self._constraints.of(params)
        if made is not None and self.executor.tokens_per_row > 1 and self._speculation is None:
            raise RequestError("this device's model runner gives a sequence several tokens for one token mask",
                               got="a request that restricts its tokens", expected="a runner of one token a step")
        return made

    def _make_text(self, prompt_ids: list[int], params: SamplingParams) -> TextStream | None:
        return None if self.tokenizer is None else TextStream(
            self.tokenizer, prompt_ids, params.stop, special=not params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output)

    def _keep(self, requests: list[RequestState]) -> None:
        """Remember requests whose outputs the next `step` returns, in the order in which they grew last."""
        for request in requests:
            if request.polled:
                self._kept.pop(request.seq.request_id, None)
                self._kept[request.seq.request_id] = request

    def _take_over(self, step: ScheduledStep, handle: StepHandle,
                   text: bool) -> tuple[list[RequestState], list[RequestState]]:
        """The requests that grew, and those of them that are complete."""
        result = handle.result()
        tokens = result.token_ids.numpy()
        counts, computed = (None if x is None else x.numpy() for x in (result.counts, result.num_computed))
        self._counts["prefill_tokens"] += step.num_prefill
        self._counts["decode_tokens"] += len(tokens) if counts is None else int(counts.sum())
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
        if text or self._stop_texts:
            for request in grown:
                if request.text is not None and (text or request.seq.params.stop):
                    request.write_text(show=text)
                    if request.text.stopped and request.seq.finish_reason is None:
                        self.scheduler.finish(request.seq, "stop")
                        complete.append(request)
        if self._speculation is not None:
            self._speculation.after(step, result)
            for request in grown:
                output, seq = request.output, request.seq
                output.drafted_tokens, output.accepted_tokens = seq.drafted, seq.accepted
        self._keep(complete)  # if this call is interrupted, a later one returns these outputs
        for request in complete:
            self._complete(request)
        return grown, complete

    def _take_prompt_logprobs(self, step: ScheduledStep, logprobs: Logprobs | None) -> None:
        row = 0
        for seq, first, end in step.prompt_targets:
            request = self._requests.get(seq.request_id)
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
            request.output.error = request.numerics_error(
                backends.resolve_dtype(self.backend, self.config.dtype, self.model_config.dtype))
        seq.owner = None  # without this, the sequence and the request are a reference cycle
        if self._requests.pop(seq.request_id, None) is not None:  # last, since restart() completes it until then
            self._stop_texts -= bool(seq.params.stop)
            self._constrained -= seq.constraint is not None
            self._counts["cached_tokens"] += seq.num_cached
            self._counts["preemptions"] += seq.preemptions

    def _cancel(self, request: RequestState) -> None:
        """Abort a request in any state of the engine."""
        if self._calls.idle:
            with self._calls.begin():
                self._end(request)
        elif self._calls.ended:
            self._drop(request)
        else:  # this is the finalizer of a stream, in the middle of another call
            self._cancelled.append(request)

    def _end(self, request: RequestState) -> None:
        if request.seq.owner is not None:
            self.scheduler.finish(request.seq, "abort")
            self._complete(request)

    def _drop(self, request: RequestState) -> None:
        """Forget a request of an engine whose state is unknown; restart() builds the state from the other requests."""
        self._requests.pop(request.seq.request_id, None)
        request.output.finish_reason = request.output.finish_reason or "abort"
        request.seq.owner = None

    def _drop_since(self, first: int) -> None:
        """Forget the requests of a call that ends by an exception, since nobody can ask for their outputs."""
        for number in [n for n in self._requests if n >= first]:
            self._drop(self._requests[number])


def _config(model: str | os.PathLike[str], options: dict[str, Any]) -> EngineConfig:
    """Raises ConfigError."""
    names = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            raise ConfigError("LLM has no such option", got=name, expected=", ".join(names),
                              hint=f"did you mean {close[0]}?" if close else None)
    return EngineConfig(model=model, **options)  # type: ignore[arg-type]  # a path becomes a text there
