"""Tool calls: OpenAI's tools and tool_choice as a constraint of the output, and the calls that a model's text holds."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from hal.serve.errors import ApiError


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models writes tool calls: a marker, and behind it a JSON object or a list of them.

    Attributes:
        marker: "" where a call begins with its JSON, at the beginning of the output or behind another call.
        end: what may follow a call. arguments: the key of the arguments beside "name".
        head: what may stand between the marker and the first brace. Where its group `name` is there, the JSON behind
            it is the arguments alone.
    """

    marker: str
    end: str = ""
    arguments: str = "arguments"
    head: re.Pattern[str] = re.compile(r"[\s;]*(?P<list>\[\s*)?")


FORMATS = {
    "hermes": Format("<tool_call>", "</tool_call>"),
    "mistral": Format("[TOOL_CALLS]", head=re.compile(
        r"\s*(?P<list>\[\s*)?(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*)?")),
    "llama3_json": Format("", arguments="parameters"),
}
_NOT_JSON = "<function=", "<arg_key>"  # families that write other things behind <tool_call>


def format_of(parser: str, template: Any) -> Format | None:
    """The format of a parser's name; of "auto", the one of which a chat template speaks, or None."""
    text = str(template)  # there may be several templates by names
    if parser == "auto":
        parser = ("hermes" if "<tool_call>" in text and not any(other in text for other in _NOT_JSON) else
                  "mistral" if "[TOOL_CALLS]" in text else "llama3_json" if '"parameters": ' in text else "none")
    return FORMATS.get(parser)


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says about tools.

    Attributes:
        shown: to the template; None: no tools. names: that calls may have. form: in which calls are looked for; None:
            the text is left as it is. schema: of the whole output, where it must be calls. several: more than one call
            may be given.
    """

    shown: list[Any] | None = None
    names: frozenset[str] = frozenset()
    form: Format | None = None
    schema: dict[str, Any] | None = None
    several: bool = True


def read_tools(tools: list[Any] | None, choice: Any, several: bool, form: Format | None) -> Tools:
    """Args: form: of the model. Raises ApiError: a tool or the choice is not usable."""
    known = dict(_function(tool) for tool in tools or ())
    if choice in (None, "auto", "none"):
        return Tools(tools, frozenset(known), form, None, several) if known and choice != "none" else Tools()
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        known, several = {name: known[name] for name in [name] if name in known}, False
    if not known:
        raise ApiError(400, f"tool_choice is not usable\n  got: {choice!r:.200}\n  expected: none, auto, or with tools "
                       'required or {"type": "function", "function": {"name": ...}} of one of them', "tool_choice")
    bare = Format("", arguments="arguments" if form is None else form.arguments)
    return Tools(tools, frozenset(known), bare, _schema(known, bare.arguments, several), several)


def _function(tool: Any) -> tuple[str, dict[str, Any]]:
    """A tool's name, and the schema of its arguments. Raises ApiError."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name, schema = (function.get("name"), function.get("parameters")) if isinstance(function, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(schema or {}, dict):
        raise ApiError(400, f"a tool is not usable\n  got: {tool!r:.200}\n  expected: an object with the type "
                       '"function", and a function with a name and parameters (a JSON schema)', "tools")
    return name, schema or {"type": "object", "additionalProperties": False}


def _schema(known: dict[str, Any], arguments: str, several: bool) -> dict[str, Any]:
    """The schema of a call of one of these functions, or of a list of calls."""
    call = {"anyOf": [{"type": "object", "properties": {"name": {"const": name}, arguments: {"$ref": f"#/$defs/{i}"}},
                       "required": ["name", arguments], "additionalProperties": False} for i, name in enumerate(known)]}
    defs = {str(i): _moved(schema, f"#/$defs/{i}") for i, schema in enumerate(known.values())}
    return {**({"type": "array", "items": call, "minItems": 1} if several else call), "$defs": defs}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself hold at another place of a document."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: root + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else
            _moved(value, root) for key, value in schema.items()}


