"""From a prompt and its parameters to a request that the engine can enqueue."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hal.checkpoints.chat import Message, read_template, rendered, require_template
from hal.checkpoints.generation import recommended, stated
from hal.config import EngineConfig
from hal.constrained.constraint import Constraints
from hal.engine.prompts import Prompt, as_params, as_token_ids, check_length, check_vocabulary, require_text
from hal.engine.request_output import RequestOutput
from hal.engine.request_state import RequestState
from hal.engine.sequence import Sequence as TokenSequence
from hal.engine.sequence import derive_seed
from hal.engine.text import TextStream, TokenBytes, encode, hidden_stops, load_tokenizer
from hal.errors import RequestError
from hal.features.adapter import Adapter
from hal.model_config import ModelConfig
from hal.sampling.params import SamplingParams
from hal.torch_state import TorchState


class InputProcessor:
    """Reads a checkpoint's tokenizer, and checks requests by what the model can take. What the workers have room for is
    not checked here.

    Attributes:
        tokenizer: None for a checkpoint without tokenizer files.
        defaults: see LLM.
        constraints: makes the token masks' part of a request.
        max_model_len: tokens of the longest sequence. LLM sets it, since it depends on the room in the KV cache.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.config, self.model = config, model
        self.defaults, ignored = recommended(config)
        if self.defaults:
            logging.getLogger("hal").info(stated(self.defaults))
        if ignored:
            logging.getLogger("hal").warning("the model's generation_config.json asks for %s, which requests do not "
                                             "get", ignored)
        self._default = SamplingParams(**self.defaults)
        with TorchState():  # transformers loads modules that make tensors
            self.tokenizer: Any = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        if config.chat_template is not None and self.tokenizer is not None:
            self.tokenizer.chat_template = read_template(config.chat_template)
        table = None if self.tokenizer is None else TokenBytes.of(self.tokenizer)
        self.constraints = Constraints(model.vocab_size, model.eos_token_ids, table)
        self.max_model_len = config.longest_sequence(model)

    def params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        """The parameters of each of `count` prompts. Raises RequestError."""
        return as_params(params, count, self._default)

    def params_of_one(self, params: SamplingParams | None) -> SamplingParams:
        """The parameters of a request with one output. Raises RequestError."""
        chosen, = self.params(params, 1)
        if chosen.n > 1:
            raise RequestError("this call makes one output", got=f"n={chosen.n}", expected="n=1",
                               hint="LLM.generate takes n; hal.engine.prompts.samples divides a request")
        return chosen

    def chat_ids(self, messages: Sequence[Message], tools: Sequence[Any] | None,
                 options: Mapping[str, Any] | None) -> list[int]:
        """See LLM.chat_ids."""
        require_template(self.tokenizer, self.config.model)
        return TokenBytes.of(self.tokenizer).plain(rendered(self.tokenizer, messages, tools, options or {}))

    def token_ids(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids. Raises RequestError: the model cannot serve the request."""
        vocab = self.model.vocab_size
        hint = None if self.max_model_len == self.model.max_position else (
            f"max_model_len may be up to {self.model.max_position}")
        if isinstance(prompt, str):
            require_text(self.tokenizer, prompt, self.config.model)
            ids = encode(self.tokenizer, prompt)
            check_vocabulary(ids, vocab)
            check_length(len(ids), self.max_model_len - 1, hint)
        else:
            ids = as_token_ids(prompt, self.max_model_len - 1, vocab, hint)
        if params.stop and self.tokenizer is None:
            raise RequestError("the model has no tokenizer", got="stop texts", expected="stop_token_ids", param="stop")
        if params.stop and params.skip_special_tokens:
            hidden_stops(self.tokenizer, params.stop)
        if (most := max((token for token, _ in params.logit_bias), default=0)) >= vocab:
            raise RequestError("logit_bias has a token out of the vocabulary", got=most, expected=f"below {vocab}",
                               param="logit_bias")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab:
                raise RequestError(f"{name} is larger than the vocabulary", got=getattr(params, name), expected=vocab,
                                   param=name)
        return ids

    def limit(self, ids: list[int], params: SamplingParams) -> int:
        """The length at which a sequence ends."""
        return min(len(ids) + max(params.max_tokens, 1), self.max_model_len)  # of max_tokens=0, the token is dropped

    def request(self, number: int, index: int, prompt: Prompt, ids: list[int], params: SamplingParams,
                adapter: Adapter | None, *, polled: bool) -> RequestState:
        """A request of token ids that `token_ids` has made.

        Args:
            number, index, polled: see RequestOutput and RequestState.
        """
        if params.stop and params.skip_special_tokens and (hidden := hidden_stops(self.tokenizer, params.stop)):
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *hidden))
        seq = TokenSequence(
            request_id=number, prompt_ids=ids, params=params, limit=self.limit(ids, params), adapter=adapter,
            seed=derive_seed(self.config.seed, number) if params.seed is None else params.seed,
            constraint=self.constraints.of(params))
        output = RequestOutput(index, number, prompt if isinstance(prompt, str) else None, ids.copy(), seq.output_ids,
                               logprobs=None if params.logprobs is None else [],
                               prompt_logprobs=None if params.prompt_logprobs is None else [None])
        return RequestState(seq, output, self._text(seq), polled)

    def recover(self, request: RequestState) -> None:
        """Restore a request after an exception has left it half changed. See RequestState.recover."""
        request.recover(self._text(request.seq))
        # The state of the old one may be ahead of the tokens.
        request.seq.constraint = self.constraints.of(request.seq.params)

    def _text(self, seq: TokenSequence) -> TextStream | None:
        params = seq.params
        return None if self.tokenizer is None else TextStream(
            self.tokenizer, seq.prompt_ids, params.stop, special=not params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output)
