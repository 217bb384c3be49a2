"""The texts of an engine whose model makes embeddings: their prompts, token ids and limits."""

from __future__ import annotations

from typing import Any

from hal.config import EngineConfig
from hal.contracts.executor import Executor
from hal.embedding.steps import EmbeddingSteps
from hal.engine.prompts import Prompt, as_token_ids, check_vocabulary, require_text
from hal.engine.text import token_ids
from hal.errors import LengthError, RequestError
from hal.model_config import ModelConfig

_ANY = 2**31


class Embedder:
    """Attributes:
        most: tokens of the longest text, special tokens included. dim: of an embedding.
        steps: runs texts.
    """

    def __init__(self, executor: Executor, config: EngineConfig, model: ModelConfig, tokenizer: Any) -> None:
        assert model.embedding is not None
        self.config, self.tokenizer, self.settings = config, tokenizer, model.embedding
        self.vocab_size, self.dim = model.vocab_size, model.embedding.dim(model.hidden_size)
        self.most = min(self.settings.max_length, config.longest_sequence(model))
        self.steps = EmbeddingSteps(executor, config)

    def prompt(self, name: str | None) -> str:
        """The text that is put before each text. Raises RequestError: the model has no prompt of this name."""
        name = self.settings.default_prompt if name is None else name
        if name is not None and name not in self.settings.prompts:
            raise RequestError("the model has no such prompt", got=repr(name),
                               expected=", ".join(map(repr, self.settings.prompts)) or "no prompt_name")
        return "" if name is None else self.settings.prompts[name]

    def token_ids(self, text: Prompt, prompt: str, truncate: bool) -> list[int]:
        """The token ids of a text. Raises RequestError: it is not usable, or is too long and may not be cut."""
        if isinstance(text, str):
            require_text(self.tokenizer, text, self.config.model)
            text = prompt + (text.strip() if self.settings.strip else text)
            ids = token_ids(self.tokenizer, text.lower() if self.settings.lower_case else text, truncation=truncate,
                            max_length=self.most if truncate else None)
            check_vocabulary(ids, self.vocab_size)
        else:
            ids = as_token_ids(text, _ANY, self.vocab_size)[:self.most if truncate else None]
        if not ids:
            raise RequestError("the text is empty", expected="at least one token")
        if len(ids) > self.most:
            raise LengthError("the text is longer than the model takes", got=f"{len(ids)} tokens",
                              expected=f"at most {self.most}", hint="truncate=True cuts it")
        if len(ids) > self.config.max_num_batched_tokens:
            raise LengthError("the text has more tokens than a step takes, and a step computes a text as a whole",
                              got=len(ids), expected=f"at most {self.config.max_num_batched_tokens}",
                              hint="raise max_num_batched_tokens, or lower max_model_len to cut texts there")
        return ids