def readable_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool_calls have their arguments as objects, as templates take them. Raises ApiError."""
    if not message.get("tool_calls"):
        return message
    try:
        calls = [{**call, "function": {**call["function"], "arguments": _object(call["function"].get("arguments"))}}
                 for call in message["tool_calls"]]
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ApiError(400, f"the tool_calls of a message are not usable: {type(error).__name__}: {error}",
                       "messages") from None
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


def _object(arguments: Any) -> Any:
    return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments


class CallReader:
    """Divides an output that grows into text and calls. How it grows changes neither. A call is given when it is whole.
    Text that begins as a call and is none stays text: it is shown when that is seen, or else when the output ends.
    Spaces beside calls are no text."""

    def __init__(self, tools: Tools) -> None:
        assert tools.form is not None
        self._tools, self._form = tools, tools.form
        self._rest = self._spaces = ""  # the part that is not yet divided, and spaces before it that are not yet shown
        self._fresh = True  # at the beginning, or behind a call
        self._waits = False  # for the rest of a call
        self.count = 0  # calls so far

    def read(self, new: str, done: bool) -> tuple[str, list[dict[str, Any]]]:
        """Take the next part of the output. Returns the text and the calls that are certain now.

        Args:
            done: it is the last part.
        """
        self._rest += new
        text, calls, marker = "", list[dict[str, Any]](), self._form.marker
        may_end = done or any(end in new for end in "}]>")  # otherwise no call has become whole
        while self._rest:
            at = self._rest.find(marker) if marker or self._fresh else -1
            if at < 0:
                held = 0 if done else max(n for n in range(len(marker) or 1) if self._rest.endswith(marker[:n]))
                text += self._take(len(self._rest) - held)
                break
            text += self._take(at)
            found = self._calls(done) if may_end or not self._waits else None
            self._waits = found is None and "{" in self._rest
            if found is None and not done:
                break
            self._fresh = bool(found)
            if found:
                self._rest = self._rest[found[0]:]
                calls += found[1]
            else:
                text += self._take(len(marker))
        first, self.count = self.count, self.count + len(calls)
        given = [{"index": i, **call} for i, call in enumerate(calls, first) if self._tools.several or not i]
        return text + (self._spaces if done and not self.count else ""), given

    def _take(self, size: int) -> str:
        """Remove text from the rest. Spaces at its end are kept until other text follows."""
        text, self._rest = self._spaces + self._rest[:size], self._rest[size:]
        self._spaces = text[len(text.rstrip()):]
        return text.rstrip()

    def _calls(self, done: bool) -> tuple[int, list[dict[str, Any]]] | tuple[()] | None:
        """The calls with which the rest begins, and the size of their text. (): there are none. None: it is not known.
        """
        rest, form = self._rest, self._form
        head = form.head.match(rest, len(form.marker))
        assert head is not None
        at, name = head.end(), head.groupdict().get("name")
        if at == len(rest) or (name and rest[at] == "[" and "{" not in rest):
            return None
        if rest[at] != "{":
            return ()
        try:
            value, size = json.JSONDecoder().raw_decode(rest, head.start("list") if head["list"] else at)
        except (ValueError, RecursionError):
            return None
        after = rest[size:].lstrip()
        if form.end and form.end.startswith(after) and after != form.end and not done:
            return None
        if form.end and after.startswith(form.end):
            size = len(rest) - len(after) + len(form.end)
        several = [{"name": name, "arguments": value}] if name else value if isinstance(value, list) else [value]
        calls = [self._call(each) for each in several]
        return (size, [call for call in calls if call is not None]) if None not in calls else ()

    def _call(self, value: Any) -> dict[str, Any] | None:
        """OpenAI's form of a call; None: it calls none of the tools."""
        name, arguments = (value.get("name"), value.get("arguments", value.get("parameters"))) if isinstance(
            value, dict) else (None, None)
        if not isinstance(name, str) or name not in self._tools.names or not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, RecursionError):  # Python reads NaN and half surrogates, and JSON in UTF-8 has neither
            return None
        # Templates of Mistral take ids of nine letters and digits alone.
        return {"id": uuid.uuid4().hex[:9], "type": "function", "function": {"name": name, "arguments": text}}
