"""Embeddings on a GPU, against transformers on the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentences

from hal import LLM


@pytest.mark.parametrize("name", ["bert-mean", "xlmr-sqrt", "qwen3-last", "mistral-last", "gemma3-both"])
def test_vectors_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    path, texts = sentences.save(name, tmp_path), sentences.texts()
    expected = sentences.vectors(name, path, texts)
    with LLM(str(path), device="cuda", dtype="float32", max_num_seqs=3, max_num_batched_tokens=40) as llm:
        np.testing.assert_allclose(llm.embed(texts), expected, atol=1e-5)
    with LLM(str(path), device="cuda", dtype="bfloat16") as llm:
        assert sentences.cosines(llm.embed(texts), expected).min() > 0.98


def test_trained_weights() -> None:
    """At least 0.9999 in fp32, as on the CPU."""
    path = sentences.minilm()
    reference = sentences.minilm_vectors(path)
    with LLM(str(path), device="cuda", dtype="float32") as llm:
        sentences.check_minilm(llm, reference)
    with LLM(str(path), device="cuda", dtype="bfloat16") as llm:
        assert sentences.cosines(llm.embed(sentences.english()), reference).min() > 0.99
