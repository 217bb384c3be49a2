"""Sentence-transformers directories: what is read, and what is refused when an engine is made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentences

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.errors import ModelLoadError

Edit = Callable[[dict[str, Any]], object]
MODULE = "sentence_transformers.models."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentences.save("bert-mean", tmp_path_factory.mktemp("saved"), dense=((8, "activation.Tanh"),))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def module(kind: str, path: str = "x", idx: int = 9) -> dict[str, Any]:
    return {"idx": idx, "name": str(idx), "path": path, "type": kind}


def test_everything_that_a_directory_says(directory: Path) -> None:
    sentences.write(directory / "config_sentence_transformers.json", {
        "prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"})
    sentences.write(directory / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True})
    config = read_config(directory)
    found = config.embedding
    assert found is not None and not config.causal
    assert (found.pooling, found.normalise, found.max_length, found.default_prompt) == ("mean", True, 32, "query")
    assert found.prompts == {"query": "query: ", "document": ""} and found.lower_case and found.strip
    [dense] = found.dense
    assert (dense.in_size, dense.out_size, dense.bias, dense.activation) == (64, 8, True, "tanh")
    assert found.dim(64) == 8
    whole = WorkerConfig(EngineConfig(), config, Topology())
    assert WorkerConfig.from_json(whole.to_json()) == whole
    (directory / "sentence_bert_config.json").unlink()
    assert read_config(directory).embedding.max_length == 48  # type: ignore[union-attr]
    sentences.write(directory / "tokenizer_config.json", {"model_max_length": 20})
    assert read_config(directory).embedding.max_length == 20  # type: ignore[union-attr]
    sentences.write(directory / "1_Pooling/config.json", {"embedding_dimension": 64, "pooling_mode": "lasttoken"})
    assert read_config(directory).embedding.pooling == "last"  # type: ignore[union-attr]
    assert read_config(directory, pooling="cls").embedding.pooling == "cls"  # type: ignore[union-attr]


MODEL, POOL = module(MODULE + "Transformer", "", 0), module(MODULE + "Pooling", "1_Pooling", 1)
MEAN = {"pooling_mode_mean_tokens": True}


@pytest.mark.parametrize(("file", "value", "match"), [
    ("modules.json", {"a": 1}, "modules.json cannot be read"),
    ("modules.json", [{"idx": 0}], "modules.json cannot be read"),
    ("modules.json", [], "order that is not supported"),
    ("modules.json", [MODEL, module(MODULE + "CNN")], "not known.*CNN"),
    ("modules.json", [MODEL, module("mine.Pooling")], "not known.*mine.Pooling"),
    ("modules.json", [MODEL, module(MODULE + "Pooling", "../x")], "outside the checkpoint"),
    ("modules.json", [module(MODULE + "Transformer", "0_Transformer", 0), POOL], "folder of its own"),
    ("modules.json", [MODEL, module(MODULE + "Normalize")], "order that is not supported"),
    ("modules.json", [MODEL, POOL, module(MODULE + "Normalize", "n", 2), module(MODULE + "Dense", "2_Dense", 3)],
     "order that is not supported"),
    ("modules.json", [MODEL, module(MODULE + "Pooling", "elsewhere")], "settings are missing.*elsewhere/config.json"),
    ("modules.json", [MODEL, POOL, module(MODULE + "Dense", "3_Dense")], "settings are missing.*3_Dense/config.json"),
    ("1_Pooling/config.json", {"word_embedding_dimension": 63, **MEAN}, "does not belong to this model"),
    ("1_Pooling/config.json", {**MEAN, "pooling_mode_cls_token": True}, "does not choose one pooling"),
    ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": "yes"}, "pooling_mode_mean_tokens .* is not usable"),
    ("1_Pooling/config.json", {"pooling_mode": "sum"}, "pooling_mode .* is not usable"),
    ("1_Pooling/config.json", {**MEAN, "include_prompt": False}, "prompt's tokens"),
    ("2_Dense/config.json", {"in_features": 63, "out_features": 8}, "does not fit"),
    ("2_Dense/config.json", {"in_features": 64, "out_features": 8, "activation_function": "torch.nn.SELU"}, "SELU"),
    ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts .* is not usable"),
    ("config_sentence_transformers.json", {"default_prompt_name": "a"}, "default_prompt_name .* is not usable"),
    ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length .* is not usable")])
def test_what_is_wrong_is_named(directory: Path, file: str, value: Any, match: str) -> None:
    sentences.write(directory / file, value)
    with pytest.raises(ModelLoadError) as caught:
        read_config(directory)
    assert re.search(match, str(caught.value).replace("\n", " "))


@pytest.mark.parametrize(("edit", "match"), [
    (lambda tensors: tensors.pop("linear.bias"), "other tensors than its config.json says"),
    (lambda tensors: tensors.update({"linear.bias": tensors["linear.bias"][:3].clone()}), "wrong shape")])
def test_a_dense_layer_with_other_weights_is_refused(directory: Path, edit: Edit, match: str) -> None:
    from safetensors.torch import load_file, save_file

    from hal import LLM

    path = directory / "2_Dense/model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelLoadError, match=match):
        LLM(str(directory), device="cpu", dtype="float32")


def test_a_model_that_says_nothing_of_its_pooling_is_refused(directory: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot generate"):
        read_config(directory, pooling="none")
    (directory / "modules.json").unlink()
    with pytest.raises(ModelLoadError, match=r"does not say how its hidden states"):
        read_config(directory)
    found = read_config(directory, pooling="mean").embedding
    assert found is not None and found.normalise and not found.dense


@pytest.mark.slow
def test_the_transformers_backend_makes_no_embeddings(directory: Path) -> None:
    sentences.write(directory / "config.json", {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"})
    with pytest.raises(ModelLoadError, match="Transformers backend makes no embeddings"):
        read_config(directory, weights=False)


@pytest.mark.parametrize("options", [{"is_decoder": True}, {"position_embedding_type": "relative_key"},
                                     {"hidden_act": "silu"}, {"num_attention_heads": 5}], ids=str)
def test_encoders_that_are_not_supported_are_refused(directory: Path, options: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    sentences.write(directory / "config.json", {**config, **options})
    with pytest.raises(ModelLoadError, match=next(iter(options)) + "|not supported"):
        read_config(directory)
