"""OpenAI's requests as prompts and SamplingParams."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from hal.engine.llm import LLM
from hal.engine.prompts import Prompt, samples
from hal.engine.text import TokenBytes
from hal.errors import CapacityError, HalError, LengthError, RequestError, StateError
from hal.sampling.params import GRAMMARS, SamplingParams
from hal.serve.errors import ApiError
from hal.serve.tools import Tools, format_of, read_tools, readable_calls

# prompt_logprobs are asked for by echo with logprobs.
_PARAMS = frozenset(field.name for field in dataclasses.fields(SamplingParams)) - {"prompt_logprobs"}
_BOTH = frozenset(("model", "stream", "stream_options", "user"))  # "user" says for whom; it has no effect
_COMPLETION = _PARAMS | _BOTH | {"prompt", "echo", "best_of", "suffix"}
_CHAT = _PARAMS | _BOTH | {"messages", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs",
                           "max_completion_tokens", "response_format", "chat_template_kwargs"}
_EMBEDDING = frozenset(("model", "input", "encoding_format", "dimensions", "user", "prompt_name", "truncate"))
_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


def as_api_error(error: HalError, prompt: str = "prompt") -> ApiError:
    """The response to an error of the engine; `prompt` names the parameter that has the prompt."""
    if isinstance(error, (RequestError, CapacityError)):
        named = error.param if isinstance(error, RequestError) else None
        code = "context_length_exceeded" if isinstance(error, LengthError) else None
        return ApiError(400, str(error), named or prompt, code)
    return ApiError(503 if isinstance(error, StateError) else 500, str(error))


@dataclass(frozen=True, slots=True)
class Call:
    """A request to generate.

    Attributes:
        prompts: of completions; for chat there is one, which `messages` makes. params: of each choice of a prompt.
        echo: the text begins with the prompt. top: the number of most likely tokens to report; None: no logprobs.
        usage: a stream ends with the numbers of tokens. tools: of chat.
    """

    model: str
    prompts: list[Prompt]
    params: list[SamplingParams]
    stream: bool = False
    usage: bool = False
    echo: bool = False
    top: int | None = None
    tools: Tools = dataclasses.field(default_factory=Tools)

    @property
    def jobs(self) -> list[tuple[Prompt, SamplingParams]]:
        return [(prompt, params) for prompt in self.prompts for params in self.params]

    def with_adapter(self, name: str | None) -> Call:
        """The call with the adapter that `model` names. Raises ApiError: the parameter `adapter` names another one."""
        if name is None:
            return self
        if (other := self.params[0].adapter) not in (None, name):
            raise ApiError(400, f"model and adapter name two adapters: {name!r} and {other!r}", "adapter")
        return dataclasses.replace(self, params=[dataclasses.replace(each, adapter=name) for each in self.params])


class Reader:
    """The values of a request's body. A value that is null counts as not given.

    Raises:
        ApiError: the body is no object, or has a parameter that this endpoint does not have.
    """

    def __init__(self, body: Any, names: frozenset[str]) -> None:
        if not isinstance(body, dict):
            raise ApiError(400, "the body is not a JSON object")
        for name in body:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                raise ApiError(400, f"this server has no parameter {name!r} here"
                               + (f"; did you mean {close[0]!r}?" if close else ""), name, "unknown_parameter")
        self.values = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None, expected: str = "") -> Any:
        """Remove a value. Raises ApiError: it is of another type."""
        value = self.values.pop(name, default)
        wrong = value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool)))
        if wrong:
            names = expected or (kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind))
            raise ApiError(400, f"{name} has the wrong type\n  got: {value!r:.80}\n  expected: {names}", name)
        return value

    def refuse(self, name: str, why: str, *harmless: Any) -> None:
        """Raises ApiError: a parameter has a value that would change something, and is not supported."""
        value = self.values.pop(name, None)
        if value is not None and value not in harmless:
            raise ApiError(400, f"{name}={value!r:.80} is not supported: {why}", name, "unsupported_value")


def read_completion(body: Any, llm: LLM) -> Call:
    """Raises ApiError."""
    reader = Reader(body, _COMPLETION)
    reader.refuse("suffix", "the model completes texts at their end", "")
    prompt = reader.take("prompt", (str, list), None, "a text, token ids, or a list of these")
    if prompt is None:
        raise ApiError(400, "prompt is missing", "prompt")
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    top, echo = reader.take("logprobs", int), reader.take("echo", bool, False)
    values = reader.values
    values.setdefault("max_tokens", llm.defaults.get("max_tokens", _COMPLETION_TOKENS))
    if echo and top is not None:
        values["prompt_logprobs"] = top
    return _call(reader, llm, prompt if several else [prompt], top, echo)


def read_chat(body: Any, llm: LLM, tool_parser: str) -> tuple[Call, dict[str, Any]]:
    """A call without prompts, and the arguments of `LLM.chat_ids`. Raises ApiError."""
    reader = Reader(body, _CHAT)
    messages = reader.take("messages", list)
    if not messages:
        raise ApiError(400, "messages is missing or empty", "messages")
    template = None if llm.tokenizer is None else llm.tokenizer.chat_template
    tools = read_tools(reader.take("tools", list), reader.take("tool_choice", (str, dict)),
                       reader.take("parallel_tool_calls", bool, True), format_of(tool_parser, template))
    values = reader.values
    most = reader.take("max_completion_tokens", int)
    if most is not None:
        values["max_tokens"] = most
    values.setdefault("max_tokens", llm.defaults.get("max_tokens", llm.max_model_len))
    wanted, top = reader.take("logprobs", bool, False), reader.take("top_logprobs", int)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    if (form := reader.take("response_format", dict)) is not None:
        values.update(_constraint(form, values))
    if tools.schema is not None:
        if any(kind in values for kind in GRAMMARS):
            raise ApiError(400, "tool_choice says what the output is, and so does another parameter of the request",
                           "tool_choice")
        values["json_schema"] = tools.schema
    if tools.form is not None and template is not None and tools.form.marker in TokenBytes.of(llm.tokenizer).hidden:
        values["skip_special_tokens"] = False  # a text that hides the marker would not show that it is a call
    options = reader.take("chat_template_kwargs", dict, {})
    call = _call(reader, llm, [], (top or 0) if wanted else None, False)
    return dataclasses.replace(call, tools=tools), {
        "messages": [_message(each) for each in messages], "tools": tools.shown, "options": options}


def _constraint(form: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a response_format stands for. Raises ApiError."""
    if "json_schema" in given:
        raise ApiError(400, "response_format and json_schema are two names of one thing: give one", "response_format")
    if form.get("type") == "text":
        return {}
    if form.get("type") == "json_object":
        return {"json_schema": {"type": "object"}}
    schema = form.get("json_schema")
    if form.get("type") == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return {"json_schema": schema["schema"]}
    raise ApiError(400, f"response_format is not usable\n  got: {form!r:.80}\n  expected: the type text, json_object, "
                   "or json_schema with json_schema.schema", "response_format")


