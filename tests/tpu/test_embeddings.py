"""Embeddings on XLA's CPU client, against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentences

from hal.engine.llm import LLM

pytestmark = [pytest.mark.torch_release, pytest.mark.usefixtures("xla")]
_SCRIPT = """
import json, sys
from hal.engine.llm import LLM
path, texts = json.loads(sys.argv[1])
with LLM(path, device="runners.tpu:backend", dtype="float32", tp=2, max_num_batched_tokens=40) as llm:
    print(json.dumps(llm.embed(texts).tolist()))
"""


@pytest.mark.parametrize(("name", "count"), [("bert-mean", 3), *(
    pytest.param(name, 8, marks=pytest.mark.slow) for name in ("bert-mean", "roberta-max", "xlmr-sqrt", "qwen3-last",
                                                               "gemma3-both"))])
def test_vectors_are_those_of_transformers(tmp_path: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch,
                                           ) -> None:
    """Texts that fill a shape change nothing, and a shape is compiled once."""
    monkeypatch.setenv("HAL_COMPILE_BUDGET", "0")
    path, texts = sentences.save(name, tmp_path), sentences.texts()[:count]
    with LLM(str(path), device="runners.tpu:backend", dtype="float32", max_num_seqs=3,
             max_num_batched_tokens=40) as llm:
        found = llm.embed(texts)
        runner = llm.executor._worker.runner  # type: ignore[attr-defined]
        shapes, late = len(runner.programs), runner.late
        np.testing.assert_array_equal(llm.embed(texts), found)
        assert late == runner.late >= shapes >= 2 - (count < 8) and runner.uncompiled == len(runner.plan) - shapes
    np.testing.assert_allclose(found, sentences.vectors(name, path, texts), atol=1e-5)


def test_every_legal_step_has_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of random lengths, as the engine puts them into steps, fit one shape of the plan each, in which every token
    keeps its place."""
    monkeypatch.setenv("HAL_COMPILE_BUDGET", "0")
    path, generator = sentences.save("bert-mean", tmp_path), np.random.default_rng(0)
    with LLM(str(path), device="runners.tpu:backend", dtype="float32", max_num_seqs=7,
             max_num_batched_tokens=101) as llm:
        steps, runner = llm.embedder.steps, llm.executor._worker.runner  # type: ignore[attr-defined, union-attr]
        for _ in range(200):
            texts = [[5] * n for n in generator.integers(1, 49, generator.integers(1, 30)).tolist()]
            for batch in steps._batches(texts):
                lens = np.array([len(texts[i]) for i in batch])
                packed = runner.lay_out(lens, np.arange(lens.sum(), dtype=np.int32))
                made = packed.to()
                made.check()
                rows = made.input_ids.view(len(made.seq_lens), -1)
                real = [row[:n] for row, n in zip(rows, made.seq_lens, strict=True)]
                assert np.concatenate(real).tolist() == list(range(lens.sum()))


@pytest.mark.slow
def test_shares_of_one_process(tmp_path: Path) -> None:
    path, texts = sentences.save("bert-mean", tmp_path), sentences.texts()
    environment = os.environ | {"CPU_NUM_DEVICES": "2", "HAL_STRICT": "1", "HAL_COMPILE_BUDGET": "0"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT, json.dumps([str(path), texts])], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_allclose(found, sentences.vectors("bert-mean", path, texts), atol=1e-5)


@pytest.mark.slow
def test_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_COMPILE_BUDGET", "0")
    path = sentences.minilm()
    with LLM(str(path), device="runners.tpu:backend", dtype="float32", max_num_seqs=16,
             max_num_batched_tokens=1024) as llm:
        sentences.check_minilm(llm, sentences.minilm_vectors(path))
