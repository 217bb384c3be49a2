"""A checkpoint's chat template: the text of a conversation, as transformers renders it in its sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hal.errors import ConfigError, RequestError
from hal.values import described

Message = Mapping[str, Any]  # "role" and "content", and what else the template reads
_HINT = "--chat-template FILE (chat_template=) gives a Jinja file; or generate from a text as the model needs it"


def read_template(path: str) -> str:
    """Raises ConfigError: the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the chat template cannot be read", got=f"{path}: {error}",
                          expected="a Jinja file in UTF-8") from None


def require_template(tokenizer: Any, directory: str) -> None:
    """Raises RequestError: the checkpoint has no tokenizer, or no chat template."""
    if tokenizer is None:
        raise RequestError("the model has no tokenizer, so it cannot chat", got=directory,
                           hint="add tokenizer files to that directory, or generate from token ids")
    if getattr(tokenizer, "chat_template", None) is None:
        raise RequestError("the model has no chat template", got=directory, expected="chat_template.jinja, or a "
                           "chat_template in tokenizer_config.json", hint=_HINT)


def rendered(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None,
             options: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Args:
        tools: JSON schemas of functions, or Python functions, for the template.
        options: further variables of the template. The prompt ends where a reply begins, unless they have
            add_generation_prompt=False.

    Raises:
        RequestError: the messages are none, or the template refuses them.
    """
    usable = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages)
    if not usable or not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages):
        raise RequestError("the messages are no conversation", got=described(messages),
                           expected='a list such as [{"role": "user", "content": "Hello"}]')
    try:
        text: str = tokenizer.apply_chat_template([dict(each) for each in messages], tools=tools, tokenize=False,
                                                  **{"add_generation_prompt": True, **options})
    except Exception as error:  # a template may raise any error
        raise RequestError("the chat template refuses the messages", got=f"{type(error).__name__}: {error!s:.300}",
                           expected="roles and contents as this checkpoint's template takes them",
                           hint=_HINT) from error
    return text
