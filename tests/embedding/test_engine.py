"""Embeddings through the whole stack, against transformers in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import sentences
import torch

from hal import LLM
from hal.contracts.embedding import EmbeddingInput
from hal.embedding.runner import EmbeddingRunner
from hal.errors import BackendError, ConfigError, InputError, NumericsError, RequestError, StateError
from hal.sampling.params import SamplingParams

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return checkpoints.made_once(sentences.save, tmp_path_factory)


def engine(path: Path, **options: Any) -> LLM:
    small = {"dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 40}
    return LLM(str(path), device="cpu", **{**small, **options})


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("bert-mean", "gemma3-both") else
                                               pytest.mark.slow) for name in sentences.MODELS if name != "bert-cls"])
def test_vectors_are_those_of_transformers(make: Make, name: str) -> None:
    """In batches of several lengths, some equal, and the same whatever is in the batch."""
    texts = sentences.texts()
    with engine(make(name)) as llm:
        found = llm.embed(texts)
        alone = np.concatenate([llm.embed(text) for text in texts])
        assert llm.stats().steps > 3 + len(texts) and llm.stats().prefill_tokens == 2 * sum(map(len, texts))
    assert found.dtype == np.float32 and found.shape == (len(texts), 64)
    np.testing.assert_allclose(found, sentences.vectors(name, make(name), texts), atol=2e-6)
    np.testing.assert_allclose(found, alone, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [
    ("bert-mean", {"tp": 2, "wire": "request"}), ("qwen3-last", {"tp": 2}), ("gemma3-both", {"pp": 2})])
def test_in_processes(make: Make, name: str, layout: dict[str, Any]) -> None:
    texts = sentences.texts()
    with engine(make(name), **layout) as llm:
        found = llm.embed(texts)
    np.testing.assert_allclose(found, sentences.vectors(name, make(name), texts), atol=2e-6)


def test_dense_layers_follow_the_pooling(tmp_path: Path) -> None:
    path = sentences.save("bert-mean", tmp_path, dense=((48, "activation.Tanh"), (24, "linear.Identity")))
    texts = sentences.texts()
    with engine(path) as llm:
        found = llm.embed(texts)
    from safetensors.torch import load_file

    first, second = (load_file(path / f"{i}_Dense/model.safetensors") for i in (2, 3))
    x = torch.from_numpy(sentences.vectors("bert-mean", path, texts, normalise=False)).float()
    x = torch.tanh(x @ first["linear.weight"].T + first["linear.bias"]) @ second["linear.weight"].T
    assert found.shape == (len(texts), 24)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(x, dim=-1).numpy(), atol=2e-6)


def test_a_directory_without_normalisation_gives_raw_vectors(tmp_path: Path) -> None:
    path = sentences.save("bert-cls", tmp_path, normalise=False)
    texts = sentences.texts()
    with engine(path) as llm:
        np.testing.assert_allclose(llm.embed(texts), sentences.vectors("bert-cls", path, texts, normalise=False),
                                   atol=2e-5)


def test_pooling_makes_a_decoder_embed_and_none_lets_it_generate(make: Make, tmp_path: Path) -> None:
    texts, path = sentences.texts(), make("qwen3-last")
    with engine(path, pooling="none") as llm:
        assert len(llm.generate([5, 6, 7], SamplingParams(max_tokens=3))[0].token_ids) == 3
        with pytest.raises(RequestError, match="makes no embeddings"):
            llm.embed(texts)
    plain = sentences.save("qwen3-last", tmp_path)
    (plain / "modules.json").unlink()
    with engine(plain, pooling="last") as llm:
        np.testing.assert_allclose(llm.embed(texts), sentences.vectors("qwen3-last", path, texts), atol=2e-6)
        for call in (llm.generate, llm.stream, llm.add_request, llm.check):
            with pytest.raises(RequestError, match="generates no tokens"):
                call([5, 6])  # type: ignore[operator]


def test_long_texts_are_cut_or_refused(make: Make) -> None:
    text = sentences.texts()[4]
    with engine(make("bert-mean"), max_model_len=12, max_num_batched_tokens=64) as llm:
        np.testing.assert_array_equal(llm.embed(text), llm.embed(text[:12]))
        with pytest.raises(RequestError, match="longer than the model takes"):
            llm.embed([[5], text], truncate=False)
        with pytest.raises(RequestError, match="prompt 1: a token id is out of the vocabulary"):
            llm.embed([[5], [999]])
        with pytest.raises(RequestError, match="the prompt is empty"):
            llm.embed([[5], []])
        with pytest.raises(RequestError, match="no such prompt"):
            llm.embed([[5]], prompt_name="query")
        assert llm.embed([]).shape == (0, 64)  # refused texts have not ended the engine
    with engine(make("bert-mean"), max_num_batched_tokens=12) as llm, pytest.raises(RequestError, match="as a whole"):
        llm.embed(text)


def test_an_engine_starts_anew_and_counts_on(make: Make) -> None:
    texts = sentences.texts()
    with engine(make("bert-mean")) as llm:
        before, counted = llm.embed(texts), llm.stats()
        llm.restart()
        assert llm.stats() == counted and counted.steps > 0
        np.testing.assert_array_equal(llm.embed(texts), before)
        again = llm.stats()
        assert (again.steps, again.prefill_tokens) == (2 * counted.steps, 2 * counted.prefill_tokens)


def test_a_vector_that_is_not_finite_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(make("bert-mean")) as llm:
        runner = llm.executor._worker.runner  # type: ignore[attr-defined]
        runner.model.embed.weight.data[7] = float("nan")
        with pytest.raises(NumericsError, match="text 1 is not finite"):
            llm.embed([[5, 6], [5, 7], [8, 9]])
        assert llm.embed([[5, 6]]).shape == (1, 64)  # the engine is sound


def test_combinations_that_cannot_be_are_refused_at_construction(make: Make) -> None:
    with pytest.raises(BackendError, match="makes no embeddings"):
        LLM(str(make("bert-mean")), device="null")
    with pytest.raises(ConfigError, match="does not verify drafts"):
        engine(make("bert-mean"), speculate="ngram")
    with pytest.raises(ConfigError, match="several decode steps"):
        engine(make("bert-mean"), steps_per_message=4)


def test_a_request_that_is_lost_or_leaves_texts_is_refused(make: Make) -> None:
    with engine(make("bert-mean")) as llm:
        steps = llm.embedder.steps  # type: ignore[union-attr]
        llm.embed([[5, 6]])
        steps._digest += 1
        with pytest.raises(Exception, match="does not follow the one before it"):
            llm.embed([[5, 6]])
        assert isinstance(llm.health(), Exception)


@pytest.mark.parametrize(("field", "value", "match"), [
    ("seq_lens", [3, 4], "query_start_loc is inconsistent"), ("query_start_loc", [1, 3, 5], "query_start_loc"),
    ("positions", [0, 1, 2, 1, 1], "positions is inconsistent")])
def test_the_semantic_check_of_a_step(field: str, value: list[int], match: str) -> None:
    lens, tokens = np.array([3, 2]), np.arange(5, dtype=np.int32)
    EmbeddingRunner.pack(lens, tokens).to().check()
    EmbeddingRunner.pack(lens, tokens).padded(num_tokens=8).to().check()
    wrong: EmbeddingInput = EmbeddingRunner.pack(lens, tokens).to()
    setattr(wrong, field, torch.tensor(value, dtype=torch.int32))
    with pytest.raises(InputError, match=match):
        wrong.check()


def test_rows_that_do_not_enter_are_refused(make: Make) -> None:
    from hal.contracts.request import ExecuteModelRequest

    runner: Any = EmbeddingRunner.__new__(EmbeddingRunner)
    runner._next = 0, 0, 0
    none = np.zeros(0, np.int32)
    names = {f.name: none for f in ExecuteModelRequest.schema.fields if f.array and not f.optional}
    request = ExecuteModelRequest(**{**names, "step": 0, "rows": np.array([0], np.int32),
                                     "num_scheduled": np.array([1], np.int32)})
    with pytest.raises(StateError, match="texts that enter with it"):
        runner.follow(request)
