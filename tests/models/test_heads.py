"""Which table is the output head, with transformers as the oracle: every flag, every set of stored tables."""

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

from hal.checkpoints.hf_config import parse_config, read_config
from hal.checkpoints.loader import load_weights
from hal.config import Topology
from hal.contracts.communicator import LocalCommunicator
from hal.errors import ModelLoadError
from hal.models import build_model
from hal.models.causal_lm import CausalLM
from hal.models.ops import Ops

Make = Callable[[str, str, str], Path]
ONE = Topology()
HEAD = "lm_head.weight"
NAMES = {"llama2-mha": "model.embed_tokens.weight", "mistral-window": "model.embed_tokens.weight",
         "qwen2-tied": "model.embed_tokens.weight", "qwen3": "model.embed_tokens.weight",
         "gpt2": "transformer.wte.weight"}
FLAGS = ("true", "false", "absent")
STORED = ("embeddings", "head", "equal copies", "two tables", "neither")


@pytest.fixture
def make(checkpoint: Callable[[str], Path], tmp_path: Path) -> Make:
    """`make(name, flag, stored)`: a checkpoint with this tie_word_embeddings in config.json, and these tables."""

    def edited(name: str, flag: str, stored: str) -> Path:
        path = tmp_path / "checkpoint"
        shutil.copytree(checkpoint(name), path)
        config = json.loads((path / "config.json").read_text())
        config["tie_word_embeddings"] = flag == "true"
        if flag == "absent":
            del config["tie_word_embeddings"]
        (path / "config.json").write_text(json.dumps(config))
        tensors = load_file(path / "model.safetensors")
        embeddings = tensors.pop(NAMES[name])
        tensors.pop(HEAD, None)
        if stored in ("embeddings", "equal copies", "two tables"):
            tensors[NAMES[name]] = embeddings
        if stored in ("head", "equal copies"):
            tensors[HEAD] = embeddings.clone()
        if stored == "two tables":  # equal but for the last row, which a look at the first rows would not show
            tensors[HEAD] = embeddings.clone()
            tensors[HEAD][-1] += 1.0
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return edited


def load(path: Path, topology: Topology = ONE) -> CausalLM:
    model = build_model(read_config(path), topology, LocalCommunicator(), Ops(), torch.float32, torch.device("cpu"))
    load_weights(model, path)
    return model


def oracle(path: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """transformers' embeddings and head; None where it leaves one of them at random values."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True,
                                                       trust_remote_code=False)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tables = {"lm_head.weight", *NAMES.values()}
    return None if tables & set(info["missing_keys"]) else (embeddings.detach(), head.detach())


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", NAMES)
def test_tables_equal_those_of_transformers(make: Make, name: str, flag: str, stored: str) -> None:
    path = make(name, flag, stored)
    theirs = oracle(path)
    if theirs is None:
        with pytest.raises(ModelLoadError, match=r"lacks the tensor '(lm_head|embed_tokens|wte)\.weight'"):
            load(path)
        return
    ours = load(path)
    assert torch.equal(ours.embed.weight, theirs[0]) and torch.equal(ours.head.weight, theirs[1])
    assert (ours.embed.weight is ours.head.weight) == (theirs[0].data_ptr() == theirs[1].data_ptr())


@pytest.mark.parametrize("stored", ["embeddings", "head", "equal copies", "two tables"])
@pytest.mark.parametrize("name", ["llama2-mha", "gpt2"])
def test_ranks_have_the_tables_of_the_whole(make: Make, name: str, stored: str) -> None:
    path = make(name, "true", stored)
    whole, ranks = load(path), [load(path, Topology(2, 2, rank)) for rank in range(4)]
    vocab = checkpoints.VOCAB
    for table, parts in ((whole.embed.weight, [r.embed.weight for r in ranks[:2]]),
                         (whole.head.weight, [r.head.weight for r in ranks[2:]])):
        assert torch.equal(torch.cat(parts)[:vocab], table)
    assert not any(hasattr(rank, "head") for rank in ranks[:2])
    assert not any(hasattr(rank, "embed") for rank in ranks[2:])


@pytest.mark.parametrize("sharded", [False, True])
def test_engine_uses_the_stored_head(make: Make, sharded: bool, tmp_path: Path) -> None:
    from hal import LLM, SamplingParams

    path = make("llama2-mha", "true", "two tables")
    if sharded:
        checkpoints.shard(path, 3)
    prompt = checkpoints.prompts(1)[0]
    theirs = checkpoints.logprobs(checkpoints.load(path), prompt)
    with LLM(str(path), device="cpu", num_blocks=64) as llm:
        [out] = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert out.prompt_logprobs is not None
    for i, found in enumerate(out.prompt_logprobs[1:]):
        assert found is not None and abs(found.logprob - float(theirs[i, prompt[i + 1]])) < 1e-4


def test_a_configuration_read_without_the_weights_is_refused(make: Make) -> None:
    """A configuration ties embeddings and head, and the stored head differs: one of the two would be lost."""
    path = make("qwen2-tied", "true", "two tables")
    blind = parse_config(json.loads((path / "config.json").read_text()))
    model = build_model(blind, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("cpu"))
    with pytest.raises(ModelLoadError, match="head that differs from its embeddings"):
        load_weights(model, path)


@pytest.mark.parametrize("name", ["model.lm_head.weight", "transformer.lm_head.weight"])
def test_a_head_under_a_name_that_transformers_ignores_is_refused(make: Make, name: str) -> None:
    path = make("llama2-mha", "true", "embeddings")
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, name: tensors[NAMES["llama2-mha"]] * 2}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=name):
        load(path)


def test_flag_that_is_no_boolean_is_refused(make: Make) -> None:
    """As transformers 5 does; for GPT-2, whose default is true, a null could be meant either way."""
    path = make("gpt2", "true", "two tables")
    for value in (None, 0, "false"):
        data: dict[str, Any] = json.loads((path / "config.json").read_text())
        with pytest.raises(ModelLoadError, match="tie_word_embeddings"):
            parse_config({**data, "tie_word_embeddings": value})