def _message(message: Any) -> Any:
    """A message whose content of several text parts is one text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, "a message is not an object with a role", "messages")
    content = message.get("content")
    if not isinstance(content, list):
        return readable_calls(message)
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ApiError(400, "a message has a part that is not text", "messages", "unsupported_value")
    return readable_calls({**message, "content": "".join(part["text"] for part in content)})


def _call(reader: Reader, llm: LLM, prompts: list[Prompt], top: int | None, echo: bool) -> Call:
    stream = reader.take("stream", bool, False)
    reader.refuse("best_of", "only n completions are made", reader.values.get("n", 1))
    options = Reader(reader.take("stream_options", dict, {}), frozenset(("include_usage",)))
    model = reader.take("model", str, "")
    reader.values.pop("user", None)
    try:
        params = SamplingParams(**{"temperature": 1.0, **llm.defaults, **reader.values, "logprobs": top})
    except RequestError as error:
        raise as_api_error(error) from None
    usage = options.take("include_usage", bool, False)
    return Call(model, prompts, samples(params), stream, usage, echo, top)


def read_embedding(body: Any) -> Reader:
    """Raises ApiError: a parameter is unknown, or input is missing."""
    reader = Reader(body, _EMBEDDING)
    if "input" not in reader.values:
        raise ApiError(400, "input is missing", "input")
    return reader
