"""Random JSON schemas: every output is a document that the schema allows, whatever the model would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hal import LLM, SamplingParams
from hal.engine.tiny import save_tiny

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema and the extra `constrained`")

NAMES = st.text("abcdefé \"\\{}0_", min_size=1, max_size=6)
SCALARS = st.one_of(
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-300, 300), st.integers(0, 4000)),
    st.builds(lambda low, high: {"type": "string", "minLength": low, "maxLength": low + high},
              st.integers(0, 3), st.integers(0, 6)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{2}-[0-9]{3}$"},
                     {"type": "string", "format": "date"}, {"type": "string", "format": "uuid"},
                     {"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.25}]),
    st.builds(lambda values: {"enum": values},
              st.lists(st.one_of(NAMES, st.integers(-99, 99), st.booleans(), st.none()), min_size=1, max_size=4,
                       unique_by=repr)),
    st.builds(lambda value: {"const": value}, st.one_of(NAMES, st.lists(st.integers(0, 9), max_size=2))))


def _object(properties: dict[str, Any], optional: int) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)[optional:],
            "additionalProperties": False}


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
                  inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_object, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3)))


SCHEMAS = st.one_of(st.recursive(SCALARS, _nested, max_leaves=6), st.builds(
    lambda of: {"$defs": {"it": of}, "type": "array", "items": {"$ref": "#/$defs/it"}, "maxItems": 2}, SCALARS))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with a tokenizer of GPT-2's kind, trained on Python, so that tokens cross the places of JSON."""
    folder = tmp_path_factory.mktemp("json")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    texts += [json.dumps({"name": [i, True, None, {"date": "2026-11-27", "a b": i / 4}]}) for i in range(200)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<end>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)
    eos = [made.token_to_id("<eos>"), made.token_to_id("<end>")]
    save_tiny(LlamaConfig(vocab_size=720, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
                          bos_token_id=None, eos_token_id=eos), folder)
    with LLM(folder, device="cpu", max_num_seqs=20, num_blocks=1400) as llm:
        assert any('"' in name and len(name) > 2 for name in made.get_vocab())
        yield llm


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
@given(schemas=st.lists(SCHEMAS, min_size=20, max_size=20))
def test_a_hundred_random_schemas(llm: LLM, schemas: list[dict[str, Any]]) -> None:
    params = [SamplingParams(json_schema=schema, max_tokens=1000, temperature=(0.0, 1.0, 3.0)[i % 3], seed=i)
              for i, schema in enumerate(schemas)]
    for schema, output in zip(schemas, llm.generate(["Answer: "] * 20, params), strict=True):
        assert output.finish_reason == "stop", (schema, output.text)
        jsonschema.validate(json.loads(output.text), schema)


def test_json_as_an_object_with_whitespace_of_its_own(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}}, "required": ["a", "b"],
              "additionalProperties": False}
    own = {**schema, "x-guidance": {"item_separator": ",", "key_separator": ":", "whitespace_flexible": False}}
    plain, close = llm.generate(["x", "x"], [SamplingParams(json_schema=schema), SamplingParams(json_schema=own)])
    assert (plain.text, close.text) == ('{"a": 1, "b": 2}', '{"a":1,"b":2}')
