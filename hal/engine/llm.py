"""LLM: a model, its workers and a scheduler behind one object."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from dataclasses import fields, replace
from typing import Any

import numpy as np

from hal.adapters.table import AdapterTable
from hal.checkpoints.chat import Message
from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.contracts import backend as backends
from hal.contracts.executor import Executor
from hal.embedding.steps import require_finite
from hal.engine.calls import Calls
from hal.engine.certificates import admit
from hal.engine.core import EngineCore
from hal.engine.embedder import Embedder
from hal.engine.executor_start import start_executor
from hal.engine.input_processor import InputProcessor
from hal.engine.progress import RequestProgress
from hal.engine.prompts import Prompt, Prompts, as_prompts, samples
from hal.engine.request_output import RequestOutput
from hal.engine.request_state import RequestState
from hal.engine.request_table import RequestTable
from hal.engine.scheduler import Scheduler
from hal.engine.speculation import Speculation
from hal.engine.stats import Counts, Stats
from hal.errors import CapacityError, ConfigError, HalError, ModelLoadError, RequestError
from hal.features.adapter import Adapter
from hal.sampling.params import SamplingParams
from hal.values import described, plain


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
        calls, requests, core, inputs, embedder: the engine's parts, for tests and for what drives an engine in another
            way. `restart` makes a new core, and a new embedder.

    Raises:
        ConfigError, ModelLoadError, BackendError, CapacityError, WorkerError.
    """

    def __init__(self, model: str | os.PathLike[str] = str(BUNDLED_MODEL), *, progress: bool = False,
                 **options: Any) -> None:
        self.config = config = _config(model, options)
        self.model_config = read_config(config.model, weights=not config.random_weights, impl=config.model_impl,
                                        trust_remote_code=config.trust_remote_code, quantize=config.quantize,
                                        pooling=config.pooling)
        admit(self.model_config, config.tp, config.pp)
        self.inputs = InputProcessor(config, self.model_config)
        self.defaults, self.tokenizer = self.inputs.defaults, self.inputs.tokenizer
        self.backend = backends.select(config.device)
        self._counts = Counts()
        self._speculation = None if config.speculate is None else Speculation(config, self.backend)
        self._adapters = AdapterTable(config, self.model_config)
        self.calls, self.requests = Calls(), RequestTable()
        self._start(progress)
        if self.executor.has_row_states and config.prefix_caching:
            logging.getLogger("hal").info("prefix caching is off: layers of this model keep a state per row, and the "
                                          "state after a prefix is not kept")
        if self._speculation is not None:
            self._speculation.take_times(self.executor.round_times)

    def _start(self, progress: bool = False) -> None:
        """Start workers, and make the parts of the engine that depend on them."""
        executor = start_executor(self.config, self.model_config, self.backend, progress=progress)
        try:
            self.core = EngineCore(self.config, self.model_config, self.backend, executor, self.requests, self._counts,
                                   self._speculation)
            self.embedder = None if self.model_config.embedding is None else Embedder(
                executor, self.config, self.model_config, self.tokenizer)
        except BaseException:
            executor.shutdown()
            raise
        longest = self.config.longest_sequence(self.model_config)
        held = (executor.num_blocks - 1) * self.config.block_size
        if self.config.max_model_len is None and 0 < held < longest:
            logging.getLogger("hal").warning("the context is %s tokens, and not the model's %s: the KV cache has no "
                                             "room for more (memory_fraction, kv_cache_bytes)", held, longest)
            longest = held
        self.inputs.max_model_len = longest

    @property
    def executor(self) -> Executor:
        """The workers. Between two calls it may be replaced by one that wraps it, such as hal.recording's."""
        return self.core.executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self.core.executor = executor

    @property
    def scheduler(self) -> Scheduler:
        return self.core.scheduler

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and output together."""
        return self.inputs.max_model_len

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
        each = self.inputs.params(params, len(several))
        checked = self._checked(several, each)
        wanted = [(i, sample) for i, of_prompt in enumerate(each) for sample in samples(of_prompt)]
        with self.calls.begin():
            requests, first = list[RequestState](), self.requests.next_id
            bar = RequestProgress(len(wanted), progress)
            try:
                for i, sample in wanted:
                    requests.append(self._add(i, several[i], checked[i], sample, polled=False))
                waiting = {r.output.request_id for r in requests}
                while waiting:
                    prefill, decode = self._counts.prefill_tokens, self._counts.decode_tokens
                    grown, complete = self.core.advance(text=False)
                    self.requests.keep(grown)
                    done = waiting & {r.seq.request_id for r in complete}
                    waiting -= done
                    bar.step(self._counts.prefill_tokens - prefill, self._counts.decode_tokens - decode, len(done))
            except BaseException:
                self.requests.drop_since(first)
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
        one = not isinstance(messages, Several) or (len(messages) and isinstance(messages[0], Mapping))
        several = [messages] if one else messages
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
        return self.inputs.chat_ids(messages, tools, options)

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
        with self.calls.begin():
            vectors = embedder.steps.run(ids, embedder.dim)
        return require_finite(vectors)  # after the call, since the engine's state is sound

    def _require_embedder(self) -> Embedder:
        if self.embedder is None:
            raise RequestError("this model generates tokens and makes no embeddings",
                               got=self.model_config.architecture, expected="a sentence-transformers directory, or a "
                               "pooling", hint="LLM(..., pooling=\"last\") pools the model's hidden states (--pooling)")
        return self.embedder

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the output each time it has grown, and when it has ended. It is the same object each time, and its text
        never shows a part of a stop text. Closing the iterator aborts the request. Several streams may take turns. This
        call itself, not the iterator, raises the errors of `generate`."""
        chosen = self.inputs.params_of_one(params)
        ids, = self._checked([prompt], [chosen])
        return self._stream(prompt, ids, chosen)

    def _stream(self, prompt: Prompt, ids: list[int], params: SamplingParams) -> Iterator[RequestOutput]:
        request = self.enqueue(prompt, ids, params, polled=False)  # not before somebody reads the iterator
        output, seen, told = request.output, 0, None
        try:
            while True:
                with self.calls.begin():
                    while len(output.token_ids) <= seen and output.finish_reason is None:
                        self.requests.keep(self.core.advance(text=True)[0])
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
        chosen, = self.inputs.params(params, 1)
        return self._checked([prompt], [chosen])[0]

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None) -> tuple[list[int], SamplingParams]:
        """A request's token ids and parameters for `enqueue`. Raises the errors of `check`. It reads only what no call
        changes, so a thread may call it while another one is in a call: the text of a long prompt then delays no step.
        """
        chosen = self.inputs.params_of_one(params)
        self._require_generation()
        return self._check(prompt, chosen), chosen

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
        if self.embedder is not None:
            raise RequestError("this model makes embeddings and generates no tokens",
                               got=self.model_config.architecture, expected="a call of embed",
                               hint="LLM(..., pooling=\"none\") lets a model generate that has a head")

    def _each(self, prompts: list[Prompt], options: Several[tuple[Any, ...]], ids_of: Callable[..., list[int]],
              ) -> list[list[int]]:
        """The token ids of each prompt; an error names the prompt."""
        token_ids = []
        with self.calls.begin(reads=True):
            for i, (prompt, each) in enumerate(zip(prompts, options, strict=True)):
                try:
                    token_ids.append(ids_of(prompt, *each))
                except HalError as error:
                    error.what = f"prompt {i}: {error.what}" if len(prompts) > 1 else error.what
                    raise
        return token_ids

    def _check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        ids = self.inputs.token_ids(prompt, params)
        if self.inputs.constraints.of(params) is not None and self.executor.tokens_per_row > 1 \
                and self._speculation is None:
            raise RequestError("this device's model runner gives a sequence several tokens for one token mask",
                               got="a request that restricts its tokens", expected="a runner of one token a step")
        if params.adapter is not None:
            self._adapters.find(params.adapter)
        self.scheduler.check(len(ids), self.inputs.limit(ids, params))
        return ids

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Enqueue a request. Returns its number. Raises the errors of `generate`."""
        chosen = self.inputs.params_of_one(params)
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
        with self.calls.begin(reads=True):
            adapter = self._adapters.make(name, path, self.requests.adapters)
        with self.calls.begin():
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
        with self.calls.begin(reads=True):
            self._adapters.check_unload(name, self.requests.adapters, wait=wait)
        with self.calls.begin():
            del self._adapters.named[name]

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters, the oldest first."""
        return list(self._adapters.named)

    def drop_lost_adapters(self) -> dict[Adapter, ModelLoadError]:
        """Unload the adapters whose files can no longer be read, after a failure and before `restart`: new workers
        could not load them, so every step would fail.

        Returns:
            The error of each. Among them may be adapters that were unloaded while requests use them. Abort the requests
            that use one of these adapters.

        Raises:
            StateError: another thread is in a call.
        """
        self.calls.refuse_other_threads()
        return self._adapters.drop_lost(self.requests.adapters)

    def abort(self, request_id: int) -> None:
        """End a request now. Its output appears in no further step. A finished or unknown request stays as it is. A
        request can be aborted after a failure too: then `restart` does not bring it back.

        Raises:
            RequestError: not a number. StateError: another thread is in a call.
        """
        number = plain(request_id)
        if not isinstance(number, int):
            raise RequestError("a request's number is not an integer", got=described(request_id))
        self.calls.refuse_other_threads()
        self.requests.grown.pop(number, None)
        request = self.requests.live.get(number)
        if request is not None:
            self._cancel(request)

    @property
    def unfinished(self) -> bool:
        """Whether a request is not complete, or `step` has not returned all outputs."""
        return bool(self.requests.live or self.requests.grown)

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
        with self.calls.begin():
            if self.requests.grown:
                grown = list(self.requests.grown.values())
                for request in grown:
                    if text and request.seq.finish_reason is None:
                        request.write_text()
            else:
                grown = self.core.advance(text)[0]
            outputs = [request.output for request in grown if request.polled]
        self.requests.grown = {}
        return outputs

    def health(self) -> HalError | None:
        """The error that a step would raise now, or None while the engine can run steps. A rank that died while no step
        ran is found too. May be called from any thread, also while another one is in a call."""
        return self.calls.refusal or self.executor.health()

    def stats(self) -> Stats:
        """Counts and states at this moment. May be called from any thread, also while another one is in a call."""
        stats = self.core.stats()
        if self.embedder is None:
            return stats
        return replace(stats, steps=stats.steps + self.embedder.steps.steps,
                       prefill_tokens=stats.prefill_tokens + self.embedder.steps.tokens)

    def restart(self) -> None:
        """Start new workers, after a failure or at any other time. Unfinished requests keep their tokens and go on from
        them. The steps in flight are void; new steps give the same tokens again.

        Raises:
            The errors of making an LLM. A CapacityError may also name a request that no longer fits: abort it, or make
            room, and restart again. After an error no workers run, and the requests stay.
            StateError: another thread is in a call.
        """
        with self.calls.begin_anew():
            self.executor.shutdown()
            self.core.pending.clear()
            self.requests.recount()
            embedder = self.embedder
            self._start()
            if embedder is not None:  # the new one counts from 0
                self._counts.steps += embedder.steps.steps
                self._counts.prefill_tokens += embedder.steps.tokens
            for adapter in dict.fromkeys((*self._adapters.named.values(), *self.requests.adapters)):
                self.scheduler.load_adapter(adapter)
            try:
                for request in list(self.requests.live.values()):
                    self.inputs.recover(request)
                    self.core.resume(request)
            except CapacityError:
                self.executor.shutdown()
                raise

    def shutdown(self) -> None:
        """End the workers. Idempotent. Raises StateError: another thread is in a call."""
        self.calls.shut_down()
        self.executor.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()

    def enqueue(self, prompt: Prompt, ids: list[int], params: SamplingParams, *, polled: bool) -> RequestState:
        """Enqueue a request that `prepare` has checked. Raises CapacityError, WorkerError, StateError.

        Args:
            polled: `step` returns its outputs.
        """
        with self.calls.begin():
            first = self.requests.next_id
            try:
                return self._add(0, prompt, ids, params, polled)
            except BaseException:
                self.requests.drop_since(first)
                raise

    def _add(self, index: int, prompt: Prompt, ids: list[int], params: SamplingParams, polled: bool) -> RequestState:
        adapter = None if params.adapter is None else self._adapters.find(params.adapter)
        request = self.inputs.request(self.requests.take_number(), index, prompt, ids, params, adapter, polled=polled)
        self.requests.add(request)
        self.scheduler.add(request.seq)
        return request

    def _cancel(self, request: RequestState) -> None:
        """Abort a request in any state of the engine."""
        if self.calls.idle:
            with self.calls.begin():
                self.core.abort(request)
        elif self.calls.ended:
            self.requests.drop(request)
        else:  # this is the finalizer of a stream, in the middle of another call
            self.requests.cancelled.append(request)


def _config(model: str | os.PathLike[str], options: dict[str, Any]) -> EngineConfig:
    """Raises ConfigError."""
    names = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            raise ConfigError("LLM has no such option", got=name, expected=", ".join(names),
                              hint=f"did you mean {close[0]}?" if close else None)
    return EngineConfig(model=model, **options)  # type: ignore[arg-type]  # a path becomes a text there
