"""Structured output: a random model whose tokens are bytes follows every grammar, beside requests without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from served import serving, tokens_of
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

SCHEMA = {"type": "object", "additionalProperties": False, "required": ["age", "colour", "sizes"], "properties": {
    "age": {"type": "integer", "minimum": 0, "maximum": 120}, "colour": {"enum": ["red", "blue"]},
    "sizes": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}}
ASKED: list[dict[str, Any]] = [
    {"regex": "[0-9]{3}-(a|b)+="}, {"choice": ["yes", "nobody"]}, {"json": SCHEMA},
    {"grammar": 'root ::= "<" item item ">"\nitem ::= "x" | "y" item'}]
LENGTH = 60


def follows(kind: str, asked: Any, text: str, ended: bool) -> bool:
    """Whether the text is of the grammar, or the beginning of one where the request reached its length."""
    if kind == "choice":
        return text in asked
    if kind == "json":
        found = json.loads(text)
        return (set(found) == {"age", "colour", "sizes"} and 0 <= found["age"] <= 120
                and found["colour"] in ("red", "blue") and [type(x) for x in found["sizes"]] == [bool, bool])
    whole, begun = {"regex": ("[0-9]{3}-[ab]+=", "[0-9]{3}-[ab]+"), "grammar": ("<y*xy*x>", "<y*(xy*)?")}[kind]
    return re.fullmatch(whole if ended else begun, text) is not None


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint directory of a model without weights, whose tokenizer has a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    directory: Path = tmp_path_factory.mktemp("bytes")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{x: i + 1 for i, x in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=len(letters) + 1, hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                eos_token_id=0, bos_token_id=None).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(("device", "options"), [
    ("cpu", {}), ("fake", {}), ("cpu", {"tensor_parallel_size": 2}), ("cpu", {"pipeline_parallel_size": 2})])
def test_structured_output_obeys_its_grammar(bytes_model: str, device: str, options: dict[str, Any]) -> None:
    free = SamplingParams(temperature=1.0, seed=9, max_tokens=LENGTH, ignore_eos=True)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=LENGTH,
                             structured_outputs=StructuredOutputsParams(**each)) for i, each in enumerate(ASKED)]
    with serving(device, model=bytes_model, load_format="dummy",
                 structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True}, **options) as llm:
        alone = tokens_of(llm.generate(["a"], free, use_tqdm=False))
        outputs = llm.generate(["a"] * 6, [free, *params, free], use_tqdm=False)
    assert tokens_of([outputs[0]]) == tokens_of([outputs[-1]]) == alone
    for asked, output in zip(ASKED, outputs[1:-1], strict=True):
        (kind, given), = asked.items()
        ended = output.outputs[0].finish_reason == "stop"
        assert follows(kind, given, output.outputs[0].text, ended), (asked, output.outputs[0].text)


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_masks_are_computed_after_the_forward_pass_is_submitted(bytes_model: str, device: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(device, model=bytes_model, load_format="dummy") as llm:
        core, events = llm.llm_engine.engine_core.engine_core, list[str]()
        ranks, scheduler = core.model_executor._hal, core.scheduler
        submit, masks = ranks.execute_model, scheduler.get_grammar_bitmask

        def execute_model(request: Any, sampling_follows: bool = False) -> Any:
            handle = submit(request, sampling_follows=sampling_follows)
            events.append("forward" if sampling_follows else "whole step")
            return handle

        def get_grammar_bitmask(step: Any) -> Any:
            found = masks(step)
            if found is not None:
                events.append("masks")
            return found

        monkeypatch.setattr(ranks, "execute_model", execute_model)
        monkeypatch.setattr(scheduler, "get_grammar_bitmask", get_grammar_bitmask)
        params = SamplingParams(max_tokens=3, structured_outputs=StructuredOutputsParams(regex="[0-9]{3}"))
        assert len(llm.generate(["a"], params, use_tqdm=False)[0].outputs[0].text) == 3
    assert events[:6] == ["forward", "masks"] * 3
