"""What a checkpoint says beside its weights is honoured: recommended sampling, vocabularies that differ, mixed dtypes,
windows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from hal import LLM, SamplingParams
from hal.checkpoints import generation
from hal.checkpoints.generation import recommended, stated
from hal.cli import main
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.errors import ModelLoadError, RequestError

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2], "transformers_version": "4.40"}


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    return shutil.copytree(BUNDLED_MODEL, tmp_path / "model")


def recommend(path: Path, **values: Any) -> None:
    old = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**old, **values}))


@pytest.mark.parametrize(("content", "expected"), [
    (LLAMA, {"temperature": 0.6, "top_p": 0.9}), ({"do_sample": True}, {"temperature": 1.0}),
    ({**LLAMA, "do_sample": False, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"temperature": 0.6, "max_new_tokens": 7}, {"max_tokens": 7}),
    ({"do_sample": True, "temperature": None, "top_k": -1, "top_p": None, "min_p": 0.1, "repetition_penalty": 1.0},
     {"temperature": 1.0, "min_p": 0.1}),
    ({"do_sample": True, "top_k": 20, "max_new_tokens": None, "do_sampel": 1}, {"temperature": 1.0, "top_k": 20})])
def test_recommended_values(tmp_path: Path, content: dict[str, Any], expected: dict[str, Any]) -> None:
    config = EngineConfig(model=str(tmp_path))
    assert recommended(config) == ({}, "")
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert recommended(config) == (expected, "")
    assert recommended(EngineConfig(model=str(tmp_path), generation_config="none")) == ({}, "")


def test_settings_that_requests_do_not_have_are_named(adder: Path, caplog: pytest.LogCaptureFixture,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(adder))
    assert recommended(config)[1] == ""
    recommend(adder, num_beams=4, no_repeat_ngram_size=0, typical_p=1.0, bad_words_ids=None, suppress_tokens=[])
    assert recommended(config)[1] == "num_beams=4"
    recommend(adder, no_repeat_ngram_size=1, num_beams=1, min_new_tokens=0)
    assert recommended(config)[1] == "no_repeat_ngram_size=1"
    recommend(adder, num_beams=4, no_repeat_ngram_size=3, stop_strings=["2"], do_sample=False)
    reads, read_json = list[Path](), generation.read_json
    monkeypatch.setattr(generation, "read_json", lambda path: (reads.append(path), read_json(path))[1])
    with LLM(str(adder), device="cpu", num_blocks=64) as llm:
        assert llm.generate("37+85=")[0].text == "122"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the model's generation_config.json asks for num_beams=4, no_repeat_ngram_size=3, stop_strings=['2'], which "
        "requests do not get"]
    assert reads == [adder / "generation_config.json"]
    caplog.clear()
    LLM(str(adder), device="cpu", num_blocks=64, generation_config="none").shutdown()
    assert not caplog.records


def test_values_are_stated_as_they_are() -> None:
    assert "sets temperature=0.65, max_tokens=1234567 where" in stated({"temperature": 0.65, "max_tokens": 1_234_567})


@pytest.mark.parametrize(("content", "named"), [
    ({"do_sample": True, "temperature": [1]}, "--generation-config none"),
    ({"do_sample": True, "temperature": -1}, "temperature"), ({"do_sample": True, "top_k": 1.5}, "top_k"),
    ({"do_sample": "yes"}, "do_sample"), ({"max_new_tokens": -1}, "max_tokens"), ([], "not a JSON object")])
def test_values_that_cannot_be_used_are_named(adder: Path, content: Any, named: str) -> None:
    (adder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelLoadError) as raised:
        LLM(str(adder), device="cpu", num_blocks=64)
    assert named in str(raised.value)


def test_requests_without_parameters_get_the_recommended_ones(adder: Path) -> None:
    recommend(adder, do_sample=True, temperature=5.0, top_k=9, max_new_tokens=6)
    chosen = SamplingParams(temperature=5.0, top_k=9, max_tokens=6)
    with LLM(str(adder), device="cpu", num_blocks=64, generation_config="none") as llm:
        assert llm.defaults == {}
        drawn = llm.generate("37+85=", chosen)[0].token_ids
        assert llm.generate("37+85=")[0].text == "122"
    with LLM(str(adder), device="cpu", num_blocks=64) as llm:
        assert llm.defaults == {"temperature": 5.0, "top_k": 9, "max_tokens": 6}
        assert llm.generate("37+85=")[0].token_ids == drawn  # the same number of the request, so the same seed
        assert llm.generate("37+85=", SamplingParams())[0].text == "122"  # what a caller gives holds as it is
        assert [output.text for output in llm.stream("37+85=", SamplingParams())][-1] == "122"


def test_the_command_line_states_what_it_takes_from_the_checkpoint(adder: Path, capsys: pytest.CaptureFixture[str],
                                                                   ) -> None:
    recommend(adder, do_sample=True, temperature=5.0, max_new_tokens=2)
    command = ["generate", "--device", "cpu", "--num-blocks", "64", "--model", str(adder), "37+85="]
    assert main([*command, "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == "12\n" and err.splitlines()[0] == (
        "hal: the model's generation_config.json sets max_tokens=2 where a request does not; --generation-config none "
        "leaves that out")
    assert main([*command, "--generation-config", "none"]) == 0
    out, err = capsys.readouterr()
    assert out == "122\n" and "generation_config" not in err


def test_a_token_that_the_model_does_not_have_is_refused(adder: Path) -> None:
    """The tokenizer has a token more than the embedding table has rows."""
    content = json.loads((adder / "tokenizer.json").read_text())
    new = {**content["added_tokens"][0], "id": 16, "content": "<new>", "special": False}
    content["added_tokens"].append(new)
    (adder / "tokenizer.json").write_text(json.dumps(content))
    with LLM(str(adder), device="cpu", num_blocks=64) as llm:
        with pytest.raises(RequestError, match="the tokenizer has a token that the model does not have"):
            llm.generate(["1+1=", "1<new>"])
        assert llm.generate("37+85=")[0].text == "122"


def test_a_token_that_the_tokenizer_does_not_have_shows_no_text(adder: Path) -> None:
    """The embedding table has more rows than the tokenizer has tokens, as where a table is padded to a round size."""
    config = json.loads((adder / "config.json").read_text())
    (adder / "config.json").write_text(json.dumps({**config, "vocab_size": 24}))
    tensors = load_file(adder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and len(tensor) == 16:
            tensors[name] = torch.cat((tensor, torch.zeros(8, tensor.shape[1], dtype=tensor.dtype)))
    save_file(tensors, adder / "model.safetensors", {"format": "pt"})
    with LLM(str(adder), device="cpu", num_blocks=64) as llm:
        assert llm.generate("37+85=")[0].text == "122"
        [output] = llm.generate("37+85=", SamplingParams(max_tokens=2, logit_bias={20: 1e9}))
    assert output.token_ids == [20, 20] and output.text == ""


def test_norms_in_fp32_and_matrices_in_bfloat16(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint whose norms are stored in another dtype than config.json says, on an engine of either dtype."""
    path = shutil.copytree(checkpoint("qwen3"), tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    mixed = {name: tensor if tensor.ndim == 1 else tensor.bfloat16() for name, tensor in stored.items()}
    save_file(mixed, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    prompt = checkpoints.prompts(1)[0]
    theirs = checkpoints.logprobs(checkpoints.load(path), prompt)
    with LLM(str(path), device="cpu", dtype="float32", num_blocks=64) as llm:
        [output] = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    found = [entry.logprob for entry in (output.prompt_logprobs or [])[1:] if entry is not None]
    torch.testing.assert_close(torch.tensor(found), theirs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])],
                               atol=1e-4, rtol=0)
    with LLM(str(path), device="cpu", num_blocks=64) as llm:
        assert llm.executor._worker.runner.dtype == torch.bfloat16  # type: ignore[attr-defined]
        norm = llm.executor._worker.runner.model.final_norm  # type: ignore[attr-defined]
        assert torch.equal(norm, mixed["model.norm.weight"].bfloat16())


def test_a_window_that_holds_the_whole_context_is_no_window(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Published checkpoints have windows that are longer than their context."""
    found = []
    for window in (100_000, None):
        path = shutil.copytree(checkpoint("mistral-window"), tmp_path / str(window))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
        with LLM(str(path), device="cpu", dtype="float32", num_blocks=64) as llm:
            found.append(llm.generate(checkpoints.prompts(2), SamplingParams(max_tokens=12)))
    assert [output.token_ids for output in found[0]] == [output.token_ids for output in found[1]]
