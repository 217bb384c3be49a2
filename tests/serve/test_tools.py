"""Tool calls: the texts of models that hold them, in any pieces, and OpenAI's tools through its client."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hal.engine.tiny import save_tiny
from hal.serve.tools import FORMATS, CallReader, Tools, format_of

sys.path.insert(0, str(Path(__file__).parent))
openai = pytest.importorskip("openai", reason="needs the extra `serve` and the package openai")
pytest.importorskip("llguidance", reason="needs the extra `constrained`")
from http_server import Serving, serving  # noqa: E402 (it needs them as well)

NAMES = frozenset(("add", "get_weather"))
CALL = '{"name": "add", "arguments": {"a": 1, "b": "}</tool_call> [TOOL_CALLS]"}}'
LLAMA = '{"name": "get_weather", "parameters": {"city": "Zürich", "when": {}}}'


def read(parser: str, pieces: list[str], *, several: bool = True) -> tuple[str, list[tuple[str, Any]]]:
    reader, text, calls = CallReader(Tools([], NAMES, FORMATS[parser], None, several)), "", list[dict[str, Any]]()
    for i, piece in enumerate(pieces):
        new, found = reader.read(piece, done=i == len(pieces) - 1)
        text, calls = text + new, calls + found
    assert [call["index"] for call in calls] == list(range(len(calls)))
    assert len({call["id"] for call in calls}) == len(calls) and all(len(call["id"]) == 9 for call in calls)
    return text, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


FIRST = "add", {"a": 1, "b": "}</tool_call> [TOOL_CALLS]"}
SECOND = "get_weather", {"city": "Zürich", "when": {}}
WITH_SPACES = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.mark.parametrize(("parser", "text", "shown", "calls"), [
    ("hermes", WITH_SPACES, "", [FIRST]),
    ("hermes", f"I look.\n{WITH_SPACES}\n<tool_call>[{LLAMA}]</tool_call>\n", "I look.", [FIRST, SECOND]),
    ("hermes", f"<tool_call>{CALL} and more", " and more", [FIRST]),  # without its end
    ("hermes", f"<tool_call>{CALL}</tool", "</tool", [FIRST]),
    ("hermes", f"<tool_call>no</tool_call> {WITH_SPACES}.", "<tool_call>no</tool_call> .", [FIRST]),
    ("hermes", f"<tool_call>{CALL[:-1]}</tool_call> x{WITH_SPACES} ", f"<tool_call>{CALL[:-1]}</tool_call> x", [FIRST]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>\n', None, []),  # no tool of the request
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 9000, None, []),
    ("hermes", "1 < 2 <tool_ca", None, []), ("hermes", "  \n", None, []), ("hermes", CALL, None, []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {LLAMA}]", "", [FIRST, SECOND]),
    ("mistral", f"Well: [TOOL_CALLS]add{json.dumps(FIRST[1])}[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS]"
                f"{json.dumps(SECOND[1])}", "Well:", [FIRST, SECOND]),
    ("mistral", f"[TOOL_CALLS] [{CALL}, 3]", None, []), ("mistral", "[TOOL_CALLS]get_weather[ARGS", None, []),
    ("mistral", "[TOOL_CALLS] what {is} this", None, []),
    ("llama3_json", f" {LLAMA}; {LLAMA}\n", "", [SECOND, SECOND]), ("llama3_json", f"{LLAMA} So.", " So.", [SECOND]),
    ("llama3_json", f"So: {LLAMA}", None, []), ("llama3_json", '{"name": "add"} {"a": 2}', None, []),
    ("llama3_json", f"{LLAMA}; {{", "; {", [SECOND]), ("llama3_json", "[1, 2]", None, [])])
def test_calls_are_found_and_other_text_is_kept(parser: str, text: str, shown: str | None, calls: list[Any]) -> None:
    expected = text if shown is None else shown, calls
    assert read(parser, [text]) == expected == read(parser, [*text, ""])


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(
    ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "add", CALL, LLAMA, f"[{CALL}, {LLAMA}]", "{", "}", "[",
     "]", ";", " ", "\n", '"', '{"a": 1}', CALL[:20], "<tool", "_call>", "text", "é")), max_size=12), st.data())
def test_how_a_stream_is_divided_changes_nothing(parser: str, parts: list[str], data: st.DataObject) -> None:
    whole = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    text, calls = read(parser, [whole])
    assert read(parser, pieces) == (text, calls) == read(parser, [*whole, ""])
    assert read(parser, pieces, several=False) == (text, calls[:1])
    if not calls:
        assert text == whole
    letters = iter(whole)
    assert all(letter in letters for letter in text)  # its letters, in their order


def test_a_text_that_begins_no_call_is_shown_at_once() -> None:
    for parser, text in (("hermes", "see <tool_call><function=f>"), ("mistral", "[INST] 1"), ("llama3_json", "Hello")):
        reader = CallReader(Tools([], NAMES, FORMATS[parser]))
        assert "".join(reader.read(letter, False)[0] for letter in text) == text


@pytest.mark.parametrize(("template", "parser"), [
    ("... within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>", "hermes"),
    ("<tool_call>\n<function=example>", None), ("<tool_call>{function-name}\n<arg_key>", None),
    ("{{ '[TOOL_CALLS] [' }}", "mistral"), ("{{ '\"parameters\": ' }}", "llama3_json"), ("{{ messages }}", None),
    ({"default": "{{ messages }}", "tool_use": "<tool_call>"}, "hermes"), (None, None)])
def test_the_template_says_how_calls_are_written(template: Any, parser: str | None) -> None:
    assert format_of("auto", template) == (None if parser is None else FORMATS[parser])
    assert format_of("none", template) is None and format_of("mistral", template) is FORMATS["mistral"]


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Zürich", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"], "additionalProperties": False, "$defs": {"days": {"enum": [1, 2]}}}}}
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}}}
NOW = {"type": "function", "function": {"name": "now"}}
HERMES = ("{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
          "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}|{% endfor %}")
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]")
ASK: Any = [{"role": "user", "content": "The weather?"}]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A random model whose tokens are bytes. [TOOL_CALLS] is a special token, and <tool_call> one that is shown."""
    folder = tmp_path_factory.mktemp("bytes")
    made = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("[TOOL_CALLS]", special=True)])
    made.add_tokens([AddedToken("<tool_call>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)
    save_tiny(LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=None,
                          eos_token_id=256), folder)
    with serving(str(folder), device="cpu", num_blocks=300, max_num_seqs=8) as server:
        yield server


def ask(here: Serving, template: str = HERMES, **options: Any) -> Any:
    """The choice, after the streamed one was found to be the same."""
    here.engine.llm.tokenizer.chat_template = template
    options = {"model": "", "messages": ASK, "tools": [WEATHER, ADD], "seed": 3, "temperature": 1.5, **options}
    whole = here.client.chat.completions.create(**options).choices[0]
    text, calls, reason = "", dict[int, Any](), None
    for chunk in here.client.chat.completions.create(**options, stream=True):
        choice = chunk.choices[0]
        text, reason = text + (choice.delta.content or ""), choice.finish_reason
        for call in choice.delta.tool_calls or ():
            calls[call.index] = call
    made = whole.message.tool_calls or []
    assert text == (whole.message.content or "") and reason == whole.finish_reason
    assert [(i, call.function.name, call.function.arguments) for i, call in calls.items()] == [
        (i, call.function.name, call.function.arguments) for i, call in enumerate(made)]
    assert all(call.type == "function" and len(call.id) == 9 for call in (*made, *calls.values()))
    return whole


def called(choice: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]


@pytest.mark.slow
@pytest.mark.parametrize("template", [HERMES, MISTRAL, HERMES.replace("<tool_call>", '"parameters": ')])
def test_required_and_named_choices_constrain_the_output(here: Serving, template: str) -> None:
    weather = [{"city": city, "days": days} for city in ("Zürich", "Oslo") for days in (1, 2)]
    named = ask(here, template, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    (name, arguments), = called(named)
    assert name == "get_weather" and arguments in weather
    assert named.finish_reason == "tool_calls" and named.message.content is None
    required = ask(here, template, tool_choice="required", max_tokens=900)
    assert called(required) and all((name == "add" and arguments == {"a": 1}) or arguments in weather
                                    for name, arguments in called(required)) and not required.message.content
    one = ask(here, template, tool_choice="required", parallel_tool_calls=False, tools=[NOW])
    assert called(one) == [("now", {})]
    cut = ask(here, template, tool_choice="required", max_tokens=9)
    assert cut.finish_reason == "length" and not cut.message.tool_calls and len(cut.message.content) == 9


@pytest.mark.slow
def test_the_model_decides_and_its_calls_are_found(here: Serving) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    text = json.dumps(f"I look.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>{call}</tool_call>")
    forced = {"extra_body": {"grammar": f"start: {text}"}}
    choice = ask(here, **forced)
    assert choice.message.content == "I look." and called(choice) == [("add", {"a": 1})] * 2
    assert choice.finish_reason == "tool_calls"
    assert called(ask(here, parallel_tool_calls=False, **forced)) == [("add", {"a": 1})]
    for options in ({"tool_choice": "none"}, {"tools": [WEATHER]}, {"template": "{{ messages }}"}):
        left = ask(here, **{**forced, **options})  # type: ignore[arg-type]
        assert left.message.content == json.loads(text) and left.finish_reason == "stop" and not left.message.tool_calls
    marker = here.engine.llm.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    special = {"extra_body": {"grammar": f"start: <[{marker}]> {json.dumps(f'[{call}]')}"}}
    assert called(ask(here, MISTRAL, **special)) == [("add", {"a": 1})]
    assert ask(here, **special).message.content == f"[{call}]"  # special tokens are hidden as ever


def test_calls_and_their_results_are_taken_back(here: Serving) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    history = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "abcdefghi", "content": [{"type": "text", "text": "snow"}]}]
    here.engine.llm.tokenizer.chat_template = HERMES
    made = here.client.chat.completions.create(model="", messages=history, max_tokens=1)
    assert made.usage.prompt_tokens == len("user:The weather?|assistant:Oslo|tool:snow|")
    for calls in ("x", [3], [{"id": "a"}], [{"function": {"name": "add", "arguments": "{"}}]):
        wrong: Any = [{"role": "assistant", "content": None, "tool_calls": calls}]
        with pytest.raises(openai.BadRequestError, match="tool_calls of a message") as caught:
            here.client.chat.completions.create(model="", messages=wrong)
        assert caught.value.param == "messages"


@pytest.mark.parametrize(("options", "param"), [
    ({"tools": [3]}, "tools"), ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}], "tool_choice": 3}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "what"}}}],
      "tool_choice": "required"}, "json_schema")])
def test_tools_that_are_not_usable_are_refused(here: Serving, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        here.client.chat.completions.create(model="", messages=ASK, **options)
    assert caught.value.param == param
