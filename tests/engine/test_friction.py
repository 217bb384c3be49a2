"""What a user meets first: names of models, a context that memory cannot hold, and checkpoints without a tokenizer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from hal import LLM, EngineConfig, SamplingParams
from hal.cli import main
from hal.config import BUNDLED_MODEL
from hal.errors import CapacityError, ModelLoadError


def test_a_hub_id_stands_for_its_files_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "models--someone--adder", "0123456789" * 4
    shutil.copytree(BUNDLED_MODEL, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    assert EngineConfig(model="someone/adder").model == str(folder / "snapshots" / commit)
    with LLM("someone/adder", device="cpu", num_blocks=64) as llm:
        assert llm.generate("37+85=")[0].text == "122"
    with pytest.raises(ModelLoadError, match="does not exist") as caught:
        LLM("someone/other", device="cpu")
    assert "hf download someone/other" in str(caught.value)
    with pytest.raises(ModelLoadError) as caught:
        LLM("/someone/other", device="cpu")
    assert caught.value.hint is None
    (tmp_path / "someone" / "adder").mkdir(parents=True)
    assert EngineConfig(model="someone/adder").model == "someone/adder"  # a folder of that name comes first


def test_a_context_that_memory_cannot_hold_is_shortened_where_nobody_asked_for_it(
        caplog: pytest.LogCaptureFixture) -> None:
    block = 16 * 2 * 4 * 4 * 32 * 4  # tokens, keys and values, layers, heads, head size, bytes of fp32
    given = {"device": "cpu", "dtype": "float32", "kv_cache_bytes": 21 * block}
    with caplog.at_level(logging.WARNING), LLM(**given) as llm:
        assert llm.max_model_len == 20 * 16 < llm.model_config.max_position
        [said] = [record.getMessage() for record in caplog.records if "context" in record.getMessage()]
        assert "320 tokens" in said and "512" in said and "\n" not in said
        [output] = llm.generate([[7] * 300], SamplingParams(max_tokens=100, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (20, "length")
        llm.restart()
        assert llm.max_model_len == 320
    for options in ({**given, "max_model_len": 512}, {**given, "kv_cache_bytes": 12 * block},
                    {"device": "cpu", "num_blocks": 21}):
        with pytest.raises(CapacityError, match="too small for one sequence"):
            LLM(**options)
    with LLM(device="cpu", max_model_len=256, num_blocks=17) as llm:
        assert llm.max_model_len == 256


def test_without_a_tokenizer_a_text_is_refused_by_name(checkpoint: Callable[[str], Path],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint("qwen3"))
    assert main(["generate", "--device", "cpu", "--num-blocks", "64", "--model", model, "hello"]) == 1
    error = capsys.readouterr().err
    assert "the model has no tokenizer" in error and "add tokenizer files to" in error
