"""Tiny random-weight checkpoints, saved by transformers, and transformers as the oracle for them.

The fixture `checkpoint` (tests/conftest.py) gives directories, made once a session: `checkpoint("qwen3")`; and
`import checkpoints` works in every test module. No checkpoint has an end-of-sequence id or a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    import pytest

_Made = TypeVar("_Made")
VOCAB, WINDOW = 199, 8  # a vocabulary that tp=2 does not divide
_SHAPE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=False)
_LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-mha": ("llama", {}),
    "llama3-gqa": ("llama", dict(num_key_value_heads=2, num_hidden_layers=4, rope_parameters=_LLAMA3)),
    "llama-mqa-tied": ("llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-linear-biases": ("llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True, rope_parameters=(
        dict(rope_type="linear", rope_theta=10000.0, factor=4.0)))),
    "llama-dynamic": ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))),
    "mistral-window": ("mistral", dict(num_key_value_heads=2, sliding_window=WINDOW)),
    "qwen2-tied": ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2-some-windows": ("qwen2", dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=WINDOW,
                                         max_window_layers=1)),
    "qwen3": ("qwen3", dict(num_key_value_heads=2, head_dim=32)),
    "gpt2": ("gpt2", dict(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=256, tie_word_embeddings=True)),
}
NAMES = tuple(CHECKPOINTS)
# Else 0: chosen so that no greedy lead is under 1e-3 in the 64 tokens after each of `prompts()`.
_SEEDS = {"llama-linear-biases": 3, "mistral-window": 3}
SHARDED = "llama3-gqa"  # saved as several files with an index


def made_once(save: Callable[[str, Path], _Made], folders: pytest.TempPathFactory) -> Callable[[str], _Made]:
    """A function that gives a checkpoint's directory, or what else `save` returns, by its name, and saves it on first
    use."""
    made: dict[str, _Made] = {}

    def get(name: str) -> _Made:
        if name not in made:
            made[name] = save(name, folders.mktemp("checkpoint") / name)
        return made[name]

    return get


def save(name: str, directory: Path) -> Path:
    """Write one of CHECKPOINTS."""
    kind, options = CHECKPOINTS[name]
    return save_model(kind, {**({} if kind == "gpt2" else _SHAPE), **options}, directory, _SEEDS.get(name, 0),
                      "100KB" if name == SHARDED else "1GB")


def save_model(kind: str, options: dict[str, Any], directory: Path, seed: int = 0, shard_size: str = "1GB") -> Path:
    """Write a checkpoint: fp32 weights whose scale makes greedy choices clear, biases and norms random too."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **options, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "sinks")):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.uniform_(0.0, 0.3, generator=generator)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def shard(directory: Path, count: int) -> dict[str, str]:
    """Split model.safetensors into `count` files with an index. Returns the index's weight_map."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    mapped = {name: f"shard-{i % count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(mapped.values())):
        save_file({n: tensors[n] for n, f in mapped.items() if f == file}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": mapped}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return mapped


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model, attention written out (so that windows are masks and nothing is fused)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager",
                                                trust_remote_code=False).eval()


@torch.no_grad()
def logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), VOCAB] fp32: of the token after each position."""
    logits: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@torch.no_grad()
def greedy(model: Any, token_ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """`count` greedy tokens after a prompt, and each one's lead in log-probability over the second best."""
    ids, tokens, leads, cache = torch.tensor([token_ids]), [], [], None
    for _ in range(count):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
        ids = best.indices[:1].view(1, 1)
    return tokens, leads


def prompts(count: int = 4, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Ragged random prompts: the first is the longest, the last one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(longest, 1, count).round().int().tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
